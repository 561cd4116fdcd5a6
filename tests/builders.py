"""Builders that several test modules share: configurations, records, small trainings, commands."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import typer
import typer.testing
from ray.tune.schedulers import TrialScheduler
from torch import Tensor
from typer.testing import CliRunner, Result

from tune_cifar.cli.app import app
from tune_cifar.data.files import BATCHES_FOLDER, FILES, DataSource
from tune_cifar.data.load import CLASS_NAMES, TrainVal, load_train_val
from tune_cifar.errors import (
    TuneCifarError,
)
from tune_cifar.record.events import (
    EpochReported,
    Event,
    Header,
    SearchEnded,
    SearchResumed,
    TrialEnded,
    TrialStarted,
)
from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.record.store import (
    search_folder,
)
from tune_cifar.schema import (
    REPRODUCIBLE_FIELDS,
    DataInfo,
    EpochResult,
    Numerics,
    Status,
    TrainConfig,
)
from tune_cifar.search.driver import SearchDriver
from tune_cifar.search.run import _Scheduler, _Searcher
from tune_cifar.search.worker import TrialWorker
from tune_cifar.space.layout import Budget, Fidelity, SamplerBudget
from tune_cifar.space.select import (
    SearchSpace,
    load_space,
)
from tune_cifar.tracking.upload import BackgroundUploader, make_tracking_uri
from tune_cifar.train import recorded
from tune_cifar.train.checkpoint import (
    MAGIC,
)
from tune_cifar.train.metrics import Evaluation, evaluate_logits
from tune_cifar.train.recorded import Listener, open_training, run_training
from tune_cifar.train.trainer import Trainer

SHAPES = DataSource("shapes", None)


def make_config(**changes: Any) -> TrainConfig:
    """A small s7 training: 4 steps of 16 images an epoch, 2 epochs, every op of the augmentation on."""
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


# Four steps an epoch, as the small config has, of 8 images or fewer.
FEW = {"batch_size": 8, "train_size": 30, "val_size": 10}


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
        "data": DataInfo(name="cifar10", digest="d1", split_hash="h1"),
        "numerics": NUMERICS,
        "environment": {"git_commit": "abc"},
        "command": "tune_cifar search --space s7",
    }
    return Header(**{**values, **changes})


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


def make_start(number: int, recipe: TrainConfig = CONFIG, **changes: Any) -> TrialStarted:
    """Trial 0 is the baseline, the others are the sampler's."""
    values: dict[str, Any] = {
        "trial": number,
        "origin": "baseline" if number == 0 else "sampler",
        "params": {"max_lr": recipe.max_lr},
        "config": recipe.model_dump(mode="json"),
        "fingerprint": recipe.fingerprint,
    }
    return TrialStarted(**{**values, **changes})


def make_trial(
    number: int, accs: list[float | None], status: str | None, config: TrainConfig = CONFIG
) -> list[Event]:
    """All events of a trial that reports these validation accuracies; no end when status is None."""
    events: list[Event] = [make_start(number, config)]
    events += [
        EpochReported(trial=number, result=make_result(epoch, acc))
        for epoch, acc in enumerate(accs, 1)
    ]
    if status is not None:
        score = {"complete": accs[-1] if accs else None, "diverged": 0.1}.get(status)
        ending: Any = {"trial": number, "status": status, "score": score, "reason": f"it {status}"}
        if status == "failed":
            ending["error_file"] = f"trials/{number:04d}/error.txt"
        events.append(TrialEnded(**ending))
    return events


