"""The accuracy that ten minutes buy: our search against Ray Tune as its PyTorch tutorial shows it.

    python benchmarks/time_to_quality.py run --out FILE [--spaces s7 s8] [--rounds 3]
                                             [--minutes 10] [--seeds 5]
    python benchmarks/time_to_quality.py show --out FILE

`run` takes about 2 hours of a machine with nothing beside it, on real CIFAR-10, and can be resumed.
A round is a search of each side with another search seed. Both search the hyperparameters, images
and longest training of the space's tier cpu; all else is each side's own default:

- ours: `python -m tune_cifar search --space SPACE --max-time 10m`
- stock: a function trainable with a DataLoader, ASHA with its defaults, OptunaSearch, Ray's MLflow
  callback and a time budget; its best is `get_best_result`. One core a trial, as ours.

Ours so begins with the baseline and the points of the space file, which were written by hand: this
compares what users get, not samplers.

Then both bests and the baseline are trained again by one and the same loop, ours, under new seeds,
evaluated on all validation images, which contain those that chose, for both sides alike: as long as
in the search, and over 10 epochs of 15,000 images.

`show` prints the mean of each side, and ours minus stock with 95 % t intervals: of a round over
its seeds, of all over the means of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pairs import run_side
from trainings import Job, Row, append_row, read_rows, run_jobs
from vs_stock import train_stock

from tune_cifar.dataset import CIFAR10
from tune_cifar.record.journal import read_state
from tune_cifar.record.store import search_folder
from tune_cifar.schema import TrainConfig
from tune_cifar.space.select import load_space
from tune_cifar.verify.confirm import compare_pairs

SIDES = ("stock", "ours")
FIRST_SEED = 100
"""Training seed of the first training after the searches, which use 0."""
LONG = {"epochs": 10, "train_size": 15_000}


class Search(NamedTuple):
    """What a search is run with."""

    space: str
    number: int
    """Of the round, from 1; the search's seed."""
    minutes: float


def search_ours(search: Search, folder: Path) -> Row:
    """Run our command; return the best trial."""
    words = ["--space", search.space, "--tier", "cpu", "--max-time", f"{search.minutes:g}m"]
    words += ["--seed", str(search.number), "--name", "ours", "--storage", str(folder)]
    command = [sys.executable, "-m", "tune_cifar", "search", *words]
    subprocess.run(command, check=True, stdout=sys.stderr)
    state = read_state(search_folder(folder, "ours"))
    best = state.best
    assert best is not None, "a search of this length completes a trial"
    config = best.full_config.model_dump(mode="json")
    counts = {"trials": len(state.trials), "complete": state.counts["complete"]}
    return {"config": config, "val_acc": best.score, **counts}


def train_proposal(parameters: Row, baseline: Row) -> None:
    """Train a proposal of stock Ray Tune: the baseline with these values."""
    train_stock({"config": {**baseline, **parameters}})


def search_stock(search: Search, folder: Path) -> Row:
    """Run Ray Tune's tutorial in this process; return what it calls the best result."""
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    space = load_space(search.space, "cpu")
    baseline = space.baseline.model_dump(mode="json")
    callback = MLflowLoggerCallback(f"sqlite:///{folder}/mlflow.db", experiment_name="stock")
    searched: Any = space.distributions
    trainable = tune.with_parameters(train_proposal, baseline=baseline)
    results = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            metric="val_acc",
            mode="max",
            scheduler=ASHAScheduler(max_t=space.baseline.epochs),
            search_alg=OptunaSearch(searched, metric="val_acc", mode="max", seed=search.number),
            num_samples=-1,
            time_budget_s=60 * search.minutes,
        ),
        run_config=tune.RunConfig(storage_path=str(folder), callbacks=[callback], verbose=0),
    ).fit()
    best = results.get_best_result()
    epochs = [found.metrics.get("epoch", 0) for found in results if found.metrics]
    config = TrainConfig(**{**baseline, **best.config})
    return {
        "config": config.model_dump(mode="json"),
        "val_acc": best.metrics["val_acc"],
        "trials": len(results),
        "complete": sum(epoch == space.baseline.epochs for epoch in epochs),
    }


