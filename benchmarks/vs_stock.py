"""A search against stock Ray Tune: the same configurations of s7, without early stopping.

    python benchmarks/vs_stock.py [--pairs 3] [--trials 24] [--epochs 3] [--train-size 8000] [--json
    FILE]

stock: Ray Tune as its PyTorch tutorial does it: a function trainable, a DataLoader whose dataset
applies albumentations image by image, fp32, NCHW, torch's own layers, a new worker process for
every trial, Ray's MLflow callback.
ours: `run_search` with one rung at the last epoch.
Both train the same network on the same images, each in a process of its own, pair after pair.
Reported per side: wall time of the process, wall time from the first trial's start to the last
trial's end, and training images per second over that span. The ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pairs import Figures, compare, make_parser, run_side, take_turns, write_json

VAL_SIZE = 1000
CONFIG_SEED = 7


def make_space(num_trials: int, epochs: int, train_size: int) -> Any:
    """Return s7's cpu tier with fixed trials (baseline, random points) and one rung, at the end."""
    from tune_cifar.search.sampler import Sampler
    from tune_cifar.space.select import load_space

    sizes = {"epochs": epochs, "train_size": train_size, "val_size": VAL_SIZE}
    space = load_space("s7", "cpu", sizes)
    changes = {"rungs": (epochs,), "trials": num_trials, "max_time_seconds": None}
    budget = space.budget.model_copy(update=changes)
    space = dataclasses.replace(space, budget=budget, points=())
    random_sampler = budget.sampler.model_copy(update={"kind": "random", "startup": 0})
    random = budget.model_copy(update={"sampler": random_sampler})
    sampler = Sampler(dataclasses.replace(space, budget=random), CONFIG_SEED)
    points = [sampler.ask(number)[0] for number in range(num_trials)]
    return dataclasses.replace(space, points=tuple(points[1:]))


def run_ours(arguments: argparse.Namespace) -> Figures:
    """Run one search through run_search; return the trials' time span and mean score."""
    from tune_cifar.data.files import find_data
    from tune_cifar.record.events import EpochReported, TrialStarted
    from tune_cifar.search.plan import SearchRequest
    from tune_cifar.search.run import prepare_search, run_search

    times: list[float] = []

    def note(state: Any, event: Any) -> None:
        if isinstance(event, TrialStarted | EpochReported):
            times.append(time.time())

    with tempfile.TemporaryDirectory() as folder:
        request = SearchRequest(find_data(None), Path(folder), "vs_stock", name="ours")
        space = make_space(arguments.trials, arguments.epochs, arguments.train_size)
        state, faults = run_search(prepare_search(space, request), note)
        assert not faults, faults
        scores = [trial.score for trial in state.trials.values()]
    assert state.counts["complete"] + state.counts["diverged"] == arguments.trials, state.counts
    return {
        "span": times[-1] - times[0],
        "mean_val_acc": statistics.mean(score or 0.0 for score in scores),
    }


def run_stock(arguments: argparse.Namespace) -> Figures:
    """Run the same configurations as in Ray Tune's PyTorch tutorial."""
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    space = make_space(arguments.trials, arguments.epochs, arguments.train_size)
    configs = [space.baseline, *(space.config(point) for point in space.points)]
    dumps = [config.model_dump(mode="json") for config in configs]
    with tempfile.TemporaryDirectory() as folder:
        callback = MLflowLoggerCallback(f"sqlite:///{folder}/mlflow.db", experiment_name="stock")
        results = tune.Tuner(
            tune.with_resources(train_stock, {"cpu": 1}),
            param_space={"config": tune.grid_search(dumps)},
            run_config=tune.RunConfig(storage_path=folder, callbacks=[callback], verbose=0),
        ).fit()
        assert results.num_errors == 0
        starts = [result.metrics["started"] for result in results]
        ends = [result.metrics["timestamp"] for result in results]
        accs = [result.metrics["val_acc"] for result in results]
    return {"span": max(ends) - min(starts), "mean_val_acc": statistics.mean(accs)}


def train_stock(parameters: dict[str, Any]) -> None:
    """Train as in the tutorial: Dataset, DataLoader, model, optimizer, a report per epoch."""
    import torch
    from ray import tune
    from source_loop import AugmentedImages, build_source_model, make_loader, train_batch
    from torch.utils.data import DataLoader

    from tune_cifar.data.files import find_data
    from tune_cifar.data.load import load_train_val
    from tune_cifar.schema import TrainConfig
    from tune_cifar.train.optim import apply_settings, make_optimizer, schedule_steps

    started = time.time()
    torch.set_num_threads(1)
    config = TrainConfig(**parameters["config"])
    torch.manual_seed(config.seed)
    data = load_train_val(find_data(None), config.train_size, config.val_size)
    assert data.val is not None
    train = make_loader(data.train, config)
    val_images: Any = AugmentedImages(data.val, None)
    val = DataLoader(val_images, batch_size=500)
    model = build_source_model(config)
    optimizer = make_optimizer(model.parameters(), config)
    schedule = schedule_steps(config)
    for epoch in range(config.epochs):
        model.train()
        for images, labels in train:
            apply_settings(optimizer, next(schedule))
            train_batch(model, optimizer, images, labels, config.label_smoothing)
        model.eval()
        num_correct = 0.0
        with torch.no_grad():
            for images, labels in val:
                num_correct += (model(images).argmax(1) == labels).sum().item()
        val_acc = num_correct / config.val_size
        tune.report({"val_acc": val_acc, "epoch": epoch + 1, "started": started})


def main() -> None:
    parser = make_parser(__doc__, pairs=3)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train-size", type=int, default=8000)
    arguments = parser.parse_args()
    if arguments.side:
        figures = (run_ours if arguments.side == "ours" else run_stock)(arguments)
        num_images = arguments.trials * arguments.epochs * arguments.train_size
        print(json.dumps(figures | {"images_per_second": num_images / figures["span"]}))
        return
    shape = {name: getattr(arguments, name) for name in ("trials", "epochs", "train_size")}
    options: list[Any] = []
    for name, value in shape.items():
        options += [f"--{name.replace('_', '-')}", value]
    run = functools.partial(run_side, __file__, options=options)
    pairs = take_turns(("stock", "ours"), arguments.pairs, run)
    ratios = {"whole": compare(pairs, "stock", "ours", "wall")}
    ratios["without_start_up"] = compare(pairs, "stock", "ours", "span")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio.describe()}")
    write_json(arguments.json, {"shape": shape, "pairs": pairs, "ratios": ratios})


if __name__ == "__main__":
    main()
