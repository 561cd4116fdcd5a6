"""TrainConfig, which defines every hyperparameter (knob), and the records that packages exchange.

Only `TrainConfig` gives a knob its name, type, bounds and default. A search space searches these
names, the sampler proposes them, the trainer reads them, the record and MLflow store them, figures
label them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from tune_cifar.errors import ConfigError, describe_validation_error, did_you_mean

ModelName = Literal["s6", "s7", "s8", "s10", "s10_postact"]
# A network of the user's own, as FILE.py:NAME or package.module:NAME.
OWN_MODEL = re.compile(r"(\S+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")
OWN_MODEL_WORDS = "your own FILE.py:NAME"
OWN_FIELDS = ("model_args", "model_digest")
ARGUMENT = "model_args."
"""What the knobs of a network's own arguments start with."""
Argument = bool | int | float | str
Status = Literal["running", "complete", "stopped", "diverged", "failed"]

MAX_EPOCHS = 1000
# Of trainings and samplers: a search's sampler adds the trial's number, and numpy takes 32 bits.
MAX_SEED = 2**31 - 1


def knob(
    default: Any,
    label: str,
    used_by: str,
    *,
    unit: str = "",
    log: bool = False,
    enum: list[JsonValue] | None = None,
    **bounds: Any,
) -> Any:
    """Return a pydantic field with what tables and axes show of a knob.

    Args:
        label: its name in tables and figures.
        used_by: the module that reads it, such as `train/optim`.
        unit: its unit, or empty.
        log: whether axes show it on a logarithmic scale.
        enum: its words, where its type does not say them.
        bounds: pydantic's `gt`, `ge`, `lt` and `le`.
    """
    extra: dict[str, JsonValue] = {"label": label, "used_by": used_by, "unit": unit, "log": log}
    if enum is not None:
        extra["enum"] = enum
    return Field(default, json_schema_extra=extra, **bounds)


