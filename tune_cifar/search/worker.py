"""The worker processes of a search: Ray Tune steps a training generator in each.

Every worker imports this module before its first trial, so it imports nothing of the driver's side.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tune_cifar.record.environment import JOINS

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
JOINS_CLUSTERS = JOINS in os.environ
OWN_TOKEN: str | None = None
"""Of the Ray that this process starts; None where it joins one, or has Ray from elsewhere."""
if "ray" not in sys.modules and not JOINS_CLUSTERS:
    # Ray's processes listen on all addresses of the machine and run what they are sent. A token,
    # a new one for each command, keeps everybody else out; Ray's own would be a file in the user's
    # home. Where Ray is imported already, its own it is: it reads these then no more. A cluster
    # that is there has its own, too.
    OWN_TOKEN = secrets.token_hex(32)
    RAY_ENVIRONMENT |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": OWN_TOKEN}
elif JOINS_CLUSTERS:
    # Whom a cluster does not let in would try 20 times, with a second and a line of log for each.
    RAY_ENVIRONMENT["RAY_NUM_REDIS_GET_RETRIES"] = "4"
for name, value in RAY_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
# Not to be changed: under `uv run` Ray would upload the working folder and start workers with uv.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

import ray
import torch
from ray import tune

from tune_cifar.data.files import DataSource, find_data
from tune_cifar.data.load import PackedData, TrainVal, load_train_val
from tune_cifar.errors import DataError, DiskFullError, Diverged
from tune_cifar.models.custom import add_source
from tune_cifar.record.events import Stage
from tune_cifar.record.files import stop_file
from tune_cifar.record.priority import make_session_nice
from tune_cifar.schema import DataInfo, EpochResult, Numerics, TrainConfig
from tune_cifar.search.trial_files import (
    ACTOR,
    CopiedFiles,
    SharedFiles,
    SupersededError,
    open_trial_files,
)
from tune_cifar.train.numerics import compare_numerics, restore_numerics
from tune_cifar.train.step import delete_idle_steps
from tune_cifar.train.trial import train_trial

# A worker reports the epochs of this time in one message, which costs the driver 10 ms.
REPORT_SECONDS = 1.0


class TrialWorker(tune.Trainable):  # type: ignore[misc]
    """Steps `train_trial` in a worker process, which keeps imports, data and threads."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial; Ray calls this when the worker starts."""
        make_session_nice()
        self._results: Iterator[tuple[Stage, EpochResult]] | None = None
        self._files: SharedFiles | CopiedFiles | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take a further trial; nothing is built here, so that `step` can report every fault."""
        self._close()
        self._trial = new_config
        self._end: tuple[str, str] | None = None
        self._here: Numerics | None = None
        return True

    def cleanup(self) -> None:
        """Delete what only this worker needs."""
        self._close()

    def step(self) -> dict[str, Any]:
        """Train for REPORT_SECONDS, at most up to a rung.

        Divergence and exceptions are results too: Ray would run the trial again on an exception.

        Returns:
            a message: trial, outcome (epochs, paused, diverged, failed, out of memory, disk full,
            no room, unlike, superseded) and text, which is a description or, of epochs, what
            `pack_epochs` returns. On a cluster also attempt, and place: see `describe_place`.
        """
        epochs: list[tuple[Stage, EpochResult]] = []
        deadline = time.monotonic() + REPORT_SECONDS
        while self._end is None:
            try:
                if self._results is None:
                    self._results = self._make_results()
                stage, result = next(self._results)
            except Exception as exc:
                end_with_broken_cuda()
                self._end = explain_end(exc)
            else:
                epochs.append((stage, result))
                if result.epoch in self._trial["rungs"] or time.monotonic() >= deadline:
                    break
        if self._end is not None:
            self._close()
            if self._end[0] == "out of memory":  # the next trial needs what idle steps hold
                delete_idle_steps()
            if 0 < self._trial["gpus"] < 1:  # a neighbour may need the memory
                torch.cuda.empty_cache()
        if epochs:
            outcome, text = "epochs", pack_epochs(epochs)
        else:
            assert self._end is not None
            outcome, text = self._end
        message = {"trial": self._trial["trial"], "outcome": outcome, "text": text}
        if (cluster := self._trial.get("cluster")) is not None:
            message |= {"attempt": cluster["attempt"], "place": describe_place(self._here)}
        return message

    def _close(self) -> None:
        """Let go of model, optimizer and batches, and of the trial's files on this machine."""
        self._results = None
        if self._files is not None:
            self._files.close()
            self._files = None

    def _make_results(self) -> Iterator[tuple[Stage, EpochResult]]:
        trial, numerics = self._trial, Numerics(**self._trial["numerics"])
        if source_text := trial.get("model_source"):
            add_source(source_text)
        config, folder = TrainConfig(**trial["config"]), Path(trial["folder"])
        if (cluster := trial.get("cluster")) is None:
            data = load_train_val(make_source(trial), config.train_size, config.val_size)
        else:
            recorded, numerics = numerics, restore_numerics(numerics)
            self._here = numerics
            changes = compare_numerics(recorded, numerics)
            if changes and not cluster["allow_mixed"]:
                raise UnlikeError("; ".join(changes))
            data = self._load_data(config)
            ids = (trial["trial"], cluster["attempt"], cluster["nonce"])
            self._files = open_trial_files(folder.parents[1], *ids)
            folder = self._files.folder
        if numerics.device == "cuda" and trial["gpus"]:
            # A neighbour on the same GPU then runs out of its own memory, not of this trial's.
            torch.cuda.set_per_process_memory_fraction(trial["gpus"])
        stages = [Stage(*stage) for stage in trial["stages"]]
        for stage in stages:
            is_final, short = stage == stages[-1], config.shorten(*stage)
            results = train_trial(
                short, data, numerics, folder, is_final=is_final, replicate=stage.replicate
            )
            for result in self._tell_whose_disk(results):
                self._upload()
                yield stage, result
            self._upload()
            if stop_file(folder.parents[1]).exists():
                return

    def _tell_whose_disk(self, results: Iterator[EpochResult]) -> Iterator[EpochResult]:
        """Yield the results of a training.

        Raises:
            NoRoomError: this node's own disk is full.
            DiskFullError: the run store's is.
        """
        try:
            yield from results
        except DiskFullError as exc:
            if isinstance(self._files, CopiedFiles):
                raise NoRoomError(str(exc)) from exc
            raise

    def _upload(self) -> None:
        if self._files is not None:
            self._files.upload()

    def _load_data(self, config: TrainConfig) -> TrainVal:
        """Load this node's own copy of the images if it is the driver's data, else the driver's."""
        sizes = config.train_size, config.val_size
        wanted = DataInfo(**self._trial["cluster"]["data"])
        for source in list_own_data(make_source(self._trial)):
            with suppress(DataError):
                if (data := load_train_val(source, *sizes)).info == wanted:
                    return data
        if self._drivers_data is None:
            reference = ray.get(ray.get_actor(ACTOR).get_data.remote())
            if reference is None:
                digest = f"digest {wanted.digest}"
                raise DataError(f"data: the driver must have {wanted.name} with {digest}.")
            (self._drivers_data,) = ray.get(reference)
        return self._drivers_data.select(*sizes)

    _drivers_data: PackedData | None = None
    """They stay for all trials of this worker."""


