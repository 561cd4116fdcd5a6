"""MLflow as a view of the record: shipped in the background while a search runs, completed from the record at any later
time. Trainings never talk to MLflow, and a tracking fault never hurts a search. What a run holds is in mlruns.py.
"""

from __future__ import annotations

import shlex
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tune_cifar.errors import TrackingError, hide_credentials
from tune_cifar.record.events import EpochReported, Event, SearchEnded, TrialEnded
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.record.store import find_storage
from tune_cifar.tracking.runs import METRICS_PER_BATCH, SearchRuns, to_ms
from tune_cifar.tracking.store import (
    create_experiment,
    describe_error,
    find_experiment,
    find_sqlite_file,
    make_client,
    place_experiment,
    translate_errors,
)
from tune_cifar.tracking.views import MAX_TAG_CHARACTERS

# What follows at once (a trial stopped at the rung it has just reached) goes along.
SETTLE_SECONDS = 0.25
# After a fault the next attempt waits, each time twice as long.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 120.0
# At the end, and in `sync`, what MLflow did not take is tried so often; the search's end each time, after the trials.
LAST_ROUNDS = 2
# Another process may be shipping the same search: wait for it so long.
LOCK_SECONDS = 10.0

Upload = Callable[[SearchRuns], int]
# A search's end goes by this number among its trials', and after them.
END = -1


@dataclass(frozen=True)
class SyncReport:
    """What `sync_search` did: trials shipped now, trials that were whole already, RUNNING runs closed."""

    search: str
    shipped: int
    already: int
    closed: int


def make_tracking_uri(storage: Path, option: str | None) -> str:
    """The tracking address: the option, else an absolute SQLite address under the run store."""
    return option or f"sqlite:///{storage}/mlflow.db"