def make_cycles(
    number: int, courses: dict[int, list[float]], status: Any, **ending: Any
) -> list[Event]:
    """All events of a trial of CONFIG that trains in cycles: the accuracies of each by its length; no end when status
    is None."""
    events: list[Event] = [make_start(number)]
    for cycle, accs in courses.items():
        results = [make_result(epoch, acc) for epoch, acc in enumerate(accs, 1)]
        events += [EpochReported(trial=number, result=result, cycle=cycle) for result in results]
    if status is not None:
        score = {
            "complete": list(courses.values())[-1][-1] if courses else None,
            "diverged": 0.1,
        }.get(status)
        values = {
            "cycle": list(courses)[-1] if courses else None,
            "score": score,
            "reason": f"it {status}",
            **ending,
        }
        events.append(TrialEnded(trial=number, status=status, **values))
    return events


COURSES = {1: [0.5], 2: [0.2, 0.6], 3: [0.1, 0.3, 0.7]}


def write_record(storage: Path, header: Header, events: list[Event]) -> SearchState:
    """A search on disk, written by the Record itself."""
    with Record.create(search_folder(storage, header.name), header) as record:
        for event in events:
            record.append(event)
        return record.state


EVENTS = [
    *make_trial(0, [0.3, 0.5, 0.7], "complete"),
    *make_trial(1, [0.2], "stopped"),
    *make_trial(2, [], "diverged"),
    *make_trial(3, [0.4, 0.6], "failed"),
    *make_trial(4, [0.4, 0.6, 0.8], "complete"),
    *make_trial(5, [0.35], None),
]


def make_resume(trials: int = 9) -> SearchResumed:
    return SearchResumed(
        time="2026-02-01T12:00:00+00:00",
        trials=trials,
        changes=[],
        numerics=NUMERICS,
        environment={},
        command="again",
    )


ROOT = Path(__file__).parent.parent
TINY = [
    f"--set={setting}" for setting in ("train_size=20", "val_size=10", "batch_size=10", "epochs=3")
]


