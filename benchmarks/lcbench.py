"""Simulated searches on LCBench: 34 data sets, 7 hyperparameters, trainings of 50 epochs.

The curves are those of YAHPO's surrogate of LCBench, a small network (Apache-2.0): a folder with
config_space.json, encoding.json and model.onnx, see docs/method.md. Nothing is trained. Its epoch 1
is the score before the training and 52 is a second scoring of the end: epoch n here is its n + 1.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

NUM_EPOCHS = 50
NUM_REFERENCE = 10_000
NUM_WORKERS = 4
# The order of the surrogate's numeric inputs, after `epoch`.
INPUTS = (
    "batch_size",
    "learning_rate",
    "momentum",
    "weight_decay",
    "num_layers",
    "max_units",
    "max_dropout",
)
Array = NDArray[np.float64]


class Completed(NamedTuple):
    """A training of full length.

    Attributes:
        paid: epochs of all trials by then.
        score: as it was reported, in percent.
        true: without noise, in percent.
    """

    paid: int
    score: float
    true: float


class Lcbench:
    """The surrogate.

    Args:
        folder: with config_space.json, encoding.json and model.onnx.
    """

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        text = (folder / "config_space.json").read_text(encoding="utf-8")
        entries = {entry["name"]: entry for entry in json.loads(text)["hyperparameters"]}
        text = (folder / "encoding.json").read_text(encoding="utf-8")
        self._codes = json.loads(text)["OpenML_task_id"]
        self.data_sets: tuple[str, ...] = tuple(entries["OpenML_task_id"]["choices"])
        self.distributions: dict[str, BaseDistribution] = {}
        for name in INPUTS:
            entry = entries[name]
            low, high, log = entry["lower"], entry["upper"], entry["log"]
            make = IntDistribution if entry["type"] == "uniform_int" else FloatDistribution
            self.distributions[name] = make(low, high, log=log)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", options)

    def train(self, data_set: str, configs: Sequence[dict[str, Any]]) -> Array:
        """Return the validation accuracy after each epoch, in percent (configs, NUM_EPOCHS)."""
        epochs = np.arange(2, NUM_EPOCHS + 2, dtype=np.float32)
        rows = np.empty((len(configs), NUM_EPOCHS, 1 + len(INPUTS)), np.float32)
        rows[:, :, 0] = epochs
        rows[:, :, 1:] = np.array([[c[name] for name in INPUTS] for c in configs])[:, None, :]
        return self._predict(data_set, rows.reshape(-1, rows.shape[-1])).reshape(-1, NUM_EPOCHS)

    def _predict(self, data_set: str, rows: NDArray[np.float32]) -> Array:
        codes = np.full((len(rows), 1), self._codes[data_set], np.int32)
        (found,) = self._session.run(None, {"x_cat": codes, "x_cont": rows})
        return np.asarray(found[:, 1], dtype=float)

    def draw(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Draw configurations at random."""
        random = np.random.default_rng(seed)
        columns = {name: _draw(found, count, random) for name, found in self.distributions.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def measure_reference(self, data_set: str) -> tuple[float, float]:
        """Return the median and the best of NUM_REFERENCE random full trainings, in percent."""
        configs = self.draw(NUM_REFERENCE, seed=0)
        rows = np.empty((NUM_REFERENCE, 1 + len(INPUTS)), np.float32)
        rows[:, 0] = NUM_EPOCHS + 1
        rows[:, 1:] = [[config[name] for name in INPUTS] for config in configs]
        scores = self._predict(data_set, rows)
        return float(np.median(scores)), float(scores.max())


def _draw(found: Any, count: int, random: np.random.Generator) -> list[Any]:
    """Draw values of one hyperparameter; an integer has the cell of width 1 around it."""
    is_int = isinstance(found.low, int)
    margin = 0.5 if is_int else 0.0
    low, high = found.low - margin, found.high + margin
    if found.log:
        values = np.exp(random.uniform(np.log(low), np.log(high), count))
    else:
        values = random.uniform(low, high, count)
    values = np.clip(np.rint(values) if is_int else values, found.low, found.high)
    return [int(value) if is_int else float(value) for value in values]


class Trial(NamedTuple):
    """A trial of a simulated search: trainings from scratch of these lengths, one after another.

    Attributes:
        first_epoch: of the first training; more than 1 where another trial has paid those before.
    """

    number: int
    params: dict[str, Any]
    stages: tuple[int, ...] = (NUM_EPOCHS,)
    first_epoch: int = 1


class Search(Protocol):
    """A search method: its sampler and its rule of early stopping."""

    def ask(self) -> Trial | None:
        """Return the next trial; None when there is none now."""

    def report(self, number: int, stage: int, epoch: int, score: float) -> bool:
        """Take in a trial's score after an epoch; return whether the trial goes on."""


class Noise(NamedTuple):
    """Noise of the reported scores: standard deviation in points, and seed."""

    deviation: float = 0.0
    seed: int = 0


NO_NOISE = Noise()


def simulate(
    search: Search, lcbench: Lcbench, data_set: str, num_epochs: int, noise: Noise = NO_NOISE
) -> list[Completed]:
    """Run a search with NUM_WORKERS trials at once until it has paid `num_epochs`.

    Every epoch takes the same time. Scores are reported as fractions.
    """
    random = np.random.default_rng(noise.seed)
    completed: list[Completed] = []
    running: list[_Running] = []
    paid = order = 0

    def fill(now: int) -> None:
        nonlocal order
        while len(running) < NUM_WORKERS and (trial := search.ask()) is not None:
            (curve,) = lcbench.train(data_set, [trial.params])
            seen = curve + random.normal(0.0, noise.deviation, NUM_EPOCHS)
            begin = (0, trial.first_epoch)
            heapq.heappush(running, _Running(now + 1, order, trial, *begin, curve, seen))
            order += 1

    fill(0)
    while running and paid < num_epochs:
        now, turn, trial, stage, epoch, curve, seen = heapq.heappop(running)
        paid += 1
        length = trial.stages[stage]
        score = float(seen[epoch - 1])
        goes_on = search.report(trial.number, length, epoch, min(max(score / 100, 0.0), 1.0))
        if length == epoch == NUM_EPOCHS:
            completed.append(Completed(paid, score, float(curve[-1])))
            goes_on = False
        if not goes_on:
            fill(now)
            continue
        following = (stage, epoch + 1) if epoch < length else (stage + 1, 1)
        heapq.heappush(running, _Running(now + 1, turn, trial, *following, curve, seen))
    return completed


def find_regrets(
    completed: Sequence[Completed], reference: tuple[float, float], num_trainings: int
) -> list[float]:
    """Return the regret after 1, 2, ... full trainings' epochs: 0 for the best, 100 for the median.

    It is that of the training with the best reported score; 100 while there is none.

    Args:
        reference: median and best of random full trainings.
    """
    median, best = reference
    regrets = []
    for num in range(1, num_trainings + 1):
        chosen = find_chosen(completed, num * NUM_EPOCHS)
        regret = 100.0 if chosen is None else 100.0 * (best - chosen) / (best - median)
        regrets.append(round(regret, 3))
    return regrets


class _Running(NamedTuple):
    """A trial that trains its next epoch; ordered by its end, then by the trial's start."""

    end: int
    turn: int
    trial: Trial
    stage: int
    epoch: int
    curve: Array
    seen: Array


def find_chosen(completed: Sequence[Completed], paid: int) -> float | None:
    """Return the true score of the best reported full training among those paid for by then."""
    known = [found for found in completed if found.paid <= paid]
    return max(known, key=lambda found: found.score).true if known else None
