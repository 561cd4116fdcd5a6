"""Checkpoints damaged, hostile, cut off by a kill or by a full disk: the newest whole one is used, and the curve that
comes out is bitwise that of a training to which nothing happened."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import SHAPES, curve, make_config, make_hostile, make_state, write_payload
from tests.faults.disks import limit_file_size, mount_small_disk
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import CheckpointError
from tune_cifar.schema import Numerics
from tune_cifar.train.checkpoint import CheckpointFolder, load_weights, save_weights
from tune_cifar.train.trial import CHECKPOINTS, WEIGHTS, stop_file, train_trial

CONFIG = make_config(train_size=60, val_size=50, batch_size=20, epochs=3)


def train(
    storage: Path, numerics: Numerics, num_epochs: int = CONFIG.epochs
) -> tuple[list[dict[str, Any]], list[int], Path]:
    """Train so many epochs, with a checkpoint after each; the curve, the epoch it began at and the trial's folder."""
    folder = storage / "trials" / "0000"
    begun_at: list[int] = []
    data = load_train_val(SHAPES, CONFIG.train_size, CONFIG.val_size)
    results = train_trial(
        CONFIG, data, numerics, folder, lambda trainer: begun_at.append(trainer.epoch), 0.0
    )
    return curve(list(itertools.islice(results, num_epochs))), begun_at, folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, fp32: Numerics) -> list[dict[str, Any]]:
    """The uninterrupted training's curve."""
    results, begun_at, _ = train(tmp_path_factory.mktemp("whole"), fp32)
    assert begun_at == [0] and len(results) == 3
    return results


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, fp32: Numerics) -> Path:
    """A training's storage after two epochs: checkpoints 1 and 2 are there. Damage a copy."""
    storage = tmp_path_factory.mktemp("interrupted")
    _, _, folder = train(storage, fp32, num_epochs=2)
    assert CheckpointFolder(folder / CHECKPOINTS).find_newest() == (2, [])
    return storage


def empty(path: Path, seed: int) -> None:
    path.write_bytes(b"")


def truncate(path: Path, seed: int) -> None:
    os.truncate(path, random.Random(seed).randrange(1, path.stat().st_size))


def flip_bit(path: Path, seed: int) -> None:
    dice, content = random.Random(seed), bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def take_over(path: Path, seed: int) -> None:
    """The checksum fits, the pickle would run a command."""
    write_payload(path, make_hostile(path.parents[1] / "ran"))


@pytest.mark.parametrize(
    "damage",
    [
        empty,
        flip_bit,
        *(pytest.param(harm, marks=pytest.mark.slow) for harm in (truncate, take_over)),
    ],
)
def test_a_training_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_to_the_same_curve(
    tmp_path: Path,
    fp32: Numerics,
    whole: list[dict[str, Any]],
    interrupted: Path,
    damage: Callable[[Path, int], None],
) -> None:
    checkpoints = shutil.copytree(interrupted, tmp_path / "s") / "trials" / "0000" / CHECKPOINTS
    damage(checkpoints / "checkpoint-0002.pt", 0)
    state, notes = CheckpointFolder(checkpoints).load_newest()
    assert state is not None and state["epoch"] == 1
    assert (
        len(notes) == 1
        and notes[0].startswith(f"{checkpoints}/checkpoint-0002.pt: ")
        and notes[0].endswith(".")
    )
    results, begun_at, folder = train(tmp_path / "s", fp32)
    assert (begun_at, results) == ([1], whole)
    assert CheckpointFolder(checkpoints).find_newest() == (3, []) and not (folder / "ran").exists()


def test_a_training_whose_checkpoints_are_all_damaged_says_so_and_starts_over_to_the_same_curve(
    tmp_path: Path, fp32: Numerics, whole: list[dict[str, Any]], interrupted: Path
) -> None:
    checkpoints = shutil.copytree(interrupted, tmp_path / "s") / "trials" / "0000" / CHECKPOINTS
    truncate(checkpoints / "checkpoint-0001.pt", 1)
    empty(checkpoints / "checkpoint-0002.pt", 1)
    epoch, notes = CheckpointFolder(checkpoints).find_newest()
    assert epoch is None
    assert [note.split(": ")[0] for note in notes] == [
        f"{checkpoints}/checkpoint-000{n}.pt" for n in (2, 1)
    ]
    results, begun_at, _ = train(tmp_path / "s", fp32, num_epochs=1)
    assert (begun_at, results) == ([0], whole[:1])
    results, begun_at, _ = train(tmp_path / "s", fp32)  # its own first checkpoint was kept
    assert (begun_at, results) == ([1], whole)


