"""Our search against its peers on LCBench, in a simulated clock: regret at equal epochs.

    python benchmarks/against_peers.py run --lcbench DIR --out FILE [--methods NAME ...]
                                           [--seeds 10:20] [--noise 0.05] [--trainings 50]
    python benchmarks/against_peers.py show FILE ... [--only NAME ...] [--against NAME]
                                           [--figure FILE]

`run` adds a line for each search to FILE and leaves out those that it has. Ours are our own driver,
sampler and rung rule, with their record in a folder in memory; the peers (peers.py) are their own
libraries. All run four trials at once; every epoch costs the same; nothing is trained. A search's
result is its best full training, by the score that was reported. Our trial 0, which is never
stopped, is a random configuration: a baseline that knows nothing.

`show` prints means over data sets with 95 % bootstrap intervals over data sets, differences paired
by data set and seed, the average rank, and after how many full trainings' epochs the compared one
is as good as a method at its end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from lcbench import NUM_EPOCHS, Lcbench, Noise, Search, Trial, find_regrets, simulate
from peers import FIXED, PEERS

from tune_cifar.record.events import Stage
from tune_cifar.record.journal import Record
from tune_cifar.schema import DataInfo, EpochResult, Numerics, TrainConfig
from tune_cifar.search.driver import SearchDriver
from tune_cifar.space.layout import Budget
from tune_cifar.space.select import SearchSpace, load_space
from tune_cifar.train.recorded import make_header

# A proposal is seeded with seed + number: seeds of searches must differ by more than their trials.
SEED_STEP = 10_000
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
SHOWN = (10, 20, 50)
FIXED_STEP = 5
"""A search that must know what it may pay is run anew for every fifth number of trainings."""
NUM_RESAMPLES = 2000
DATA = DataInfo(name="shapes", digest="none", split_hash="none")
NUMERICS = Numerics(
    device="cpu",
    device_name="simulated",
    capability="none",
    precision="fp32",
    memory_format="contiguous",
    threads=1,
    deterministic=False,
    execution="eager",
    versions={},
)
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LcbenchSpace(SearchSpace):
    """The hyperparameters of LCBench in place of ours; a training's recipe stays the baseline."""

    first: dict[str, Any]
    """Trial 0."""

    @property
    def baseline_params(self) -> dict[str, Any]:
        return self.first

    def config(self, params: dict[str, Any]) -> TrainConfig:
        return self.baseline

    def select_active(self, params: dict[str, Any]) -> dict[str, Any]:
        return params


class Ours:
    """Our driver with its record in a folder."""

    def __init__(self, lcbench: Lcbench, seed: int, folder: Path, budget: Budget) -> None:
        smoke = load_space("smoke", "cpu")
        fields = {name: getattr(smoke, name) for name in SearchSpace.__dataclass_fields__}
        fields |= {
            "baseline": smoke.baseline.model_copy(update={"epochs": NUM_EPOCHS}),
            "distributions": lcbench.distributions,
            "points": (),
            "budget": budget,
        }
        (first,) = lcbench.draw(1, seed + 7)
        space = LcbenchSpace(**fields, first=first)
        header = make_header("search", "x", space, seed, DATA, NUMERICS, "simulated")
        record = Record.create(folder / "x", header)
        self._driver = SearchDriver(record, space, lambda state, event: None)

    def ask(self) -> Trial | None:
        trial = self._driver.ask()
        if trial is None:
            return None
        stages = self._driver.list_remaining_stages(trial)
        return Trial(trial.number, trial.params, tuple(stage.length for stage in stages))

    def report(self, number: int, stage: int, epoch: int, score: float) -> bool:
        result = EpochResult(
            epoch=epoch,
            step=epoch,
            train_loss=0.0,
            train_acc=0.0,
            val_loss=0.0,
            val_acc=score,
            lr=0.1,
            epoch_seconds=1.0,
            images_per_second=1.0,
            peak_memory_mb=0.0,
        )
        return self._driver.report(number, Stage(stage), result)


def make_budget(kind: str, *rungs: int, startup: int = 20, **more: Any) -> Budget:
    """Return the budget of a search of ours: sampler, rungs, and what else differs."""
    sampler = {"kind": kind, "startup": startup if kind in ("tpe", "gp") else 0}
    values = {
        "trials": 5000,
        "fidelity": "epochs",
        "reduction_factor": 3,
        "window": 9,
        "seed": 0,
        "rungs": rungs,
        "sampler": sampler,
    }
    return Budget.model_validate(values | more)


