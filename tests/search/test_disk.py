"""What a search needs is an upper bound of what it writes, and a machine that lacks it is refused in one sentence."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from tests.builders import SHAPES, make_config
from tests.faults.disks import limit_file_size, mount_small_disk
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import ConfigError
from tune_cifar.models.build import MODELS
from tune_cifar.schema import Numerics
from tune_cifar.search.plan import (
    MAX_TEMPORARY_BYTES,
    check_search_fits,
    estimate_disk_needs,
    measure_training,
)
from tune_cifar.train.checkpoint import save_checkpoint, save_weights
from tune_cifar.train.trainer import Trainer


@pytest.fixture(autouse=True)
def default_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's."""
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)


def refuse(storage: Path, num_trials: int = 10) -> str:
    """The sentence against a search of small s7 trainings, two at once."""
    with pytest.raises(ConfigError) as caught:
        check_search_fits(storage, make_config(), 2, num_trials, 2, 3)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        ("s6", "sgd"),
        ("s7", "adam"),
        ("s8", "adamw"),
        pytest.param("s10", "adam", marks=pytest.mark.slow),
    ],
)
def test_measured_bytes_are_a_close_upper_bound_of_the_files(
    tmp_path: Path, fp32: Numerics, model: str, optimizer: str
) -> None:
    size = {"train_size": 10, "val_size": 10, "batch_size": 10, "epochs": 3}
    config = make_config(model=model, optimizer=optimizer, schedule="constant", **size)
    trainer = Trainer(config, load_train_val(SHAPES, 10, 10), fp32)
    assert len(list(trainer)) == 3
    save_weights(tmp_path / "w", trainer.model.state_dict())
    save_checkpoint(tmp_path / "c", trainer.state_dict())
    for name, measured in zip("wc", measure_training(config), strict=True):
        real = (tmp_path / name).stat().st_size
        assert real <= measured <= real + 100_000


def test_an_epoch_adds_at_most_what_is_counted_for_it(tmp_path: Path, fp32: Numerics) -> None:
    trainer = Trainer(make_config(epochs=2), load_train_val(SHAPES, 60, 50), fp32)
    (result, *_) = list(trainer)
    sizes = []
    for num_results in (100, 1000):
        save_checkpoint(
            tmp_path / "c", trainer.state_dict() | {"results": [result.model_dump()] * num_results}
        )
        sizes.append((tmp_path / "c").stat().st_size)
    counted = [measure_training(make_config(epochs=epochs))[1] for epochs in (100, 1000)]
    assert 0 < sizes[1] - sizes[0] <= counted[1] - counted[0]


def test_measuring_draws_no_random_number() -> None:
    before = torch.random.get_rng_state()
    for model in MODELS:
        measure_training(make_config(model=model))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_needs_grow_with_everything_that_is_written() -> None:
    small = estimate_disk_needs(
        make_config(), num_epochs=2, num_trials=10, max_concurrent=1, keep_weights=1
    )
    weights, checkpoint = measure_training(make_config())
    assert (small.checkpoints, small.weights) == (3 * checkpoint, 3 * weights)
    assert small.total == small.checkpoints + small.weights + small.records
    assert estimate_disk_needs(make_config(), 2, 10, 2, 1).checkpoints == 6 * checkpoint
    assert estimate_disk_needs(make_config(), 2, 10, 1, 5).weights == 7 * weights
    assert estimate_disk_needs(make_config(), 2, 1000, 1, 1).records > 10 * small.records
    assert (
        estimate_disk_needs(make_config(), 100, 10, 1, 1).records > small.records
    )  # of all cycles


def test_a_search_that_fits_is_let_through_and_leaves_no_trace(tmp_path: Path) -> None:
    check_search_fits(tmp_path, make_config(), 2, 10, 2, 3)
    check_search_fits(tmp_path / "not" / "yet" / "there", make_config(), 2, 10, 2, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_search_larger_than_the_disk_is_refused_with_both_numbers_and_what_to_do(
    tmp_path: Path,
) -> None:
    sentence = refuse(tmp_path / "runs", num_trials=10**9)
    numbers = r"([\d,]+) MB must be free for the search \(checkpoints \d+ MB, weights \d+ MB, record and MLflow [\d,]+ MB\)"
    found = re.fullmatch(
        rf"{re.escape(str(tmp_path))}/runs: {numbers}, got ([\d,]+) MB\. Make room \(`searches delete`\), "
        r"name another folder with --storage, or ask for fewer trials\.",
        sentence,
    )
    assert found is not None, sentence
    needed, free = (int(text.replace(",", "")) for text in found.groups())
    assert needed > 10**7 and 0 < free < needed


def test_a_search_larger_than_a_small_disk_is_refused(tmp_path: Path) -> None:
    with mount_small_disk(tmp_path / "disk", num_kb=2000) as disk:
        assert "must be free for the search" in refuse(disk)
        assert refuse(disk / "runs").endswith("fewer trials.")
    check_search_fits(tmp_path / "disk", make_config(), 2, 10, 2, 3)


@pytest.mark.parametrize("below", ["", "/runs", "/a/b"])
def test_a_run_store_on_or_below_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    assert refuse(Path(f"{tmp_path}/file{below}")) == (
        f"{tmp_path}/file{below}: the run store must be writable, got 'Not a directory' at {tmp_path}/file. "
        "Name another folder with --storage."
    )


@pytest.mark.parametrize("place", ["/proc/runs", "/proc", "/dev/null/x"])
def test_a_run_store_where_not_even_root_can_write_is_refused(place: str) -> None:
    sentence = refuse(Path(place))
    assert (
        sentence.startswith(f"{place}: the run store must be writable, got ")
        and "--storage" in sentence
    )


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
    ("place", "words"), [("absent", "No such file or directory"), ("file", "Not a directory")]
)
def test_a_temporary_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str, words: str
) -> None:
    monkeypatch.chdir("/")
    folder = {"absent": Path("/no/such"), "file": Path("/dev/null")}[place]
    monkeypatch.setenv(name, str(folder))
    assert refuse(tmp_path) == (
        f"{folder}: the temporary folder must be writable, got '{words}' at {folder}. Set {name} to one that is."
    )


def test_a_temporary_folder_too_deep_for_rays_sockets_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/" + "x" * MAX_TEMPORARY_BYTES)
    assert refuse(tmp_path).startswith(
        f"TMPDIR: a path of at most {MAX_TEMPORARY_BYTES} bytes must be given (Ray's"
    )


@pytest.mark.parametrize("text", ["", "tmp", "."])
def test_a_relative_temporary_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("TMPDIR", text)
    assert refuse(tmp_path).startswith("TMPDIR: an absolute path must be given, got ")