@settings(max_examples=25, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_bit_flipped_anywhere_in_the_newest_checkpoint_makes_the_one_before_the_newest(
    position: float, bit: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = CheckpointFolder(Path(place))
        folder.save(make_state(1))
        path = folder.save(make_state(2))
        content = bytearray(path.read_bytes())
        content[int(position * len(content))] ^= 1 << bit
        path.write_bytes(content)
        (state, notes), (epoch, notes_again) = folder.load_newest(), folder.find_newest()
    assert state is not None and state["epoch"] == epoch == 1
    assert notes == notes_again and len(notes) == 1


# A full disk


def test_a_checkpoint_that_does_not_fit_the_disk_is_told_in_a_sentence_and_the_old_ones_stay(
    tmp_path: Path,
) -> None:
    folder = CheckpointFolder(tmp_path, every_seconds=0)
    for epoch in (1, 2):
        newest = folder.save(make_state(epoch))
    with limit_file_size(newest.stat().st_size - 1), pytest.raises(CheckpointError) as caught:
        folder.save(make_state(3))
    assert str(caught.value) == (
        f"{tmp_path}/checkpoint-0003.pt: the file must reach the disk, got 'File too large'. Make room."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-0001.pt",
        "checkpoint-0002.pt",
    ]
    assert folder.find_newest() == (2, [])
    folder.save(make_state(3))
    assert folder.find_newest() == (3, [])


def test_after_a_checkpoint_that_did_not_fit_the_next_try_waits_its_time(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, every_seconds=0.2)
    time.sleep(0.25)
    assert folder.is_due()
    with limit_file_size(10), pytest.raises(CheckpointError):
        folder.save(make_state(1))
    assert not folder.is_due()


def test_weights_that_do_not_fit_the_disk_leave_the_old_ones(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", {"weight": torch.zeros(9)})
    with (
        limit_file_size(100),
        pytest.raises(CheckpointError, match=r"w\.safetensors: the file must reach the disk"),
    ):
        save_weights(tmp_path / "w.safetensors", {"weight": torch.ones(9)})
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    assert torch.equal(load_weights(tmp_path / "w.safetensors")["weight"], torch.zeros(9))


def test_on_a_small_disk_the_last_checkpoints_that_fitted_stay_whole(tmp_path: Path) -> None:
    with mount_small_disk(tmp_path / "disk", num_kb=500) as disk:
        folder = CheckpointFolder(disk / CHECKPOINTS)
        state = {"model": torch.zeros(15_000), "results": []}  # 60 kB
        for epoch in (1, 2, 3):
            folder.save(state | {"epoch": epoch})
        (disk / "ballast").write_bytes(bytes(340_000))
        with pytest.raises(CheckpointError, match="got 'No space left on device'"):
            folder.save(state | {"epoch": 4})
        assert folder.find_newest() == (3, [])
        assert sorted(path.name for path in folder.folder.iterdir()) == [
            "checkpoint-0002.pt",
            "checkpoint-0003.pt",
        ]
        (disk / "ballast").unlink()
        folder.save(state | {"epoch": 4})
        assert folder.find_newest() == (4, [])


@pytest.mark.slow
def test_a_training_goes_on_to_the_same_curve_when_no_checkpoint_reaches_the_disk(
    tmp_path: Path, fp32: Numerics, whole: list[dict[str, Any]]
) -> None:
    """The weights (355 kB) still fit, a checkpoint (743 kB) does not."""
    with limit_file_size(500_000):
        results, _, folder = train(tmp_path / "s", fp32)
    assert results == whole
    assert CheckpointFolder(folder / CHECKPOINTS).find_newest() == (None, [])
    assert load_weights(folder / WEIGHTS) and list((folder / CHECKPOINTS).iterdir()) == []


# A stop


@pytest.mark.parametrize("every_seconds", [0.0, 60.0])
def test_a_training_that_is_stopped_ends_after_its_epoch_with_a_checkpoint_however_late_the_word_came(
    tmp_path: Path, fp32: Numerics, whole: list[dict[str, Any]], every_seconds: float
) -> None:
    """Here it comes when the epoch's result is out already."""
    folder = tmp_path / "trials" / "0000"
    data = load_train_val(SHAPES, CONFIG.train_size, CONFIG.val_size)
    results = train_trial(CONFIG, data, fp32, folder, every_seconds=every_seconds)
    first = next(results)
    stop_file(tmp_path).touch()
    assert list(results) == [] and CheckpointFolder(folder / CHECKPOINTS).find_newest() == (1, [])
    again = list(
        train_trial(CONFIG, data, fp32, folder)
    )  # the file still lies there: one epoch more
    assert curve([first]) == whole[:1] and curve(again) == whole[:2]


# kill -9


def save_until_killed(folder: CheckpointFolder, told: int, state: dict[str, Any]) -> None:
    """Checkpoint after checkpoint; each epoch is told when `save` has returned."""
    for epoch in range(1, 10_000):
        folder.save(state | {"epoch": epoch, "weight": torch.full((100_000,), float(epoch))})
        os.write(told, epoch.to_bytes(2, "big"))


@pytest.mark.parametrize("seed", range(10))
def test_a_process_killed_in_the_middle_of_a_checkpoint_write_leaves_every_checkpoint_that_it_had_acknowledged(
    tmp_path: Path, seed: int
) -> None:
    folder = CheckpointFolder(tmp_path / CHECKPOINTS)
    dice = random.Random(seed)
    told, tell = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of a fork beside threads, which this child does not touch
        child = os.fork()
    if child == 0:
        try:
            save_until_killed(folder, tell, {"results": []})
        finally:
            os._exit(1)
    os.close(tell)
    for _ in range(dice.randrange(1, 5)):
        last_told = int.from_bytes(os.read(told, 2), "big")
        assert last_told > 0
    while not list(folder.folder.glob("*.tmp")):  # it is writing
        pass
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    while rest := os.read(told, 2):
        last_told = int.from_bytes(rest, "big")
    os.close(told)
    state, notes = folder.load_newest()
    assert state is not None and notes == [] and state["epoch"] == folder.find_newest()[0]
    assert last_told <= state["epoch"] <= last_told + 1
    assert torch.equal(state["weight"], torch.full((100_000,), float(state["epoch"])))
    folder.save(state | {"epoch": state["epoch"] + 1})
    assert list(folder.folder.glob("*.tmp")) == [] and len(list(folder.folder.iterdir())) == 2