def invoke(*words: str) -> Result:
    """Run a command in this process, as if it had been typed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tune_cifar", *words])
        return CliRunner().invoke(app, words)


def refuse(kind: type[TuneCifarError], *words: str) -> str:
    """Run a command that must be refused; returns its one sentence."""
    answer = invoke(*words)
    assert type(answer.exception) is kind, (answer.exception, answer.output)
    sentence = str(answer.exception)
    assert "\n" not in sentence and sentence[-1] in ".?)"
    return sentence


def run_in_a_process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    command = [sys.executable, "-m", "tune_cifar", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=environment, **options
    )


def list_commands() -> dict[str, click.Command]:
    """`spaces list` and its like, each with its command."""
    found: dict[str, click.Command] = {}

    def walk(command: Any, words: list[str]) -> None:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                walk(inner, [*words, name])
        else:
            found[" ".join(words)] = command

    walk(typer.main.get_command(app), [])
    return found


COMMANDS = list_commands()


def make_train_words(workplace: Path, name: str, *more: str) -> list[str]:
    """A training on the stand-in whose MLflow store cannot be reached."""
    dead = f"sqlite:///{workplace}/no/such/folder/mlflow.db"
    words = [
        "train",
        "--space",
        "smoke",
        "--tier",
        "cpu",
        "--data",
        "shapes",
        "--precision",
        "fp32",
        *TINY,
    ]
    return [*words, "--name", name, "--tracking-uri", dead, *more]


Scores = Callable[[TrialState, int], float]


def score_by_lr(trial: TrialState, cycle: int) -> float:
    """Best at max_lr 0.05; better after a longer training; nothing else matters."""
    return 0.8 - 0.2 * abs(math.log10(trial.full_config.max_lr / 0.05)) - 0.1 / cycle


def run_search(
    storage: Path, num_trials: int, score: Scores = score_by_lr, diverging: int | None = None
) -> SearchState:
    """A search of smoke in cycles of 1 and 3 epochs, one trial at a time, with made-up accuracies."""
    space = load_space("smoke", "cpu")
    space = replace(
        space,
        budget=space.budget.model_copy(update={"trials": num_trials, "max_time_seconds": None}),
    )
    header = recorded.make_header("search", "x", space, 3, CIFAR10, NUMERICS, "test")
    driver = SearchDriver(Record.create(search_folder(storage, "x"), header), space, ignore_event)
    while (trial := driver.ask()) is not None:
        if trial.number == diverging:
            driver.end(trial.number, "diverged", "the loss must be finite")
            continue
        told = ((cycle, epoch) for cycle in (1, 3) for epoch in range(1, cycle + 1))
        for cycle, epoch in told:
            acc = score(trial, cycle) if epoch == cycle else 0.2
            if not driver.report(trial.number, cycle, make_result(epoch, acc)):
                break
    driver.finish()
    driver.record.close()
    return read_state(driver.record.state.folder)


CIFAR10 = DataInfo(name="cifar10", digest="d1", split_hash="h1")


def curve(results: list[EpochResult]) -> list[dict[str, Any]]:
    """The part of the results that must come back bit for bit."""
    return [{name: getattr(result, name) for name in REPRODUCIBLE_FIELDS} for result in results]


def train_here(config: TrainConfig, data: TrainVal, numerics: Numerics) -> list[dict[str, Any]]:
    return curve(list(Trainer(config, data, numerics)))


SMALL: dict[str, Any] = {"train_size": 20, "val_size": 20, "epochs": 3, "batch_size": 10}
# Diverges at the end of the second epoch (6 steps each), from each of six seeds.
EXPLODING: dict[str, Any] = {
    "schedule": "constant",
    "max_lr": 2.0,
    "weight_decay": 1.0,
    "train_size": 60,
}


def open_small(
    storage: Path,
    numerics: Numerics,
    name: str | None = "small",
    resume: bool = False,
    source: DataSource = SHAPES,
    **changes: Any,
) -> tuple[Record, TrainVal]:
    """A training of 3 epochs of 2 steps, as the command opens it; `changes` are knobs."""
    space = load_space("smoke", "full", {**SMALL, **changes})
    return open_training(space, source, numerics, storage, name, "test", resume)


def ignore_event(state: SearchState, event: Event) -> None:
    """A listener."""


def train_small(
    storage: Path, numerics: Numerics, name: str = "small", **changes: Any
) -> SearchState:
    """A whole small training; what stands on disk afterwards."""
    record, data = open_small(storage, numerics, name, **changes)
    with record:
        run_training(record, data, numerics, ignore_event)
    return read_state(search_folder(storage, name))


def press_ctrl_c_after(epoch: int) -> Listener:
    """A listener that interrupts when it hears of this epoch."""

    def on_event(state: SearchState, event: Event) -> None:
        if isinstance(event, EpochReported) and event.result.epoch == epoch:
            raise KeyboardInterrupt

    return on_event


def interrupt_small(storage: Path, numerics: Numerics, epoch: int, **changes: Any) -> None:
    record, data = open_small(storage, numerics, **changes)
    with record, pytest.raises(KeyboardInterrupt):
        run_training(record, data, numerics, press_ctrl_c_after(epoch))


NAMES = CLASS_NAMES["cifar10"]


def make_logits(predicted: list[int], confidences: list[float]) -> Tensor:
    """Logits that answer with these classes, so surely; the other nine share the rest."""
    probabilities = torch.empty(len(predicted), 10, dtype=torch.float64)
    for row, (label, confidence) in enumerate(zip(predicted, confidences, strict=True)):
        probabilities[row] = (1 - confidence) / 9
        probabilities[row, label] = confidence
    return probabilities.log().float()


def evaluate_answers(
    predicted: list[int], labels: list[int], confidence: float | list[float] = 0.9
) -> Evaluation:
    confidences = confidence if isinstance(confidence, list) else [confidence] * len(labels)
    return evaluate_logits(
        make_logits(predicted, confidences), torch.tensor(labels), NAMES, "validation"
    )


def make_pictures(num_images: int) -> Any:
    """Each image in a grey of its own."""
    return np.broadcast_to(
        np.arange(num_images, dtype=np.uint8)[:, None, None, None], (num_images, 32, 32, 3)
    )


WEIGHTS_FILE = "trials/0001/weights.safetensors"


def make_events(reason: str = "all trials") -> list[Event]:
    """A search with a trial of every ending; trial 1 is the best and keeps its weights."""
    second = make_trial(1, [0.4, 0.6, 0.8], None)
    second.append(
        TrialEnded(
            trial=1, status="complete", score=0.8, reason="all epochs", weights_file=WEIGHTS_FILE
        )
    )
    return [
        *make_trial(0, [0.3, 0.5, 0.7], "complete"),
        *second,
        *make_trial(2, [0.2], "stopped"),
        *make_trial(3, [0.1], "diverged"),
        *make_trial(4, [], "failed"),
        SearchEnded(reason=reason, wall_seconds=60.0),
    ]


def make_tracking_resume() -> SearchResumed:
    """An hour after make_header."""
    changes: Any = {
        "trials": 5,
        "changes": [],
        "numerics": NUMERICS,
        "environment": {"git_commit": "def"},
    }
    return SearchResumed(time="2026-01-31T13:00:00+00:00", command="tune_cifar search", **changes)


class Driver:
    """Records events and tells an uploader of them, as a search's driver does. `uploader` may be closed and replaced."""

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

    def tell(self, *events: Event) -> None:
        for event in events:
            self.record.append(event)
            self.uploader.on_event(self.record.state, event)

    def resume(self) -> None:
        """What another driver does first."""
        self.record.append(make_tracking_resume())
        self.uploader = BackgroundUploader(self.uri, self.storage, self.record.state)


