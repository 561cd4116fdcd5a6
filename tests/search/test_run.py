"""Searches on real Ray and real MLflow: what they record, stop, keep, refuse; the driver alone."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from tests.builders import (
    SEARCH_WORDS,
    SHAPES,
    SHAPES_INFO,
    SMALL_SEARCH,
    SMALL_SETTINGS,
    curve,
    ignore_event,
    invoke,
    make_result,
    make_resume,
    make_space,
    make_stages_driver,
    make_tiny_driver,
    run_in_a_process,
    run_trials,
)
from tests.faults.disks import limit_file_size
from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record.events import EpochReported, Stage
from tune_cifar.record.files import CHECKPOINTS, stop_file
from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.state import INTERRUPTED, SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import REPRODUCIBLE_FIELDS, Numerics, TrainConfig
from tune_cifar.search.adapters import TuneScheduler, TuneSearcher, guard
from tune_cifar.search.disk import estimate_disk_needs
from tune_cifar.search.driver import SearchDriver
from tune_cifar.search.plan import SearchRequest, check_request, resolve_resources
from tune_cifar.search.resume import restore_space
from tune_cifar.search.worker import TrialWorker, pack_epochs, unpack_epochs
from tune_cifar.train.recorded import make_header
from tune_cifar.train.trial import train_trial

TRAIN_TRIAL = "tune_cifar.search.worker.train_trial"


@pytest.fixture
def driver(tmp_path: Path, fp32: Numerics) -> Any:
    space = make_space()
    header = make_header("search", "x", space, 0, SHAPES_INFO, fp32, "test")
    driver = SearchDriver(Record.create(search_folder(tmp_path, "x"), header), space, ignore_event)
    yield driver
    driver.record.close()


def test_driver_asks_for_the_baseline_first_and_then_the_points(driver: SearchDriver) -> None:
    first, second = driver.ask(), driver.ask()
    assert first is not None and second is not None
    assert (first.origin, second.origin) == ("baseline", "point")
    assert first.config == make_space().baseline


def test_driver_stops_the_worse_at_a_rung_and_never_the_baseline(driver: SearchDriver) -> None:
    for _ in range(4):
        driver.ask()
    assert driver.report(1, Stage(3), make_result(1, 0.5))  # the first at the rung is promoted
    assert driver.report(0, Stage(3), make_result(1, 0.2))  # the baseline never stops
    assert not driver.report(2, Stage(3), make_result(1, 0.3))
    assert driver.report(3, Stage(3), make_result(1, 0.6))
    trials = driver.record.state.trials
    assert [trials[n].status for n in range(4)] == ["running", "running", "stopped", "running"]
    assert trials[2].reason == "rung 1: 1 of 3 scores were better"


@pytest.mark.parametrize(("window", "status"), [(None, "running"), (3, "stopped")])
def test_driver_compares_a_trial_with_the_last_arrivals_of_its_window(
    tmp_path: Path, fp32: Numerics, window: int | None, status: str
) -> None:
    """Of six scores 0.45 is among the best two, of the last three it is the worst."""
    space = make_space(window=window)
    header = make_header("search", "x", space, 0, SHAPES_INFO, fp32, "test")
    with Record.create(search_folder(tmp_path, "x"), header) as record:
        driver = SearchDriver(record, space, ignore_event)
        for score in (0.1, 0.2, 0.3, 0.4, 0.5, 0.45):
            trial = driver.ask()
            assert trial is not None
            driver.report(trial.number, Stage(3), make_result(1, score))
        assert trial.status == status


def test_driver_completes_a_trial_at_its_last_epoch_only(driver: SearchDriver) -> None:
    driver.ask()
    assert driver.report(0, Stage(3), make_result(1, 0.9))
    assert driver.report(0, Stage(3), make_result(2, 0.8))
    assert not driver.report(0, Stage(3), make_result(3, 0.7))
    trial = driver.record.state.trials[0]
    assert (trial.status, trial.score) == ("complete", 0.7)


def test_driver_ignores_epochs_that_a_resumed_trial_repeats(driver: SearchDriver) -> None:
    driver.ask()
    driver.report(0, Stage(3), make_result(1, 0.4))
    assert driver.report(0, Stage(3), make_result(1, 0.4))
    assert driver.record.state.trials[0].epochs_done == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_driver_keeps_only_the_best_trials_weights(
    driver: SearchDriver, order: tuple[int, int]
) -> None:
    for number in (0, 1):
        driver.ask()
        weights = driver.record.state.trial_folder(number) / "weights.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(b"weights")
    for number in order:
        for epoch in (1, 2, 3):
            driver.report(number, Stage(3), make_result(epoch, (0.5, 0.7)[number] + epoch / 100))
    folders = [driver.record.state.trial_folder(number) for number in (0, 1)]
    assert [(folder / "weights.safetensors").exists() for folder in folders] == [False, True]


def restart(driver: SearchDriver, trials: int = 9) -> SearchDriver:
    """Return a new driver on this one's record, which is read again from disk."""
    folder = driver.record.state.folder
    driver.record.close()
    driver.record = Record.open(folder)
    space = restore_space(driver.record.state.header).limit(trials)
    return SearchDriver(driver.record, space, ignore_event)


def test_driver_leaves_running_trials_unfinished_when_it_is_interrupted(
    driver: SearchDriver,
) -> None:
    driver.ask(), driver.ask()
    driver.report(0, Stage(3), make_result(1, 0.4))
    driver.interrupt()
    assert stop_file(driver.record.state.folder).exists()
    assert driver.ask() is None and not driver.is_exhausted and not driver.is_cut
    assert driver.report(0, Stage(3), make_result(2, 0.5)) and driver.report(
        1, Stage(3), make_result(1, 0.6)
    )
    assert not driver.is_exhausted and not driver.is_cut
    driver.pause(0), driver.pause(1)  # the workers have saved them
    assert driver.is_exhausted and driver.is_cut
    driver.finish()
    state = read_state(driver.record.state.folder)
    assert state.finished is not None and state.finished.reason == "interrupted"
    assert not state.is_finished
    assert [trial.status for trial in state.trials.values()] == ["running", "running"]
    assert not stop_file(state.folder).exists()