def request_resources(cpus: int, gpus: float, config: dict[str, Any]) -> Any:
    """Return what Ray reserves for a trial of a cluster: cores and GPUs of the node chosen for it.

    A request without a node would be any free worker's: Tune would end the starting worker of a new
    node whenever another node's worker becomes free.
    """
    selector = {"ray.io/node-id": config["node"]}
    bundle = {"CPU": cpus, "GPU": gpus}
    return tune.PlacementGroupFactory([bundle], bundle_label_selector=[selector])


def make_source(trial: dict[str, Any]) -> DataSource:
    """Return the driver's data source."""
    name, folder = trial["source"]
    return DataSource(name, Path(folder) if folder else None)


def list_own_data(source: DataSource) -> Iterator[DataSource]:
    """Yield where a node may have the same data: at the driver's path, then where it looks."""
    yield source
    if source.folder is not None:
        with suppress(DataError):
            found = find_data(None if source.name == "cifar10" else source.name)
            if found.name == source.name:
                yield found


class UnlikeError(Exception):
    """This node differs from the search's in what changes a training's bits."""


class NoRoomError(Exception):
    """The disk on which this node keeps the files of trials is full."""


def describe_place(numerics: Numerics | None) -> str:
    """Return this node's id in Ray and its Numerics, as JSON; null where they are not known."""
    node_id = ray.get_runtime_context().get_node_id()
    return json.dumps({"id": node_id, "numerics": numerics and numerics.model_dump()})


def pack_epochs(epochs: Iterable[tuple[Stage, EpochResult]]) -> str:
    """Return a line per epoch, its stage and its result in JSON: Tune flattens values."""
    lines = (f"{s.length} {s.replicate} {result.model_dump_json()}" for s, result in epochs)
    return "\n".join(lines)


def unpack_epochs(text: str) -> list[tuple[Stage, EpochResult]]:
    """Return the stage and the result of every epoch that `pack_epochs` was given."""
    epochs = []
    for line in text.splitlines():
        length, replicate, dump = line.split(" ", 2)
        stage = Stage(int(length), int(replicate))
        epochs.append((stage, EpochResult.model_validate_json(dump)))
    return epochs


def explain_end(exc: Exception) -> tuple[str, str]:
    """Return the outcome and text of the message for what ended a trial's results."""
    if isinstance(exc, StopIteration):
        return "paused", ""
    if isinstance(exc, SupersededError):
        return "superseded", str(exc)
    if isinstance(exc, UnlikeError):
        return "unlike", str(exc)
    if isinstance(exc, NoRoomError):
        return "no room", str(exc)
    if isinstance(exc, Diverged):
        return "diverged", str(exc)
    if isinstance(exc, DiskFullError):  # the run store's, when the weights were written
        return "disk full", str(exc)
    text = "".join(traceback.format_exception(exc))
    return "out of memory" if is_out_of_memory(exc) else "failed", text


# What torch says of the CPU's memory, then of a GPU's: CUDA itself (its context, a graph), cuDNN
# and cuBLAS (their workspaces, without which cuDNN finds no kernel).
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "nable to find an engine to execute this computation",
)


def is_out_of_memory(exc: BaseException) -> bool:
    """Return whether a GPU's or the host's memory was too small."""
    says_so = any(words in str(exc) for words in OUT_OF_MEMORY)
    return says_so or isinstance(exc, MemoryError | torch.OutOfMemoryError)


def end_with_broken_cuda() -> None:
    """End this process if CUDA failed in a way that fails all that follows in the process.

    Ray then starts another worker, and the trial is taken up again from its checkpoint.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        try:
            torch.cuda.synchronize()
        except RuntimeError as exc:
            logging.getLogger(__name__).error("CUDA is broken in this process: %s", exc)
            os._exit(1)
