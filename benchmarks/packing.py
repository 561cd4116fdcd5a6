"""Concurrent trainings: total epochs/s against their number K, as processes and as threads.

    python benchmarks/packing.py [--space s7] [--at-once 1 2 4 8] [--rounds 3] [--seconds 20]
        [--json FILE]

processes: K workers of one training each, as trials are packed onto a device by fractions. streams:
K threads of one process; on CUDA each has its own stream. On a CPU, K above the number of cores is
left out. An epoch is one pass over the baseline's augmented training images. Training steps are
counted, after every training has warmed up.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import nullcontext
from multiprocessing import get_context
from typing import Any

from pairs import (
    Figures,
    Round,
    make_parser,
    median_figure,
    print_table,
    run_side,
    take_turns,
    write_json,
)

WARM_UP_STEPS = 5
# How long a training may take to start.
START_SECONDS = 300.0


def train(space: str, seconds: float, ready: Any, counts: Any) -> None:
    """Train for `seconds` and put this training's epochs per second into the queue `counts`.

    Args:
        ready: a barrier that all trainings pass together.
    """
    import torch

    from tune_cifar.data.files import find_data
    from tune_cifar.data.load import load_train_val
    from tune_cifar.space.select import load_space
    from tune_cifar.train.numerics import resolve_numerics
    from tune_cifar.train.trainer import Trainer

    numerics = resolve_numerics()
    on_cuda = numerics.device == "cuda"
    config = load_space(space, "full" if on_cuda else "cpu").baseline
    data = load_train_val(find_data(None), config.train_size, config.val_size)
    with torch.cuda.stream(torch.cuda.Stream()) if on_cuda else nullcontext():
        trainer = Trainer(config, data, numerics)
        trainer.measure_step_seconds(WARM_UP_STEPS)
        ready.wait(START_SECONDS)
        start, num_steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            trainer.measure_step_seconds(1)
            num_steps += 1
        counts.put(num_steps / config.num_steps_per_epoch / (time.perf_counter() - start))


def run_packed(kind: str, num: int, space: str, seconds: float) -> Figures:
    """Run `num` trainings at once, as threads of this process or as its children."""
    context = get_context("spawn")
    counts = context.Queue()
    ready: Any = context.Barrier(num)
    make_worker: Any = context.Process
    if kind == "streams":
        ready, make_worker = threading.Barrier(num), threading.Thread
    work = (space, seconds, ready, counts)
    workers = [make_worker(target=train, args=work) for _ in range(num)]
    for worker in workers:
        worker.start()
    found = [counts.get(timeout=START_SECONDS + 2 * seconds) for _ in workers]
    for worker in workers:
        worker.join()
    return {"epochs_per_second": sum(found)}


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--space", default="s7")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    if arguments.side:
        kind, num = arguments.side.split("-")
        print(json.dumps(run_packed(kind, int(num), arguments.space, arguments.seconds)))
        return
    from tune_cifar.train.numerics import count_cores, count_gpus

    limit = max(arguments.at_once) if count_gpus("auto") else count_cores()
    numbers = [num for num in arguments.at_once if num <= limit]
    if left_out := set(arguments.at_once) - set(numbers):
        print(f"left out, more than {limit} cores: {', '.join(map(str, sorted(left_out)))}")
    sides = [f"{kind}-{num}" for num in numbers for kind in ("processes", "streams")]
    options = ("--space", arguments.space, "--seconds", arguments.seconds)
    rounds: list[Round] = take_turns(
        sides, arguments.rounds, lambda side: run_side(__file__, side, options)
    )
    single = median_figure(rounds, sides[0], "epochs_per_second")
    speeds = {side: median_figure(rounds, side, "epochs_per_second") for side in sides}
    rows = [(side, speed, f"{speed / single:.2f}") for side, speed in speeds.items()]
    columns = ("", "epochs/s in all", "of one process")
    print_table(f"{arguments.space}: trainings at once", columns, rows)
    write_json(arguments.json, {"space": arguments.space, "rounds": rounds})


if __name__ == "__main__":
    main()
