"""A search's durable record: the one truth of which sampler, rungs, leaderboard, report and MLflow are views.

One file per search, `<storage>/searches/<name>/record.jsonl`, one line per event, appended and synced by the driver:

    {"seq": 3, "crc": "51f2c0de", "kind": "epoch", "body": {"trial": 0, "result": {...}}}

`seq` is the number of the line, `crc` the CRC-32 of the canonical JSON (sorted keys, no spaces) of body, kind and seq.
Floats come back bit for bit; NaN is refused. An append returns after fsync: a torn last line (no newline, not JSON or
not fitting its CRC) was never acknowledged, so opening cuts it and says so. Any other bad line is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from tune_cifar import schema
from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.schema import DataInfo, EpochResult, Frozen, Numerics, Status, TrainConfig

RECORD_FILE = "record.jsonl"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # no separator, no leading dot: joined to a folder, it stays inside
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00"  # UTC by isoformat: such texts sort as times do
# Relative to the search's folder and inside it: no segment is empty or starts with a dot.
FileText = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$")]
Origin = Literal["baseline", "point", "sampler", "train"]
EndStatus = Literal["complete", "stopped", "diverged", "failed"]
WAY_OUT = "Restore the file from a copy, or keep only the lines before this one."
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class Header(Frozen):
    """The first event. `baseline` is a TrainConfig as JSON, `distributions` Optuna's JSON per searched knob, `pinned`
    the knobs fixed on the command line, `seed` the sampler's, `space_text` the whole space file."""

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    kind: Literal["search", "train"]
    space: str
    tier: str | None
    created: Annotated[str, Field(pattern=f"^{TIME}$")]
    seed: int
    baseline: dict[str, Any]
    distributions: dict[str, str]
    budget: dict[str, Any]
    pinned: dict[str, Any]
    space_text: str
    data: DataInfo
    numerics: Numerics
    environment: dict[str, str]
    command: str


class TrialStarted(Frozen):
    """A trial got its number: `params` are the searched knobs only, `config` is its whole TrainConfig as JSON."""

    trial: Annotated[int, Field(ge=0)]
    origin: Origin
    params: dict[str, Any]
    config: dict[str, Any]
    fingerprint: str


class EpochReported(Frozen):
    """A trial finished an epoch."""

    trial: int
    result: EpochResult


class TrialEnded(Frozen):
    """A trial will report no more. `score` is the last val_acc if complete, chance (0.1) if diverged, else None."""

    trial: int
    status: EndStatus
    score: float | None = None
    reason: str
    error_file: FileText | None = None
    weights_file: FileText | None = None


class SearchEnded(Frozen):
    """Nothing follows."""

    reason: str
    wall_seconds: float


Event = Header | TrialStarted | EpochReported | TrialEnded | SearchEnded
KINDS: dict[type[Event], str] = dict(zip(get_args(Event), ("header", "trial", "epoch", "end", "finish"), strict=True))
EVENTS = {kind: event for event, kind in KINDS.items()}


@dataclass
class TrialState:
    """One trial as its events tell it. `ended_seq` is the sequence number of its end: it orders the ends."""

    number: int
    run_id: str
    origin: Origin
    params: dict[str, Any]
    config: TrainConfig
    fingerprint: str
    epochs: list[EpochResult] = field(default_factory=list)
    """Epoch n stands at index n - 1: none is missing."""
    status: Status = "running"
    score: float | None = None
    reason: str = ""
    error_file: str | None = None
    weights_file: str | None = None
    ended_seq: int | None = None

    @property
    def epochs_done(self) -> int:
        return len(self.epochs)

    @property
    def val_acc(self) -> float | None:
        """Of the last reported epoch; None before the first and without validation images."""
        return self.epochs[-1].val_acc if self.epochs else None

    def apply(self, event: EpochReported | TrialEnded, seq: int) -> None:
        """The part of SearchState.apply that changes a trial."""
        done, last, kind = self.epochs_done, self.config.epochs, KINDS[type(event)]
        _must(self.status == "running", self.run_id, f"a {self.status} trial must tell no more, got {kind!r}.")
        if isinstance(event, EpochReported):
            rule = f"epoch {done + 1} of {last} must come next, got epoch {event.result.epoch}."
            _must(event.result.epoch == done + 1 <= last, self.run_id, rule)
            self.epochs.append(event.result)
            return
        _must(done == last or event.status != "complete", self.run_id, f"complete must mean {last} epochs, got {done}.")
        score = {"complete": self.val_acc, "diverged": schema.CHANCE_ACCURACY}.get(event.status)
        _must(event.score == score, self.run_id, f"a {event.status} trial's score must be {score}, got {event.score}.")
        self.status, self.score, self.reason, self.ended_seq = event.status, score, event.reason, seq
        self.error_file, self.weights_file = event.error_file, event.weights_file


