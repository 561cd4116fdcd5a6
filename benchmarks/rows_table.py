"""The table of benchmarks/rows.py: analysis/ROWS.csv, and its summary in docs/method.md."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record.files import write_atomically
from tune_cifar.record.store import find_run
from tune_cifar.record.test_log import TestEvaluation
from tune_cifar.space.select import load_header

BEGIN, END = "<!-- rows:begin -->", "<!-- rows:end -->"
COLUMNS = (
    *("space", "part", "seed", "test_acc", "epochs", "train_images", "batch_size", "minutes"),
    *("hardware", "precision", "date", "run_id", "fingerprint"),
)
# What was wrong with the published accuracy, and the goal for a search's best on the test set.
SYSTEMS = {
    "s6": (
        "the best epoch was picked on the test images; flip and warp on the wrong axes; "
        "batch 128 here, 4 there",
        "90.5 % in 40 epochs",
    ),
    "s7": ("measured on the training images", "89.5 % in 60 epochs"),
    "s8": ("the best epoch was picked on the test images", "88.5 % in 40 epochs"),
    "s10": (
        "padded by 2 instead of 4; holes filled in the wrong value range",
        "94.5 % in 24 epochs",
    ),
    "s10_postact": (
        "softmax into NLL; test images augmented; schedule stepped per epoch; "
        "the recipe here is s10's",
        "94.5 % in 24 epochs",
    ),
}

Row = dict[str, str]
"""A tested training, by COLUMNS; `part` is baseline or best, accuracies are fractions."""


def load_table(path: Path) -> list[Row]:
    """Read the tested trainings, in the order they were appended.

    Raises:
        RecordError: when the columns are not COLUMNS.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        rule = f"the columns must be {', '.join(COLUMNS)}"
        raise RecordError(f"{path}: {rule}, got {reader.fieldnames}. Restore the file.")
    return rows


def make_row(space: str, part: str, evaluation: TestEvaluation, storage: Path) -> Row:
    """Make the row of a tested training from its record in the run store.

    Raises:
        RecordError: when there is no such record.
    """
    _, trial = find_run(storage, evaluation.run_id)
    config, numerics = trial.config, trial.driver.numerics
    minutes = sum(result.epoch_seconds for _, result in trial.trained_epochs) / 60
    row = {
        "space": space,
        "part": part,
        "seed": config.seed,
        "test_acc": evaluation.test_acc,
        "epochs": config.epochs,
        "train_images": config.train_size,
        "batch_size": config.batch_size,
        "minutes": round(minutes, 1),
        "hardware": numerics.device_name,
        "precision": numerics.precision,
        "date": evaluation.date,
        "run_id": evaluation.run_id,
        "fingerprint": evaluation.fingerprint,
    }
    return {name: str(value) for name, value in row.items()}


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Replace the table by these rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def write_page(path: Path, rows: Sequence[Row]) -> None:
    """Write the summary between the markers of a page.

    Raises:
        ConfigError: unless both markers are there once, in order.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ConfigError(f"{path}: {BEGIN} and then {END} must be in it, each once. Restore them.")
    text = f"{before}{BEGIN}\n{render_table(rows)}\n{END}{after}"
    write_atomically(path, text.encode())


def render_table(rows: Sequence[Row], spaces: Iterable[str] = tuple(SYSTEMS)) -> str:
    """Render the summary in Markdown, a line per space."""
    lines = [
        "| space | published | what was wrong | goal | baseline, test "
        "| best confirmed recipe, test |",
        "|---|---|---|---|---|---|",
    ]
    for space in spaces:
        wrong, goal = SYSTEMS.get(space, ("", ""))
        of_space = [row for row in rows if row["space"] == space]
        baseline = [row for row in of_space if row["part"] == "baseline"]
        best = [row for row in of_space if row["part"] == "best"]
        tested = {row["fingerprint"] for row in baseline}
        found = describe_cell(best)
        if best and all(row["fingerprint"] in tested for row in best):
            found = "the baseline: none that was found was better"
        cells = [space, load_header(space).describe_published(), wrong, goal and f"at least {goal}"]
        cells += [describe_cell(baseline), found]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_cell(rows: Sequence[Row]) -> str:
    """Return mean and standard deviation over the seeds, with n and the conditions."""
    if not rows:
        return "not yet measured"
    accs = [100 * float(row["test_acc"]) for row in rows]
    spread = f" ± {statistics.stdev(accs):.2f}" if len(accs) > 1 else ""
    epochs = " and ".join(dict.fromkeys(row["epochs"] for row in rows))
    machines = " and ".join(dict.fromkeys(f"{row['hardware']}, {row['precision']}" for row in rows))
    minutes = statistics.fmean(float(row["minutes"]) for row in rows)
    days = sorted({row["date"][:10] for row in rows})
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    conditions = f"n = {len(rows)}; {epochs} epochs; {machines}; {minutes:.0f} min each; {dates}"
    return f"{statistics.fmean(accs):.2f}{spread} % ({conditions})"
