"""A search on Ray Tune: warm workers train, Optuna proposes, asynchronous successive halving stops.

`SearchDriver` (driver.py) decides and records, without Ray. Three thin adapters pass Tune's calls
on to it: a Searcher (which trial comes next), a Scheduler (whether a trial goes on) and a Stopper
(when the search ends). `TrialWorker` (worker.py) trains. The record is written first; everything
shown later is read from it.
"""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

# Before ray: it sets what ray reads when it is imported.
from tune_cifar.search.worker import TrialWorker, unpack_epochs  # isort: split

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from tune_cifar.data.load import load_train_val
from tune_cifar.errors import DiskFullError, RecordError
from tune_cifar.record.environment import describe_environment
from tune_cifar.record.events import (
    Confirmation,
    Event,
    Fault,
    Kind,
    Learned,
    SearchResumed,
    utc_now,
)
from tune_cifar.record.journal import Record
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import load_searches, search_folder
from tune_cifar.search.cluster import start_ray, use_ray
from tune_cifar.search.driver import SearchDriver
from tune_cifar.search.plan import (
    SearchPlan,
    SearchRequest,
    check_and_measure,
    count_trials,
    settle_search,
)
from tune_cifar.search.resume import (
    check_accepted,
    check_resumable,
    describe_restored,
    find_changes,
    restore_goals,
    restore_space,
)
from tune_cifar.search.warm_start import learn, try_best_first
from tune_cifar.space.select import SearchSpace
from tune_cifar.tracking.upload import BackgroundUploader, make_tracking_uri
from tune_cifar.train.numerics import restore_numerics
from tune_cifar.train.recorded import Listener, Shown, make_header

