"""How well cheap scores predict the full training: configurations at every fidelity, on CIFAR-10.

    python benchmarks/fidelity.py train [--space s8] [--configs 40] [--more 40] [--table FILE]
    python benchmarks/fidelity.py show [--table FILE] [--figure FILE]

`train` takes hours and can be resumed. It draws random values of SEARCHED in the tier cpu (the
first is the baseline) and trains each over 8 epochs of 6,000 images, evaluated on 2,000 (`--epochs
--rungs --train-size --val-size` change that):

- `full/0`: the full schedule; `fidelity: epochs` compares its scores at the rungs
- `full/1`: the same with another training seed: how well a full training predicts itself
- `restart/3` ...: a complete schedule as long as the rung, from scratch (`fidelity: cycles`)
- `continue`: warm restarts at the rungs (`fidelity: cycles/continue`); a restart up to the first
  rung
- `--more` further configurations have the second rung's restart only, for benchmarks/proposals.py

Under a constant learning rate all variants are the same training, so only the full ones are run. A
row of the table is one training: {config, job, params, val_acc per epoch, diverged, seconds}.

`show` prints Kendall's tau (tau-b) of each rung's score against the full score, with bootstrap
intervals over the configurations; paired differences to `epochs`; and the regret of successive
halving at equal epochs.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trainings import Job, read_rows, run_jobs

from tune_cifar.dataset import CIFAR10
from tune_cifar.schema import TrainConfig
from tune_cifar.search.rungs import is_promoted
from tune_cifar.search.sampler import Sampler
from tune_cifar.space.select import SearchSpace, load_space

HERE = Path(__file__).parent
CONFIG_SEED = 4
SEARCHED = ("schedule", "max_lr", "dropout", "pct_start", "div_factor", "final_div_factor")
Scores = NDArray[np.float64]


def load_searched(name: str, pins: dict[str, Any]) -> SearchSpace:
    """Return the space's tier cpu with the hyperparameters of the table alone, without points."""
    space = load_space(name, "cpu", pins)
    found = space.distributions
    searched = {knob: found[knob] for knob in SEARCHED if knob in found}
    return replace(space, distributions=searched, points=())


def make_configs(arguments: argparse.Namespace) -> list[TrainConfig]:
    """Return the baseline, then random proposals of the space."""
    sizes = {name: getattr(arguments, name) for name in ("epochs", "train_size", "val_size")}
    space = load_searched(arguments.space, sizes)
    random = space.budget.sampler.model_copy(update={"kind": "random"})
    budget = space.budget.model_copy(update={"sampler": random})
    sampler = Sampler(replace(space, budget=budget), CONFIG_SEED)
    numbers = range(arguments.configs + arguments.more)
    return [space.config(sampler.ask(number)[0]) for number in numbers]


def make_jobs(config: TrainConfig, rungs: tuple[int, ...], is_more: bool) -> dict[str, TrainConfig]:
    """Return the trainings of one configuration by name."""
    constant = config.schedule == "constant"
    if is_more:
        return {f"restart/{rungs[1]}": config.shorten(rungs[1])}
    jobs = {"full/0": config, "full/1": config.model_copy(update={"seed": 1})}
    if not constant:
        jobs |= {f"restart/{rung}": config.shorten(rung) for rung in rungs[1:-1]}
        jobs["continue"] = config.model_copy(update={"warm_restarts": rungs[:-1]})
    return jobs


def train(arguments: argparse.Namespace) -> None:
    """Run the trainings that the table lacks, configuration after configuration."""
    jobs = []
    for number, full_config in enumerate(make_configs(arguments)):
        params = {name: getattr(full_config, name) for name in SEARCHED}
        is_more = number >= arguments.configs
        for job, config in make_jobs(full_config, arguments.rungs, is_more).items():
            key = {"config": number, "job": job}
            jobs.append(Job(key, config, {"params": params}, has_curve=True))
    run_jobs(jobs, arguments.table)


@dataclass(frozen=True)
class Study:
    """Scores of every configuration with all its trainings; diverged ones have chance.

    Attributes:
        rungs: epochs; the last is the full training.
        variants: by fidelity, (configs, rungs).
        again: the full score under the second seed (configs,).
        diverged: in any training (configs,).
        onecycle: the configurations under a OneCycle (configs,).
    """

    rungs: tuple[int, ...]
    variants: dict[str, Scores]
    again: Scores
    diverged: NDArray[np.bool_]
    onecycle: NDArray[np.bool_]

    def select(self, chosen: NDArray[Any]) -> Study:
        """Return the study of some of the configurations, or of a resample."""
        variants = {name: scores[chosen] for name, scores in self.variants.items()}
        arrays = (self.again[chosen], self.diverged[chosen], self.onecycle[chosen])
        return Study(self.rungs, variants, *arrays)


