"""Atomic, checksummed checkpoints of a Trainer's state, and weights without pickle.

A checkpoint file is one line of magic, one line with the SHA-256 of the rest, then torch's own archive. Every file here
is written to a temporary one, synced and renamed, so that what stands under its final name is whole or was damaged
later; the checksum tells. Loading admits tensors and plain containers only (`weights_only=True`).
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
T = TypeVar("T")
# The shortest time between two checkpoints of a training: writing them must cost it nothing that counts.
CHECKPOINT_SECONDS = 60.0
# What a system says when there is no room: on the disk, in a quota, for a file so large.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a Trainer's state so that a crash at any moment leaves the old file or the new one, never a part.

    Raises:
        CheckpointError: when the disk does not take it; the old file stays.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    _write(path, _make_head(payload) + payload)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        CheckpointError: when the file is missing, torn, altered, or holds more than tensors and plain values.
    """
    payload = _read_payload(path)
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as exc:  # torch and pickle raise many kinds
        raise CheckpointError(
            f"{path}: tensors and plain values must be in it, got something else."
        ) from exc
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: a training's state must be in it, got a {type(state).__name__}."
        )
    return state


def _make_head(payload: bytes) -> bytes:
    return MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"


def _read_payload(path: Path) -> bytes:
    """What stands behind the checksum, proved by it and not unpickled."""
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise CheckpointError(
            f"{path}: a readable file must be there, got {exc.strerror}."
        ) from exc
    payload = content[len(MAGIC) + 65 :]
    if not payload or not content.startswith(_make_head(payload)):
        raise CheckpointError(
            f"{path}: the checksum must match, got a torn or altered file. Use the one before it."
        )
    return payload


def save_weights(
    path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A model's state_dict as safetensors, contiguous on the CPU, written atomically.

    Raises:
        CheckpointError: when the disk does not take it.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    _write(path, save(tensors, metadata))


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """A model's state_dict from safetensors.

    Raises:
        CheckpointError: when the file is missing or not safetensors.
    """
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except Exception as exc:  # safetensors raises its own and the system's errors
        raise CheckpointError(
            f"{path}: whole safetensors weights must be there, got: {exc}"
        ) from exc
    return weights


def load_metadata(path: Path) -> dict[str, str]:
    """What `save_weights` wrote beside the weights; empty where it was given none.

    Raises:
        CheckpointError: when the file is missing or not safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception as exc:  # safetensors raises its own and the system's errors
        raise CheckpointError(
            f"{path}: whole safetensors weights must be there, got: {exc}"
        ) from exc


class CheckpointFolder:
    """The newest checkpoints of one training: at most one a minute and one at the end, the last two kept.

    Args:
        folder: created when the first checkpoint is written.
        every_seconds: shortest time between two checkpoints that `is_due` asks for.
        keep: how many of the newest stay.
    """

    def __init__(
        self, folder: Path, every_seconds: float = CHECKPOINT_SECONDS, keep: int = 2
    ) -> None:
        self.folder = folder
        self._every_seconds = every_seconds
        self._keep = keep
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """True once `every_seconds` have passed since the last save (or since the start)."""
        return time.monotonic() - self._last >= self._every_seconds

    def save(self, state: dict[str, Any]) -> Path:
        """Write the state under its epoch's number, then keep it and the newest before it. What a killed write left is
        deleted first; checkpoints of later epochs too, once this one is there: they were damaged, or it had been read.

        Raises:
            CheckpointError: when the disk does not take it. The old ones stay, and `is_due` waits as after a success.
        """
        path = self.folder / f"checkpoint-{state['epoch']:04d}.pt"
        _remove(self._torn())
        try:
            save_checkpoint(path, state)
        finally:
            self._last = time.monotonic()
        kept = [old for old in self._paths() if old <= path][-self._keep :]
        _remove([old for old in self._paths() if old not in kept])
        return path

    def load_newest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest whole state, or None, and a sentence for every damaged file passed over on the way."""
        return self._take_newest(load_checkpoint)

    def find_newest(self) -> tuple[int | None, list[str]]:
        """The epoch of the newest whole checkpoint, or None, and a sentence for every damaged one passed over. Only
        checksums are looked at: nothing is unpickled."""

        def read_epoch(path: Path) -> int:
            _read_payload(path)
            return int(path.stem.removeprefix("checkpoint-"))

        return self._take_newest(read_epoch)

    def delete(self) -> None:
        """Remove all checkpoints: the training is over and its weights are kept elsewhere."""
        _remove([*self._paths(), *self._torn()])

    def _take_newest(self, read: Callable[[Path], T]) -> tuple[T | None, list[str]]:
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

    def _torn(self) -> list[Path]:
        return list(self.folder.glob("checkpoint-*.tmp"))


def _remove(paths: list[Path]) -> None:
    """Delete files; one that cannot be deleted stays: it hurts no training."""
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        CheckpointError: when the disk does not take it; the old file stays.
    """
    try:
        write_atomically(path, content)
    except OSError as exc:
        kind = DiskFullError if exc.errno in DISK_FULL else CheckpointError
        raise kind(
            f"{path}: the file must reach the disk, got {exc.strerror!r}. Make room."
        ) from exc
