"""Disk space and folders that a search needs, checked before it starts."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from tune_cifar.dataset import CIFAR10, DataDescription
from tune_cifar.errors import ConfigError
from tune_cifar.models.build import build_model
from tune_cifar.record.files import find_lock_problem
from tune_cifar.search.rungs import list_stages
from tune_cifar.space.select import SearchSpace
from tune_cifar.train.step import build_initial_model

# Checkpoints of a running trial: the two that CheckpointFolder keeps and the one being written.
CHECKPOINTS_PER_TRIAL = 3
# A checkpoint has the weights and at most three tensors more per parameter: Adam's moments and the
# average of ema_decay.
TENSORS_PER_WEIGHT = 4
# Margins of a weights file and of a checkpoint: on the bytes of the tensors, and for the rest
# (headers, generators, the results of 1,000 epochs).
FILE_FACTOR, FILE_BYTES = 1.1, 500_000
# Record and MLflow's SQLite store, rounded up from 0.9 MB for empty tables, 31 kB a trial and 2.0
# kB an epoch (127 runs and 200 epochs, files in blocks of 4 kB, MLflow 3.17.2, November 2026).
SEARCH_BYTES, TRIAL_BYTES, EPOCH_BYTES = 2_000_000, 40_000, 2_500
# A socket's path has at most 107 bytes on Linux. Ray's, in the temporary folder, is
# ray/session_<26 characters of date and time>_<process id>/sockets/plasma_store.
MAX_TEMPORARY_BYTES = 107 - len("/ray/session__/sockets/plasma_store") - 26 - 7


class DiskNeeds(NamedTuple):
    """Upper bounds of what a search writes, in bytes."""

    checkpoints: int
    weights: int
    records: int
    """Record, and MLflow's database and files."""

    @property
    def total(self) -> int:
        return sum(self)

    def describe(self) -> str:
        return (
            f"checkpoints {_format_mb(self.checkpoints)}, weights {_format_mb(self.weights)}, "
            f"record and MLflow {_format_mb(self.records)}"
        )


def estimate_disk_needs(
    space: SearchSpace,
    max_concurrent: int,
    keep_weights: int,
    data: DataDescription = CIFAR10,
) -> DiskNeeds:
    """Return coarse upper bounds of what a search writes if no trial is stopped.

    They come from the shapes of the baseline's model. Of the five networks nothing is allocated; a
    network of the user's own is built, since its code may need values.
    """
    if space.baseline.is_own:
        model = build_initial_model(space.baseline, data)
    else:
        with torch.device("meta"):
            model = build_model(space.baseline, data)
    num_bytes = FILE_FACTOR * sum(tensor.nbytes for tensor in model.state_dict().values())
    weights = round(num_bytes) + FILE_BYTES
    checkpoint = round(TENSORS_PER_WEIGHT * num_bytes) + FILE_BYTES
    # Those of the best trials, of the running ones, and the best trial's copy in MLflow.
    num_weights = keep_weights + max_concurrent + 1
    num_epochs = sum(stage.length for stage in list_stages(space.budget))
    return DiskNeeds(
        checkpoints=CHECKPOINTS_PER_TRIAL * max_concurrent * checkpoint,
        weights=num_weights * weights,
        records=SEARCH_BYTES + space.budget.trials * (TRIAL_BYTES + num_epochs * EPOCH_BYTES),
    )


def check_disk(storage: Path, needs: DiskNeeds) -> None:
    """Refuse a search that would later lack a writable folder or disk space.

    Raises:
        ConfigError: when the temporary folder or the run store is not writable, the run store's
            file system has no locks, or the disk is too small.
    """
    _check_temporary_folder()
    check_folder(storage, "the run store", "storage")
    if problem := find_lock_problem(_find_existing(storage)):
        raise ConfigError(f"{storage}: {problem}. Give a folder elsewhere as `storage`.")
    free = shutil.disk_usage(_find_existing(storage)).free
    if needs.total > free:
        needed = f"{_format_mb(needs.total)} must be free for the search ({needs.describe()})"
        hint = "Make room (`searches delete`), give another folder as `storage`, or lower `trials`."
        raise ConfigError(f"{storage}: {needed}, got {_format_mb(free)}. {hint}")


def check_folder(folder: Path, what: str, parameter: str) -> None:
    """Refuse a folder, existing or not, in which nothing could be written later.

    Raises:
        ConfigError: with what the folder is for and the parameter that sets another.
    """
    hint = f"Give another folder as `{parameter}`."
    _check_writable(_find_existing(folder), f"{folder}: {what}", hint)


def _check_temporary_folder() -> None:
    """Check the folder that Ray takes: RAY_TMPDIR, else on Linux TMPDIR, else /tmp.

    Python's tempfile would skip a bad one; Ray does not.
    """
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    name = next((name for name in names if name in os.environ), names[-1])
    folder = Path(os.environ.get(name, "/tmp"))
    if not folder.is_absolute():
        raise ConfigError(f"{name} must be an absolute path, got {str(folder)!r}.")
    if (size := len(os.fsencode(folder))) > MAX_TEMPORARY_BYTES:
        rule = f"{name} must be a path of at most {MAX_TEMPORARY_BYTES} bytes (of Ray's sockets)"
        raise ConfigError(f"{rule}, got {size}: {folder}.")
    _check_writable(folder, f"{folder}: the temporary folder", f"Set {name} to one that is.")
    used = folder / "ray"
    if os.path.lexists(used):  # perhaps another user's
        _check_writable(used, f"{used}: Ray's folder", "Set RAY_TMPDIR to a folder of your own.")


def _find_existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    for place in (folder, *folder.parents):
        try:
            place.lstat()
        except OSError:
            continue
        return place
    return Path("/")


def _check_writable(folder: Path, what: str, hint: str) -> None:
    """Check a folder by writing a file; permission bits do not show a read-only or full disk.

    Raises:
        ConfigError: that `what` must be writable, with the system's reason and the hint.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tune_cifar-") as file:
            file.write(b"tune_cifar")
    except OSError as exc:
        sentence = f"{what} must be writable, got {exc.strerror!r} at {folder}. {hint}"
        raise ConfigError(sentence) from exc


def _format_mb(num_bytes: int) -> str:
    return f"{max(1, round(num_bytes / 1e6)):,} MB"