def make_study(rows: list[dict[str, Any]], rungs: tuple[int, ...]) -> Study:
    """Gather the table's rows by configuration."""
    trainings: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        trainings.setdefault(row["config"], {})[row["job"]] = row
    needed = {True: {"full/0", "full/1"}, False: {"full/0", "full/1", "continue"}}
    needed[False] |= {f"restart/{rung}" for rung in rungs[1:-1]}
    found = []
    for _, jobs in sorted(trainings.items()):
        constant = next(iter(jobs.values()))["params"]["schedule"] == "constant"
        if jobs.keys() >= needed[constant]:
            found.append((constant, jobs))

    def score(row: dict[str, Any], epoch: int) -> float:
        reached = len(row["val_acc"]) >= epoch
        return float(row["val_acc"][epoch - 1]) if reached else CIFAR10.chance

    def restart(constant: bool, jobs: dict[str, dict[str, Any]], rung: int) -> float:
        if constant or rung == rungs[-1]:
            return score(jobs["full/0"], rung)
        return score(jobs["continue" if rung == rungs[0] else f"restart/{rung}"], rung)

    variants: dict[str, list[list[float]]] = {"epochs": [], "cycles": [], "cycles/continue": []}
    for constant, jobs in found:
        full, continued = jobs["full/0"], jobs["full/0" if constant else "continue"]
        variants["epochs"].append([score(full, rung) for rung in rungs])
        variants["cycles"].append([restart(constant, jobs, rung) for rung in rungs])
        variants["cycles/continue"].append([score(continued, rung) for rung in rungs])
    return Study(
        rungs,
        {name: np.array(scores) for name, scores in variants.items()},
        np.array([score(jobs["full/1"], rungs[-1]) for _, jobs in found]),
        np.array([any(row["diverged"] for row in jobs.values()) for _, jobs in found]),
        np.array([not constant for constant, _ in found]),
    )


def compute_taus(study: Study) -> dict[tuple[str, int], float]:
    """Return Kendall's tau-b of each variant's rung score against the full score of the same seed.

    Of the full length it is that of the other seed: the noise ceiling.
    """
    from scipy.stats import kendalltau

    def compute_tau(scores: Scores, others: Scores) -> float:
        return float(kendalltau(scores, others).statistic)

    full, last = study.variants["epochs"][:, -1], study.rungs[-1]
    taus, other_taus = {}, {}
    for name, scores in study.variants.items():
        for i, rung in enumerate(study.rungs):
            if rung < last or name == "cycles/continue":
                taus[name, rung] = compute_tau(scores[:, i], full)
            if rung < last:
                other_taus[f"{name}, other seed", rung] = compute_tau(scores[:, i], study.again)
    return taus | other_taus | {("full, other seed", last): compute_tau(full, study.again)}


def bootstrap(
    study: Study, compute: Callable[[Study], dict[Any, float]], num_resamples: int
) -> dict[Any, Scores]:
    """Return `compute` on resamples of the configurations; every entry has the same resamples."""
    random = np.random.default_rng(0)
    num_configs = len(study.again)
    resamples = (random.integers(0, num_configs, num_configs) for _ in range(num_resamples))
    drawn = [compute(study.select(chosen)) for chosen in resamples]
    return {key: np.array([values[key] for values in drawn]) for key in drawn[0]}


