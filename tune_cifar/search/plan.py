"""The plan of a search, made before it starts: request, resources, measured cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tune_cifar.data.files import DataSource, describe_data
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import ConfigError
from tune_cifar.record.events import Confirmation, Learned, SearchResumed
from tune_cifar.record.journal import check_is_new
from tune_cifar.record.machine import count_cores
from tune_cifar.record.mirror import check_is_free, check_mirror
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import make_name, search_folder
from tune_cifar.schema import MAX_SEED, DataInfo, Numerics
from tune_cifar.search.cost import Cost, measure_cost
from tune_cifar.search.disk import DiskNeeds, check_disk, estimate_disk_needs
from tune_cifar.search.forecast import Forecast, forecast_search
from tune_cifar.space.layout import MAX_TRIALS
from tune_cifar.space.select import SearchSpace
from tune_cifar.tracking.address import make_tracking_uri
from tune_cifar.tracking.store import check_tracking
from tune_cifar.train.network import choose_execution, resolve_network
from tune_cifar.train.numerics import check_cpus, count_gpus, resolve_numerics

# The smallest fraction of a GPU that Ray counts.
MIN_GPUS = 0.0001


@dataclass(frozen=True)
class SearchRequest:
    """Runtime options of a search; none of them changes a training's recipe.

    None means the default for this machine or this search.

    Attributes:
        warm_start: searches whose best `warm_trials` trials each are tried after the baseline.
        learn: take over all their results instead, and train none of them again but the baseline.
        address: HOST:PORT of a Ray cluster that is there, or auto; None starts Ray on this machine.
        allow_mixed: nodes of the cluster may differ in what changes a training's bits.
        mirror: URL to which the search is copied while it runs.
    """

    source: DataSource
    storage: Path
    command: str
    name: str | None = None
    seed: int | None = None
    device: str = "auto"
    precision: str = "auto"
    deterministic: bool = False
    execution: str = "auto"
    cpus_per_trial: int = 1
    gpus_per_trial: float | None = None
    max_concurrent: int | None = None
    tracking_uri: str | None = None
    keep_weights: int = 3
    warm_start: tuple[str, ...] = ()
    warm_trials: int = 5
    learn: bool = False
    address: str | None = None
    allow_mixed: bool = False
    mirror: str | None = None

    @property
    def default_tier(self) -> str:
        """`full` where a GPU may be used, else `cpu`."""
        return "full" if count_gpus(self.device) else "cpu"


@dataclass(frozen=True)
class Resources:
    """Cores and GPUs of a trial, and trials at once. Ray places trials by them, without limits."""

    cpus_per_trial: int
    gpus_per_trial: float
    max_concurrent: int
    num_gpus: int
    """Of this machine."""


@dataclass(frozen=True)
class Offer:
    """What a node of a Ray cluster has for trials.

    Attributes:
        node: its name; see NodeChanged.
        slots: trials that fit at once.
        cost: measured there, of one trial.
    """

    node: str
    address: str
    slots: int
    numerics: Numerics
    cost: Cost


class Found(NamedTuple):
    """What a survey of a cluster found.

    Attributes:
        offers: the largest kind of node first.
        unable: why no trial may run on a node, by its name.
        notes: a sentence for each node that gave no answer in time; it may still.
    """

    offers: tuple[Offer, ...]
    unable: dict[str, str]
    notes: tuple[str, ...]
    gpus_per_trial: float


Survey = Callable[[SearchSpace], Found]


class Workers(NamedTuple):
    """How the processes of this machine's trials are started, and a trial measured in one."""

    start: Callable[[Resources], None]
    measure: Callable[[SearchSpace, DataSource, Numerics, Resources], Cost]