@dataclass
class SearchState:
    """Everything the events of a record say; views read it, only `apply` changes it. Trials by number, in the order of
    their starts; `repaired` tells what `Record.open` cut off; `num_events` is the last event's sequence number."""

    folder: Path
    header: Header
    trials: dict[int, TrialState] = field(default_factory=dict)
    finished: SearchEnded | None = None
    repaired: str | None = None
    num_events: int = 1

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

    def rung_scores(self, rungs: list[int] | tuple[int, ...]) -> dict[int, dict[int, float]]:
        """Per rung (an epoch), val_acc there of every trial that reported it, whatever became of the trial."""
        scores: dict[int, dict[int, float]] = {}
        for rung in rungs:
            there = {t.number: t.epochs[rung - 1].val_acc for t in self.trials.values() if t.epochs_done >= rung}
            scores[rung] = {number: val_acc for number, val_acc in there.items() if val_acc is not None}
        return scores

    def trial_folder(self, number: int) -> Path:
        """A trial's own folder, existing or not: checkpoints, error, weights."""
        return self.folder / "trials" / f"{number:04d}"

    def apply(self, event: Event) -> None:
        """Take in the next event. Refused (RecordError, ConfigError), and nothing changed, when it may not follow."""
        name, kind = self.header.name, KINDS[type(event)]
        _must(self.finished is None, name, f"nothing may follow the end of a search, got {kind!r}.")
        if isinstance(event, TrialStarted):
            run_id = f"{name}:{event.trial}"
            _must(event.trial not in self.trials, run_id, "a trial must start once, got a second start.")
            known = (run_id, event.origin, event.params, TrainConfig(**event.config), event.fingerprint)
            self.trials[event.trial] = TrialState(event.trial, *known)
        elif isinstance(event, EpochReported | TrialEnded):
            _must(event.trial in self.trials, name, f"trial {event.trial} must start first, got {kind!r}.")
            self.trials[event.trial].apply(event, self.num_events + 1)
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
        """Start a search in a folder that must not exist yet: of two processes that try, one gets a RecordError."""
        line, _ = _encode(1, header)
        check_is_new(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            (folder / RECORD_FILE).write_bytes(line)
            for changed in (folder, folder.parent, folder.parent.parent):
                handle = os.open(changed, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
        except OSError as exc:
            raise RecordError(f"{folder}: a new folder must be writable here, got {exc.strerror!r}.") from exc
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Record:
        """Go on with a search. A torn last line is cut off the file, and `state.repaired` says so.

        RecordError when there is none, another driver holds it, or a line breaks a rule: the file stays as it is.
        """
        file = _open_file(folder, "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = file.readall()
            state, size = _replay(folder, content)
            if size < len(content):
                state.repaired = (
                    f"{folder}: line {state.num_events + 1} was torn; {len(content) - size} bytes were cut."
                )
            file.seek(file.truncate(size))
            os.fsync(file.fileno())
        except BaseException as exc:
            file.close()
            if isinstance(exc, OSError):
                raise RecordError(f"{folder}: one driver alone must hold it, got {exc.strerror!r}. Wait.") from exc
            raise
        return cls(file, state)

    def append(self, event: Event) -> None:
        """Let `state` check and take in the event, write it, sync it.

        An event that breaks a rule (RecordError, ConfigError) leaves no trace. When the disk does not take it or Ctrl-C
        falls into it, the record closes itself; `open` cuts what was written by half.
        """
        path = self.state.folder / RECORD_FILE
        _must(not self.file.closed, str(path), "the record must be open, got an event after its end.")
        line, event = _encode(self.state.num_events + 1, event)
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
                raise RecordError(f"{path}: an event must reach the disk, got {exc.strerror!r}. Make room.") from exc
            raise

    def close(self) -> None:
        """Give the search free for another process; closing twice is harmless."""
        self.file.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


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
    _must(not folder.exists(), str(folder), "a search's name must be new, got one in use. Take another, or delete it.")


def find_storage(option: str | Path | None) -> Path:
    """The absolute folder of all searches: the option, else $TUNE_CIFAR_RUNS, else ./runs. It need not exist."""
    return Path(option or os.environ.get("TUNE_CIFAR_RUNS") or "runs").expanduser().resolve()


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


def _compute_crc(seq: int, kind: str, body: Any) -> str:
    return f"{zlib.crc32(CANONICAL.encode({'body': body, 'kind': kind, 'seq': seq}).encode()):08x}"


def _encode(seq: int, event: Event) -> tuple[bytes, Event]:
    """The event's line, and the event as that line will be read back (a tuple in it comes back as a list)."""
    kind = KINDS[type(event)]
    try:
        body = json.loads(json.dumps(event.model_dump(), allow_nan=False))
        line = {"seq": seq, "crc": _compute_crc(seq, kind, body), "kind": kind, "body": body}
        return json.dumps(line, ensure_ascii=False).encode() + b"\n", EVENTS[kind].model_validate(body)
    except (TypeError, ValueError) as exc:
        raise RecordError(f"event {kind!r}: it must be JSON of finite numbers, got one that is not ({exc}).") from exc


def _decode(number: int, line: bytes) -> Event | None:
    """The event of a line; None when the line is damaged, RecordError when it is whole and breaks a rule."""
    try:
        fields = json.loads(line.decode())
        seq, kind, body = fields["seq"], fields["kind"], fields["body"]
        if fields["crc"] != _compute_crc(seq, kind, body):
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    newer = "A newer tune_cifar may have written it: upgrade."
    _must(seq == number, "event", f"seq must be {number}, got {seq}. {WAY_OUT}")
    _must(kind in EVENTS, "event", f"kind must be one of {', '.join(EVENTS)}, got {kind!r}. {newer}")
    try:
        return EVENTS[kind].model_validate(body)
    except ValidationError as exc:
        raise RecordError(f"event {kind!r}: {schema.describe_validation_error(exc, EVENTS[kind])} {newer}") from exc


def _replay(folder: Path, content: bytes) -> tuple[SearchState, int]:
    """The state after all whole lines, and their size in bytes; whatever lies beyond is torn."""
    state: SearchState | None = None
    path, size = folder / RECORD_FILE, 0
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            event = _decode(number, line)
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
