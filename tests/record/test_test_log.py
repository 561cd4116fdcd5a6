"""The test log: the run store's file, its committed copies, old columns, faults."""

from __future__ import annotations

import csv
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from tests.builders import CIFAR10, ROOT, SHAPES_INFO
from tests.faults.disks import drop_root, limit_file_size, mount_small_disk
from tune_cifar.errors import RecordError
from tune_cifar.record.test_log import (
    KNOWN_HEADERS,
    OLD_COLUMNS,
    TEST_LOG_COLUMNS,
    TEST_LOG_FILE,
    TestEvaluation,
    add_test_evaluations,
    find_test_evaluations,
    find_test_log,
    load_test_log,
    load_test_logs,
    lock_test_log,
    write_test_log,
)
from tune_cifar.schema import DataInfo

ROW = TestEvaluation(
    date="2026-02-01T12:00:00Z",
    commit="c",
    fingerprint="f",
    seed=0,
    run_id="x:0",
    data="cifar10",
    images=10_000,
    test_acc=0.5,
    test_loss=1.5,
    command="x, y",
    data_digest="d1",
)
OLD_ROW = replace(ROW, data_digest="")


def write_old(path: Path, *rows: TestEvaluation) -> None:
    """Write a log as before the column data_digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [OLD_COLUMNS, *(astuple(row)[: len(OLD_COLUMNS)] for row in rows)]
        )


@pytest.fixture
def checkout(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of a checkout that the package runs from; the working folder is elsewhere."""
    monkeypatch.setattr("tune_cifar.record.test_log.PACKAGE", workplace / "checkout" / "tune_cifar")
    return workplace / "checkout" / "analysis" / TEST_LOG_FILE


# What is found


def test_evaluations_of_other_trainings_and_on_other_data_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / TEST_LOG_FILE
    assert find_test_evaluations(tmp_path, "f", CIFAR10) == []
    path.touch()
    assert find_test_evaluations(tmp_path, "f", CIFAR10) == []
    write_test_log(path, [ROW])
    assert find_test_evaluations(tmp_path, "another", CIFAR10) == []
    assert find_test_evaluations(tmp_path, "f", SHAPES_INFO) == []
    assert find_test_evaluations(tmp_path, "f", CIFAR10) == [ROW]


def test_the_digest_names_the_data_not_their_name(tmp_path: Path) -> None:
    row = replace(ROW, data="shapes", data_digest="of generator 1")
    write_test_log(tmp_path / TEST_LOG_FILE, [row])
    for digest, found in {"of generator 1": [row], "of generator 2": []}.items():
        data = DataInfo(name="shapes", digest=digest, split_hash="h")
        assert find_test_evaluations(tmp_path, "f", data) == found


@pytest.mark.parametrize("data", [CIFAR10, SHAPES_INFO])
def test_a_line_without_a_digest_counts_for_the_data_that_it_names(
    tmp_path: Path, data: DataInfo
) -> None:
    row = replace(OLD_ROW, data=data.name)
    write_old(tmp_path / TEST_LOG_FILE, row)
    assert find_test_evaluations(tmp_path, "f", data) == [row]
    other = SHAPES_INFO if data is CIFAR10 else CIFAR10
    assert find_test_evaluations(tmp_path, "f", other) == []


@pytest.mark.parametrize("is_in_checkout", [True, False])
def test_a_fresh_clone_knows_what_was_tested_before(
    workplace: Path, checkout: Path, is_in_checkout: bool
) -> None:
    """In the package's checkout, wherever a command is typed, or in the working folder's."""
    path = checkout if is_in_checkout else workplace / "analysis" / TEST_LOG_FILE
    write_old(path, OLD_ROW)
    assert find_test_evaluations(workplace / "runs", "f", CIFAR10) == [OLD_ROW]


def test_the_committed_log_of_this_checkout_is_read_in_every_folder(workplace: Path) -> None:
    committed = load_test_log(ROOT / "analysis" / TEST_LOG_FILE)
    assert committed and load_test_logs(workplace / "runs") == committed


def test_all_logs_are_read_as_one_each_evaluation_once_oldest_first(
    workplace: Path, checkout: Path
) -> None:
    nan = replace(ROW, test_loss=float("nan"), date="2026-02-03T12:00:00Z")
    later, earlier = (
        replace(ROW, seed=1, date="2026-02-02T12:00:00Z"),
        replace(ROW, seed=2, date="2026-01-01T12:00:00Z"),
    )
    storage = workplace / "runs"
    write_test_log(find_test_log(storage), [ROW, later, nan])
    write_test_log(checkout, [ROW, earlier, nan])
    write_test_log(workplace / "analysis" / TEST_LOG_FILE, [ROW])
    assert [repr(row) for row in load_test_logs(storage)] == list(
        map(repr, (earlier, ROW, later, nan))
    )


# What is written


def test_an_old_log_gets_the_new_columns_and_keeps_its_lines(tmp_path: Path) -> None:
    path = tmp_path / TEST_LOG_FILE
    write_old(path, OLD_ROW)
    with lock_test_log(tmp_path) as locked:
        assert locked == path
        write_test_log(path, [*load_test_log(path), ROW])
    header, old, new = path.read_text().splitlines()
    added = ("data_digest", "test_acc_unique")
    assert header == ",".join(TEST_LOG_COLUMNS) == ",".join((*OLD_COLUMNS, *added))
    assert old.endswith(',"x, y",,') and new.endswith(',"x, y",d1,')
    assert load_test_log(path) == [OLD_ROW, ROW]


