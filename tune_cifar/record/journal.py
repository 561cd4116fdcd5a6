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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Literal

from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record.events import (
    NAME,
    WAY_OUT,
    Event,
    Header,
    decode_event,
    encode_event,
    utc_now,
)
from tune_cifar.record.files import sync
from tune_cifar.record.state import SearchState, require

RECORD_FILE = "record.jsonl"
OWNER_FILE = "owner.json"
# A look at a search (`is_live`) holds its lock for an instant; a driver that comes just then tries again so long.
LOCK_SECONDS = 1.0


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
            sync(new / RECORD_FILE)
            new.rename(folder)
            for changed in (folder, folder.parent, storage):
                sync(changed)
        except OSError as exc:
            shutil.rmtree(new, ignore_errors=True)
            check_is_new(folder)
            raise RecordError(
                f"{folder}: a new folder must be writable here, got {exc.strerror!r}."
            ) from exc
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
            state, size = replay(folder, content)
            if size < len(content):
                state.repaired = f"{folder}: line {state.num_events + 1} was torn; {len(content) - size} bytes were cut."
            file.seek(file.truncate(size))
            os.fsync(file.fileno())
            owner = {"pid": os.getpid(), "host": platform.node(), "since": utc_now()}
            (folder / OWNER_FILE).write_text(json.dumps(owner), encoding="utf-8")
        except BaseException as exc:
            file.close()
            if isinstance(exc, OSError):
                raise RecordError(
                    f"{folder}: its record must be writable, got {exc.strerror!r}."
                ) from exc
            raise
        return cls(file, state)

    def append(self, event: Event) -> None:
        """Let `state` check and take in the event, write it, sync it.

        An event that breaks a rule (RecordError, ConfigError) leaves no trace. When the disk does not take it or Ctrl-C
        falls into it, the record closes itself; `open` cuts what was written by half.
        """
        path = self.state.folder / RECORD_FILE
        require(
            not self.file.closed, str(path), "the record must be open, got an event after its end."
        )
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
        return replay(folder, file.readall())[0]


def check_name(name: str) -> str:
    """The name itself; RecordError unless it is fit to be a search's."""
    rule = (
        f"it must be 1 to 64 of A-Z a-z 0-9 . _ - and start with a letter or digit, got {name!r}."
    )
    require(re.fullmatch(NAME, name) is not None, "a search's name", rule)
    return name


def check_is_new(folder: Path) -> None:
    """RecordError when a search's folder is there already."""
    try:
        is_taken = folder.exists()
    except OSError:  # it may not be looked at: creating it will tell
        is_taken = False
    require(
        not is_taken,
        str(folder),
        "a search's name must be new, got one in use. Take another, or delete it.",
    )


def _open_file(folder: Path, mode: Literal["rb", "r+b"]) -> FileIO:
    try:
        return (folder / RECORD_FILE).open(mode, buffering=0)
    except OSError as exc:
        raise RecordError(f"{folder}: a search must be there, got {exc.strerror!r}.") from exc


def _lock(file: FileIO, folder: Path) -> None:
    """Hold the search for this process alone; RecordError with the owner's name when another process holds it."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            if time.monotonic() > deadline:
                who = _describe_owner(folder)
                raise RecordError(
                    f"{folder}: one driver alone must hold it, got {who}. Wait, or stop it."
                ) from exc
            time.sleep(0.05)


def _describe_owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since'][:19]} UTC"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def replay(folder: Path, content: bytes) -> tuple[SearchState, int]:
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
                raise RecordError(
                    f"a line must be JSON that fits its CRC, got one that does not. {WAY_OUT}"
                )
            if state is not None:
                state.apply(event)
            elif isinstance(event, Header) and event.name == folder.name:
                state = SearchState(folder, event)
            else:
                raise RecordError(
                    f"a header of search {folder.name!r} must come first, got {event!r:.60}."
                )
        except (RecordError, ConfigError) as exc:
            raise RecordError(f"{path}:{number}: {exc}") from exc
        size += len(line) + 1
    if state is None:
        raise RecordError(
            f"{path}: a header must come first, got no whole line. Delete the folder: nothing ran."
        )
    return state, size