def test_driver_cuts_running_trials_when_the_time_is_over(driver: SearchDriver) -> None:
    driver.ask()
    driver.report(0, Stage(3), make_result(1, 0.4))
    driver._deadline = time.monotonic()
    assert driver.is_cut and driver.ask() is None
    driver.finish()
    state = read_state(driver.record.state.folder)
    assert state.is_finished
    assert state.finished is not None and state.finished.reason == "time limit"
    trial = state.trials[0]
    assert (trial.status, trial.reason) == ("stopped", "cut after epoch 1: time limit")


def test_a_new_driver_runs_the_unfinished_first_and_then_what_the_old_one_would_have_run(
    tmp_path: Path, fp32: Numerics
) -> None:
    def play(name: str, breaks: bool) -> SearchState:
        header = make_header("search", name, make_space(), 0, SHAPES_INFO, fp32, "test")
        record = Record.create(search_folder(tmp_path, name), header)
        driver = SearchDriver(record, make_space(), ignore_event)
        numbers = [driver.ask().number for _ in range(3)]  # type: ignore[union-attr]
        driver.report(1, Stage(3), make_result(1, 0.5))
        driver.report(1, Stage(3), make_result(2, 0.6))
        if breaks:
            driver = restart(driver)
            numbers = [driver.ask().number for _ in range(3)]  # type: ignore[union-attr]
        assert numbers == [0, 1, 2]
        driver.report(2, Stage(3), make_result(1, 0.4))
        while (trial := driver.ask()) is not None:
            driver.report(trial.number, Stage(3), make_result(1, 0.3 + trial.number / 100))
        driver.record.close()
        return driver.record.state

    expected, found = play("uninterrupted", False), play("interrupted", True)
    assert len(expected.trials) == 9
    for trial, other in zip(expected.trials.values(), found.trials.values(), strict=True):
        for name in ("params", "status", "epochs", "reason"):
            assert getattr(trial, name) == getattr(other, name), name


def test_a_trial_is_compared_at_the_end_of_each_stage_and_complete_after_the_last(
    tmp_path: Path, fp32: Numerics
) -> None:
    driver = make_stages_driver(tmp_path, fp32)
    for _ in range(3):
        driver.ask()
    trials = driver.record.state.trials
    assert driver.list_remaining_stages(trials[1]) == ((1, 0), (2, 0), (3, 0))
    assert driver.report(1, Stage(1), make_result(1, 0.5))
    assert driver.list_remaining_stages(trials[1]) == ((2, 0), (3, 0))
    assert not driver.report(2, Stage(1), make_result(1, 0.4))
    assert driver.report(1, Stage(2), make_result(1, 0.1))  # within a stage nothing is compared
    assert driver.list_remaining_stages(trials[1]) == ((2, 0), (3, 0))
    assert driver.report(1, Stage(2), make_result(2, 0.6))
    assert driver.report(1, Stage(3), make_result(1, 0.2)) and driver.report(
        1, Stage(3), make_result(2, 0.3)
    )
    assert not driver.report(1, Stage(3), make_result(3, 0.7))
    driver.record.close()
    for state in (driver.record.state, read_state(driver.record.state.folder)):
        best, stopped = state.trials[1], state.trials[2]
        assert (best.status, best.score, best.scores) == ("complete", 0.7, {1: 0.5, 2: 0.6, 3: 0.7})
        assert (best.epochs_done, [epoch.epoch for epoch in best.epochs]) == (6, [1, 2, 3])
        trained = [(stage, epoch.epoch) for stage, epoch in best.trained_epochs]
        assert trained == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
        assert best.config == best.full_config and best.fingerprint == best.full_config.fingerprint
        assert stopped.status == "stopped"
        assert (stopped.config.epochs, stopped.full_config.epochs) == (1, 3)
        assert stopped.fingerprint == stopped.full_config.shorten(1).fingerprint != best.fingerprint
        assert state.arrivals == {1: {1: 0.5, 2: 0.4}, 2: {1: 0.6}, 3: {1: 0.7}}


def test_a_trial_at_the_last_rung_is_trained_under_several_seeds_and_resumed_in_each(
    tmp_path: Path, fp32: Numerics
) -> None:
    driver = make_stages_driver(tmp_path, fp32, replicates=2)
    driver.ask()
    trials = driver.record.state.trials
    assert driver.list_remaining_stages(trials[0]) == ((1, 0), (2, 0), (3, 0), (3, 1))
    for stage in ((1, 0), (2, 0), (3, 0)):
        for epoch in range(1, stage[0] + 1):
            assert driver.report(0, Stage(*stage), make_result(epoch, 0.6))
    assert driver.list_remaining_stages(trials[0]) == ((3, 1),)
    again = restart(driver)
    trial = again.ask()
    assert trial is not None
    assert again.list_remaining_stages(trial) == ((3, 1),)
    assert again.report(0, Stage(3), make_result(3, 0.6))  # repeated by a checkpoint
    assert again.report(0, Stage(3, 1), make_result(1, 0.1))
    assert again.list_remaining_stages(trial) == ((3, 1),)
    assert again.report(0, Stage(3, 1), make_result(2, 0.1))
    assert not again.report(0, Stage(3, 1), make_result(3, 0.7))
    assert (trial.status, trial.score) == ("complete", pytest.approx(0.65))
    again.record.close()


