"""What is settled before a search starts: what was asked for, what a trial occupies, how long an epoch takes."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from tune_cifar.data.files import DataSource
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import ConfigError
from tune_cifar.models.build import build_model
from tune_cifar.record.events import Confirmation, SearchResumed
from tune_cifar.record.journal import check_is_new
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import DataInfo, Numerics, TrainConfig
from tune_cifar.search.forecast import Forecast, forecast_search
from tune_cifar.search.rungs import list_stages
from tune_cifar.space.select import SearchSpace
from tune_cifar.train.numerics import (
    check_cpus,
    count_cores,
    count_gpus,
    get_memory_mb,
    resolve_numerics,
)
from tune_cifar.train.trainer import Trainer

# Checkpoints of a running trial: the two that CheckpointFolder keeps and the one being written.
CHECKPOINTS_PER_TRIAL = 3
# Tensors of a parameter's size in each optimizer's state: SGD's momentum, Adam's two moments.
OPTIMIZER_SLOTS = {"sgd": 1, "adam": 2, "adamw": 2}
# What torch's archive adds: headers and padding per tensor, an EpochResult per epoch; generators, names and the rest.
# Upper bounds, held against real files by test_preflight.
TENSOR_BYTES, RESULT_BYTES, STATE_BYTES = 600, 400, 40_000
# Record and MLflow's SQLite store, rounded up from a store of 127 runs and 200 epochs, files in blocks of 4 kB (MLflow
# 3.17.2, November 2026). A trial took 31 kB: 8 in MLflow's tables, 21 in the files and folders of its artifacts, 2 in
# the record. An epoch took 2.0 kB: 1.6 in MLflow's tables, 0.35 in the record. Empty tables took 0.9 MB.
SEARCH_BYTES, TRIAL_BYTES, EPOCH_BYTES = 2_000_000, 40_000, 2_500
# A socket's path has at most 107 bytes on Linux, and Ray puts
# ray/session_<26 characters of date and time>_<process id>/sockets/plasma_store into the temporary folder.
MAX_TEMPORARY_BYTES = 107 - len("/ray/session__/sockets/plasma_store") - 26 - 7


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
        return forecast_search(
            self.space.budget, self.resources.max_concurrent, self.cost.epoch_seconds, self.past
        )

    @property
    def disk_needs(self) -> DiskNeeds:
        """At most, if every trial trained to its last epoch."""
        budget, request = self.space.budget, self.request
        num_epochs, num_at_once = sum(list_stages(budget)), self.resources.max_concurrent
        return estimate_disk_needs(
            self.space.baseline, num_epochs, budget.trials, num_at_once, request.keep_weights
        )

    def describe(self) -> str:
        """What will be done, and how much of it fits into the time or how long it takes, in one sentence or two."""
        budget, expected = self.space.budget, self.forecast
        what = f"search {self.name}: {budget.describe()}"
        if self.confirmation is not None:
            what = f"confirmation {self.name}: {budget.trials} trainings of {budget.describe_epochs()} each"
        text = f"{what}; {self.describe_cost()}"
        more = (
            " more"
            if self.past is not None and self.past.counts["running"] < len(self.past.trials)
            else ""
        )
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
    space: SearchSpace,
    request: SearchRequest,
    start_workers: Callable[[Resources], None] | None = None,
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
    num_epochs = sum(list_stages(budget))
    check_search_fits(
        request.storage, config, num_epochs, budget.trials, num_at_once, request.keep_weights
    )
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load_train_val, request.source, config.train_size, config.val_size)
        measured = pool.submit(measure_cost, config, request.source, numerics)
        if start_workers is not None:
            start_workers(resources)
        return SearchPlan(
            space, request, name, loaded.result().info, numerics, resources, measured.result()
        )


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
        raise ConfigError(
            f"--gpus-per-trial: 0 must hold on a CPU, got {gpus:g}. A GPU must be there to be shared."
        )
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise ConfigError(
            f"--gpus-per-trial: a fraction up to 1 or a whole number must be given, got {gpus:g}."
        )
    if gpus > num_gpus:
        raise ConfigError(
            f"--gpus-per-trial: at most {num_gpus} (the GPUs here) must hold, got {gpus:g}."
        )
    if request.max_concurrent is not None and request.max_concurrent < 1:
        raise ConfigError(
            f"--max-concurrent: a number >= 1 must be given, got {request.max_concurrent}."
        )
    fits = count_cores() // cpus
    if gpus:
        fits = min(fits, int(num_gpus / gpus) if gpus >= 1 else num_gpus * int(1 / gpus))
    return Resources(cpus, gpus, min(fits, request.max_concurrent or fits), num_gpus)


def measure_cost(
    config: TrainConfig, source: DataSource, numerics: Numerics, num_steps: int = 20
) -> Cost:
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
        raise ConfigError(
            f"--trials: a number such as 40 or +50 must be given with --resume, got {text!r}."
        )
    num_trials = num_started * text.startswith("+") + int(text)
    if num_trials < num_started:
        raise ConfigError(
            f"--trials: at least the {num_started} trials that there are must hold, got {text}."
        )
    return num_trials


@dataclass(frozen=True)
class DiskNeeds:
    """Bytes that a search has on disk at most, if every trial trained to its last epoch."""

    checkpoints: int
    weights: int
    records: int
    """The search's record and MLflow's database and files."""

    @property
    def total(self) -> int:
        return self.checkpoints + self.weights + self.records

    def describe(self) -> str:
        return (
            f"checkpoints {_format_mb(self.checkpoints)}, weights {_format_mb(self.weights)}, "
            f"record and MLflow {_format_mb(self.records)}"
        )


def estimate_disk_needs(
    config: TrainConfig, num_epochs: int, num_trials: int, max_concurrent: int, keep_weights: int
) -> DiskNeeds:
    """Disk for a search of trials like `config`; a searched optimizer with more state than its own is not counted.

    Args:
        num_epochs: of a whole trial: those of all its cycles.
        keep_weights: of how many finished trials the weights stay. Those of running trials come on top, written before
            it is known whose stay, and the best trial's copy in MLflow.
    """
    weights, checkpoint = measure_training(config)
    return DiskNeeds(
        checkpoints=CHECKPOINTS_PER_TRIAL * max_concurrent * checkpoint,
        weights=(keep_weights + max_concurrent + 1) * weights,
        records=SEARCH_BYTES + num_trials * (TRIAL_BYTES + num_epochs * EPOCH_BYTES),
    )


def measure_training(config: TrainConfig) -> tuple[int, int]:
    """Bytes of a configuration's weights file and of its checkpoint, from the shapes alone: nothing is allocated."""
    with torch.device("meta"):
        model = build_model(config)
    parameters, tensors = list(model.parameters()), model.state_dict().values()
    weights = sum(tensor.nbytes for tensor in tensors)
    slots = OPTIMIZER_SLOTS[config.optimizer]
    num_tensors = len(tensors) + (slots + 1) * len(
        parameters
    )  # the state also counts each parameter's steps
    moments = slots * sum(parameter.nbytes for parameter in parameters)
    extra = num_tensors * TENSOR_BYTES + config.epochs * RESULT_BYTES + STATE_BYTES
    return weights + len(tensors) * TENSOR_BYTES, weights + moments + extra