OURS: dict[str, Budget] = {
    "ours": make_budget("gp", 6, 17, 50),
    "ours, rungs 3, 9, 27, 50": make_budget("gp", 3, 9, 27, 50),
    "ours, paying for cycles": make_budget("gp", 6, 17, 50, fidelity="cycles"),
    "ours with TPE": make_budget("tpe", 6, 17, 50),
    "ours with TPE, no window": make_budget("tpe", 6, 17, 50, window=None),
    "ours with TPE, cycles": make_budget("tpe", 6, 17, 50, fidelity="cycles"),
    "ours with random proposals": make_budget("random", 6, 17, 50),
    "ours, startup 5": make_budget("gp", 6, 17, 50, startup=5),
    "27 trials, random": make_budget("random", 6, 17, 50, trials=27),
    "27 trials, TPE": make_budget("tpe", 6, 17, 50, startup=9, trials=27),
    "27 trials, ours": make_budget("gp", 6, 17, 50, startup=9, trials=27),
    "27 trials, ours, startup 5": make_budget("gp", 6, 17, 50, startup=5, trials=27),
}


class Task(NamedTuple):
    """One simulated search; noise is a fraction of (best - median)."""

    method: str
    data_set: str
    seed: int
    noise: float
    num_trainings: int


@cache
def open_lcbench(folder: Path) -> Lcbench:
    return Lcbench(folder)


def run_task(job: tuple[Task, Path, tuple[float, float]]) -> dict[str, Any]:
    """Simulate a search; returns its line of the file."""
    task, folder, reference = job
    lcbench, seed = open_lcbench(folder), SEED_STEP * task.seed
    median, best = reference
    noise, num_epochs = (
        Noise(task.noise * (best - median), task.seed),
        task.num_trainings * NUM_EPOCHS,
    )
    if task.method in FIXED:
        regrets = [100.0] * task.num_trainings
        for num in range(FIXED_STEP, task.num_trainings + 1, FIXED_STEP):
            search: Search = FIXED[task.method](lcbench, seed, num * NUM_EPOCHS)
            completed = simulate(search, lcbench, task.data_set, num * NUM_EPOCHS, noise)
            found = find_regrets(completed, reference, num)[-1]
            regrets[num - 1 :] = [found] * (task.num_trainings - num + 1)
        return task._asdict() | {"regrets": regrets}
    with tempfile.TemporaryDirectory(dir=MEMORY) as record:
        if task.method in OURS:
            search = Ours(lcbench, seed, Path(record), OURS[task.method])
        else:
            search = PEERS[task.method](lcbench, seed)
        completed = simulate(search, lcbench, task.data_set, num_epochs, noise)
    return task._asdict() | {"regrets": find_regrets(completed, reference, task.num_trainings)}


def run(arguments: argparse.Namespace) -> None:
    lcbench = open_lcbench(arguments.lcbench)
    first, _, end = arguments.seeds.partition(":")
    seeds = range(int(first), int(end)) if end else range(int(first))
    unknown = set(arguments.methods) - {*OURS, *PEERS, *FIXED}
    if unknown:
        raise SystemExit(f"--methods must be of {[*OURS, *PEERS, *FIXED]}, got {sorted(unknown)}.")
    settings = (arguments.noise, arguments.trainings)
    tasks = [
        Task(method, data_set, seed, *settings)
        for seed in seeds
        for data_set in lcbench.data_sets
        for method in arguments.methods
    ]
    done = {Task(*(row[name] for name in Task._fields)) for row in read_rows([arguments.out])}
    tasks = [task for task in tasks if task not in done]
    print(f"{len(tasks)} searches to simulate, {len(done)} are there", flush=True)
    references = {data_set: lcbench.measure_reference(data_set) for data_set in lcbench.data_sets}
    jobs = [(task, arguments.lcbench, references[task.data_set]) for task in tasks]
    processes = multiprocessing.get_context("spawn").Pool(arguments.processes)
    with processes as pool, arguments.out.open("a", encoding="utf-8") as out:
        for number, row in enumerate(pool.imap_unordered(run_task, jobs), 1):
            out.write(json.dumps(row) + "\n")
            out.flush()
            if number % 100 == 0:
                print(f"{number} of {len(tasks)}", flush=True)


def read_rows(files: Iterable[Path]) -> list[dict[str, Any]]:
    lines = [line for file in files if file.exists() for line in file.open(encoding="utf-8")]
    return [json.loads(line) for line in lines]


class Results(NamedTuple):
    """Regrets by method: (data sets, seeds, trainings), for the data sets and seeds of all."""

    regrets: dict[str, Array]
    num_seeds: int


