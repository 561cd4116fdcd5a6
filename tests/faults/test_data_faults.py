"""Damaged, hostile, unreadable or missing files of CIFAR-10: commands refuse them in one sentence.

Nothing of a file is run. A training does not need the test file. The files here are copies of one
small batch, whose MD5 and size replace the published ones.
"""

from __future__ import annotations

import hashlib
import pickle
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.builders import TINY_SETTINGS, RunsCommand, invoke, make_data_files, refuse
from tests.faults.disks import drop_root
from tune_cifar.data import files
from tune_cifar.data import load as data
from tune_cifar.data.files import (
    BATCHES_FOLDER,
    FILES,
    TEST_FILE,
    TRAIN_FILES,
    find_data,
    verify_data,
)
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import DataError
from tune_cifar.record.journal import read_state
from tune_cifar.record.store import search_folder


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make one valid file of 10,000 images, 1,000 of each class."""
    labels = np.arange(10_000) % 10
    images = np.repeat((25 * labels).astype(np.uint8), 3072).reshape(10_000, 3072)
    path = tmp_path_factory.mktemp("batch") / "batch"
    path.write_bytes(pickle.dumps({b"data": images, b"labels": labels.tolist()}, protocol=3))
    return path


@pytest.fixture(scope="module")
def table(batch: Path) -> dict[str, tuple[str, int]]:
    """Return the table of published files, as if the batch were published under all names."""
    return dict.fromkeys(FILES, (hashlib.md5(batch.read_bytes()).hexdigest(), batch.stat().st_size))


@pytest.fixture
def folder(
    tmp_path: Path,
    workplace: Path,
    batch: Path,
    table: dict[str, tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """Make a folder with all seven files: links to one file, so replace them, do not write."""
    monkeypatch.setattr(files, "FILES", table)
    (tmp_path / "cifar" / BATCHES_FOLDER).mkdir(parents=True)
    for name in FILES:
        (tmp_path / "cifar" / BATCHES_FOLDER / name).symlink_to(batch)
    yield tmp_path / "cifar"
    data._load_published.cache_clear()


def replace(folder: Path, name: str, content: bytes) -> Path:
    path = folder / BATCHES_FOLDER / name
    path.unlink()
    path.write_bytes(content)
    return path


def train(folder: Path, name: str = "t") -> list[str]:
    """Return the command of a training of three epochs of two steps, without a tracking store."""
    unreachable = f"sqlite:///{folder}/no/such/folder/mlflow.db"
    command = f"train --space smoke --tier cpu --precision fp32 --name {name}".split()
    return [*command, *TINY_SETTINGS, "--data", str(folder), "--tracking-uri", unreachable]


def hint(folder: Path) -> str:
    return f"Run `python -m tune_cifar data fetch {folder}`, or use `data='shapes'`."


@pytest.mark.slow
def test_a_training_works_without_the_test_file_and_verify_reports_that_it_is_missing(
    folder: Path, workplace: Path
) -> None:
    (folder / BATCHES_FOLDER / TEST_FILE).unlink()
    answer = invoke(*train(folder))
    assert answer.exit_code == 0, answer.output
    state = read_state(search_folder(workplace / "runs", "t"))
    assert (state.trials[0].status, state.header.data.name) == ("complete", "cifar10")
    answer = invoke("data", "verify", "--data", str(folder))
    assert answer.exit_code == 1 and answer.stdout.count("the file is missing") == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["truncated", "emptied", "grown", "one bit flipped"])
def test_a_training_refuses_a_damaged_training_file_before_it_has_made_a_record(
    folder: Path, workplace: Path, batch: Path, table: dict[str, tuple[str, int]], fault: str
) -> None:
    content, (md5, size) = batch.read_bytes(), table["data_batch_3"]
    flipped = content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]
    sizes = {"truncated": content[:-1], "emptied": b"", "grown": content + b"x"}
    damaged = sizes.get(fault, flipped)
    path = replace(folder, "data_batch_3", damaged)
    problem = f"the file must have {size:,} bytes, found {len(damaged):,}"
    if fault == "one bit flipped":
        problem = f"the file must have MD5 {md5}, found {hashlib.md5(damaged).hexdigest()}"
    assert refuse(DataError, *train(folder)) == f"{path}: {problem}. {hint(folder)}"
    assert not (workplace / "runs").exists()
    checks = verify_data(find_data(str(folder)))
    assert [check.name for check in checks if check.problem] == ["data_batch_3"]


@pytest.mark.parametrize("name", TRAIN_FILES)
def test_a_training_refuses_a_missing_training_file_by_its_name(folder: Path, name: str) -> None:
    path = folder / BATCHES_FOLDER / name
    path.unlink()
    sentence = f"{path}: the file is missing. {hint(folder)}"
    assert refuse(DataError, *train(folder)) == sentence
    path.mkdir()
    assert refuse(DataError, *train(folder)) == sentence


def test_a_hostile_file_runs_nothing_although_its_md5_is_the_published_one(
    folder: Path, tmp_path: Path, table: dict[str, tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = pickle.dumps(RunsCommand(tmp_path / "ran"), protocol=2)
    path = replace(folder, "data_batch_1", content)
    monkeypatch.setitem(table, "data_batch_1", (hashlib.md5(content).hexdigest(), len(content)))
    assert [check.problem for check in verify_data(find_data(str(folder)))] == [None] * 7
    sentence = refuse(DataError, *train(folder))
    assert sentence == f"{path}: the pickle must hold only arrays, found: posix.system."
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)
    assert (tmp_path / "ran").exists()  # it would have run


def test_a_hostile_file_is_refused_by_its_md5_before_it_is_unpickled(
    folder: Path, tmp_path: Path
) -> None:
    content = pickle.dumps(RunsCommand(tmp_path / "ran"), protocol=2)
    path = replace(folder, "data_batch_1", content.ljust(files.FILES["data_batch_1"][1], b"."))
    assert refuse(DataError, *train(folder)).startswith(f"{path}: the file must have MD5 ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_fetching_without_network_is_refused_in_one_sentence_and_leaves_nothing(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    with socket.create_server(("127.0.0.1", 0)) as closed_later:
        port = closed_later.getsockname()[1]
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/cifar.tar.gz")
    sentence = refuse(DataError, "data", "fetch", "here")
    assert sentence.startswith(f"data fetch: cannot reach http://127.0.0.1:{port}/cifar.tar.gz: ")
    assert sentence.endswith("by hand and run this again, or use `data='shapes'`.")
    assert [path.name for path in (workplace / "here").rglob("*")] == []


# Places that cannot be read


@pytest.fixture
def locked() -> Iterator[Path]:
    """Make a folder with files of the right sizes, on a path that every user may enter."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        Path(place).chmod(0o755)
        folder = make_data_files(Path(place) / "data")
        yield folder
        for path in (folder, folder / BATCHES_FOLDER):
            path.chmod(0o755)


