"""Cost of a trial that trains nothing: this search against stock Ray Tune and in-process Optuna.

    python benchmarks/overhead.py [--trials 10 100 1000] [--rounds 1] [--json FILE]
    python benchmarks/overhead.py --trials 10 --rounds 3

One trial at a time, each with 24 epochs; seconds per trial from the first trial's start to the end
of the run.

- ours: `run_search` with a worker that invents its epochs: the sampler of s7's tier cpu, a synced
  record, uploads to MLflow (SQLite)
- ours, rungs: the same with one epoch, as if only rungs were reported
- stock: a function trainable, a new process per trial, Ray's MLflow callback, random points;
  smallest number only
- optuna: TPE with Optuna's successive halving, in memory

With the smallest number also: a `command` as a user types it, two trials of smoke: `running`,
seconds from its start until the first trial trains, and of `bare`, until the end of `import
ray.tune, torch; ray.init()`; `shutdown`, from the last trial's end to the command's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from pairs import (
    Figures,
    Round,
    compare,
    make_parser,
    median_figure,
    print_table,
    run_side,
    take_turns,
    write_json,
)

EPOCHS = 24


def since_start() -> float:
    """Return the seconds since this process started."""
    return time.time() - psutil.Process().create_time()


def make_result(epoch: int) -> Any:
    """Return a made-up result of an epoch."""
    from tune_cifar.schema import EpochResult

    acc = 0.3 + epoch / 100
    losses = {"train_loss": 2.3 - acc, "train_acc": acc, "val_loss": 2.3 - acc, "val_acc": acc}
    costs = {"epoch_seconds": 1.0, "images_per_second": 1000.0, "peak_memory_mb": 500.0}
    return EpochResult(epoch=epoch, step=10 * epoch, lr=0.01, **losses, **costs)


def run_ours(num_trials: int, epochs: int) -> Figures:
    """Run one search of s7's cpu tier; no trial stops early."""
    from tune_cifar.data.files import DataSource
    from tune_cifar.record.events import Stage, TrialEnded, TrialStarted
    from tune_cifar.search import run as search
    from tune_cifar.search.plan import SearchRequest
    from tune_cifar.search.worker import TrialWorker
    from tune_cifar.space.select import load_space

    class EmptyWorker(TrialWorker):
        def _make_results(self) -> Iterator[tuple[Stage, Any]]:
            for stage in (Stage(*found) for found in self._trial["stages"]):
                for epoch in range(1, stage.length + 1):
                    yield stage, make_result(epoch)

    times: dict[type, list[float]] = {TrialStarted: [], TrialEnded: []}

    def note(state: Any, event: Any) -> None:
        if type(event) in times:
            times[type(event)].append(since_start())

    vars(search)["TrialWorker"] = EmptyWorker
    space = load_space("s7", "cpu", {"train_size": 5000, "val_size": 100})
    changes = {"rungs": (epochs,), "trials": num_trials, "max_time_seconds": None}
    baseline = space.baseline.model_copy(update={"epochs": epochs})
    budget = space.budget.model_copy(update=changes)
    space = dataclasses.replace(space, baseline=baseline, budget=budget)
    source = DataSource("shapes", None)
    with tempfile.TemporaryDirectory() as folder:
        request = SearchRequest(
            source, Path(folder), command="overhead", name="empty", max_concurrent=1
        )
        state, faults = search.run_search(search.prepare_search(space, request), note)
        end = since_start()
        assert not faults and state.counts["complete"] == num_trials, (faults, state.counts)
    ends = times[TrialEnded]
    return {
        "seconds_per_trial": (end - times[TrialStarted][0]) / num_trials,
        "steady_seconds_per_trial": (ends[-1] - ends[0]) / max(1, num_trials - 1),
    }


def run_stock(num_trials: int) -> Figures:
    """Run Ray Tune as in its tutorial, with nothing to train."""
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    def train_nothing(config: dict[str, Any]) -> None:
        for epoch in range(1, EPOCHS + 1):
            result = make_result(epoch).model_dump()
            tune.report({name: value for name, value in result.items() if value is not None})

    with tempfile.TemporaryDirectory() as folder:
        callback = MLflowLoggerCallback(f"sqlite:///{folder}/mlflow.db", experiment_name="stock")
        ray.init()  # ours has started it when its first trial starts
        begin = since_start()
        results = tune.Tuner(
            tune.with_resources(train_nothing, {"cpu": 1}),
            param_space={name: tune.uniform(0, 1) for name in ("max_lr", "dropout", "pct_start")},
            tune_config=tune.TuneConfig(num_samples=num_trials, max_concurrent_trials=1),
            run_config=tune.RunConfig(storage_path=folder, callbacks=[callback], verbose=0),
        ).fit()
        assert results.num_errors == 0
        return {"seconds_per_trial": (since_start() - begin) / num_trials}


