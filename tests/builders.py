"""What several test modules build their cases from."""

from __future__ import annotations

import hashlib
import io
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import typer
import typer.testing
from torch import Tensor
from typer.testing import CliRunner, Result

from tune_cifar import dataset
from tune_cifar.cli.app import app
from tune_cifar.data.files import BATCHES_FOLDER, FILES, DataSource
from tune_cifar.data.load import TrainVal, load_train_val
from tune_cifar.errors import TuneCifarError
from tune_cifar.record.events import (
    EpochReported,
    Event,
    Header,
    SearchEnded,
    SearchResumed,
    Stage,
    TrialEnded,
    TrialStarted,
)
from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import (
    REPRODUCIBLE_FIELDS,
    DataInfo,
    EpochResult,
    Numerics,
    Status,
    TrainConfig,
)
from tune_cifar.search.driver import SearchDriver
from tune_cifar.space.layout import Budget, Fidelity, SamplerBudget
from tune_cifar.space.select import SearchSpace, load_space
from tune_cifar.tracking.address import make_tracking_uri
from tune_cifar.tracking.upload import BackgroundUploader
from tune_cifar.train import recorded
from tune_cifar.train.checkpoint import MAGIC
from tune_cifar.train.metrics import Evaluation, evaluate_logits
from tune_cifar.train.recorded import open_training, run_training
from tune_cifar.train.trainer import Trainer

ROOT = Path(__file__).parent.parent


# --- Configurations and budgets

# Four steps an epoch, as in make_config, of at most 8 images each.
FEW_IMAGES = {"batch_size": 8, "train_size": 30, "val_size": 10}
# Three epochs of two steps.
SMALL_KNOBS: dict[str, Any] = {"train_size": 20, "val_size": 20, "epochs": 3, "batch_size": 10}
# Diverges at the end of the second epoch (6 steps each), from each of six seeds.
EXPLODING_KNOBS: dict[str, Any] = {
    "schedule": "constant",
    "max_lr": 2.0,
    "weight_decay": 1.0,
    "train_size": 60,
}
# pct_start is pinned: the smallest value of its range would give no warm-up in so few steps.
SMALL_SEARCH = {"train_size": 120, "val_size": 60, "batch_size": 5, "pct_start": 0.3}


def make_config(**changes: Any) -> TrainConfig:
    """A small s7 training: 2 epochs of 4 steps of 16 images, with every op of the augmentation."""
    values: dict[str, Any] = {
        "model": "s7",
        "optimizer": "sgd",
        "schedule": "onecycle",
        "max_lr": 0.01,
        "batch_size": 16,
        "epochs": 2,
        "train_size": 60,
        "val_size": 50,
        "dropout": 0.05,
        "hflip_p": 0.3,
        "shift_scale_rotate_p": 0.5,
        "shift_limit": 0.1,
        "scale_limit": 0.1,
        "rotate_limit": 30.0,
        "cutout_p": 0.5,
        "cutout_size": 16,
        "gray_p": 0.5,
    }
    return TrainConfig(**{**values, **changes})


def make_budget(
    rungs: tuple[int, ...],
    fidelity: Fidelity = "cycles",
    reduction_factor: int = 3,
    trials: int = 9,
    max_time_seconds: float | None = None,
) -> Budget:
    return Budget(
        trials=trials,
        fidelity=fidelity,
        rungs=rungs,
        reduction_factor=reduction_factor,
        sampler=SamplerBudget(kind="random"),
        seed=0,
        max_time_seconds=max_time_seconds,
    )


def make_space(trials: int = 9, **changes: Any) -> SearchSpace:
    """The smoke space with rungs 1 and 3 of one schedule of three epochs, and no time limit."""
    budget = {"rungs": (1, 3), "fidelity": "epochs", "trials": trials, "reduction_factor": 3}
    knobs = {**SMALL_SEARCH, "epochs": 3}
    return load_smoke(knobs, **{**budget, **changes})


def load_smoke(knobs: dict[str, Any], **budget: Any) -> SearchSpace:
    """The smoke space with these pins and this part of its budget changed, and no time limit."""
    space = load_space("smoke", "cpu", knobs)
    changes = {"max_time_seconds": None, **budget}
    return replace(space, budget=space.budget.model_copy(update=changes))


# A space whose file has a bit of everything.
MINI = (ROOT / "tests" / "space" / "mini.yaml").read_text(encoding="utf-8")


# --- Records: the events of a search of s7 that never ran