def test_driver_ignores_epochs_of_stages_that_a_checkpoint_repeats(
    tmp_path: Path, fp32: Numerics
) -> None:
    driver = make_stages_driver(tmp_path, fp32)
    driver.ask()
    reported = [(1, 1), (1, 1), (2, 1), (2, 1), (1, 1), (2, 2), (2, 1), (3, 1), (2, 2), (3, 1)]
    assert all(driver.report(0, Stage(stage), make_result(epoch, 0.5)) for stage, epoch in reported)
    trained = driver.record.state.trials[0].trained_epochs
    expected = [(1, 1), (2, 1), (2, 2), (3, 1)]
    assert [(stage, epoch.epoch) for stage, epoch in trained] == expected
    driver.record.close()


@pytest.mark.parametrize(
    ("epochs", "left"), [([], (1, 2, 3)), ([1], (2, 3)), ([1, 1], (2, 3)), ([1, 1, 2], (3,))]
)
def test_a_new_driver_resumes_a_trial_in_the_stage_that_the_old_one_died_in(
    epochs: list[int], left: tuple[int, ...], tmp_path: Path, fp32: Numerics
) -> None:
    driver = make_stages_driver(tmp_path, fp32)
    driver.ask()
    for stage, epoch in zip((1, 2, 2), epochs, strict=False):
        driver.report(0, Stage(stage), make_result(epoch, 0.5))
    again = restart(driver)
    trial = again.ask()
    again.record.close()
    assert trial is not None
    assert tuple(stage.length for stage in again.list_remaining_stages(trial)) == left


@pytest.mark.parametrize(("num_epochs", "stage"), [(0, 1), (1, 2), (2, 2), (3, 3)])
def test_a_trial_that_diverges_does_so_in_the_stage_it_is_in(
    num_epochs: int, stage: int, tmp_path: Path, fp32: Numerics
) -> None:
    driver = make_stages_driver(tmp_path, fp32)
    driver.ask()
    for length, epoch in [(1, 1), (2, 1), (2, 2)][:num_epochs]:
        driver.report(0, Stage(length), make_result(epoch, 0.5))
    driver.end(0, "diverged", "epoch 1, step 3: the loss must be finite")
    trial = driver.record.state.trials[0]
    assert (trial.config.epochs, trial.epochs_done, trial.score) == (stage, num_epochs, 0.1)
    assert len(trial.epochs) == (1 if num_epochs == 2 else 0)
    driver.record.close()
    assert read_state(driver.record.state.folder).trials[0] == trial


@pytest.fixture
def epoch_by_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers report every epoch in a message of its own, as they do with long ones."""
    monkeypatch.setattr("tune_cifar.search.worker.REPORT_SECONDS", 0.0)


@pytest.mark.usefixtures("epoch_by_epoch")
def test_a_worker_trains_every_stage_from_scratch_and_a_long_one_as_if_it_were_alone(
    tmp_path: Path, fp32: Numerics
) -> None:
    space = make_space()
    tiny = {"train_size": 10, "val_size": 10, "batch_size": 5, "pct_start": 0.9}
    config = space.baseline.model_copy(update=tiny)

    def train_stages(name: str, *stages: tuple[int, int]) -> list[tuple[Stage, list[Any]]]:
        """The stage and the reproducible fields of each epoch."""
        worker = object.__new__(TrialWorker)
        folder = tmp_path / "search" / "trials" / name
        folder.mkdir(parents=True)
        worker.setup(make_task(config, fp32, folder, stages, rungs=(1, 3)))
        epochs = []
        while (message := worker.step())["outcome"] == "epochs":
            ((stage, result),) = unpack_epochs(message["text"])
            epochs.append((stage, [getattr(result, name) for name in REPRODUCIBLE_FIELDS]))
        assert message["outcome"] == "paused", message["text"]
        return epochs

    epochs = train_stages("0000", (1, 0), (3, 0), (3, 1))
    alone = [train_stages(f"000{n}", stage) for n, stage in enumerate([(1, 0), (3, 0), (3, 1)], 1)]
    assert epochs == [*alone[0], *alone[1], *alone[2]]
    assert alone[1][0][1] != alone[2][0][1]  # another seed
    lengths = [(stage.length, fields[0]) for stage, fields in epochs]
    assert lengths == [(1, 1), *[(3, 1), (3, 2), (3, 3)] * 2]


def make_task(
    config: TrainConfig,
    numerics: Numerics,
    folder: Path,
    stages: tuple[tuple[int, int], ...],
    rungs: tuple[int, ...],
) -> dict[str, Any]:
    """What Tune hands to the worker of trial 0."""
    dumps = {"config": config.model_dump(mode="json"), "numerics": numerics.model_dump(mode="json")}
    task = {"trial": 0, "stages": stages, "rungs": rungs, "source": ("shapes", None)}
    return task | dumps | {"folder": str(folder), "gpus": 0.0}


def test_packed_epochs_come_back_as_they_were() -> None:
    odd = make_result(2, None, lr=1e-300, train_loss=1 / 3)
    epochs = [(Stage(1), make_result(1, 0.5)), (Stage(3), make_result(1, 0.1)), (Stage(3, 1), odd)]
    assert unpack_epochs(pack_epochs(epochs)) == epochs
    assert unpack_epochs(pack_epochs([])) == []


def test_a_worker_reports_short_epochs_together_up_to_a_rung_and_then_the_end(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_tiny_driver(tmp_path, fp32, (2, 5), fidelity="epochs")
    messages = run_and_collect(driver, monkeypatch, fp32, seconds=1000.0)
    assert [message["outcome"] for message in messages] == ["epochs", "epochs"]
    assert [len(unpack_epochs(message["text"])) for message in messages] == [2, 3]
    together = read_trained(driver)
    alone = make_tiny_driver(tmp_path / "alone", fp32, (2, 5), fidelity="epochs")
    assert len(run_and_collect(alone, monkeypatch, fp32, seconds=0.0)) == 5
    assert read_trained(alone) == together

    broken = make_tiny_driver(tmp_path / "broken", fp32, (5,))
    first, second = run_and_collect(broken, monkeypatch, fp32, seconds=1000.0, breaks_after=3)
    assert (first["outcome"], second["outcome"]) == ("epochs", "failed")
    assert len(unpack_epochs(first["text"])) == 3
    (trial,) = broken.record.state.trials.values()
    assert (trial.status, trial.epochs_done) == ("failed", 3)


def run_and_collect(
    driver: SearchDriver,
    monkeypatch: pytest.MonkeyPatch,
    numerics: Numerics,
    seconds: float,
    breaks_after: int = 99,
) -> list[dict[str, Any]]:
    """Run trial 0 and return its worker's messages.

    Args:
        seconds: the worker's REPORT_SECONDS.
        breaks_after: epoch after which the training raises an exception.
    """
    messages, on_result = [], TuneScheduler._on_result

    def collect(self: TuneScheduler, message: dict[str, Any]) -> bool:
        messages.append(message)
        return on_result(self, message)

    def train_some(*args: Any, **options: Any) -> Any:
        for result in train_trial(*args, **options):
            yield result
            if result.epoch == breaks_after:
                raise ValueError("no more")

    with monkeypatch.context() as patch:
        patch.setattr("tune_cifar.search.worker.REPORT_SECONDS", seconds)
        patch.setattr(TRAIN_TRIAL, train_some)
        patch.setattr(TuneScheduler, "_on_result", collect)
        run_trials(driver, numerics)
    driver.record.close()
    return messages


def read_trained(driver: SearchDriver) -> tuple[list[int], list[dict[str, Any]]]:
    """Return the stage of every epoch of trial 0 and the curve, from the record on disk."""
    trial = read_state(driver.record.state.folder).trials[0]
    assert trial.status == "complete", trial.reason
    stages, results = zip(*trial.trained_epochs, strict=True)
    return list(stages), curve(list(results))


@pytest.mark.usefixtures("epoch_by_epoch")
@pytest.mark.parametrize(
    "every_seconds",
    [
        pytest.param(60.0, id="checkpoints of ends", marks=pytest.mark.slow),
        pytest.param(0.0, id="of epochs"),
    ],
)
@pytest.mark.parametrize("death", ["driver", "driver before the record", "worker"])
def test_a_trial_with_stages_resumes_to_the_same_curves_wherever_it_was_left(
    death: str,
    every_seconds: float,
    tmp_path: Path,
    fp32: Numerics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of a stage, at its end, and with a result that the driver did not record."""
    monkeypatch.setattr(TRAIN_TRIAL, functools.partial(train_trial, every_seconds=every_seconds))
    expected = make_tiny_driver(tmp_path / "expected", fp32, (1, 2))
    run_trials(expected, fp32)
    expected.record.close()
    assert read_trained(expected)[0] == [1, 2, 2]
    for num_steps in (1, 2, 3):
        driver = make_tiny_driver(tmp_path / str(num_steps), fp32, (1, 2))
        run_trials(driver, fp32, num_steps, is_last_recorded=death == "driver")
        if death == "worker":
            driver.retry(0, "worker died", "killed")
        else:
            driver = restart(driver, trials=1)
        run_trials(driver, fp32)
        driver.record.close()
        assert read_trained(driver) == read_trained(expected), num_steps


