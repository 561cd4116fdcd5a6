"""The files of trials on a cluster: what the actor writes, refuses and hands out."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.builders import ROOT
from tests.faults.disks import limit_file_size
from tune_cifar.record.files import WEIGHTS, stop_file, trial_folder, write_atomically
from tune_cifar.search import trial_files
from tune_cifar.search.trial_files import (
    ATTEMPT_FILE,
    NONCE_FILE,
    REFUSED_FILE,
    FileServer,
    SharedFiles,
    SupersededError,
    open_trial_files,
)

CHECKPOINT = "checkpoints/checkpoint-0003.pt"


@pytest.fixture
def server(tmp_path: Path) -> FileServer:
    return FileServer(str(tmp_path), None)


def test_what_one_attempt_put_the_next_one_fetches(server: FileServer, tmp_path: Path) -> None:
    assert server.fetch(7, 1) == {}
    assert server.put(7, 1, CHECKPOINT, b"three") == server.put(7, 1, WEIGHTS, b"w") == ""
    assert (trial_folder(tmp_path, 7) / CHECKPOINT).read_bytes() == b"three"
    assert server.fetch(7, 2) == {CHECKPOINT: b"three"}


def test_an_older_attempt_can_change_nothing_and_is_noted(
    server: FileServer, tmp_path: Path
) -> None:
    server.put(7, 1, CHECKPOINT, b"first")
    server.fetch(7, 2)
    assert server.put(7, 1, CHECKPOINT, b"late") == "superseded"
    assert server.keep(7, 1, []) is None and server.fetch(7, 1) is None
    assert (trial_folder(tmp_path, 7) / CHECKPOINT).read_bytes() == b"first"
    noted = (tmp_path / REFUSED_FILE).read_text().splitlines()
    assert noted == 3 * ["trial 7: attempt 1 came after attempt 2"]
    assert server.put(8, 1, CHECKPOINT, b"another trial's") == ""


def test_checkpoints_that_the_worker_has_no_more_are_deleted_and_a_stop_is_told(
    server: FileServer, tmp_path: Path
) -> None:
    later = "checkpoints/checkpoint-0004.pt"
    server.put(0, 1, CHECKPOINT, b"3")
    server.put(0, 1, later, b"4")
    assert server.keep(0, 1, [later]) is False
    assert server.fetch(0, 1) == {later: b"4"}
    stop_file(tmp_path).touch()
    assert server.keep(0, 1, [later]) is True


@pytest.mark.parametrize(
    "name", ["../record.jsonl", "record.jsonl", "checkpoints/../../x", "/etc/x", "checkpoints/x.pt"]
)
def test_a_worker_writes_checkpoints_and_weights_and_nothing_else(
    server: FileServer, name: str
) -> None:
    with pytest.raises(ValueError, match="a trial has no file"):
        server.put(0, 1, name, b"x")


def test_a_full_disk_is_told_in_the_systems_words(server: FileServer) -> None:
    with limit_file_size(1000):
        assert server.put(0, 1, WEIGHTS, bytes(2000)) == "File too large"


def test_the_actors_module_needs_no_torch() -> None:
    script = "import sys, tune_cifar.search.trial_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_who_sees_the_run_store_trains_in_it(tmp_path: Path) -> None:
    (tmp_path / NONCE_FILE).write_text("n0nce")
    files = open_trial_files(tmp_path, 3, 1, "n0nce")
    assert isinstance(files, SharedFiles) and files.folder == trial_folder(tmp_path, 3)
    files.upload()
    newer = open_trial_files(tmp_path, 3, 2, "n0nce")
    with pytest.raises(SupersededError):
        files.upload()
    newer.upload()
    with pytest.raises(SupersededError):
        open_trial_files(tmp_path, 3, 1, "n0nce")
    assert (trial_folder(tmp_path, 3) / ATTEMPT_FILE).read_text() == "n0nce 2"


def test_a_resumed_search_begins_anew_whatever_attempt_the_last_launch_had(tmp_path: Path) -> None:
    """The record does not have attempts that reported nothing: their numbers come again."""
    (tmp_path / NONCE_FILE).write_text("first")
    old = open_trial_files(tmp_path, 3, 5, "first")
    (tmp_path / NONCE_FILE).write_text("second")
    new = open_trial_files(tmp_path, 3, 1, "second")
    new.upload()
    with pytest.raises(SupersededError):
        old.upload()


def test_an_attempt_that_cannot_be_read_is_not_taken_for_a_newer_one(tmp_path: Path) -> None:
    """As a network file system answers for a while: ESTALE, EIO."""
    (tmp_path / NONCE_FILE).write_text("n0nce")
    files = open_trial_files(tmp_path, 3, 1, "n0nce")
    (files.folder / ATTEMPT_FILE).unlink()
    (files.folder / ATTEMPT_FILE).mkdir()
    for ask in (files.upload, lambda: FileServer(str(tmp_path), None, "n0nce").fetch(3, 1)):
        with pytest.raises(SupersededError, match="cannot read the newest attempt"):
            ask()


def test_the_actor_refuses_an_attempt_that_one_in_the_run_store_has_followed(
    tmp_path: Path,
) -> None:
    """Some nodes see the run store and some do not."""
    (tmp_path / NONCE_FILE).write_text("n0nce")
    server = FileServer(str(tmp_path), None, "n0nce")
    server.fetch(3, 1)
    open_trial_files(tmp_path, 3, 2, "n0nce")
    assert server.put(3, 1, CHECKPOINT, b"late") == "superseded"


def test_a_checkpoint_that_does_not_come_leaves_the_last_one_that_did(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run store's disk is full for a while; the worker keeps its newest two."""

    def call(name: str) -> Any:
        return SimpleNamespace(remote=getattr(server, name))

    actor = SimpleNamespace(fetch=call("fetch"), put=call("put"), keep=call("keep"))
    monkeypatch.setattr("ray.get_actor", lambda name: actor)
    monkeypatch.setattr("ray.get", lambda answer: answer)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = trial_files.CopiedFiles(7, 1)
    here, there = files.folder / "checkpoints", trial_folder(tmp_path, 7) / "checkpoints"

    def save(epoch: int, size: int) -> None:
        write_atomically(here / f"checkpoint-{epoch:04d}.pt", bytes(size))
        (here / f"checkpoint-{epoch - 2:04d}.pt").unlink(missing_ok=True)

    for epoch in (1, 2):
        save(epoch, 10)
        files.upload()
    for epoch in (3, 4, 5):
        save(epoch, 2000)
        with limit_file_size(1000):
            files.upload()
    assert [path.name for path in there.iterdir()] == ["checkpoint-0002.pt"]
    files.upload()
    found = sorted(path.name for path in there.iterdir())
    assert found == ["checkpoint-0004.pt", "checkpoint-0005.pt"]
    files.close()


@pytest.mark.parametrize("found", [None, "another"])
def test_another_folder_of_the_same_path_is_not_taken_for_the_run_store(
    tmp_path: Path, found: str | None
) -> None:
    if found is not None:
        (tmp_path / NONCE_FILE).write_text(found)
    assert not trial_files._is_seen(tmp_path, "n0nce")


def test_folders_of_killed_workers_are_deleted_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    living, lock = trial_files._make_scratch_folder()
    dead, gone = trial_files._make_scratch_folder()
    gone.close()
    write_atomically(dead / "trials" / "x", b"left")
    trial_files._remove_leftovers()
    assert living.exists() and not dead.exists()
    fcntl.flock(lock, fcntl.LOCK_UN)
    lock.close()
