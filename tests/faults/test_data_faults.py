"""CIFAR-10's files damaged, hostile, unreadable or gone, as the commands meet them: one sentence, nothing run, and the
test file is never missed by a training.

The files here are small lies of the real size: five copies of one batch, with their MD5 entered as the published one.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.builders import TINY, RunsCommand, invoke, make_files, refuse
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
    """One well-formed file of 10,000 images, 1,000 of each class."""
    labels = np.arange(10_000) % 10
    images = np.repeat((25 * labels).astype(np.uint8), 3072).reshape(10_000, 3072)
    path = tmp_path_factory.mktemp("batch") / "batch"
    path.write_bytes(pickle.dumps({b"data": images, b"labels": labels.tolist()}, protocol=3))
    return path


@pytest.fixture(scope="module")
def table(batch: Path) -> dict[str, tuple[str, int]]:
    """The published table, if the batch were published under all names."""
    return dict.fromkeys(FILES, (hashlib.md5(batch.read_bytes()).hexdigest(), batch.stat().st_size))


@pytest.fixture
def folder(
    tmp_path: Path,
    workplace: Path,
    batch: Path,
    table: dict[str, tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """A folder with all seven files, genuine by the table. Replace a file, never write into it: all are one."""
    monkeypatch.setattr(files, "FILES", table)
    (tmp_path / "cifar" / BATCHES_FOLDER).mkdir(parents=True)
    for name in FILES:
        (tmp_path / "cifar" / BATCHES_FOLDER / name).symlink_to(batch)
    yield tmp_path / "cifar"
    data._load_cifar10.cache_clear()


def replace(folder: Path, name: str, content: bytes) -> Path:
    path = folder / BATCHES_FOLDER / name
    path.unlink()
    path.write_bytes(content)
    return path


def train(folder: Path, name: str = "t") -> list[str]:
    """The words of a training of three epochs of two steps, without a tracking store."""
    dead = f"sqlite:///{folder}/no/such/folder/mlflow.db"
    words = [
        "train",
        "--space",
        "smoke",
        "--tier",
        "cpu",
        "--precision",
        "fp32",
        *TINY,
        "--name",
        name,
    ]
    return [*words, "--data", str(folder), "--tracking-uri", dead]


def hint(folder: Path) -> str:
    return f"Run `python -m tune_cifar data fetch {folder}`, or use --data shapes."


@pytest.mark.slow
def test_a_training_works_with_the_test_file_removed_and_verify_tells_that_it_is(
    folder: Path, workplace: Path
) -> None:
    (folder / BATCHES_FOLDER / TEST_FILE).unlink()
    answer = invoke(*train(folder))
    assert answer.exit_code == 0, answer.output
    state = read_state(search_folder(workplace / "runs", "t"))
    assert (state.trials[0].status, state.header.data.name) == ("complete", "cifar10")
    answer = invoke("data", "verify", "--data", str(folder))
    assert answer.exit_code == 1 and answer.stdout.count("the file must exist, found none") == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["truncated", "emptied", "grown", "one bit flipped"])
def test_a_training_refuses_a_damaged_training_file_before_it_has_made_a_record(
    folder: Path, workplace: Path, batch: Path, table: dict[str, tuple[str, int]], fault: str
) -> None:
    content, (md5, size) = batch.read_bytes(), table["data_batch_3"]
    flipped = content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]
    damaged = {"truncated": content[:-1], "emptied": b"", "grown": content + b"x"}.get(
        fault, flipped
    )
    path = replace(folder, "data_batch_3", damaged)
    problem = f"the file must have {size:,} bytes, found {len(damaged):,}"
    if fault == "one bit flipped":
        problem = f"the file must have MD5 {md5}, found {hashlib.md5(damaged).hexdigest()}"
    assert refuse(DataError, *train(folder)) == f"{path}: {problem}. {hint(folder)}"
    assert not (workplace / "runs").exists()
    assert [check.name for check in verify_data(find_data(str(folder))) if check.problem] == [
        "data_batch_3"
    ]


@pytest.mark.parametrize("name", TRAIN_FILES)
def test_a_training_refuses_a_missing_training_file_by_its_name(folder: Path, name: str) -> None:
    path = folder / BATCHES_FOLDER / name
    path.unlink()
    assert (
        refuse(DataError, *train(folder))
        == f"{path}: the file must exist, found none. {hint(folder)}"
    )
    path.mkdir()
    assert (
        refuse(DataError, *train(folder))
        == f"{path}: the file must exist, found none. {hint(folder)}"
    )


def test_a_hostile_file_runs_nothing_although_its_md5_is_the_published_one(
    folder: Path, tmp_path: Path, table: dict[str, tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = pickle.dumps(RunsCommand(tmp_path / "ran"), protocol=2)
    path = replace(folder, "data_batch_1", content)
    monkeypatch.setitem(table, "data_batch_1", (hashlib.md5(content).hexdigest(), len(content)))
    assert [check.problem for check in verify_data(find_data(str(folder)))] == [None] * 7
    sentence = refuse(DataError, *train(folder))
    assert sentence == f"{path}: the pickle must hold arrays and nothing else, found: posix.system."
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
    assert sentence.startswith(
        f"data fetch: http://127.0.0.1:{port}/cifar.tar.gz must be reachable, got: "
    )
    assert sentence.endswith("by hand and run this again, or use --data shapes.")
    assert [path.name for path in (workplace / "here").rglob("*")] == []


# Places that cannot be read


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything; whoever is not root has none already."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder with files of the right sizes, on a path that everybody may walk: lock what is needed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        Path(place).chmod(0o755)
        folder = make_files(Path(place) / "data")
        yield folder
        for path in (folder, folder / BATCHES_FOLDER):
            path.chmod(0o755)


@pytest.mark.parametrize("mode", [0o000, 0o444])
@pytest.mark.parametrize("inner", [False, True])
def test_data_in_a_folder_without_the_right_to_read_are_refused_with_the_systems_words(
    locked: Path, mode: int, inner: bool
) -> None:
    (locked / BATCHES_FOLDER if inner else locked).chmod(mode)
    with as_nobody(), pytest.raises(DataError) as caught:
        find_data(str(locked))
    sentence = str(caught.value)
    if inner:
        path = locked / BATCHES_FOLDER / "data_batch_1"
        assert (
            sentence
            == f"{path}: the file must be readable, found: Permission denied. {hint(locked)}"
        )
    else:
        rule = f"--data: a folder with {BATCHES_FOLDER} in it must be given"
        assert (
            sentence
            == f"{rule}, got '{locked}', which cannot be read (Permission denied). {hint(locked)}"
        )


def test_a_file_without_the_right_to_read_is_refused_with_the_systems_words(locked: Path) -> None:
    path = locked / BATCHES_FOLDER / "data_batch_1"
    path.chmod(0o000)
    with as_nobody():
        source = find_data(str(locked))
        with pytest.raises(DataError) as caught:
            load_train_val(source, 100, 100)
    assert (
        str(caught.value)
        == f"{path}: the file must be readable, found: Permission denied. {hint(locked)}"
    )


def test_data_are_looked_for_past_a_home_that_cannot_be_read(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNE_CIFAR_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for home in ("/dev/null/x", "/no/such/home", "/" + "x" * 5000):
        monkeypatch.setenv("HOME", home)
        with pytest.raises(DataError, match=f"{BATCHES_FOLDER} must be in .* found in neither"):
            find_data(None)


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ("x" * 300, "which cannot be read (File name too long)."),
        ("/x" * 4000, "which cannot be read (File name too long)."),
        ("~nobody-of-that-name/data", "which is no folder."),
        ("/dev/null/x", "which is no folder."),
        ("/proc", "which has none."),
        ("with\nline", "which is no folder."),
    ],
    ids=["a long name", "a long path", "an unknown home", "below a device", "proc", "two lines"],
)
def test_a_strange_place_is_refused_in_one_sentence(
    workplace: Path, option: str, found: str
) -> None:
    with pytest.raises(DataError) as caught:
        find_data(option)
    assert f"got {option!r}, {found}" in str(caught.value) and str(caught.value).endswith(
        "or use --data shapes."
    )
