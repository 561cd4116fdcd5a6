"""Uploading a record to MLflow: in the background while a search runs, or later by `sync`.

MLflow is a view of the record and can be completed from it at any time. Trainings never talk to
MLflow, and a fault of MLflow never harms a search. runs.py says what an MLflow run holds.
"""

from __future__ import annotations

import math
import shlex
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tune_cifar.errors import TrackingError, hide_credentials
from tune_cifar.record.events import EpochReported, Event, SearchEnded, TrialEnded
from tune_cifar.record.journal import is_live, read_state
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.record.store import repeat_storage
from tune_cifar.tracking.address import find_sqlite_file, make_tracking_uri
from tune_cifar.tracking.runs import SearchRuns
from tune_cifar.tracking.store import check_locks, describe_error, translate_errors

# An upload waits this long for what follows at once, such as the end of a trial at its rung.
SETTLE_SECONDS = 0.25
# The pause after a fault; it doubles with each further one.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 120.0
# A round stops at this many faults in a row: they are hardly the trials' own.
MAX_FAULTS = 2
# Rounds at the end of a search, and in `sync`: what failed in the first is tried once more.
LAST_ROUNDS = 2
# How long to wait for another process that uploads the same search.
LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class SyncReport:
    """What `sync_search` did.

    Attributes:
        search: its name.
        uploaded: number of trials uploaded now.
        already: number of trials that were complete in MLflow already.
        closed: number of runs that MLflow showed as RUNNING and are closed now.
        live: a driver holds the search: the rest is left to it.
    """

    search: str
    uploaded: int
    already: int
    closed: int
    live: bool = False


