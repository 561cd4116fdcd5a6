"""The sealed test set: the one room that opens it, and the ledger in which every opening stands."""

from __future__ import annotations

import csv
import os
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from tune_cifar.data import CLASS_NAMES, DataSource, Split, load_test
from tune_cifar.engine import Trainer
from tune_cifar.errors import RecordError
from tune_cifar.judge import Judgement, judge_logits
from tune_cifar.numerics import describe_environment
from tune_cifar.record import TrialState

OPENINGS_FILE = "TEST_OPENINGS.csv"


@dataclass(frozen=True)
class TestOpening:
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


OPENINGS_COLUMNS = tuple(column.name for column in fields(TestOpening))


def find_openings_file(storage: Path, data_name: str) -> Path:
    """./analysis/TEST_OPENINGS.csv where a checkout is worked in, else in the run store; the stand-in's openings are
    never mixed with CIFAR-10's."""
    folder = Path("analysis").resolve()
    return folder / OPENINGS_FILE if folder.is_dir() and data_name == "cifar10" else storage / OPENINGS_FILE


def load_openings(path: Path) -> list[TestOpening]:
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
        raise RecordError(f"{path}: rows of {columns} must stand there, got {exc}. Mend it or move it away.") from exc


def find_openings(path: Path, fingerprint: str, data_name: str) -> list[TestOpening]:
    """Earlier openings for a training on these data, oldest first; errors are those of `load_openings`."""
    return [found for found in load_openings(path) if (found.fingerprint, found.data) == (fingerprint, data_name)]


def _read_opening(row: list[str]) -> TestOpening:
    numbers = {"seed": int, "images": int, "test_acc": float, "test_loss": float}
    cells = dict(zip(OPENINGS_COLUMNS, row, strict=True))
    return TestOpening(**{name: numbers.get(name, str)(cell) for name, cell in cells.items()})


def check_testable(trial: TrialState) -> None:
    """Refuse a test of a training that has no end to be judged.

    Raises:
        RecordError: when the training did not run to its last epoch.
    """
    if trial.status != "complete":
        raise RecordError(f"{trial.run_id}: only a complete training may be tested, got a {trial.status} one.")


def open_test(
    trainer: Trainer, trial: TrialState, source: DataSource, openings_file: Path, command: str
) -> tuple[TestOpening, Judgement, Split]:
    """Judge the trainer's weights on the test set, in one evaluation, and append the opening to the file.

    Returns:
        the opening, the judgement of the same answers, and the images that were opened, for its figures.

    Raises:
        DataError: when the test file is missing or not genuine.
        RecordError: when the opening could not be written down; nothing is judged then.
    """
    split = load_test(source)
    try:
        file = openings_file.open("a", newline="", encoding="utf-8")
    except OSError as exc:
        raise RecordError(f"{openings_file}: every opening must be written down, got {exc.strerror!r}.") from exc
    with file:
        judgement = judge_logits(trainer.predict(split), split.labels_N, CLASS_NAMES[source.name], "test")
        opening = TestOpening(
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            commit=describe_environment().get("git_commit", ""),
            fingerprint=trial.fingerprint,
            seed=trial.config.seed,
            run_id=trial.run_id,
            data=source.name,
            images=len(split),
            test_acc=judgement.accuracy,
            test_loss=judgement.loss,
            command=command,
        )
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(OPENINGS_COLUMNS)
        writer.writerow(astuple(opening))
        file.flush()
        os.fsync(file.fileno())
    return opening, judgement, split