CONFIG = TrainConfig(
    model="s7",
    optimizer="sgd",
    schedule="onecycle",
    max_lr=0.1,
    batch_size=64,
    epochs=3,
    train_size=500,
    val_size=100,
)
NUMERICS = Numerics(
    device="cpu",
    device_name="a processor",
    capability="AVX2",
    precision="fp32",
    memory_format="contiguous",
    threads=1,
    deterministic=False,
    execution="eager",
    versions={"torch": "2.15.0"},
)
CIFAR10 = DataInfo(name="cifar10", digest="d1", split_hash="h1")
SHAPES_INFO = DataInfo(name="shapes", digest="d0", split_hash="h0")


def make_header(name: str = "s7-1", **changes: Any) -> Header:
    """The header of a search of s7 on CIFAR-10."""
    values: dict[str, Any] = {
        "name": name,
        "kind": "search",
        "space": "s7",
        "tier": "full",
        "created": "2026-01-31T12:00:00+00:00",
        "seed": 1,
        "baseline": CONFIG.model_dump(mode="json"),
        "distributions": {"max_lr": "{}"},
        "budget": {"trials": 4, "rungs": [1, 2, 3]},
        "pinned": {},
        "space_text": "# s7\nsource: Übung\u2028\n",
        "data": CIFAR10,
        "numerics": NUMERICS,
        "environment": {"git_commit": "abc"},
        "command": "tune_cifar search --space s7",
    }
    return Header(**{**values, **changes})


def make_resume(trials: int = 9) -> SearchResumed:
    """An hour after make_header, from another commit."""
    return SearchResumed(
        time="2026-01-31T13:00:00+00:00",
        trials=trials,
        changes=[],
        numerics=NUMERICS,
        environment={"git_commit": "def"},
        command="tune_cifar search",
    )


def make_start(number: int, config: TrainConfig = CONFIG, **changes: Any) -> TrialStarted:
    """The start of a trial: 0 is the baseline, the others are the sampler's."""
    values: dict[str, Any] = {
        "trial": number,
        "origin": "baseline" if number == 0 else "sampler",
        "params": {"max_lr": config.max_lr},
        "config": config.model_dump(mode="json"),
        "fingerprint": config.fingerprint,
    }
    return TrialStarted(**{**values, **changes})


def make_result(epoch: int, val_acc: float | None = 0.5, **changes: float) -> EpochResult:
    """The result of an epoch of CONFIG, whose epochs have 8 steps."""
    values: dict[str, Any] = {
        "epoch": epoch,
        "step": 8 * epoch,
        "train_loss": 1.5,
        "train_acc": 0.4,
        "val_loss": None if val_acc is None else 1.25,
        "val_acc": val_acc,
        "lr": 0.1,
        "epoch_seconds": 2.0,
        "images_per_second": 250.0,
        "peak_memory_mb": 300.0,
    }
    return EpochResult(**{**values, **changes})


def make_trial(
    number: int, accs: list[float | None], status: str | None, config: TrainConfig = CONFIG
) -> list[Event]:
    """All events of a trial with these validation accuracies; it still runs if `status` is None."""
    events: list[Event] = [make_start(number, config)]
    for epoch, acc in enumerate(accs, 1):
        events.append(EpochReported(trial=number, result=make_result(epoch, acc)))
    if status is None:
        return events
    error_file = f"trials/{number:04d}/error.txt" if status == "failed" else None
    return [*events, make_end(number, status, accs, error_file=error_file)]


# The validation accuracies of a trial's stages, by the length of the stage in epochs.
STAGE_ACCS = {1: [0.5], 2: [0.2, 0.6], 3: [0.1, 0.3, 0.7]}


def make_staged_trial(
    number: int, stage_accs: dict[int, list[float]], status: str | None, **ending: Any
) -> list[Event]:
    """All events of a trial of CONFIG with these stages; it still runs if `status` is None.

    Args:
        stage_accs: the validation accuracies of each stage, by its length in epochs.
        ending: fields of its TrialEnded.
    """
    events: list[Event] = [make_start(number)]
    for stage, accs in stage_accs.items():
        for epoch, acc in enumerate(accs, 1):
            result = make_result(epoch, acc)
            events.append(EpochReported(trial=number, result=result, cycle=stage))
    if status is None:
        return events
    last = list(stage_accs)[-1] if stage_accs else None
    accs = [] if last is None else stage_accs[last]
    return [*events, make_end(number, status, accs, **{"cycle": last, **ending})]


