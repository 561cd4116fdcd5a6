"""Checkpoints damaged, hostile, cut off by a kill or by a full disk.

The newest intact one is used, and the curve is bitwise that of an uninterrupted training.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
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

from tests.builders import (
    ROOT,
    SHAPES,
    curve,
    make_checkpoint,
    make_config,
    make_hostile,
    write_payload,
)
from tests.faults.disks import limit_file_size, mount_small_disk
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import CheckpointError
from tune_cifar.record.files import CHECKPOINTS, WEIGHTS, stop_file
from tune_cifar.schema import Numerics
from tune_cifar.train.checkpoint import CheckpointFolder, load_weights, save_weights
from tune_cifar.train.trainer import Trainer
from tune_cifar.train.trial import train_trial

CONFIG = make_config(train_size=60, val_size=50, batch_size=20, epochs=3)


def train(
    storage: Path, numerics: Numerics, num_epochs: int = CONFIG.epochs
) -> tuple[list[dict[str, Any]], list[int], Path]:
    """Train for `num_epochs`, with a checkpoint after each.

    Returns:
        the curve, the epochs that trainings started from, and the trial's folder.
    """
    folder = storage / "trials" / "0000"
    starts: list[int] = []

    def note_start(trainer: Trainer) -> None:
        starts.append(trainer.epoch)

    data = load_train_val(SHAPES, CONFIG.train_size, CONFIG.val_size)
    results = train_trial(CONFIG, data, numerics, folder, note_start, every_seconds=0.0)
    return curve(list(itertools.islice(results, num_epochs))), starts, folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, fp32: Numerics) -> list[dict[str, Any]]:
    """The uninterrupted training's curve."""
    results, starts, _ = train(tmp_path_factory.mktemp("uninterrupted"), fp32)
    assert starts == [0] and len(results) == 3
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
    rng, content = random.Random(seed), bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def inject_command(path: Path, seed: int) -> None:
    """The checksum fits, the pickle would run a command."""
    write_payload(path, make_hostile(path.parents[1] / "ran"))


@pytest.mark.parametrize(
    "damage",
    [
        empty,
        flip_bit,
        *(pytest.param(harm, marks=pytest.mark.slow) for harm in (truncate, inject_command)),
    ],
)
def test_a_training_whose_newest_checkpoint_is_damaged_resumes_from_the_one_before_it(
    tmp_path: Path,
    fp32: Numerics,
    uninterrupted: list[dict[str, Any]],
    interrupted: Path,
    damage: Callable[[Path, int], None],
) -> None:
    checkpoints = shutil.copytree(interrupted, tmp_path / "s") / "trials" / "0000" / CHECKPOINTS
    damage(checkpoints / "checkpoint-0002.pt", 0)
    state, notes = CheckpointFolder(checkpoints).load_newest()
    assert state is not None and state["epoch"] == 1
    (note,) = notes
    assert note.startswith(f"{checkpoints}/checkpoint-0002.pt: ") and note.endswith(".")
    results, starts, folder = train(tmp_path / "s", fp32)
    assert (starts, results) == ([1], uninterrupted)
    assert CheckpointFolder(checkpoints).find_newest() == (3, []) and not (folder / "ran").exists()


def test_a_training_whose_checkpoints_are_all_damaged_says_so_and_starts_from_scratch(
    tmp_path: Path, fp32: Numerics, uninterrupted: list[dict[str, Any]], interrupted: Path
) -> None:
    checkpoints = shutil.copytree(interrupted, tmp_path / "s") / "trials" / "0000" / CHECKPOINTS
    truncate(checkpoints / "checkpoint-0001.pt", 1)
    empty(checkpoints / "checkpoint-0002.pt", 1)
    epoch, notes = CheckpointFolder(checkpoints).find_newest()
    assert epoch is None
    damaged = [f"{checkpoints}/checkpoint-000{n}.pt" for n in (2, 1)]
    assert [note.split(": ")[0] for note in notes] == damaged
    results, starts, _ = train(tmp_path / "s", fp32, num_epochs=1)
    assert (starts, results) == ([0], uninterrupted[:1])
    results, starts, _ = train(tmp_path / "s", fp32)  # its own first checkpoint was kept
    assert (starts, results) == ([1], uninterrupted)


