"""The files of trials on a cluster: written by an actor on the driver's node, or by the workers.

A worker that sees the run store writes into it, as on one machine. Any other keeps its trial's
folder on a disk of its own; before it reports an epoch, it uploads what is new to the actor. There
an attempt that has been superseded by a newer one can change nothing; in the run store itself it
ends after its epoch.

The actor imports no torch.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tune_cifar.errors import ConfigError, DiskFullError
from tune_cifar.record.files import (
    CHECKPOINTS,
    WEIGHTS,
    look_at,
    stop_file,
    trial_folder,
    write_atomically,
)

# In the search's folder while it runs on a cluster: who can read it there sees the run store.
NONCE_FILE = ".seen"
# In the search's folder: what older attempts wanted to change.
REFUSED_FILE = "refused.txt"
# In a trial's folder: the nonce of the launch, and the number of its newest attempt that sees it.
ATTEMPT_FILE = "attempt"
ACTOR = "file server"
# A checkpoint's name in a trial's folder.
CHECKPOINT = re.compile(rf"{CHECKPOINTS}/checkpoint-\d{{4}}\.pt")
SCRATCH_PREFIX, LOCK_FILE = "tune_cifar-trial-", ".lock"
ACCESS_RULE = "the cluster and this process must have the same RAY_AUTH_MODE and RAY_AUTH_TOKEN"


class SupersededError(Exception):
    """A newer attempt of the trial has begun, or nobody can tell."""


class FileServer:
    """Reads and writes the files of one search for workers that do not see them. A Ray actor.

    Args:
        folder: the search's.
        data: what `get_data` returns: an object reference in a list, or None.
        nonce: of this launch of the search.
    """

    def __init__(self, folder: str, data: list[Any] | None, nonce: str = "") -> None:
        self._folder = Path(folder)
        self._nonce = nonce
        self._data = data
        self._attempts: dict[int, int] = {}
        self._lock = threading.Lock()

    def get_data(self) -> list[Any] | None:
        """Return the reference to the images, for a node that has none of its own."""
        return self._data

    def fetch(self, trial: int, attempt: int) -> dict[str, bytes] | None:
        """Begin an attempt; return the trial's checkpoints by name, None if a newer one has begun.

        From now on older attempts are refused.
        """
        with self._lock:
            if self._is_superseded(trial, attempt):
                return None
            self._attempts[trial] = attempt
            folder = trial_folder(self._folder, trial)
            paths = _list_checkpoints(folder)
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def put(self, trial: int, attempt: int, name: str, content: bytes) -> str:
        """Write a file of a trial; return what prevented it: `superseded`, the system's words, or
        nothing.
        """
        if not (name == WEIGHTS or CHECKPOINT.fullmatch(name)):
            raise ValueError(f"a trial has no file {name!r}")
        with self._lock:
            if self._is_superseded(trial, attempt):
                return "superseded"
            try:
                write_atomically(trial_folder(self._folder, trial) / name, content)
            except OSError as exc:
                return str(exc.strerror)
            return ""

    def keep(self, trial: int, attempt: int, names: list[str]) -> bool | None:
        """Delete the checkpoints that an attempt no longer has; return whether the search stops.

        None when a newer attempt has begun.
        """
        with self._lock:
            if self._is_superseded(trial, attempt):
                return None
            folder = trial_folder(self._folder, trial)
            for path in _list_checkpoints(folder):
                if path.relative_to(folder).as_posix() not in names:
                    path.unlink(missing_ok=True)
        return stop_file(self._folder).exists()

    def _is_superseded(self, trial: int, attempt: int) -> bool:
        """Return whether a newer attempt has begun; note in REFUSED_FILE that this one came."""
        seen = _read_attempt(trial_folder(self._folder, trial), self._nonce)
        newest = max(self._attempts.get(trial, attempt), seen or 0)
        if attempt >= newest:
            return False
        with (self._folder / REFUSED_FILE).open("a", encoding="utf-8") as file:
            file.write(f"trial {trial}: attempt {attempt} came after attempt {newest}\n")
        return True


def _read_attempt(folder: Path, nonce: str) -> int | None:
    """Return the newest attempt of this launch that trains in the run store; None without one.

    Raises:
        SupersededError: the file cannot be read, as when a network file system fails.
    """
    path = folder / ATTEMPT_FILE
    try:
        found, number = path.read_text().split()
        return int(number) if found == nonce else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise SupersededError(f"{path}: cannot read the newest attempt: {exc}") from exc


def _list_checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{CHECKPOINTS}/checkpoint-*.pt"))


@contextmanager
def serve_files(folder: Path, data: list[Any] | None) -> Iterator[str]:
    """Run the actor on this node; yield the nonce that stands in the search's folder meanwhile.

    Raises:
        ConfigError: the cluster cannot answer this process, and ends whatever it starts.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nonce, actor = secrets.token_hex(16), None
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": ACTOR, "num_cpus": 0, "scheduling_strategy": here, "max_concurrency": 4}
    write_atomically(folder / NONCE_FILE, nonce.encode())
    try:
        actor = ray.remote(FileServer).options(**options).remote(str(folder), data, nonce)
        try:
            ray.get(actor.__ray_ready__.remote())
        except ray.exceptions.ActorDiedError as exc:
            problem = "what this process starts there ends at once"
            raise ConfigError(f"`address`: {ACCESS_RULE}, got a cluster where {problem}.") from exc
        yield nonce
    finally:
        (folder / NONCE_FILE).unlink(missing_ok=True)
        with suppress(Exception):  # the cluster may be gone
            ray.kill(actor)


