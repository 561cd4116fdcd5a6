"""A search's durable record: the one truth of which sampler, rungs, leaderboard, report and MLflow are views.

One file per search, `<storage>/searches/<name>/record.jsonl`, one line per event (events.py), appended and synced by
the driver. An append returns after fsync: a torn last line (no newline, not JSON or not fitting its CRC) was never
acknowledged, so opening cuts it and says so. Any other bad line is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Literal, get_args

from tune_cifar import schema
from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record.events import (
    KINDS,
    NAME,
    WAY_OUT,
    EpochReported,
    Event,
    Header,
    Origin,
    SearchEnded,
    SearchResumed,
    TrialEnded,
    TrialRetried,
    TrialStarted,
    decode_event,
    encode_event,
    utc_now,
)
from tune_cifar.schema import EpochResult, Status, TrainConfig

RECORD_FILE = "record.jsonl"
OWNER_FILE = "owner.json"
# A look at a search (`is_live`) holds its lock for an instant; a driver that comes just then tries again so long.
LOCK_SECONDS = 1.0
INTERRUPTED = "interrupted"
"""The reason of a SearchEnded that leaves trials running, to be gone on with."""
TIME_LIMIT = "time limit"
"""The reason of a SearchEnded that stopped what was running."""


@dataclass
class TrialState:
    """One trial as its events tell it. A trial in cycles trains several times, longer each time: `epochs` and `config`
    are those of the training that it is in. `ended_seq` is the sequence number of its end: it orders the ends."""

    number: int
    run_id: str
    origin: Origin
    params: dict[str, Any]
    whole: TrainConfig
    """The longest training."""
    fingerprint: str
    started: str | None
    driver: Header | SearchResumed
    """The last that it ran under, with its Numerics and environment."""
    epochs: list[EpochResult] = field(default_factory=list)
    """Epoch n stands at index n - 1: none is missing."""
    earlier: list[tuple[int, EpochResult]] = field(default_factory=list)
    """Of the cycles before, each with its cycle's length."""
    cycle: int | None = None
    """Length of the cycle that it is in; None before the first, and where the whole training is one."""
    scores: dict[int, float] = field(default_factory=dict)
    """val_acc by epoch, as trials are compared by it: of a trial in cycles, at the end of each."""
    retries: list[TrialRetried] = field(default_factory=list)
    status: Status = "running"
    score: float | None = None
    reason: str = ""
    error_file: str | None = None
    weights_file: str | None = None
    ended_seq: int | None = None
    ended: str | None = None

    @property
    def config(self) -> TrainConfig:
        return self.whole if self.cycle is None else self.whole.shorten(self.cycle)

    @property
    def paid(self) -> list[tuple[int, EpochResult]]:
        """Every epoch that was trained, in order, with its cycle's length."""
        length = self.cycle or self.whole.epochs
        return [*self.earlier, *((length, result) for result in self.epochs)]

    @property
    def epochs_done(self) -> int:
        return len(self.earlier) + len(self.epochs)

    @property
    def val_acc(self) -> float | None:
        """Of the last reported epoch; None before the first and without validation images."""
        return self.paid[-1][1].val_acc if self.paid else None

    def apply(self, event: EpochReported | TrialRetried | TrialEnded, seq: int) -> None:
        """The part of SearchState.apply that changes a trial."""
        kind = KINDS[type(event)]
        _must(self.status == "running", self.run_id, f"a {self.status} trial must tell no more, got {kind!r}.")
        if isinstance(event, TrialRetried):
            self.retries.append(event)
            return
        rule = f"a trial in cycles must name its cycle, got {kind!r} without one in that of {self.cycle} epochs."
        _must(event.cycle is not None or self.cycle is None, self.run_id, rule)
        done, last = len(self.epochs), self.config.epochs
        if event.cycle not in (None, self.cycle):
            old, longest = self.cycle or 0, self.whole.epochs
            rule = f"a cycle must be longer than the whole one before ({old}), at most {longest}, got {event.cycle}."
            _must(done == old < event.cycle <= longest, self.run_id, rule)
            done, last = 0, event.cycle
        if isinstance(event, EpochReported):
            rule = f"epoch {done + 1} of {last} must come next, got epoch {event.result.epoch}."
            _must(event.result.epoch == done + 1 <= last, self.run_id, rule)
            self._begin(event.cycle)
            self.epochs.append(event.result)
            if event.score is not None:
                self.scores[event.result.epoch] = event.score
            return
        rule = f"complete must mean {self.whole.epochs} epochs, got {done} of {last}."
        _must(done == last == self.whole.epochs or event.status != "complete", self.run_id, rule)
        score = {"complete": self.val_acc, "diverged": schema.CHANCE_ACCURACY}.get(event.status)
        _must(event.score == score, self.run_id, f"a {event.status} trial's score must be {score}, got {event.score}.")
        self._begin(event.cycle)
        self.score, self.reason, self.ended_seq, self.ended = score, event.reason, seq, event.time
        self.error_file, self.weights_file, self.status = event.error_file, event.weights_file, event.status

    def _begin(self, cycle: int | None) -> None:
        if cycle is not None and cycle != self.cycle:
            self.earlier, self.epochs, self.cycle = self.paid, [], cycle
            self.fingerprint = self.config.fingerprint


