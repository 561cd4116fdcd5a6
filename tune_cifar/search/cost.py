"""What a trial costs, measured by training a few steps, and how many trials a device holds."""

from __future__ import annotations

from typing import NamedTuple

from tune_cifar.data.load import TrainVal
from tune_cifar.schema import Numerics, TrainConfig
from tune_cifar.train.numerics import get_memory_mb
from tune_cifar.train.trainer import Trainer

# MiB of a GPU that a process holds beside torch's allocator (CUDA's context, kernels): an estimate.
CONTEXT_MB = 600.0
# Fraction of a device's memory that is given to trials.
USABLE_MEMORY = 0.9


class Cost(NamedTuple):
    """Time and memory of a trial of the baseline, measured by training a few steps."""

    epoch_seconds: float
    memory_mb: float
    """MiB that the trial's process holds, of the GPU or of the machine."""
    device_mb: float
    """MiB of the GPU or of the machine."""

    @property
    def num_fitting(self) -> int:
        """Trials that fit into the memory of one device."""
        return int(USABLE_MEMORY * self.device_mb / self.memory_mb)


def measure_cost(
    config: TrainConfig, data: TrainVal, numerics: Numerics, num_steps: int = 20
) -> Cost:
    """Measure one training: seconds of an epoch, evaluation included, and memory.

    The time is the median step's. A forward pass of an image counts as a third of its training step
    (forward, backward by inputs, backward by weights). On a CPU the memory is this process's, which
    holds a little more than a worker.
    """
    trainer = Trainer(config, data, numerics)
    step_seconds = trainer.measure_step_seconds(num_steps)
    num_steps_per_epoch = config.num_steps_per_epoch + config.val_size / config.batch_size / 3
    memory_mb = trainer.peak_memory_mb + (CONTEXT_MB if numerics.device == "cuda" else 0.0)
    return Cost(step_seconds * num_steps_per_epoch, memory_mb, get_memory_mb(numerics))
