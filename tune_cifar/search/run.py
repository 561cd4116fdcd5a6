"""A search on Ray Tune: warm workers train, Optuna proposes, asynchronous successive halving stops.

`SearchDriver` (driver.py) decides and records, without Ray. Three thin adapters (adapters.py) pass
Tune's calls on to it: a Searcher (which trial comes next), a Scheduler (whether a trial goes on)
and a Stopper (when the search ends). `TrialWorker` (worker.py) trains. The record is written first;
everything shown later is read from it.
"""

from __future__ import annotations

import functools
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from types import FrameType
from typing import Any

# Before ray: it sets what ray reads when it is imported.
from tune_cifar.search.worker import TrialWorker, request_resources  # isort: split

import ray
from ray import tune

from tune_cifar.data.load import load_train_val, pack_data
from tune_cifar.record.environment import describe_environment
from tune_cifar.record.events import (
    Confirmation,
    Event,
    Kind,
    Learned,
    SearchResumed,
    utc_now,
)
from tune_cifar.record.journal import Record
from tune_cifar.record.mirror import Mirror
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import load_searches, search_folder
from tune_cifar.search.adapters import TuneScheduler, TuneSearcher, TuneStopper
from tune_cifar.search.cluster import use_ray
from tune_cifar.search.driver import SearchDriver
from tune_cifar.search.plan import (
    SearchPlan,
    SearchRequest,
    check_and_measure,
    check_on_cluster,
    check_request,
    count_trials,
    settle_search,
)
from tune_cifar.search.remote import RemoteTrials
from tune_cifar.search.resume import (
    check_accepted,
    check_resumable,
    describe_restored,
    find_changes,
    restore_limits,
    restore_space,
)
from tune_cifar.search.survey import THIS_MACHINE, make_survey
from tune_cifar.search.trial_files import serve_files
from tune_cifar.search.warm_start import check_learner, drop_learned, learn, try_best_first
from tune_cifar.space.select import SearchSpace
from tune_cifar.tracking.address import make_tracking_uri
from tune_cifar.tracking.upload import BackgroundUploader
from tune_cifar.train.numerics import restore_numerics
from tune_cifar.train.recorded import Listener, Shown, make_header

# Seconds that the end of a search waits for MLflow; after a second Ctrl-C, and for the mirror then.
UPLOAD_SECONDS = 60.0
URGENT_SECONDS = 2.0


def prepare_search(
    space: SearchSpace, request: SearchRequest, confirmation: Confirmation | None = None
) -> SearchPlan:
    """Plan a new search or a confirmation while Ray starts.

    Raises:
        RecordError, ConfigError, DataError: as `settle_search`, and when a search to start from is
            missing or does not fit.
    """
    notes: list[str] = []
    states = [load_searches(request.storage, search=name)[0] for name in request.warm_start]
    if request.learn:
        check_learner(space)
    else:
        space, notes = try_best_first(space, states, request.warm_trials)
    plan = settle_search(space, request, THIS_MACHINE, make_survey(request))
    learned: list[Learned] = []
    for state in states if request.learn else ():
        found, note = learn(plan.space, state, plan.data)
        learned += found
        notes.append(note)
    return replace(
        plan,
        space=drop_learned(plan.space, learned),
        confirmation=confirmation,
        learned=tuple(learned),
        notes=(*plan.notes, *notes),
    )


def prepare_resume(
    request: SearchRequest,
    trials: str | None,
    max_time_seconds: float | None,
    accept_changes: bool,
    target: float | None = None,
    patience: int | None = None,
) -> SearchPlan:
    """Plan how the search `request.name` is resumed, from its record; a torn last line is cut off.

    Args:
        trials: see `count_trials`; None leaves the recorded number.
        max_time_seconds: of this launch; None takes the last launch's, counted from now.
        accept_changes: resume although code, data or numerics have changed.
        target, patience: None keeps those of a search that has not ended; one that has goes on
            without.

    Raises:
        RecordError: when the search is missing, damaged or held by another process.
        ConfigError: when changes are not accepted, or the request does not fit the machine.
    """
    assert request.name is not None
    check_request(request)
    with Record.open(search_folder(request.storage, request.name)) as record:
        state = record.state
    space = restore_limits(restore_space(state.header), state)
    num_trials = state.num_trials if trials is None else count_trials(trials, len(state.trials))
    space = space.limit(num_trials, max_time_seconds, target, patience)
    check_resumable(state.header, num_trials)
    last = state.resumes[-1] if state.resumes else state.header
    request = replace(request, cpus_per_trial=last.numerics.threads)
    survey = make_survey(request, last.numerics)
    found = survey(space) if survey else None
    numerics = found.offers[0].numerics if found else restore_numerics(last.numerics)
    environment = describe_environment()
    data = load_train_val(request.source, space.baseline.train_size, space.baseline.val_size).info
    changes = find_changes(state, data, numerics, environment)
    check_accepted(changes, accept_changes)
    name = state.header.name
    if found is not None:
        plan = check_on_cluster(space, request, name, found)
    else:
        plan = check_and_measure(space, request, name, numerics, THIS_MACHINE)
    event = SearchResumed(
        time=utc_now(),
        trials=num_trials,
        target=space.budget.target,
        patience=space.budget.patience,
        max_time_seconds=space.budget.max_time_seconds,
        changes=list(changes.deciding),
        numerics=numerics,
        environment=environment,
        command=request.command,
    )
    notes = describe_restored(state, space.budget.rungs)
    notes += [f"changed since: {change}" for change in changes.harmless]
    notes += [f"accepted: {change}" for change in changes.deciding]
    plan = replace(plan, past=state, resumed=event, notes=(*plan.notes, *notes))
    return replace(plan, confirmation=state.header.confirmation)