@pytest.mark.parametrize("mode", [0o000, 0o444])
@pytest.mark.parametrize("inner", [False, True])
def test_data_in_a_folder_without_permission_are_refused_with_the_systems_reason(
    locked: Path, mode: int, inner: bool
) -> None:
    (locked / BATCHES_FOLDER if inner else locked).chmod(mode)
    with drop_root(), pytest.raises(DataError) as caught:
        find_data(str(locked))
    sentence = str(caught.value)
    if inner:
        path = locked / BATCHES_FOLDER / "data_batch_1"
        problem = "the file cannot be read: Permission denied"
        assert sentence == f"{path}: {problem}. {hint(locked)}"
    else:
        rule = f"`data` must be a folder with {BATCHES_FOLDER} in it"
        found = f"got '{locked}', which cannot be read (Permission denied)"
        assert sentence == f"{rule}, {found}. {hint(locked)}"


def test_a_file_without_permission_is_refused_with_the_systems_reason(locked: Path) -> None:
    path = locked / BATCHES_FOLDER / "data_batch_1"
    path.chmod(0o000)
    with drop_root():
        source = find_data(str(locked))
        with pytest.raises(DataError) as caught:
            load_train_val(source, 100, 100)
    problem = "the file cannot be read: Permission denied"
    assert str(caught.value) == f"{path}: {problem}. {hint(locked)}"


def test_data_are_looked_for_past_a_home_that_cannot_be_read(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNE_CIFAR_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for home in ("/dev/null/x", "/no/such/home", "/" + "x" * 5000):
        monkeypatch.setenv("HOME", home)
        with pytest.raises(DataError, match=f"^data: no {BATCHES_FOLDER} in .* or "):
            find_data(None)


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("x" * 300, "which cannot be read (File name too long)."),
        ("/x" * 4000, "which cannot be read (File name too long)."),
        ("~nobody-of-that-name/data", "which is not a folder."),
        ("/dev/null/x", "which is not a folder."),
        ("/proc", "which has none."),
        ("with\nline", "which is not a folder."),
    ],
    ids=["a long name", "a long path", "an unknown home", "below a device", "proc", "two lines"],
)
def test_a_strange_place_is_refused_in_one_sentence(
    workplace: Path, place: str, found: str
) -> None:
    with pytest.raises(DataError) as caught:
        find_data(place)
    assert f"got {place!r}, {found}" in str(caught.value)
    assert str(caught.value).endswith("or use `data='shapes'`.")
