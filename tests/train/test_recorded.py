"""A single training with a record: what it writes, how it ends and how it is resumed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.builders import (
    EXPLODING_KNOBS,
    SHAPES,
    SMALL_KNOBS,
    StoppedClock,
    curve,
    ignore_event,
    interrupt_small,
    open_small,
    train_small,
)
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import CheckpointError, ConfigError, RecordError
from tune_cifar.record.events import Event, TrialEnded
from tune_cifar.record.files import CHECKPOINTS, ERROR, WEIGHTS
from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import Numerics
from tune_cifar.space.select import load_space
from tune_cifar.train.checkpoint import load_checkpoint, load_weights
from tune_cifar.train.recorded import make_header, run_training
from tune_cifar.train.trainer import Trainer
from tune_cifar.train.trial import train_trial


def test_every_event_is_on_disk_before_on_event_is_called(tmp_path: Path, fp32: Numerics) -> None:
    record, data = open_small(tmp_path, fp32)
    events: list[tuple[str, int]] = []

    def on_event(state: SearchState, event: Event) -> None:
        on_disk = read_state(state.folder)
        assert (on_disk.num_events, on_disk.trials) == (state.num_events, state.trials)
        events.append((type(event).__name__, on_disk.trials[0].epochs_done))

    with record:
        run_training(record, data, fp32, on_event)
    epochs = [("EpochReported", epoch) for epoch in (1, 2, 3)]
    assert events == [("TrialStarted", 0), *epochs, ("TrialEnded", 3), ("SearchEnded", 3)]


def test_a_listeners_fault_is_said_once_and_spoils_no_training(
    tmp_path: Path, trained: SearchState, fp32: Numerics, caplog: pytest.LogCaptureFixture
) -> None:
    record, data = open_small(tmp_path, fp32)

    def show(state: SearchState, event: Event) -> None:
        Path("/dev/full").write_text(str(event))

    with record:
        run_training(record, data, fp32, show)
    trial = read_state(search_folder(tmp_path, "small")).trials[0]
    assert trial.status == "complete" and curve(trial.epochs) == curve(trained.trials[0].epochs)
    fault = "OSError: [Errno 28] No space left on device"
    assert caplog.messages == [f"small: its display failed and is off ({fault})"]


def test_a_training_ends_complete_with_its_score_and_the_weights_that_reached_it(
    tmp_path: Path, fp32: Numerics
) -> None:
    state = train_small(tmp_path, fp32)
    trial = state.trials[0]
    assert (state.header.kind, trial.origin, trial.status) == ("train", "train", "complete")
    assert state.finished is not None and trial.score == trial.epochs[-1].val_acc
    assert trial.weights_file == f"trials/0000/{WEIGHTS}"
    record, data = open_small(tmp_path, fp32, "other")
    record.close()
    trainer = Trainer(trial.config, data, fp32)
    trainer.model.load_state_dict(load_weights(state.folder / trial.weights_file))
    assert data.val is not None
    assert trainer.evaluate(data.val) == (trial.epochs[-1].val_loss, trial.epochs[-1].val_acc)


def save_checkpoints(monkeypatch: pytest.MonkeyPatch, every_seconds: float) -> None:
    train = partial(train_trial, every_seconds=every_seconds)
    monkeypatch.setattr("tune_cifar.train.recorded.train_trial", train)


@pytest.mark.parametrize(("every_seconds", "epochs_kept"), [(60.0, 0), (0.0, 1)])
def test_a_resumed_training_has_the_curve_of_the_uninterrupted_one(
    tmp_path: Path,
    fp32: Numerics,
    monkeypatch: pytest.MonkeyPatch,
    every_seconds: float,
    epochs_kept: int,
) -> None:
    """It starts from its checkpoint, or from scratch if none was due yet."""
    save_checkpoints(monkeypatch, every_seconds)
    uninterrupted = train_small(tmp_path / "uninterrupted", fp32)
    interrupt_small(tmp_path, fp32, epoch=1)
    interrupted = read_state(search_folder(tmp_path, "small"))
    trial, end = interrupted.trials[0], interrupted.finished
    assert (trial.status, trial.epochs_done) == ("running", 1)
    assert end is not None and end.reason == "interrupted" and not interrupted.is_finished
    record, data = open_small(tmp_path, fp32, resume=True)
    starts: list[int] = []
    with record:
        run_training(record, data, fp32, ignore_event, lambda trainer: starts.append(trainer.epoch))
    resumed = read_state(search_folder(tmp_path, "small"))
    assert starts == [epochs_kept]
    assert curve(resumed.trials[0].epochs) == curve(uninterrupted.trials[0].epochs)
    assert resumed.trials[0].status == "complete" and resumed.finished is not None
    weights = load_weights(resumed.trial_folder(0) / WEIGHTS)
    wanted = load_weights(uninterrupted.trial_folder(0) / WEIGHTS)
    assert all((weights[name] == wanted[name]).all() for name in wanted)


def test_a_training_killed_between_its_checkpoint_and_its_record_loses_no_epoch(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint has two epochs, the record one: the second comes from the checkpoint."""
    save_checkpoints(monkeypatch, every_seconds=0.0)
    uninterrupted = train_small(tmp_path / "uninterrupted", fp32)
    interrupt_small(tmp_path, fp32, epoch=2)
    path = search_folder(tmp_path, "small") / "record.jsonl"
    *lines, last, end = path.read_bytes().splitlines(keepends=True)
    assert b'"epoch": 2' in last and b"interrupted" in end
    path.write_bytes(b"".join(lines))
    record, data = open_small(tmp_path, fp32, resume=True)
    with record:
        run_training(record, data, fp32, ignore_event)
    epochs = read_state(path.parent).trials[0].epochs
    assert curve(epochs) == curve(uninterrupted.trials[0].epochs)


