"""The ledger in which every opening of the sealed test set stands, as data: nothing is opened here (sealed.py does)."""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path

from tune_cifar.errors import RecordError

OPENINGS_FILE = "TEST_OPENINGS.csv"


@dataclass(frozen=True)
class TestEvaluation:
    """One look at the test set, as it stands in TEST_OPENINGS.csv."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

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


OPENINGS_COLUMNS = tuple(column.name for column in fields(TestEvaluation))


def find_test_log(storage: Path, data_name: str) -> Path:
    """./analysis/TEST_OPENINGS.csv where a checkout is worked in, else in the run store; the stand-in's openings are
    never mixed with CIFAR-10's."""
    folder = Path("analysis").resolve()
    return (
        folder / OPENINGS_FILE
        if folder.is_dir() and data_name == "cifar10"
        else storage / OPENINGS_FILE
    )


def load_test_log(path: Path) -> list[TestEvaluation]:
    """All openings in the ledger, oldest first.

    Raises:
        RecordError: when the file is not what `open_test` writes.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    try:
        if tuple(header) != OPENINGS_COLUMNS:
            raise ValueError(f"the columns {', '.join(header) or 'none'}")
        return [_read_opening(row) for row in rows]
    except (ValueError, TypeError) as exc:
        columns = ", ".join(OPENINGS_COLUMNS)
        raise RecordError(
            f"{path}: rows of {columns} must stand there, got {exc}. Mend it or move it away."
        ) from exc


def find_openings(path: Path, fingerprint: str, data_name: str) -> list[TestEvaluation]:
    """Earlier openings for a training on these data, oldest first; errors are those of `load_test_log`."""
    return [
        found
        for found in load_test_log(path)
        if (found.fingerprint, found.data) == (fingerprint, data_name)
    ]


def _read_opening(row: list[str]) -> TestEvaluation:
    numbers = {"seed": int, "images": int, "test_acc": float, "test_loss": float}
    cells = dict(zip(OPENINGS_COLUMNS, row, strict=True))
    return TestEvaluation(**{name: numbers.get(name, str)(cell) for name, cell in cells.items()})