class BackgroundUploader:
    """A background thread that ships what the record's events complete: a trial at each rung and at its end.

    Faults are kept, never raised. What MLflow did not take is tried again, after a pause that grows; and at the end,
    when `close` returns what is left over as sentences. On a search that is gone on with, what MLflow lacks is shipped
    first.

    Args:
        state: of a new search, or of one whose SearchResumed is recorded. Read only in the caller's thread.
    """

    def __init__(self, tracking_uri: str, storage: Path, state: SearchState) -> None:
        self._uploader = _Uploader(tracking_uri, storage, state, is_running=True)
        self._state = state
        self._rungs = frozenset(state.header.budget.get("rungs", ()))
        self._pending = _pack_trials(state)
        self._end: dict[int, Upload] = {}
        self._is_due = bool(state.resumes or state.trials)
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mlflow-uploader", daemon=True)
        self._thread.start()

    def on_event(self, state: SearchState, event: Event) -> None:
        """Listener for record events; returns at once."""
        with self._changed:
            self._state = state
            if isinstance(event, TrialEnded) or (
                isinstance(event, EpochReported) and self._is_rung(state, event)
            ):
                self._pending[event.trial] = _pack_trial(state.trials[event.trial])
                self._changed.notify()
                self._is_due = True
            self._is_due |= isinstance(event, SearchEnded)

    def close(self, timeout_seconds: float = 60.0) -> list[str]:
        """Ship the end and wait, at most this long; returns what went wrong, one sentence each. Runs that still show
        as running are closed: no driver holds the search any more."""
        with self._changed:
            if self._is_due:
                going = {
                    number: trial
                    for number, trial in self._state.trials.items()
                    if trial.status == "running"
                }
                self._pending |= _pack_trials(replace(self._state, trials=going))
                self._end = {END: partial(SearchRuns.close, state=_copy_state(self._state))}
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout_seconds)
        way_out = f"The record is whole. Complete MLflow from it: {self._uploader.way_out}"
        if self._thread.is_alive():
            return [
                f"MLflow must take all runs within {timeout_seconds:g} s, got no end of it. {way_out}"
            ]
        if not self._pending:
            return []
        return [
            f"MLflow must take all runs, got {len(self._pending)} left over: {self._uploader.fault}. {way_out}"
        ]

    def _is_rung(self, state: SearchState, event: EpochReported) -> bool:
        """The last epoch is no rung: the trial's end follows."""
        epoch = event.result.epoch
        return (
            epoch in self._rungs
            and event.score is not None
            and epoch < state.trials[event.trial].full_config.epochs
        )

    def _run(self) -> None:
        pause, rounds = SETTLE_SECONDS, LAST_ROUNDS
        with self._uploader.holding():
            while rounds:
                with self._changed:
                    self._changed.wait_for(lambda: self._pending or self._is_closing)
                    self._changed.wait_for(lambda: self._is_closing, pause)
                    pending, is_closing = self._pending | self._end, self._is_closing
                left = self._uploader.upload(pending)
                with self._changed:
                    news = {
                        key: item
                        for key, item in self._pending.items()
                        if pending.get(key) is not item
                    }
                    self._pending = news | {
                        key: item for key, item in left.items() if key not in news
                    }
                pause = (
                    min(max(2 * pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
                    if left
                    else SETTLE_SECONDS
                )
                if is_closing:
                    rounds = rounds - 1 if left else 0


def sync_search(
    tracking_uri: str,
    storage: Path,
    state: SearchState,
    is_live: bool = False,
    on_upload: Callable[[], None] = lambda: None,
) -> SyncReport:
    """Complete MLflow from a record. Done twice, nothing changes any more.

    Args:
        on_upload: called after each trial that MLflow has now.
        is_live: a driver holds the search. Then no run is closed; and where the driver ships to this very address,
            nothing is shipped either: it does.

    Raises:
        TrackingError: when MLflow did not take everything, or another process ships the same search.
    """
    name = state.header.name
    uploader = _Uploader(tracking_uri, storage, state, is_live, on_upload)
    pending = _pack_trials(state)
    end: dict[int, Upload] = {} if is_live else {END: partial(SearchRuns.close, state=state)}
    with uploader.holding():
        if is_live and not uploader.try_hold(0.0):
            with translate_errors(f"{name}: MLflow must answer"):
                runs = SearchRuns(tracking_uri, storage, state, is_running=True)
                return SyncReport(name, 0, sum(map(runs.is_whole, state.trials.values())), 0)
        left = uploader.upload(pending | end)
        for _ in range(LAST_ROUNDS - 1):
            left = uploader.upload(left | end) if left else {}
    if left:
        rule = f"{name}: MLflow must take all runs, got {len(left)} left over: {uploader.fault}."
        raise TrackingError(f"{rule} Later: {uploader.way_out}")
    results = uploader.results
    closed = results.pop(END, 0)
    return SyncReport(name, sum(results.values()), len(results) - sum(results.values()), closed)


def delete_runs(tracking_uri: str, storage: Path, state: SearchState) -> int:
    """Delete a search's runs in MLflow, the parent's and the trials'; returns how many there were.

    Raises:
        TrackingError: when MLflow cannot be reached or refuses.
    """
    path = find_sqlite_file(tracking_uri)
    if path is not None and not path.exists():
        return 0
    with translate_errors(f"{state.header.name}: MLflow must delete its runs"):
        return SearchRuns(tracking_uri, storage, state, is_running=False).delete()


def upload_lr_range(
    tracking_uri: str, storage: Path, report: Mapping[str, Any], folder: Path
) -> None:
    """Log an LR range test as a run of its own (see mlruns.py).

    Raises:
        TrackingError: when MLflow cannot be reached or refuses.
    """
    with translate_errors(f"{report['name']}: MLflow must take the run"):
        storage.mkdir(parents=True, exist_ok=True)
        log_lr_range(tracking_uri, storage, report, folder)


def upload_evaluation(
    tracking_uri: str,
    storage: Path,
    state: SearchState,
    trial: TrialState,
    evaluation: Mapping[str, Any],
    files: Sequence[Path],
) -> str | None:
    """Log an evaluation on its trial's run: the files under judge/validation or judge/test, its calibration error and the
    accuracy of every class as metrics. Done twice, nothing changes any more.

    Returns:
        None when MLflow has it, else a sentence that says why not and what helps.
    """
    path, way_out = find_sqlite_file(tracking_uri), _describe_sync(tracking_uri, storage, state)
    try:
        if path is None or path.exists():
            runs = SearchRuns(tracking_uri, storage, state, is_running=False)
            if runs.log_evaluation(trial, evaluation, files):
                return None
        fault = "no run of it there"
    except Exception as exc:  # whatever MLflow raises, the figures are on disk
        fault = describe_error(exc)
    return f"MLflow must take the evaluation of {trial.run_id}, got {fault}. The files stay; complete MLflow: {way_out}"


def _describe_sync(tracking_uri: str, storage: Path, state: SearchState) -> str:
    """The command that completes MLflow from a record."""
    command = f"python -m tune_cifar sync --search {state.header.name}"
    if storage != find_storage(None):
        command += f" --storage {shlex.quote(str(storage))}"
    if tracking_uri != make_tracking_uri(storage, None):
        command += f" --tracking-uri {shlex.quote(hide_credentials(tracking_uri))}"
    return command


class _Uploader:
    """Carries shipments to MLflow. After a fault it starts over from what MLflow then has.

    Attributes:
        fault: the last one, in words without credentials.
        results: what each shipment that arrived returned.
        way_out: the command that completes MLflow later.
    """

    def __init__(
        self,
        tracking_uri: str,
        storage: Path,
        state: SearchState,
        is_running: bool,
        on_upload: Callable[[], None] = lambda: None,
    ) -> None:
        self.fault = ""
        self.results: dict[int, int] = {}
        self._on_upload = on_upload
        self.way_out = _describe_sync(tracking_uri, storage, state)
        self._make_runs = partial(SearchRuns, tracking_uri, storage, state, is_running)
        self._resumes = list(state.resumes)
        self._runs: SearchRuns | None = None
        self._has_failed = False
        # Per address: a live search may be shipped to another one.
        self._lock_file = state.folder / f"mlflow-{zlib.crc32(tracking_uri.encode()):08x}.lock"
        self._lock: FileLock | None = None

    @contextmanager
    def holding(self) -> Iterator[None]:
        """At the end, give free what the first attempt took hold of (see `try_hold`)."""
        try:
            yield
        finally:
            if self._lock is not None:
                self._lock.release()

    def try_hold(self, timeout_seconds: float) -> bool:
        """Have the search's runs for this process alone, until `holding` is left; False when another has them."""
        if self._lock is None:
            lock = FileLock(self._lock_file)
            try:
                lock.acquire(timeout=timeout_seconds)
            except Timeout:
                return False
            self._lock = lock
        return True

    def upload(self, pending: Mapping[int, Upload]) -> dict[int, Upload]:
        """Try each shipment once, the search's end last; returns what did not arrive, what failed behind the rest. Two
        faults in a row are hardly the trials': the others wait then, and all wait when MLflow does not even answer."""
        waiting: dict[int, Upload] = {}
        failed: dict[int, Upload] = {}
        num_faults, is_away = 0, False
        for key, shipment in sorted(pending.items(), key=lambda item: item[0] == END):
            if is_away or (num_faults >= 2 and key != END):
                waiting[key] = shipment
                continue
            try:
                if key == END and self._has_failed:
                    self._runs = None  # look once more for what arrived after all
                is_away = True
                runs = self._runs or self._connect()
                is_away = False
                self.results[key] = self.results.get(key, 0) + shipment(runs)
                self._on_upload()
                num_faults = 0
            except (
                Exception
            ) as exc:  # whatever MLflow raises, the search goes on; the summary tells
                self.fault, self._has_failed, self._runs = describe_error(exc), True, None
                failed[key] = shipment
                num_faults += 1
        return waiting | failed

    def _connect(self) -> SearchRuns:
        if not self.try_hold(LOCK_SECONDS):
            raise TrackingError("one process alone must ship a search, got another at it")
        runs = self._make_runs()
        runs.open(self._resumes)
        self._runs = runs
        return runs


def _pack_trials(state: SearchState) -> dict[int, Upload]:
    """A shipment for every trial that has something to tell."""
    told = (
        trial for trial in state.trials.values() if trial.status != "running" or trial.epochs_done
    )
    return {trial.number: _pack_trial(trial) for trial in told}


def _pack_trial(trial: TrialState) -> Upload:
    return partial(SearchRuns.upload_trial, trial=_copy_trial(trial))


def _copy_trial(trial: TrialState) -> TrialState:
    """A trial that no later event changes; an ended one is that already."""
    if trial.status != "running":
        return trial
    return replace(trial, epochs=list(trial.epochs), retries=list(trial.retries))


def _copy_state(state: SearchState) -> SearchState:
    trials = {number: _copy_trial(trial) for number, trial in state.trials.items()}
    return replace(state, trials=trials, resumes=list(state.resumes), arrivals={})


def log_lr_range(tracking_uri: str, storage: Path, report: Mapping[str, Any], folder: Path) -> None:
    """A run of its own for an LR range test (`report` is what its sweeps.json holds), its folder as artifacts. No
    record stands behind it: where a call fails, the run is closed as FAILED."""
    from mlflow.entities import Metric, Param

    client, now = make_client(tracking_uri), to_ms(report["created"])
    name, artifacts = place_experiment(
        tracking_uri, storage, report["space"], report["data"]["name"]
    )
    found = find_experiment(client, name)
    experiment_id = found[0] if found else create_experiment(client, name, artifacts, {})
    points = [
        (f"lr_{key.replace('/', '_over_')}", found["lr"], 0)
        for key, found in report["estimators"].items()
    ]
    for sweep in report["sweeps"]:
        points += [
            (f"loss_seed_{sweep['seed']}", loss, step)
            for step, loss in enumerate(sweep["losses"], 1)
        ]
    metrics = [Metric(key, value, now, step) for key, value, step in points if value is not None]
    tags = {
        "kind": "lr_range",
        "tier": report["tier"],
        "data": report["data"]["name"],
        "verdict": report["verdict"],
    }
    tags |= {"mlflow.note.content": f"`{report['command']}`"[:MAX_TAG_CHARACTERS]}
    run_id = client.create_run(experiment_id, now, tags, report["name"]).info.run_id
    try:
        client.log_batch(
            run_id,
            params=[Param(knob, str(report["config"][knob])) for knob in report["living_knobs"]],
        )
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            client.log_batch(run_id, metrics[start : start + METRICS_PER_BATCH])
        client.log_artifacts(run_id, str(folder))
    except BaseException:
        with suppress(Exception):  # the first fault is told
            client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
