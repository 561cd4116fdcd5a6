"""The durable record of a search: lock it, append to it, replay it.

One file per search, `<storage>/searches/<name>/record.jsonl`, one line per event (events.py). Only
the search's driver writes it. `append` returns after fsync. So a torn last line (no newline, not
JSON, or its CRC does not fit) was never acknowledged: opening the record cuts it off and says so.
Any other damaged line is refused.
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
from dataclasses import dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Literal
from uuid import uuid4

from tune_cifar.errors import ConfigError, NameTakenError, RecordError, RenamedError
from tune_cifar.record.events import (
    NAME,
    REPAIR_HINT,
    Event,
    Header,
    decode_event,
    encode_event,
    utc_now,
)
from tune_cifar.record.files import (
    describe_lock_problem,
    find_lock_problem,
    number_names,
    sync,
)
from tune_cifar.record.state import SearchState, require

RECORD_FILE = "record.jsonl"
OWNER_FILE = "owner.json"
# How long `Record.open` waits for the lock: `is_live` holds it for an instant.
LOCK_SECONDS = 1.0
# Where locks do not work, a driver on another host that wrote nothing for so long counts as dead.
# It writes with every epoch.
SILENT_SECONDS = 3600.0


@dataclass(eq=False)
class Record(AbstractContextManager["Record"]):
    """The writer of a search's record, which it locks until `close`.

    `state` is always what replaying the file would give.
    """

    file: FileIO
    state: SearchState

    @classmethod
    def create(cls, folder: Path, header: Header) -> Record:
        """Create a search's folder with a record that has the header, and open it.

        The folder appears with the header in it: a kill at any moment leaves a search or none. Of
        two processes that create the same search one gets the error.

        Raises:
            NameTakenError: when the folder exists already.
            RecordError: when it cannot be created, or its file system has no locks.
        """
        line, _ = encode_event(1, header)
        check_is_new(folder)
        storage = folder.parent.parent
        new = storage / f".new-{folder.name}-{uuid4().hex[:8]}"
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if problem := find_lock_problem(folder.parent):
                raise RecordError(_describe_lockless(folder, problem))
            new.mkdir()
            (new / RECORD_FILE).write_bytes(line)
            sync(new / RECORD_FILE)
            new.rename(folder)
            for changed in (folder, folder.parent, storage):
                sync(changed)
        except OSError as exc:
            shutil.rmtree(new, ignore_errors=True)
            check_is_new(folder)
            raise RecordError(f"{folder}: cannot create the search: {exc.strerror}.") from exc
        return cls.open(folder)

    @classmethod
    def create_numbered(cls, folder: Path, header: Header) -> Record:
        """Create as `create` does, under a name that nobody chose: a number is added if need be.

        Of processes that take one name at once each gets a record, the second NAME-2.
        """
        names = number_names(folder.name)
        while True:
            name = next(names)
            with suppress(NameTakenError):
                named = header.model_copy(update={"name": name})
                return cls.create(folder.with_name(name), named)

    @classmethod
    def open(cls, folder: Path) -> Record:
        """Open an existing search to append to it.

        A torn last line is cut off the file, and `state.repaired` says so.

        Raises:
            RecordError: when there is no record, another process holds it, it cannot be written,
                or a line breaks a rule. The file stays as it is.
        """
        file = _open_file(folder, "r+b")
        try:
            _lock(file, folder)
            content = file.readall()
            state, size = replay(folder, content)
            if size < len(content):
                torn = f"line {state.num_events + 1} was torn"
                state.repaired = f"{folder}: {torn}; {len(content) - size} bytes were cut."
            file.seek(file.truncate(size))
            os.fsync(file.fileno())
            owner = {"pid": os.getpid(), "host": platform.node(), "since": utc_now()}
            (folder / OWNER_FILE).write_text(json.dumps(owner), encoding="utf-8")
        except BaseException as exc:
            file.close()
            if isinstance(exc, OSError):
                raise RecordError(f"{folder}: cannot write its record: {exc.strerror}.") from exc
            raise
        return cls(file, state)

    def append(self, event: Event) -> None:
        """Apply the event to `state`, write it and sync it.

        The record closes itself when the event cannot be written or Ctrl-C interrupts the write;
        `open` then cuts off what was half written.

        Raises:
            RecordError: when the event may not come next, which leaves no trace; when the record
                is closed or the event cannot be written.
            ConfigError: when a trial's config breaks a rule, which leaves no trace.
        """
        path = self.state.folder / RECORD_FILE
        require(not self.file.closed, str(path), "the record is closed: no event may follow.")
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
                problem = f"{path}: cannot write the event: {exc.strerror}"
                raise RecordError(f"{problem}. Make room, then give `resume=True`.") from exc
            raise

    def close(self) -> None:
        """Release the search for other processes. Closing twice does nothing more."""
        if not self.file.closed:
            with suppress(OSError):
                (self.state.folder / OWNER_FILE).unlink()
        self.file.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def is_live(folder: Path) -> bool:
    """Return whether a driver holds the search.

    Raises:
        RecordError: when there is no record.
    """
    with _open_file(folder, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return _has_owner(folder)
    return False


def read_state(folder: Path) -> SearchState:
    """Read a search's state, also while its driver writes. A torn last line is left out.

    Raises:
        RecordError: when there is no record, or a line is damaged or breaks a rule.
    """
    with _open_file(folder, "rb") as file:
        return replay(folder, file.readall())[0]


def check_name(name: str) -> str:
    """Return the name; raise a RecordError unless it is fit for a search."""
    if re.fullmatch(NAME, name) is None:
        rule = "must have 1 to 64 of A-Z a-z 0-9 . _ - and start with a letter or digit"
        raise RecordError(f"a search's name {rule}, got {name!r}.")
    return name


def check_is_new(folder: Path) -> None:
    """Raise a NameTakenError when the search's folder exists already."""
    if is_taken(folder):
        rule = "a search of this name exists already. Choose another name, or delete the search."
        raise NameTakenError(f"{folder}: {rule}")


