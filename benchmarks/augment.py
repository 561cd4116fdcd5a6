"""Measure augmentation alone, images/s: batched on the device against albumentations' own Compose.

    python benchmarks/augment.py [--rounds 3] [--seconds 2] [--json FILE]

One thread. A row per operation and per policy of the five systems, normalization included in each.
batched: draws and images of a batch of 128 on the device, channels_last. albumentations: image by
image, as a Dataset does it, without collation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from pairs import (
    Figures,
    compare,
    make_parser,
    median_figure,
    print_table,
    run_side,
    take_turns,
    write_json,
)

BATCH_SIZE = 128
SPACES = ("s6", "s7", "s8", "s10", "s10_postact")
OPS: dict[str, dict[str, float]] = {
    "normalize": {},
    "crop": {"crop_pad": 4},
    "hflip": {"hflip_p": 0.5},
    "shift-scale-rotate": {
        "shift_scale_rotate_p": 0.5,
        "shift_limit": 0.1,
        "scale_limit": 0.1,
        "rotate_limit": 30.0,
    },
    "cutout": {"cutout_p": 0.5, "cutout_size": 16},
    "gray": {"gray_p": 0.2},
}
NO_OPS = ("crop_pad", "hflip_p", "shift_scale_rotate_p", "cutout_p", "gray_p")


def make_configs() -> dict[str, Any]:
    """Make a config for every row."""
    from tune_cifar.space.select import load_space

    plain = load_space("s7", "cpu").baseline.model_copy(update=dict.fromkeys(NO_OPS, 0))
    configs = {name: plain.model_copy(update=changes) for name, changes in OPS.items()}
    return configs | {f"policy of {space}": load_space(space, "cpu").baseline for space in SPACES}


def measure(make: Callable[[], object], num_images: int, seconds: float) -> float:
    """Return images/s over this many seconds, after one call that is not counted."""
    make()
    start, num_calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        make()
        num_calls += 1
    return num_calls * num_images / (time.perf_counter() - start)


def run_batched(seconds: float) -> Figures:
    """Measure every row in batches, on the device that the numerics choose."""
    import torch

    from tune_cifar.augment.batched import apply_normalize, apply_pixel_ops, draw_policy
    from tune_cifar.augment.policies import make_policy
    from tune_cifar.dataset import CIFAR10
    from tune_cifar.train.numerics import memory_format, resolve_numerics

    numerics = resolve_numerics()
    layout = memory_format(numerics)
    torch.set_num_threads(1)
    images = load_images(BATCH_SIZE).to(numerics.device)
    generator = torch.Generator(numerics.device).manual_seed(0)
    found = {}
    for name, config in make_configs().items():
        policy = make_policy(config)

        def make(policy: Any = policy) -> None:
            draws = draw_policy(policy, len(images), generator)
            apply_normalize(apply_pixel_ops(policy, images, draws), CIFAR10, layout)
            if numerics.device == "cuda":
                torch.cuda.synchronize()

        found[name] = measure(make, BATCH_SIZE, seconds)
    return found


def run_albumentations(seconds: float) -> Figures:
    """Measure every row one image after another."""
    from source_loop import compose

    images = load_images(BATCH_SIZE).permute(0, 2, 3, 1).contiguous().numpy()
    found = {}
    for name, config in make_configs().items():
        composed = compose(config)

        def make(pipeline: Any = composed) -> None:
            for image in images:
                pipeline(image=image)

        found[name] = measure(make, BATCH_SIZE, seconds)
    return found


def load_images(num: int) -> Any:
    """Load training images, uint8 (N, 3, 32, 32)."""
    from tune_cifar.data.files import find_data
    from tune_cifar.data.load import load_train_val

    return load_train_val(find_data(None), num, 10).train.images_NCHW


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of a side")
    arguments = parser.parse_args()
    if arguments.side:
        run = run_batched if arguments.side == "batched" else run_albumentations
        print(json.dumps(run(arguments.seconds)))
        return
    sides, options = ("batched", "albumentations"), ("--seconds", arguments.seconds)
    rounds = take_turns(sides, arguments.rounds, lambda side: run_side(__file__, side, options))
    rows = []
    for name in make_configs():
        figures = [median_figure(rounds, side, name) for side in sides]
        rows.append((name, *figures, compare(rounds, *sides, name).describe()))
    header = ("", "batched, images/s", "albumentations, images/s", "ratio")
    print_table("Augmentation, one thread", header, rows)
    write_json(arguments.json, {"rounds": rounds})


if __name__ == "__main__":
    main()
