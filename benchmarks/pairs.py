"""What the benchmarks share: sides in processes of their own, taken in turn; ratios with median and spread; JSON.

A side is a function of a script that returns its figures. `run_side` runs it as `python SCRIPT OPTIONS --side NAME` in
a fresh process, so that no side finds warm caches or threads of another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Figures = dict[str, float]
Round = dict[str, Figures]


@dataclass(frozen=True)
class Ratio:
    """A quotient of two sides' figures, taken within each round."""

    median: float
    low: float
    high: float
    n: int

    def describe(self) -> str:
        """For people."""
        spread = "" if self.n == 1 else f" ({self.low:.2f} to {self.high:.2f})"
        return f"{self.median:.2f}{spread}, n = {self.n}"


def make_parser(docstring: str | None, **rounds: int) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take: the number of rounds, the file for JSON, and the side to run here.

    Args:
        rounds: the option's name and its default, such as pairs=3.
    """
    parser = argparse.ArgumentParser(description=(docstring or "").split("\n")[0])
    for name, default in rounds.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="rounds in turn")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--side", help="run this side alone, here, and print its figures as JSON")
    return parser


def run_side(
    script: str, side: str, options: Iterable[object] = (), package: Path | None = None
) -> Figures:
    """One side in a fresh process: its figures, and `wall`, the seconds of the whole process.

    Args:
        package: a checkout whose tune_cifar is imported instead of the installed one.
    """
    environment = os.environ | ({} if package is None else {"PYTHONPATH": str(package.resolve())})
    command = [sys.executable, script, *map(str, options), "--side", side]
    start = time.perf_counter()
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    wall = time.perf_counter() - start
    if answer.returncode:
        raise SystemExit(f"{' '.join(command)}\n{answer.stderr[-3000:]}")
    return {"wall": wall, **json.loads(answer.stdout.strip().splitlines()[-1])}


def take_turns(sides: Sequence[str], num_rounds: int, run: Callable[[str], Figures]) -> list[Round]:
    """Every side once a round, in reversed order every other round; each is told when it is done."""
    rounds: list[Round] = []
    for i in range(num_rounds):
        found = {}
        for side in sides if i % 2 == 0 else reversed(sides):
            found[side] = run(side)
            figures = ", ".join(f"{name} {value:.4g}" for name, value in found[side].items())
            print(f"{side}: {figures}", file=sys.stderr, flush=True)
        rounds.append(found)
    return rounds


def compare(rounds: Sequence[Round], above: str, below: str, figure: str) -> Ratio:
    """The figure of one side over the other's."""
    return summarise([found[above][figure] / found[below][figure] for found in rounds])


def summarise(values: Sequence[float]) -> Ratio:
    """Median and extremes."""
    return Ratio(statistics.median(values), min(values), max(values), len(values))


def median_figure(rounds: Sequence[Round], side: str, figure: str) -> float:
    """Over the rounds."""
    return statistics.median(found[side][figure] for found in rounds)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows of figures for people."""
    table = Table(*columns, title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*(f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=120).print(table)


def describe_machine() -> dict[str, Any]:
    """Date, processor or GPU with what it can, cores and torch's version."""
    from tune_cifar.train.numerics import count_cores, resolve_numerics

    numerics = resolve_numerics()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{numerics.device_name}, {numerics.capability}, {count_cores()} cores",
        "precision": numerics.precision,
        "torch": numerics.versions["torch"],
    }


def write_json(path: Path | None, facts: Mapping[str, Any]) -> None:
    """The facts with the machine's description, where a file is asked for."""
    if path is not None:
        path.write_text(
            json.dumps(describe_machine() | dict(facts), indent=2, default=asdict) + "\n"
        )
