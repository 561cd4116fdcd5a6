"""One training on one thread, images/s: `Trainer` against the source loop or another checkout.

    python benchmarks/train_step.py [--spaces s10 s8 s6 s7] [--rounds 3] [--seconds 10]
        [--json FILE]
    python benchmarks/train_step.py --against FOLDER

The sides train a space's baseline on the same images; a side's figure is the batch size over the
median step. ours: `Trainer`, precision auto. source: DataLoader, albumentations, fp32, NCHW,
nn.Dropout. FOLDER is a checkout at another commit (`git worktree add FOLDER COMMIT`) and replaces
the source. `evaluation / forward`: images/s of `Trainer.evaluate` over those of forward passes in
training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

SPACES = ("s10", "s8", "s6", "s7")
WARM_UP_STEPS = 3


def load(space: str) -> tuple[Any, Any]:
    """Return the baseline of the space's cpu tier and its images."""
    from tune_cifar.data.files import find_data
    from tune_cifar.data.load import load_train_val
    from tune_cifar.space.select import load_space

    config = load_space(space, "cpu").baseline
    return config, load_train_val(find_data(None), config.train_size, config.val_size)


def repeat(step: Callable[[], object], seconds: float) -> list[float]:
    """Return the seconds of each step: at least five steps and `seconds`, after a warm-up."""
    for _ in range(WARM_UP_STEPS):
        step()
    taken: list[float] = []
    while sum(taken) < seconds or len(taken) < 5:
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return taken


def run_ours(space: str, seconds: float) -> Figures:
    """Measure `Trainer`: its training steps, its forward passes alone and its evaluation."""
    from tune_cifar.augment.batched import apply_normalize
    from tune_cifar.train.numerics import autocast, memory_format, resolve_numerics
    from tune_cifar.train.trainer import Trainer

    config, data = load(space)
    trainer = Trainer(config, data, resolve_numerics())
    trainer.measure_step_seconds(WARM_UP_STEPS)
    num_steps = max(5, round(seconds / trainer.measure_step_seconds(5)))
    images_per_second = config.batch_size / trainer.measure_step_seconds(num_steps)

    batch = data.train.images_NCHW[: config.batch_size]
    images = apply_normalize(batch, data.about, memory_format(trainer.numerics))

    def forward() -> None:
        with autocast(trainer.numerics):
            trainer.model(images)

    trainer.model.train()
    forward_seconds = statistics.median(repeat(forward, seconds / 4))
    evaluate_seconds = statistics.median(repeat(lambda: trainer.evaluate(data.val), seconds / 4))
    return {
        "images_per_second": images_per_second,
        "forward": config.batch_size / forward_seconds,
        "evaluation": len(data.val) / evaluate_seconds,
    }


def run_source(space: str, seconds: float) -> Figures:
    """Measure the source loop, with the making of the batches."""
    import torch
    from source_loop import build_source_model, make_loader, train_batch

    from tune_cifar.train.optim import make_optimizer

    torch.set_num_threads(1)
    config, data = load(space)
    model = build_source_model(config).train()
    optimizer = make_optimizer(model.parameters(), config)
    loader = make_loader(data.train, config)
    batches: Iterator[Any] = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())

    def step() -> None:
        images, labels = next(batches)
        train_batch(model, optimizer, images, labels, config.label_smoothing)

    return {"images_per_second": config.batch_size / statistics.median(repeat(step, seconds))}


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--spaces", nargs="+", default=SPACES)
    parser.add_argument("--seconds", type=float, default=10.0, help="of training steps, each time")
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="another checkout in the source's place"
    )
    arguments = parser.parse_args()
    if arguments.side:
        run = run_source if arguments.side == "source" else run_ours
        (space,) = arguments.spaces
        print(json.dumps(run(space, arguments.seconds)))
        return
    found = {space: run_space(space, arguments) for space in arguments.spaces}
    other = "there" if arguments.against else "source"
    rows = []
    for space, rounds in found.items():
        speeds = [median_figure(rounds, side, "images_per_second") for side in ("ours", other)]
        ratio = compare(rounds, "ours", other, "images_per_second").describe()
        forward = median_figure(rounds, "ours", "forward")
        evaluation = median_figure(rounds, "ours", "evaluation")
        rows.append((space, *speeds, ratio, evaluation / forward))
    speed_columns = ("ours, images/s", f"{other}, images/s", f"ours / {other}")
    columns = ("space", *speed_columns, "evaluation / forward")
    print_table("One training step, one thread", columns, rows)
    write_json(arguments.json, {"rounds": found})


def run_space(space: str, arguments: argparse.Namespace) -> list[Round]:
    """Run both sides in turn."""
    print(space, flush=True)
    options = ("--spaces", space, "--seconds", arguments.seconds)
    checkouts = {"there": arguments.against}
    sides = ("ours", "there" if arguments.against else "source")
    return take_turns(
        sides, arguments.rounds, lambda side: run_side(__file__, side, options, checkouts.get(side))
    )


if __name__ == "__main__":
    main()