@pytest.mark.slow
@pytest.mark.parametrize("left", ["the end", "the middle, for the end is torn", "a longer one"])
def test_checkpoints_of_another_stage_are_deleted_and_the_training_starts_from_scratch(
    tmp_path: Path, fp32: Numerics, left: str
) -> None:
    config = load_space("smoke", "full", {**SMALL_KNOBS, "epochs": 4}).baseline
    before, after = config.shorten(2), config
    if left == "a longer one":
        before, after = after, before
    data, folder = load_train_val(SHAPES, 20, 20), tmp_path / "trials" / "0000"
    for result in train_trial(before, data, fp32, folder, every_seconds=0.0):
        if result.epoch == 2:
            break
    if "torn" in left:
        (folder / CHECKPOINTS / "checkpoint-0002.pt").write_bytes(b"torn")
    starts: list[int] = []
    results = train_trial(after, data, fp32, folder, lambda trainer: starts.append(trainer.epoch))
    first = next(results)
    assert list((folder / CHECKPOINTS).iterdir()) == []
    assert starts == [0]
    assert curve([first, *results]) == curve(list(Trainer(after, data, fp32)))


def test_a_stage_leaves_its_results_and_only_the_last_one_weights(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken up again it yields the results and trains nothing."""
    config = load_space("smoke", "full", {**SMALL_KNOBS, "schedule": "constant"}).baseline
    data, folder = load_train_val(SHAPES, 20, 20), tmp_path / "trials" / "0000"
    for stage, is_final in ((1, False), (2, True)):
        short = config.shorten(stage)
        results = list(train_trial(short, data, fp32, folder, is_final=is_final))
        assert (folder / WEIGHTS).exists() == is_final
        (path,) = (folder / CHECKPOINTS).iterdir()
        state = load_checkpoint(path)
        assert set(state) == {"fingerprint", "epoch", "step", "results"}
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_run_epoch", lambda trainer: pytest.fail("it trains"))
            assert list(train_trial(short, data, fp32, folder, is_final=is_final)) == results


def test_a_replicate_begins_with_its_own_seed(tmp_path: Path, fp32: Numerics) -> None:
    """The checkpoint of the replicate before, or of a shorter stage, is deleted."""
    config = load_space("smoke", "full", {**SMALL_KNOBS, "schedule": "constant"}).baseline
    data, folder = load_train_val(SHAPES, 20, 20), tmp_path / "trials" / "0000"
    list(train_trial(config.shorten(1), data, fp32, folder))
    first, second = (
        curve(train_trial(config.shorten(2, number), data, fp32, folder, replicate=number))
        for number in (0, 1)
    )
    later = config.model_copy(update={"epochs": 2, "seed": config.seed + 1})
    assert first != second == curve(Trainer(later, data, fp32))
    with pytest.raises(CheckpointError, match="It belongs to another configuration"):
        list(train_trial(config.shorten(2), data, fp32, folder))


def test_a_checkpoint_of_another_recipe_is_refused_and_stays(
    tmp_path: Path, fp32: Numerics
) -> None:
    config = load_space("smoke", "full", {**SMALL_KNOBS, "schedule": "constant"}).baseline
    data, folder = load_train_val(SHAPES, 20, 20), tmp_path / "trials" / "0000"
    list(train_trial(config.shorten(1), data, fp32, folder))
    other = config.model_copy(update={"max_lr": 0.01})
    with pytest.raises(CheckpointError, match="It belongs to another configuration"):
        list(train_trial(other, data, fp32, folder))
    assert len(list((folder / CHECKPOINTS).iterdir())) == 1


def test_resume_with_a_changed_knob_is_refused_with_what_changed_and_frees_the_record(
    tmp_path: Path, fp32: Numerics
) -> None:
    interrupt_small(tmp_path, fp32, epoch=1)
    with pytest.raises(ConfigError) as caught:
        open_small(tmp_path, fp32, resume=True, max_lr=0.02, seed=3)
    rule = "`resume=True`: small must be unfinished and its settings as recorded"
    recorded = load_space("smoke").baseline.max_lr
    assert str(caught.value) == f"{rule}, got max_lr: {recorded} -> 0.02; seed: 0 -> 3."
    record, _ = open_small(tmp_path, fp32, resume=True)
    record.close()


def test_resume_under_other_numerics_is_refused_with_what_changed(
    tmp_path: Path, fp32: Numerics
) -> None:
    interrupt_small(tmp_path, fp32, epoch=1)
    with pytest.raises(ConfigError, match=r"got threads: 1 -> 2\.$"):
        open_small(tmp_path, fp32.model_copy(update={"threads": 2}), resume=True)


def test_resume_of_a_finished_training_is_refused(tmp_path: Path, fp32: Numerics) -> None:
    train_small(tmp_path, fp32, epochs=2)
    with pytest.raises(ConfigError, match=r"small must be unfinished .* a finished training\.$"):
        open_small(tmp_path, fp32, resume=True, epochs=2)


def test_resume_needs_the_name_of_a_record(tmp_path: Path, fp32: Numerics) -> None:
    with pytest.raises(ConfigError, match="`resume=True` needs `name`, got none"):
        open_small(tmp_path, fp32, name=None, resume=True)
    with pytest.raises(RecordError, match="small: cannot open its record: No such file"):
        open_small(tmp_path, fp32, resume=True)


def test_a_name_in_use_is_refused_and_without_a_name_one_is_made(
    tmp_path: Path, fp32: Numerics
) -> None:
    record, _ = open_small(tmp_path, fp32)
    record.close()
    with pytest.raises(RecordError, match="small: a search of this name exists already"):
        open_small(tmp_path, fp32)
    record, _ = open_small(tmp_path, fp32, name=None)
    with record:
        assert record.state.header.name.startswith("train-smoke-20")


def test_two_nameless_trainings_of_one_second_get_two_names(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.record.store.datetime", StoppedClock)
    names = []
    for _ in range(3):
        record, _ = open_small(tmp_path, fp32, name=None)
        with record:
            names.append(record.state.header.name)
    name = "train-smoke-20260102-030405"
    assert names == [name, f"{name}-2", f"{name}-3"]


def test_a_diverged_training_is_a_result_with_chance_as_its_score(
    tmp_path: Path, fp32: Numerics
) -> None:
    state = train_small(tmp_path, fp32, **EXPLODING_KNOBS)
    trial = state.trials[0]
    assert (trial.status, trial.score, trial.epochs_done) == ("diverged", 0.1, 1)
    assert state.finished is not None
    problem = "training: the loss must be finite, got nan or inf at epoch 2, step "
    assert trial.reason.startswith(problem)
    assert not (state.trial_folder(0) / WEIGHTS).exists()


def test_an_exception_is_recorded_as_failed_with_its_traceback_and_raised_again(
    tmp_path: Path, fp32: Numerics
) -> None:
    record, data = open_small(tmp_path, fp32)
    ended: list[TrialEnded] = []

    def on_event(state: SearchState, event: Event) -> None:
        if isinstance(event, TrialEnded):
            ended.append(event)

    def break_down(trainer: Trainer) -> None:
        raise OSError("[Errno 28] no space left")

    with record, pytest.raises(OSError, match="no space left"):
        run_training(record, data, fp32, on_event, break_down)
    trial = read_state(search_folder(tmp_path, "small")).trials[0]
    assert (trial.status, trial.score, trial.error_file) == ("failed", None, f"trials/0000/{ERROR}")
    assert [event.status for event in ended] == ["failed"]
    text = (search_folder(tmp_path, "small") / trial.error_file).read_text()
    assert "in break_down" in text and "no space left" in text


def test_a_training_killed_before_its_last_line_is_only_closed_on_resume(
    tmp_path: Path, fp32: Numerics
) -> None:
    complete = train_small(tmp_path, fp32)
    path = complete.folder / "record.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    record, data = open_small(tmp_path, fp32, resume=True)
    with record:
        run_training(record, data, fp32, ignore_event)
    state = read_state(path.parent)
    assert state.finished is not None and state.trials[0] == complete.trials[0]


@pytest.mark.parametrize(("kind", "words"), [("search", "a search"), ("confirm", "a confirmation")])
def test_resume_of_what_is_no_single_training_is_refused_with_what_it_is(
    tmp_path: Path, fp32: Numerics, kind: Any, words: str
) -> None:
    space = load_space("smoke", "full", SMALL_KNOBS)
    header = make_header(kind, "small", space, 0, load_train_val(SHAPES, 20, 20).info, fp32, "test")
    Record.create(search_folder(tmp_path, "small"), header).close()
    with pytest.raises(ConfigError, match=rf"got {words}\.$"):
        open_small(tmp_path, fp32, resume=True)