@dataclass
class SearchState:
    """Everything the events of a record say; views read it, only `apply` changes it. Trials by number, in the order of
    their starts; `arrivals` has the scores by epoch and trial, in the order they were reported; `finished` is the
    last event when a driver ended; `repaired` tells what `Record.open` cut off; `num_events` is the last event's
    sequence number."""

    folder: Path
    header: Header
    trials: dict[int, TrialState] = field(default_factory=dict)
    arrivals: dict[int, dict[int, float]] = field(default_factory=dict)
    resumes: list[SearchResumed] = field(default_factory=list)
    finished: SearchEnded | None = None
    repaired: str | None = None
    num_events: int = 1

    @property
    def is_finished(self) -> bool:
        """True when the search came to its end; an interrupted one, or one whose driver died, may be gone on with."""
        return self.finished is not None and self.finished.reason != INTERRUPTED

    @property
    def num_trials(self) -> int:
        """How many trials the search is to have, as the last driver was told."""
        return self.resumes[-1].trials if self.resumes else int(self.header.budget["trials"])

    @property
    def baseline_score(self) -> float | None:
        """Score of the baseline trial, the yardstick of every gain; None unless it is complete."""
        return next((t.score for t in self.trials.values() if t.origin == "baseline" and t.status == "complete"), None)

    @property
    def best(self) -> TrialState | None:
        """The complete trial of the highest score, of equals the lowest number; None while there is none."""
        scored = [(t.score, -t.number) for t in self.trials.values() if t.status == "complete" and t.score is not None]
        return self.trials[-max(scored)[1]] if scored else None

    @property
    def counts(self) -> dict[Status, int]:
        """Number of trials of every status, zeros included."""
        return {status: sum(t.status == status for t in self.trials.values()) for status in get_args(Status)}

    def trial_folder(self, number: int) -> Path:
        """A trial's own folder, existing or not: checkpoints, error, weights."""
        return self.folder / "trials" / f"{number:04d}"

    def apply(self, event: Event) -> None:
        """Take in the next event. Refused (RecordError, ConfigError), and nothing changed, when it may not follow."""
        name, kind = self.header.name, KINDS[type(event)]
        if isinstance(event, SearchResumed):
            self.resumes.append(event)
            self.finished = None
            for trial in self.trials.values():
                trial.driver = event if trial.status == "running" else trial.driver
            self.num_events += 1
            return
        _must(self.finished is None, name, f"nothing but a resume may follow the end of a search, got {kind!r}.")
        if isinstance(event, TrialStarted):
            run_id = f"{name}:{event.trial}"
            _must(event.trial not in self.trials, run_id, "a trial must start once, got a second start.")
            known = (event.origin, event.params, TrainConfig(**event.config), event.fingerprint, event.time)
            driver = self.resumes[-1] if self.resumes else self.header
            self.trials[event.trial] = TrialState(event.trial, run_id, *known, driver)
        elif isinstance(event, EpochReported | TrialRetried | TrialEnded):
            _must(event.trial in self.trials, name, f"trial {event.trial} must start first, got {kind!r}.")
            self.trials[event.trial].apply(event, self.num_events + 1)
            if isinstance(event, EpochReported) and event.score is not None:
                self.arrivals.setdefault(event.result.epoch, {})[event.trial] = event.score
        elif isinstance(event, SearchEnded):
            self.finished = event
        else:
            raise RecordError(f"{name}: a header must come once, got a second one.")
        self.num_events += 1