def run_optuna(num_trials: int) -> Figures:
    """Run Optuna's own loop in this process, without parallelism, tracking or files."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def train_nothing(trial: optuna.Trial) -> float:
        for name in ("max_lr", "dropout", "pct_start"):
            trial.suggest_float(name, 0, 1)
        for epoch in range(1, EPOCHS + 1):
            trial.report(make_result(epoch).val_acc, epoch)
            trial.should_prune()
        return float(make_result(EPOCHS).val_acc)

    pruner = optuna.pruners.SuccessiveHalvingPruner()
    study = optuna.create_study(direction="maximize", pruner=pruner)
    begin = time.perf_counter()
    study.optimize(train_nothing, n_trials=num_trials)
    return {"seconds_per_trial": (time.perf_counter() - begin) / num_trials}


def run_command() -> Figures:
    """Run a search of real trials and time the lines that it prints."""
    from tune_cifar.record.journal import read_state

    words = [sys.executable, "-m", "tune_cifar", "search", "--space", "smoke", "--data", "shapes"]
    words += ["--trials", "2", "--max-concurrent", "1", "--name", "command", "--storage"]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        lines: list[tuple[float, str]] = []
        command = [*words, folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append((time.perf_counter() - begin, line))
        end = time.perf_counter() - begin
        assert process.returncode == 0, lines
        _, first = read_state(Path(folder, "searches", "command")).trials[0].trained_epochs[0]
    reported = next(seconds for seconds, line in lines if " epoch 1/" in line)
    ended = max(seconds for seconds, line in lines if " epoch 3/3" in line or " stopped " in line)
    return {"running": reported - first.epoch_seconds, "shutdown": end - ended}


def run_bare() -> Figures:
    """Import and start what every user of Ray Tune and torch must."""
    import ray
    import torch  # noqa: F401
    from ray import tune  # noqa: F401

    ray.init(include_dashboard=False, logging_level="ERROR")
    return {"running": since_start()}


SIDES: dict[str, Callable[[int], Figures]] = {
    "ours": lambda num: run_ours(num, EPOCHS),
    "ours, rungs": lambda num: run_ours(num, 1),
    "stock": run_stock,
    "optuna": run_optuna,
    "command": lambda num: run_command(),
    "bare": lambda num: run_bare(),
}


# Run with the smallest number of trials alone.
ONCE = ("stock", "command", "bare")


def run(side: str, num_trials: int) -> Figures:
    """Run a side in a process of its own."""
    return run_side(__file__, side, ("--trials", num_trials))


def main() -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--trials", type=int, nargs="+", default=[10, 100, 1000])
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](*arguments.trials)))
        return
    found: dict[int, list[Round]] = {}
    for num_trials in sorted(arguments.trials):
        print(f"{num_trials} trials", flush=True)
        sides = [side for side in SIDES if not found or side not in ONCE]
        run_one = functools.partial(run, num_trials=num_trials)
        found[num_trials] = take_turns(sides, arguments.rounds, run_one)
    rows = []
    for num, rounds in found.items():
        for side in rounds[0]:
            if side not in ONCE[1:]:
                figures = ("seconds_per_trial", "wall")
                medians = (median_figure(rounds, side, figure) for figure in figures)
                rows.append((num, side, *medians))
    header = ("trials", "side", "seconds per trial", "process, s")
    print_table("Trials that train nothing", header, rows)
    fewest = next(iter(found.values()))
    print(f"stock / ours: {compare(fewest, 'stock', 'ours', 'seconds_per_trial').describe()}")
    for side, what in (("command", "its first trial trains"), ("bare", "ready")):
        print(f"{side}: {what} after {median_figure(fewest, side, 'running'):.2f} s")
    print(f"shutdown: {median_figure(fewest, 'command', 'shutdown'):.2f} s")
    write_json(arguments.json, {"rounds": found})


if __name__ == "__main__":
    main()
