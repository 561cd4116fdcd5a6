"""Checkpoints: damaged and altered files are refused; weights need no pickle."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from tests.builders import make_checkpoint, make_hostile, write_payload
from tune_cifar.errors import CheckpointError
from tune_cifar.train.checkpoint import (
    CheckpointFolder,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)


def test_checkpoint_comes_back_equal(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", make_checkpoint(3))
    state = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(state["model"]["weight"], make_checkpoint(3)["model"]["weight"])
    assert state["epoch"] == 3 and state["results"] == [{"lr": 0.1}]


@pytest.mark.parametrize("damage", ["emptied", "truncated", "one bit flipped", "gone"])
def test_checkpoint_is_refused_when_damaged(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, make_checkpoint(1))
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "one bit flipped":
        content[-40] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: 0 if damage == "emptied" else -10])
    with pytest.raises(CheckpointError, match=r"c\.pt"):
        load_checkpoint(path)


def test_checkpoint_with_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    write_payload(tmp_path / "c.pt", make_hostile(tmp_path / "ran"))
    rule = r"c\.pt: a checkpoint must hold only tensors and plain values, got something else\."
    with pytest.raises(CheckpointError, match=rule):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(io.BytesIO(make_hostile(tmp_path / "ran")), weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize(
    "payload", [b"", b"junk", b"PK\x03\x04"], ids=["empty", "junk", "half an archive"]
)
def test_checkpoint_of_something_else_is_refused(tmp_path: Path, payload: bytes) -> None:
    write_payload(tmp_path / "c.pt", payload)
    with pytest.raises(
        CheckpointError, match=r"c\.pt: (a checkpoint must hold|the checksum does not)"
    ):
        load_checkpoint(tmp_path / "c.pt")


def test_checkpoint_that_holds_no_state_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", [1, 2])  # type: ignore[arg-type]
    rule = r"c\.pt: a checkpoint must hold a training's state, got a list\."
    with pytest.raises(CheckpointError, match=rule):
        load_checkpoint(tmp_path / "c.pt")


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_keeps_the_last_two_and_falls_back_when_the_newest_is_torn(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for epoch in range(1, 5):
        newest = folder.save(make_checkpoint(epoch))
    assert list_names(newest.parent) == ["checkpoint-0003.pt", "checkpoint-0004.pt"]
    newest.write_bytes(newest.read_bytes()[:-1])
    state, notes = folder.load_newest()
    assert state is not None and state["epoch"] == 3
    assert len(notes) == 1 and "checkpoint-0004.pt" in notes[0]
    folder.delete()
    assert folder.load_newest() == (None, [])


def test_folder_finds_the_newest_intact_epoch_from_the_checksums_alone(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.find_newest() == (None, [])
    for epoch in (9, 10):
        newest = folder.save(make_checkpoint(epoch))
    assert folder.find_newest() == (10, [])
    newest.write_bytes(b"")
    epoch_found, notes = folder.find_newest()
    assert (epoch_found, len(notes)) == (9, 1)
    assert "checkpoint-0010.pt: the checksum does not match" in notes[0]
    write_payload(newest, make_hostile(tmp_path / "ran"))
    assert folder.find_newest() == (10, [])
    assert not (tmp_path / "ran").exists()


def test_folder_ignores_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-abcd.pt", "checkpoint-.pt", "checkpoint-0003.pt.bak", "notes.txt"):
        (tmp_path / name).write_text("mine")
    folder = CheckpointFolder(tmp_path)
    assert folder.find_newest() == folder.load_newest() == (None, [])
    folder.save(make_checkpoint(1))
    folder.delete()
    assert len(list(tmp_path.iterdir())) == 4


def test_folder_deletes_what_a_killed_write_left_when_it_saves_and_when_it_is_deleted(
    tmp_path: Path,
) -> None:
    folder = CheckpointFolder(tmp_path)
    (tmp_path / "checkpoint-0007.tmp").write_bytes(b"half")
    folder.save(make_checkpoint(3))
    assert list_names(tmp_path) == ["checkpoint-0003.pt"]
    (tmp_path / "checkpoint-0004.tmp").write_bytes(b"half")
    folder.delete()
    assert list_names(tmp_path) == []


def test_folder_prefers_its_new_checkpoints_to_damaged_ones_of_later_epochs(tmp_path: Path) -> None:
    """A training that starts over must not have its first checkpoint deleted as the oldest."""
    folder = CheckpointFolder(tmp_path)
    for epoch in (8, 9):
        folder.save(make_checkpoint(epoch)).write_bytes(b"damaged")
    folder.save(make_checkpoint(1))
    assert folder.find_newest() == (1, [])
    folder.save(make_checkpoint(2))
    assert list_names(tmp_path) == ["checkpoint-0001.pt", "checkpoint-0002.pt"]


def test_folder_is_due_only_after_its_time(tmp_path: Path) -> None:
    assert not CheckpointFolder(tmp_path, every_seconds=3600).is_due()
    assert CheckpointFolder(tmp_path, every_seconds=0).is_due()


def test_weights_come_back_equal_and_a_torn_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trial" / "weights.safetensors"
    save_weights(path, make_checkpoint(1)["model"])
    assert torch.equal(load_weights(path)["weight"], make_checkpoint(1)["model"]["weight"])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        load_weights(path)
