"""Checkpoints survive tearing and tampering; weights need no pickle."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tune_cifar.checkpoint import MAGIC, CheckpointFolder, load_checkpoint, load_weights, save_checkpoint, save_weights
from tune_cifar.errors import CheckpointError


def make_state(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "model": {"weight": torch.arange(6.0).reshape(2, 3)}, "results": [{"lr": 0.1}]}


def test_checkpoint_comes_back_equal(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", make_state(3))
    state = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(state["model"]["weight"], make_state(3)["model"]["weight"])
    assert state["epoch"] == 3 and state["results"] == [{"lr": 0.1}]


@pytest.mark.parametrize("damage", ["emptied", "truncated", "one bit flipped", "gone"])
def test_checkpoint_is_refused_when_damaged(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, make_state(1))
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


class Hostile:
    """Would run a command when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_checkpoint_with_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    import hashlib
    import io

    buffer = io.BytesIO()
    torch.save({"epoch": Hostile(tmp_path / "ran")}, buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest().encode()
    (tmp_path / "c.pt").write_bytes(MAGIC + digest + b"\n" + payload)
    with pytest.raises((CheckpointError, pickle.UnpicklingError)):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


def test_folder_keeps_the_last_two_and_falls_back_when_the_newest_is_torn(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for epoch in range(1, 5):
        newest = folder.save(make_state(epoch))
    assert sorted(path.name for path in newest.parent.iterdir()) == ["checkpoint-0003.pt", "checkpoint-0004.pt"]
    newest.write_bytes(newest.read_bytes()[:-1])
    state, notes = folder.load_newest()
    assert state is not None and state["epoch"] == 3
    assert len(notes) == 1 and "checkpoint-0004.pt" in notes[0]
    folder.delete()
    assert folder.load_newest() == (None, [])


def test_folder_is_due_only_after_its_time(tmp_path: Path) -> None:
    assert not CheckpointFolder(tmp_path, every_seconds=3600).is_due()
    assert CheckpointFolder(tmp_path, every_seconds=0).is_due()


def test_weights_come_back_equal_and_a_torn_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trial" / "weights.safetensors"
    save_weights(path, make_state(1)["model"])
    assert torch.equal(load_weights(path)["weight"], make_state(1)["model"]["weight"])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        load_weights(path)