def make_end(number: int, status: Any, accs: list[Any], **changes: Any) -> TrialEnded:
    """The end of a trial whose last stage had these validation accuracies."""
    score = {"complete": accs[-1] if accs else None, "diverged": 0.1}.get(status)
    values = {"score": score, "reason": f"it {status}", **changes}
    return TrialEnded(trial=number, status=status, **values)


EVENTS = [
    *make_trial(0, [0.3, 0.5, 0.7], "complete"),
    *make_trial(1, [0.2], "stopped"),
    *make_trial(2, [], "diverged"),
    *make_trial(3, [0.4, 0.6], "failed"),
    *make_trial(4, [0.4, 0.6, 0.8], "complete"),
    *make_trial(5, [0.35], None),
]
# Trials 1 and 5 have one score, and 1 started after 2.
TRIALS = [
    *make_trial(0, [0.3, 0.5, 0.7], "complete"),
    *make_trial(2, [0.2], "stopped"),
    *make_trial(1, [0.4, 0.6, 0.8], "complete"),
    *make_trial(3, [], "diverged"),
    *make_trial(4, [0.9, 0.9], "failed"),
    *make_trial(5, [0.4, 0.6, 0.8], "complete"),
    *make_trial(6, [0.35], None),
]
SEARCH_FINISHED = SearchEnded(reason="all trials", wall_seconds=60.0)
SEARCH_INTERRUPTED = SearchEnded(reason="interrupted", wall_seconds=60.0)


def write_record(storage: Path, header: Header, events: list[Event]) -> SearchState:
    """Write a search on disk by the Record itself."""
    with Record.create(search_folder(storage, header.name), header) as record:
        for event in events:
            record.append(event)
        return record.state


def write_search(
    storage: Path, name: str, day: int, events: list[Event], **changes: Any
) -> SearchState:
    """Write a search that was created on a day of January."""
    created = f"2026-01-{day:02d}T12:00:00+00:00"
    return write_record(storage, make_header(name, created=created, **changes), events)


@dataclass
class PastTrial:
    """A recorded trial, with what a sampler reads of record.TrialState."""

    number: int
    params: dict[str, Any]
    status: Status = "running"
    score: float | None = None
    scores: dict[int, float] = field(default_factory=dict)


# --- Records of failed trials

TRACEBACK_MESSAGE = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 1 MiB left.\nSee the docs."
)
OUT_OF_MEMORY = f"""\
Traceback (most recent call last):
  File "/x/.venv/lib/tune_cifar/train/trainer.py", line 131, in _train_step
    logits = self.model(images)
  File "/x/tune_cifar/.venv/lib/python3/site-packages/torch/nn.py", line 9, in forward
    return f(x)
torch.OutOfMemoryError: {TRACEBACK_MESSAGE}
"""


def make_failed_trial(
    number: int, text: str | None, storage: Path, before: list[Event] | None = None
) -> list[Event]:
    """All events of a failed trial of s7-1; writes its error file unless `text` is None.

    Args:
        before: events between its start and its end.
    """
    error_file = f"trials/{number:04d}/error.txt"
    path = search_folder(storage, "s7-1") / error_file
    if text is not None:
        path.parent.mkdir(parents=True)
        path.write_text(text)
    reason = "ValueError: 3 channels"
    end = make_end(number, "failed", [], reason=reason, error_file=error_file)
    return [make_start(number), *(before or []), end]


def write_failures(storage: Path, make_events: Callable[[], list[Event]]) -> SearchState:
    """Write a search whose events are made, with their error files, once it has a folder."""
    with Record.create(search_folder(storage, "s7-1"), make_header()) as record:
        for event in make_events():
            record.append(event)
        return record.state


# --- Small trainings on synthetic data

SHAPES = DataSource("shapes", None)


def curve(results: list[EpochResult]) -> list[dict[str, Any]]:
    """The part of the results that must be the same bit for bit."""
    return [{name: getattr(result, name) for name in REPRODUCIBLE_FIELDS} for result in results]


def train_here(config: TrainConfig, data: TrainVal, numerics: Numerics) -> list[dict[str, Any]]:
    """Train in this process; returns the curve."""
    return curve(list(Trainer(config, data, numerics)))


def open_small(
    storage: Path,
    numerics: Numerics,
    name: str | None = "small",
    resume: bool = False,
    source: DataSource = SHAPES,
    **knobs: Any,
) -> tuple[Record, TrainVal]:
    """Open a training of SMALL_KNOBS as the command does."""
    space = load_space("smoke", "full", {**SMALL_KNOBS, **knobs})
    return open_training(space, source, numerics, storage, name, "test", resume)


