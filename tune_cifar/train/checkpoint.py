"""Atomic, checksummed checkpoints of a Trainer's state, and weights without pickle.

A checkpoint file is one line of magic, one line with the SHA-256 of the rest, then torch's own
archive. Every file is written to a temporary one, synced and renamed, so a crash leaves no partial
file under the final name; the checksum detects later damage. Loading accepts only tensors and
plain containers (`weights_only=True`).
"""

from __future__ import annotations

import errno
import hashlib
import io
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from tune_cifar.errors import CheckpointError, DiskFullError
from tune_cifar.record.files import write_atomically

MAGIC = b"tune_cifar checkpoint 1\n"
# The shortest time between two checkpoints of a training, so that writing them costs little.
CHECKPOINT_SECONDS = 60.0
# The newest checkpoints of a training that are kept: one may be damaged.
NUM_KEPT = 2
# No room on the disk, in the quota, or a file too large.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
T = TypeVar("T")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a Trainer's state; a crash at any moment leaves the old file or the new one.

    Raises:
        CheckpointError: the file cannot be written; the old one stays.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    _write(path, _make_head(payload) + payload)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        CheckpointError: the file is missing, incomplete or altered, or holds anything but tensors
            and plain values.
    """
    payload = _read_payload(path)
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as exc:  # torch and pickle raise many kinds
        rule = "a checkpoint must hold only tensors and plain values"
        raise CheckpointError(f"{path}: {rule}, got something else.") from exc
    if not isinstance(state, dict):
        rule = "a checkpoint must hold a training's state"
        raise CheckpointError(f"{path}: {rule}, got a {type(state).__name__}.")
    return state


def _make_head(payload: bytes) -> bytes:
    return MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"


def _read_payload(path: Path) -> bytes:
    """Return the bytes behind the checksum, once they match it; nothing is unpickled."""
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot read the file: {exc.strerror}.") from exc
    payload = content[len(MAGIC) + 65 :]  # 64 hexadecimal digits and the end of the line
    if not payload or not content.startswith(_make_head(payload)):
        problem = "the checksum does not match, so the file is incomplete or altered"
        raise CheckpointError(f"{path}: {problem}. Use the checkpoint before it.")
    return payload


def save_weights(
    path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a model's state_dict as safetensors, atomically.

    Raises:
        CheckpointError: the file cannot be written; the old one stays.
    """
    # Copies: safetensors refuses two names of one memory, as tied weights have.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }
    _write(path, save(tensors, metadata))


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a model's state_dict from safetensors to the CPU.

    Raises:
        CheckpointError: the file is missing or not safetensors.
    """
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except Exception as exc:  # safetensors raises its own and the system's errors
        raise CheckpointError(f"{path}: not a complete safetensors file: {exc}") from exc
    return weights


def load_metadata(path: Path) -> dict[str, str]:
    """Read the metadata that `save_weights` wrote beside the weights; empty without any.

    Raises:
        CheckpointError: the file is missing or not safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception as exc:  # safetensors raises its own and the system's errors
        raise CheckpointError(f"{path}: not a complete safetensors file: {exc}") from exc


class CheckpointFolder:
    """The newest checkpoints of one training.

    Args:
        folder: created when the first checkpoint is written.
        every_seconds: shortest time between two checkpoints, for `is_due`.
    """

    def __init__(self, folder: Path, every_seconds: float = CHECKPOINT_SECONDS) -> None:
        self.folder = folder
        self._every_seconds = every_seconds
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Return whether `every_seconds` have passed since the last save or the start."""
        return time.monotonic() - self._last >= self._every_seconds

    def save(self, state: dict[str, Any]) -> Path:
        """Write the state under its epoch's number and delete the checkpoints no longer needed.

        Partial files of killed writes are deleted first. Checkpoints of later epochs are deleted
        once this one is there: they are damaged, or this training would have resumed from them.

        Raises:
            CheckpointError: the file cannot be written. The old checkpoints stay, and `is_due`
                waits as after a success.
        """
        path = self.folder / f"checkpoint-{state['epoch']:04d}.pt"
        _remove(self._partial_files())
        try:
            save_checkpoint(path, state)
        finally:
            self._last = time.monotonic()
        kept = [old for old in self._paths() if old <= path][-NUM_KEPT:]
        _remove([old for old in self._paths() if old not in kept])
        return path

    def load_newest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the newest intact state, or None, and a sentence for every damaged file."""
        return self._read_newest(load_checkpoint)

    def find_newest(self) -> tuple[int | None, list[str]]:
        """Return the epoch of the newest intact checkpoint, or None, and a sentence for every
        damaged file. Only checksums are verified; nothing is unpickled.
        """

        def read_epoch(path: Path) -> int:
            _read_payload(path)
            return int(path.stem.removeprefix("checkpoint-"))

        return self._read_newest(read_epoch)

    def delete(self) -> None:
        """Delete all checkpoints."""
        _remove([*self._paths(), *self._partial_files()])

    def _read_newest(self, read: Callable[[Path], T]) -> tuple[T | None, list[str]]:
        notes: list[str] = []
        for path in reversed(self._paths()):
            try:
                return read(path), notes
            except CheckpointError as exc:
                notes.append(str(exc))
        return None, notes

    def _paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("checkpoint-[0-9][0-9][0-9][0-9].pt"))

    def _partial_files(self) -> list[Path]:
        return list(self.folder.glob("checkpoint-*.tmp"))


def _remove(paths: list[Path]) -> None:
    """Delete files; one that cannot be deleted stays and does no harm."""
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        CheckpointError: the file cannot be written; the old one stays.
    """
    try:
        write_atomically(path, content)
    except OSError as exc:
        kind = DiskFullError if exc.errno in DISK_FULL else CheckpointError
        raise kind(f"{path}: cannot write the file: {exc.strerror}. Make room.") from exc