def _must(holds: bool, where: str, rule: str) -> None:
    if not holds:
        raise RecordError(f"{where}: {rule}")


@dataclass(eq=False)
class Record(AbstractContextManager["Record"]):
    """The one writer of a search's record, locked until `close`; `state` is always what replaying it would give."""

    file: FileIO
    state: SearchState

    @classmethod
    def create(cls, folder: Path, header: Header) -> Record:
        """Start a search in a folder that must not exist yet: of two processes that try, one gets a RecordError. The
        folder appears with the header in it: a kill at any moment leaves a search or none."""
        line, _ = encode_event(1, header)
        check_is_new(folder)
        storage = folder.parent.parent
        new = storage / f".new-{folder.name}-{os.getpid()}"
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
            (new / RECORD_FILE).write_bytes(line)
            _sync(new / RECORD_FILE)
            new.rename(folder)
            for changed in (folder, folder.parent, storage):
                _sync(changed)
        except OSError as exc:
            shutil.rmtree(new, ignore_errors=True)
            check_is_new(folder)
            raise RecordError(f"{folder}: a new folder must be writable here, got {exc.strerror!r}.") from exc
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Record:
        """Go on with a search. A torn last line is cut off the file, and `state.repaired` says so.

        RecordError when there is none, another driver holds it, or a line breaks a rule: the file stays as it is.
        """
        file = _open_file(folder, "r+b")
        try:
            _lock(file, folder)
            content = file.readall()
            state, size = _replay(folder, content)
            if size < len(content):
                state.repaired = (
                    f"{folder}: line {state.num_events + 1} was torn; {len(content) - size} bytes were cut."
                )
            file.seek(file.truncate(size))
            os.fsync(file.fileno())
            owner = {"pid": os.getpid(), "host": platform.node(), "since": utc_now()}
            (folder / OWNER_FILE).write_text(json.dumps(owner), encoding="utf-8")
        except BaseException as exc:
            file.close()
            if isinstance(exc, OSError):
                raise RecordError(f"{folder}: its record must be writable, got {exc.strerror!r}.") from exc
            raise
        return cls(file, state)

    def append(self, event: Event) -> None:
        """Let `state` check and take in the event, write it, sync it.

        An event that breaks a rule (RecordError, ConfigError) leaves no trace. When the disk does not take it or Ctrl-C
        falls into it, the record closes itself; `open` cuts what was written by half.
        """
        path = self.state.folder / RECORD_FILE
        _must(not self.file.closed, str(path), "the record must be open, got an event after its end.")
        line, event = encode_event(self.state.num_events + 1, event)
        try:
            self.state.apply(event)
            while line:
                line = line[self.file.write(line) :]
            os.fsync(self.file.fileno())
        except (RecordError, ConfigError):
            raise
        except BaseException as exc:
            self.close()
            self.state = read_state(path.parent)
            if isinstance(exc, OSError):
                raise RecordError(
                    f"{path}: an event must reach the disk, got {exc.strerror!r}. Make room, then --resume."
                ) from exc
            raise

    def close(self) -> None:
        """Give the search free for another process; closing twice is harmless."""
        self.file.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def is_live(folder: Path) -> bool:
    """True while a driver holds the search."""
    with _open_file(folder, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def read_state(folder: Path) -> SearchState:
    """A search as it stands, also while its driver writes: a torn last line is passed over, no file is changed."""
    with _open_file(folder, "rb") as file:
        return _replay(folder, file.readall())[0]


def check_name(name: str) -> str:
    """The name itself; RecordError unless it is fit to be a search's."""
    rule = f"it must be 1 to 64 of A-Z a-z 0-9 . _ - and start with a letter or digit, got {name!r}."
    _must(re.fullmatch(NAME, name) is not None, "a search's name", rule)
    return name


def check_is_new(folder: Path) -> None:
    """RecordError when a search's folder is there already."""
    try:
        is_taken = folder.exists()
    except OSError:  # it may not be looked at: creating it will tell
        is_taken = False
    _must(not is_taken, str(folder), "a search's name must be new, got one in use. Take another, or delete it.")


def find_storage(option: str | Path | None) -> Path:
    """The absolute folder of all searches: the option, else $TUNE_CIFAR_RUNS, else ./runs. It need not exist."""
    path = Path(option or os.environ.get("TUNE_CIFAR_RUNS") or "runs")
    with suppress(RuntimeError):  # ~ of a user who is not there: a folder of that name, then
        path = path.expanduser()
    return path.resolve()


def searches_folder(storage: Path) -> Path:
    return storage / "searches"


def search_folder(storage: Path, name: str) -> Path:
    """A search's own folder, existing or not, directly inside `searches_folder`."""
    return searches_folder(storage) / check_name(name)


def list_searches(storage: Path) -> list[Path]:
    """The folders of all searches, newest first. One whose header cannot be read comes last: its reader will tell."""

    def read_created(folder: Path) -> str:
        try:
            line, newline, _ = (folder / RECORD_FILE).read_bytes().partition(b"\n")
            return _replay(folder, line + newline)[0].header.created
        except (OSError, RecordError):
            return ""

    folders = [path.parent for path in searches_folder(storage).glob(f"*/{RECORD_FILE}")]
    return sorted(folders, key=lambda folder: (read_created(folder), folder.name), reverse=True)


def _open_file(folder: Path, mode: Literal["rb", "r+b"]) -> FileIO:
    try:
        return (folder / RECORD_FILE).open(mode, buffering=0)
    except OSError as exc:
        raise RecordError(f"{folder}: a search must be there, got {exc.strerror!r}.") from exc


def _sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(file: FileIO, folder: Path) -> None:
    """Hold the search for this process alone; RecordError with the owner's name when another process holds it."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            if time.monotonic() > deadline:
                who = _describe_owner(folder)
                raise RecordError(f"{folder}: one driver alone must hold it, got {who}. Wait, or stop it.") from exc
            time.sleep(0.05)


def _describe_owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since'][:19]} UTC"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _replay(folder: Path, content: bytes) -> tuple[SearchState, int]:
    """The state after all whole lines, and their size in bytes; whatever lies beyond is torn."""
    state: SearchState | None = None
    path, size = folder / RECORD_FILE, 0
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            event = decode_event(number, line)
            if event is None and number == len(lines) and not rest:
                break
            if event is None:
                raise RecordError(f"a line must be JSON that fits its CRC, got one that does not. {WAY_OUT}")
            if state is not None:
                state.apply(event)
            elif isinstance(event, Header) and event.name == folder.name:
                state = SearchState(folder, event)
            else:
                raise RecordError(f"a header of search {folder.name!r} must come first, got {event!r:.60}.")
        except (RecordError, ConfigError) as exc:
            raise RecordError(f"{path}:{number}: {exc}") from exc
        size += len(line) + 1
    if state is None:
        raise RecordError(f"{path}: a header must come first, got no whole line. Delete the folder: nothing ran.")
    return state, size