@contextmanager
def drive(storage: Path, uri: str | None = None, **header: Any) -> Iterator[Driver]:
    driver = Driver(storage, uri or make_tracking_uri(storage, None), **header)
    try:
        yield driver
    finally:
        driver.record.close()
        if not driver.uploader._is_closing:
            driver.uploader.close(600)
        driver.uploader._thread.join(600)


def ship(
    storage: Path, uri: str, events: list[Event], timeout: float = 600.0, **header: Any
) -> list[str]:
    """Record the events and hand them to an uploader, as the driver does; returns its faults."""
    with drive(storage, uri, **header) as driver:
        driver.tell(*events)
        return driver.uploader.close(timeout)


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


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


SHAPES_INFO = DataInfo(name="shapes", digest="d0", split_hash="h0")
FINISH = SearchEnded(reason="all trials", wall_seconds=60.0)
INTERRUPT = SearchEnded(reason="interrupted", wall_seconds=60.0)
TRIALS = [
    *make_trial(0, [0.3, 0.5, 0.7], "complete"),
    *make_trial(2, [0.2], "stopped"),
    *make_trial(1, [0.4, 0.6, 0.8], "complete"),
    *make_trial(3, [], "diverged"),
    *make_trial(4, [0.9, 0.9], "failed"),
    *make_trial(5, [0.4, 0.6, 0.8], "complete"),
    *make_trial(6, [0.35], None),
]


def write_search(
    storage: Path, name: str, day: int, events: list[Event], **changes: Any
) -> SearchState:
    """A search of January."""
    return write_record(
        storage, make_header(name, created=f"2026-01-{day:02d}T12:00:00+00:00", **changes), events
    )


TRACEBACK_MESSAGE = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 1 MiB left.\nSee the docs."
)
TRACEBACK_STEP = '  File "/x/.venv/lib/tune_cifar/train/trainer.py", line 131, in _train_step\n    logits = self.model(images)\n'
TRACEBACK_BELOW = '  File "/x/tune_cifar/.venv/lib/python3/site-packages/torch/nn.py", line 9, in forward\n    return f(x)\n'
OUT_OF_MEMORY = (
    f"Traceback (most recent call last):\n{TRACEBACK_STEP}{TRACEBACK_BELOW}"
    f"torch.OutOfMemoryError: {TRACEBACK_MESSAGE}\n"
)


