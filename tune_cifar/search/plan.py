"""What is settled before a search starts: what was asked for, what a trial occupies, how long an epoch takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tune_cifar.data.files import DataSource
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import ConfigError
from tune_cifar.record.events import Confirmation, SearchResumed
from tune_cifar.record.journal import check_is_new
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import DataInfo, Numerics, TrainConfig
from tune_cifar.search.forecast import Forecast, forecast_search
from tune_cifar.search.preflight import DiskNeeds, check_search_fits, estimate_disk_needs
from tune_cifar.search.rungs import list_cycles
from tune_cifar.space.select import SearchSpace
from tune_cifar.train.numerics import check_cpus, count_cores, count_gpus, get_memory_mb, resolve_numerics
from tune_cifar.train.trainer import Trainer


@dataclass(frozen=True)
class SearchRequest:
    """What the user asked for beyond the space: runtime options, none of which changes a recipe.

    `None` leaves the choice to the program.
    """

    source: DataSource
    storage: Path
    command: str
    name: str | None = None
    seed: int | None = None
    device: str = "auto"
    precision: str = "auto"
    deterministic: bool = False
    execution: str = "eager"
    cpus_per_trial: int = 1
    gpus_per_trial: float | None = None
    max_concurrent: int | None = None
    tracking_uri: str | None = None
    keep_weights: int = 3

    @property
    def default_tier(self) -> str:
        """`full` where a GPU may be used, else `cpu`."""
        return "full" if count_gpus(self.device) else "cpu"


@dataclass(frozen=True)
class Resources:
    """What one trial occupies and how many run at once. Ray's resources are logical: they place, they do not limit."""

    cpus_per_trial: int
    gpus_per_trial: float
    max_concurrent: int
    num_gpus: int


# What a process holds of a GPU beside torch's allocator (CUDA's context, kernels), in MiB: an estimate, see NOTES.
CONTEXT_MB = 600.0
# Of a device's memory, so much is given to trials.
USABLE_MEMORY = 0.9


class Cost(NamedTuple):
    """What a trial of the baseline takes, measured by training a few steps."""

    epoch_seconds: float
    memory_mb: float
    """MiB that its process holds: of the GPU, or of the machine."""
    device_mb: float
    """MiB that there are."""

    @property
    def num_room(self) -> int:
        """Trials for which one device has the memory."""
        return int(USABLE_MEMORY * self.device_mb / self.memory_mb)


@dataclass(frozen=True)
class SearchPlan:
    """Everything settled before the first trial.

    Attributes:
        cost: of one trial, measured.
        past: the search as it is recorded, when it goes on.
        resumed: what the record will say of the resume; None for a new search.
        notes: what was restored and what has changed, a sentence each.
        confirmation: what is trained when nothing is searched: a search's candidates again, under new seeds.
    """

    space: SearchSpace
    request: SearchRequest
    name: str
    data: DataInfo
    numerics: Numerics
    resources: Resources
    cost: Cost
    past: SearchState | None = None
    resumed: SearchResumed | None = None
    notes: tuple[str, ...] = ()
    confirmation: Confirmation | None = None

    @cached_property
    def forecast(self) -> Forecast:
        """What is expected to be paid, the past apart."""
        return forecast_search(self.space.budget, self.resources.max_concurrent, self.cost.epoch_seconds, self.past)

    @property
    def disk_needs(self) -> DiskNeeds:
        """At most, if every trial trained to its last epoch."""
        budget, request = self.space.budget, self.request
        num_epochs, num_at_once = sum(list_cycles(budget)), self.resources.max_concurrent
        return estimate_disk_needs(self.space.baseline, num_epochs, budget.trials, num_at_once, request.keep_weights)

    def describe(self) -> str:
        """What will be done, and how much of it fits into the time or how long it takes, in one sentence or two."""
        budget, expected = self.space.budget, self.forecast
        what = f"search {self.name}: {budget.describe()}"
        if self.confirmation is not None:
            what = f"confirmation {self.name}: {budget.trials} trainings of {budget.describe_epochs()} each"
        text = f"{what}; {self.describe_cost()}"
        more = " more" if self.past is not None and self.past.counts["running"] < len(self.past.trials) else ""
        if budget.max_time_seconds is None:
            took = timedelta(seconds=round(expected.seconds.mean))
            return f"{text}: about {expected.epochs.mean:.0f}{more} trial-epochs in {took}."
        return f"{text}: the time is enough for about {expected.started:.0f}{more} trials."

    def describe_cost(self) -> str:
        """How trials run and what one takes; no full stop at the end."""
        numerics = self.numerics
        epoch_seconds = float(f"{self.cost.epoch_seconds:.2g}")  # two digits, also above a hundred
        return (
            f"{self.resources.max_concurrent} at once on {numerics.device_name}, "
            f"{numerics.precision}, {numerics.threads} thread{'s' if numerics.threads > 1 else ''} each. "
            f"An epoch of the baseline takes about {epoch_seconds:g} s{self._describe_memory()}"
        )

    def _describe_memory(self) -> str:
        """What a trial holds, and the advice that follows from it when trials at once are too many or could be more."""
        resources, cost = self.resources, self.cost
        text = f"; a trial holds {cost.memory_mb / 1024:.2g} of {cost.device_mb / 1024:.0f} GB"
        if self.numerics.device == "cpu":
            few = cost.num_room < resources.max_concurrent
            return f"{text} (--max-concurrent {max(1, cost.num_room)} has room)" if few else text
        at_once = int(1 / resources.gpus_per_trial) if resources.gpus_per_trial < 1 else 1
        num_room = min(cost.num_room, 100)  # Ray counts in hundredths here
        num_useful = min(num_room, count_cores() // resources.cpus_per_trial)
        if num_room < at_once or num_useful > at_once:
            better = max(1, min(num_room, num_useful))
            text += f" (--gpus-per-trial {int(100 / better) / 100:g} has room for {better} at once)"
        return text


def settle_search(
    space: SearchSpace, request: SearchRequest, start_workers: Callable[[Resources], None] | None = None
) -> SearchPlan:
    """Settle a new search: name, numerics, resources; see `check_and_measure`.

    Raises:
        RecordError: when the name is taken.
        ConfigError, DataError: when an option does not fit the machine or the data are not there.
    """
    name = request.name or f"{space.name}-{space.tier}-{datetime.now():%Y%m%d-%H%M%S}"
    check_is_new(search_folder(request.storage, name))
    how = (request.cpus_per_trial, request.deterministic, request.execution)
    numerics = resolve_numerics(request.device, request.precision, *how)
    return check_and_measure(space, request, name, numerics, start_workers)


def check_and_measure(
    space: SearchSpace,
    request: SearchRequest,
    name: str,
    numerics: Numerics,
    start_workers: Callable[[Resources], None] | None = None,
) -> SearchPlan:
    """Check that the machine is fit for a search and measure 20 training steps.

    Args:
        start_workers: called in this thread while others read the data and measure.
    """
    resources = resolve_resources(request, numerics, count_gpus(request.device))
    config, budget, num_at_once = space.baseline, space.budget, resources.max_concurrent
    num_epochs = sum(list_cycles(budget))
    check_search_fits(request.storage, config, num_epochs, budget.trials, num_at_once, request.keep_weights)
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load_train_val, request.source, config.train_size, config.val_size)
        measured = pool.submit(measure_cost, config, request.source, numerics)
        if start_workers is not None:
            start_workers(resources)
        return SearchPlan(space, request, name, loaded.result().info, numerics, resources, measured.result())


