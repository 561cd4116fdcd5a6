"""Does a hyperparameter pay? Trainings with and without it under the same seeds, on CIFAR-10.

    python benchmarks/levers.py train --out FILE --space s8 [--set NAME=VALUE ...] [--seeds 5]
                                      --try NAME=VALUE [--try NAME=VALUE ...]
    python benchmarks/levers.py show --out FILE --space s8 [--set NAME=VALUE ...]

Every `--try` changes the recipe of the space's tier full, with what `--set` fixes for all. `train`
takes hours and can be resumed; the variants of a seed follow one another. `show` prints the mean
validation accuracy of each variant and its difference to the unchanged recipe, with the 95 % t
interval over the seeds, in pairs.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from time_to_quality import format_gain
from trainings import Job, read_rows, run_jobs

from tune_cifar.space.select import load_space, parse_setting

USUAL = "unchanged"


def train(arguments: argparse.Namespace) -> None:
    """Run the trainings that the file lacks."""
    fixed = dict(parse_setting(setting) for setting in arguments.set)
    jobs = []
    for seed in range(arguments.seeds):
        for variant in (USUAL, *arguments.tried):
            changes = {} if variant == USUAL else dict([parse_setting(variant)])
            settings = {**fixed, **changes, "seed": seed}
            config = load_space(arguments.space, "full", settings).baseline
            key = {"space": arguments.space, "set": fixed, "variant": variant, "seed": seed}
            jobs.append(Job(key, config))
    run_jobs(jobs, arguments.out)


def show(arguments: argparse.Namespace) -> None:
    """Print a row for each variant."""
    scores: dict[str, dict[int, float]] = {}
    fixed = dict(parse_setting(setting) for setting in arguments.set)
    for row in read_rows(arguments.out):
        if (row["space"], row["set"]) == (arguments.space, fixed):
            scores.setdefault(row["variant"], {})[row["seed"]] = row["val_acc"]
    usual = scores[USUAL]
    print("| variant | val_acc | minus unchanged |\n|---|---|---|")
    for variant, found in scores.items():
        pairs = [(found[seed], usual[seed]) for seed in sorted(found) if seed in usual]
        gain = "" if variant == USUAL else format_gain(pairs)
        print(f"| {variant} | {100 * statistics.fmean(found.values()):.2f} % | {gain} |")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("action", choices=["train", "show"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--space", default="s8")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--try", action="append", default=[], dest="tried", metavar="NAME=VALUE")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    (train if arguments.action == "train" else show)(arguments)


if __name__ == "__main__":
    main()
