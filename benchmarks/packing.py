"""Concurrent trainings: total epochs/s against their number K, as processes and as threads.

    python benchmarks/packing.py [--space s7] [--at-once 1 2 4 8] [--kinds processes streams]
        [--execution eager] [--rounds 3] [--seconds 20] [--tiny] [--json FILE]

processes: K workers of one training each, as trials are packed onto a device by fractions. streams:
K threads of one process; on CUDA each has its own stream. On a CPU, K above the number of cores is
left out. Whole epochs of the baseline are counted, after each training's first: of 8,192 images on
CUDA, of the cpu tier's on a CPU (of 64 with `--tiny`), and 10 validation images. No step waits for
the device. An epoch in the figures is one of 45,000 images on CUDA.
"""

from __future__ import annotations

import json
import queue
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

# How long a training may take to start.
START_SECONDS = 300.0
# Epochs of a training that is stopped when its time is over.
MANY_EPOCHS = 1000
CUDA_SIZE, WHOLE_SIZE, TINY_SIZE, VAL_SIZE = 8192, 45_000, 64, 10
# No thread may wait for the device while another one captures.
CAPTURING = threading.Lock()


def train(
    space: str, execution: str, seconds: float, is_tiny: bool, ready: Any, counts: Any
) -> None:
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

    numerics = resolve_numerics().model_copy(update={"execution": execution})
    on_cuda = numerics.device == "cuda"
    config = load_space(space, "full" if on_cuda else "cpu").baseline
    train_size = CUDA_SIZE if on_cuda else TINY_SIZE if is_tiny else config.train_size
    sizes = {"epochs": MANY_EPOCHS, "train_size": train_size, "val_size": VAL_SIZE}
    config = config.model_copy(update=sizes)
    data = load_train_val(find_data(None), train_size, VAL_SIZE)
    make: Any = torch.cuda.Stream
    with torch.cuda.stream(make()) if on_cuda else nullcontext():
        with CAPTURING:
            epochs = iter(Trainer(config, data, numerics))
            next(epochs)
        ready.wait(START_SECONDS)
        start, num_epochs = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(epochs)
            num_epochs += 1
        taken = time.perf_counter() - start
        counts.put(num_epochs / taken * (CUDA_SIZE / WHOLE_SIZE if on_cuda else 1.0))


def run_packed(side: str, space: str, execution: str, seconds: float, is_tiny: bool) -> Figures:
    """Run several trainings at once, as threads of this process or as its children."""
    kind, num = side.split("-")
    context = get_context("spawn")
    counts = context.Queue()
    ready: Any = context.Barrier(int(num))
    make_worker: Any = context.Process
    if kind == "streams":
        ready, make_worker = threading.Barrier(int(num)), threading.Thread
    work = (space, execution, seconds, is_tiny, ready, counts)
    workers = [make_worker(target=train, args=work) for _ in range(int(num))]
    for worker in workers:
        worker.start()
    found = [wait_for(counts, workers) for _ in workers]
    for worker in workers:
        worker.join()
    return {"epochs_per_second": sum(found)}


def wait_for(counts: Any, workers: list[Any]) -> float:
    """Return the next count; a training that died would be waited for in vain.

    A thread has no exit code: that one died shows when none is alive and a count is missing.
    """
    while True:
        is_over = not any(worker.is_alive() for worker in workers)
        try:
            return float(counts.get(timeout=1.0))
        except queue.Empty:
            if is_over or any(getattr(worker, "exitcode", None) for worker in workers):
                for worker in workers:
                    if worker.is_alive():
                        worker.kill()
                raise SystemExit("a training died") from None


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--space", default="s7")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--kinds", nargs="+", default=["processes", "streams"])
    parser.add_argument("--execution", default="eager")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--tiny", action="store_true", help="few images, on a CPU")
    arguments = parser.parse_args()
    space, execution, seconds = arguments.space, arguments.execution, arguments.seconds
    if arguments.side:
        how = (space, execution, seconds, arguments.tiny)
        print(json.dumps(run_packed(arguments.side, *how)))
        return
    from tune_cifar.record.machine import count_cores
    from tune_cifar.train.numerics import count_gpus

    limit = max(arguments.at_once) if count_gpus("auto") else count_cores()
    numbers = [num for num in arguments.at_once if num <= limit]
    if left_out := set(arguments.at_once) - set(numbers):
        print(f"left out, more than {limit} cores: {', '.join(map(str, sorted(left_out)))}")
    sides = [f"{kind}-{num}" for num in numbers for kind in arguments.kinds]
    options = ["--space", space, "--execution", execution, "--seconds", seconds]
    options += ["--tiny"] if arguments.tiny else []
    rounds: list[Round] = take_turns(
        sides, arguments.rounds, lambda side: run_side(__file__, side, options)
    )
    single = median_figure(rounds, sides[0], "epochs_per_second")
    speeds = {side: median_figure(rounds, side, "epochs_per_second") for side in sides}
    rows = [(side, speed, f"{speed / single:.2f}") for side, speed in speeds.items()]
    columns = ("", "epochs/s in all", f"of {sides[0]}")
    print_table(f"{space}, {execution}: trainings at once", columns, rows)
    write_json(arguments.json, {"space": space, "execution": execution, "rounds": rounds})


if __name__ == "__main__":
    main()
