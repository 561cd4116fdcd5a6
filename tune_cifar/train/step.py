"""One training step of a config on a device: augment, forward, backward, optimizer.

The same recipe has two executions. `EagerStep` lets torch launch one kernel after another, with
the knobs as numbers. `CapturedStep` keeps every knob in device memory, so that one CUDA graph
serves all configs with the same graph key: a warm worker reuses it for its next trial. Off CUDA
it runs the same program uncaptured, so its logic is tested on any machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_cifar.augment.batched import apply_policy, draw_policy
from tune_cifar.augment.interpreter import select_interpreter
from tune_cifar.augment.policies import make_policy
from tune_cifar.dataset import CIFAR10, DataDescription
from tune_cifar.models.build import build_model
from tune_cifar.models.dropout import round_probability, set_drop_probability, set_dropout_generator
from tune_cifar.schema import Numerics, TrainConfig
from tune_cifar.train.numerics import autocast, memory_format
from tune_cifar.train.optim import DeviceOptimizer, Settings, apply_settings, make_optimizer

# Knobs of TrainConfig that a captured step reads from device memory. Whether a knob is 0 is part of
# the graph key.
DEVICE_KNOBS = (
    *("dropout", "label_smoothing", "weight_decay", "decoupled_weight_decay"),
    *("crop_pad", "hflip_p", "shift_scale_rotate_p", "shift_limit", "scale_limit", "rotate_limit"),
    *("cutout_p", "cutout_size", "gray_p"),
)
# Before a capture, libraries choose their kernels and allocate their workspaces.
WARM_UP_RUNS = 3


def derive_seed(seed: int, purpose: str) -> int:
    """Return a 63-bit seed for one purpose: init, order, augment or dropout.

    The random streams of different purposes are unrelated.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generators(device: torch.device) -> dict[str, torch.Generator]:
    """Return the random generators on the device, by purpose."""
    return {purpose: torch.Generator(device) for purpose in ("augment", "dropout")}


def place_model(model: nn.Module, device: torch.device, numerics: Numerics) -> nn.Module:
    """Move a model to the device, its convolution weights in the memory format of Numerics."""
    untyped: Any = model  # torch's types of `to` lack a device beside a memory format
    moved: nn.Module = untyped.to(device, memory_format=memory_format(numerics))
    return moved


def build_initial_model(config: TrainConfig, data: DataDescription = CIFAR10) -> nn.Module:
    """Return the config's network on the CPU; its initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "init"))
        return build_model(config, data)


class EagerStep:
    """A step whose knobs are numbers, with torch's fused optimizers.

    Attributes:
        model: the network on the device.
        optimizer: has a state_dict for checkpoints.
        generators: the random generators on the device, by purpose.
    """

    def __init__(
        self, config: TrainConfig, numerics: Numerics, data: DataDescription = CIFAR10
    ) -> None:
        device = torch.device(numerics.device)
        self._numerics = numerics
        self._label_smoothing = config.label_smoothing
        self._policy = make_policy(config, data)
        self._apply_policy = select_interpreter(config.augment_backend)
        self.generators = make_generators(device)
        for purpose, generator in self.generators.items():
            generator.manual_seed(derive_seed(config.seed, purpose))
        model = build_initial_model(config, data)
        set_dropout_generator(model, self.generators["dropout"])
        self.model = place_model(model, device, numerics)
        self.optimizer = make_optimizer(self.model.parameters(), config)

    def augment(self, images_NCHW: Tensor, flipped_N: Tensor | None = None) -> Tensor:
        """Augment and normalize uint8 images (N, 3, H, W) to float32; advances the generator."""
        draws = draw_policy(self._policy, len(images_NCHW), self.generators["augment"], flipped_N)
        layout = memory_format(self._numerics)
        batch: Tensor = self._apply_policy(self._policy, images_NCHW, draws, layout)
        return batch

    def to_device(self, settings: Sequence[Settings]) -> Sequence[Settings]:
        """Move the settings of coming steps to where `train` reads them."""
        return settings

    def train(
        self,
        images_NCHW: Tensor,
        labels_N: Tensor,
        settings: Settings,
        flipped_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Train on one batch; return its mean loss and number of correct predictions.

        Both stay on the device and are valid until the next step.

        Args:
            flipped_N: as in `draw_policy`.
        """
        images = self.augment(images_NCHW, flipped_N)
        with autocast(self._numerics):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels_N, label_smoothing=self._label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        apply_settings(self.optimizer, settings)
        self.optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == labels_N).sum()


