"""Trainings for the benchmarks: two at once, each in a process, each a line of a JSON Lines file.

A file grows by a line for each training, so that a run which was stopped goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune_cifar.dataset import CIFAR10
from tune_cifar.schema import TrainConfig

NUM_WORKERS = 2
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A training to be done.

    Attributes:
        key: what its line starts with; no two jobs have the same.
        config: the recipe.
        facts: further fields of its line.
        has_curve: whether its line has val_acc of every epoch instead of the last one's.
    """

    key: Row
    config: TrainConfig
    facts: Row = field(default_factory=dict)
    has_curve: bool = False


def train_once(config: TrainConfig) -> Row:
    """Train, one thread; return val_acc by epoch (none if it diverged), diverged and seconds."""
    from tune_cifar.data.files import find_data
    from tune_cifar.data.load import load_train_val
    from tune_cifar.errors import Diverged
    from tune_cifar.train.numerics import resolve_numerics
    from tune_cifar.train.trainer import Trainer

    start, accs, diverged = time.monotonic(), [], False
    data = load_train_val(find_data(None), config.train_size, config.val_size)
    try:
        accs = [result.val_acc for result in Trainer(config, data, resolve_numerics())]
    except Diverged:
        diverged = True
    seconds = round(time.monotonic() - start, 1)
    return {"val_acc": accs, "diverged": diverged, "seconds": seconds}


def read_rows(path: Path) -> list[Row]:
    """Return the lines of the file; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append_row(path: Path, row: Row) -> None:
    """Append a line to the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def run_jobs(jobs: Sequence[Job], path: Path) -> None:
    """Run the jobs that the file lacks, in their order; print each with the time that is left."""
    rows = read_rows(path)
    jobs = [job for job in jobs if not any(job.key.items() <= row.items() for row in rows)]
    total, done = sum(job.config.epochs for job in jobs), 0
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(NUM_WORKERS, context)
    try:
        futures = {pool.submit(train_once, job.config): job for job in jobs}
        for future in as_completed(futures):
            job, found = futures[future], future.result()
            score = CIFAR10.chance if found["diverged"] else found["val_acc"][-1]
            if not job.has_curve:
                found["val_acc"] = score
            append_row(path, {**job.key, **job.facts, **found})
            done += job.config.epochs
            left = (time.monotonic() - start) / done * (total - done) / 60
            name = " ".join(f"{key} {value}" for key, value in job.key.items())
            cost = f"{found['seconds']} s; {done}/{total} epochs, {left:.0f} min left"
            print(f"{name}: {100 * score:.2f} %, {cost}", flush=True)
    finally:  # after a fault nothing more is trained
        pool.shutdown(cancel_futures=True)