@dataclass(frozen=True)
class SearchPlan:
    """Everything that is decided before the first trial.

    Attributes:
        cost: measured, of one trial; on a cluster the mean over its slots.
        offers: of the cluster's nodes; none on this machine.
        unable: see Found.
        past: the recorded search, when it is resumed.
        resumed: the event that a resumed search appends to its record; None for a new search.
        notes: what was restored, what has changed and whether MLflow answers, a sentence each.
        confirmation: set when a search's best trials are trained again under new seeds.
        learned: other searches' trials that the sampler knows from the start.
    """

    space: SearchSpace
    request: SearchRequest
    name: str
    data: DataInfo
    numerics: Numerics
    resources: Resources
    cost: Cost
    offers: tuple[Offer, ...] = ()
    unable: dict[str, str] = field(default_factory=dict)
    past: SearchState | None = None
    resumed: SearchResumed | None = None
    notes: tuple[str, ...] = ()
    confirmation: Confirmation | None = None
    learned: tuple[Learned, ...] = ()

    @cached_property
    def forecast(self) -> Forecast:
        """Epochs and time still to come, by simulation."""
        return forecast_search(
            self.space.budget,
            self.resources.max_concurrent,
            self.cost.epoch_seconds,
            self.past,
            num_learned=len(self.learned),
        )

    @property
    def disk_needs(self) -> DiskNeeds:
        """Upper bounds, as if no trial were stopped."""
        how_many = (self.resources.max_concurrent, self.request.keep_weights)
        return estimate_disk_needs(self.space, *how_many, describe_data(self.request.source))

    def describe(self) -> str:
        """Return in two sentences what runs, and how long it takes or what the time allows."""
        budget, expected, past = self.space.budget, self.forecast, self.past
        what = f"search {self.name}: {budget.describe()}"
        if self.confirmation is not None:
            trainings = f"{budget.trials} trainings of {budget.describe_epochs()} each"
            what = f"confirmation {self.name}: {trainings}"
        text = f"{what}; {self.describe_cost()}"
        has_ended_trials = past is not None and past.counts["running"] < len(past.trials)
        more = " more" if has_ended_trials else ""
        if budget.max_time_seconds is None:
            duration = timedelta(seconds=round(expected.seconds.mean))
            return f"{text}: about {expected.epochs.mean:.0f}{more} trial-epochs in {duration}."
        return f"{text}: the time is enough for about {expected.started:.0f}{more} trials."

    def describe_cost(self) -> str:
        """Return how trials run and what one costs; without a full stop."""
        numerics = self.numerics
        plural = "s" if numerics.threads > 1 else ""
        epoch_seconds = float(f"{self.cost.epoch_seconds:.2g}")  # two digits, also above a hundred
        nodes = f"{len(self.offers)} nodes with " if len(self.offers) > 1 else ""
        return (
            f"{self.resources.max_concurrent} at once on {nodes}{numerics.device_name}, "
            f"{numerics.precision}, {numerics.threads} thread{plural} each. "
            f"An epoch of the baseline takes about {epoch_seconds:g} s{self._describe_memory()}"
        )

    def _describe_memory(self) -> str:
        """Return a trial's memory, and advice when too many run at once or more would fit."""
        resources, cost = self.resources, self.cost
        gb = cost.device_mb / 1024
        text = (
            f"; a trial holds {cost.memory_mb / 1024:.2g} of {gb:{'.0f' if gb >= 10 else '.2g'}} GB"
        )
        if self.offers:
            return text
        if self.numerics.device == "cpu":
            if cost.num_fitting >= resources.max_concurrent:
                return text
            return f"{text} (`max_concurrent={max(1, cost.num_fitting)}` would fit)"
        at_once = int(1 / resources.gpus_per_trial) if resources.gpus_per_trial < 1 else 1
        if cost.num_fitting < at_once:
            better = min(max(1, cost.num_fitting), 100)  # fractions are advised in hundredths
            text += f" (`gpus_per_trial={int(100 / better) / 100:g}` would fit {better} at once)"
        return text


