"""What runs in a search's worker processes: the training generator, stepped by Ray Tune. Whatever is imported here is
imported by every worker before its first trial, so nothing of the driver's side is.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read by Ray when it is imported: no output of its own, no token file, no joining of somebody else's cluster, workers
# stay in the folder they were started from, at the priority of who started them (Ray's nice 15 is nearly nothing beside
# other work, and measured steps would foretell nothing), and no snapshots (the record is the truth).
RAY_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_AUTH_MODE": "disabled",
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
os.environ.update({name: os.environ.get(name, value) for name, value in RAY_ENVIRONMENT.items()})

import torch
from ray import tune

from tune_cifar.data.files import DataSource
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import DiskFullError, Diverged
from tune_cifar.schema import EpochResult, Numerics, TrainConfig
from tune_cifar.train.trial import stop_file, train_trial

# A worker tells of so many seconds of epochs at once: a word costs 10 ms of this process, more than many an epoch.
REPORT_SECONDS = 1.0


class TrialWorker(tune.Trainable):  # type: ignore[misc]
    """Steps `train_trial` in a warm worker process: imports, data and threads stay over all its trials."""

    def setup(self, config: dict[str, Any]) -> None:
        """Called by Ray when the worker starts, with the first trial."""
        self._results: Iterator[tuple[int, EpochResult]] | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called by Ray with every further trial; nothing heavy here, so that `step` can tell of any fault."""
        self._trial = new_config
        self._results = None
        self._end: tuple[str, str] | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Train for REPORT_SECONDS, at most up to a rung. Divergence and exceptions are results: Ray would run the
        trial again on an exception.

        Returns:
            trial, outcome (epochs, paused, diverged, failed, out of memory, disk full) and text: what happened in
            words, or a line per epoch, its cycle's length and an EpochResult in JSON (Tune flattens nested values).
        """
        lines: list[str] = []
        deadline = time.monotonic() + REPORT_SECONDS
        while self._end is None:
            try:
                if self._results is None:
                    self._results = self._make_results()
                cycle, result = next(self._results)
            except Exception as exc:
                self._end = explain_end(exc)
            else:
                lines.append(f"{cycle} {result.model_dump_json()}")
                if result.epoch in self._trial["rungs"] or time.monotonic() >= deadline:
                    break
        if self._end is not None:
            self._results = None  # and with it model, optimizer and batches
            torch.cuda.empty_cache()
        if lines:
            outcome, text = "epochs", "\n".join(lines)
        else:
            assert self._end is not None
            outcome, text = self._end
        return {"trial": self._trial["trial"], "outcome": outcome, "text": text}

    def _make_results(self) -> Iterator[tuple[int, EpochResult]]:
        config = TrainConfig(**self._trial["config"])
        numerics, folder = Numerics(**self._trial["numerics"]), Path(self._trial["folder"])
        name, data_folder = self._trial["source"]
        source = DataSource(name, Path(data_folder) if data_folder else None)
        data = load_train_val(source, config.train_size, config.val_size)
        for cycle in self._trial["cycles"]:
            for result in train_trial(config.shorten(cycle), data, numerics, folder):
                yield cycle, result
            if stop_file(folder.parents[1]).exists():
                return


def explain_end(exc: Exception) -> tuple[str, str]:
    """Outcome and text of what a trial's results ended with."""
    if isinstance(exc, StopIteration):
        return "paused", ""
    if isinstance(exc, Diverged):
        return "diverged", str(exc)
    if isinstance(exc, DiskFullError):  # its weights found no room
        return "disk full", str(exc)
    text = "".join(traceback.format_exception(exc))
    return "out of memory" if is_out_of_memory(exc) else "failed", text


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether a GPU's or the host's memory was too small; torch says the latter in a plain RuntimeError."""
    return isinstance(exc, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(
        exc
    )