@pytest.mark.slow
def test_a_stage_whose_last_checkpoint_was_lost_is_followed_by_the_next(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint before it, from the middle of that stage, does not start the longer one."""
    monkeypatch.setattr(TRAIN_TRIAL, functools.partial(train_trial, every_seconds=0.0))
    expected = make_tiny_driver(tmp_path / "expected", fp32, (2, 3))
    run_trials(expected, fp32)
    expected.record.close()
    driver = make_tiny_driver(tmp_path, fp32, (2, 3))
    run_trials(driver, fp32, num_steps=2)
    checkpoints = driver.record.state.trial_folder(0) / CHECKPOINTS
    assert [path.name for path in sorted(checkpoints.iterdir())] == [
        "checkpoint-0001.pt",
        "checkpoint-0002.pt",
    ]
    (checkpoints / "checkpoint-0002.pt").write_bytes(b"torn")
    driver = restart(driver, trials=1)
    run_trials(driver, fp32)
    driver.record.close()
    assert read_trained(driver) == read_trained(expected)


@pytest.mark.slow
def test_a_trial_with_warm_restarts_resumes_across_one(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one training: the epochs before the warm restart are not trained again."""
    monkeypatch.setattr(TRAIN_TRIAL, functools.partial(train_trial, every_seconds=0.0))

    def make(name: str) -> SearchDriver:
        fidelity = "cycles/continue"
        return make_tiny_driver(tmp_path / name, fp32, (1, 3), fidelity, warm_restarts=[1])

    expected = make("expected")
    run_trials(expected, fp32)
    expected.record.close()
    assert read_trained(expected)[0] == [3, 3, 3]
    for num_steps in (1, 2):
        driver = make(str(num_steps))
        run_trials(driver, fp32, num_steps)
        driver = restart(driver, trials=1)
        run_trials(driver, fp32, num_steps=3 + num_steps)  # as many are repeated
        driver.record.close()
        assert read_trained(driver) == read_trained(expected)


@pytest.mark.parametrize(
    ("reported", "stage", "reason"),
    [
        ([], None, "cut after epoch 0: time limit"),
        (
            [(1, 1), (2, 1), (2, 2), (3, 1)],
            3,
            "cut after epoch 1 of the stage of 3 epochs: time limit",
        ),
    ],
)
def test_the_reason_of_a_trial_cut_at_the_time_limit_names_its_stage(
    reported: list[tuple[int, int]], stage: int | None, reason: str, tmp_path: Path, fp32: Numerics
) -> None:
    driver = make_stages_driver(tmp_path, fp32)
    driver.ask()
    for length, epoch in reported:
        driver.report(0, Stage(length), make_result(epoch, 0.5))
    driver._deadline = time.monotonic()
    driver.finish()
    trial = driver.record.state.trials[0]
    assert (trial.status, trial.stage, trial.reason) == ("stopped", stage, reason)
    driver.record.close()


def test_a_trial_whose_worker_died_too_often_between_two_stages_failed_in_the_second(
    tmp_path: Path, fp32: Numerics
) -> None:
    driver = make_stages_driver(tmp_path, fp32)
    driver.ask()
    driver.report(0, Stage(1), make_result(1, 0.5))
    for _ in range(3):
        driver.retry(0, "worker died", "killed")
    trial = driver.record.state.trials[0]
    assert (trial.status, trial.reason) == ("failed", "worker died, 3 times")
    assert (trial.config.epochs, trial.epochs) == (2, [])
    driver.record.close()
    assert read_state(driver.record.state.folder).trials[0] == trial


def test_weights_that_cannot_be_deleted_do_not_end_the_search(driver: SearchDriver) -> None:
    """A folder lies where the weights would; it made the trial fail, too."""
    driver.ask()
    (driver.record.state.trial_folder(0) / "weights.safetensors" / "x").mkdir(parents=True)
    guard(driver, lambda: driver.fail(0, "CheckpointError: cannot write the file"), None)
    assert driver.fault is None and driver.record.state.trials[0].status == "failed"


@pytest.mark.parametrize("val_acc", [0.1, 0.9])
def test_a_new_driver_takes_the_decision_that_the_old_one_died_before(
    driver: SearchDriver, val_acc: float
) -> None:
    """The old one recorded trial 1's score at rung 1 and died; trial 2's later one is ignored."""
    for _ in range(3):
        driver.ask()
    driver.report(0, Stage(3), make_result(1, 0.5))
    for number, acc in ((1, val_acc), (2, 0.99)):
        driver.record.append(EpochReported(trial=number, result=make_result(1, acc)))
    state = restart(driver).record.state
    assert state.trials[1].status == ("stopped" if val_acc < 0.5 else "running")
    assert state.trials[2].status == "running"
    if val_acc < 0.5:
        assert state.trials[1].reason == "rung 1: 1 of 2 scores were better"


def test_a_new_driver_ends_a_trial_whose_last_epoch_was_recorded(driver: SearchDriver) -> None:
    driver.ask()
    for epoch in (1, 2, 3):
        driver.record.append(EpochReported(trial=0, result=make_result(epoch, 0.5)))
    assert restart(driver).record.state.trials[0].status == "complete"


def test_a_resumed_search_may_have_more_trials(driver: SearchDriver) -> None:
    numbers = []
    while (trial := driver.ask()) is not None:
        numbers.append(trial.number)
    for number in numbers:
        driver.fail(number, "ValueError: no")
    assert driver.is_exhausted
    driver.finish()
    driver.record.append(make_resume(trials=11))
    again = restart(driver, trials=11)
    assert [trial.number for trial in iter(again.ask, None)] == [9, 10]


def test_a_trial_whose_worker_died_is_retried_twice_and_then_fails(driver: SearchDriver) -> None:
    driver.ask(), driver.ask()
    for _ in range(2):
        driver.retry(0, "worker died", "the worker process of the trial died\nkilled by signal 9")
        assert driver.record.state.trials[0].status == "running"
        again = driver.ask()
        assert again is not None and again.number == 0
    driver.retry(0, "worker died", "the worker process of the trial died\nkilled by signal 9")
    trial = driver.record.state.trials[0]
    assert trial.status == "failed" and trial.reason == "worker died, 3 times"
    assert trial.error_file is not None
    assert "signal 9" in (driver.record.state.folder / trial.error_file).read_text()
    assert driver.ask().number == 2  # type: ignore[union-attr]


def test_a_trial_that_ran_out_of_memory_is_retried_once_and_alone(driver: SearchDriver) -> None:
    for _ in range(3):
        driver.ask()
    checkpoints = driver.record.state.trial_folder(1) / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "checkpoint-0001.pt").touch()
    driver.retry(1, "out of memory", "CUDA out of memory")
    first_line, damage = driver.record.state.trials[1].retries[0].text.splitlines()
    assert first_line == "CUDA out of memory"
    assert damage.startswith(f"{checkpoints}/checkpoint-0001.pt: ")
    assert driver.ask() is None and not driver.is_exhausted  # trials 0 and 2 still run
    driver.fail(0, "ValueError: no")
    assert driver.ask() is None
    driver.retry(2, "worker died", "killed")
    first = driver.ask()
    assert first is not None and first.number == 2  # trials that need not run alone come first
    driver.fail(2, "ValueError: no")
    alone = TuneSearcher(driver, {"gpus": 0.33}).suggest("t")
    assert isinstance(alone, dict) and alone["trial"] == 1
    assert alone["gpus"] == 1.0  # all the memory of its GPU
    assert driver.ask() is None and not driver.is_exhausted  # nothing beside it
    driver.retry(1, "out of memory", "CUDA out of memory")
    assert driver.record.state.trials[1].reason == "out of memory, 2 times"
    after = TuneSearcher(driver, {"gpus": 0.33}).suggest("t")
    assert isinstance(after, dict) and (after["trial"], after["gpus"]) == (3, 0.33)


