"""The test log: every evaluation on the test set, as rows of a CSV file.

A run store has one log, which every evaluation is written into. A checkout of the project has a
committed copy of it in analysis/, which `make rows` keeps: a fresh clone knows what was tested.
What either of them has is not evaluated again. `verify/test_set.py` evaluates.
"""

from __future__ import annotations

import csv
import fcntl
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import IO, Any

from tune_cifar.errors import RecordError
from tune_cifar.record.environment import PACKAGE
from tune_cifar.record.files import write_atomically
from tune_cifar.schema import DataInfo

logger = logging.getLogger(__name__)
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
    data_digest: str = ""
    """As in DataInfo; empty in lines of a log from before this column."""
    test_acc_unique: float | None = None
    """Without the test images that have near duplicates among the training images; None where no
    list of those is known, and in lines from before this column."""

    def is_on(self, data: DataInfo) -> bool:
        """Return whether it was on these data.

        A line without a digest counts for every version of the data set that it names: rather no
        evaluation than a second one. CIFAR-10 has only one version.
        """
        if self.data_digest:
            return self.data_digest == data.digest
        return self.data == data.name


TEST_LOG_COLUMNS = tuple(column.name for column in fields(TestEvaluation))
# Logs from before the columns data_digest and test_acc_unique, and from before the latter.
OLD_COLUMNS = TEST_LOG_COLUMNS[:10]
KNOWN_HEADERS = (OLD_COLUMNS, TEST_LOG_COLUMNS[:11], TEST_LOG_COLUMNS)
EMPTY_LOG = ",".join(TEST_LOG_COLUMNS)


def find_test_log(storage: Path) -> Path:
    """Return the path of the run store's test log; it need not exist."""
    return storage / TEST_LOG_FILE


def list_project_logs() -> list[Path]:
    """Return where a committed copy may be: in the package's checkout, and in ./analysis."""
    return [folder / "analysis" / TEST_LOG_FILE for folder in (PACKAGE.parent, Path())]


def load_test_logs(storage: Path) -> list[TestEvaluation]:
    """Read the test evaluations that the run store's log or a committed copy has, oldest first.

    Raises:
        RecordError: as `load_test_log`.
    """
    found = []
    for path in (find_test_log(storage), *list_project_logs()):
        found += load_test_log(path)
    return sorted(_drop_repeated(found), key=lambda evaluation: evaluation.date)


def find_test_evaluations(storage: Path, fingerprint: str, data: DataInfo) -> list[TestEvaluation]:
    """Return the logged test evaluations of a training on these data, oldest first.

    Raises:
        RecordError: as `load_test_log`.
    """
    logged = load_test_logs(storage)
    return [found for found in logged if found.fingerprint == fingerprint and found.is_on(data)]


def load_test_log(path: Path) -> list[TestEvaluation]:
    """Read the test evaluations of one file, in its order; none when there is no file.

    Raises:
        RecordError: when it cannot be read, or does not have the rows of a test log.
    """
    try:
        text = path.read_bytes().decode()
        header, *rows = csv.reader(io.StringIO(text or EMPTY_LOG, newline=""))
        if tuple(header) not in KNOWN_HEADERS:
            raise ValueError(f"the columns {', '.join(header) or 'none'}")
        return [_read_row(row) for row in rows]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise RecordError(f"{path}: the test log cannot be read: {exc.strerror}.") from exc
    except (ValueError, TypeError, csv.Error) as exc:
        columns = ", ".join(TEST_LOG_COLUMNS)
        raise RecordError(
            f"{path}: the rows must have the columns {columns}, got {exc}. Mend or move the file."
        ) from exc


@contextmanager
def lock_test_log(storage: Path) -> Iterator[Path]:
    """Keep other processes from evaluating on the test set; yield the path of the log.

    From the look into the log until the new row is in it, so that no two processes evaluate the
    same training. The log is then known to be readable, writable and of today's columns.

    Raises:
        RecordError: when the log cannot be locked, read or written.
    """
    path = find_test_log(storage)
    with _lock(path):
        logged = load_test_log(path)
        try:
            path.open("ab").close()  # a file that somebody made read-only is not replaced
        except OSError as exc:
            raise _make_write_error(path, exc) from exc
        write_test_log(path, logged)
        yield path


def add_test_evaluations(path: Path, evaluations: Iterable[TestEvaluation]) -> None:
    """Add to a log those of the evaluations that it lacks.

    Raises:
        RecordError: when the log cannot be read or written.
    """
    logged = load_test_log(path)
    extended = _drop_repeated([*logged, *evaluations])
    if len(extended) > len(logged):
        write_test_log(path, extended)


def write_test_log(path: Path, evaluations: Sequence[TestEvaluation]) -> None:
    """Replace a log; a crash leaves the old one or the new one.

    Raises:
        RecordError: when it cannot be written. The old one stays.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([TEST_LOG_COLUMNS, *map(astuple, evaluations)])
    try:
        write_atomically(_follow(path), text.getvalue().encode())
    except OSError as exc:
        raise _make_write_error(path, exc) from exc


def _lock(path: Path) -> IO[bytes]:
    """Lock a log, after the process that has it now; the lock ends with the returned file."""
    try:
        target = _follow(path)
        file = target.with_name(f"{target.name}.lock").open("ab")
    except OSError as exc:
        raise _make_write_error(path, exc) from exc
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s: another test evaluation is running, waiting for its end.", path)
            fcntl.flock(file, fcntl.LOCK_EX)
    except BaseException as exc:
        file.close()
        if isinstance(exc, OSError):
            hint = "Move the run store to a file system with locks."
            problem = f"the test log cannot be locked: {exc.strerror}"
            raise RecordError(f"{path}: {problem}. {hint}") from exc
        raise
    return file


def _follow(path: Path) -> Path:
    """Return the file itself: a link to a log stays a link, and all its paths have one lock."""
    return Path(os.path.realpath(path))


def _make_write_error(path: Path, exc: OSError) -> RecordError:
    return RecordError(f"{path}: the test log cannot be written: {exc.strerror}.")


def _drop_repeated(evaluations: Iterable[TestEvaluation]) -> list[TestEvaluation]:
    """Return each evaluation once; by its text, since a loss that is NaN equals nothing."""
    return list({repr(found): found for found in evaluations}.values())


def _read_row(row: list[str]) -> TestEvaluation:
    # Whatever the header: in a merge, lines of all kinds come together.
    columns = next((each for each in KNOWN_HEADERS if len(each) == len(row)), TEST_LOG_COLUMNS)
    readers: dict[str, Callable[[str], Any]] = {
        "seed": int,
        "images": int,
        "test_acc": float,
        "test_loss": float,
        "test_acc_unique": lambda cell: float(cell) if cell else None,
    }
    cells = dict(zip(columns, row, strict=True))
    return TestEvaluation(**{name: readers.get(name, str)(cell) for name, cell in cells.items()})
