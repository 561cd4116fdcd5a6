"""The one training loop, used by search, train, reproduce and confirm alike.

Iterating a `Trainer` trains and yields an `EpochResult` per epoch; the consumer decides when to
stop. The data stay on the device as uint8; batches are gathered, augmented (`batches.py`) and
trained (`step.py`) there. On CUDA nothing waits for the device inside an epoch, and the next one's
order and schedule are made while the device works.
"""

from __future__ import annotations

import itertools
import math
import resource
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tune_cifar.augment.batched import apply_normalize
from tune_cifar.data.load import Split, TrainVal
from tune_cifar.errors import CheckpointError, ConfigError, Diverged
from tune_cifar.schema import EpochResult, Numerics, TrainConfig
from tune_cifar.train.average import WeightAverage
from tune_cifar.train.batches import Batches, fit_to_side
from tune_cifar.train.generators import GlobalGenerators
from tune_cifar.train.metrics import measure_logits
from tune_cifar.train.numerics import apply_numerics, autocast, memory_format
from tune_cifar.train.optim import Settings, schedule_steps
from tune_cifar.train.step import (
    acquire_step,
    build_initial_model,
    place_model,
    release_step,
)

# Images in one forward pass of an evaluation. Fixed, since the bits of a validation loss may depend
# on it. s7 takes 0.19 s for 1,000 images in batches of 100 to 200, 0.33 s in batches of 250 to 500
# (bf16, one thread of an EPYC Zen 5, 2026-11-21); s10 evaluates 300 images/s in batches of 100, 275
# in batches of 200, with equal bits (Zen 4, the same day). A GPU would launch kernels for longer
# than it computes; of images larger than CIFAR-10's it takes fewer, for its memory.
EVAL_BATCH_SIZE, EVAL_BATCH_SIZE_CUDA = 100, 1000


def choose_eval_size(side: int, on_cuda: bool) -> int:
    """Return the number of images in one forward pass of an evaluation."""
    return fit_to_side(EVAL_BATCH_SIZE_CUDA, side) if on_cuda else EVAL_BATCH_SIZE


class _Epoch(NamedTuple):
    """What is drawn for an epoch before it begins."""

    order_N: Tensor
    """On the device."""
    schedule: list[Settings]
    generator_state: Tensor
    """Of the order's generator before."""