def test_weights_on_a_full_disk_end_the_search_and_leave_their_trial_unfinished(
    driver: SearchDriver, tmp_path: Path
) -> None:
    """The worker itself, in this process: the weights of s7 take 355 kB."""
    trial = driver.ask()
    assert trial is not None
    worker = object.__new__(TrialWorker)
    numerics = driver.record.state.header.numerics
    small = {"train_size": 40, "val_size": 20, "epochs": 1, "batch_size": 8}
    config = trial.config.model_copy(update=small)
    worker.setup(make_task(config, numerics, tmp_path / "0000", stages=((1, 0),), rungs=(1,)))
    with limit_file_size(100_000):
        answer = worker.step()
    assert answer["outcome"] == "disk full"
    assert TuneScheduler(driver).on_trial_result(None, None, answer) == TrialScheduler.STOP
    path = tmp_path / "0000" / "weights.safetensors"
    cause = f"{path}: cannot write the file: File too large"
    assert driver.is_cut and str(driver.fault) == f"{cause}. Make room. Then give `resume=True`."
    assert driver.record.state.trials[0].status == "running"


def test_a_run_store_that_cannot_be_written_ends_the_search_in_a_sentence(
    driver: SearchDriver,
) -> None:
    def write() -> None:
        raise OSError(28, "No space left on device", "runs/x/error.txt")

    assert guard(driver, write, "otherwise") == "otherwise"
    assert isinstance(driver.fault, RecordError)
    assert str(driver.fault) == (
        "runs/x/error.txt: cannot write to the run store: No space left on device. "
        "Make room, then give `resume=True`."
    )


