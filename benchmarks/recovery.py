"""Cost of resuming a long search: a record of many finished trials, written by the package's code.

    python benchmarks/recovery.py [--trials 1000] [--json FILE]

- resume: seconds to open the record, rebuild sampler and rungs and propose the next trial (TPE),
  less those of a new search of the same space for its first trial
- mlflow: seconds to rebuild all its runs in an empty SQLite store; again: when nothing is missing
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
from tune_cifar.record.state import TrialState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import DataInfo, EpochResult
from tune_cifar.search.driver import SearchDriver
from tune_cifar.space.select import load_space
from tune_cifar.tracking.upload import sync_search
from tune_cifar.train.numerics import resolve_numerics
from tune_cifar.train.recorded import make_header


def make_result(epoch: int, val_acc: float) -> EpochResult:
    loss = 2.3 - val_acc
    metrics = {"train_loss": loss, "train_acc": val_acc, "val_loss": loss, "val_acc": val_acc}
    costs = {"epoch_seconds": 40.0, "images_per_second": 150.0, "peak_memory_mb": 900.0}
    return EpochResult(epoch=epoch, step=47 * epoch, lr=0.01, **metrics, **costs)


def make_driver(record: Record, num_trials: int) -> SearchDriver:
    space = load_space("s10", "full")
    budget = space.budget.model_copy(update={"trials": num_trials, "max_time_seconds": None})
    space = dataclasses.replace(space, budget=budget)
    return SearchDriver(record, space, lambda state, event: None)


def write_search(storage: Path, name: str, num_trials: int) -> Path:
    """Record a search of s10's full tier whose trials report random accuracies, untrained."""
    space = load_space("s10", "full")
    info = DataInfo(name="cifar10", digest="d", split_hash="s")
    numerics, command = resolve_numerics("cpu"), "benchmarks/recovery.py"
    header = make_header("search", name, space, 0, info, numerics, command)
    generator = random.Random(0)
    with Record.create(search_folder(storage, name), header) as record:
        driver = make_driver(record, num_trials)
        while (trial := driver.ask()) is not None:
            report_epochs(driver, trial, generator)
        if num_trials > 1:
            driver.finish()
    return record.state.folder


def report_epochs(driver: SearchDriver, trial: TrialState, generator: random.Random) -> None:
    """Report random accuracies, stage by stage, until the trial ends."""
    for stage in driver.list_remaining_stages(trial):
        for epoch in range(1, stage.length + 1):
            val_acc = min(0.95, 0.3 + epoch / 50 + generator.random() / 10)
            if not driver.report(trial.number, stage, make_result(epoch, val_acc)):
                return


def time_first_ask(folder: Path, num_trials: int) -> float:
    """Return the seconds from the closed record to the proposal of the next trial."""
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
        trials = read_state(folder).trials.values()
        figures["epochs"] = float(sum(trial.epochs_done for trial in trials))
        for what in ("mlflow_seconds", "mlflow_again_seconds"):
            start = time.perf_counter()
            sync_search(f"sqlite:///{storage}/mlflow.db", storage, folder)
            figures[what] = time.perf_counter() - start
        short = write_search(storage, "short", 1)
        new_seconds = time_first_ask(short, 2)
        figures["resume_seconds"] = time_first_ask(folder, arguments.trials + 1) - new_seconds
    for what, value in figures.items():
        print(f"{what}: {value:.2f}")
    if arguments.json:
        facts = {"date": datetime.now(UTC).date().isoformat(), "trials": arguments.trials}
        facts["hardware"] = f"{platform.machine()}, {os.cpu_count()} cores"
        arguments.json.write_text(json.dumps(facts | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
