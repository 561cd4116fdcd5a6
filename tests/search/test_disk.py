"""Disk needs are coarse upper bounds, and an unfit machine is refused in one sentence."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from tests.builders import SHAPES, make_space
from tests.faults.disks import drop_root, limit_file_size, mount_small_disk
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import ConfigError
from tune_cifar.schema import Numerics
from tune_cifar.search.disk import (
    MAX_TEMPORARY_BYTES,
    DiskNeeds,
    check_disk,
    estimate_disk_needs,
)
from tune_cifar.space.select import load_space
from tune_cifar.train.checkpoint import save_checkpoint, save_weights
from tune_cifar.train.trainer import Trainer

NEEDS = DiskNeeds(checkpoints=5_000_000, weights=2_000_000, records=3_000_000)


@pytest.fixture(autouse=True)
def default_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the system's."""
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)


def refuse(storage: Path, needs: DiskNeeds = NEEDS) -> str:
    """Return the sentence against a search with these needs."""
    with pytest.raises(ConfigError) as caught:
        check_disk(storage, needs)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("s6", "sgd"),
        ("s7", "adam"),
        ("s8", "adamw"),
        pytest.param("s10", "adam", marks=pytest.mark.slow),
    ],
)
def test_real_files_take_at_most_the_needs_and_at_least_a_third_of_them(
    tmp_path: Path, fp32: Numerics, name: str, optimizer: str
) -> None:
    sizes = {"train_size": 10, "val_size": 10, "batch_size": 10, "epochs": 3}
    space = load_space(name, "cpu", {"optimizer": optimizer, "schedule": "constant", **sizes})
    trainer = Trainer(space.baseline, load_train_val(SHAPES, 10, 10), fp32)
    results = [result.model_dump() for result in trainer]
    state = trainer.state_dict() | {"results": results * 300}
    save_weights(tmp_path / "weights", trainer.model.state_dict())
    save_checkpoint(tmp_path / "checkpoint", state)
    needs = estimate_disk_needs(space, max_concurrent=1, keep_weights=3)
    real_weights = (3 + 1 + 1) * (tmp_path / "weights").stat().st_size
    real_checkpoints = 3 * (tmp_path / "checkpoint").stat().st_size
    assert real_weights <= needs.weights <= 3 * real_weights
    assert real_checkpoints <= needs.checkpoints <= 3 * real_checkpoints