def collect(rows: Sequence[dict[str, Any]]) -> Results:
    """Return the results on the data sets and seeds that all methods have."""
    kinds = sorted({(row["noise"], row["num_trainings"]) for row in rows})
    if len(kinds) > 1:
        raise SystemExit(f"rows must have one noise and one number of trainings, got {kinds}.")
    by_method: dict[str, dict[tuple[str, int], list[float]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["data_set"], row["seed"]] = row["regrets"]
    shared = set.intersection(*(set(found) for found in by_method.values()))
    data_sets = sorted({data_set for data_set, _ in shared})
    seeds = sorted({seed for _, seed in shared})
    whole = [seed for seed in seeds if all((each, seed) in shared for each in data_sets)]
    if not whole:
        raise SystemExit("No seed has been simulated on all data sets with all methods.")
    regrets = {
        method: np.array([[found[each, seed] for seed in whole] for each in data_sets])
        for method, found in by_method.items()
    }
    return Results(regrets, len(whole))


def bootstrap(values: Array) -> tuple[float, float]:
    """Return the 95 % interval of a mean over data sets (data sets,)."""
    random = np.random.default_rng(0)
    draws = values[random.integers(0, len(values), (NUM_RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def average_ranks(results: Results, index: int) -> dict[str, float]:
    """Return each method's rank among all, averaged over data sets and seeds; ties share it."""
    from scipy.stats import rankdata

    stacked = np.stack([found[:, :, index] for found in results.regrets.values()])
    ranks = rankdata(stacked, axis=0).mean(axis=(1, 2))
    return dict(zip(results.regrets, ranks.tolist(), strict=True))


def count_epochs(curve: Array, regret: float) -> float:
    """Return after how many full trainings' epochs a mean regret was reached; infinite if never."""
    reached = np.flatnonzero(curve <= regret)
    return float(reached[0] + 1) if len(reached) else float("inf")


def show(arguments: argparse.Namespace) -> None:
    rows = read_rows(arguments.files)
    wanted = arguments.only or {row["method"] for row in rows}
    results = collect([row for row in rows if row["method"] in wanted])
    base = arguments.against
    if base not in results.regrets:
        raise SystemExit(f"--against must be of {list(results.regrets)}, got {base!r}.")
    any_found = next(iter(results.regrets.values()))
    num_data_sets, num_seeds, num_trainings = any_found.shape
    shown = [number for number in SHOWN if number <= num_trainings] or [num_trainings]
    print(f"{num_data_sets} data sets, {num_seeds} seeds; difference: minus {base}\n")
    header = ["method", *(f"{n}: mean (95 %) | difference (95 %) | rank" for n in shown)]
    print(f"| {' | '.join(header)} | {base} is as good after |")
    print("|---" * (2 + 3 * len(shown)) + "|")
    base_curve = results.regrets[base].mean(axis=(0, 1))
    ranks = {number: average_ranks(results, number - 1) for number in shown}
    order = sorted(results.regrets, key=lambda name: results.regrets[name][:, :, -1].mean())
    for method in order:
        found, cells = results.regrets[method], [method]
        for number in shown:
            by_set = found[:, :, number - 1].mean(axis=1)
            difference = by_set - results.regrets[base][:, :, number - 1].mean(axis=1)
            low, high = bootstrap(by_set)
            cells.append(f"{by_set.mean():.1f} ({low:.1f} to {high:.1f})")
            low, high = bootstrap(difference)
            text = f"{difference.mean():+.1f} ({low:+.1f} to {high:+.1f})"
            cells += ["" if method == base else text, f"{ranks[number][method]:.1f}"]
        trainings = count_epochs(base_curve, found.mean(axis=(0, 1))[-1])
        print(f"| {' | '.join(cells)} | {trainings:g} of {num_trainings} |")
    if arguments.figure:
        draw(results, order, arguments.figure)


def draw(results: Results, order: Sequence[str], path: Path) -> None:
    """Plot the mean regret over the epochs paid."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for number, method in enumerate(reversed(order)):
        curve = results.regrets[method].mean(axis=(0, 1))
        is_ours = method.startswith("ours")
        look: dict[str, Any] = {"linestyle": "-" if is_ours else "--", "label": method}
        look |= {"linewidth": 2.5 if is_ours else 1.2, "color": colours[number % len(colours)]}
        ax.plot(range(1, len(curve) + 1), curve, **look)
    ax.set_xlabel("epochs paid, in full trainings")
    ax.set_ylabel("mean regret (100: a median random configuration)")
    ax.set_ylim(-5, 60)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True)
    simulating = commands.add_parser("run")
    simulating.add_argument("--lcbench", type=Path, required=True)
    simulating.add_argument("--out", type=Path, required=True)
    simulating.add_argument("--methods", nargs="+", default=[*OURS, *PEERS, *FIXED])
    simulating.add_argument("--seeds", default="10:20")
    simulating.add_argument("--noise", type=float, default=0.0)
    simulating.add_argument("--trainings", type=int, default=50)
    simulating.add_argument("--processes", type=int, default=os.cpu_count())
    simulating.set_defaults(function=run)
    showing = commands.add_parser("show")
    showing.add_argument("files", type=Path, nargs="+")
    showing.add_argument("--only", nargs="+")
    showing.add_argument("--against", default="ours")
    showing.add_argument("--figure", type=Path)
    showing.set_defaults(function=show)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