def check_search_fits(
    storage: Path,
    config: TrainConfig,
    num_epochs: int,
    num_trials: int,
    max_concurrent: int,
    keep_weights: int,
) -> None:
    """Refuse a search that would fail later for want of a writable folder or of room; see `estimate_disk_needs`.

    Raises:
        ConfigError: the temporary folder or the run store cannot be written, or the disk has too little room.
    """
    _check_temporary_folder()
    check_folder(storage, "the run store", "--storage")
    needs = estimate_disk_needs(config, num_epochs, num_trials, max_concurrent, keep_weights)
    free = _get_free_bytes(storage)
    if needs.total > free:
        raise ConfigError(
            f"{storage}: {_format_mb(needs.total)} must be free for the search ({needs.describe()}), "
            f"got {_format_mb(free)}. Make room (`searches delete`), name another folder with --storage, or ask for "
            "fewer trials."
        )


def check_folder(folder: Path, what: str, option: str) -> None:
    """Refuse a folder, there or still to be made, in which nothing could be written later.

    Raises:
        ConfigError: naming what it is for and the option that names another.
    """
    _check_writable(
        _find_existing(folder), f"{folder}: {what}", f"Name another folder with {option}."
    )


def _check_temporary_folder() -> None:
    """Ray takes RAY_TMPDIR, else TMPDIR, else /tmp, as they are; Python itself would pass over a bad one."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "TMPDIR")
    folder = Path(os.environ.get(name, "/tmp"))
    if not folder.is_absolute():
        raise ConfigError(f"{name}: an absolute path must be given, got {str(folder)!r}.")
    if (size := len(os.fsencode(folder))) > MAX_TEMPORARY_BYTES:
        rule = f"a path of at most {MAX_TEMPORARY_BYTES} bytes must be given (Ray's sockets lie in it), got {size}"
        raise ConfigError(f"{name}: {rule}: {folder}.")
    _check_writable(folder, f"{folder}: the temporary folder", f"Set {name} to one that is.")


def _find_existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    for place in (folder, *folder.parents):
        try:
            place.lstat()
        except OSError:
            continue
        return place
    return Path("/")


def _check_writable(folder: Path, what: str, hint: str) -> None:
    """Create and remove a file: rights, a read-only mount and a full disk all tell; looking at rights tells root a lie.

    Raises:
        ConfigError: `what` must be writable, the system's words, and the hint.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tune_cifar-") as file:
            file.write(b"tune_cifar")
    except OSError as exc:
        raise ConfigError(
            f"{what} must be writable, got {exc.strerror!r} at {folder}. {hint}"
        ) from exc


def _get_free_bytes(storage: Path) -> int:
    return shutil.disk_usage(_find_existing(storage)).free


def _format_mb(num_bytes: int) -> str:
    return f"{max(1, round(num_bytes / 1e6)):,} MB"
