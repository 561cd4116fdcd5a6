"""The test log: every evaluation on the test set, as rows of a CSV file.

This module only reads the log. `verify/test_set.py` evaluates and writes it.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path

from tune_cifar.errors import RecordError

TEST_LOG_FILE = "TEST_OPENINGS.csv"


@dataclass(frozen=True)
class TestEvaluation:
    """One evaluation on the test set: a row of the test log."""

    __test__ = False  # pytest would collect a class of this name

    date: str
    commit: str
    fingerprint: str
    seed: int
    run_id: str
    data: str
    images: int
    test_acc: float
    test_loss: float
    command: str


TEST_LOG_COLUMNS = tuple(column.name for column in fields(TestEvaluation))


def find_test_log(storage: Path, data_name: str) -> Path:
    """Return the path of the test log: in ./analysis of a checkout, else in the run store.

    Evaluations on synthetic data always go to the run store, apart from those on CIFAR-10.
    """
    folder = Path("analysis").resolve()
    is_in_checkout = folder.is_dir() and data_name == "cifar10"
    return (folder if is_in_checkout else storage) / TEST_LOG_FILE


def load_test_log(path: Path) -> list[TestEvaluation]:
    """Read all test evaluations, oldest first; none when there is no file.

    Raises:
        RecordError: when the file does not have the rows of a test log.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    try:
        if tuple(header) != TEST_LOG_COLUMNS:
            raise ValueError(f"the columns {', '.join(header) or 'none'}")
        return [_read_row(row) for row in rows]
    except (ValueError, TypeError) as exc:
        columns = ", ".join(TEST_LOG_COLUMNS)
        raise RecordError(
            f"{path}: the rows must have the columns {columns}, got {exc}. Mend or move the file."
        ) from exc


def find_test_evaluations(path: Path, fingerprint: str, data_name: str) -> list[TestEvaluation]:
    """Return the logged test evaluations of a training on these data, oldest first.

    Raises:
        RecordError: as `load_test_log`.
    """
    key = (fingerprint, data_name)
    return [found for found in load_test_log(path) if (found.fingerprint, found.data) == key]


def _read_row(row: list[str]) -> TestEvaluation:
    numbers = {"seed": int, "images": int, "test_acc": float, "test_loss": float}
    cells = dict(zip(TEST_LOG_COLUMNS, row, strict=True))
    return TestEvaluation(**{name: numbers.get(name, str)(cell) for name, cell in cells.items()})
