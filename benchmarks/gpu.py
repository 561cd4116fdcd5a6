"""A complete training on a GPU, eager against captured; without a GPU only a dry run.

    python benchmarks/gpu.py [--space s10] [--epochs 24] [--train-size 50000] [--rounds 3]
        [--json FILE]
    python benchmarks/gpu.py --space s7 --epochs 1 --train-size 1024 --rounds 1      # on a CPU

A side begins a training of the space's baseline and throws it away, then trains it whole, with
another learning rate first, like a warm worker. Figures: seconds from the loaded images to the end
of the first step of what is thrown away (`start`), seconds until the second training is ready
(`warm_start`) and until it has ended (`train`), epochs/s, the last validation accuracy (0 without
validation images) and the device's peak memory in MiB (0 off CUDA). Accuracies of all epochs go to
stderr.
"""

from __future__ import annotations

import json
import sys
import time
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

SIDES = ("eager", "captured")


def run(execution: str, space: str, epochs: int, train_size: int) -> Figures:
    """Begin a training, then run one whole."""
    import torch

    from tune_cifar.data.files import find_data
    from tune_cifar.data.load import load_train_val
    from tune_cifar.space.select import load_space
    from tune_cifar.train.numerics import resolve_numerics
    from tune_cifar.train.trainer import Trainer

    numerics = resolve_numerics().model_copy(update={"execution": execution})
    val_size = 0 if train_size == 50_000 else 500
    sizes: dict[str, Any] = {"epochs": epochs, "train_size": train_size, "val_size": val_size}
    config = load_space(space, "full", sizes).baseline
    data = load_train_val(find_data(None), train_size, val_size)
    on_cuda = numerics.device == "cuda"
    figures: Figures = {}
    start = time.perf_counter()
    warm_up = Trainer(config.model_copy(update={"max_lr": config.max_lr / 2}), data, numerics)
    warm_up.measure_step_seconds(1)
    figures["start"] = time.perf_counter() - start
    del warm_up
    start = time.perf_counter()
    trainer = Trainer(config, data, numerics)
    figures["warm_start"] = time.perf_counter() - start
    accs = [result.val_acc or 0.0 for result in trainer]
    figures["train"] = time.perf_counter() - start - figures["warm_start"]
    figures["val_acc"] = accs[-1]
    print(f"{execution}: {[round(100 * acc, 2) for acc in accs]}", file=sys.stderr)
    memory = torch.cuda.max_memory_reserved() / 2**20 if on_cuda else 0.0
    return {**figures, "epochs_per_second": epochs / figures["train"], "memory": memory}


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--space", default="s10")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--train-size", type=int, default=50_000)
    arguments = parser.parse_args()
    shape = {name: getattr(arguments, name) for name in ("space", "epochs", "train_size")}
    if arguments.side:
        print(json.dumps(run(arguments.side, **shape)))
        return
    options = ["--space", arguments.space, "--epochs", arguments.epochs]
    options += ["--train-size", arguments.train_size]
    rounds = take_turns(SIDES, arguments.rounds, lambda side: run_side(__file__, side, options))
    names = ("start", "warm_start", "train", "epochs_per_second", "val_acc", "memory")
    rows = [(side, *(median_figure(rounds, side, name) for name in names)) for side in SIDES]
    print_table(f"{shape}", ("", *names), rows)
    ratio = compare(rounds, "captured", "eager", "epochs_per_second")
    print(f"captured / eager, epochs/s: {ratio.describe()}")
    write_json(arguments.json, {"shape": shape, "rounds": rounds})


if __name__ == "__main__":
    main()
