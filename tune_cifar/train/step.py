"""One training step of a config on a device: normalize, forward, backward, optimizer.

The same recipe has two executions, which differ in how kernels are launched alone. `EagerStep` lets
torch launch one after another. `CapturedStep` replays normalize, forward, loss and backward as one
CUDA graph; the optimizer follows it. What a search moves of them, the drop probability and label
smoothing, a graph reads from device memory, so that it serves all configs with the same graph key:
a warm worker reuses it for its next trial. Off CUDA it runs the same program uncaptured, so its
logic is tested on any machine. Images come augmented (`batches.py`).
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_cifar.augment.batched import apply_normalize
from tune_cifar.dataset import CIFAR10, DataDescription
from tune_cifar.models.build import MODELS, build_model
from tune_cifar.models.custom import load_factory
from tune_cifar.models.dropout import round_probability, set_drop_probability, set_dropout_generator
from tune_cifar.schema import Numerics, TrainConfig
from tune_cifar.train.generators import derive_seed, seed_globals
from tune_cifar.train.numerics import autocast, get_memory_mb, memory_format
from tune_cifar.train.optim import Settings, apply_settings, make_optimizer

# Before a capture, libraries choose their kernels and allocate their workspaces.
WARM_UP_RUNS = 3
# Of the GPU's memory that this process may use, for the captured steps of finished trainings.
IDLE_SHARE = 1 / 8
# Factors of the two terms of a smoothed loss.
Smoothing = tuple[float, float] | tuple[Tensor, Tensor]


def make_generator(seed: int, purpose: str, device: torch.device) -> torch.Generator:
    """Return the random generator of a training for one purpose, on the device."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose))


def place_model(model: nn.Module, device: torch.device, numerics: Numerics) -> nn.Module:
    """Move a model to the device, its convolution weights in the memory format of Numerics."""
    layout = memory_format(numerics)
    moved: nn.Module = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    return moved


# The networks that were drawn last: all stages of a trial, and often all trials, begin with one.
_drawn: dict[Hashable, nn.Module] = {}
MAX_DRAWN = 2


def build_initial_model(config: TrainConfig, data: DataDescription = CIFAR10) -> nn.Module:
    """Return the config's network on the CPU; its initial weights depend on the seed alone.

    They are drawn once per process for a network, its arguments and source, and a seed; a network
    that cannot be copied is built each time.
    """
    network = MODELS.get(config.model, config.model), config.model_args, config.model_digest
    key = (*network, config.dropout if config.is_own else None, config.seed, data)
    if key not in _drawn:
        if config.is_own:  # loaded once in a process: what its file draws must not move the weights
            with seed_globals(config.seed, "init"):
                load_factory(config.model, config.model_digest)
        with seed_globals(config.seed, "init"):
            _drawn[key] = build_model(config, data)
        while len(_drawn) > MAX_DRAWN:
            del _drawn[next(iter(_drawn))]
    try:
        model = copy.deepcopy(_drawn[key])
    except Exception:  # it holds what nobody can copy, such as the tensors of weight_norm
        model = _drawn.pop(key)
    if not config.is_own:
        set_drop_probability(model, round_probability(config.dropout))
    return model


def smoothed_cross_entropy(
    logits_NC: Tensor, labels_N: Tensor, smoothing: Smoothing | None
) -> Tensor:
    """Return the mean cross-entropy, bit for bit that of F.cross_entropy with label_smoothing.

    Args:
        smoothing: what `make_smoothing` returns, as numbers or tensors (); None for none.
    """
    log_probs = F.log_softmax(logits_NC, 1)
    loss = F.nll_loss(log_probs, labels_N)
    if smoothing is None:
        return loss
    of_label, of_all = smoothing
    return loss * of_label + (-log_probs.sum(1)).mean() * of_all


def make_smoothing(config: TrainConfig, data: DataDescription) -> tuple[float, float] | None:
    """Return the factors of the label's loss and of all classes' sum; None without smoothing."""
    share = config.label_smoothing
    return (1 - share, share / data.num_classes) if share else None