class BackgroundUploader:
    """A background thread that uploads each trial at its rungs and at its end.

    Faults are kept, never raised. After a fault the trials that are left are tried again, after a
    pause that grows; a last time in `close`, which returns what failed as sentences. Of a resumed
    search, what MLflow lacks is uploaded first.

    Args:
        state: of a new search, or of one whose SearchResumed is recorded. Read only in the
            caller's thread.
    """

    def __init__(self, tracking_uri: str, storage: Path, state: SearchState) -> None:
        self._uploader = _Uploader(tracking_uri, storage, state, is_running=True)
        self._state = state
        self._rungs = frozenset(state.header.budget.get("rungs", ()))
        # Whether there is anything to upload; otherwise `close` does not even connect.
        self._is_due = bool(state.resumes or state.trials)
        self._is_closing = False
        # Copies of the trials to upload, by number; the state of the search to upload as its end.
        self._pending = _copy_trials(state.trials.values())
        self._end: SearchState | None = None
        self._is_end_left = False
        # Time of the next round, by time.monotonic; infinite while nothing is pending.
        self._next_round = time.monotonic() + SETTLE_SECONDS if self._pending else math.inf
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mlflow-uploader", daemon=True)
        self._thread.start()

    def on_event(self, state: SearchState, event: Event) -> None:
        """Take a recorded event; return at once."""
        with self._changed:
            self._state = state
            if isinstance(event, TrialEnded) or (
                isinstance(event, EpochReported) and self._is_rung(state, event)
            ):
                if not self._pending:
                    self._next_round = time.monotonic() + SETTLE_SECONDS
                self._pending[event.trial] = _copy_trial(state.trials[event.trial])
                self._changed.notify()
                self._is_due = True
            self._is_due |= isinstance(event, SearchEnded)

    def close(self, timeout_seconds: float = 60.0) -> list[str]:
        """Upload the end, wait for it at most this long, and return the faults as sentences.

        Runs that MLflow still shows as running are closed, since no driver holds the search now.
        """
        with self._changed:
            if self._is_due:
                trials = self._state.trials.values()
                self._pending |= _copy_trials(t for t in trials if t.status == "running")
                self._end, self._is_end_left = _copy_state(self._state), True
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout_seconds)
        hint = f"The record is complete. Upload the rest: {self._uploader.sync_command}"
        if self._thread.is_alive():
            return [f"MLflow upload incomplete after {timeout_seconds:g} s. {hint}"]
        num_left = len(self._pending) + self._is_end_left
        if num_left == 0:
            return []
        return [_describe_left(num_left, self._uploader.fault) + f" {hint}"]

    def _is_rung(self, state: SearchState, event: EpochReported) -> bool:
        """Return whether the trial is now at a rung; the last epoch, at its end, is none."""
        epoch, last = event.result.epoch, state.trials[event.trial].full_config.epochs
        return epoch in self._rungs and event.score is not None and epoch < last

    def _run(self) -> None:
        """Upload what is pending, round after round, until `close` and LAST_ROUNDS more."""
        pause, last_rounds = 0.0, LAST_ROUNDS
        with self._uploader:
            while last_rounds:
                with self._changed:
                    self._wait()
                    trials, end, is_closing = dict(self._pending), self._end, self._is_closing
                left, is_end_left = self._uploader.upload(trials, end)
                is_complete = not left and not is_end_left
                if is_complete:
                    pause = 0.0
                else:
                    pause = min(max(2 * pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
                with self._changed:
                    for number, trial in trials.items():
                        if self._pending[number] is trial:  # else it has a newer state by now
                            del self._pending[number]
                    for number, trial in left.items():
                        self._pending.setdefault(number, trial)  # behind the new ones
                    self._is_end_left = is_end_left
                    wait_seconds = max(pause, SETTLE_SECONDS) if self._pending else math.inf
                    self._next_round = time.monotonic() + wait_seconds
                if is_closing:
                    last_rounds = 0 if is_complete else last_rounds - 1

    def _wait(self) -> None:
        """Wait for the time of the next round, or for `close`."""
        while not self._is_closing:
            seconds = self._next_round - time.monotonic()
            if seconds <= 0:
                return
            self._changed.wait(min(seconds, threading.TIMEOUT_MAX))


def sync_search(
    tracking_uri: str,
    storage: Path,
    folder: Path,
    on_upload: Callable[[int], None] = lambda num_trials: None,
) -> SyncReport:
    """Complete MLflow from a record. A second call changes nothing more.

    While a driver holds the search no run is closed; and nothing is uploaded when the driver
    uploads to this very address itself.

    Args:
        folder: of the search. Its record is read once its runs are locked: what another process
            uploads until then is not replaced by what was known before.
        on_upload: called after each trial that is complete in MLflow now, with the number of all.

    Raises:
        RecordError: when the record cannot be read.
        TrackingError: when something could not be uploaded, or another process uploads the
            search.
    """
    lock, live = _make_lock(tracking_uri, folder), is_live(folder)
    try:
        # A driver that uploads to this address keeps its search's runs locked until its end.
        is_locked = _try_lock(lock, 0.0 if live else LOCK_SECONDS)
        if not is_locked and not live:
            raise TrackingError(f"{folder.name}: another process uploads this search. Try again.")
        live = is_live(folder) if is_locked else live
        state = read_state(folder)
        if is_locked:
            on_trial = partial(on_upload, len(state.trials))
            return _complete(_Uploader(tracking_uri, storage, state, live, on_trial, lock), state)
        with translate_errors(f"{folder.name}: reading its runs from MLflow"):
            runs = SearchRuns(tracking_uri, storage, state, is_running=True)
            num_complete = sum(map(runs.is_complete, state.trials.values()))
            return SyncReport(folder.name, 0, num_complete, 0, live)
    finally:
        lock.release()


def _complete(uploader: _Uploader, state: SearchState) -> SyncReport:
    """Upload what MLflow lacks, unless a driver goes on with it its end, too."""
    name, live = state.header.name, uploader.is_running
    left, is_end_left = _copy_trials(state.trials.values()), False
    for _ in range(LAST_ROUNDS):
        left, is_end_left = uploader.upload(left, None if live else state)
        if not left and not is_end_left:
            break
    if left or is_end_left:
        problem = _describe_left(len(left) + is_end_left, uploader.fault)
        raise TrackingError(f"{name}: {problem} Later: {uploader.sync_command}")
    done = uploader.num_uploaded, uploader.num_already, uploader.num_closed
    return SyncReport(name, *done, live)


def delete_runs(tracking_uri: str, storage: Path, state: SearchState) -> int:
    """Delete a search's runs in MLflow, and return how many there were.

    Raises:
        TrackingError: when MLflow cannot be reached or refuses.
    """
    path = find_sqlite_file(tracking_uri)
    if path is not None and not path.exists():
        return 0
    with translate_errors(f"{state.header.name}: deleting its runs in MLflow"):
        return SearchRuns(tracking_uri, storage, state, is_running=False).delete()


def upload_evaluation(
    tracking_uri: str,
    storage: Path,
    state: SearchState,
    trial: TrialState,
    evaluation: Mapping[str, Any],
    files: Sequence[Path],
) -> str | None:
    """Log an evaluation on its trial's run. A second call changes nothing more.

    The files go under judge/validation or judge/test; the calibration error and the accuracy of
    every class are metrics.

    Returns:
        None when MLflow has it, else a sentence with the reason and what helps.
    """
    path = find_sqlite_file(tracking_uri)
    try:
        if path is None or path.exists():
            runs = SearchRuns(tracking_uri, storage, state, is_running=False)
            if runs.log_evaluation(trial, evaluation, files):
                return None
        fault = "the trial has no run there"
    except Exception as exc:  # whatever MLflow raises, the figures are on disk
        fault = describe_error(exc)
    command = _make_sync_command(tracking_uri, storage, state)
    problem = f"evaluation of {trial.run_id} not uploaded to MLflow: {fault}"
    return f"{problem}. The files are kept. Complete MLflow: {command}"


class _Uploader(AbstractContextManager["_Uploader"]):
    """Uploads trials and the end of one search; leaving its context releases the search's lock.

    After a fault it connects anew, and so starts from what MLflow then has.

    Attributes:
        fault: the last fault without credentials; empty before the first.
        is_running: a driver holds the search.
        num_uploaded, num_already: trials that were uploaded, and that were complete already.
        num_closed: runs that MLflow showed as RUNNING and were closed.
        sync_command: the command that completes MLflow later.
    """

    def __init__(
        self,
        tracking_uri: str,
        storage: Path,
        state: SearchState,
        is_running: bool,
        on_upload: Callable[[], None] = lambda: None,
        lock: FileLock | None = None,
    ) -> None:
        self.fault = ""
        self.is_running = is_running
        self.num_uploaded = self.num_already = self.num_closed = 0
        self.sync_command = _make_sync_command(tracking_uri, storage, state)
        self._on_upload = on_upload
        self._make_runs = partial(SearchRuns, tracking_uri, storage, state, is_running)
        self._resumes = list(state.resumes)
        self._runs: SearchRuns | None = None
        self._lock = lock or _make_lock(tracking_uri, state.folder)

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()

    def upload(
        self, trials: Mapping[int, TrialState], end: SearchState | None
    ) -> tuple[dict[int, TrialState], bool]:
        """Try one round: each trial once, then the search's end.

        The round stops when MLflow cannot be reached. After MAX_FAULTS in a row it passes over the
        other trials.

        Returns:
            The trials that are left, those that failed last; and whether the end is left.
        """
        waiting, num_faults = dict(trials), 0
        failed: dict[int, TrialState] = {}
        while waiting and num_faults < MAX_FAULTS:
            runs = self._connect()
            if runs is None:
                return waiting | failed, end is not None
            number = next(iter(waiting))
            trial = waiting.pop(number)
            try:
                is_new = runs.upload_trial(trial)
            except Exception as exc:  # whatever MLflow raises, the search continues
                self._disconnect(exc)
                failed[number] = trial
                num_faults += 1
                continue
            num_faults = 0
            self.num_uploaded += is_new
            self.num_already += not is_new
            self._on_upload()
        return waiting | failed, end is not None and not self._upload_end(end)

    def _upload_end(self, state: SearchState) -> bool:
        if self.fault:
            self._runs = None  # connect anew: a call that failed may have arrived since
        runs = self._connect()
        if runs is None:
            return False
        try:
            self.num_closed += runs.close(state)
        except Exception as exc:
            self._disconnect(exc)
            return False
        return True

    def _connect(self) -> SearchRuns | None:
        """Return the search's runs, opened; None when that fails."""
        if self._runs is None:
            try:
                if not _try_lock(self._lock, LOCK_SECONDS):
                    raise TrackingError("another process uploads this search")
                runs = self._make_runs()
                runs.open(self._resumes)
            except Exception as exc:
                self._disconnect(exc)
                return None
            self._runs = runs
        return self._runs

    def _disconnect(self, fault: Exception) -> None:
        self.fault, self._runs = describe_error(fault), None


def _make_lock(tracking_uri: str, folder: Path) -> FileLock:
    """Return the lock of a search's runs, one for each address: a live one may have several."""
    address = f"{zlib.crc32(tracking_uri.encode()):08x}"
    return FileLock(folder / f"mlflow-{address}.lock")


def _try_lock(lock: FileLock, timeout_seconds: float) -> bool:
    """Lock a search's runs for this process; return False when another has locked them."""
    if not lock.is_locked:
        check_locks(Path(lock.lock_file).parent)
        try:
            lock.acquire(timeout=timeout_seconds)
        except Timeout:
            return False
    return True


def _make_sync_command(tracking_uri: str, storage: Path, state: SearchState) -> str:
    command = f"python -m tune_cifar sync --search {state.header.name}{repeat_storage(storage)}"
    if tracking_uri != make_tracking_uri(storage, None):
        command += f" --tracking-uri {shlex.quote(hide_credentials(tracking_uri))}"
    return command


def _describe_left(num_runs: int, fault: str) -> str:
    return f"MLflow upload incomplete, {num_runs} left over: {fault}."


def _copy_trials(trials: Iterable[TrialState]) -> dict[int, TrialState]:
    """Copy the trials that have results, by number."""
    return {t.number: _copy_trial(t) for t in trials if t.status != "running" or t.epochs_done}


def _copy_trial(trial: TrialState) -> TrialState:
    """Copy a trial, so that no later event changes it; an ended one does not change any more."""
    if trial.status != "running":
        return trial
    return replace(trial, epochs=list(trial.epochs), retries=list(trial.retries))


def _copy_state(state: SearchState) -> SearchState:
    trials = {number: _copy_trial(trial) for number, trial in state.trials.items()}
    return replace(state, trials=trials, resumes=list(state.resumes), arrivals={})