def settle_search(
    space: SearchSpace,
    request: SearchRequest,
    workers: Workers | None = None,
    survey: Survey | None = None,
) -> SearchPlan:
    """Plan a new search: name, network, numerics, resources; see `check_and_measure`.

    Args:
        survey: of the cluster that the search is to run on; None plans for this machine.

    Raises:
        RecordError: when the name is taken.
        ConfigError, DataError: when the request does not fit the machine, the network breaks a
            rule, the data are missing or the mirror has a search of this name.
    """
    check_request(request)
    name = request.name
    if name is None:
        name = make_name(request.storage, f"{space.name[:39]}-{space.tier}")
    check_is_new(search_folder(request.storage, name))
    if request.mirror is not None:
        check_is_free(request.mirror, name, request.storage)
    space = resolve_network(space, describe_data(request.source))
    execution = choose_execution(space.baseline, request.execution)
    if survey is not None:
        return check_on_cluster(space, request, name, survey(space))
    how = (request.cpus_per_trial, request.deterministic, execution)
    numerics = resolve_numerics(request.device, request.precision, *how)
    return check_and_measure(space, request, name, numerics, workers)


def check_and_measure(
    space: SearchSpace,
    request: SearchRequest,
    name: str,
    numerics: Numerics,
    workers: Workers | None = None,
) -> SearchPlan:
    """Check that the machine can run a search and that MLflow can; measure 20 training steps.

    On a CPU this process measures while the workers start. Of a GPU it must not hold anything as
    long as the search runs, so that a worker measures.

    Args:
        workers: None starts none and measures here.

    Raises:
        ConfigError, DataError: when the request does not fit the machine or the data are missing.
    """
    resources = resolve_resources(request, numerics, count_gpus(request.device))
    _check_place(space, request, numerics, resources)
    config = space.baseline
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load_train_val, request.source, config.train_size, config.val_size)
        if workers is not None and numerics.device == "cuda":
            workers.start(resources)
            cost = workers.measure(space, request.source, numerics, resources)
        else:
            measured = pool.submit(lambda: measure_cost(config, loaded.result(), numerics))
            if workers is not None:
                workers.start(resources)
            cost = measured.result()
        data = loaded.result().info
    notes = _check_tracking(request)  # last: its imports take memory
    return SearchPlan(space, request, name, data, numerics, resources, cost, notes=notes)


def check_on_cluster(
    space: SearchSpace, request: SearchRequest, name: str, found: Found
) -> SearchPlan:
    """Plan a search on a cluster from what its nodes offer; check the run store and MLflow.

    Raises:
        ConfigError, DataError: as `check_and_measure`.
    """
    offers = found.offers
    numerics, at_once = offers[0].numerics, request.max_concurrent
    num_slots = sum(offer.slots for offer in offers)
    how_many = found.gpus_per_trial, min(num_slots, at_once or num_slots), 0
    resources = Resources(request.cpus_per_trial, *how_many)
    _check_place(space, request, numerics, resources)
    config = space.baseline
    data = load_train_val(request.source, config.train_size, config.val_size).info
    seconds = sum(offer.slots * offer.cost.epoch_seconds for offer in offers) / num_slots
    cost = offers[0].cost._replace(epoch_seconds=seconds)
    unable = (f"node {node} is left out: {why}" for node, why in found.unable.items())
    notes = (*unable, *found.notes, *_check_tracking(request))
    what = (space, request, name, data, numerics, resources, cost, offers, found.unable)
    return SearchPlan(*what, notes=notes)


def _check_place(
    space: SearchSpace, request: SearchRequest, numerics: Numerics, resources: Resources
) -> None:
    """Check a trial's GPUs, MLflow's address and the run store's disk."""
    gpus, device = resources.gpus_per_trial, numerics.device
    if gpus and device == "cpu":
        raise ConfigError(f"`gpus_per_trial` must be 0 on a CPU, got {gpus:g}. Leave it out.")
    if not gpus and device == "cuda":
        hint = "Leave it out, or give `device='cpu'`."
        raise ConfigError(f"`gpus_per_trial` must be {MIN_GPUS:g} to 1 on a GPU, got 0. {hint}")
    make_tracking_uri(request.storage, request.tracking_uri)  # refuses a bad one at once
    how_many = (resources.max_concurrent, request.keep_weights)
    needs = estimate_disk_needs(space, *how_many, describe_data(request.source))
    check_disk(request.storage, needs)


