"""What a long search costs when it is taken up again: a record of many finished trials, made through the public code.

    python benchmarks/recovery.py [--trials 1000] [--json FILE]

resume: seconds to open the record, rebuild sampler and rungs and propose the next trial (TPE), beyond what a new search
of the same space takes for its first. mlflow: seconds to rebuild all its runs in an empty SQLite store; again: the same
when nothing is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.store import search_folder
from tune_cifar.schema import DataInfo, EpochResult
from tune_cifar.search.driver import SearchDriver
from tune_cifar.space.select import load_space
from tune_cifar.tracking.upload import sync_search
from tune_cifar.train.numerics import resolve_numerics
from tune_cifar.train.recorded import make_header


def make_result(epoch: int, val_acc: float) -> EpochResult:
    return EpochResult(
        epoch=epoch,
        step=47 * epoch,
        train_loss=2.3 - val_acc,
        train_acc=val_acc,
        val_loss=2.3 - val_acc,
        val_acc=val_acc,
        lr=0.01,
        epoch_seconds=40.0,
        images_per_second=150.0,
        peak_memory_mb=900.0,
    )


def make_driver(record: Record, num_trials: int) -> SearchDriver:
    space = load_space("s10", "full")
    budget = space.budget.model_copy(update={"trials": num_trials, "max_time_seconds": None})
    return SearchDriver(
        record, dataclasses.replace(space, budget=budget), lambda state, event: None
    )


def write_search(storage: Path, name: str, num_trials: int) -> Path:
    """A search of s10's full tier whose trials report what a dice says; no trial is trained."""
    space = load_space("s10", "full")
    info = DataInfo(name="cifar10", digest="d", split_hash="s")
    header = make_header(
        "search", name, space, 0, info, resolve_numerics("cpu"), "benchmarks/recovery.py"
    )
    dice = random.Random(0)
    with Record.create(search_folder(storage, name), header) as record:
        driver = make_driver(record, num_trials)
        while (trial := driver.ask()) is not None:
            epoch = 1
            while driver.report(
                trial.number, make_result(epoch, min(0.95, 0.3 + epoch / 50 + dice.random() / 10))
            ):
                epoch += 1
        if num_trials > 1:
            driver.finish()
    return record.state.folder


def time_first_ask(folder: Path, num_trials: int) -> float:
    """From the closed record to the proposal of the trial that comes next."""
    start = time.perf_counter()
    with Record.open(folder) as record:
        record.state.finished = None  # as a SearchResumed would
        assert make_driver(record, num_trials).ask() is not None
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        storage = Path(name)
        start = time.perf_counter()
        folder = write_search(storage, "long", arguments.trials)
        figures = {"record_seconds": time.perf_counter() - start}
        figures["epochs"] = float(
            sum(trial.epochs_done for trial in read_state(folder).trials.values())
        )
        for what in ("mlflow_seconds", "mlflow_again_seconds"):
            start = time.perf_counter()
            sync_search(f"sqlite:///{storage}/mlflow.db", storage, read_state(folder))
            figures[what] = time.perf_counter() - start
        short = write_search(storage, "short", 1)
        figures["resume_seconds"] = time_first_ask(folder, arguments.trials + 1) - time_first_ask(
            short, 2
        )
    for what, value in figures.items():
        print(f"{what}: {value:.2f}")
    if arguments.json:
        facts = {"date": datetime.now(UTC).date().isoformat(), "trials": arguments.trials}
        facts["hardware"] = f"{platform.machine()}, {os.cpu_count()} cores"
        arguments.json.write_text(json.dumps(facts | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
