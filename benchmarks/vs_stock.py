"""Whole search against stock Ray Tune: the same given configurations of s7, no early stopping in either.

    python benchmarks/vs_stock.py [--pairs 3] [--trials 24] [--epochs 3] [--train-size 8000] [--json FILE]

stock: Ray Tune as its PyTorch tutorial does it: a function trainable, a DataLoader whose dataset applies albumentations
image by image, fp32, NCHW, a new worker process for every trial, Ray's MLflow callback.
ours: `run_search` with one rung at the last epoch.
Both train the same model class on the same images; both run in a process of their own; pairs are taken in turn.
Reported per side: wall time of the whole process, wall time from the first trial's start to the last trial's end, and
training images per second over that span. The ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VAL_SIZE = 1000
CONFIG_SEED = 7


def make_space(num_trials: int, epochs: int, train_size: int) -> Any:
    """s7's cpu tier with its trials given: the baseline and random points, no rung before the last epoch."""
    from tune_cifar.sampler import Sampler
    from tune_cifar.space import load_space

    sizes = {"epochs": epochs, "train_size": train_size, "val_size": VAL_SIZE}
    space = load_space("s7", "cpu", sizes)
    budget = space.budget.model_copy(update={"rungs": (epochs,), "trials": num_trials, "max_time_seconds": None})
    space = dataclasses.replace(space, budget=budget, points=())
    random = budget.model_copy(update={"sampler": budget.sampler.model_copy(update={"kind": "random", "startup": 0})})
    sampler = Sampler(dataclasses.replace(space, budget=random), CONFIG_SEED)
    points = [sampler.ask(number)[0] for number in range(num_trials)]
    return dataclasses.replace(space, points=tuple(points[1:]))


def run_ours(arguments: argparse.Namespace) -> dict[str, float]:
    """One search through run_search; returns the span of the trials and the images trained."""
    from tune_cifar.data import find_data
    from tune_cifar.events import EpochReported, TrialStarted
    from tune_cifar.plan import SearchRequest
    from tune_cifar.search import prepare_search, run_search

    times: list[float] = []

    def note(state: Any, event: Any) -> None:
        if isinstance(event, TrialStarted | EpochReported):
            times.append(time.time())

    with tempfile.TemporaryDirectory() as folder:
        request = SearchRequest(find_data(None), Path(folder), "vs_stock", name="ours")
        plan = prepare_search(make_space(arguments.trials, arguments.epochs, arguments.train_size), request)
        state, faults = run_search(plan, note)
        assert not faults, faults
        scores = [trial.score for trial in state.trials.values()]
    assert state.counts["complete"] + state.counts["diverged"] == arguments.trials, state.counts
    return {"span": times[-1] - times[0], "mean_val_acc": statistics.mean(score or 0.0 for score in scores)}


def run_stock(arguments: argparse.Namespace) -> dict[str, float]:
    """The same configurations as a user of Ray Tune's PyTorch tutorial would run them."""
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    space = make_space(arguments.trials, arguments.epochs, arguments.train_size)
    configs = [space.baseline, *(space.config(point) for point in space.points)]
    dumps = [config.model_dump(mode="json") for config in configs]
    with tempfile.TemporaryDirectory() as folder:
        callback = MLflowLoggerCallback(tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment_name="stock")
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
    """A training loop in the tutorial's shape: Dataset, DataLoader, model, optimizer, report per epoch."""
    import torch
    import torch.nn.functional as F
    from ray import tune
    from torch.utils.data import DataLoader

    from tune_cifar.data import find_data, load_train_val
    from tune_cifar.models import build_model
    from tune_cifar.optim import make_optimizer, make_schedule
    from tune_cifar.schema import TrainConfig

    started = time.time()
    torch.set_num_threads(1)
    config = TrainConfig(**parameters["config"])
    torch.manual_seed(config.seed)
    data = load_train_val(find_data(None), config.train_size, config.val_size)
    assert data.val is not None
    train = DataLoader(AugmentedImages(data.train, config), batch_size=config.batch_size, shuffle=True)
    val = DataLoader(AugmentedImages(data.val, None), batch_size=500)
    model = build_model(config)
    optimizer = make_optimizer(model.parameters(), config)
    schedule = make_schedule(optimizer, config)
    for epoch in range(config.epochs):
        model.train()
        for step, (images, labels) in enumerate(train):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if (epoch, step) != (config.epochs - 1, len(train) - 1):
                schedule.step()
        model.eval()
        with torch.no_grad():
            num_correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in val)
        tune.report({"val_acc": num_correct / config.val_size, "epoch": epoch + 1, "started": started})


