"""One training step of a space's baseline on one thread, here and in another checkout, in turn.

    python benchmarks/step.py [--space s7] [--against FOLDER] [--rounds 6] [--steps 60]

FOLDER is a checkout of this repository at another commit (`git worktree add FOLDER COMMIT`). Each round times both, in
a process of its own each: the median step's wall time, and the processor's time a step, which a busy neighbour moves
less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def time_steps(space: str, num_steps: int) -> dict[str, float]:
    """Milliseconds of a step in this process."""
    from tune_cifar.data import find_data, load_train_val
    from tune_cifar.engine import Trainer
    from tune_cifar.numerics import resolve_numerics
    from tune_cifar.space import load_space

    config = load_space(space, "cpu").baseline
    trainer = Trainer(
        config, load_train_val(find_data(None), config.train_size, config.val_size), resolve_numerics("cpu")
    )
    trainer.measure_step_seconds(5)
    start = time.process_time()
    wall = trainer.measure_step_seconds(num_steps)
    return {"wall_ms": 1e3 * wall, "cpu_ms": 1e3 * (time.process_time() - start) / num_steps}


def run(checkout: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """The same in a fresh process, with the package of this checkout."""
    command = [sys.executable, __file__, "--space", arguments.space, "--steps", str(arguments.steps), "--here"]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(answer.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--space", default="s7")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--here", action="store_true", help="time in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(time_steps(arguments.space, arguments.steps)))
        return
    checkouts = {"here": ROOT} | ({"there": arguments.against} if arguments.against else {})
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(arguments.rounds):
        for name, folder in checkouts.items():
            rounds[name].append(run(folder, arguments))
            print(name, {key: round(value, 1) for key, value in rounds[name][-1].items()}, flush=True)
    for key in ("wall_ms", "cpu_ms"):
        medians = {name: statistics.median(figures[key] for figures in rounds[name]) for name in rounds}
        line = ", ".join(f"{name} {value:.1f}" for name, value in medians.items())
        if arguments.against:
            pairs = zip(rounds["here"], rounds["there"], strict=True)
            line += f", here / there {statistics.median(one[key] / other[key] for one, other in pairs):.3f}"
        print(f"{key}: {line} (medians of {arguments.rounds})")


if __name__ == "__main__":
    main()