def run_search(
    plan: SearchPlan,
    listener: Listener | None = None,
    on_interrupt: Callable[[], None] | None = None,
) -> tuple[SearchState, list[str]]:
    """Run a planned search: each event goes to the record first, then to MLflow and the listener.

    The first SIGINT or SIGTERM ends it in order (no new trial, a checkpoint of every running one),
    the second at once. Either way it can be resumed.

    Args:
        listener: called with every event after it is on disk, in this thread; its faults end
            nothing.
        on_interrupt: called after the first signal; its faults end nothing.

    Returns:
        the search as recorded, and a sentence for each upload to MLflow or to the mirror that
        failed.

    Raises:
        RecordError: when the name is taken or the record cannot be locked or written.
        ConfigError: when another search runs in this process, or other code has started Ray.
    """
    request, at_once = plan.request, False
    with use_ray(request.address or plan.resources), _open_record(plan) as record:
        uri = make_tracking_uri(request.storage, request.tracking_uri)
        mirror = Mirror(record.state.folder, request.mirror) if request.mirror else None
        uploader = BackgroundUploader(uri, request.storage, record.state)
        show = Shown(listener or (lambda state, event: None))

        def on_event(state: SearchState, event: Event) -> None:
            uploader.on_event(state, event)
            show(state, event)

        with mirror or nullcontext():
            try:
                driver = SearchDriver(record, plan.space, on_event, request.keep_weights)
                try:
                    _run_tune(driver, plan, on_interrupt)
                finally:
                    driver.finish()
            except KeyboardInterrupt:
                at_once = True
                if mirror:
                    mirror.end_seconds = URGENT_SECONDS
            finally:
                faults = uploader.close(URGENT_SECONDS if at_once else UPLOAD_SECONDS)
        faults += [mirror.fault] if mirror and mirror.fault else []
        return record.state, faults


def _open_record(plan: SearchPlan) -> Record:
    """Create a new search's record, or open a resumed one's and append the resume."""
    folder = search_folder(plan.request.storage, plan.name)
    if plan.resumed is None:
        seed = plan.space.budget.seed if plan.request.seed is None else plan.request.seed
        kind: Kind = "search" if plan.confirmation is None else "confirm"
        header = make_header(
            kind, plan.name, plan.space, seed, plan.data, plan.numerics, plan.request.command
        )
        more = {
            "confirmation": plan.confirmation,
            "predicted_epochs": plan.forecast.epochs.mean,
            "warm_start": list(plan.request.warm_start),
            "warm_trials": plan.request.warm_trials if plan.request.warm_start else None,
            "learned": list(plan.learned),
        }
        create = Record.create_numbered if plan.request.name is None else Record.create
        return create(folder, header.model_copy(update=more))
    record = Record.open(folder)
    record.append(plan.resumed)
    return record


def _run_tune(
    driver: SearchDriver, plan: SearchPlan, on_interrupt: Callable[[], None] | None
) -> None:
    """Run the driver's trials in Tune until none is left, the time is over or a signal came."""
    source, resources = plan.request.source, plan.resources
    fixed = {
        "source": (source.name, str(source.folder) if source.folder else None),
        "numerics": plan.numerics.model_dump(mode="json"),
        "model_source": plan.space.model_source,
        "gpus": resources.gpus_per_trial,
    }
    per_trial: Any = {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial}
    if plan.request.address is not None:
        per_trial = functools.partial(request_resources, *per_trial.values())
    # Tune requires an experiment folder; nothing in it is ever read.
    scratch_folder = tempfile.TemporaryDirectory(prefix="tune_cifar-")
    with (
        scratch_folder as scratch,
        _catch_signals(driver, on_interrupt),
        _open_remote(driver, plan) as remote,
    ):
        tune.Tuner(
            tune.with_resources(TrialWorker, per_trial),
            tune_config=tune.TuneConfig(
                search_alg=TuneSearcher(driver, fixed, remote),
                scheduler=TuneScheduler(driver, remote),
                num_samples=-1,  # the driver counts: to Tune a retried trial is a new one
                # On a cluster the nodes' slots count, which change.
                max_concurrent_trials=None if remote else resources.max_concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                stop=TuneStopper(driver, remote),
                verbose=0,
                # Else Tune clears a notebook's cell, and our table with it.
                progress_reporter=tune.CLIReporter(),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    if driver.fault is not None:
        raise driver.fault


@contextmanager
def _open_remote(driver: SearchDriver, plan: SearchPlan) -> Iterator[RemoteTrials | None]:
    """Serve the search's files to the workers of a cluster; None on this machine."""
    if plan.request.address is None:
        yield None
        return
    packed = pack_data(plan.request.source)
    data = None if packed is None else [ray.put(packed)]
    with serve_files(driver.record.state.folder, data) as nonce:
        yield RemoteTrials(driver, plan, nonce)


@contextmanager
def _catch_signals(driver: SearchDriver, on_interrupt: Callable[[], None] | None) -> Iterator[None]:
    """Interrupt the driver at the first SIGINT or SIGTERM, raise KeyboardInterrupt at the second.

    Outside of the main thread Python cannot catch signals, and nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if driver.is_interrupted:
            raise KeyboardInterrupt
        driver.interrupt()
        if on_interrupt is not None:
            with suppress(Exception):
                on_interrupt()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