class EagerStep:
    """A step whose kernels torch launches one by one.

    Attributes:
        model: the network on the device.
        optimizer: torch's fused one; has a state_dict for checkpoints.
        generator: of the dropout masks, on the device.
    """

    def __init__(
        self, config: TrainConfig, numerics: Numerics, data: DataDescription = CIFAR10
    ) -> None:
        self._numerics, self._data = numerics, data
        self._device = torch.device(numerics.device)
        self._smoothing: Smoothing | None = make_smoothing(config, data)
        self.generator = make_generator(config.seed, "dropout", self._device)
        model = build_initial_model(config, data)
        set_dropout_generator(model, self.generator)
        self.model = place_model(model, self._device, numerics)
        self.optimizer = make_optimizer(self.model.parameters(), config)

    def train(
        self, images_NCHW: Tensor, labels_N: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        """Train on one batch; return its mean loss and number of correct predictions.

        Both stay on the device and are valid until the next step.

        Args:
            images_NCHW: uint8 (N, 3, H, W), augmented.
        """
        found = self._make_gradients(images_NCHW, labels_N)
        apply_settings(self.optimizer, settings)
        self.optimizer.step()
        return found

    def _make_gradients(self, images_NCHW: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(self.model, images_NCHW, labels_N)

    def _run(
        self, network: Callable[[Tensor], Tensor], images_NCHW: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward, so that the parameters have new gradients."""
        images = apply_normalize(images_NCHW, self._data, memory_format(self._numerics))
        with autocast(self._numerics):
            logits = network(images)
        loss = smoothed_cross_entropy(logits.float(), labels_N, self._smoothing)
        for parameter in self.model.parameters():
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), (logits.detach().argmax(1) == labels_N).sum()


class CapturedStep(EagerStep):
    """A step whose gradients come from one CUDA graph; a last, smaller batch runs eager.

    With execution `compiled` torch.compile makes the graph's kernels, whose bits are their own.

    Attributes:
        graph_key: what `make_graph_key` returns.
        num_bytes: of the GPU's memory that the capture took.
    """

    def __init__(
        self, config: TrainConfig, numerics: Numerics, data: DataDescription = CIFAR10
    ) -> None:
        super().__init__(config, numerics, data)
        self.graph_key = make_graph_key(config, numerics, data)
        self._batch_size = config.batch_size
        self._drop_p = torch.zeros((), device=self._device)
        if round_probability(config.dropout):
            set_drop_probability(self.model, self._drop_p)
        self._factors = torch.zeros(2, device=self._device)
        if self._smoothing is not None:
            of_label, of_all = self._factors.unbind()
            self._smoothing = of_label, of_all
        self.model.train()
        is_compiled = numerics.execution == "compiled"
        self._network = torch.compile(self.model, dynamic=False) if is_compiled else self.model
        image_shape = (config.batch_size, 3, data.side, data.side)
        self._images = torch.zeros(image_shape, dtype=torch.uint8, device=self._device)
        self._labels = torch.zeros(config.batch_size, dtype=torch.int64, device=self._device)
        self._loss = torch.zeros((), device=self._device)
        self._num_correct = torch.zeros((), dtype=torch.int64, device=self._device)
        self._write(config)
        before = _count_reserved(self._device)
        self._replay = capture(self._run_captured, self._device, self.generator)
        self.num_bytes = max(0, _count_reserved(self._device) - before)
        # A replay writes into these; off CUDA each run makes its own.
        parameters = self.model.parameters() if self._device.type == "cuda" else ()
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        self.reset(config)

    def reset(self, config: TrainConfig) -> None:
        """Prepare the training of another config with the same graph key, in place.

        Weights, optimizer, random generator and what the graph reads are set anew.
        """
        assert make_graph_key(config, self._numerics, self._data) == self.graph_key
        self._write(config)
        initial = build_initial_model(config, self._data)
        self.model.load_state_dict(initial.state_dict())
        self.optimizer = make_optimizer(self.model.parameters(), config)
        self.generator.manual_seed(derive_seed(config.seed, "dropout"))

    def _write(self, config: TrainConfig) -> None:
        self._drop_p.fill_(round_probability(config.dropout))
        factors = make_smoothing(config, self._data) or (1.0, 0.0)
        self._factors.copy_(torch.tensor(factors))

    def _make_gradients(self, images_NCHW: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        if len(labels_N) < self._batch_size:
            return super()._make_gradients(images_NCHW, labels_N)
        self._images.copy_(images_NCHW)
        self._labels.copy_(labels_N)
        self._replay()
        for parameter, gradient in self._gradients:  # a smaller batch has put others in their place
            parameter.grad = gradient
        return self._loss, self._num_correct

    def _run_captured(self) -> None:
        loss, num_correct = self._run(self._network, self._images, self._labels)
        self._loss.copy_(loss)
        self._num_correct.copy_(num_correct)


def make_graph_key(
    config: TrainConfig, numerics: Numerics, data: DataDescription = CIFAR10
) -> Hashable:
    """Return what two configs must have in common to be trained by one captured step."""
    active = bool(round_probability(config.dropout)), bool(config.label_smoothing)
    return (config.model, config.batch_size, *active, numerics.model_dump_json(), data)


def capture(
    function: Callable[[], None], device: torch.device, generator: torch.Generator
) -> Callable[[], None]:
    """Capture a function as one CUDA graph and return its replay; off CUDA return the function.

    The function must read and write fixed tensors only. It runs a few times first, so the caller
    must reset whatever it changes. Warm-up and capture have one stream, since what libraries and
    autograd prepare belongs to the stream where it was made.

    Args:
        generator: the random generator that the function uses.
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
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        # Newer versions of torch find the generators themselves, and say so.
        warnings.filterwarnings("ignore", ".*register_generator_state")
        graph.register_generator_state(generator)
    gc.collect()  # a dead graph's memory must not be freed during the capture
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    replay: Callable[[], None] = graph.replay
    return replay


def _count_reserved(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that are in use; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()  # as a capture does: what it empties must not count before it
    return torch.cuda.memory_reserved()


# Captured steps of finished trainings, the last used at the end. Each holds the activations.
_idle: dict[Hashable, CapturedStep] = {}


def acquire_step(
    config: TrainConfig, numerics: Numerics, data: DataDescription = CIFAR10
) -> EagerStep:
    """Return a step ready for the first batch; an idle captured one with the same key is reused."""
    if numerics.execution == "eager":
        return EagerStep(config, numerics, data)
    step = _idle.pop(make_graph_key(config, numerics, data), None)
    if step is None:
        return CapturedStep(config, numerics, data)
    step.reset(config)
    return step


def release_step(step: EagerStep, numerics: Numerics) -> None:
    """Keep a captured step of a finished training for the next config with its graph key."""
    if isinstance(step, CapturedStep):
        _idle[step.graph_key] = step
        on_cuda = numerics.device == "cuda"
        fraction = torch.cuda.get_per_process_memory_fraction() if on_cuda else 1.0
        limit = IDLE_SHARE * fraction * get_memory_mb(numerics) * 2**20
        while sum(other.num_bytes for other in _idle.values()) > limit:
            del _idle[next(iter(_idle))]


def delete_idle_steps() -> None:
    """Delete the captured steps of finished trainings."""
    _idle.clear()