def run_searches(arguments: argparse.Namespace) -> None:
    """Run the searches that the file lacks, the sides in turn, in the other order every round."""
    for space in arguments.spaces:
        for number in range(1, arguments.rounds + 1):
            for side in SIDES if number % 2 else reversed(SIDES):
                key = {"space": space, "round": number, "side": side}
                if any(key.items() <= row.items() for row in read_rows(arguments.out)):
                    continue
                options: list[Any] = ["search", "--out", arguments.out, "--minutes"]
                options += [arguments.minutes, "--spaces", space, "--rounds", number]
                found = run_side(__file__, side, options)
                append_row(arguments.out, {**key, **found})
                print(f"{space}, round {number}, {side}: {describe(found)}", flush=True)


def describe(found: Row) -> str:
    """Return what a search found, in a line."""
    trials = f"{found['trials']} trials, {found['complete']} complete"
    return f"{trials}, best {100 * found['val_acc']:.2f} %, {found['wall']:.0f} s"


def list_trainings(rows: Sequence[Row], spaces: Sequence[str], num_seeds: int) -> list[Job]:
    """Return the trainings after the searches: the baseline (round 0) and all bests."""
    jobs = []
    for space in spaces:
        baseline = load_space(space, "cpu").baseline
        recipes = [(0, "baseline", baseline)]
        for row in rows:
            if row["space"] == space and "config" in row:
                recipes.append((row["round"], row["side"], TrainConfig(**row["config"])))
        for name, sizes in (("short", {}), ("long", LONG)):
            for number, side, recipe in recipes:
                for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
                    changes = {**sizes, "val_size": CIFAR10.num_val, "seed": seed}
                    config = TrainConfig(**{**recipe.model_dump(mode="json"), **changes})
                    key = {"space": space, "round": number, "side": side}
                    jobs.append(Job({**key, "length": name, "seed": seed}, config))
    return jobs


def run(arguments: argparse.Namespace) -> None:
    run_searches(arguments)
    jobs = list_trainings(read_rows(arguments.out), arguments.spaces, arguments.seeds)
    run_jobs(jobs, arguments.out)


def format_gain(pairs: Sequence[tuple[float, float]]) -> str:
    """Return the mean difference in points with its interval."""
    gain = compare_pairs(pairs)
    assert gain is not None
    if gain.interval is None:
        return f"{100 * gain.mean:+.2f} (n = 1)"
    low, high = gain.interval
    return f"{100 * gain.mean:+.2f} ({100 * low:+.2f} to {100 * high:+.2f}, n = {gain.num_pairs})"


def show(arguments: argparse.Namespace) -> None:
    """Print a table with a row for each space, length and round, and for all rounds together."""
    scores: dict[tuple[Any, ...], float] = {}
    for row in read_rows(arguments.out):
        if "length" in row:
            key = (row["space"], row["length"], row["round"], row["side"], row["seed"])
            scores[key] = row["val_acc"]
        else:
            print(f"{row['space']}, round {row['round']}, {row['side']}: {describe(row)}")

    def collect(*key: Any) -> list[float]:
        return [scores[found] for found in sorted(scores) if found[:-1] == key]

    print("\n| space, length | round | baseline | stock | ours | ours minus stock |")
    print("|---|---|---|---|---|---|")
    means: list[tuple[float, float]] = []
    for space, length in sorted({key[:2] for key in scores}):
        rounds = sorted({key[2] for key in scores if key[:2] == (space, length) and key[2]})
        means_of_space = []
        for number in rounds:
            ours, stock = (collect(space, length, number, side) for side in ("ours", "stock"))
            sides = (collect(space, length, 0, "baseline"), stock, ours)
            cells = " | ".join(f"{100 * statistics.fmean(found):.2f} %" for found in sides)
            gain = format_gain(list(zip(ours, stock, strict=True)))
            print(f"| {space}, {length} | {number} | {cells} | {gain} |")
            means_of_space.append((statistics.fmean(ours), statistics.fmean(stock)))
        print(f"| {space}, {length} | all | | | | {format_gain(means_of_space)} |")
        means += means_of_space if length == "short" else []
    print(f"| all, short | all | | | | {format_gain(means)} |")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("action", choices=["run", "show", "search"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--spaces", nargs="+", default=["s7", "s8"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help="of a single search, `search`")
    arguments = parser.parse_args()
    if arguments.action == "search":
        (space,) = arguments.spaces
        search = Search(space, arguments.rounds, arguments.minutes)
        with tempfile.TemporaryDirectory() as folder:
            run_one = search_ours if arguments.side == "ours" else search_stock
            print(json.dumps(run_one(search, Path(folder))))
    else:
        (run if arguments.action == "run" else show)(arguments)


if __name__ == "__main__":
    main()
