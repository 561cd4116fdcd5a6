"""What a search needs of the machine's disks, and the refusals before the first trial: one sentence each."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from tune_cifar.errors import ConfigError
from tune_cifar.models.build import build_model
from tune_cifar.schema import TrainConfig

# Checkpoints of a running trial: the two that CheckpointFolder keeps and the one being written.
CHECKPOINTS_PER_TRIAL = 3
# Tensors of a parameter's size in each optimizer's state: SGD's momentum, Adam's two moments.
OPTIMIZER_SLOTS = {"sgd": 1, "adam": 2, "adamw": 2}
# What torch's archive adds: headers and padding per tensor, an EpochResult per epoch; generators, names and the rest.
# Upper bounds, held against real files by test_preflight.
TENSOR_BYTES, RESULT_BYTES, STATE_BYTES = 600, 400, 40_000
# Record and MLflow's SQLite store, rounded up from a store of 127 runs and 200 epochs, files in blocks of 4 kB (MLflow
# 3.17.2, November 2026). A trial took 31 kB: 8 in MLflow's tables, 21 in the files and folders of its artifacts, 2 in
# the record. An epoch took 2.0 kB: 1.6 in MLflow's tables, 0.35 in the record. Empty tables took 0.9 MB.
SEARCH_BYTES, TRIAL_BYTES, EPOCH_BYTES = 2_000_000, 40_000, 2_500
# A socket's path has at most 107 bytes on Linux, and Ray puts
# ray/session_<26 characters of date and time>_<process id>/sockets/plasma_store into the temporary folder.
MAX_TEMPORARY_BYTES = 107 - len("/ray/session__/sockets/plasma_store") - 26 - 7


@dataclass(frozen=True)
class DiskNeeds:
    """Bytes that a search has on disk at most, if every trial trained to its last epoch."""

    checkpoints: int
    weights: int
    records: int
    """The search's record and MLflow's database and files."""

    @property
    def total(self) -> int:
        return self.checkpoints + self.weights + self.records

    def describe(self) -> str:
        return (
            f"checkpoints {_format_mb(self.checkpoints)}, weights {_format_mb(self.weights)}, "
            f"record and MLflow {_format_mb(self.records)}"
        )


def estimate_disk_needs(
    config: TrainConfig, num_epochs: int, num_trials: int, max_concurrent: int, keep_weights: int
) -> DiskNeeds:
    """Disk for a search of trials like `config`; a searched optimizer with more state than its own is not counted.

    Args:
        num_epochs: of a whole trial: those of all its cycles.
        keep_weights: of how many finished trials the weights stay. Those of running trials come on top, written before
            it is known whose stay, and the best trial's copy in MLflow.
    """
    weights, checkpoint = measure_training(config)
    return DiskNeeds(
        checkpoints=CHECKPOINTS_PER_TRIAL * max_concurrent * checkpoint,
        weights=(keep_weights + max_concurrent + 1) * weights,
        records=SEARCH_BYTES + num_trials * (TRIAL_BYTES + num_epochs * EPOCH_BYTES),
    )


def measure_training(config: TrainConfig) -> tuple[int, int]:
    """Bytes of a configuration's weights file and of its checkpoint, from the shapes alone: nothing is allocated."""
    with torch.device("meta"):
        model = build_model(config)
    parameters, tensors = list(model.parameters()), model.state_dict().values()
    weights = sum(tensor.nbytes for tensor in tensors)
    slots = OPTIMIZER_SLOTS[config.optimizer]
    num_tensors = len(tensors) + (slots + 1) * len(parameters)  # the state also counts each parameter's steps
    moments = slots * sum(parameter.nbytes for parameter in parameters)
    extra = num_tensors * TENSOR_BYTES + config.epochs * RESULT_BYTES + STATE_BYTES
    return weights + len(tensors) * TENSOR_BYTES, weights + moments + extra


def check_search_fits(
    storage: Path, config: TrainConfig, num_epochs: int, num_trials: int, max_concurrent: int, keep_weights: int
) -> None:
    """Refuse a search that would fail later for want of a writable folder or of room; see `estimate_disk_needs`.

    Raises:
        ConfigError: the temporary folder or the run store cannot be written, or the disk has too little room.
    """
    _check_temporary_folder()
    check_folder(storage, "the run store", "--storage")
    needs = estimate_disk_needs(config, num_epochs, num_trials, max_concurrent, keep_weights)
    free = _get_free_bytes(storage)
    if needs.total > free:
        raise ConfigError(
            f"{storage}: {_format_mb(needs.total)} must be free for the search ({needs.describe()}), "
            f"got {_format_mb(free)}. Make room (`searches delete`), name another folder with --storage, or ask for "
            "fewer trials."
        )


def check_folder(folder: Path, what: str, option: str) -> None:
    """Refuse a folder, there or still to be made, in which nothing could be written later.

    Raises:
        ConfigError: naming what it is for and the option that names another.
    """
    _check_writable(_find_existing(folder), f"{folder}: {what}", f"Name another folder with {option}.")


def _check_temporary_folder() -> None:
    """Ray takes RAY_TMPDIR, else TMPDIR, else /tmp, as they are; Python itself would pass over a bad one."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "TMPDIR")
    folder = Path(os.environ.get(name, "/tmp"))
    if not folder.is_absolute():
        raise ConfigError(f"{name}: an absolute path must be given, got {str(folder)!r}.")
    if (size := len(os.fsencode(folder))) > MAX_TEMPORARY_BYTES:
        rule = f"a path of at most {MAX_TEMPORARY_BYTES} bytes must be given (Ray's sockets lie in it), got {size}"
        raise ConfigError(f"{name}: {rule}: {folder}.")
    _check_writable(folder, f"{folder}: the temporary folder", f"Set {name} to one that is.")


def _find_existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    for place in (folder, *folder.parents):
        try:
            place.lstat()
        except OSError:
            continue
        return place
    return Path("/")


def _check_writable(folder: Path, what: str, hint: str) -> None:
    """Create and remove a file: rights, a read-only mount and a full disk all tell; looking at rights tells root a lie.

    Raises:
        ConfigError: `what` must be writable, the system's words, and the hint.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tune_cifar-") as file:
            file.write(b"tune_cifar")
    except OSError as exc:
        raise ConfigError(f"{what} must be writable, got {exc.strerror!r} at {folder}. {hint}") from exc


def _get_free_bytes(storage: Path) -> int:
    return shutil.disk_usage(_find_existing(storage)).free


def _format_mb(num_bytes: int) -> str:
    return f"{max(1, round(num_bytes / 1e6)):,} MB"
