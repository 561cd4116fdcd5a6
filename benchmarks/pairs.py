"""Paired measurements for the benchmarks: run sides in turn, compare their figures, write JSON.

A side is a function of a script that returns its figures. `run_side` runs it in a new process, as
`python SCRIPT OPTIONS --side NAME`, so that no side has warm caches or threads of another.
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
    """The ratio of two sides' figures, taken within each round."""

    median: float
    low: float
    high: float
    n: int

    def describe(self) -> str:
        """Return median, range and number of rounds as text."""
        spread = "" if self.n == 1 else f" ({self.low:.2f} to {self.high:.2f})"
        return f"{self.median:.2f}{spread}, n = {self.n}"


def make_parser(docstring: str | None, **rounds: int) -> argparse.ArgumentParser:
    """Make a parser with the options of all benchmarks: number of rounds, JSON file and side.

    Args:
        docstring: of the script; its first line is the description.
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
    """Run one side in a new process; return its figures and `wall`, the seconds of the process.

    Args:
        package: a checkout whose tune_cifar is imported instead of the installed one.
    """
    environment = dict(os.environ)
    if package is not None:
        environment["PYTHONPATH"] = str(package.resolve())
    command = [sys.executable, script, *map(str, options), "--side", side]
    start = time.perf_counter()
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    wall = time.perf_counter() - start
    if answer.returncode:
        raise SystemExit(f"{' '.join(command)}\n{answer.stderr[-3000:]}")
    return {"wall": wall, **json.loads(answer.stdout.strip().splitlines()[-1])}


def take_turns(sides: Sequence[str], num_rounds: int, run: Callable[[str], Figures]) -> list[Round]:
    """Run every side once a round, in reversed order every other round; print each result."""
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
    """Return the ratio of a figure of side `above` to that of side `below`."""
    return summarise([found[above][figure] / found[below][figure] for found in rounds])


def summarise(values: Sequence[float]) -> Ratio:
    """Return median, lowest and highest."""
    return Ratio(statistics.median(values), min(values), max(values), len(values))


def median_figure(rounds: Sequence[Round], side: str, figure: str) -> float:
    """Return the median of a side's figure over the rounds."""
    return statistics.median(found[side][figure] for found in rounds)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print figures as a table."""
    table = Table(*columns, title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*(f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=120).print(table)


def describe_machine() -> dict[str, Any]:
    """Return date, processor or GPU with its capability, cores and torch's version."""
    from tune_cifar.record.machine import count_cores
    from tune_cifar.train.numerics import resolve_numerics

    numerics = resolve_numerics()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{numerics.device_name}, {numerics.capability}, {count_cores()} cores",
        "precision": numerics.precision,
        "torch": numerics.versions["torch"],
    }


def write_json(path: Path | None, facts: Mapping[str, Any]) -> None:
    """Write the facts and the machine's description, unless the path is None."""
    if path is not None:
        text = json.dumps(describe_machine() | dict(facts), indent=2, default=asdict)
        path.write_text(text + "\n")