def ignore_event(state: SearchState, event: Event) -> None:
    """Do nothing: a listener."""


def train_small(
    storage: Path, numerics: Numerics, name: str = "small", **knobs: Any
) -> SearchState:
    """Run a training of SMALL_KNOBS to its end; returns what is on disk then."""
    record, data = open_small(storage, numerics, name, **knobs)
    with record:
        run_training(record, data, numerics, ignore_event)
    return read_state(search_folder(storage, name))


def interrupt_small(storage: Path, numerics: Numerics, epoch: int, **knobs: Any) -> None:
    """Run a training of SMALL_KNOBS and press Ctrl-C when it reports this epoch."""

    def press_ctrl_c(state: SearchState, event: Event) -> None:
        if isinstance(event, EpochReported) and event.result.epoch == epoch:
            raise KeyboardInterrupt

    record, data = open_small(storage, numerics, **knobs)
    with record, pytest.raises(KeyboardInterrupt):
        run_training(record, data, numerics, press_ctrl_c)


def make_checkpoint(epoch: int) -> dict[str, Any]:
    """The content of a checkpoint, as small as it may be."""
    model = {"weight": torch.arange(6.0).reshape(2, 3)}
    return {"epoch": epoch, "model": model, "results": [{"lr": 0.1}]}


def write_payload(path: Path, payload: bytes) -> None:
    """Write a checkpoint with the right checksum, whatever its content."""
    path.write_bytes(MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


class RunsCommand:
    """Runs `touch <path>` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def make_hostile(mark: Path) -> bytes:
    """A torch archive that would create the file `mark` if its pickle were loaded."""
    buffer = io.BytesIO()
    torch.save({"epoch": RunsCommand(mark)}, buffer)
    return buffer.getvalue()


def make_data_files(folder: Path, names: tuple[str, ...] = tuple(FILES)) -> Path:
    """Files of CIFAR-10 with the right names and sizes, full of zeros (sparse: no disk used)."""
    (folder / BATCHES_FOLDER).mkdir(parents=True)
    for name in names:
        with (folder / BATCHES_FOLDER / name).open("wb") as file:
            file.truncate(FILES[name][1])
    return folder


# --- Evaluations

CIFAR10_CLASSES = dataset.CIFAR10.class_names


def make_logits(predicted: list[int], confidences: list[float]) -> Tensor:
    """Logits that predict these classes with these confidences; the other nine are equal."""
    probabilities = torch.empty(len(predicted), 10, dtype=torch.float64)
    for row, (label, confidence) in enumerate(zip(predicted, confidences, strict=True)):
        probabilities[row] = (1 - confidence) / 9
        probabilities[row, label] = confidence
    return probabilities.log().float()


def evaluate_answers(
    predicted: list[int], labels: list[int], confidence: float | list[float] = 0.9
) -> Evaluation:
    """Evaluate these predictions on validation images with these labels."""
    confidences = confidence if isinstance(confidence, list) else [confidence] * len(labels)
    logits = make_logits(predicted, confidences)
    return evaluate_logits(logits, torch.tensor(labels), CIFAR10_CLASSES, "validation")


def make_grey_images(num_images: int) -> Any:
    """Images (N, 32, 32, 3) of uint8, the n-th of the grey n everywhere."""
    greys = np.arange(num_images, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(greys, (num_images, 32, 32, 3))


# --- Searches without Ray

Scores = Callable[[TrialState, int], float]
"""A trial's made-up accuracy at the end of a stage of this length."""


FEW = ("schedule", "max_lr", "dropout", "pct_start", "div_factor", "final_div_factor")


def score_by_lr(trial: TrialState, stage: int) -> float:
    """Best at max_lr 0.05; better after a longer training; nothing else matters."""
    return 0.8 - 0.2 * abs(math.log10(trial.full_config.max_lr / 0.05)) - 0.1 / stage


def simulate_search(
    storage: Path,
    num_trials: int,
    score: Scores = score_by_lr,
    diverging: int | None = None,
    name: str = "smoke",
) -> SearchState:
    """Record a search of smoke with stages of 1 and 3 epochs, one trial at a time, untrained.

    Args:
        name: of another space with these stages, such as s8. Of its hyperparameters only FEW are
            searched.
    """
    space = load_space(name, "cpu")
    few = {knob: found for knob, found in space.distributions.items() if knob in FEW}
    points = tuple({knob: point[knob] for knob in few} for point in space.points)
    space = replace(space, distributions=few, points=points)
    sampler = SamplerBudget(kind="tpe", startup=5)
    budget = {"trials": num_trials, "max_time_seconds": None, "sampler": sampler}
    space = replace(space, budget=space.budget.model_copy(update=budget))
    header = recorded.make_header("search", "x", space, 3, CIFAR10, NUMERICS, "test")
    driver = SearchDriver(Record.create(search_folder(storage, "x"), header), space, ignore_event)
    while (trial := driver.ask()) is not None:
        if trial.number == diverging:
            driver.end(trial.number, "diverged", "the loss must be finite")
            continue
        for stage, epoch in ((1, 1), (3, 1), (3, 2), (3, 3)):
            acc = score(trial, stage) if epoch == stage else 0.2
            if not driver.report(trial.number, Stage(stage), make_result(epoch, acc)):
                break
    driver.finish()
    driver.record.close()
    return read_state(driver.record.state.folder)


def make_stages_driver(
    storage: Path, numerics: Numerics, name: str = "c", **budget: Any
) -> SearchDriver:
    """A driver whose trials have stages of 1, 2 and 3 epochs; half of them are promoted."""
    space = make_space(rungs=(1, 2, 3), fidelity="cycles", reduction_factor=2, **budget)
    header = recorded.make_header("search", name, space, 0, SHAPES_INFO, numerics, "test")
    return SearchDriver(Record.create(search_folder(storage, name), header), space, ignore_event)


def make_tiny_driver(
    storage: Path,
    numerics: Numerics,
    rungs: tuple[int, ...],
    fidelity: str = "cycles",
    replicates: int = 1,
    **knobs: Any,
) -> SearchDriver:
    """A driver of one trial, the baseline, that really trains in stages, 2 steps an epoch."""
    tiny = {"train_size": 10, "val_size": 10, "batch_size": 5, "epochs": rungs[-1]}
    warm_up = {"pct_start": 0.9} if "schedule" not in knobs else {}
    budget = {"rungs": rungs, "fidelity": fidelity, "replicates": replicates, "trials": 1}
    space = load_smoke({**tiny, **warm_up, **knobs}, **budget)
    data = load_train_val(SHAPES, space.baseline.train_size, space.baseline.val_size)
    header = recorded.make_header("search", "c", space, 0, data.info, numerics, "test")
    return SearchDriver(Record.create(search_folder(storage, "c"), header), space, ignore_event)


def run_trials(
    driver: SearchDriver, numerics: Numerics, num_steps: int = 1000, is_last_recorded: bool = True
) -> None:
    """Run the driver's trials in this process, by the adapters that Ray would call.

    Args:
        num_steps: number of epochs after which driver and worker die.
        is_last_recorded: whether the driver still records the last of them.
    """
    how = numerics.model_dump(mode="json")
    fixed = {"source": ("shapes", None), "numerics": how, "gpus": 0.0}
    # Tests that need no Ray run where there is none.
    from tune_cifar.search.adapters import TuneScheduler, TuneSearcher
    from tune_cifar.search.worker import TrialWorker  # isort: split
    from ray.tune.schedulers import TrialScheduler

    searcher, scheduler = TuneSearcher(driver, fixed), TuneScheduler(driver)
    while isinstance(task := searcher.suggest("t"), dict):
        worker, is_running = object.__new__(TrialWorker), True
        worker.setup(task)
        while is_running:
            if num_steps == 0:
                return
            message, num_steps = worker.step(), num_steps - 1
            if num_steps or is_last_recorded:
                decision = scheduler.on_trial_result(None, None, message)
                is_running = decision == TrialScheduler.CONTINUE


# --- Tracking

WEIGHTS_FILE = "trials/0001/weights.safetensors"


def make_events(reason: str = "all trials") -> list[Event]:
    """A search with a trial of every status; trial 1 is the best and keeps its weights."""
    return [
        *make_trial(0, [0.3, 0.5, 0.7], "complete"),
        *make_trial(1, [0.4, 0.6, 0.8], None),
        make_end(1, "complete", [0.8], reason="all epochs", weights_file=WEIGHTS_FILE),
        *make_trial(2, [0.2], "stopped"),
        *make_trial(3, [0.1], "diverged"),
        *make_trial(4, [], "failed"),
        SearchEnded(reason=reason, wall_seconds=60.0),
    ]


class UploadingDriver:
    """Records events and reports them to an uploader, as a search's driver does.

    Attributes:
        uploader: may be closed and replaced.
    """

    def __init__(self, storage: Path, uri: str, **header: Any) -> None:
        self.storage, self.uri = storage, uri
        self.record = Record.create(search_folder(storage, "s7-1"), make_header(**header))
        for number in (1, 4):
            (self.folder / f"trials/{number:04d}").mkdir(parents=True)
        (self.folder / WEIGHTS_FILE).write_bytes(b"the best weights")
        (self.folder / "trials/0004/error.txt").write_text("Traceback: it broke\n")
        self.uploader = BackgroundUploader(uri, storage, self.record.state)

    @property
    def folder(self) -> Path:
        return self.record.state.folder

    def report(self, *events: Event) -> None:
        """Append the events to the record and pass them to the uploader."""
        for event in events:
            self.record.append(event)
            self.uploader.on_event(self.record.state, event)

    def resume(self) -> None:
        """Do what another driver does first."""
        self.record.append(make_resume(5))
        self.uploader = BackgroundUploader(self.uri, self.storage, self.record.state)


@contextmanager
def open_driver(storage: Path, uri: str | None = None, **header: Any) -> Iterator[UploadingDriver]:
    driver = UploadingDriver(storage, uri or make_tracking_uri(storage, None), **header)
    try:
        yield driver
    finally:
        driver.record.close()
        if not driver.uploader._is_closing:
            driver.uploader.close(600)
        driver.uploader._thread.join(600)


def upload_events(
    storage: Path, uri: str, events: list[Event], timeout: float = 600.0, **header: Any
) -> list[str]:
    """Record the events and upload them, as the driver does; returns the uploader's faults."""
    with open_driver(storage, uri, **header) as driver:
        driver.report(*events)
        return driver.uploader.close(timeout)


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# --- Commands

TINY_SETTINGS = [
    f"--set={setting}" for setting in ("train_size=20", "val_size=10", "batch_size=10", "epochs=3")
]
SEARCH_WORDS = ("search", "--space", "smoke", "--data", "shapes", "--tier", "cpu")
SMALL_SETTINGS = tuple(f"--set={name}={value}" for name, value in SMALL_SEARCH.items())


def invoke(*words: str) -> Result:
    """Run a command in this process, as if it had been typed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tune_cifar", *words])
        return CliRunner().invoke(app, words)


def refuse(kind: type[TuneCifarError], *words: str) -> str:
    """Run a command that must fail with this error; returns its sentence."""
    answer = invoke(*words)
    assert type(answer.exception) is kind, (answer.exception, answer.output)
    sentence = str(answer.exception)
    assert "\n" not in sentence and sentence[-1] in ".?)"
    return sentence


def run_in_a_process(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, in a folder with a run store of its own (default: here)."""
    command = [sys.executable, "-m", "tune_cifar", *words]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if folder is not None:
        environment["TUNE_CIFAR_RUNS"] = str(folder / "runs")
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment
    )