class Trainer:
    """One training of one config, from the first epoch or from a checkpoint's state.

    Args:
        config: the recipe.
        data: uint8 images, of them config.train_size to train on; `data.val` may be None, then
            val_loss and val_acc are None.
        numerics: applied to this process (thread count, deterministic flags) at construction.

    Attributes:
        model: the network that is evaluated and kept, on the numerics' device; with ema_decay
            the average of the one that is trained. It belongs to this Trainer; copy it to keep it.
        epoch: number of epochs trained.
        step: number of optimizer steps done; progress displays read it while an epoch runs.
        results: the EpochResults of all epochs trained.

    Yields:
        an EpochResult after each epoch, until config.epochs are trained.

    Raises:
        Diverged: when a training or validation loss is not finite.
        ConfigError: when the recipe does not fit the images or their number, or the schedule cannot
            be built.
    """

    def __init__(self, config: TrainConfig, data: TrainVal, numerics: Numerics) -> None:
        apply_numerics(numerics)
        self.config = config
        self.numerics = numerics
        self._device = torch.device(numerics.device)
        self._train = _bring(data.train, self._device)
        self._val = _bring(data.val, self._device) if data.val else None
        self._data = data.about
        if problem := data.about.find_problem(config):
            raise ConfigError(f"configuration: {problem}")
        if (size := len(data.train)) != config.train_size:
            rule = f"`data` must hold train_size = {config.train_size} training images"
            raise ConfigError(f"{rule}, got {size}. Load them with the config's sizes.")
        if config.is_own and (got := numerics.execution) != "eager":
            raise ConfigError(f"`execution` must be eager for a network of your own, got {got}.")
        self._schedule = schedule_steps(config)
        self._step = acquire_step(config, numerics, data.about)
        weakref.finalize(self, release_step, self._step, numerics)
        self.model = self._step.model
        self._average: WeightAverage | None = None
        if config.ema_decay:
            average = build_initial_model(config, data.about)
            average = place_model(average, self._device, numerics)
            self._average = WeightAverage(average, self._step.model, config.ema_decay)
            self.model = average
        self._globals = GlobalGenerators(config.seed, self._device) if config.is_own else None
        self._batches = Batches(config, self._train, data.about)
        self._generators = {**self._batches.generators, "dropout": self._step.generator}
        self._next: _Epoch | None = None
        self.epoch = 0
        self.step = 0
        self.results: list[EpochResult] = []

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps in the whole training."""
        return self.config.epochs * self.config.num_steps_per_epoch

    def __iter__(self) -> Iterator[EpochResult]:
        while self.epoch < self.config.epochs:
            yield self._run_epoch()

    def _run_epoch(self) -> EpochResult:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with self._globals or nullcontext():
            train_loss, train_acc, lr = self._train_epoch()
            trained = time.perf_counter()
            val_loss, val_acc = self.evaluate(self._val) if self._val else (None, None)
        if val_loss is not None and not math.isfinite(val_loss):
            raise Diverged(self.epoch + 1, self.step)
        self.epoch += 1
        result = EpochResult(
            epoch=self.epoch,
            step=self.step,
            train_loss=train_loss,
            train_acc=train_acc,
            val_loss=val_loss,
            val_acc=val_acc,
            lr=lr,
            epoch_seconds=time.perf_counter() - start,
            images_per_second=len(self._train) / (trained - start),
            peak_memory_mb=self.peak_memory_mb,
        )
        self.results.append(result)
        return result

    def _train_epoch(self) -> tuple[float, float, float]:
        """Train on every image once; return mean loss, accuracy and the last step's LR."""
        self._step.model.train()
        num_images = len(self._train)
        losses: list[Tensor] = []
        num_correct = torch.zeros((), dtype=torch.int64, device=self._device)
        now = self._next or self._draw_epoch()
        self._next = None
        batches = self._batches.make_batches(now.order_N, self.epoch)
        for batch, settings in zip(batches, now.schedule, strict=True):
            loss, correct = self._train_step(*batch, settings)
            losses.append(loss * len(batch[1]))
            num_correct += correct
            # Reading a GPU's loss would wait for the device: there the epoch's end must do.
            if self._device.type == "cpu":
                self._check_finite(losses[-1:], self.step)
        if self.epoch + 1 < self.config.epochs:
            self._next = self._draw_epoch()
        self._check_finite(losses, self.step - len(losses) + 1)
        train_loss = torch.stack(losses).sum().item() / num_images
        return train_loss, num_correct.item() / num_images, now.schedule[-1].lr

    def _draw_epoch(self) -> _Epoch:
        state = self._generators["order"].get_state()
        schedule = list(itertools.islice(self._schedule, self.config.num_steps_per_epoch))
        return _Epoch(self._batches.draw_order(), schedule, state)

    def sweep(self, lrs: Sequence[float]) -> Iterator[float]:
        """Train one step at each of these learning rates and yield its loss.

        A loss may be nan or inf: here divergence is a measurement. The momentum is the config's.
        Each pass over the images has a new order. Use a separate Trainer for it.
        """
        self._step.model.train()
        for lr, batch in zip(lrs, self._repeat_batches(), strict=False):
            settings = Settings(lr, self.config.momentum)
            with self._globals or nullcontext():
                loss = self._train_step(*batch, settings)[0].item()
            yield loss

    def _repeat_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield augmented batches without end, each pass over the images in a new order."""
        for epoch in itertools.count(self.epoch):
            yield from self._batches.make_batches(self._batches.draw_order(), epoch)

    def _train_step(
        self, images_NCHW: Tensor, labels_N: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        """Train on a batch of augmented images; return what the step's `train` returns."""
        self.step += 1
        found = self._step.train(images_NCHW, labels_N, settings)
        if self._average is not None:
            self._average.update(self.step)
        return found

    def _check_finite(self, losses: list[Tensor], first_step: int) -> None:
        bad = (~torch.stack(losses).isfinite()).nonzero()
        if len(bad):
            raise Diverged(self.epoch + 1, first_step + int(bad[0, 0]))

    @torch.inference_mode()
    def evaluate(self, split: Split) -> tuple[float, float]:
        """Return mean cross-entropy per image (no label smoothing) and accuracy."""
        return measure_logits(self._infer(split), split.labels_N.to(self._device))

    def predict(self, split: Split) -> Tensor:
        """Return the logits (N, classes) that `evaluate` measures, float32 on the CPU."""
        return self._infer(split).cpu()

    @torch.inference_mode()
    def _infer(self, split: Split) -> Tensor:
        """Return logits (N, classes), float32 on the device.

        The images are normalized only, nothing is random, and nothing waits for the device.
        """
        self.model.eval()
        logits = []
        layout = memory_format(self.numerics)
        size = choose_eval_size(self._data.side, on_cuda=self._device.type == "cuda")
        for images_NCHW in torch.split(split.images_NCHW.to(self._device), size):
            images = apply_normalize(images_NCHW, self._data, layout)
            with autocast(self.numerics):
                logits.append(self.model(images).float())
        return torch.cat(logits)

    @property
    def peak_memory_mb(self) -> float:
        """Peak memory in MiB: of the GPU since the epoch began, or of this process on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved() / 2**20
        unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    def measure_step_seconds(self, num_steps: int = 20) -> float:
        """Return the median seconds of a step. It trains: use a separate Trainer for it.

        On a GPU it does not hold the augmentation.
        """
        self._step.model.train()
        is_cuda, batches = self._device.type == "cuda", self._repeat_batches()
        settings = next(schedule_steps(self.config))
        seconds = []
        for _ in range(num_steps):
            start = time.perf_counter()
            self._train_step(*next(batches), settings)
            if is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[num_steps // 2]

    def progress_dict(self) -> dict[str, Any]:
        """Return what is left of a training after its last epoch: a part of `state_dict`."""
        return {
            "fingerprint": self.config.fingerprint,
            "epoch": self.epoch,
            "step": self.step,
            "results": [result.model_dump() for result in self.results],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed training needs to agree bit for bit (on a CPU).

        It consists of tensors and plain containers.
        """
        generators = {name: generator.get_state() for name, generator in self._generators.items()}
        if self._next is not None:
            generators["order"] = self._next.generator_state
        return {
            **self.progress_dict(),
            "model": self._step.model.state_dict(),
            "average": self.model.state_dict() if self._average else {},
            "optimizer": self._step.optimizer.state_dict(),
            "generators": generators,
            "globals": self._globals.state if self._globals else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint's state; what `progress_dict` gave leaves nothing to train.

        Raises:
            CheckpointError: the state belongs to another config.
        """
        found, expected = state["fingerprint"], self.config.fingerprint
        if found != expected:
            raise CheckpointError(
                f"checkpoint: its fingerprint must be {expected}, got {found}. "
                "It belongs to another configuration."
            )
        self.epoch, self.step = state["epoch"], state["step"]
        self.results = [EpochResult(**result) for result in state["results"]]
        if "model" not in state:
            return
        self._step.model.load_state_dict(state["model"])
        if self._average is not None:
            self.model.load_state_dict(state["average"])
        self._schedule, self._next = schedule_steps(self.config, self.step), None
        self._step.optimizer.load_state_dict(state["optimizer"])
        for name, generator in self._generators.items():
            generator.set_state(state["generators"][name])
        if self._globals is not None:
            self._globals.state = state["globals"]


# Of each data set and GPU the images that were copied there last: every stage of every trial of a
# process has the same.
_copies: dict[tuple[int, int, str], tuple[Split, Split]] = {}
MAX_COPIES = 4


def _bring(split: Split, device: torch.device) -> Split:
    """Return the split on the device; it is copied there once per process."""
    if split.images_NCHW.device == device:
        return split
    key = split.images_NCHW.data_ptr(), len(split), str(device)
    if key not in _copies:
        copy = Split(split.images_NCHW.to(device), split.labels_N.to(device))
        _copies[key] = split, copy  # the original too: its memory must not become another's
        while len(_copies) > MAX_COPIES:
            del _copies[next(iter(_copies))]
    return _copies[key][1]