def test_a_record_that_cannot_be_written_ends_the_driver_without_a_second_fault(
    driver: SearchDriver,
) -> None:
    driver.ask()
    driver.record.close()
    driver.finish()
    assert read_state(driver.record.state.folder).finished is None


CPUS_RULE = r"`cpus_per_trial` must be 1 to \d+ \(the cores here\)"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cpus_per_trial": 0}, rf"{CPUS_RULE}, got 0"),
        ({"cpus_per_trial": 9999}, rf"{CPUS_RULE}, got 9999"),
    ],
)
def test_cores_that_are_not_there_are_refused(
    tmp_path: Path, fp32: Numerics, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve_resources(SearchRequest(SHAPES, tmp_path, "test", **changes), fp32, 0)


@pytest.mark.parametrize(
    ("gpus", "num_gpus", "fits"), [(0.25, 1, 4), (0.5, 2, 4), (1.0, 2, 2), (0.3, 1, 3)]
)
def test_trials_are_packed_on_gpus_by_their_fractions(
    tmp_path: Path,
    fp32: Numerics,
    monkeypatch: pytest.MonkeyPatch,
    gpus: float,
    num_gpus: int,
    fits: int,
) -> None:
    monkeypatch.setattr("psutil.Process.cpu_affinity", lambda self: list(range(64)))
    on_gpu = fp32.model_copy(update={"device": "cuda"})
    request = SearchRequest(SHAPES, tmp_path, "test", gpus_per_trial=gpus)
    assert resolve_resources(request, on_gpu, num_gpus).max_concurrent == fits


@pytest.mark.parametrize(
    "gpus", [1.5, 2.0, 1e300, -1.0, -0.1, math.nan, math.inf, -math.inf, 1e-5, 5e-324]
)
def test_more_or_less_than_a_fraction_of_one_gpu_is_refused(tmp_path: Path, gpus: float) -> None:
    """A trial trains on one GPU: another that Ray kept for it would stand idle."""
    request = SearchRequest(SHAPES, tmp_path, "test", gpus_per_trial=gpus)
    rule = "`gpus_per_trial` must be 0 or 0.0001 to 1, since a trial uses one GPU"
    with pytest.raises(ConfigError, match=f"^{re.escape(rule)}, got {re.escape(f'{gpus:g}')}"):
        check_request(request)


def test_a_search_of_a_gpu_that_may_not_be_used_is_refused(tmp_path: Path, fp32: Numerics) -> None:
    """It would wait for ever: no trial fits. As a resumed one whose request says cpu."""
    on_gpu = fp32.model_copy(update={"device": "cuda"})
    request = SearchRequest(SHAPES, tmp_path, "test", device="cpu")
    with pytest.raises(ConfigError, match="`device` must be cuda, as the search's, got cpu"):
        resolve_resources(request, on_gpu, 0)


# From here on: searches on Ray.


# The search below is made once for all that look at it, not once in each process of pytest-xdist.
ONE_PROCESS = pytest.mark.xdist_group("searched")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchState, str]:
    """One finished search of 6 trials on synthetic data: folder, record and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    # One at a time: scores always reach a rung in the same order, and the same trials stop.
    words = ("--set=epochs=3", "--trials=6", "--name=demo", "--seed=3", "--max-concurrent=1")
    answer = run_in_a_process(*SEARCH_WORDS, *SMALL_SETTINGS, *words, folder=folder)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return folder, read_state(search_folder(folder / "runs", "demo")), answer.stdout + answer.stderr


@pytest.mark.slow
@ONE_PROCESS
def test_a_search_records_every_trial_to_its_end(searched: tuple[Path, SearchState, str]) -> None:
    _, state, _ = searched
    assert state.finished is not None and state.finished.reason == "all trials"
    assert len(state.trials) == 6 and state.counts["running"] == 0 and state.counts["failed"] == 0
    assert state.trials[0].origin == "baseline" and state.trials[0].status == "complete"
    assert state.counts["complete"] + state.counts["stopped"] == 6
    assert len({trial.fingerprint for trial in state.trials.values()}) == 6
    assert {trial.config.seed for trial in state.trials.values()} == {0}


POISONED = """
import os
from pathlib import Path
import torch
from torch import nn

class Poisoned(nn.Module):
    "Breaks CUDA in the second process that trains it there: the first measures."
    def __init__(self, num_classes):
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, images):
        mark = Path(os.environ["MARK"])
        if images.is_cuda and self.training:
            found = mark.read_text().split() if mark.exists() else []
            if str(os.getpid()) not in found:
                mark.write_text(" ".join([*found, str(os.getpid())]))
                if len(found) == 1:
                    torch._assert_async(torch.zeros((), device=images.device))
        return self.linear(images.flatten(1))