class AugmentedImages:
    """A map-style dataset: s7's published augmentation by albumentations, image by image; None is Normalize alone."""

    def __init__(self, split: Any, config: Any) -> None:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        import albumentations as A
        import cv2

        cv2.setNumThreads(0)
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        ops = []
        if config is not None:
            t, s, r, size = config.shift_limit, config.scale_limit, config.rotate_limit, config.cutout_size
            hole = {"num_holes_range": (1, 1), "hole_height_range": (size, size), "hole_width_range": (size, size)}
            ops = [
                A.HorizontalFlip(p=config.hflip_p),
                A.Affine(
                    scale=(1 - s, 1 + s),
                    keep_ratio=True,
                    translate_percent=(-t, t),
                    rotate=(-r, r),
                    border_mode=cv2.BORDER_REFLECT_101,
                    p=config.shift_scale_rotate_p,
                ),
                A.CoarseDropout(**hole, fill=tuple(255 * m for m in mean), p=config.cutout_p),
                A.ToGray(p=config.gray_p),
            ]
        self._compose = A.Compose([*ops, A.Normalize(mean=mean, std=std)])
        self._images = split.images_NCHW.permute(0, 2, 3, 1).numpy()
        self._labels = split.labels_N.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import torch

        image = self._compose(image=self._images[index])["image"]
        return torch.from_numpy(image).permute(2, 0, 1), self._labels[index]


def run_pair(arguments: argparse.Namespace, first: str) -> dict[str, dict[str, float]]:
    """Both sides, one after the other, each in a fresh process whose whole life is timed."""
    pair = {}
    for side in (first, "ours" if first == "stock" else "stock"):
        sizes = ["--trials", arguments.trials, "--epochs", arguments.epochs, "--train-size", arguments.train_size]
        start = time.time()
        command = [sys.executable, __file__, "--side", side, *map(str, sizes)]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            raise SystemExit(answer.stderr[-3000:])
        figures = json.loads(answer.stdout.strip().splitlines()[-1])
        images = arguments.trials * arguments.epochs * arguments.train_size
        pair[side] = {"wall": time.time() - start, "images_per_second": images / figures["span"], **figures}
        print(f"{side}: " + ", ".join(f"{name} {value:.4g}" for name, value in pair[side].items()), flush=True)
    return pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train-size", type=int, default=8000)
    parser.add_argument("--side", choices=("ours", "stock"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps((run_ours if arguments.side == "ours" else run_stock)(arguments)))
        return
    pairs = [run_pair(arguments, ("stock", "ours")[i % 2]) for i in range(arguments.pairs)]
    ratios = {
        "whole": [pair["stock"]["wall"] / pair["ours"]["wall"] for pair in pairs],
        "without_start_up": [pair["stock"]["span"] / pair["ours"]["span"] for pair in pairs],
    }
    for name, values in ratios.items():
        print(
            f"{name}: {statistics.median(values):.2f}x "
            f"(median of {len(values)}: {min(values):.2f} to {max(values):.2f})"
        )
    if arguments.json:
        facts = {
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
            "shape": {"trials": arguments.trials, "epochs": arguments.epochs, "train_size": arguments.train_size},
        }
        arguments.json.write_text(json.dumps({**facts, "pairs": pairs, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