def format_interval(values: Scores, sign: str = "") -> str:
    """Format the middle 95 %."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return f"{low:{sign}.2f} to {high:{sign}.2f}"


def simulate_halving(
    scores: Scores,
    costs: tuple[int, ...],
    order: NDArray[Any],
    max_epochs: int,
    reduction_factor: int,
) -> tuple[int | None, int]:
    """Simulate successive halving over the configurations in this order until the epochs are spent.

    Returns:
        the complete configuration of the best last score (None without one), and the number
        started.
    """
    arrived: list[list[float]] = [[] for _ in costs]
    best, best_score, spent, num_started = None, -math.inf, 0, 0
    for config in order:
        if spent >= max_epochs:
            break
        num_started += 1
        for i, cost in enumerate(costs):
            spent += cost
            score = float(scores[config, i])
            arrived[i].append(score)
            if i == len(costs) - 1:
                if score > best_score:
                    best, best_score = int(config), score
            elif not is_promoted(score, arrived[i], reduction_factor):
                break
    return best, num_started


def simulate_regrets(
    study: Study, max_epochs: int, num_orders: int
) -> dict[str, tuple[float, float]]:
    """Return mean regret (points) and mean number of configurations started, by variant.

    "no stopping" is random search without rungs. Means are over random orders, the same ones for
    all variants. The truth is the mean of both full seeds.
    """
    rungs, truth = study.rungs, (study.variants["epochs"][:, -1] + study.again) / 2
    steps = tuple(b - a for a, b in itertools.pairwise((0, *rungs)))
    searches = {
        "no stopping": (study.variants["epochs"][:, -1:], rungs[-1:]),
        "epochs": (study.variants["epochs"], steps),
        "cycles": (study.variants["cycles"], rungs),
        "cycles/continue": (study.variants["cycles/continue"], steps),
    }
    random = np.random.default_rng(1)
    orders = [random.permutation(len(truth)) for _ in range(num_orders)]
    found = {}
    for name, (scores, costs) in searches.items():
        regrets, nums_started = [], []
        for order in orders:
            best, num_started = simulate_halving(scores, costs, order, max_epochs, 3)
            regrets.append(truth.max() - (CIFAR10.chance if best is None else truth[best]))
            nums_started.append(num_started)
        found[name] = (100 * float(np.mean(regrets)), float(np.mean(nums_started)))
    return found


def show_taus(title: str, study: Study) -> None:
    """Print a table: tau per variant and rung with its interval and the difference to `epochs`."""
    num_diverged = int(study.diverged.sum())
    print(f"\n{title}: {len(study.again)} configurations, {num_diverged} diverged somewhere")
    print("| score | at epoch | tau | 95 % | minus `epochs` | 95 % |\n|---|---|---|---|---|---|")
    taus, drawn = compute_taus(study), bootstrap(study, compute_taus, 2000)
    for (name, rung), tau in taus.items():
        line = f"| {name} | {rung} | {tau:.2f} | {format_interval(drawn[name, rung])} |"
        base = ("epochs, other seed" if name.endswith("other seed") else "epochs", rung)
        if base in taus and base != (name, rung):
            interval = format_interval(drawn[name, rung] - drawn[base], "+")
            line += f" {tau - taus[base]:+.2f} | {interval} |"
        else:
            line += " | |"
        print(line)


def show_regrets(study: Study, max_epochs: int) -> None:
    """Print a table: regret at equal epochs, with intervals over the configurations."""
    print(f"\nregret after {max_epochs} epochs (reduction factor 3; mean of 1,000 random orders):")
    differences = "minus `no stopping` | 95 % | minus `cycles` | 95 %"
    print(f"| search | begun | regret, points | 95 % | {differences} |")
    print("|---|---|---|---|---|---|---|---|")
    found = simulate_regrets(study, max_epochs, 1000)

    def compute(resample: Study) -> dict[str, float]:
        regrets = simulate_regrets(resample, max_epochs, 25)
        return {name: regret for name, (regret, _) in regrets.items()}

    drawn = bootstrap(study, compute, 400)
    for name, (regret, num_started) in found.items():
        line = f"| {name} | {num_started:.1f} | {regret:.2f} | {format_interval(drawn[name])} |"
        for base in ("no stopping", "cycles"):
            interval = format_interval(drawn[name] - drawn[base], "+")
            difference = f" {regret - found[base][0]:+.2f} | {interval} |"
            line += " | |" if name == base else difference
        print(line)


def draw(study: Study, path: Path) -> None:
    """Plot rung scores against full scores, a column per rung and a row per variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    taus = compute_taus(study)
    names, rungs = list(study.variants), study.rungs[:-1]
    size = (3.2 * len(rungs), 3 * len(names))
    figure, axes = plt.subplots(
        len(names), len(rungs), squeeze=False, figsize=size, layout="constrained"
    )
    full = study.variants["epochs"][:, -1]
    for (row, name), (column, rung) in itertools.product(enumerate(names), enumerate(rungs)):
        ax = axes[row, column]
        scores = study.variants[name][:, column]
        for mask, label in ((study.onecycle, "OneCycle"), (~study.onecycle, "constant")):
            ax.scatter(100 * scores[mask], 100 * full[mask], s=14, label=label)
        ax.set_title(f"{name}, epoch {rung}: tau {taus[name, rung]:.2f}", fontsize=9)
        ax.set_xlabel("val_acc at the rung, %")
        ax.set_ylabel(f"after {study.rungs[-1]} epochs, %")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(arguments: argparse.Namespace) -> None:
    study = make_study(read_rows(arguments.table), arguments.rungs)
    show_taus("all", study)
    if study.diverged.any():
        show_taus("without those that diverged", study.select(~study.diverged))
    show_taus("under OneCycle", study.select(study.onecycle))
    for max_epochs in (arguments.epochs * 6, arguments.epochs * 12):
        show_regrets(study, max_epochs)
    if arguments.figure:
        draw(study, arguments.figure)


def read_rungs(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("action", choices=["train", "show"])
    parser.add_argument("--space", default="s8")
    parser.add_argument("--configs", type=int, default=40)
    parser.add_argument("--more", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rungs", type=read_rungs, default=(1, 3, 8))
    parser.add_argument("--train-size", type=int, default=6000)
    parser.add_argument("--val-size", type=int, default=2000)
    parser.add_argument("--table", type=Path, help="default: results/fidelity-SPACE.jsonl")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    arguments.table = arguments.table or HERE / "results" / f"fidelity-{arguments.space}.jsonl"
    return arguments


def main() -> None:
    arguments = parse_arguments()
    (train if arguments.action == "train" else show)(arguments)


if __name__ == "__main__":
    main()
