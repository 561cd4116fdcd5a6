"""What a newcomer gets: each space's own search on this machine, and its best trial confirmed.

    python benchmarks/newcomer.py run --out FILE [--spaces s10 s7 ...] [--seeds 5]
    python benchmarks/newcomer.py rank --out FILE [--spaces s10] [--configs 8]
    python benchmarks/newcomer.py show --out FILE

On CIFAR-10, tier cpu, with nothing beside it. `run` takes about 10 minutes for each space: the
search as README has it, then `confirm --top 1` with the same images and epochs under new seeds.
`rank` takes hours and can be resumed: it trains the baseline and random configurations of the tier
as its last rung does, and over 10 epochs of 15,000 images.

`show` prints trials and gains with 95 % t intervals over the seeds; and Kendall's tau between the
last rung and the longer training with its 95 % bootstrap interval over the configurations.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pairs import describe_machine
from time_to_quality import LONG, format_gain
from trainings import Job, Row, append_row, read_rows, run_jobs

from tune_cifar.dataset import CIFAR10
from tune_cifar.record.journal import read_state
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.search.sampler import Sampler
from tune_cifar.space.select import load_space
from tune_cifar.verify.confirm import summarise

SPACES = ("s10", "s7", "s8", "s6", "s10_postact")
CONFIG_SEED = 1
NUM_RESAMPLES = 2000
LONG_RUN = {**LONG, "val_size": CIFAR10.num_val}


def run(arguments: argparse.Namespace) -> None:
    """Run the searches and confirmations that the file lacks."""
    for space in arguments.spaces or SPACES:
        if not any(row["space"] == space and "trials" in row for row in read_rows(arguments.out)):
            row = {"space": space, **search(space, arguments.seeds), **describe_machine()}
            append_row(arguments.out, row)
            print(describe(row), flush=True)


def search(space: str, num_seeds: int) -> Row:
    """Search and confirm with the public commands; return what came of it."""
    with tempfile.TemporaryDirectory() as folder:

        def call(*words: str) -> SearchState:
            command = [sys.executable, "-m", "tune_cifar", *words, "--storage", folder]
            subprocess.run(command, check=True, stdout=sys.stderr)
            return read_state(search_folder(Path(folder), words[words.index("--name") + 1]))

        state = call("search", "--space", space, "--tier", "cpu", "--name", "first")
        top = ("--search", "first", "--top", "1", "--seeds", str(num_seeds))
        baseline, *found = summarise(call("confirm", *top, "--name", "again"))
    pairs = [(best.scores[seed], baseline.scores[seed]) for best in found for seed in best.scores]
    counts = {"trials": len(state.trials), "complete": state.counts["complete"]}
    scores = {"baseline": state.trials[0].score, "best": state.best and state.best.score}
    sizes = {name: state.header.baseline[name] for name in ("epochs", "train_size", "val_size")}
    return {**counts, **scores, "pairs": pairs, **sizes}


def describe(row: Row) -> str:
    """Return a search's row of the table."""
    sizes = f"{row['epochs']} x {row['train_size']:,} / {row['val_size']:,}"
    scores = " | ".join(
        "-" if row[name] is None else f"{100 * row[name]:.2f} %" for name in ("baseline", "best")
    )
    gain = format_gain(row["pairs"]) if row["pairs"] else "the baseline was best"
    return f"| {row['space']} | {sizes} | {row['trials']} | {row['complete']} | {scores} | {gain} |"


def rank(arguments: argparse.Namespace) -> None:
    """Run the trainings that the file lacks, configuration after configuration."""
    jobs = []
    for name in arguments.spaces or ("s10",):
        space = load_space(name, "cpu")
        sampler = space.budget.sampler.model_copy(update={"kind": "random"})
        budget = space.budget.model_copy(update={"sampler": sampler})
        drawing = Sampler(replace(space, budget=budget, points=()), CONFIG_SEED)
        for number in range(arguments.configs):
            config = space.config(drawing.ask(number)[0])
            for length, changes in (("last rung", {}), ("long", LONG_RUN)):
                changed = config.model_copy(update=changes)
                key = {"space": name, "config": number, "length": length}
                jobs.append(Job(key, changed, {"epochs": changed.epochs}))
    run_jobs(jobs, arguments.out)


def measure_tau(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return Kendall's tau-b of the pairs and its bootstrap interval."""
    from scipy.stats import kendalltau

    scores, random = np.array(pairs), np.random.default_rng(0)
    drawn = [
        kendalltau(*scores[random.integers(0, len(scores), len(scores))].T).statistic
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(kendalltau(*scores.T).statistic), float(low), float(high)


def show(arguments: argparse.Namespace) -> None:
    """Print both tables."""
    rows = read_rows(arguments.out)
    print("| space | epochs x training / validation | begun | complete | baseline | best | gain |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        if "trials" in row:
            print(describe(row))
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        if "length" in row:
            found = scores.setdefault(row["space"], {}).setdefault(row["config"], {})
            found[row["length"]] = row["val_acc"]
    for space, configs in scores.items():
        both = [(found["last rung"], found["long"]) for found in configs.values() if len(found) > 1]
        tau, low, high = measure_tau(both)
        print(f"\n{space}: tau {tau:.2f} ({low:.2f} to {high:.2f}), {len(both)} configurations")
        for pair in sorted(both, key=lambda scores: scores[1]):
            print(f"last rung {100 * pair[0]:.2f} %, long {100 * pair[1]:.2f} %")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("action", choices=["run", "rank", "show"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--spaces", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--configs", type=int, default=8)
    arguments = parser.parse_args()
    {"run": run, "rank": rank, "show": show}[arguments.action](arguments)


if __name__ == "__main__":
    main()
