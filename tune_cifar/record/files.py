"""Files and folders that survive a crash and other processes: whole, of free names, locked."""

from __future__ import annotations

import fcntl
import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Names in a trial's folder.
CHECKPOINTS = "checkpoints"
WEIGHTS = "weights.safetensors"
ERROR = "error.txt"


def trial_folder(search_folder: Path, number: int) -> Path:
    """Return a trial's own folder in its search's."""
    return search_folder / "trials" / f"{number:04d}"


def stop_file(search_folder: Path) -> Path:
    """Return the file that, while it exists, ends every training of the search after its epoch."""
    return search_folder / "stopping"


def number_names(name: str) -> Iterator[str]:
    """Yield a name that nobody chose, then what to take where it is taken: NAME-2, NAME-3 ..."""
    yield name
    for number in itertools.count(2):
        yield f"{name}-{number}"


def make_folder(folder: Path) -> Path:
    """Make a folder that did not exist, of this name or the first free one of `number_names`.

    Two processes at once get two folders.

    Raises:
        OSError: when it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    names = number_names(folder.name)
    while True:
        made = folder.with_name(next(names))
        with suppress(FileExistsError):
            made.mkdir()
            return made


def find_lock_problem(folder: Path) -> str | None:
    """Return why no file in an existing folder can be locked, None when it can.

    NFS without its lock service, Lustre mounted without `flock` and some FUSE have no locks. A
    folder that takes no file is not this function's to report.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                return describe_lock_problem(exc)
    except OSError:
        pass
    return None


def describe_lock_problem(exc: OSError) -> str:
    """Return the rule that a file system without locks breaks, and what it answered."""
    return f"the file system must have locks (flock), got {exc.strerror!r}"


def look_at(path: Path) -> tuple[int, int]:
    """Return a file's modification time and size, which tell whether it has changed."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old file or the new one.

    Raises:
        OSError: when it cannot be written. The old file stays.
    """
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