def test_the_estimate_draws_no_random_number() -> None:
    before = torch.random.get_rng_state()
    estimate_disk_needs(make_space(), 1, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_needs_grow_with_everything_that_is_written() -> None:
    small = estimate_disk_needs(make_space(), max_concurrent=1, keep_weights=1)
    assert small.total == small.checkpoints + small.weights + small.records
    wide = estimate_disk_needs(make_space(), max_concurrent=2, keep_weights=1)
    assert wide.checkpoints == 2 * small.checkpoints and wide.weights > small.weights
    assert estimate_disk_needs(make_space(), 1, 2).weights > small.weights
    assert estimate_disk_needs(make_space(trials=1000), 1, 1).records > 10 * small.records
    staged = make_space(rungs=(1, 2, 3), fidelity="cycles")  # 6 epochs instead of 3
    assert estimate_disk_needs(staged, 1, 1).records > small.records


def test_a_search_that_fits_is_let_through_and_leaves_no_trace(tmp_path: Path) -> None:
    check_disk(tmp_path, NEEDS)
    check_disk(tmp_path / "not" / "yet" / "there", NEEDS)
    assert list(tmp_path.iterdir()) == []


def test_a_search_larger_than_the_disk_is_refused_with_both_numbers_and_what_to_do(
    tmp_path: Path,
) -> None:
    sentence = refuse(tmp_path / "runs", NEEDS._replace(records=10**15))
    parts = "checkpoints 5 MB, weights 2 MB, record and MLflow 1,000,000,000 MB"
    rule = rf"([\d,]+) MB must be free for the search \({parts}\), got ([\d,]+) MB\."
    hint = "Make room (`searches delete`), give another folder as `storage`, or lower `trials`."
    pattern = rf"{re.escape(str(tmp_path))}/runs: {rule} {re.escape(hint)}"
    found = re.fullmatch(pattern, sentence)
    assert found is not None, sentence
    needed, free = (int(text.replace(",", "")) for text in found.groups())
    assert needed > 10**7 and 0 < free < needed


def test_a_search_larger_than_a_small_disk_is_refused(tmp_path: Path) -> None:
    with mount_small_disk(tmp_path / "disk", num_kb=2000) as disk:
        assert "must be free for the search" in refuse(disk)
        assert "must be free for the search" in refuse(disk / "runs")
    check_disk(tmp_path / "disk", NEEDS)


@pytest.mark.parametrize("below", ["", "/runs", "/a/b"])
def test_a_run_store_on_or_below_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    file = tmp_path / "file"
    assert refuse(Path(f"{file}{below}")) == (
        f"{file}{below}: the run store must be writable, got 'Not a directory' at {file}. "
        "Give another folder as `storage`."
    )


@pytest.mark.parametrize("place", ["/proc/runs", "/proc", "/dev/null/x"])
def test_a_run_store_where_not_even_root_can_write_is_refused(place: str) -> None:
    sentence = refuse(Path(place))
    assert sentence.startswith(f"{place}: the run store must be writable, got ")
    assert "`storage`" in sentence


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into every folder")
def test_a_run_store_without_the_right_to_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "must be writable, got 'Permission denied'" in refuse(tmp_path / "locked" / "runs")


def test_a_folder_that_takes_no_byte_is_refused(tmp_path: Path) -> None:
    with limit_file_size(0):
        sentence = refuse(tmp_path)
    assert "must be writable, got 'File too large'" in sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize(
    ("folder", "reason"),
    [("/no/such", "No such file or directory"), ("/dev/null", "Not a directory")],
)
def test_a_temporary_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str, reason: str
) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setenv(name, folder)
    rule = f"{folder}: the temporary folder must be writable, got '{reason}' at {folder}."
    assert refuse(tmp_path) == f"{rule} Set {name} to one that is."


def test_a_temporary_folder_too_deep_for_rays_sockets_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/" + "x" * MAX_TEMPORARY_BYTES)
    rule = f"TMPDIR must be a path of at most {MAX_TEMPORARY_BYTES} bytes (of Ray's sockets), got "
    assert refuse(tmp_path).startswith(rule)


@pytest.mark.parametrize("text", ["", "tmp", "."])
def test_a_relative_temporary_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("TMPDIR", text)
    assert refuse(tmp_path).startswith("TMPDIR must be an absolute path, got ")


def test_another_users_ray_folder_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would end with a traceback, after all checks have passed."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder of another user")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are closed to others
    try:
        folder.chmod(0o1777)
        (folder / "ray").mkdir(mode=0o755)
        monkeypatch.setenv("RAY_TMPDIR", str(folder))
        with drop_root():
            sentence = refuse(folder)
        (folder / "ray").chmod(0o1777)  # as Ray makes it: for all
        with drop_root():
            check_disk(folder, NEEDS)
    finally:
        shutil.rmtree(folder)
    rule = f"{folder}/ray: Ray's folder must be writable, got 'Permission denied' at {folder}/ray."
    assert sentence == f"{rule} Set RAY_TMPDIR to a folder of your own."


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_ray_folder_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # short enough for Ray's sockets
    monkeypatch.setenv(name, str(folder))
    try:
        (folder / "ray").write_text("")
        assert "/ray: Ray's folder must be writable, got 'Not a directory'" in refuse(tmp_path)
        (folder / "ray").unlink()
        (folder / "ray").symlink_to("/no/such/folder")
        assert "Ray's folder must be writable, got 'No such file or dir" in refuse(tmp_path)
    finally:
        shutil.rmtree(folder)


def test_a_read_only_ray_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    try:
        with mount_small_disk(folder / "ray", num_kb=100) as disk:
            command = ["mount", "-o", "remount,ro", str(disk)]
            subprocess.run(command, check=True)
            assert "Ray's folder must be writable, got 'Read-only file system'" in refuse(tmp_path)
    finally:
        shutil.rmtree(folder)