def list_commands() -> dict[str, click.Command]:
    """Every command by its full name, such as `spaces list`."""
    found: dict[str, click.Command] = {}

    def walk(command: Any, words: list[str]) -> None:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                if not inner.hidden:
                    walk(inner, [*words, name])
        else:
            found[" ".join(words)] = command

    walk(typer.main.get_command(app), [])
    return found


COMMANDS = list_commands()


def make_train_words(workplace: Path, name: str, *more: str) -> list[str]:
    """A training on synthetic data whose MLflow store cannot be reached."""
    words = ["train", "--space", "smoke", "--tier", "cpu", "--data", "shapes"]
    words += ["--precision", "fp32", *TINY_SETTINGS, "--name", name]
    unreachable = f"sqlite:///{workplace}/no/such/folder/mlflow.db"
    return [*words, "--tracking-uri", unreachable, *more]


# --- A file system without locks

NO_FLOCK = (
    "#include <errno.h>\nint flock(int f, int o) { (void)f; (void)o; errno = %d; return -1; }"
)


def make_lockless(folder: Path, number: int) -> Path:
    """Return a library that, preloaded, lets every flock of a process fail with this errno."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here: flock cannot be made to fail")
    source, library = folder / "no_flock.c", folder / "no_flock.so"
    source.write_text(NO_FLOCK % number, encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


class StoppedClock(datetime):
    """A clock that stands: two names of one second."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> StoppedClock:
        return cls(2026, 1, 2, 3, 4, 5)