def make_failed(
    number: int, text: str | None, storage: Path, before: list[Event] | None = None
) -> list[Event]:
    """A failed trial with its error file (without one: text is None)."""
    path = storage / "searches" / "s7-1" / "trials" / f"{number:04d}" / "error.txt"
    if text is not None:
        path.parent.mkdir(parents=True)
        path.write_text(text)
    start, *rest = make_trial(number, [], None)
    reason = "ValueError: 3 channels"
    file = f"trials/{number:04d}/error.txt"
    end = TrialEnded(trial=number, status="failed", reason=reason, error_file=file)
    return [start, *rest, *(before or []), end]


def write_failures(storage: Path, make_events: Any) -> SearchState:
    """A search whose trials have error files: the record makes the folder first."""
    with Record.create(storage / "searches" / "s7-1", make_header()) as record:
        for event in make_events():
            record.append(event)
        return record.state


# A pinned pct_start: in so few steps the smallest searched one would be no warm-up at all, and is refused.
SMALL_SEARCH = {"train_size": 400, "val_size": 200, "batch_size": 8, "pct_start": 0.3}


def make_space(trials: int = 9, **changes: Any) -> SearchSpace:
    """The smoke space with rungs 1 and 3 of one schedule of three epochs, and no time limit."""
    space = load_space("smoke", "cpu", {**SMALL_SEARCH, "epochs": 3})
    budget = {"rungs": (1, 3), "fidelity": "epochs", "trials": trials, "reduction_factor": 3}
    budget |= {"max_time_seconds": None, **changes}
    return dataclasses.replace(space, budget=space.budget.model_copy(update=budget))


def make_info(values: dict[str, Any]) -> Any:
    from tune_cifar.schema import DataInfo

    return DataInfo(**values)


def result_of(epoch: int, val_acc: float) -> EpochResult:
    """An epoch's result that says val_acc and nothing else of interest."""
    return EpochResult(
        epoch=epoch,
        step=epoch * 4,
        train_loss=1.0,
        train_acc=0.5,
        val_loss=1.0,
        val_acc=val_acc,
        lr=0.1,
        epoch_seconds=1.0,
        images_per_second=100.0,
        peak_memory_mb=100.0,
    )


def make_cycles_driver(storage: Path, numerics: Numerics, name: str = "c") -> SearchDriver:
    """A driver whose trials train 1, 2 and 3 epochs, each time from scratch; one in two goes on."""
    space = make_space(rungs=(1, 2, 3), fidelity="cycles", reduction_factor=2)
    info = make_info({"name": "shapes", "digest": "d", "split_hash": "s"})
    header = recorded.make_header("search", name, space, 0, info, numerics, "test")
    return SearchDriver(
        Record.create(search_folder(storage, name), header), space, lambda state, event: None
    )


def make_tiny_driver(
    storage: Path,
    numerics: Numerics,
    rungs: tuple[int, ...],
    fidelity: str = "cycles",
    **knobs: Any,
) -> SearchDriver:
    """A driver of one trial, the baseline, that really trains in cycles: 2 steps an epoch."""
    tiny = {"train_size": 10, "val_size": 10, "batch_size": 5, "epochs": rungs[-1]}
    warm_up = {"pct_start": 0.9} if "schedule" not in knobs else {}
    space = load_space("smoke", "cpu", {**tiny, **warm_up, **knobs})
    budget = {"rungs": rungs, "fidelity": fidelity, "trials": 1, "max_time_seconds": None}
    space = dataclasses.replace(space, budget=space.budget.model_copy(update=budget))
    data = load_train_val(SHAPES, space.baseline.train_size, space.baseline.val_size)
    header = recorded.make_header("search", "c", space, 0, data.info, numerics, "test")
    return SearchDriver(
        Record.create(search_folder(storage, "c"), header), space, lambda state, event: None
    )


