"""Seed noise of every space: standard deviation of val_acc over seeds, baseline of the cpu tier.

    python benchmarks/seed_noise.py [SPACE ...] [--seeds 5] [--processes 2]

Writes tune_cifar/verify/seed_noise.json, which `reproduce` reads: accuracies under other Numerics
may differ from the recorded ones by three of these standard deviations. It is the largest over the
epochs, since a reproduction is compared epoch by epoch. Rows of other spaces stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

SPACES = ("s6", "s7", "s8", "s10", "s10_postact", "smoke")
TABLE = Path(__file__).parent.parent / "tune_cifar" / "verify" / "seed_noise.json"


def train(space: str, seed: int) -> list[float]:
    """Return val_acc after each epoch of the baseline with this seed, one thread."""
    from tune_cifar.data.files import find_data
    from tune_cifar.data.load import load_train_val
    from tune_cifar.space.select import load_space
    from tune_cifar.train.numerics import resolve_numerics
    from tune_cifar.train.trainer import Trainer

    config = load_space(space, "cpu", {"seed": seed}).baseline
    data = load_train_val(find_data(None), config.train_size, config.val_size)
    return [result.val_acc or 0.0 for result in Trainer(config, data, resolve_numerics())]


def describe(space: str, curves: list[list[float]]) -> dict[str, object]:
    """Return a row of the table."""
    from tune_cifar.space.select import load_space
    from tune_cifar.train.numerics import resolve_numerics

    config, numerics = load_space(space, "cpu").baseline, resolve_numerics()
    last = [curve[-1] for curve in curves]
    return {
        "sd_val_acc": round(max(statistics.stdev(accs) for accs in zip(*curves, strict=True)), 5),
        "mean_val_acc": round(statistics.mean(last), 5),
        "sd_val_acc_last": round(statistics.stdev(last), 5),
        "n": len(curves),
        "epochs": config.epochs,
        "train_size": config.train_size,
        "val_size": config.val_size,
        "hardware": f"{numerics.device_name}, {numerics.precision}, {numerics.threads} thread",
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("spaces", nargs="*", default=SPACES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    table = json.loads(TABLE.read_text())
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for space in arguments.spaces:
            curves = list(pool.map(train, [space] * arguments.seeds, range(arguments.seeds)))
            table["spaces"][space] = describe(space, curves)
            TABLE.write_text(json.dumps(table, indent=2) + "\n")
            print(space, json.dumps(table["spaces"][space]), flush=True)


if __name__ == "__main__":
    main()