def resolve_resources(request: SearchRequest, numerics: Numerics, num_gpus: int) -> Resources:
    """Check what was asked for against the machine; by default as many trials at once as fit.

    Raises:
        ConfigError: when one trial would not fit the machine.
    """
    cpus = request.cpus_per_trial
    check_cpus(cpus)  # a resumed search brings its own
    gpus = request.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if numerics.device == "cuda" else 0.0
    if gpus and numerics.device == "cpu":
        raise ConfigError(f"--gpus-per-trial: 0 must hold on a CPU, got {gpus:g}. A GPU must be there to be shared.")
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise ConfigError(f"--gpus-per-trial: a fraction up to 1 or a whole number must be given, got {gpus:g}.")
    if gpus > num_gpus:
        raise ConfigError(f"--gpus-per-trial: at most {num_gpus} (the GPUs here) must hold, got {gpus:g}.")
    if request.max_concurrent is not None and request.max_concurrent < 1:
        raise ConfigError(f"--max-concurrent: a number >= 1 must be given, got {request.max_concurrent}.")
    fits = count_cores() // cpus
    if gpus:
        fits = min(fits, int(num_gpus / gpus) if gpus >= 1 else num_gpus * int(1 / gpus))
    return Resources(cpus, gpus, min(fits, request.max_concurrent or fits), num_gpus)


def measure_cost(config: TrainConfig, source: DataSource, numerics: Numerics, num_steps: int = 20) -> Cost:
    """Of one training: seconds of an epoch from the median step, evaluation counted as forward passes; memory.

    A forward pass costs about a third of a training step per image (one of forward, backward by inputs, backward by
    weights). On a CPU the memory is this process's, which holds a little more than a worker.
    """
    data = load_train_val(source, config.train_size, config.val_size)
    trainer = Trainer(config, data, numerics)
    step_seconds = trainer.measure_step_seconds(num_steps)
    num_steps_per_epoch = config.num_steps_per_epoch + config.val_size / config.batch_size / 3
    memory_mb = trainer.peak_memory_mb + (CONTEXT_MB if numerics.device == "cuda" else 0.0)
    return Cost(step_seconds * num_steps_per_epoch, memory_mb, get_memory_mb(numerics))


def count_trials(text: str, num_started: int | None = None) -> int:
    """`--trials` as the whole number of trials of a search: `40`, or with --resume `+50`, that many more.

    Args:
        num_started: trials that a resumed search has; None for a new search.

    Raises:
        ConfigError: when it is neither, or less than there are.
    """
    if num_started is None:
        if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
            raise ConfigError(f"--trials: a number >= 1 must be given, got {text!r}.")
        return int(text)
    if not re.fullmatch(r"\+?[1-9][0-9]{0,8}", text):
        raise ConfigError(f"--trials: a number such as 40 or +50 must be given with --resume, got {text!r}.")
    num_trials = num_started * text.startswith("+") + int(text)
    if num_trials < num_started:
        raise ConfigError(f"--trials: at least the {num_started} trials that there are must hold, got {text}.")
    return num_trials
