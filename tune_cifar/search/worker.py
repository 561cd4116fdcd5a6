"""The worker processes of a search: Ray Tune steps a training generator in each.

Every worker imports this module before its first trial, so it imports nothing of the driver's side.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Ray reads these when it is imported: no output of its own, workers stay in the folder and at the
# priority of the process that started them (at Ray's nice 15 they would starve beside other work,
# and measured steps would predict nothing), no snapshots (the record is enough). Users may set
# other values.
RAY_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",
}
if "ray" not in sys.modules:
    # Ray's processes listen on all addresses of the machine and run what they are sent. A token,
    # a new one for each command, keeps everybody else out; Ray's own would be a file in the user's
    # home. Where Ray is imported already, its own it is: it reads these then no more.
    RAY_ENVIRONMENT |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
for name, value in RAY_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
# Not to be changed: under `uv run` Ray would upload the working folder and start workers with uv.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

import torch
from ray import tune

from tune_cifar.data.files import DataSource
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import DiskFullError, Diverged
from tune_cifar.models.custom import add_source
from tune_cifar.record.priority import make_session_nice
from tune_cifar.schema import EpochResult, Numerics, TrainConfig
from tune_cifar.train.trial import stop_file, train_trial

# A worker reports the epochs of this time in one message, which costs the driver 10 ms.
REPORT_SECONDS = 1.0


class TrialWorker(tune.Trainable):  # type: ignore[misc]
    """Steps `train_trial` in a worker process, which keeps imports, data and threads."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial; Ray calls this when the worker starts."""
        make_session_nice()
        self._results: Iterator[tuple[int, EpochResult]] | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take a further trial; nothing is built here, so that `step` can report every fault."""
        self._trial = new_config
        self._results = None
        self._end: tuple[str, str] | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Train for REPORT_SECONDS, at most up to a rung.

        Divergence and exceptions are results too: Ray would run the trial again on an exception.

        Returns:
            a message: trial, outcome (epochs, paused, diverged, failed, out of memory, disk full)
            and text, which is a description or, of epochs, what `pack_epochs` returns.
        """
        epochs: list[tuple[int, EpochResult]] = []
        deadline = time.monotonic() + REPORT_SECONDS
        while self._end is None:
            try:
                if self._results is None:
                    self._results = self._make_results()
                stage, result = next(self._results)
            except Exception as exc:
                self._end = explain_end(exc)
            else:
                epochs.append((stage, result))
                if result.epoch in self._trial["rungs"] or time.monotonic() >= deadline:
                    break
        if self._end is not None:
            self._results = None  # and with it model, optimizer and batches
            torch.cuda.empty_cache()
        if epochs:
            outcome, text = "epochs", pack_epochs(epochs)
        else:
            assert self._end is not None
            outcome, text = self._end
        return {"trial": self._trial["trial"], "outcome": outcome, "text": text}

    def _make_results(self) -> Iterator[tuple[int, EpochResult]]:
        if source_text := self._trial.get("model_source"):
            add_source(source_text)
        config = TrainConfig(**self._trial["config"])
        numerics, folder = Numerics(**self._trial["numerics"]), Path(self._trial["folder"])
        name, data_folder = self._trial["source"]
        source = DataSource(name, Path(data_folder) if data_folder else None)
        data = load_train_val(source, config.train_size, config.val_size)
        for stage in self._trial["stages"]:
            for result in train_trial(config.shorten(stage), data, numerics, folder):
                yield stage, result
            if stop_file(folder.parents[1]).exists():
                return


def pack_epochs(epochs: Iterable[tuple[int, EpochResult]]) -> str:
    """Return a line per epoch, its stage's length and its result in JSON: Tune flattens values."""
    return "\n".join(f"{stage} {result.model_dump_json()}" for stage, result in epochs)


def unpack_epochs(text: str) -> list[tuple[int, EpochResult]]:
    """Return the stage's length and the result of every epoch that `pack_epochs` was given."""
    epochs = []
    for line in text.splitlines():
        stage, dump = line.split(" ", 1)
        epochs.append((int(stage), EpochResult.model_validate_json(dump)))
    return epochs


def explain_end(exc: Exception) -> tuple[str, str]:
    """Return the outcome and text of the message for what ended a trial's results."""
    if isinstance(exc, StopIteration):
        return "paused", ""
    if isinstance(exc, Diverged):
        return "diverged", str(exc)
    if isinstance(exc, DiskFullError):  # when its weights were written
        return "disk full", str(exc)
    text = "".join(traceback.format_exception(exc))
    return "out of memory" if is_out_of_memory(exc) else "failed", text


def is_out_of_memory(exc: BaseException) -> bool:
    """Return whether a GPU's or the host's memory was too small."""
    # On the CPU torch raises a plain RuntimeError with this text.
    is_cpu_error = "can't allocate memory" in str(exc)
    return is_cpu_error or isinstance(exc, MemoryError | torch.OutOfMemoryError)