def run_trials(
    driver: SearchDriver, numerics: Numerics, num_steps: int = 1000, is_last_heard: bool = True
) -> None:
    """Run the driver's trials in this process, by the very adapters that Ray would call.

    Args:
        num_steps: after so many epochs everything dies.
        is_last_heard: the driver has recorded the last of them by then.
    """
    fixed = {"source": ("shapes", None), "numerics": numerics.model_dump(mode="json")}
    searcher, scheduler = _Searcher(driver, fixed), _Scheduler(driver)
    while isinstance(task := searcher.suggest("t"), dict):
        worker, goes_on = object.__new__(TrialWorker), True
        worker.setup(task)
        while goes_on:
            if num_steps == 0:
                return
            word, num_steps = worker.step(), num_steps - 1
            if num_steps or is_last_heard:
                goes_on = scheduler.on_trial_result(None, None, word) == TrialScheduler.CONTINUE


def run_cli(folder: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, in an empty folder."""
    command = [sys.executable, "-m", "tune_cifar", *words]
    environment = os.environ | {"TUNE_CIFAR_RUNS": str(folder / "runs")}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=600, **options
    )


SEARCH = ("search", "--space", "smoke", "--data", "shapes", "--tier", "cpu")
SETTINGS = tuple(
    word for name, value in SMALL_SEARCH.items() for word in ("--set", f"{name}={value}")
)


@dataclass
class Past:
    """A recorded trial, as record.TrialState shows it."""

    number: int
    params: dict[str, Any]
    status: Status = "running"
    score: float | None = None
    scores: dict[int, float] = field(default_factory=dict)


def make_state(epoch: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "model": {"weight": torch.arange(6.0).reshape(2, 3)},
        "results": [{"lr": 0.1}],
    }


class Hostile:
    """Would run a command when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def write_payload(path: Path, payload: bytes) -> None:
    """A checkpoint whose checksum fits, whatever is in it."""
    path.write_bytes(MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def make_hostile(mark: Path) -> bytes:
    """A torch archive that would create `mark` if its pickle were obeyed."""
    buffer = io.BytesIO()
    torch.save({"epoch": Hostile(mark)}, buffer)
    return buffer.getvalue()


MINI = """\
space: mini
source: a test
published:
  accuracy: 0.5
  measured: nothing
corrects:
  - Nothing.
baseline:
  model: s7
  optimizer: sgd
  schedule: constant
  max_lr: 0.01
  batch_size: 128
  epochs: 4
  cutout_p: 0.5
  cutout_size: 8
search:
  max_lr: {low: 1.0e-4, high: 1, log: true}
  schedule: {choices: [constant, onecycle]}
  pct_start: {low: 0.1, high: 0.5}
  cutout_size: {low: 4, high: 16, step: 2}
  weight_decay: {choices: [0, 1e-4]}
points:
  - {max_lr: 0.1}
  - {schedule: onecycle, pct_start: 0.2, max_lr: 0.1}
budget:
  full:
    trials: 9
    rungs: [2, 4]
    reduction_factor: 3
    sampler: {kind: tpe, startup: 3}
    seed: 0
  cpu:
    trials: 8
    rungs: [1, 2]
    reduction_factor: 2
    sampler: {kind: random}
    seed: 0
    max_time: 90s
    set: {epochs: 2, train_size: 500, label_smoothing: 0}
    only: [max_lr, cutout_size]
"""


class RunsCommand:
    """Pickles into `os.system("touch <path>")`."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (self.command,))


def make_files(folder: Path, names: tuple[str, ...] = tuple(FILES)) -> Path:
    """Files of the right names and sizes, full of zeros (sparse: they take no room)."""
    (folder / BATCHES_FOLDER).mkdir(parents=True)
    for name in names:
        with (folder / BATCHES_FOLDER / name).open("wb") as file:
            file.truncate(FILES[name][1])
    return folder
