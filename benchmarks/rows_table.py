"""The table of benchmarks/rows.py: a line per tested training in analysis/ROWS.csv, and its summary in README."""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record.store import find_run
from tune_cifar.record.test_log import TestEvaluation
from tune_cifar.space.select import load_header

BEGIN, END = "<!-- rows:begin -->", "<!-- rows:end -->"
COLUMNS = (
    *("space", "part", "seed", "test_acc", "epochs", "train_images", "batch_size", "minutes"),
    *("hardware", "precision", "date", "run_id", "fingerprint"),
)
# What was wrong with the published number, and the goal for a search's best on the test set.
SYSTEMS = {
    "s6": (
        "the best epoch was picked on the test images; flip and warp on the wrong axes",
        "85 % in 40 epochs",
    ),
    "s7": ("measured on the training images", "87 % in 60 epochs"),
    "s8": ("the best epoch was picked on the test images", "87 % in 40 epochs"),
    "s10": (
        "padded by 2 instead of 4; holes filled in the wrong value range",
        "94.5 % in 24 epochs",
    ),
    "s10_postact": (
        "softmax into NLL; test images augmented; schedule stepped per epoch",
        "94.5 % in 24 epochs",
    ),
}

Row = dict[str, str]
"""By COLUMNS; `part` is baseline or best, accuracies are fractions."""


def load_table(path: Path) -> list[Row]:
    """The tested trainings, in the order they were appended.

    Raises:
        RecordError: when the columns are others.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise RecordError(
            f"{path}: the columns must be {', '.join(COLUMNS)}, got {reader.fieldnames}. Mend it."
        )
    return rows


def make_row(space: str, part: str, opening: TestEvaluation, storage: Path) -> Row:
    """The opened training as the run store has it.

    Raises:
        RecordError: when its record is not there.
    """
    _, trial = find_run(storage, opening.run_id)
    config, numerics = trial.config, trial.driver.numerics
    minutes = sum(result.epoch_seconds for _, result in trial.trained_epochs) / 60
    row = {"space": space, "part": part, "seed": config.seed, "test_acc": opening.test_acc}
    row |= {
        "epochs": config.epochs,
        "train_images": config.train_size,
        "batch_size": config.batch_size,
    }
    row |= {
        "minutes": round(minutes, 1),
        "hardware": numerics.device_name,
        "precision": numerics.precision,
    }
    row |= {"date": opening.date, "run_id": opening.run_id, "fingerprint": opening.fingerprint}
    return {name: str(value) for name, value in row.items()}


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Write it whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _replace(path, text.getvalue())


def write_readme(path: Path, rows: Sequence[Row]) -> None:
    """Put the summary between README's markers.

    Raises:
        ConfigError: when they do not stand there once each, in order.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ConfigError(
            f"{path}: {BEGIN} and then {END} must stand there once, got another order. Mend it."
        )
    _replace(path, f"{before}{BEGIN}\n{render_table(rows)}\n{END}{after}")


def _replace(path: Path, text: str) -> None:
    """A kill at any moment leaves the old file or the new one."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def render_table(rows: Sequence[Row], spaces: Iterable[str] = tuple(SYSTEMS)) -> str:
    """The summary in Markdown, a line per space."""
    lines = [
        "| space | published | what was wrong | goal | baseline, test | best of a search, test |",
        "|---|---|---|---|---|---|",
    ]
    for space in spaces:
        wrong, goal = SYSTEMS.get(space, ("", ""))
        baseline, best = (
            [row for row in rows if (row["space"], row["part"]) == (space, part)]
            for part in ("baseline", "best")
        )
        found = describe_cell(best)
        if best and {row["fingerprint"] for row in best} <= {
            row["fingerprint"] for row in baseline
        }:
            found = "the baseline: none that was found was better"
        cells = [space, load_header(space).describe_published(), wrong, goal and f"at least {goal}"]
        cells += [describe_cell(baseline), found]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_cell(rows: Sequence[Row]) -> str:
    """Mean and standard deviation over the seeds, and what they were measured with."""
    if not rows:
        return "not yet measured"
    accs = [100 * float(row["test_acc"]) for row in rows]
    spread = f" ± {statistics.stdev(accs):.2f}" if len(accs) > 1 else ""
    epochs = " and ".join(dict.fromkeys(row["epochs"] for row in rows))
    machines = " and ".join(dict.fromkeys(f"{row['hardware']}, {row['precision']}" for row in rows))
    minutes = statistics.fmean(float(row["minutes"]) for row in rows)
    conditions = f"n = {len(rows)}; {epochs} epochs; {machines}; {minutes:.0f} min each"
    return f"{statistics.fmean(accs):.2f}{spread} % ({conditions})"
