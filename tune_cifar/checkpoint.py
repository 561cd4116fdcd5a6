"""Atomic, checksummed checkpoints of a Trainer's state, and weights without pickle.

A checkpoint file is one line of magic, one line with the SHA-256 of the rest, then torch's own archive. It is written
to a temporary file, synced and renamed, so that a file under its final name is whole or was damaged later; the checksum
tells. Loading admits tensors and plain containers only (`weights_only=True`).
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tune_cifar.errors import CheckpointError

MAGIC = b"tune_cifar checkpoint 1\n"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a Trainer's state so that a crash at any moment leaves the old file or the new one, never a part."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest().encode()
    _write_atomically(path, MAGIC + digest + b"\n" + payload)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        CheckpointError: when the file is missing, torn or altered.
    """
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise CheckpointError(f"{path}: a readable file must be there, got {exc.strerror}.") from exc
    magic, digest, payload = content[: len(MAGIC)], content[len(MAGIC) :][:64], content[len(MAGIC) + 65 :]
    if magic != MAGIC or hashlib.sha256(payload).hexdigest().encode() != digest:
        raise CheckpointError(f"{path}: the checksum must match, got a torn or altered file. Use the one before it.")
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


def save_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A model's state_dict as safetensors, contiguous on the CPU, written atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, temporary)
    _sync(temporary)
    temporary.replace(path)


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """A model's state_dict from safetensors.

    Raises:
        CheckpointError: when the file is missing or not safetensors.
    """
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except Exception as exc:  # safetensors raises its own and the system's errors
        raise CheckpointError(f"{path}: whole safetensors weights must be there, got: {exc}") from exc
    return weights


class CheckpointFolder:
    """The newest checkpoints of one training: at most one a minute and one at the end, the last two kept.

    Args:
        folder: created when the first checkpoint is written.
        every_seconds: shortest time between two checkpoints that `is_due` asks for.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, every_seconds: float = 60.0, keep: int = 2) -> None:
        self.folder = folder
        self._every_seconds = every_seconds
        self._keep = keep
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """True once `every_seconds` have passed since the last save (or since the start)."""
        return time.monotonic() - self._last >= self._every_seconds

    def save(self, state: dict[str, Any]) -> Path:
        """Write the state under its epoch's number and delete all but the newest `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"checkpoint-{state['epoch']:04d}.pt"
        save_checkpoint(path, state)
        self._last = time.monotonic()
        for old in self._paths()[: -self._keep]:
            old.unlink()
        return path

    def load_newest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest whole state, or None, and a sentence for every damaged file passed over on the way."""
        notes: list[str] = []
        for path in reversed(self._paths()):
            try:
                return load_checkpoint(path), notes
            except CheckpointError as exc:
                notes.append(str(exc))
        return None, notes

    def delete(self) -> None:
        """Remove all checkpoints: the training is over and its weights are kept elsewhere."""
        for path in self._paths():
            path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*.pt"))


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Force a file's or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
