"""A copy of a search elsewhere, kept up to date while it runs: a folder or an object store.

URL/NAME has the same files as the search's folder: record, newest checkpoints, kept weights and
tracebacks. A trial's files are copied before the record that names them, so that what is restored
can always be resumed. Nothing of another search of the same name is overwritten.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tune_cifar.errors import ConfigError, RecordError, hide_credentials
from tune_cifar.record.files import CHECKPOINTS, ERROR, WEIGHTS, look_at
from tune_cifar.record.journal import RECORD_FILE, check_name
from tune_cifar.record.store import repeat_storage, search_folder

logger = logging.getLogger(__name__)

# Between two looks at what is new; after failures in a row the wait doubles up to the longest.
EVERY_SECONDS, LONGEST_SECONDS = 10.0, 300.0
# How long a new search waits for the answer whether its name is free there.
LOOK_SECONDS = 10.0
# In the order in which they are copied: the last checkpoint says that the weights are there.
COPIED = (f"trials/*/{ERROR}", f"trials/*/{WEIGHTS}", f"trials/*/{CHECKPOINTS}/*.pt")


class Mirror:
    """Copies one search's folder to a URL from a thread of its own. A context manager.

    What cannot be copied is tried again, each time with a new connection and so with fresh
    credentials. A mirror that cannot be reached hurts nothing.

    Args:
        url: of the mirror: file://, s3://, gs:// or another that fsspec knows.
        end_seconds: how long the end waits for the last copy; it may be changed until then.
    """

    def __init__(self, folder: Path, url: str, end_seconds: float = 120.0) -> None:
        self.end_seconds = end_seconds
        self._folder = folder
        self._url = url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._copied: dict[str, tuple[int, int]] | None = None
        self._problem: str | None = None

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join(self.end_seconds)

    @property
    def fault(self) -> str | None:
        """Why the mirror is not complete, as a sentence; None when it is."""
        if self._thread.is_alive():
            self._problem = f"no end of the copy in {self.end_seconds:.0f} s"
        if self._problem is None:
            return None
        url, storage = _hide(self._url), repeat_storage(self._folder.parents[1])
        words = f"searches mirror {self._folder.name} {url}{storage}"
        hint = f"Complete it: python -m tune_cifar {words}"
        return f"{url}: the mirror is not complete: {self._problem}. {hint}"

    def _run(self) -> None:
        wait = EVERY_SECONDS
        while True:
            is_last = self._is_over.wait(wait)
            end = time.monotonic() + self.end_seconds
            while not self._copy_new() and is_last and time.monotonic() + 5 < end:
                time.sleep(5)
            if is_last:
                return
            wait = EVERY_SECONDS if self._problem is None else min(2 * wait, LONGEST_SECONDS)

    def _copy_new(self) -> bool:
        """Copy what is new; return whether everything is there."""
        try:
            self._copied = _copy(self._folder, self._url, self._copied)
            self._problem = None
        except Exception as exc:  # each kind of store raises its own
            self._problem = _shorten(exc)
            self._copied = None  # ask what is there
        return self._problem is None


def copy_search(folder: Path, url: str) -> int:
    """Copy a search's folder to URL/NAME, or complete it there; return the number of its files.

    Raises:
        RecordError: another search of this name is there, or it cannot be written.
    """
    try:
        return len(_copy(folder, url, None))
    except Exception as exc:  # each kind of store raises its own
        problem = f"{folder.name} cannot be copied: {_shorten(exc).rstrip('.')}"
        raise RecordError(f"{_hide(url)}: {problem}.") from exc


def _copy(
    folder: Path, url: str, copied: dict[str, tuple[int, int]] | None
) -> dict[str, tuple[int, int]]:
    """Copy what is new in a search's folder to URL/NAME; delete there what is gone here.

    Args:
        copied: what an earlier call returned; None asks what is there.

    Returns:
        modification time and size of every file that is there now, by name.

    Raises:
        RecordError: another search of this name is there.
        Exception: as the store's driver does.
    """
    store, root = _open(url, folder.name)
    # Read before the trials' files are listed, and written after them. What is appended between the
    # look and the reading is copied again.
    record_look = look_at(folder / RECORD_FILE)
    record = (folder / RECORD_FILE).read_bytes()
    if copied is None:
        before = _list_remote(store, root)
        if RECORD_FILE in before:
            _check_is_same(store.cat_file(f"{root}/{RECORD_FILE}"), record, folder.name)
    else:
        before = copied
    looks: dict[str, tuple[int, int]] = {}
    paths = _list_files(folder)
    for path in paths:
        name = path.relative_to(folder).as_posix()
        with suppress(FileNotFoundError):  # an old checkpoint, deleted meanwhile
            look = look_at(path)
            if copied is None or copied.get(name) != look:
                _put(store, path.read_bytes(), f"{root}/{name}")
            looks[name] = look
    is_settled = len(looks) == len(paths)
    looks[RECORD_FILE] = record_look
    if copied is None or copied.get(RECORD_FILE) != record_look:
        _put(store, record, f"{root}/{RECORD_FILE}")
    for name in before.keys() - looks.keys():
        if is_settled:
            store.rm_file(f"{root}/{name}")
        else:  # what has taken its place is not there yet
            looks[name] = before[name]
    return looks


def _list_files(folder: Path) -> list[Path]:
    """Return what is copied beside the record.

    They are listed in the opposite order, so that no checkpoint comes without its weights.
    """
    found = [sorted(folder.glob(pattern)) for pattern in reversed(COPIED)]
    return [path for paths in reversed(found) for path in paths]


def _check_is_same(there: bytes, here: bytes, name: str) -> None:
    """Refuse to overwrite the record of another search: their first lines differ."""
    if there.partition(b"\n")[0] != here.partition(b"\n")[0]:
        raise RecordError(f"another search named {name} is there, which is left as it is")


def _put(store: Any, content: bytes, path: str) -> None:
    """Write a file as a whole or not at all; an object store does so by itself."""
    if "file" in store.protocol:
        store.makedirs(path.rpartition("/")[0], exist_ok=True)
        store.pipe_file(f"{path}.part", content)
        store.mv(f"{path}.part", path)
    else:
        store.pipe_file(path, content)


def _list_remote(store: Any, root: str) -> dict[str, tuple[int, int]]:
    try:
        paths = store.find(root)
    except FileNotFoundError:
        return {}
    prefix = str(store._strip_protocol(root)).rstrip("/") + "/"
    names = [str(path).removeprefix(prefix) for path in paths]
    return {name: (0, 0) for name in names if not name.endswith(".part")}


def list_mirrored(url: str) -> list[str]:
    """Return the names of the searches at a URL.

    Raises:
        RecordError: it cannot be read.
    """
    try:
        store, root = _open(url, "")
        found = store.glob(f"{root.rstrip('/')}/*/{RECORD_FILE}")
    except Exception as exc:  # each kind of store raises its own
        raise RecordError(_describe(url, exc)) from exc
    return sorted(str(path).split("/")[-2] for path in found)


def restore_search(url: str, name: str, storage: Path) -> Path:
    """Bring a search back from a mirror into a run store; return its folder.

    Raises:
        RecordError: there is none of the name, one is here already, or it cannot be read.
    """
    folder = search_folder(storage, check_name(name))
    if folder.exists():
        raise RecordError(f"{folder}: a search of this name is here already. Delete or rename it.")
    part = storage / f".new-{name}"
    shutil.rmtree(part, ignore_errors=True)  # of a restore that was killed
    try:
        store, root = _open(url, name)
        names = _list_remote(store, root)
        for each in names:
            path = part / each
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.cat_file(f"{root}/{each}"))
    except Exception as exc:  # each kind of store raises its own
        shutil.rmtree(part, ignore_errors=True)
        raise RecordError(_describe(url, exc)) from exc
    if RECORD_FILE not in names:
        shutil.rmtree(part, ignore_errors=True)
        known = ", ".join(list_mirrored(url)) or "none"
        raise RecordError(f"{_hide(url)}: no search named {name!r} is there. Known: {known}.")
    folder.parent.mkdir(exist_ok=True)
    part.rename(folder)
    return folder


def check_is_free(url: str, name: str, storage: Path) -> None:
    """Refuse the name of a search that a mirror has; if it does not answer, nothing is refused.

    Args:
        storage: the run store of the new search.

    Raises:
        ConfigError: with the command that brings that search back.
    """
    found: list[bool] = []

    def look() -> None:
        with suppress(Exception):  # each kind of store raises its own
            store, root = _open(url, name)
            found.append(store.exists(f"{root}/{RECORD_FILE}"))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(LOOK_SECONDS)
    if found == [True]:
        rule = "`mirror` must have no search of the new one's name"
        words = f"searches restore {_hide(url)} {name}{repeat_storage(storage)}"
        hint = f"Bring it back: python -m tune_cifar {words}"
        raise ConfigError(f"{rule}, got {name}. {hint} (then --continue), or choose another name.")


def check_mirror(url: str) -> None:
    """Refuse a URL of a kind that is not known, or whose driver is not installed.

    Raises:
        ConfigError: with what to install.
    """
    try:
        _open(url, "x")
    except ImportError as exc:
        kind = url.partition("://")[0]
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(kind)
        hint = f"python -m pip install {package}" if package else str(exc)
        raise ConfigError(f"`mirror`: {kind}:// needs a package that is missing: {hint}.") from exc
    except ValueError as exc:
        rule = "`mirror` must be a URL such as s3://BUCKET/FOLDER or file:///FOLDER"
        raise ConfigError(f"{rule}, got {_hide(url)!r}.") from exc


def _open(url: str, name: str) -> tuple[Any, str]:
    """Return a new connection to the store of a URL, and the path of a search in it."""
    import fsspec

    if "://" not in url:
        raise ValueError("no protocol")
    # It logs what it raises, with a traceback for each attempt.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    store, path = fsspec.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    return store, f"{str(path).rstrip('/')}/{name}".rstrip("/")


def _describe(url: str, exc: Exception) -> str:
    return f"{_hide(url)}: the mirror cannot be read: {_shorten(exc).rstrip('.')}."


def _shorten(exc: Exception) -> str:
    return hide_credentials(str(exc) or type(exc).__name__)[:300]


def _hide(url: str) -> str:
    return hide_credentials(url)
