"""Searches simulated on tables of real, noisy trainings: which sampler and which rungs find more.

    python benchmarks/real_tables.py train --space s8 [--configs 80] [--table FILE]
    python benchmarks/real_tables.py show --space s8 [--table FILE] [--searches 200]

`train` takes hours and can be resumed. It draws random configurations over all ranges of the
space's tier full (the first is the baseline) and trains each under two seeds from scratch over 1, 3
and 8 epochs of 6,000 images, evaluated on 2,000: the stages of a search with `fidelity: cycles`. A
row of the table is one training: {config, seed, epochs, params, val_acc, diverged, seconds}.

`show` simulates searches with our sampler and rung rule, two trials at once. Each proposal is
answered by the nearest configuration of the table that the search has not had yet, with the scores
of one of its two seeds; the sampler is told that configuration. The quality of what a search found
is the mean over both seeds at the last rung, so luck with a seed does not count. Intervals are 95 %
over searches, paired by their seed; they do not hold the table's own chance.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from trainings import NUM_WORKERS, Job, read_rows, run_jobs

from tune_cifar.schema import Status
from tune_cifar.search.gaussian_process import UnitCube
from tune_cifar.search.rungs import is_promoted, list_compared
from tune_cifar.search.sampler import Sampler
from tune_cifar.space.layout import SamplerBudget
from tune_cifar.space.select import SearchSpace, load_space

RUNGS, SEEDS = (1, 3, 8), (0, 1)
SIZES = {"epochs": RUNGS[-1], "train_size": 6000, "val_size": 2000}
CONFIG_SEED, SEARCH_STEP = 11, 1000
NUM_RESAMPLES = 2000
SHOWN = (60, 120, 180, 240)
"""Trial-epochs after which searches are compared: 80 configurations at random pay about 260."""
Array = NDArray[np.float64]


def choose(space: SearchSpace, kind: str, startup: int = 5, window: int | None = 9) -> SearchSpace:
    """Return the space with this sampler, rungs RUNGS and no points."""
    learns = kind in ("tpe", "gp")
    sampler = SamplerBudget.model_validate({"kind": kind, "startup": startup if learns else 0})
    update = {"rungs": RUNGS, "sampler": sampler, "window": window, "fidelity": "cycles"}
    return replace(space, budget=space.budget.model_copy(update=update), points=())


def train(arguments: argparse.Namespace) -> None:
    """Run the trainings that the table lacks, configuration after configuration."""
    space = choose(load_space(arguments.space, "full", SIZES), "random")
    sampler = Sampler(space, CONFIG_SEED)
    jobs = []
    for number in range(arguments.configs):
        params, _ = sampler.ask(number)
        config = space.config(params)
        for seed in SEEDS:
            for rung in RUNGS:
                short = config.model_copy(update={"seed": seed}).shorten(rung)
                key = {"config": number, "seed": seed, "epochs": rung}
                jobs.append(Job(key, short, {"params": params}))
    run_jobs(jobs, arguments.table)


class Table(NamedTuple):
    """The configurations with all their trainings.

    Attributes:
        places: in the unit cube (configs, hyperparameters).
        active: whether each is active (configs, hyperparameters).
        scores: (configs, seeds, rungs).
        diverged: in the longest training of a seed (configs, seeds).
    """

    params: list[dict[str, Any]]
    places: Array
    active: NDArray[np.bool_]
    scores: Array
    diverged: NDArray[np.bool_]


def make_table(space: SearchSpace, rows: Iterable[dict[str, Any]]) -> Table:
    """Gather the rows by configuration; those without all their trainings are left out."""
    found: dict[int, dict[tuple[int, int], dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["config"], {})[row["seed"], row["epochs"]] = row
    num_trainings = len(SEEDS) * len(RUNGS)
    whole = [jobs for _, jobs in sorted(found.items()) if len(jobs) == num_trainings]
    params = [jobs[SEEDS[0], RUNGS[0]]["params"] for jobs in whole]
    cube = UnitCube(space.distributions)
    scores = [[[jobs[seed, rung]["val_acc"] for rung in RUNGS] for seed in SEEDS] for jobs in whole]
    diverged = [[jobs[seed, RUNGS[-1]]["diverged"] for seed in SEEDS] for jobs in whole]
    active = [[name in each for name in space.distributions] for each in params]
    places = cube.locate(params)
    return Table(params, places, np.array(active), np.array(scores), np.array(diverged))


@dataclass
class Answered:
    """A configuration of the table in place of a proposal, as a trial that the sampler sees."""

    params: dict[str, Any]
    index: int
    seed: int
    status: Status = "running"
    scores: dict[int, float] = field(default_factory=dict)


def simulate(space: SearchSpace, table: Table, seed: int) -> Array:
    """Run one search; returns the true quality of its best trial after each paid epoch.

    As long as no trial is complete, it is that of the baseline.
    """
    sampler = Sampler(space, SEARCH_STEP * seed)
    random = np.random.default_rng(seed)
    cube, budget = UnitCube(space.distributions), space.budget
    truth = table.scores[:, :, -1].mean(axis=1)
    trials: list[Answered] = []
    arrivals: dict[int, list[float]] = {rung: [] for rung in RUNGS}
    running: list[tuple[int, int, int]] = []  # end, number, index of the rung
    quality, paid, best = np.full(SHOWN[-1] + 1, truth[0]), 0, (-1.0, 0)

    def start(now: int) -> None:
        number = len(trials)
        if number == len(table.params):
            return
        index = 0
        if number:
            params, _ = sampler.ask(number, trials)
            asked = np.array([name in params for name in space.distributions])
            # A knob that is active in one of the two alone is as far off as it can be.
            differences = np.where(
                table.active & asked, table.places - cube.locate([params]), table.active ^ asked
            )
            distances = (differences**2).sum(axis=1)
            distances[[trial.index for trial in trials]] = np.inf
            index = int(distances.argmin())
        trials.append(Answered(table.params[index], index, int(random.integers(len(SEEDS)))))
        heapq.heappush(running, (now + RUNGS[0], number, 0))

    for _ in range(NUM_WORKERS):
        start(0)
    while running and paid < SHOWN[-1]:
        now, number, rung_index = heapq.heappop(running)
        trial, rung = trials[number], RUNGS[rung_index]
        paid = min(paid + rung, SHOWN[-1])
        if rung == RUNGS[-1] and table.diverged[trial.index, trial.seed]:
            trial.status = "diverged"
            start(now)
            continue
        score = float(table.scores[trial.index, trial.seed, rung_index])
        trial.scores[rung] = score
        arrivals[rung].append(score)
        if rung == RUNGS[-1]:
            trial.status = "complete"
            best = max(best, (score, trial.index))
            quality[paid:] = truth[best[1]]
        elif number and not is_promoted(
            score, list_compared(arrivals[rung], budget.window), budget.reduction_factor
        ):
            trial.status = "stopped"
        else:
            heapq.heappush(running, (now + RUNGS[rung_index + 1], number, rung_index + 1))
            continue
        start(now)
    return quality


def show(arguments: argparse.Namespace) -> None:
    space = load_space(arguments.space, "full", SIZES)
    table = make_table(space, read_rows(arguments.table))
    truth = 100 * table.scores[:, :, -1].mean(axis=1)
    noise = 100 * np.abs(np.diff(table.scores[:, :, -1], axis=1)).mean() / 1.128
    print(
        f"{space.name}: {len(truth)} configurations; best {truth.max():.2f} %, "
        f"baseline {truth[0]:.2f} %, median {np.median(truth):.2f} %, "
        f"standard deviation of one training by its seed {noise:.2f} points; "
        f"{arguments.searches} searches"
    )
    searches = {
        "random": choose(space, "random"),
        "tpe": choose(space, "tpe", startup=arguments.startup),
        "gp": choose(space, "gp", startup=arguments.startup),
        "gp, no window": choose(space, "gp", startup=arguments.startup, window=None),
    }
    found = {
        name: np.array([simulate(each, table, seed) for seed in range(arguments.searches)])
        for name, each in searches.items()
    }
    print(f"\n| epochs paid | {' | '.join(f'{name} | minus random' for name in found)} |")
    print("|---" * (1 + 2 * len(found)) + "|")
    random = np.random.default_rng(0)
    for paid in SHOWN:
        cells = []
        for qualities in found.values():
            difference = 100 * (qualities[:, paid] - found["random"][:, paid])
            draws = random.integers(0, len(difference), (NUM_RESAMPLES, len(difference)))
            low, high = np.percentile(difference[draws].mean(axis=1), [2.5, 97.5])
            cells.append(f"{100 * qualities[:, paid].mean():.2f} %")
            cells.append(f"{difference.mean():+.2f} ({low:+.2f} to {high:+.2f})")
        print(f"| {paid} | {' | '.join(cells)} |")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("action", choices=["train", "show"])
    parser.add_argument("--space", default="s8")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--configs", type=int, default=80)
    parser.add_argument("--searches", type=int, default=200)
    parser.add_argument("--startup", type=int, default=5)
    arguments = parser.parse_args()
    results = Path(__file__).parent / "results"
    arguments.table = arguments.table or results / f"real-{arguments.space}.jsonl"
    (train if arguments.action == "train" else show)(arguments)


if __name__ == "__main__":
    main()
