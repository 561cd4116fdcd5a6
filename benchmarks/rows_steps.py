"""The steps of benchmarks/rows.py: how far each is, and the commands that finish it."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune_cifar.data.load import CIFAR10_DIGEST
from tune_cifar.data.shapes import SHAPES_DIGEST
from tune_cifar.dataset import CIFAR10
from tune_cifar.errors import RecordError
from tune_cifar.record.files import write_atomically
from tune_cifar.record.journal import RECORD_FILE, read_state
from tune_cifar.record.machine import count_cores
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.record.test_log import (
    TEST_LOG_FILE,
    TestEvaluation,
    add_test_evaluations,
    find_test_evaluations,
    find_test_log,
    load_test_log,
)
from tune_cifar.schema import DataInfo, TrainConfig, inactive_knobs
from tune_cifar.search.forecast import forecast_search
from tune_cifar.space.select import load_space
from tune_cifar.train.numerics import count_gpus
from tune_cifar.verify.confirm import make_final

TOP = 3  # candidates of a confirmation beside the baseline
# Without a GPU a search has the tier night, whose trials see a third of the epochs. Its best trials
# are confirmed with a quarter of the recipe's epochs, more than a night's first rungs.
NIGHT, CONFIRMED_FRACTION = "night", 4
OVER = ("done", "diverged")


@dataclass(frozen=True)
class Step:
    """A step of a space's row.

    Attributes:
        part: baseline, search, confirm or best.
        seed: that of a single training; None for a search and a confirmation.
    """

    space: str
    part: str
    seed: int | None = None


@dataclass(frozen=True)
class Queue:
    """The options of all steps; `pins` are the knobs of --set."""

    storage: Path
    seeds: int = 5
    data: str | None = None
    tier: str = "full"
    pins: dict[str, Any] = field(default_factory=dict)
    accept_changes: bool = False

    @property
    def search_tier(self) -> str:
        """Tier of the searches: the queue's, or without a GPU `night` in place of `full`."""
        return NIGHT if self.tier == "full" and not count_gpus("auto") else self.tier

    @property
    def is_synthetic(self) -> bool:
        return (self.data or os.environ.get("TUNE_CIFAR_DATA")) == "shapes"

    @property
    def data_info(self) -> DataInfo:
        """Which data; the test set does not depend on their split."""
        if self.is_synthetic:
            return DataInfo(name="shapes", digest=SHAPES_DIGEST, split_hash="")
        return DataInfo(name="cifar10", digest=CIFAR10_DIGEST, split_hash="")

    @property
    def test_log(self) -> Path:
        return find_test_log(self.storage)

    @property
    def table(self) -> Path:
        """ROWS.csv: in analysis/, on synthetic data in the run store."""
        return (self.storage if self.is_synthetic else Path("analysis").resolve()) / "ROWS.csv"

    def copy_test_log(self) -> None:
        """Add what the run store's log has on CIFAR-10 to the committed copy in analysis/."""
        on_cifar10 = [found for found in load_test_log(self.test_log) if found.data == "cifar10"]
        add_test_evaluations(self.table.with_name(TEST_LOG_FILE), on_cifar10)

    def exchange_records(self, steps: Iterable[Step]) -> None:
        """Copy ended searches and confirmations to the committed ones; put back what is missing.

        So a row that takes days goes on in a fresh clone. Weights are not kept.
        """
        for step in steps:
            if step.seed is not None:
                continue
            name = self.name(step)
            ours = search_folder(self.storage, name) / RECORD_FILE
            committed = self.table.with_name("rows") / f"{name}.jsonl"
            if ours.exists() and not committed.exists() and find_stage(self, step) == "done":
                write_atomically(committed, ours.read_bytes())
            elif committed.exists() and not ours.exists():
                write_atomically(ours, committed.read_bytes())

    def list_steps(self, spaces: Iterable[str]) -> list[Step]:
        """Return all steps of these spaces, in order."""
        steps = []
        seeds = range(1, self.seeds + 1)
        for space in spaces:
            steps += [Step(space, "baseline", seed) for seed in seeds]
            steps += [Step(space, "search"), Step(space, "confirm")]
            steps += [Step(space, "best", seed) for seed in seeds]
        return steps

    def name(self, step: Step) -> str:
        """Return the name of the step's record; `confirm` names a confirmation's the same."""
        prefix = "shapes-rows" if self.is_synthetic else "rows"
        part = "" if step.part == "search" else f"-{step.part}"
        seed = "" if step.seed is None else f"-{step.seed}"
        return f"{prefix}-{step.space}{part}{seed}"

    def read(self, step: Step) -> SearchState | None:
        """Return the state of the step's record; None before there is one."""
        folder = search_folder(self.storage, self.name(step))
        return read_state(folder) if folder.exists() else None

    def find_test_evaluation(self, config: TrainConfig) -> TestEvaluation | None:
        """Return the first test evaluation of a training of this config."""
        found = find_test_evaluations(self.storage, config.fingerprint, self.data_info)
        return found[0] if found else None