"""


@pytest.mark.gpu
def test_a_poisoned_worker_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trial goes on in another one; no trial fails."""
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    (tmp_path / "poisoned.py").write_text(POISONED)
    new = ("spaces", "new", str(tmp_path / "poisoned.py:Poisoned"), "--data", "shapes")
    made = run_in_a_process(*new, folder=tmp_path)
    assert made.returncode == 0, made.stderr
    (tmp_path / "poisoned.yaml").write_text(made.stdout)
    words = ("search", "--space", str(tmp_path / "poisoned.yaml"), "--data", "shapes", "--name=p")
    sizes = ("--tier=cpu", "--set=train_size=240", "--set=val_size=50", "--set=batch_size=10")
    answer = run_in_a_process(*words, *sizes, "--trials=3", folder=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    state = read_state(search_folder(tmp_path / "runs", "p"))
    assert state.counts["failed"] == 0 and len((tmp_path / "mark").read_text().split()) >= 3
    faults = [retry.fault for trial in state.trials.values() for retry in trial.retries]
    assert "worker died" in faults


@pytest.mark.gpu
def test_two_trials_at_once_share_a_gpu(tmp_path: Path) -> None:
    words = ("--set=epochs=3", "--trials=2", "--name=shared")
    on_gpu = ("--device=cuda", "--gpus-per-trial=0.5")
    answer = run_in_a_process(*SEARCH_WORDS, *SMALL_SETTINGS, *words, *on_gpu, folder=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    state = read_state(search_folder(tmp_path / "runs", "shared"))
    assert state.header.numerics.device == "cuda" and state.counts["complete"] == 2
    (first, second) = state.trials.values()
    assert second.started is not None and first.ended is not None and second.started < first.ended


@pytest.mark.slow
@ONE_PROCESS
def test_a_search_says_what_it_does_and_what_comes_next(
    searched: tuple[Path, SearchState, str],
) -> None:
    _, _, text = searched
    assert "NOT CIFAR-10" in text
    assert "An epoch of the baseline takes about" in text
    assert "gain over the baseline (" in text or "No trial beat the baseline" in text
    assert "reproduce --best --search demo --data shapes" in text
    assert "fixed for all trials: " in text and "epochs = 3" in text
    assert "ray" not in text.lower() and "Traceback" not in text


@pytest.mark.slow
@ONE_PROCESS
def test_a_search_prints_the_error_of_its_prediction(
    searched: tuple[Path, SearchState, str],
) -> None:
    """How good predictions are is tested in test_forecast.py: so few trials end by luck."""
    _, state, text = searched
    predicted = state.header.predicted_epochs
    trained = sum(trial.epochs_done for trial in state.trials.values())
    assert predicted is not None and 6 * 1 + 3 < predicted < 6 * (1 + 3)
    assert f"trial-epochs: {trained} trained, {predicted:.0f} predicted (error " in text


@pytest.mark.slow
@ONE_PROCESS
def test_a_pinned_knob_holds_for_all_trials_and_trial_0_too(
    searched: tuple[Path, SearchState, str],
) -> None:
    _, state, _ = searched
    sizes = {trial.config.batch_size for trial in state.trials.values()}
    assert sizes == {SMALL_SEARCH["batch_size"]}
    assert "batch_size" not in state.header.distributions


@pytest.mark.slow
@ONE_PROCESS
def test_a_search_takes_at_most_the_disk_space_that_was_planned(
    searched: tuple[Path, SearchState, str],
) -> None:
    folder, state, _ = searched
    needs = estimate_disk_needs(restore_space(state.header), max_concurrent=1, keep_weights=3)
    taken = sum(path.lstat().st_blocks * 512 for path in (folder / "runs").rglob("*"))
    assert needs.total / 10 < taken < needs.weights + needs.records


@pytest.mark.slow
@ONE_PROCESS
def test_mlflow_shows_one_parent_and_a_child_per_trial(
    searched: tuple[Path, SearchState, str],
) -> None:
    from mlflow import MlflowClient

    folder, state, _ = searched
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("smoke (shapes)")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1 and len(runs) == 7
    assert parents[0].info.status == "FINISHED"
    best = state.best
    assert best is not None and parents[0].data.metrics["best_val_acc"] == best.score
    assert parents[0].data.tags["best_run_id"] == best.run_id


@pytest.mark.slow
@ONE_PROCESS
def test_the_best_trial_comes_back_bit_for_bit_in_a_fresh_process(
    searched: tuple[Path, SearchState, str],
) -> None:
    folder, state, _ = searched
    words = ("reproduce", "--best", "--search", "demo", "--data", "shapes", "--json")
    answer = run_in_a_process(*words, folder=folder)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["verdict"] == "identical"
    assert state.best is not None and json.loads(answer.stdout)["run_id"] == state.best.run_id


@pytest.mark.slow
@ONE_PROCESS
def test_the_leaderboard_lists_every_trial(searched: tuple[Path, SearchState, str]) -> None:
    folder, state, _ = searched
    answer = invoke("leaderboard", "--search=demo", "--json", f"--storage={folder / 'runs'}")
    rows = json.loads(answer.stdout)
    found = {row["run_id"]: row["status"] for row in rows}
    assert found == {trial.run_id: trial.status for trial in state.trials.values()}


@pytest.mark.slow
@ONE_PROCESS
def test_a_taken_name_is_refused(searched: tuple[Path, SearchState, str]) -> None:
    folder, _, _ = searched
    answer = run_in_a_process(*SEARCH_WORDS, "--name", "demo", folder=folder)
    assert answer.returncode == 1
    assert "demo" in answer.stderr and answer.stderr.count("error") == 1
    assert "Traceback" not in answer.stderr


@pytest.mark.faults  # it takes long, as these do
@pytest.mark.slow
def test_ctrl_c_ends_a_search_cleanly_with_a_summary(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tune_cifar", *SEARCH_WORDS, *SMALL_SETTINGS]
    command += ["--set", "epochs=200", "--name", "cut"]
    environment = os.environ | {"TUNE_CIFAR_RUNS": str(tmp_path / "runs")}
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    search = subprocess.Popen(command, text=True, cwd=tmp_path, env=environment, **streams)
    record = search_folder(tmp_path / "runs", "cut") / "record.jsonl"
    end = time.monotonic() + 600
    while time.monotonic() < end and not (record.exists() and '"epoch"' in record.read_text()):
        time.sleep(0.2)
    search.send_signal(signal.SIGINT)
    text, _ = search.communicate(timeout=600)
    assert search.returncode == 130, text
    state = read_state(record.parent)
    assert state.finished is not None and state.finished.reason == "interrupted"
    assert "cut ended after" in text and "Traceback" not in text
    assert "search --name cut --resume --data shapes" in text


@pytest.mark.slow
def test_workers_have_the_priority_of_who_started_them() -> None:
    """At Ray's default, nice 15, they starve beside other work: measured steps predict nothing."""
    script = (
        "import os\n"
        "from tune_cifar.search.cluster import ray, start_ray\n"
        "from tune_cifar.search.plan import Resources\n"
        "start_ray(Resources(cpus_per_trial=1, gpus_per_trial=0, max_concurrent=1, num_gpus=0))\n"
        "assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)\n"
    )
    command = ["nice", "-n", "3", sys.executable, "-c", script]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr[-3000:]


@pytest.mark.faults
@pytest.mark.slow
def test_a_trial_that_raises_is_reported_with_its_traceback_and_the_search_goes_on(
    tmp_path: Path,
) -> None:
    runs = tmp_path / "runs"
    # A folder where trial 1's weights must go: writing them fails, whatever the user's rights.
    (runs / "searches").mkdir(parents=True)
    script = (
        "from pathlib import Path\n"
        "from tune_cifar.data.files import find_data\n"
        "from tune_cifar.search.plan import SearchRequest\n"
        "from tune_cifar.search.run import prepare_search, run_search\n"
        "from tune_cifar.space.select import load_space\n"
        "from tune_cifar.record.events import TrialStarted\n"
        f"space = load_space('smoke', 'cpu', {dict(SMALL_SEARCH, epochs=2)!r}).limit(4, None)\n"
        f"runs = Path({str(runs)!r})\n"
        "request = SearchRequest(find_data('shapes'), runs, 'test', name='faulty')\n"
        "def block(state, event):\n"
        "    if isinstance(event, TrialStarted) and event.trial == 0:\n"
        "        (state.trial_folder(0) / 'weights.safetensors' / 'x').mkdir(parents=True)\n"
        "run_search(prepare_search(space, request), block)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    state = read_state(search_folder(runs, "faulty"))
    assert state.trials[0].status == "failed" and state.trials[0].error_file is not None
    assert "Traceback" in (state.folder / state.trials[0].error_file).read_text()
    assert state.counts["complete"] >= 1 and len(state.trials) == 4


SHOW_BADLY = """
import os, signal, sys
from pathlib import Path
from tune_cifar.data.files import find_data
from tune_cifar.record.events import EpochReported
from tune_cifar.search.plan import SearchRequest
from tune_cifar.search.run import prepare_search, run_search
from tune_cifar.space.select import load_space

def write(*args):
    Path("/dev/full").write_text("a line")

def interrupt(state, event):
    if isinstance(event, EpochReported) and sum(t.epochs_done for t in state.trials.values()) == 1:
        os.kill(os.getpid(), signal.SIGINT)

small = {"epochs": 2, "train_size": 120, "val_size": 60, "batch_size": 5, "pct_start": 0.3}
space = load_space("smoke", "cpu", small).limit(2, None)
request = SearchRequest(find_data("shapes"), Path("runs").absolute(), "test", name="shown")
listener = write if sys.argv[1] == "listener" else interrupt
state, faults = run_search(prepare_search(space, request), listener, write)
assert not faults
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("faulty", "reason"), [("listener", "all trials"), ("on_interrupt", INTERRUPTED)]
)
def test_a_display_that_cannot_be_written_does_not_end_a_search(
    tmp_path: Path, faulty: str, reason: str
) -> None:
    command = [sys.executable, "-c", SHOW_BADLY, faulty]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr[-3000:]
    fault = "shown: its display failed and is off (OSError: [Errno 28] No space left on device)\n"
    assert answer.stderr == (fault if faulty == "listener" else "")
    state = read_state(search_folder(tmp_path / "runs", "shown"))
    assert state.finished is not None and state.finished.reason == reason


def test_a_request_prefers_the_cpu_tier_without_a_gpu(tmp_path: Path) -> None:
    assert SearchRequest(SHAPES, tmp_path, "test", device="cpu").default_tier == "cpu"


OWNER = """
import subprocess, sys
import tune_cifar.search.worker
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
assert ray.get(ray.remote(lambda: 1).remote()) == 1
address = ray.get_runtime_context().gcs_address
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1], address]).returncode)
"""
STRANGER = """
import os, sys
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = "f" * 64
import ray
try:
    ray.init(address=sys.argv[1], logging_level="CRITICAL")
except ConnectionError:
    sys.exit(7)
"""


@pytest.mark.slow
def test_nobody_without_the_commands_token_gets_into_its_ray_processes() -> None:
    answer = subprocess.run([sys.executable, "-c", OWNER, STRANGER], capture_output=True, text=True)
    assert answer.returncode == 7, answer.stderr[-2000:]


@pytest.mark.faults
def test_a_variable_that_changes_bits_reaches_the_workers_and_resume_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's bits are those of a training in a process that has it, too."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    words = (*SEARCH_WORDS, *SMALL_SETTINGS, "--trials=1", "--precision=fp32", "--name=x")
    answer = run_in_a_process(*words, folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    header = read_state(search_folder(tmp_path / "runs", "x")).header
    assert header.numerics.settings == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    answer = run_in_a_process("reproduce", "x:0", folder=tmp_path)
    assert "identical over" in answer.stdout, answer.stdout + answer.stderr
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    words = ("search", "--name=x", "--resume", "--trials=2")
    answer = run_in_a_process(*words, folder=tmp_path)
    assert answer.returncode == 1
    assert "as recorded, got ONEDNN_MAX_CPU_ISA: AVX2 -> not set. Restore it" in answer.stderr