class Frozen(BaseModel):
    """Base of the records: unknown keys are refused, values are neither coerced nor changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TrainConfig(Frozen):
    """The recipe of one training: flat, frozen, hashed.

    A knob that the chosen optimizer, schedule or augmentation does not use is *inactive*
    (`inactive_knobs`): it changes nothing and is left out of the fingerprint.

    Raises:
        ConfigError: one sentence with knob, rule and value; of an unknown knob, the nearest name.
    """

    model: str = knob(..., "model", "models/build", enum=[*get_args(ModelName), OWN_MODEL_WORDS])
    """Network, by the name of its source system; or your own class or function."""
    model_args: tuple[tuple[str, Argument], ...] = knob((), "model arguments", "models/custom")
    """Further arguments of your own network, sorted by name; each is a knob `model_args.NAME`."""
    model_digest: str = knob("", "model source", "models/custom")
    """Digest of your own network's source, once it has been read."""
    dropout: float = knob(0.0, "dropout", "models/build", ge=0.0, le=0.9)
    """Probability of zeroing an activation (a whole channel in s6); the model decides where."""

    optimizer: Literal["sgd", "adam", "adamw"] = knob(..., "optimizer", "train/optim")
    nesterov: bool = knob(False, "Nesterov", "train/optim")
    """Nesterov momentum; SGD only."""
    momentum: float = knob(0.9, "momentum", "train/optim", ge=0.0, lt=1.0)
    """SGD's momentum, or Adam's beta1, unless OneCycle cycles it between base_momentum and
    max_momentum."""
    weight_decay: float = knob(
        0.0, "weight decay (coupled)", "train/optim", log=True, ge=0.0, le=1.0
    )
    """L2 added to the gradient (SGD, Adam)."""
    decoupled_weight_decay: float = knob(
        0.0, "weight decay (decoupled)", "train/optim", log=True, ge=0.0, le=1.0
    )
    """Shrinkage of the weights by lr x this value a step, apart from the gradient (AdamW)."""

    schedule: Literal["onecycle", "cosine", "step", "constant"] = knob(
        ..., "schedule", "train/optim"
    )
    max_lr: float = knob(..., "max LR", "train/optim", log=True, gt=0.0, le=100.0)
    """Highest learning rate of the schedule: OneCycle's peak, the start of the others."""
    pct_start: float = knob(0.3, "warm-up fraction", "train/optim", gt=0.0, lt=1.0)
    """Fraction of all steps in which OneCycle's LR rises."""
    div_factor: float = knob(25.0, "initial LR divisor", "train/optim", log=True, ge=1.0, le=1e6)
    """OneCycle starts at max_lr / div_factor."""
    final_div_factor: float = knob(1e4, "final LR divisor", "train/optim", log=True, ge=1.0, le=1e8)
    """OneCycle ends at max_lr / (div_factor x final_div_factor)."""
    anneal_strategy: Literal["cos", "linear"] = knob("cos", "annealing", "train/optim")
    cycle_momentum: bool = knob(True, "cycle momentum", "train/optim")
    """OneCycle moves momentum (beta1) against the LR, between max_momentum and base_momentum."""
    base_momentum: float = knob(0.85, "lowest momentum", "train/optim", ge=0.0, lt=1.0)
    max_momentum: float = knob(0.95, "highest momentum", "train/optim", ge=0.0, lt=1.0)
    milestone_fractions: tuple[float, ...] = knob(
        (0.5, 0.75), "step milestones", "train/optim", unit="of training"
    )
    """Fractions of all steps after which the step schedule multiplies the LR by gamma; increasing,
    in (0, 1)."""
    gamma: float = knob(0.1, "step factor", "train/optim", log=True, gt=0.0, le=1.0)
    warm_restarts: tuple[int, ...] = knob((), "warm restarts", "train/optim", unit="epochs")
    """Epochs after which the whole schedule starts again, over the epochs up to the next restart;
    weights and the optimizer's state stay (Loshchilov & Hutter 2017). Increasing, before the last
    epoch."""

    batch_size: int = knob(..., "batch size", "train/batches", unit="images", log=True, ge=2)
    epochs: int = knob(..., "epochs", "train/trainer", ge=1, le=MAX_EPOCHS)
    label_smoothing: float = knob(0.0, "label smoothing", "train/step", ge=0.0, le=0.9)
    ema_decay: float = knob(0.0, "EMA decay", "train/trainer", ge=0.0, lt=1.0)
    """Decay per step of the weights' moving average, which is then evaluated and kept; 0 keeps the
    last weights."""
    train_size: int = knob(45_000, "training images", "data/load", unit="images", ge=1)
    """A stratified prefix of CIFAR-10's 45,000 training images; 50,000, without validation, takes
    all. The bounds of sizes are the data set's: see dataset.py."""
    val_size: int = knob(5_000, "validation images", "data/load", unit="images", ge=0)
    """A stratified prefix of CIFAR-10's 5,000; 0 only with train_size 50,000."""
    seed: int = knob(0, "seed", "train/step", ge=0, le=MAX_SEED)
    """Seeds every random stream of the training: initial weights, order, augmentation, dropout."""

    augment_backend: Literal["batched", "albumentations"] = knob(
        "batched", "augmentation backend", "train/batches"
    )
    """What applies the policy: our own code on whole batches, or albumentations image by image."""
    crop_pad: int = knob(0, "crop padding", "augment/policies", unit="px", ge=0, le=16)
    """Pad by reflection (101) on each side, then crop the image's size at random; 0 is off."""
    hflip_p: float = knob(0.0, "flip probability", "augment/policies", ge=0.0, le=1.0)
    hflip_mode: Literal["random", "alternating"] = knob("random", "flip mode", "train/batches")
    """random: every epoch draws anew. alternating: an image is flipped in a fraction hflip_p of the
    epochs, evenly spaced: at 0.5 in every second one."""
    shift_scale_rotate_p: float = knob(0.0, "warp probability", "augment/policies", ge=0.0, le=1.0)
    shift_limit: float = knob(
        0.0, "shift limit", "augment/policies", unit="of the side", ge=0.0, le=0.5
    )
    scale_limit: float = knob(0.0, "scale limit", "augment/policies", ge=0.0, le=0.5)
    """The scale is drawn from 1 - limit to 1 + limit."""
    rotate_limit: float = knob(
        0.0, "rotation limit", "augment/policies", unit="degrees", ge=0.0, le=180.0
    )
    cutout_p: float = knob(0.0, "cutout probability", "augment/policies", ge=0.0, le=1.0)
    cutout_size: int = knob(0, "cutout size", "augment/policies", unit="px", ge=0)
    """Side of the one square hole, in the data set's mean colour; it lies inside the image."""
    gray_p: float = knob(0.0, "gray probability", "augment/policies", ge=0.0, le=1.0)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**fold_arguments(values))
        except ValidationError as exc:
            problem = describe_validation_error(exc, TrainConfig)
            raise ConfigError(f"configuration: {problem}") from exc

    @field_validator("model", mode="before")
    @classmethod
    def _check_model(cls, value: Any) -> Any:
        names = get_args(ModelName)
        if value not in names and not OWN_MODEL.fullmatch(str(value)):
            known = ", ".join(map(repr, names))
            hint = did_you_mean(str(value), names)
            raise ValueError(f"model must be {known} or {OWN_MODEL_WORDS}, got {value!r}.{hint}")
        return value

    @field_validator("model_args", mode="before")
    @classmethod
    def _read_arguments(cls, value: Any) -> Any:
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return tuple(sorted(value.items()))
        if isinstance(value, list | tuple) and all(
            isinstance(pair, list | tuple) for pair in value
        ):
            return tuple(map(tuple, value))
        raise ValueError(f"model_args must be names with values, got {value!r}")

    @model_serializer(mode="wrap")
    def _leave_out_own(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write what only a network of one's own has for such a one alone."""
        values: dict[str, Any] = handler(self)
        return values if self.is_own else {k: v for k, v in values.items() if k not in OWN_FIELDS}

    @field_validator("warm_restarts", "milestone_fractions", mode="before")
    @classmethod
    def _read_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        if self.model_args and not self.is_own:
            got = ", ".join(name for name, _ in self.model_args)
            raise ValueError(f"model_args must be empty for {self.model}, got {got}")
        if self.batch_size > self.train_size:
            raise ValueError(
                "batch_size <= train_size must hold, "
                f"got batch_size {self.batch_size} and train_size {self.train_size}"
            )
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("momentum > 0 must hold with nesterov, got 0")
        if self.base_momentum > self.max_momentum:
            raise ValueError(
                "base_momentum <= max_momentum must hold, "
                f"got base_momentum {self.base_momentum} and max_momentum {self.max_momentum}"
            )
        if any(length < 1 for length in self.cycle_epochs):
            raise ValueError(
                "warm_restarts increasing from 1 to below epochs must hold, "
                f"got {list(self.warm_restarts)} and epochs {self.epochs}"
            )
        fractions = (0.0, *self.milestone_fractions, 1.0)
        if any(a >= b for a, b in itertools.pairwise(fractions)):
            raise ValueError(
                "milestone_fractions increasing within (0, 1) must hold, "
                f"got {self.milestone_fractions}"
            )
        return self

    @property
    def is_own(self) -> bool:
        """Whether the network is the user's own."""
        return ":" in self.model

    @property
    def arguments(self) -> dict[str, Argument]:
        """The knobs of the network's own arguments, with their values."""
        return {f"{ARGUMENT}{name}": value for name, value in self.model_args}

    def get(self, knob: str) -> Any:
        """Return a knob's value, also of the network's own argument."""
        return self.arguments[knob] if knob.startswith(ARGUMENT) else getattr(self, knob)

    @property
    def num_steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last, smaller batch is one of them."""
        return -(-self.train_size // self.batch_size)

    def shorten(self, epochs: int, replicate: int = 0) -> TrainConfig:
        """Return the recipe with its whole schedule in fewer epochs, under a replicate's seed."""
        restarts = tuple(epoch for epoch in self.warm_restarts if epoch < epochs)
        seed = (self.seed + replicate) % (MAX_SEED + 1)
        return self.model_copy(update={"epochs": epochs, "warm_restarts": restarts, "seed": seed})

    @property
    def cycle_epochs(self) -> tuple[int, ...]:
        """Length of each of the schedule's cycles, in epochs."""
        bounds = (0, *self.warm_restarts, self.epochs)
        return tuple(end - start for start, end in itertools.pairwise(bounds))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the training: SHA-256 of its active knobs as JSON.

        Knobs that were added later are left out at their default: fingerprints stay as they were.
        """
        ignored = {*inactive_knobs(self), *_knobs_of_inactive_ops(self)}
        defaults = {name: TrainConfig.model_fields[name].default for name in ADDED_KNOBS}
        ignored |= {name for name, value in defaults.items() if getattr(self, name) == value}
        active = {k: v for k, v in self.model_dump(mode="json").items() if k not in ignored}
        return hashlib.sha256(json.dumps(active, sort_keys=True).encode()).hexdigest()[:16]


def fold_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config's values with every `model_args.NAME` in model_args."""
    named = {name: value for name, value in values.items() if name.startswith(ARGUMENT)}
    if not named:
        return values
    arguments = dict(values.get("model_args", ()))
    arguments |= {name.removeprefix(ARGUMENT): value for name, value in named.items()}
    rest = {name: value for name, value in values.items() if name not in named}
    return {**rest, "model_args": arguments}


KNOBS: tuple[str, ...] = tuple(n for n in TrainConfig.model_fields if n not in OWN_FIELDS)
ADDED_KNOBS = ("warm_restarts", "ema_decay", "hflip_mode")
"""Those that the first records lack."""


def inactive_knobs(config: TrainConfig) -> dict[str, str]:
    """Return the knobs that change nothing in this configuration, each with the reason in words."""
    optimizer, schedule = config.optimizer, config.schedule
    onecycle = schedule == "onecycle"
    cycled = onecycle and config.cycle_momentum
    no_warp = not any((config.shift_limit, config.scale_limit, config.rotate_limit))
    # Names, whether they are inactive, the reason.
    rules = (
        ("nesterov", optimizer != "sgd", f"optimizer {optimizer} has no Nesterov momentum"),
        ("weight_decay", optimizer == "adamw", "adamw takes decoupled_weight_decay"),
        ("decoupled_weight_decay", optimizer != "adamw", f"{optimizer} takes weight_decay"),
        ("momentum", cycled, "OneCycle cycles momentum between base_momentum and max_momentum"),
        (
            "base_momentum max_momentum",
            not cycled,
            "momentum is cycled only by schedule onecycle with cycle_momentum",
        ),
        (
            "pct_start div_factor final_div_factor anneal_strategy cycle_momentum",
            not onecycle,
            f"schedule {schedule} is not onecycle",
        ),
        ("milestone_fractions gamma", schedule != "step", f"schedule {schedule} is not step"),
        ("warm_restarts", schedule == "constant", "schedule constant has nothing to restart"),
        (
            "shift_limit scale_limit rotate_limit",
            config.shift_scale_rotate_p == 0,
            "shift_scale_rotate_p is 0",
        ),
        ("shift_scale_rotate_p", no_warp, "shift_limit, scale_limit and rotate_limit are all 0"),
        ("hflip_mode", config.hflip_p == 0, "hflip_p is 0"),
        ("cutout_size", config.cutout_p == 0, "cutout_p is 0"),
        ("cutout_p", config.cutout_size == 0, "cutout_size is 0"),
    )
    return {name: reason for names, inactive, reason in rules if inactive for name in names.split()}


def _knobs_of_inactive_ops(config: TrainConfig) -> list[str]:
    """Return all knobs of the operations that never act.

    So trainings that switch an operation off by different knobs have one fingerprint.
    """
    names = []
    if config.cutout_p == 0 or config.cutout_size == 0:
        names += ["cutout_p", "cutout_size"]
    limits = (config.shift_limit, config.scale_limit, config.rotate_limit)
    if config.shift_scale_rotate_p == 0 or not any(limits):
        names += ["shift_scale_rotate_p", "shift_limit", "scale_limit", "rotate_limit"]
    return names


class EpochResult(Frozen):
    """What one epoch of a training yields.

    Accuracies are fractions in [0, 1], losses are means per image in nats.
    """

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
    """Training images per second of training, without the evaluation."""
    peak_memory_mb: float
    """Peak of the process (CPU) or of what torch's allocator held of the device (CUDA), in MiB."""


# The fields of an EpochResult that a reproduction must repeat bit for bit; the others measure the
# machine.
REPRODUCIBLE_FIELDS = ("epoch", "step", "train_loss", "train_acc", "val_loss", "val_acc", "lr")


class Numerics(Frozen):
    """Everything outside the recipe that may change bits.

    Resolved where the training runs (`train/numerics`), recorded, restored by `reproduce`.
    """

    device: Literal["cpu", "cuda"]
    device_name: str
    """Name of the processor or GPU."""
    capability: str
    """Instruction set that torch's kernels use on a CPU, compute capability of a GPU."""
    precision: Literal["fp32", "tf32", "bf16"]
    """Of convolutions and matrix products; `tf32` is that of a GPU's fp32 convolutions."""
    memory_format: Literal["channels_last", "contiguous"]
    threads: int = Field(ge=1)
    """Threads of one training on the CPU."""
    deterministic: bool
    """Only deterministic kernels (always true in effect on a CPU)."""
    execution: Literal["eager", "captured", "compiled"]
    """How a training step runs: kernel by kernel, or captured once and replayed."""
    versions: dict[str, str]
    """Versions of python, torch, numpy and albumentations."""
    settings: dict[str, str] | None = None
    """Environment variables of computing libraries that are set; None in a record without them."""

    @model_validator(mode="before")
    @classmethod
    def _name_tf32(cls, values: Any) -> Any:
        """Read tf32 where an old record says fp32 of a GPU: torch's default ruled then."""
        old = {"device": "cuda", "precision": "fp32", "settings": None}
        if isinstance(values, dict) and {**old, **values}.items() >= old.items():
            return {**values, "precision": "tf32"}
        return values


class DataInfo(Frozen):
    """Which images a training saw."""

    name: str
    """`shapes` is synthetic data: results on it say nothing about CIFAR-10."""
    digest: str
    """Hash of the data files, or of the generator's version (shapes)."""
    split_hash: str
    """Hash of the order of indices that fixes validation and training images."""
    num_classes: int = 10
    """Old records, of CIFAR-10 and shapes, lack it."""

    @property
    def label(self) -> str:
        """`NOT CIFAR-10 (shapes)`; empty for CIFAR-10, else the name."""
        return label_data(self.name)

    @property
    def chance(self) -> float:
        """Accuracy of guessing, which is the score of a diverged training."""
        return 1 / self.num_classes


def label_data(name: str) -> str:
    """Return what stands beside every result on a data set: see DataInfo.label."""
    return {"cifar10": "", "shapes": "NOT CIFAR-10 (shapes)"}.get(name, name)