@settings(max_examples=25)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_after_a_bit_flip_in_the_newest_checkpoint_the_one_before_it_is_used(
    position: float, bit: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = CheckpointFolder(Path(place))
        folder.save(make_checkpoint(1))
        path = folder.save(make_checkpoint(2))
        content = bytearray(path.read_bytes())
        content[int(position * len(content))] ^= 1 << bit
        path.write_bytes(content)
        (state, notes), (epoch, notes_again) = folder.load_newest(), folder.find_newest()
    assert state is not None and state["epoch"] == epoch == 1
    assert notes == notes_again and len(notes) == 1


# A full disk


def test_a_checkpoint_that_does_not_fit_the_disk_is_an_error_and_the_old_ones_stay(
    tmp_path: Path,
) -> None:
    folder = CheckpointFolder(tmp_path, every_seconds=0)
    for epoch in (1, 2):
        newest = folder.save(make_checkpoint(epoch))
    with limit_file_size(newest.stat().st_size - 1), pytest.raises(CheckpointError) as caught:
        folder.save(make_checkpoint(3))
    problem = f"{tmp_path}/checkpoint-0003.pt: cannot write the file: File too large"
    assert str(caught.value) == f"{problem}. Make room."
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-0001.pt", "checkpoint-0002.pt"]
    assert folder.find_newest() == (2, [])
    folder.save(make_checkpoint(3))
    assert folder.find_newest() == (3, [])


def test_after_a_checkpoint_that_did_not_fit_the_next_one_is_due_later(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, every_seconds=0.2)
    time.sleep(0.25)
    assert folder.is_due()
    with limit_file_size(10), pytest.raises(CheckpointError):
        folder.save(make_checkpoint(1))
    assert not folder.is_due()


def test_weights_that_do_not_fit_the_disk_leave_the_old_ones(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", {"weight": torch.zeros(9)})
    problem = r"w\.safetensors: cannot write the file"
    with limit_file_size(100), pytest.raises(CheckpointError, match=problem):
        save_weights(tmp_path / "w.safetensors", {"weight": torch.ones(9)})
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    assert torch.equal(load_weights(tmp_path / "w.safetensors")["weight"], torch.zeros(9))


def test_on_a_small_disk_the_last_checkpoints_that_fitted_stay_intact(tmp_path: Path) -> None:
    with mount_small_disk(tmp_path / "disk", num_kb=500) as disk:
        folder = CheckpointFolder(disk / CHECKPOINTS)
        state = {"model": torch.zeros(15_000), "results": []}  # 60 kB
        for epoch in (1, 2, 3):
            folder.save(state | {"epoch": epoch})
        (disk / "ballast").write_bytes(bytes(340_000))
        with pytest.raises(CheckpointError, match="No space left on device"):
            folder.save(state | {"epoch": 4})
        assert folder.find_newest() == (3, [])
        names = sorted(path.name for path in folder.folder.iterdir())
        assert names == ["checkpoint-0002.pt", "checkpoint-0003.pt"]
        (disk / "ballast").unlink()
        folder.save(state | {"epoch": 4})
        assert folder.find_newest() == (4, [])


@pytest.mark.slow
def test_a_training_has_the_same_curve_when_no_checkpoint_can_be_written(
    tmp_path: Path, fp32: Numerics, uninterrupted: list[dict[str, Any]]
) -> None:
    """The weights (355 kB) still fit and so do the results, a checkpoint (743 kB) does not."""
    with limit_file_size(500_000):
        results, _, folder = train(tmp_path / "s", fp32)
    assert results == uninterrupted
    assert [path.name for path in (folder / CHECKPOINTS).iterdir()] == ["checkpoint-0003.pt"]
    assert load_weights(folder / WEIGHTS)


# A stop


@pytest.mark.parametrize("every_seconds", [0.0, 60.0])
def test_a_stopped_training_ends_after_its_epoch_with_a_checkpoint_even_if_stopped_late(
    tmp_path: Path, fp32: Numerics, uninterrupted: list[dict[str, Any]], every_seconds: float
) -> None:
    """Here the stop comes when the epoch's result has been yielded already."""
    folder = tmp_path / "trials" / "0000"
    data = load_train_val(SHAPES, CONFIG.train_size, CONFIG.val_size)
    results = train_trial(CONFIG, data, fp32, folder, every_seconds=every_seconds)
    first = next(results)
    stop_file(tmp_path).touch()
    assert list(results) == [] and CheckpointFolder(folder / CHECKPOINTS).find_newest() == (1, [])
    again = list(train_trial(CONFIG, data, fp32, folder))  # the stop file stays: one epoch more
    assert curve([first]) == uninterrupted[:1] and curve(again) == uninterrupted[:2]


# kill -9


def train_stages(
    folder: Path, numerics: Numerics, stages: tuple[int, ...] = (1, 3)
) -> list[dict[str, Any]]:
    """Train a trial of two stages as a worker does; returns the curve of both."""
    data = load_train_val(SHAPES, CONFIG.train_size, CONFIG.val_size)
    results = []
    for stage in stages:
        config = CONFIG.model_copy(update={"pct_start": 0.5})  # the short stage has three steps
        short, is_final = config.shorten(stage), stage == stages[-1]
        results += train_trial(short, data, numerics, folder, every_seconds=0.0, is_final=is_final)
    return curve(results)


# Dies as soon as a call has ended whose place and number of epochs are given.
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.faults.test_checkpoint_faults import train_stages
from tune_cifar.train import trial
from tune_cifar.train.checkpoint import CheckpointFolder
from tune_cifar.train.numerics import resolve_numerics

folder, place, epochs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def die_after(owner, name, is_now):
    call = getattr(owner, name)
    def stand_in(*args):
        found = call(*args)
        if is_now(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(owner, name, stand_in)

if place == "weights":
    die_after(trial, "save_weights", lambda *args: True)
elif place == "results":
    is_over = lambda trainer: trainer.epoch == trainer.config.epochs == epochs
    die_after(trial, "_save", lambda checkpoints, trainer: is_over(trainer))
elif place == "deleted":
    die_after(CheckpointFolder, "delete", lambda *args: True)
train_stages(folder, resolve_numerics("cpu", "fp32", 1))
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("place", "epochs", "remaining", "starts"),
    [
        ("results", 1, (1, 3), 0),  # the stage's results were on disk, not in the record
        ("results", 1, (3,), 0),
        ("deleted", 3, (3,), 0),  # the second stage had begun
        ("weights", 3, (3,), 2),
        ("results", 3, (3,), 3),
    ],
)
def test_kill_9_at_the_end_of_a_stage_loses_nothing(
    place: str, epochs: int, remaining: tuple[int, ...], starts: int, tmp_path: Path, fp32: Numerics
) -> None:
    folder, whole = tmp_path / "trials" / "0000", tmp_path / "whole" / "trials" / "0000"
    wanted = train_stages(whole, fp32)
    words = [sys.executable, "-c", KILLED, str(folder), place, str(epochs)]
    killed = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    trained: list[int] = []
    run_epoch = Trainer._run_epoch

    def count(trainer: Trainer) -> Any:
        trained.append(trainer.config.epochs)
        return run_epoch(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_run_epoch", count)
        results = train_stages(folder, fp32, remaining)
    assert results == wanted[-len(results) :] and len(results) == sum(remaining)
    assert trained == [3] * (3 - starts)
    weights, others = load_weights(folder / WEIGHTS), load_weights(whole / WEIGHTS)
    assert all(torch.equal(weights[name], others[name]) for name in others)


def save_until_killed(folder: CheckpointFolder, pipe: int, state: dict[str, Any]) -> None:
    """Save checkpoint after checkpoint; write each epoch to the pipe once `save` has returned."""
    for epoch in range(1, 10_000):
        folder.save(state | {"epoch": epoch, "weight": torch.full((100_000,), float(epoch))})
        os.write(pipe, epoch.to_bytes(2, "big"))


@pytest.mark.parametrize("seed", range(10))
def test_a_process_killed_while_it_writes_a_checkpoint_leaves_every_acknowledged_one(
    tmp_path: Path, seed: int
) -> None:
    folder = CheckpointFolder(tmp_path / CHECKPOINTS)
    rng = random.Random(seed)
    acknowledged, child_end = os.pipe()
    with warnings.catch_warnings():
        # A fork beside threads is deprecated; this child does not use them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            save_until_killed(folder, child_end, {"results": []})
        finally:
            os._exit(1)
    os.close(child_end)
    for _ in range(rng.randrange(1, 5)):
        last_epoch = int.from_bytes(os.read(acknowledged, 2), "big")
        assert last_epoch > 0
    while not list(folder.folder.glob("*.tmp")):  # it is writing
        pass
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    while rest := os.read(acknowledged, 2):
        last_epoch = int.from_bytes(rest, "big")
    os.close(acknowledged)
    state, notes = folder.load_newest()
    assert state is not None and notes == [] and state["epoch"] == folder.find_newest()[0]
    assert last_epoch <= state["epoch"] <= last_epoch + 1
    assert torch.equal(state["weight"], torch.full((100_000,), float(state["epoch"])))
    folder.save(state | {"epoch": state["epoch"] + 1})
    assert list(folder.folder.glob("*.tmp")) == [] and len(list(folder.folder.iterdir())) == 2