def open_trial_files(
    search_folder: Path, trial: int, attempt: int, nonce: str
) -> SharedFiles | CopiedFiles:
    """Begin an attempt in the run store itself if it is seen from here, else in a copy.

    Raises:
        SupersededError: a newer attempt of the trial has begun.
    """
    if _is_seen(search_folder, nonce):
        return SharedFiles(trial_folder(search_folder, trial), attempt, nonce)
    return CopiedFiles(trial, attempt)


def _is_seen(folder: Path, nonce: str) -> bool:
    try:
        return (folder / NONCE_FILE).read_text() == nonce and os.access(folder, os.W_OK)
    except OSError:
        return False


class SharedFiles:
    """A trial's folder in the run store, which this machine sees."""

    def __init__(self, folder: Path, attempt: int, nonce: str) -> None:
        self.folder = folder
        self._ids = attempt, nonce
        # What an earlier launch has left does not count.
        if (_read_attempt(folder, nonce) or 0) > attempt:
            raise SupersededError("a newer attempt has begun")
        write_atomically(folder / ATTEMPT_FILE, f"{nonce} {attempt}".encode())

    def upload(self) -> None:
        """Check that no newer attempt, of this launch or of a later one, has begun.

        Raises:
            SupersededError: one has.
        """
        attempt, nonce = self._ids
        if _read_attempt(self.folder, nonce) != attempt:
            raise SupersededError("a newer attempt has begun")

    def close(self) -> None:
        """Delete nothing: all of it is the run store's."""


class CopiedFiles:
    """A trial's folder on a disk of this machine, uploaded to the run store."""

    def __init__(self, trial: int, attempt: int) -> None:
        import ray

        self._ray: Any = ray
        self._server = ray.get_actor(ACTOR)
        self._ids = (trial, attempt)
        _remove_leftovers()
        self._search, self._lock = _make_scratch_folder()
        self.folder = trial_folder(self._search, trial)
        self.folder.mkdir(parents=True)
        self._uploaded: dict[str, tuple[int, int]] = {}
        # The checkpoint that came last: it stays if the next ones do not come.
        self._newest: list[str] = []
        found = ray.get(self._server.fetch.remote(*self._ids))
        if found is None:
            raise SupersededError("a newer attempt has begun")
        for name, content in found.items():
            path = self.folder / name
            write_atomically(path, content)
            self._uploaded[name], self._newest = look_at(path), [name]

    def upload(self) -> None:
        """Send new files; delete what is no longer here; take over the sign to stop.

        Raises:
            SupersededError: a newer attempt of the trial has begun.
            DiskFullError: the run store cannot take the weights.
        """
        # Weights first: the last checkpoint says that they are there.
        weights = self.folder / WEIGHTS
        paths = [weights] if weights.exists() else []
        paths += _list_checkpoints(self.folder)
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        for name, path in zip(names, paths, strict=True):
            look = look_at(path)
            if self._uploaded.get(name) != look:
                put = self._server.put.remote(*self._ids, name, path.read_bytes())
                if self._check(self._ray.get(put), name):
                    self._uploaded[name] = look
                    self._newest = self._newest if name == WEIGHTS else [name]
        is_stopping = self._ray.get(self._server.keep.remote(*self._ids, names + self._newest))
        self._check("superseded" if is_stopping is None else "", "")
        if is_stopping:
            stop_file(self._search).touch()

    def _check(self, problem: str, name: str) -> bool:
        """Return whether a file came; a checkpoint may be left out, as on a full disk here."""
        if problem == "superseded":
            raise SupersededError("a newer attempt has begun")
        if problem and name == WEIGHTS:
            raise DiskFullError(f"{name}: cannot write the file: {problem}. Make room.")
        return not problem

    def close(self) -> None:
        """Delete the folder on this machine."""
        shutil.rmtree(self._search, ignore_errors=True)
        self._lock.close()


def _make_scratch_folder() -> tuple[Path, IO[str]]:
    """Make a folder for a trial's files, and lock it as long as the file is open.

    It gets the name that `_remove_leftovers` looks for once it is locked.
    """
    made = Path(tempfile.mkdtemp(prefix="tune_cifar-new-"))
    lock = (made / LOCK_FILE).open("w", encoding="utf-8")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return made.rename(made.with_name(SCRATCH_PREFIX + made.name.rpartition("-")[2])), lock


def _remove_leftovers() -> None:
    """Delete the folders of workers that were killed: nobody has them locked."""
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*"):
        with suppress(OSError), (path / LOCK_FILE).open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