class CapturedStep:
    """A step as one CUDA graph that reads its knobs from device memory.

    See EagerStep for attributes and methods. Three things differ from it: the optimizer is
    `DeviceOptimizer`, label smoothing is written out, and a dropout mask is one uniform number per
    activation. A last, smaller batch runs uncaptured.
    """

    def __init__(
        self, config: TrainConfig, numerics: Numerics, data: DataDescription = CIFAR10
    ) -> None:
        self.graph_key = make_graph_key(config, numerics, data)
        self._numerics, self._data = numerics, data
        self._batch_size = config.batch_size
        self._device = torch.device(numerics.device)
        self.generators = make_generators(self._device)
        self._memory = torch.zeros(len(DEVICE_KNOBS) + len(Settings._fields), device=self._device)
        knobs = dict(zip((*DEVICE_KNOBS, *Settings._fields), self._memory.unbind(), strict=True))
        self._write_knobs(config)
        self._label_smoothing = knobs["label_smoothing"] if config.label_smoothing else None
        active = {name: knobs[name] for name, value in _read_knobs(config).items() if value}
        with_tensors: Any = SimpleNamespace(**(config.model_dump() | active))
        self._policy = make_policy(with_tensors, data)
        model = build_initial_model(config, data)
        set_dropout_generator(model, self.generators["dropout"])
        if "dropout" in active:
            set_drop_probability(model, knobs["dropout"])
        self.model = place_model(model, self._device, numerics).train()
        self.optimizer = DeviceOptimizer(self.model.parameters(), config, knobs)
        image_shape = (config.batch_size, 3, data.side, data.side)
        self._images = torch.zeros(image_shape, dtype=torch.uint8, device=self._device)
        self._labels = torch.zeros(config.batch_size, dtype=torch.int64, device=self._device)
        self._loss = torch.zeros((), device=self._device)
        self._num_correct = torch.zeros((), dtype=torch.int64, device=self._device)
        self._replay = capture(self._run_captured, self._device, self.generators.values())
        self.reset(config)

    def reset(self, config: TrainConfig) -> None:
        """Prepare the training of another config with the same graph key, in place.

        Weights, optimizer, random generators and knobs are set anew.
        """
        assert make_graph_key(config, self._numerics, self._data) == self.graph_key
        self._write_knobs(config)
        initial = build_initial_model(config, self._data)
        self.model.load_state_dict(initial.state_dict())
        self.optimizer.reset()
        for purpose, generator in self.generators.items():
            generator.manual_seed(derive_seed(config.seed, purpose))

    def augment(self, images_NCHW: Tensor) -> Tensor:
        draws = draw_policy(self._policy, len(images_NCHW), self.generators["augment"])
        return apply_policy(self._policy, images_NCHW, draws, memory_format(self._numerics))

    def to_device(self, settings: Sequence[Settings]) -> Sequence[Tensor]:
        return torch.tensor(settings, device=self._device).unbind()

    def train(
        self,
        images_NCHW: Tensor,
        labels_N: Tensor,
        settings: Tensor,
        flipped_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert flipped_N is None, "only an EagerStep takes the flips"
        self._memory[len(DEVICE_KNOBS) :] = settings
        if len(images_NCHW) < self._batch_size:
            return self._run(images_NCHW, labels_N)
        self._images.copy_(images_NCHW)
        self._labels.copy_(labels_N)
        self._replay()
        return self._loss, self._num_correct

    def _run_captured(self) -> None:
        loss, num_correct = self._run(self._images, self._labels)
        self._loss.copy_(loss)
        self._num_correct.copy_(num_correct)

    def _run(self, images_NCHW: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        images = self.augment(images_NCHW)
        with autocast(self._numerics):
            logits = self.model(images)
        log_probs = F.log_softmax(logits.float(), 1)
        loss = F.nll_loss(log_probs, labels_N)
        if self._label_smoothing is not None:
            loss = loss + self._label_smoothing * (-log_probs.mean() - loss)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == labels_N).sum()

    def _write_knobs(self, config: TrainConfig) -> None:
        values = [*_read_knobs(config).values()]
        self._memory[: len(DEVICE_KNOBS)] = torch.tensor(values, device=self._device)


def _read_knobs(config: TrainConfig) -> dict[str, float]:
    knobs: dict[str, float] = {name: getattr(config, name) for name in DEVICE_KNOBS}
    return knobs | {"dropout": round_probability(config.dropout)}


def make_graph_key(
    config: TrainConfig, numerics: Numerics, data: DataDescription = CIFAR10
) -> Hashable:
    """Return what two configs must have in common to be trained by one captured step."""
    active = tuple(value != 0 for value in _read_knobs(config).values())
    network = (config.model, config.batch_size, config.optimizer, config.nesterov)
    return (*network, active, numerics.model_dump_json(), data)


def capture(
    function: Callable[[], None], device: torch.device, generators: Iterable[torch.Generator]
) -> Callable[[], None]:
    """Capture a function as one CUDA graph and return its replay; off CUDA return the function.

    The function must read and write fixed tensors only. It runs a few times first, so the caller
    must reset whatever it changes.

    Args:
        generators: the random generators that the function uses.
    """
    if device.type != "cuda":
        for _ in range(WARM_UP_RUNS):
            function()
        return function
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    replay: Callable[[], None] = graph.replay
    return replay


# Captured steps of finished trainings, the last used at the end. Each holds the activations.
_idle: dict[Hashable, CapturedStep] = {}
NUM_IDLE = 2


def acquire_step(
    config: TrainConfig, numerics: Numerics, data: DataDescription = CIFAR10
) -> EagerStep | CapturedStep:
    """Return a step ready for the first batch; an idle captured one with the same key is reused.

    A captured step has neither albumentations nor flips that the trainer settles.
    """
    is_plain = config.augment_backend == "batched" and config.hflip_mode == "random"
    if numerics.execution == "eager" or not is_plain:
        return EagerStep(config, numerics, data)
    step = _idle.pop(make_graph_key(config, numerics, data), None)
    if step is None:
        return CapturedStep(config, numerics, data)
    step.reset(config)
    return step


def release_step(step: EagerStep | CapturedStep) -> None:
    """Keep a captured step of a finished training for the next config with its graph key."""
    if isinstance(step, CapturedStep):
        _idle[step.graph_key] = step
        while len(_idle) > NUM_IDLE:
            del _idle[next(iter(_idle))]