def find_settings(queue: Queue, step: Step) -> dict[str, Any] | None:
    """Return a training's settings that differ from its tier; None before the best is known."""
    if step.part == "baseline":
        return {**CIFAR10.all_images, "seed": step.seed, **queue.pins}
    search, confirmation = (queue.read(Step(step.space, part)) for part in ("search", "confirm"))
    if search is None or confirmation is None or not confirmation.is_finished:
        return None
    _, final = make_final(search, confirmation, queue.seeds)
    usual = load_space(step.space, queue.tier).baseline.model_dump(mode="json")
    wanted = {**final.candidates[-1].config, "seed": step.seed, "epochs": usual["epochs"]}
    wanted |= queue.pins
    changed = {name: value for name, value in wanted.items() if value != usual[name]}
    inactive = inactive_knobs(TrainConfig(**wanted))  # refused by --set
    return {name: value for name, value in changed.items() if name not in inactive}


def find_config(queue: Queue, step: Step) -> TrainConfig | None:
    """Return the config of a single training; None before the best is known."""
    settings = find_settings(queue, step)
    return None if settings is None else load_space(step.space, queue.tier, settings).baseline


def find_stage(queue: Queue, step: Step) -> str:
    """Return done, diverged (an end, too), failed, unfinished or not begun, from log and record.

    Raises:
        RecordError: when a record has another recipe than would be trained now.
    """
    state = queue.read(step)
    if step.seed is None:
        if state is None:
            return "not begun"
        return "done" if state.is_finished else "unfinished"
    config = find_config(queue, step)
    if config is None:
        return "not begun"
    if queue.find_test_evaluation(config):
        return "done"
    if state is None:
        return "not begun"
    name, recorded = state.header.name, TrainConfig(**state.header.baseline).fingerprint
    if recorded != config.fingerprint:
        rule = f"the recipe must be that of {step.space} now, {config.fingerprint}, got {recorded}"
        raise RecordError(f"{name}: {rule}. Delete it: python -m tune_cifar searches delete {name}")
    status = state.trials[0].status if state.trials else "running"
    return status if status in ("diverged", "failed") else "unfinished"


def find_commands(queue: Queue, step: Step) -> Iterator[list[str]]:
    """Yield the remaining commands of a step, each once the one before has succeeded."""
    name, state = queue.name(step), queue.read(step)
    data = ["--data", queue.data] if queue.data else []
    resume = ["--resume", *(["--accept-changes"] if queue.accept_changes else [])]
    if step.part == "search":
        new = ["--space", step.space, "--tier", queue.search_tier, *_make_pins(queue.pins)]
        yield ["search", "--name", name, *(resume if state else new), *data]
    elif step.part == "confirm":
        search = queue.name(Step(step.space, "search"))
        new = ["--top", str(TOP), "--seeds", str(queue.seeds)]
        if queue.search_tier == NIGHT:
            new += ["--epochs", str(_count_confirmed_epochs(queue, step.space))]
        yield ["confirm", "--search", search, *(resume if state else new), *data]
    else:
        if state is None or not state.is_finished:
            words = ["--space", step.space, "--tier", queue.tier]
            words += _make_pins(find_settings(queue, step) or {})
            words += ["--name", name, "--cpus-per-trial", str(_choose_threads(state)), *data]
            yield ["train", *words, *(["--resume"] if state else [])]
        state = queue.read(step)
        if state is not None and state.trials[0].status == "complete":
            yield ["reproduce", f"{name}:0", "--test", "--no-retrain", *data]


def _count_confirmed_epochs(queue: Queue, space: str) -> int:
    return max(1, load_space(space, queue.tier, queue.pins).baseline.epochs // CONFIRMED_FRACTION)


def _make_pins(settings: dict[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words += ["--set", f"{name}={text}"]
    return words


def _choose_threads(state: SearchState | None) -> int:
    """All cores, or one beside a GPU; the recorded number when resuming, which needs the same."""
    if state is not None:
        return (state.resumes[-1] if state.resumes else state.header).numerics.threads
    return 1 if count_gpus("auto") else count_cores()


def estimate_hours(queue: Queue, steps: Iterable[Step]) -> float | None:
    """Estimate the hours that these steps of one space still take.

    At the mean speed of its single trainings so far; None before one of them has an epoch.
    """
    seconds: list[float] = []
    num_left = 0.0
    for step in steps:
        state = queue.read(step)
        trials = list(state.trials.values()) if state else []
        if step.seed is not None:
            for trial in trials:
                seconds += [result.epoch_seconds for _, result in trial.trained_epochs]
        if find_stage(queue, step) not in OVER:
            num_epochs: float = load_space(step.space, queue.tier, queue.pins).baseline.epochs
            if step.part == "search":
                space = load_space(step.space, queue.search_tier, queue.pins)
                budget = space.budget.model_copy(update={"max_time_seconds": None})
                num_epochs = forecast_search(budget, 1, 1.0).epochs.mean
            elif step.part == "confirm":
                if queue.search_tier == NIGHT:
                    num_epochs = _count_confirmed_epochs(queue, step.space)
                num_epochs *= (1 + TOP) * queue.seeds
            num_left += max(0.0, num_epochs - sum(trial.epochs_done for trial in trials))
    return num_left * statistics.fmean(seconds) / 3600 if seconds else None