@pytest.mark.parametrize("header", KNOWN_HEADERS)
def test_old_and_new_lines_may_stand_in_one_log(tmp_path: Path, header: tuple[str, ...]) -> None:
    """As after a merge of two branches' committed logs."""
    path = tmp_path / TEST_LOG_FILE
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, astuple(OLD_ROW)[:-1], astuple(ROW)])
    assert load_test_log(path) == [OLD_ROW, ROW]


def test_a_copy_gets_what_it_lacks_once(tmp_path: Path) -> None:
    path = tmp_path / TEST_LOG_FILE
    write_old(path, OLD_ROW)
    before = path.read_bytes()
    add_test_evaluations(path, [OLD_ROW])
    assert path.read_bytes() == before, "nothing is rewritten for nothing"
    add_test_evaluations(path, [OLD_ROW, ROW])
    add_test_evaluations(path, [ROW])
    assert load_test_log(path) == [OLD_ROW, ROW]


def test_a_link_to_a_log_stays_a_link_and_both_paths_have_one_lock(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / TEST_LOG_FILE).symlink_to(there / TEST_LOG_FILE)
    with lock_test_log(here) as path:
        write_test_log(path, [ROW])
        with (there / f"{TEST_LOG_FILE}.lock").open("ab") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (here / TEST_LOG_FILE).is_symlink() and load_test_log(there / TEST_LOG_FILE) == [ROW]


# Faults


def identify(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written or replaced."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_refused(storage: Path, reason: str) -> None:
    """Check that the log is not given out, for this reason, and stays as it is."""
    path = find_test_log(storage)
    before = identify(path)
    with pytest.raises(RecordError) as caught, lock_test_log(storage):
        pytest.fail("evaluated")
    assert str(caught.value) == f"{path}: {reason}"
    assert identify(path) == before


@pytest.mark.parametrize(
    "content",
    [
        b"date,commit\n",
        b"\n",
        b"\xff\xfe",
        ",".join(TEST_LOG_COLUMNS).encode() + b"\nonly,three,cells\n",
        ",".join(TEST_LOG_COLUMNS).encode() + b'\n"open' + b"x" * 200_000,
        ",".join(TEST_LOG_COLUMNS).encode() + b"\n<<<<<<< HEAD\n",
    ],
)
def test_a_damaged_log_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / TEST_LOG_FILE).write_bytes(content)
    rule = r"TEST_OPENINGS\.csv: .* columns date, commit, .* Mend or move the file\.$"
    with pytest.raises(RecordError, match=rule):
        find_test_evaluations(tmp_path, "f", SHAPES_INFO)
    with pytest.raises(RecordError, match=rule), lock_test_log(tmp_path):
        pytest.fail("evaluated")


def test_a_log_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / TEST_LOG_FILE).mkdir()
    sentence = r"TEST_OPENINGS\.csv: the test log cannot be read: Is a directory\.$"
    with pytest.raises(RecordError, match=sentence):
        load_test_logs(tmp_path)
    with pytest.raises(RecordError, match=sentence), lock_test_log(tmp_path):
        pytest.fail("evaluated")


@pytest.fixture
def open_store() -> Iterator[Path]:
    """A run store with a log, which every user may write to."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o777)
        write_test_log(find_test_log(Path(place)), [ROW])
        yield Path(place)


def test_a_log_without_permission_is_refused(open_store: Path) -> None:
    find_test_log(open_store).chmod(0)
    with drop_root():
        check_refused(open_store, "the test log cannot be read: Permission denied.")


def test_a_log_whose_folder_is_gone_is_refused(tmp_path: Path) -> None:
    (tmp_path / TEST_LOG_FILE).symlink_to(tmp_path / "no such folder" / "x.csv")
    check_refused(tmp_path, "the test log cannot be written: No such file or directory.")
    assert not (tmp_path / "no such folder").exists()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_log_that_is_read_only_is_refused(open_store: Path, what: str) -> None:
    (open_store if what == "folder" else find_test_log(open_store)).chmod(0o555)
    with drop_root():
        check_refused(open_store, "the test log cannot be written: Permission denied.")
        assert ROW in load_test_logs(open_store), "it can still be read"


def test_a_log_that_cannot_grow_is_refused_and_stays(tmp_path: Path) -> None:
    write_test_log(find_test_log(tmp_path), [ROW])
    with limit_file_size(50):
        check_refused(tmp_path, "the test log cannot be written: File too large.")


def test_a_log_on_a_full_disk_is_refused_and_stays(tmp_path: Path) -> None:
    with mount_small_disk(tmp_path / "disk", 64) as disk:
        write_test_log(find_test_log(disk), [ROW])
        (disk / "rest").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize))
        reason = "the test log cannot be written: No space left on device."
        check_refused(disk, reason)
        assert load_test_log(find_test_log(disk)) == [ROW]


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    hint = "Move the run store to a file system with locks."
    check_refused(tmp_path, f"the test log cannot be locked: No locks available. {hint}")
