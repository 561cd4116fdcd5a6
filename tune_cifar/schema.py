"""What a training is made of: every knob once, and the records that travel between the rooms.

`TrainConfig` is the only place that names a knob, its type, its bounds and its default. A search space searches
these names, the sampler proposes them, the engine reads them, the record and MLflow store them, figures label them.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from tune_cifar.errors import ConfigError

ModelName = Literal["s6", "s7", "s8", "s10", "s10_postact"]
Status = Literal["running", "complete", "stopped", "diverged", "failed"]

# CIFAR-10 has 50,000 training images; 5,000 of them (500 a class) are set aside for validation.
NUM_TRAIN_IMAGES = 50_000
NUM_VAL_IMAGES = 5_000
NUM_CLASSES = 10
CHANCE_ACCURACY = 1 / NUM_CLASSES
MAX_EPOCHS = 1000


def knob(
    default: Any,
    label: str,
    used_by: str,
    *,
    unit: str = "",
    log: bool = False,
    **bounds: Any,
) -> Any:
    """A pydantic field that also knows how to be drawn: label, unit and scale are what tables and axes show."""
    extra: dict[str, JsonValue] = {"label": label, "used_by": used_by, "unit": unit, "log": log}
    return Field(default, json_schema_extra=extra, **bounds)


class Frozen(BaseModel):
    """Base of the records: unknown keys refused, values never coerced, never changed after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TrainConfig(Frozen):
    """The recipe of one training: flat, frozen, hashed.

    A knob that the chosen optimizer, schedule or augmentation does not use is *dead* (`inactive_knobs`): it keeps its
    default, changes nothing and is left out of the fingerprint.

    Raises:
        ConfigError: one sentence naming the knob, the rule and the value, with the nearest name for an unknown knob.
    """

    model: ModelName = knob(..., "model", "models")
    """Network, by the name of its source system."""
    dropout: float = knob(0.0, "dropout", "models", ge=0.0, le=0.9)
    """Probability of zeroing an activation (a whole channel in s6); where it sits is the model's affair."""

    optimizer: Literal["sgd", "adam", "adamw"] = knob(..., "optimizer", "optim")
    nesterov: bool = knob(False, "Nesterov", "optim")
    """Nesterov momentum; SGD only."""
    momentum: float = knob(0.9, "momentum", "optim", ge=0.0, lt=1.0)
    """SGD's momentum, or Adam's beta1, unless OneCycle cycles it (then base_momentum and max_momentum count)."""
    weight_decay: float = knob(0.0, "weight decay (coupled)", "optim", log=True, ge=0.0, le=1.0)
    """L2 added to the gradient (SGD, Adam)."""
    decoupled_weight_decay: float = knob(
        0.0, "weight decay (decoupled)", "optim", log=True, ge=0.0, le=1.0
    )
    """Shrinkage of the weights by lr x this value a step, apart from the gradient (AdamW)."""

    schedule: Literal["onecycle", "cosine", "step", "constant"] = knob(..., "schedule", "optim")
    max_lr: float = knob(..., "max LR", "optim", log=True, gt=0.0, le=100.0)
    """Highest learning rate of the schedule: OneCycle's peak, the start of the others."""
    pct_start: float = knob(0.3, "warm-up fraction", "optim", gt=0.0, lt=1.0)
    """Fraction of all steps in which OneCycle's LR rises."""
    div_factor: float = knob(25.0, "initial LR divisor", "optim", log=True, ge=1.0, le=1e6)
    """OneCycle starts at max_lr / div_factor."""
    final_div_factor: float = knob(1e4, "final LR divisor", "optim", log=True, ge=1.0, le=1e8)
    """OneCycle ends at max_lr / (div_factor x final_div_factor)."""
    anneal_strategy: Literal["cos", "linear"] = knob("cos", "annealing", "optim")
    cycle_momentum: bool = knob(True, "cycle momentum", "optim")
    """OneCycle moves momentum (beta1) against the LR, between max_momentum and base_momentum."""
    base_momentum: float = knob(0.85, "lowest momentum", "optim", ge=0.0, lt=1.0)
    max_momentum: float = knob(0.95, "highest momentum", "optim", ge=0.0, lt=1.0)
    milestone_fractions: tuple[float, ...] = knob(
        (0.5, 0.75), "step milestones", "optim", unit="of training"
    )
    """Fractions of all steps after which the step schedule multiplies the LR by gamma; increasing, in (0, 1)."""
    gamma: float = knob(0.1, "step factor", "optim", log=True, gt=0.0, le=1.0)
    warm_restarts: tuple[int, ...] = knob((), "warm restarts", "engine", unit="epochs")
    """Epochs after which the whole schedule begins anew, as long as to the next one; weights and the optimizer's state
    stay (Loshchilov & Hutter 2017). Increasing, before the last epoch."""

    batch_size: int = knob(
        ..., "batch size", "engine", unit="images", log=True, ge=2, le=NUM_TRAIN_IMAGES
    )
    epochs: int = knob(..., "epochs", "engine", ge=1, le=MAX_EPOCHS)
    label_smoothing: float = knob(0.0, "label smoothing", "engine", ge=0.0, le=0.9)
    train_size: int = knob(
        45_000, "training images", "data", unit="images", ge=NUM_CLASSES, le=NUM_TRAIN_IMAGES
    )
    """A stratified prefix of the 45,000 training images; 50,000 means all of them and no validation."""
    val_size: int = knob(
        NUM_VAL_IMAGES, "validation images", "data", unit="images", ge=0, le=NUM_VAL_IMAGES
    )
    """A stratified prefix of the 5,000 validation images; 0 only together with train_size 50,000."""
    seed: int = knob(0, "seed", "engine", ge=0, le=2**31 - 1)
    """Parent of every random stream of the training: initial weights, order, augmentation, dropout."""

    augment_backend: Literal["batched", "albumentations"] = knob(
        "batched", "augmentation backend", "augment"
    )
    """Which interpreter applies the policy: whole batches on the device, or albumentations image by image."""
    crop_pad: int = knob(0, "crop padding", "augment", unit="px", ge=0, le=16)
    """Pad by reflection (101) on each side, then crop 32x32 at random; 0 is off."""
    hflip_p: float = knob(0.0, "flip probability", "augment", ge=0.0, le=1.0)
    shift_scale_rotate_p: float = knob(0.0, "warp probability", "augment", ge=0.0, le=1.0)
    shift_limit: float = knob(0.0, "shift limit", "augment", unit="of the side", ge=0.0, le=0.5)
    scale_limit: float = knob(0.0, "scale limit", "augment", ge=0.0, le=0.5)
    """The scale is drawn from 1 - limit to 1 + limit."""
    rotate_limit: float = knob(0.0, "rotation limit", "augment", unit="degrees", ge=0.0, le=180.0)
    cutout_p: float = knob(0.0, "cutout probability", "augment", ge=0.0, le=1.0)
    cutout_size: int = knob(0, "cutout size", "augment", unit="px", ge=0, le=32)
    """Side of the one square hole, filled with the data set's mean colour; it lies wholly inside the image."""
    gray_p: float = knob(0.0, "gray probability", "augment", ge=0.0, le=1.0)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as exc:
            raise ConfigError(
                f"configuration: {describe_validation_error(exc, TrainConfig)}"
            ) from exc

    @field_validator("warm_restarts", mode="before")
    @classmethod
    def _read_restarts(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("milestone_fractions", mode="before")
    @classmethod
    def _read_milestones(cls, value: Any) -> Any:
        return (
            tuple(float(v) if isinstance(v, int) else v for v in value)
            if isinstance(value, list | tuple)
            else value
        )

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        full = self.train_size == NUM_TRAIN_IMAGES
        if full != (self.val_size == 0):
            raise ValueError(
                f"val_size = 0 exactly when train_size = {NUM_TRAIN_IMAGES} must hold, "
                f"got val_size {self.val_size} and train_size {self.train_size}"
            )
        if not full and self.train_size > NUM_TRAIN_IMAGES - NUM_VAL_IMAGES:
            raise ValueError(
                f"train_size <= {NUM_TRAIN_IMAGES - NUM_VAL_IMAGES} or train_size = {NUM_TRAIN_IMAGES} must hold, "
                f"got {self.train_size}"
            )
        if self.batch_size > self.train_size:
            raise ValueError(
                f"batch_size <= train_size must hold, got batch_size {self.batch_size} and train_size {self.train_size}"
            )
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("momentum > 0 must hold with nesterov, got 0")
        if self.base_momentum > self.max_momentum:
            raise ValueError(
                "base_momentum <= max_momentum must hold, "
                f"got base_momentum {self.base_momentum} and max_momentum {self.max_momentum}"
            )
        if any(a >= b for a, b in itertools.pairwise((0, *self.warm_restarts, self.epochs))):
            raise ValueError(
                f"warm_restarts increasing from 1 to below epochs must hold, got {list(self.warm_restarts)} "
                f"and epochs {self.epochs}"
            )
        fractions = (0.0, *self.milestone_fractions, 1.0)
        if any(a >= b for a, b in itertools.pairwise(fractions)):
            raise ValueError(
                f"milestone_fractions increasing within (0, 1) must hold, got {self.milestone_fractions}"
            )
        return self

    @property
    def num_steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch: the last, smaller batch is kept."""
        return -(-self.train_size // self.batch_size)

    def shorten(self, epochs: int) -> TrainConfig:
        """The same recipe over fewer epochs: a complete training of its own, its whole schedule in them."""
        restarts = tuple(epoch for epoch in self.warm_restarts if epoch < epochs)
        return self.model_copy(update={"epochs": epochs, "warm_restarts": restarts})

    @property
    def cycle_epochs(self) -> tuple[int, ...]:
        """Lengths in epochs of the schedule's cycles, one after another."""
        return tuple(
            end - start for start, end in itertools.pairwise((0, *self.warm_restarts, self.epochs))
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the training: SHA-256 of all living knobs in canonical JSON."""
        silent = {*inactive_knobs(self), *_knobs_of_inactive_ops(self)}
        living = {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if name not in silent
        }
        return hashlib.sha256(json.dumps(living, sort_keys=True).encode()).hexdigest()[:16]


KNOBS: tuple[str, ...] = tuple(TrainConfig.model_fields)


def inactive_knobs(config: TrainConfig) -> dict[str, str]:
    """The knobs that change nothing in this configuration, each with the reason in words."""
    dead: dict[str, str] = {}

    def mark(names: str, is_dead: bool, reason: str) -> None:
        if is_dead:
            dead.update(dict.fromkeys(names.split(), reason))

    onecycle = config.schedule == "onecycle"
    cycles = onecycle and config.cycle_momentum
    mark(
        "nesterov",
        config.optimizer != "sgd",
        f"optimizer {config.optimizer} has no Nesterov momentum",
    )
    mark("weight_decay", config.optimizer == "adamw", "adamw takes decoupled_weight_decay")
    mark(
        "decoupled_weight_decay",
        config.optimizer != "adamw",
        f"{config.optimizer} takes weight_decay",
    )
    mark("momentum", cycles, "OneCycle cycles momentum between base_momentum and max_momentum")
    mark(
        "base_momentum max_momentum",
        not cycles,
        "momentum is cycled only by schedule onecycle with cycle_momentum",
    )
    mark(
        "pct_start div_factor final_div_factor anneal_strategy cycle_momentum",
        not onecycle,
        f"schedule {config.schedule} is not onecycle",
    )
    mark(
        "milestone_fractions gamma",
        config.schedule != "step",
        f"schedule {config.schedule} is not step",
    )
    mark(
        "warm_restarts",
        config.schedule == "constant",
        "schedule constant has nothing to begin anew",
    )
    mark(
        "shift_limit scale_limit rotate_limit",
        config.shift_scale_rotate_p == 0,
        "shift_scale_rotate_p is 0",
    )
    limits = (config.shift_limit, config.scale_limit, config.rotate_limit)
    mark(
        "shift_scale_rotate_p",
        not any(limits),
        "shift_limit, scale_limit and rotate_limit are all 0",
    )
    mark("cutout_size", config.cutout_p == 0, "cutout_p is 0")
    mark("cutout_p", config.cutout_size == 0, "cutout_size is 0")
    return dead


def _knobs_of_inactive_ops(config: TrainConfig) -> list[str]:
    """All knobs of the operations that never act, however they are switched off: equal trainings, equal names."""
    names = [] if config.warm_restarts else ["warm_restarts"]
    if config.cutout_p == 0 or config.cutout_size == 0:
        names += ["cutout_p", "cutout_size"]
    if config.shift_scale_rotate_p == 0 or not any(
        (config.shift_limit, config.scale_limit, config.rotate_limit)
    ):
        names += ["shift_scale_rotate_p", "shift_limit", "scale_limit", "rotate_limit"]
    return names


def nearest_name(name: str, names: tuple[str, ...] | list[str]) -> str:
    """` Did you mean X?` for the closest of names, or an empty string when none is close."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a pydantic error as `rule must hold, got value. Hint`; an unknown name before a missing
    one, since it is often the missing one misspelt."""
    problems = error.errors(include_url=False)
    return describe_problem(
        min(problems, key=lambda problem: problem["type"] != "extra_forbidden"), model
    )


def describe_problem(problem: ErrorDetails, model: type[BaseModel]) -> str:
    """One pydantic problem as a sentence in the house's form."""
    where = ".".join(str(part) for part in problem["loc"])
    context, got = problem.get("ctx", {}), problem["input"]
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"{where} is not a known name.{nearest_name(where, tuple(model.model_fields))}"
    if kind == "missing":
        return f"{where} must be given."
    if kind == "value_error":
        return f"{context['error']}."
    signs = {
        "greater_than": ("gt", ">"),
        "greater_than_equal": ("ge", ">="),
        "less_than": ("lt", "<"),
    }
    signs["less_than_equal"] = ("le", "<=")
    if kind in signs:
        key, sign = signs[kind]
        return f"{where} {sign} {context[key]:g} must hold, got {got!r}."
    if kind == "literal_error":
        options = (
            tuple(get_args(model.model_fields[where].annotation))
            if where in model.model_fields
            else ()
        )
        hint = nearest_name(str(got), [str(o) for o in options])
        return f"{where} must be {context['expected']}, got {got!r}.{hint}"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {got!r}."


class EpochResult(Frozen):
    """What one epoch of a training yields. Accuracies are fractions in [0, 1]; losses are means per image in nats."""

    epoch: int
    """From 1."""
    step: int
    """Optimizer steps done since the start of the training."""
    train_loss: float
    """Mean over the epoch's augmented batches, in training mode."""
    train_acc: float
    val_loss: float | None
    """None when the training has no validation images."""
    val_acc: float | None
    lr: float
    """Learning rate of the epoch's last step."""
    epoch_seconds: float
    """Training and evaluation."""
    images_per_second: float
    """Training images over training time, evaluation not counted."""
    peak_memory_mb: float
    """Peak of the process (CPU) or of what torch's allocator held of the device (CUDA), in MiB."""


# The part of an EpochResult that a reproduction must meet bit for bit; the rest measures the machine.
REPRODUCIBLE_FIELDS = ("epoch", "step", "train_loss", "train_acc", "val_loss", "val_acc", "lr")


class Numerics(Frozen):
    """Everything outside the recipe that may change bits. Resolved once (`numerics.py`), recorded, restored."""

    device: Literal["cpu", "cuda"]
    device_name: str
    """Name of the processor or GPU."""
    capability: str
    """Instruction set that torch's kernels use on a CPU, compute capability of a GPU."""
    precision: Literal["fp32", "bf16"]
    memory_format: Literal["channels_last", "contiguous"]
    threads: int = Field(ge=1)
    """Threads of one training on the CPU."""
    deterministic: bool
    """Only deterministic kernels (always true in effect on a CPU)."""
    execution: Literal["eager", "captured"]
    """How a training step runs: kernel by kernel, or as one program with its knobs in device memory."""
    versions: dict[str, str]
    """Of the libraries that compute: python, torch, numpy, albumentations."""


class DataInfo(Frozen):
    """Which images a training saw."""

    name: Literal["cifar10", "shapes"]
    """`shapes` is synthetic data: a figure measured on it says nothing about CIFAR-10."""
    digest: str
    """Of the data files (CIFAR-10) or of the generator's version (shapes)."""
    split_hash: str
    """Of the order of indices that fixes validation and training images."""

    @property
    def label(self) -> str:
        """`NOT CIFAR-10 (shapes)`; empty for CIFAR-10, whose figures need no warning."""
        return label_data(self.name)


def label_data(name: str) -> str:
    """The warning that goes with every figure of a data set: see DataInfo.label."""
    return "" if name == "cifar10" else f"NOT CIFAR-10 ({name})"