def _check_tracking(request: SearchRequest) -> tuple[str, ...]:
    """Return a note if MLflow cannot be reached."""
    away = check_tracking(request.storage, request.tracking_uri)
    return () if away is None else (away,)


def check_request(request: SearchRequest) -> None:
    """Refuse what does not depend on the machine: seed, number of weights, warm start, resources.

    Raises:
        ConfigError: with the rule.
    """
    seed, keep = request.seed, request.keep_weights
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"`seed` must be 0 to {MAX_SEED}, got {seed}.")
    if not 1 <= keep <= MAX_TRIALS:
        raise ConfigError(f"`keep_weights` must be 1 to {MAX_TRIALS}, got {keep}.")
    if request.learn and not request.warm_start:
        raise ConfigError("`learn` needs the name of a search as `warm_start`, got none.")
    if request.max_concurrent is not None and request.max_concurrent < 1:
        raise ConfigError(f"`max_concurrent` >= 1 must hold, got {request.max_concurrent}.")
    if request.cpus_per_trial < 1:
        raise ConfigError(f"`cpus_per_trial` >= 1 must hold, got {request.cpus_per_trial}.")
    gpus = request.gpus_per_trial
    if gpus and not MIN_GPUS <= gpus <= 1:
        rule = f"`gpus_per_trial` must be 0 or {MIN_GPUS:g} to 1, since a trial uses one GPU"
        raise ConfigError(f"{rule}, got {gpus:g}.")
    if request.mirror is not None:
        check_mirror(request.mirror)
    if request.allow_mixed and request.address is None:
        raise ConfigError("`allow_mixed` is for the nodes of a cluster: it needs `address`.")


def resolve_resources(request: SearchRequest, numerics: Numerics, num_gpus: int) -> Resources:
    """Check the requested resources against the machine; by default as many trials run as fit.

    Raises:
        ConfigError: when a trial has too many cores, or the search a GPU that may not be used.
    """
    cpus, at_once = request.cpus_per_trial, request.max_concurrent
    check_cpus(cpus)  # of a resumed search they come from the record
    if numerics.device == "cuda" and not num_gpus:  # of a resumed search, likewise
        raise ConfigError(f"`device` must be cuda, as the search's, got {request.device}.")
    gpus = request.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if numerics.device == "cuda" else 0.0
    num_fitting = count_fitting(count_cores(), num_gpus, cpus, gpus)
    return Resources(cpus, gpus, min(num_fitting, at_once or num_fitting), num_gpus)


def count_fitting(num_cpus: int, num_gpus: int, cpus: int, gpus: float) -> int:
    """Return how many trials with these cores and GPUs fit on one machine at once."""
    num_fitting = num_cpus // cpus
    return min(num_fitting, num_gpus * int(1 / gpus)) if gpus else num_fitting


def count_trials(text: str, num_started: int | None = None) -> int:
    """Return a search's number of trials: `40`, or of a resumed search `+50`, that many more.

    Args:
        num_started: trials of the resumed search; None for a new search.

    Raises:
        ConfigError: when the text is neither, or means fewer trials than there are.
    """
    if num_started is None:
        if not re.fullmatch(r"[1-9][0-9]{0,18}", text):
            raise ConfigError(f"`trials` must be a whole number >= 1, got {text!r}.")
        return int(text)
    if not re.fullmatch(r"\+?[1-9][0-9]{0,18}", text):
        rule = "`trials` must be a number such as 40 or +50 with `resume=True`"
        raise ConfigError(f"{rule}, got {text!r}.")
    num_trials = num_started * text.startswith("+") + int(text)
    if num_trials < num_started:
        raise ConfigError(f"`trials` >= {num_started} (those recorded) must hold, got {text}.")
    return num_trials