def is_taken(folder: Path) -> bool:
    """Return whether the search's folder exists already."""
    try:
        return folder.exists()
    except OSError:  # creating the folder will report it
        return False


def _open_file(folder: Path, mode: Literal["rb", "r+b"]) -> FileIO:
    try:
        return (folder / RECORD_FILE).open(mode, buffering=0)
    except OSError as exc:
        raise RecordError(f"{folder}: cannot open its record: {exc.strerror}.") from exc


def _lock(file: FileIO, folder: Path) -> None:
    """Lock the search for this process; raise a RecordError with the owner when it is in use."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            if time.monotonic() > deadline:
                owner = _describe_owner(folder)
                raise RecordError(f"{folder}: in use by {owner}. Wait, or stop it.") from exc
            time.sleep(0.05)
        except OSError as exc:
            if _has_owner(folder):
                owner = _describe_owner(folder)
                raise RecordError(f"{folder}: in use by {owner}. Wait, or stop it.") from exc
            raise RecordError(_describe_lockless(folder, describe_lock_problem(exc))) from exc


def _describe_lockless(folder: Path, problem: str) -> str:
    """Return why a search is not recorded here: two drivers could write into one record."""
    return f"{folder}: {problem}. Give a folder elsewhere as `storage`."


def _has_owner(folder: Path) -> bool:
    """Return whether a driver seems to hold the search, where no lock can tell.

    It may hold a lock through another mount of the file system. A process of this host is looked
    up. One of another host counts until it has been silent for SILENT_SECONDS.
    """
    import psutil

    try:
        owner = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
        pid, since = int(owner["pid"]), datetime.fromisoformat(owner["since"]).timestamp()
        if owner["host"] == platform.node():
            # A process that started later has taken the number of one that died.
            return bool(psutil.Process(pid).create_time() <= since)
        return time.time() - (folder / RECORD_FILE).stat().st_mtime < SILENT_SECONDS
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return False


def _describe_owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since'][:19]} UTC"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def replay(folder: Path, content: bytes) -> tuple[SearchState, int]:
    """Return the state after all complete lines, and their size in bytes. What follows is torn.

    Raises:
        RecordError: when a line is damaged, other than the last, or breaks a rule.
    """
    state: SearchState | None = None
    path, size = folder / RECORD_FILE, 0
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            event = decode_event(number, line)
            if event is None and number == len(lines) and not rest:
                break
            if event is None:
                raise RecordError(f"damaged line, not JSON that fits its CRC. {REPAIR_HINT}")
            if state is not None:
                state.apply(event)
            elif isinstance(event, Header):
                _check_folder_name(folder, event.name)
                state = SearchState(folder, event)
            else:
                rule = f"the header of search {folder.name!r} must come first"
                raise RecordError(f"{rule}, got {event!r:.60}.")
        except RenamedError:
            raise
        except (RecordError, ConfigError) as exc:
            raise RecordError(f"{path}:{number}: {exc}") from exc
        size += len(line) + 1
    if state is None:
        raise RecordError(f"{path}: not even a complete header. Delete the folder: nothing ran.")
    return state, size


def _check_folder_name(folder: Path, name: str) -> None:
    """Raise a RenamedError unless the folder has the search's name, with what to do about it."""
    if folder.name == name:
        return
    if (folder.with_name(name) / RECORD_FILE).exists():
        rule = f"a copy of search {name}, which is beside it; a run id must name one search"
        way_out = f"Delete the copy, or move it into another run store as {name}."
    else:
        rule = f"search {name} in a renamed folder; run ids, MLflow and reports have that name"
        way_out = f"Rename the folder back to {name}."
    raise RenamedError(f"{folder}: {rule}. {way_out}")
