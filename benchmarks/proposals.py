"""Gain of Optuna's TPE over random and quasi-random search at equal epochs, on real trainings.

    python benchmarks/proposals.py [--table FILE] [--samplers tpe,tpe/6,random,qmc] [--seeds 200]
                                   [--against random] [--figure FILE]

The table was written by benchmarks/fidelity.py; nothing is trained here. A configuration's score is
val_acc at the end of a training from scratch of as many epochs as the tier cpu has; chance, when it
diverged. A search asks our own `Sampler`. Each ask is answered by the nearest configuration of the
table that the search has not had yet, and the sampler is told that configuration's knobs and score.
Trial 0 is the baseline, the space's points are left out, and no trial is stopped, so that equal
asks are equal epochs. `tpe` has the tier's startup, `tpe/6` one of 6. `tpe+all` is told inactive
knobs, too, as searches were until 2026-11-28: `--samplers tpe --against tpe+all` is what leaving
them out buys. (Random and quasi-random search get the same trainings either way.)

Two intervals, both 95 %:

- seeds: a bootstrap over the sampler's seeds, for this very table.
- seeds and table: the table is a sample of configurations, too. The spread over subtables of three
  quarters of the configurations (the same seeds on all of them, less what seeds contribute) is
  scaled up to the full table as in the delete-d jackknife and added to the variance over seeds;
  normal limits. On 40 made-up tables (80 configurations, random and quasi-random search,
  2026-11-21) 85 to 97 % of these intervals held for best and regret, 97 to 100 % for the difference
  to random search, where they are up to twice as wide as needed.

The end of a search is optimistic for all samplers: as the table runs out, a bad ask too gets what
is left.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from fidelity import load_searched
from numpy.typing import NDArray

from tune_cifar.dataset import CIFAR10
from tune_cifar.schema import Status, inactive_knobs
from tune_cifar.search.gaussian_process import UnitCube
from tune_cifar.search.sampler import Sampler
from tune_cifar.space.layout import SamplerBudget
from tune_cifar.space.select import SearchSpace

HERE = Path(__file__).parent
# A proposal is seeded with seed + number: seeds of searches must differ by more than their trials.
SEED_STEP = 1000
NUM_RESAMPLES = 2000
NUM_TABLES = 50
FRACTION = 0.75
NUM_TABLE_SEEDS = 32
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Figures = dict[tuple[str, str, int], float]
"""Results by (quantity, sampler, asks)."""


@dataclass(frozen=True)
class Table:
    """Trained configurations, the baseline first.

    Attributes:
        params: the searched knobs of each.
        scores: (configs,).
        places: (configs, knobs), see `locate`.
        active: (configs, knobs), whether the knob is active in the configuration.
        is_choice: (knobs,), whether the knob is a choice, not a number.
    """

    params: list[dict[str, Any]]
    scores: Array
    places: Array
    active: Mask
    is_choice: Mask

    def select(self, chosen: Sequence[int]) -> Table:
        """Return a table of some of the configurations."""
        index = list(chosen)
        params = [self.params[i] for i in index]
        arrays = (self.scores[index], self.places[index], self.active[index])
        return Table(params, *arrays, self.is_choice)

    def measure_distances(self, place: Array, active: Mask) -> Array:
        """Return the distance from a point to every configuration (configs,).

        Euclidean in the unit cube, 1 along a choice that differs. A knob that is inactive in either
        of the two does not count.
        """
        differences = self.places - place
        squares = np.where(self.is_choice, differences != 0, differences**2)
        distances: Array = np.sqrt(np.where(self.active & active, squares, 0.0).sum(axis=1))
        return distances


@dataclass(frozen=True)
class Answer:
    """A configuration of the table in place of a proposal, as a recorded trial."""

    params: dict[str, Any]
    scores: dict[int, float]
    status: Status = "complete"


@dataclass(frozen=True)
class Outcome:
    """Simulated searches on one table.

    Attributes:
        curves: best score so far by sampler, (seeds, asks); random search covers the full table.
        gaps: distance from ask to answer by sampler, (seeds, asks).
        ceiling: the table's best score.
    """

    curves: dict[str, Array]
    gaps: dict[str, Array]
    ceiling: float

    def select(self, seeds: NDArray[np.int64]) -> Outcome:
        """Return the searches of some of the seeds, or of a resample of them."""
        curves = {name: curve[seeds] for name, curve in self.curves.items()}
        gaps = {name: gap[seeds] for name, gap in self.gaps.items()}
        return Outcome(curves, gaps, self.ceiling)


def locate(space: SearchSpace, params: dict[str, Any]) -> tuple[Array, Mask]:
    """Return a proposal's place and active knobs, (knobs,) each.

    A place is that in the space's unit cube; an inactive knob has the baseline's.
    """
    params = {**space.baseline_params, **params}
    inactive = inactive_knobs(space.config(params))
    active = np.array([name not in inactive for name in space.distributions])
    return UnitCube(space.distributions).locate([params])[0], active


def make_table(space: SearchSpace, params: list[dict[str, Any]], scores: Sequence[float]) -> Table:
    """Return a table of these configurations."""
    located = [locate(space, each) for each in params]
    is_choice = [hasattr(distribution, "choices") for distribution in space.distributions.values()]
    places, active = (np.array(part) for part in zip(*located, strict=True))
    return Table(params, np.array(scores, dtype=float), places, active, np.array(is_choice))


def read_table(space: SearchSpace, path: Path) -> Table:
    """Read the configurations whose full training is in the file, in order.

    Under a constant learning rate the first epochs of a longer training are a shorter one; either
    may be there.
    """
    epochs = space.budget.rungs[-1]
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        is_first_epochs = row["job"] == "full/0" and row["params"]["schedule"] == "constant"
        if row["job"] == f"restart/{epochs}" or is_first_epochs:
            found[row["config"]] = row
    if 0 not in found:
        raise SystemExit(f"{path}: no row of the baseline, configuration 0. Train it first.")
    rows = [row for _, row in sorted(found.items())]
    params = [{name: row["params"][name] for name in space.distributions} for row in rows]
    scores = []
    for row in rows:
        has_ended = len(row["val_acc"]) >= epochs
        scores.append(row["val_acc"][epochs - 1] if has_ended else CIFAR10.chance)
    return make_table(space, params, scores)


def choose_sampler(space: SearchSpace, name: str) -> SearchSpace:
    """Return the space, without its points, for `random`, `qmc`, `tpe` or `tpe/<startup>`; or gp.

    Answers have a score after the last rung alone, so there is no other.

    What stands after a `+` is not the space's, see Simulator.
    """
    kind, _, written = name.partition("+")[0].partition("/")
    startup = int(written) if written else space.budget.sampler.startup
    startup = startup if kind in ("tpe", "gp") else 0
    sampler = SamplerBudget.model_validate({"kind": kind, "startup": startup})
    update = {"sampler": sampler, "rungs": space.budget.rungs[-1:]}
    return replace(space, budget=space.budget.model_copy(update=update), points=())


class Simulator:
    """Searches on tables, with each of some samplers.

    Random and quasi-random proposals do not depend on scores: they are made once for all tables.

    Args:
        space: with distributions and startup.
        samplers: see `choose_sampler`; one that ends in `+all` is told inactive knobs, too.
        num_asks: of a search; random search has as many as the table.
    """

    def __init__(self, space: SearchSpace, samplers: Iterable[str], num_asks: int) -> None:
        self._spaces = {name: choose_sampler(space, name) for name in samplers}
        self._num_asks = num_asks
        self._asked: dict[tuple[str, int], tuple[Sampler, list[tuple[Array, Mask]]]] = {}

    def run(self, table: Table, num_seeds: int) -> Outcome:
        """Run `num_seeds` searches with each sampler; the first seeds are always the same."""
        curves, gaps = {}, {}
        for name in self._spaces:
            searches = [self.search(name, table, SEED_STEP * seed) for seed in range(num_seeds)]
            taken = np.array([taken for taken, _ in searches])
            curves[name] = np.maximum.accumulate(table.scores[taken], axis=1)
            gaps[name] = np.array([gaps for _, gaps in searches])
        return Outcome(curves, gaps, float(table.scores.max()))

    def search(self, name: str, table: Table, seed: int) -> tuple[list[int], list[float]]:
        """Run one search.

        Returns:
            the configurations in the order of the answers, and each one's distance from its ask.
        """
        space = self._spaces[name]
        is_conditional, rung = not name.endswith("+all"), space.budget.rungs[-1]
        learns = space.budget.sampler.kind in ("tpe", "gp")
        sampler, answers = Sampler(space, seed, is_conditional), list[Answer]()
        taken, gaps = [0], [0.0]
        num_asks = len(table.scores) if name == "random" else self._num_asks
        for number in range(1, num_asks):
            params = table.params[taken[-1]]
            told = space.select_active(params) if is_conditional else params
            answers.append(Answer(told, {rung: float(table.scores[taken[-1]])}))
            if learns:
                point = locate(space, sampler.ask(number, answers)[0])
            else:
                point = self._find_point(name, seed, number)
            distances = table.measure_distances(*point)
            distances[taken] = np.inf
            taken.append(int(distances.argmin()))
            gaps.append(float(distances[taken[-1]]))
        return taken, gaps

    def _find_point(self, name: str, seed: int, number: int) -> tuple[Array, Mask]:
        """Return place and active knobs of proposal `number` of a sampler that learns nothing."""
        space = self._spaces[name]
        if (name, seed) not in self._asked:
            self._asked[name, seed] = Sampler(space, seed), []
        sampler, points = self._asked[name, seed]
        while len(points) <= number:
            points.append(locate(space, sampler.ask(len(points))[0]))
        return points[number]


def count_asks(curve: Array, level: float) -> float:
    """Return the asks that a rising curve needs to reach a level; linear between two asks."""
    index = int(np.argmax(curve >= level - 1e-12))
    if index == 0:
        return 1.0
    return index + float((level - curve[index - 1]) / (curve[index] - curve[index - 1]))


def compute_figures(outcome: Outcome, asks: Sequence[int]) -> Figures:
    """Return means over seeds, in points: best so far, regret and difference to each sampler after
    each of `asks`.

    Also the logarithm of the asks that random search needs to reach each sampler's score at half of
    the last.
    """
    means = {name: curve.mean(axis=0) for name, curve in outcome.curves.items()}
    figures: Figures = {}
    for name, mean in means.items():
        for n in asks:
            figures["best", name, n] = 100 * mean[n - 1]
            figures["regret", name, n] = 100 * (outcome.ceiling - mean[n - 1])
            for other, found in means.items():
                figures[f"minus {other}", name, n] = 100 * (mean[n - 1] - found[n - 1])
        half = asks[-1] // 2
        num_asks = count_asks(means["random"], mean[half - 1])
        figures["log asks of random", name, half] = math.log(num_asks)
    return figures


def resample_seeds(
    outcomes: list[Outcome], asks: Sequence[int], num_resamples: int
) -> list[list[Figures]]:
    """Return the figures of each outcome per resample of the seeds.

    A resample is the same for all outcomes and pairs the samplers by seed.
    """
    random = np.random.default_rng(0)
    num_seeds = len(outcomes[0].curves["random"])
    resamples = []
    for _ in range(num_resamples):
        seeds = random.integers(0, num_seeds, num_seeds)
        resamples.append([compute_figures(outcome.select(seeds), asks) for outcome in outcomes])
    return resamples


def draw_subtables(table: Table, num_tables: int) -> list[Table]:
    """Draw subtables of FRACTION of the configurations; the baseline is in all of them."""
    random = np.random.default_rng(1)
    others = np.arange(1, len(table.scores))
    size = round(FRACTION * len(table.scores)) - 1
    draws = [np.sort(random.choice(others, size, replace=False)) for _ in range(num_tables)]
    return [table.select([0, *drawn]) for drawn in draws]


def compute_table_variance(
    outcomes: list[Outcome], asks: Sequence[int], num_resamples: int = 200
) -> Figures:
    """Return each figure's variance due to the table being a sample, from the outcomes on
    subtables.

    A subtable's figure also varies by its seeds' luck on it. Resampling the seeds adds that luck
    once more, so the variance over subtables is reduced by as much as the resamples exceed it. A
    subtable lacks d of n configurations: its variance around the full table's figure is d / (n - d)
    of the full table's around the truth. The estimate's own standard error is added, so that the
    interval is not too narrow.
    """
    num_seeds = len(outcomes[0].curves["random"])
    own = [compute_figures(outcome, asks) for outcome in outcomes]
    resamples = resample_seeds(outcomes, asks, num_resamples)
    variances: Figures = {}
    for key in own[0]:
        variance = statistics.variance(figures[key] for figures in own)
        by_resample = [[figures[key] for figures in each] for each in resamples]
        resampled = statistics.mean(map(statistics.variance, by_resample))
        luck = (resampled - variance) * num_seeds / (num_seeds - 1)
        error = variance * math.sqrt(2 / (len(outcomes) - 1))
        variances[key] = (max(0.0, variance - luck) + error) * FRACTION / (1 - FRACTION)
    return variances


@dataclass(frozen=True)
class Estimate:
    """A figure, its interval over seeds and its interval over seeds and tables."""

    value: float
    seeds: tuple[float, float]
    both: tuple[float, float]


def estimate(
    outcome: Outcome, asks: Sequence[int], table_variance: Figures
) -> dict[tuple[str, str, int], Estimate]:
    """Return all figures with both intervals."""
    resamples = [figures for [figures] in resample_seeds([outcome], asks, NUM_RESAMPLES)]
    found = {}
    for key, value in compute_figures(outcome, asks).items():
        drawn = np.array([figures[key] for figures in resamples])
        low, high = np.percentile(drawn, [2.5, 97.5])
        margin = 1.96 * math.sqrt(drawn.var() + table_variance[key])
        found[key] = Estimate(value, (float(low), float(high)), (value - margin, value + margin))
    return found


def show_best(found: dict[tuple[str, str, int], Estimate], epochs: int, against: str) -> None:
    """Print a table: best so far, regret and the paired difference to one of the samplers."""
    header = (
        "asks | epochs | sampler | best, % | 95 %, seeds | regret, points | 95 %, seeds and table"
    )
    header += f" | minus {against}, points | 95 %, seeds | 95 %, seeds and table"
    print(f"\n| {header} |\n{'|---' * 10}|")
    for quantity, name, n in sorted(found, key=lambda key: key[2]):
        if quantity == "best":
            best, regret, minus = (
                found[part, name, n] for part in ("best", "regret", f"minus {against}")
            )
            low, high = best.seeds
            line = f"| {n} | {epochs * n} | {name} | {best.value:.2f} | {low:.2f} to {high:.2f} "
            low, high = regret.both
            line += f"| {regret.value:.2f} | {max(0, low):.2f} to {high:.2f} "
            if name == against:
                print(line + "| | | |")
            else:
                intervals = [
                    f"{low:+.2f} to {high:+.2f}" for low, high in (minus.seeds, minus.both)
                ]
                print(f"{line}| {minus.value:+.2f} | {' | '.join(intervals)} |")


def show_speed(found: dict[tuple[str, str, int], Estimate]) -> None:
    """Print a table: asks that random search needs to match each sampler at half of the asks."""
    header = "sampler | asks | random search needs | factor | 95 %, seeds | 95 %, seeds and table"
    print(f"\n| {header} |\n{'|---' * 6}|")
    for (quantity, name, n), each in found.items():
        if quantity == "log asks of random" and name != "random":
            needs = math.exp(each.value)
            intervals = []
            for interval in (each.seeds, each.both):
                low, high = (math.exp(value) / n for value in interval)
                intervals.append(f"{low:.2f} to {high:.2f}")
            print(f"| {name} | {n} | {needs:.1f} | {needs / n:.2f} | {' | '.join(intervals)} |")


def show_gaps(outcome: Outcome, num_asks: int) -> None:
    """Print a table: how far the answers were from the asks."""
    half = num_asks // 2
    print("\nmean distance of the answer from the ask in the unit cube (1: another schedule):")
    print(f"| sampler | asks 2 to {half} | asks {half + 1} to {num_asks} |\n|---|---|---|")
    for name, gaps in outcome.gaps.items():
        print(f"| {name} | {gaps[:, 1:half].mean():.2f} | {gaps[:, half:num_asks].mean():.2f} |")


def draw(outcome: Outcome, num_asks: int, path: Path) -> None:
    """Plot the best score so far over asks: mean over seeds with its 95 % band over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
    random, asks = np.random.default_rng(0), np.arange(1, num_asks + 1)
    for name, curve in outcome.curves.items():
        seen = 100 * curve[:, :num_asks]
        resamples = (random.integers(0, len(seen), len(seen)) for _ in range(NUM_RESAMPLES))
        means = np.array([seen[index].mean(axis=0) for index in resamples])
        low, high = np.percentile(means, [2.5, 97.5], axis=0)
        (line,) = ax.plot(asks, seen.mean(axis=0), label=name)
        ax.fill_between(asks, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.axhline(100 * outcome.ceiling, color="grey", linestyle=":", label="best of the table")
    ax.set_xlabel("asks")
    ax.set_ylabel("best val_acc so far, %")
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(arguments: argparse.Namespace) -> None:
    space = load_searched(arguments.space, {})
    table = read_table(space, arguments.table)
    named = [*arguments.samplers.split(","), arguments.against, "random"]
    samplers, num_asks = dict.fromkeys(named), arguments.asks
    num_configs = len(table.scores)
    if round(FRACTION * num_configs) < num_asks:
        rule = f"--asks must be at most {FRACTION:.0%} of the table's {num_configs} configurations"
        raise SystemExit(f"{rule}, got {num_asks}.")
    asks, epochs = [num_asks * part // 4 for part in (1, 2, 3, 4)], space.budget.rungs[-1]
    simulator = Simulator(space, samplers, num_asks)
    outcome = simulator.run(table, arguments.seeds)
    subtables = draw_subtables(table, NUM_TABLES)
    outcomes = [simulator.run(each, NUM_TABLE_SEEDS) for each in subtables]
    found = estimate(outcome, asks, compute_table_variance(outcomes, asks))
    scores = 100 * table.scores
    num_at_chance = (table.scores <= CIFAR10.chance).sum()
    print(
        f"{space.name}: {num_configs} configurations of {epochs} epochs; "
        f"best {scores.max():.2f} %, baseline {scores[0]:.2f} %, "
        f"median {np.median(scores):.2f} %, {num_at_chance} at chance; "
        f"{arguments.seeds} seeds; {NUM_TABLES} subtables of {len(subtables[0].scores)}, "
        f"{NUM_TABLE_SEEDS} seeds each"
    )
    show_best(found, epochs, arguments.against)
    show_speed(found)
    show_gaps(outcome, num_asks)
    if arguments.figure:
        draw(outcome, num_asks, arguments.figure)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--space", default="s8")
    parser.add_argument("--table", type=Path, help="default: results/fidelity-SPACE.jsonl")
    parser.add_argument("--samplers", default="tpe,tpe/6,random,qmc")
    parser.add_argument(
        "--against", default="random", help="the sampler that others are compared with"
    )
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--asks", type=int, default=40)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    arguments.table = arguments.table or HERE / "results" / f"fidelity-{arguments.space}.jsonl"
    show(arguments)


if __name__ == "__main__":
    main()