# Seconds that the end of a search waits for MLflow, and after a second Ctrl-C.
UPLOAD_SECONDS = 60.0
URGENT_SECONDS = 2.0
# Part of Ray's message when it kills a worker because the machine's memory runs out.
RAY_OUT_OF_MEMORY = "low on memory"


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
    if not request.learn:
        space, notes = try_best_first(space, states, request.warm_trials)
    plan = settle_search(space, request, start_ray)
    learned: list[Learned] = []
    for state in states if request.learn else ():
        found, note = learn(space, state, plan.data)
        learned += found
        notes.append(note)
    notes = [*plan.notes, *notes]
    return replace(plan, confirmation=confirmation, learned=tuple(learned), notes=tuple(notes))


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
        max_time_seconds: of this launch; None takes the recorded limit, counted from now.
        accept_changes: resume although code, data or numerics have changed.
        target, patience: None keeps those of a search that has not ended; one that has goes on
            without.

    Raises:
        RecordError: when the search is missing, damaged or held by another process.
        ConfigError: when changes are not accepted, or the request does not fit the machine.
    """
    assert request.name is not None
    with Record.open(search_folder(request.storage, request.name)) as record:
        state = record.state
    space = restore_goals(restore_space(state.header), state)
    num_trials = state.num_trials if trials is None else count_trials(trials, len(state.trials))
    space = space.limit(num_trials, max_time_seconds, target, patience)
    check_resumable(state.header, num_trials)
    last = state.resumes[-1] if state.resumes else state.header
    numerics = restore_numerics(last.numerics)
    environment = describe_environment()
    data = load_train_val(request.source, space.baseline.train_size, space.baseline.val_size).info
    changes = find_changes(state, data, numerics, environment)
    check_accepted(changes, accept_changes)
    request = replace(request, cpus_per_trial=numerics.threads)
    plan = check_and_measure(space, request, state.header.name, numerics, start_ray)
    event = SearchResumed(
        time=utc_now(),
        trials=num_trials,
        target=space.budget.target,
        patience=space.budget.patience,
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


def _guard(driver: SearchDriver, action: Callable[[], Any], otherwise: Any) -> Any:
    """Call the action; an exception ends the search and is raised at its end.

    Tune would wrap the exception or attribute it to a trial. An OSError is the run store's: what
    only shows the search raises none (`Shown`).
    """
    fault: Exception
    try:
        return action()
    except OSError as exc:
        place = exc.filename or driver.record.state.folder
        problem = f"{place}: cannot write to the run store: {exc.strerror}"
        fault = RecordError(f"{problem}. Make room, then give `resume=True`.")
    except Exception as exc:
        fault = exc
    driver.fault = driver.fault or fault
    return otherwise


class _Searcher(Searcher):  # type: ignore[misc]
    """Passes Tune's requests for a trial on to the driver."""

    def __init__(self, driver: SearchDriver, fixed: dict[str, Any]) -> None:
        super().__init__()
        self._driver = driver
        self._fixed = fixed

    def suggest(self, trial_id: str) -> dict[str, Any] | Literal["FINISHED"] | None:
        return _guard(self._driver, self._suggest, Searcher.FINISHED)  # type: ignore[no-any-return]

    def _suggest(self) -> dict[str, Any] | Literal["FINISHED"] | None:
        """Return a trial, None when there is none now, FINISHED when no more will start."""
        trial = self._driver.ask()
        if trial is None:
            return Searcher.FINISHED if self._driver.is_exhausted else None
        folder = self._driver.record.state.trial_folder(trial.number)
        folder.mkdir(parents=True, exist_ok=True)
        return {
            "trial": trial.number,
            "config": trial.full_config.model_dump(mode="json"),
            "stages": self._driver.list_remaining_stages(trial),
            "rungs": self._driver.rungs,
            "folder": str(folder),
            **self._fixed,
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the scheduler has reported to the driver already."""


class _Scheduler(FIFOScheduler):  # type: ignore[misc]
    """Passes every message of a worker on to the driver, before Tune uses it."""

    def __init__(self, driver: SearchDriver) -> None:
        super().__init__()
        self._driver = driver

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = _guard(self._driver, lambda: self._on_result(result), False)
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)

    def _on_result(self, message: dict[str, Any]) -> bool:
        """Pass a worker's message on to the driver; return whether the trial goes on."""
        number, outcome, text = message["trial"], message["outcome"], message["text"]
        if outcome == "epochs":
            reports = (self._driver.report(number, *epoch) for epoch in unpack_epochs(text))
            return all(reports)  # none after the epoch that ends the trial
        if outcome == "paused":
            self._driver.pause(number)
        elif outcome == "diverged":
            self._driver.end(number, "diverged", text)
        elif outcome == "out of memory":
            self._driver.retry(number, "out of memory", text)
        elif outcome == "disk full":
            raise DiskFullError(f"{text} Then give `resume=True`.")
        else:
            self._driver.fail(number, text)
        return False

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Retry a trial whose worker died: a crash, or killed, perhaps by Ray as memory ran out."""
        error = _read_error(trial)
        fault: Fault = "out of memory" if RAY_OUT_OF_MEMORY in error else "worker died"
        text = f"the worker process of the trial died\n{error[:2000]}".rstrip()
        _guard(self._driver, lambda: self._driver.retry(trial.config["trial"], fault, text), None)


def _read_error(trial: Any) -> str:
    """Return Ray's message on a trial's dead worker; Tune's own `get_error` finds none."""
    with suppress(OSError, TypeError):
        return Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    return ""


class _Stopper(Stopper):  # type: ignore[misc]
    """Ends the search, in the middle of an epoch if need be, when the driver requires it."""

    def __init__(self, driver: SearchDriver) -> None:
        self._driver = driver

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._driver.is_cut


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
        the search as recorded, and a sentence for each upload to MLflow that failed.

    Raises:
        RecordError: when the name is taken or the record cannot be locked or written.
        ConfigError: when another search runs in this process, or other code has started Ray.
    """
    request, at_once = plan.request, False
    with use_ray(plan.resources), _open_record(plan) as record:
        uri = make_tracking_uri(request.storage, request.tracking_uri)
        uploader = BackgroundUploader(uri, request.storage, record.state)
        show = Shown(listener or (lambda state, event: None))

        def on_event(state: SearchState, event: Event) -> None:
            uploader.on_event(state, event)
            show(state, event)

        driver = SearchDriver(record, plan.space, on_event, request.keep_weights)
        try:
            _run_tune(driver, plan, on_interrupt)
        except KeyboardInterrupt:
            at_once = True
        finally:
            driver.finish()
            faults = uploader.close(URGENT_SECONDS if at_once else UPLOAD_SECONDS)
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
    }
    per_trial = {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial}
    # Tune requires an experiment folder; nothing in it is ever read.
    scratch_folder = tempfile.TemporaryDirectory(prefix="tune_cifar-")
    with scratch_folder as scratch, _catch_signals(driver, on_interrupt):
        tune.Tuner(
            tune.with_resources(TrialWorker, per_trial),
            tune_config=tune.TuneConfig(
                search_alg=_Searcher(driver, fixed),
                scheduler=_Scheduler(driver),
                num_samples=-1,  # the driver counts: to Tune a retried trial is a new one
                max_concurrent_trials=resources.max_concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                stop=_Stopper(driver),
                verbose=0,
                # Else Tune clears a notebook's cell, and our table with it.
                progress_reporter=tune.CLIReporter(),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    if driver.fault is not None:
        raise driver.fault


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
