"""A recorded run trained again: identical, within tolerance or different; and the test set."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import (
    EXPLODING_KNOBS,
    NUMERICS,
    SHAPES,
    SMALL_KNOBS,
    ignore_event,
    interrupt_small,
    invoke,
    make_tiny_driver,
    make_trial,
    open_small,
    refuse,
    run_in_a_process,
    run_trials,
    train_small,
    write_record,
)
from tests.faults.disks import limit_file_size
from tune_cifar.data.files import BATCHES_FOLDER, FILES, TEST_FILE, DataSource
from tune_cifar.data.load import CIFAR10_DIGEST, TrainVal
from tune_cifar.errors import CheckpointError, ConfigError, DataError, RecordError
from tune_cifar.models.build import MODELS
from tune_cifar.models.s7 import S7Net
from tune_cifar.record.events import EpochReported, Header, SearchEnded, TrialEnded, TrialStarted
from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.record.store import search_folder
from tune_cifar.record.test_log import OLD_COLUMNS, TEST_LOG_COLUMNS, TEST_LOG_FILE
from tune_cifar.schema import DataInfo, EpochResult, Numerics, TrainConfig
from tune_cifar.space.select import list_spaces, load_space
from tune_cifar.train.checkpoint import load_weights
from tune_cifar.train.numerics import resolve_numerics
from tune_cifar.train.recorded import load_recorded_data, load_trained, make_header, run_training
from tune_cifar.verify.confirm import make_confirmation
from tune_cifar.verify.reproduce import (
    SEED_NOISE_FILE,
    Reproduction,
    find_seed_noise,
    load_seed_noise,
    reproduce_run,
)

Change = Callable[[EpochResult], EpochResult]


@pytest.fixture(scope="module")
def exploded(tmp_path_factory: pytest.TempPathFactory, fp32: Numerics) -> SearchState:
    """A training that diverged in its second epoch."""
    return train_small(tmp_path_factory.mktemp("runs"), fp32, **EXPLODING_KNOBS)


def no_change(result: EpochResult) -> EpochResult:
    return result


def rewrite(
    storage: Path, state: SearchState, change: Change = no_change, **header: Any
) -> SearchState:
    """Record the run once more with changed epochs or a changed header, and copy its weights."""
    old = state.trials[0]
    folder = search_folder(storage, state.header.name)
    start: dict[str, Any] = {"config": old.config.model_dump(mode="json"), "params": {}}
    start |= {"origin": "train", "fingerprint": old.fingerprint}
    with Record.create(folder, Header(**{**dict(state.header), **header})) as record:
        record.append(TrialStarted(trial=0, **start))
        for result in old.epochs:
            record.append(EpochReported(trial=0, result=change(result)))
        score = record.state.trials[0].val_acc if old.status == "complete" else old.score
        end = {name: getattr(old, name) for name in ("status", "reason", "weights_file")}
        record.append(TrialEnded(trial=0, score=score, **end))
        record.append(SearchEnded(reason="trained", wall_seconds=1.0))
    shutil.copytree(state.folder / "trials", folder / "trials")
    return read_state(folder)


def change_epoch(epoch: int, **values: Callable[[Any], Any]) -> Change:
    """Return a change of the named figures of one epoch."""

    def change(result: EpochResult) -> EpochResult:
        changed = {name: f(getattr(result, name)) for name, f in values.items()}
        return result.model_copy(update=changed) if result.epoch == epoch else result

    return change


def add_ulp(value: float) -> float:
    return math.nextafter(value, math.inf)


def reproduce(storage: Path, *words: str) -> Any:
    return invoke("reproduce", "small:0", "--data", "shapes", "--storage", str(storage), *words)


def refuse_run(kind: Any, storage: Path, run: str = "small:0", *words: str) -> str:
    """Return the sentence with which `reproduce` refuses a run."""
    return refuse(kind, "reproduce", run, "--data", "shapes", "--storage", str(storage), *words)


def reproduce_small(
    state: SearchState, trial: TrialState, data: TrainVal, numerics: Numerics
) -> Reproduction:
    return reproduce_run(state, trial, data, numerics, ignore_pair)[0]


def ignore_pair(recorded: EpochResult, fresh: EpochResult, difference: str | None) -> None:
    """Do nothing."""


def with_torch(numerics: Numerics, torch_version: str) -> Numerics:
    """Return the same Numerics with another version of torch; results stay equal here."""
    return numerics.model_copy(update={"versions": {**numerics.versions, "torch": torch_version}})


@pytest.fixture
def noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with a seed noise of 0.01 for smoke: 0.03 is tolerated."""
    path = tmp_path / "seed_noise.json"
    path.write_text('{"spaces": {"smoke": {"sd_val_acc": 0.01}}}')
    monkeypatch.setattr("tune_cifar.verify.reproduce.SEED_NOISE_FILE", path)


def test_a_run_trained_again_is_identical(tmp_path: Path, trained: SearchState) -> None:
    rewrite(tmp_path, trained)
    answer = reproduce(tmp_path)
    assert answer.exit_code == 0, answer.output
    lines = answer.stdout.splitlines()
    title = "small:0 (smoke, train, complete, 3 epochs) is trained again, fingerprint "
    assert lines[0].startswith(title)
    assert all(line.endswith("agrees") for line in lines[1:4])
    assert lines[4:] == ["identical over 3 epochs"]


def test_reproduce_with_json_prints_one_document_on_stdout_and_progress_on_stderr(
    tmp_path: Path, trained: SearchState
) -> None:
    rewrite(tmp_path, trained)
    answer = reproduce(tmp_path, "--json")
    assert answer.exit_code == 0
    assert json.loads(answer.stdout) == {
        "run_id": "small:0",
        "search": "small",
        "fingerprint": trained.trials[0].fingerprint,
        "verdict": "identical",
        "epochs": 3,
        "first_different": None,
        "detail": "",
        "numerics": [],
    }
    assert "identical over 3 epochs" in answer.stderr


@pytest.mark.parametrize("field", ["train_loss", "train_acc", "val_loss", "val_acc", "lr"])
def test_one_ulp_in_a_recorded_figure_is_different_and_names_the_first_epoch(
    tmp_path: Path, trained: SearchState, field: str
) -> None:
    state = rewrite(tmp_path, trained, change_epoch(2, **{field: add_ulp}))
    before, now = (getattr(found.trials[0].epochs[1], field) for found in (state, trained))
    answer = reproduce(tmp_path, "--json")
    assert answer.exit_code == 1
    found = json.loads(answer.stdout)
    assert (found["verdict"], found["first_different"], found["epochs"]) == ("different", 2, 2)
    assert found["detail"] == f"epoch 2: {field} recorded {before!r}, now {now!r}"
    assert "different over 2 epochs" in answer.stderr and "DIFFERS" in answer.stderr


def test_what_measures_the_machine_need_not_come_back(tmp_path: Path, trained: SearchState) -> None:
    slower = {"epoch_seconds": lambda s: s + 9.0, "images_per_second": lambda n: n / 2}
    rewrite(tmp_path, trained, change_epoch(1, **slower, peak_memory_mb=add_ulp))
    assert reproduce(tmp_path).exit_code == 0


@pytest.mark.usefixtures("noise")
def test_under_other_numerics_the_verdict_is_within_tolerance_and_names_what_differs(
    tmp_path: Path, trained: SearchState
) -> None:
    numerics = with_torch(trained.header.numerics, "2.0.0")
    shift = change_epoch(3, val_acc=lambda acc: acc + 0.0299, train_loss=lambda loss: loss * 2)
    rewrite(tmp_path, trained, shift, numerics=numerics)
    answer = reproduce(tmp_path, "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    change = f"torch: 2.0.0 -> {trained.header.numerics.versions['torch']}"
    assert (found["verdict"], found["numerics"]) == ("within tolerance", [change])
    assert f"numerics differ: {change}" in answer.stderr


@pytest.mark.usefixtures("noise")
def test_a_variable_that_changes_bits_is_named_and_only_then_may_they_differ(
    tmp_path: Path, trained: SearchState
) -> None:
    settings = {"settings": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}
    numerics = trained.header.numerics.model_copy(update=settings)
    rewrite(tmp_path, trained, change_epoch(3, train_loss=add_ulp), numerics=numerics)
    answer = reproduce(tmp_path)
    assert answer.exit_code == 0, answer.output
    assert "within tolerance over 3 epochs" in answer.stdout
    assert "numerics differ: ONEDNN_MAX_CPU_ISA: AVX2 -> not set" in answer.stdout


def test_an_old_record_is_identical_or_says_which_variables_it_lacks(
    tmp_path: Path, trained: SearchState
) -> None:
    old = trained.header.numerics.model_copy(update={"settings": None})
    rewrite(tmp_path / "equal", trained, numerics=old)
    answer = reproduce(tmp_path / "equal")
    assert answer.stdout.splitlines()[4:] == ["identical over 3 epochs"]
    rewrite(tmp_path / "other", trained, change_epoch(2, train_loss=add_ulp), numerics=old)
    answer = reproduce(tmp_path / "other")
    assert answer.exit_code == 1 and "different over 2 epochs" in answer.stdout
    note = "environment variables that change bits were not recorded; set here: none"
    assert note in answer.stdout
    assert json.loads(reproduce(tmp_path / "other", "--json").stdout)["unrecorded"] == [note]


@pytest.mark.slow
def test_a_variable_set_in_this_shell_alone_is_named(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, which reads it. The verdict is that of the processor."""
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "SSE41")
    answer = run_in_a_process("reproduce", "small:0")
    assert "ONEDNN_MAX_CPU_ISA: not set -> SSE41" in answer.stdout + answer.stderr


@pytest.mark.usefixtures("noise")
def test_under_other_numerics_more_than_three_sds_are_different(
    tmp_path: Path, trained: SearchState
) -> None:
    numerics = with_torch(trained.header.numerics, "2.0.0")
    shift = change_epoch(1, val_acc=lambda acc: acc + 0.0301)
    state = rewrite(tmp_path, trained, shift, numerics=numerics)
    answer = reproduce(tmp_path)
    assert answer.exit_code == 1
    before, now = (found.trials[0].epochs[0].val_acc for found in (state, trained))
    detail = f"epoch 1: val_acc recorded {before:.4f}, now {now:.4f}, more than 0.0300 apart"
    assert detail in answer.stdout and "different over 1 epochs" in answer.stdout


@pytest.mark.usefixtures("noise")
def test_where_bits_do_not_repeat_they_are_compared_first_and_then_the_accuracies(
    tmp_path: Path, trained: SearchState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU without --deterministic, which this machine need not have."""
    monkeypatch.setattr("tune_cifar.verify.reproduce.repeats_bits", lambda numerics: False)
    rewrite(tmp_path / "equal", trained)
    found = json.loads(reproduce(tmp_path / "equal", "--json").stdout)
    assert (found["verdict"], found["detail"], found["numerics"]) == ("identical", "", [])
    shift = change_epoch(2, train_loss=add_ulp, val_acc=lambda acc: acc + 0.0299)
    state = rewrite(tmp_path / "near", trained, shift)
    answer = reproduce(tmp_path / "near", "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    before, now = (each.trials[0].epochs[1].train_loss for each in (state, trained))
    why = "on a GPU bits repeat with `deterministic` alone"
    detail = f"epoch 2: train_loss recorded {before!r}, now {now!r}: {why}."
    assert (found["verdict"], found["detail"]) == ("within tolerance", detail)
    rewrite(tmp_path / "far", trained, change_epoch(2, val_acc=lambda acc: acc + 0.0301))
    found = json.loads(reproduce(tmp_path / "far", "--json").stdout)
    assert (found["verdict"], found["first_different"]) == ("different", 2)


def test_under_other_numerics_an_unmeasured_space_is_refused_with_the_way_to_measure_it(
    tmp_path: Path, trained: SearchState, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none.json").write_text('{"spaces": {}}')
    monkeypatch.setattr("tune_cifar.verify.reproduce.SEED_NOISE_FILE", tmp_path / "none.json")
    rewrite(tmp_path, trained, numerics=with_torch(trained.header.numerics, "2.0.0"))
    sentence = refuse_run(ConfigError, tmp_path)
    assert sentence.startswith("small:0: the Numerics differ (torch: 2.0.0 -> ")
    assert sentence.endswith("Measure it: python benchmarks/seed_noise.py.")


def test_the_committed_seed_noise_is_of_known_spaces_and_plausible() -> None:
    table = json.loads(SEED_NOISE_FILE.read_text(encoding="utf-8"))["spaces"]
    assert set(table) <= {path.stem for path in list_spaces()}
    for space in table:
        sd = load_seed_noise(space)
        assert sd is not None and 0 < sd < 0.2
    assert load_seed_noise("no such space") is None


def test_a_diverged_run_that_diverges_again_at_the_same_step_is_identical(
    tmp_path: Path, exploded: SearchState
) -> None:
    rewrite(tmp_path, exploded)
    answer = reproduce(tmp_path)
    assert answer.exit_code == 0, answer.output
    assert "identical over 1 epochs" in answer.stdout


def test_a_diverged_run_that_diverges_elsewhere_or_no_more_is_different(
    shapes_small: Any, exploded: SearchState, trained: SearchState, fp32: Numerics
) -> None:
    old = exploded.trials[0]
    data = load_recorded_data(exploded, old, SHAPES)
    elsewhere = replace(old, reason=old.reason.replace("at epoch 2, step", "at epoch 2, step 1"))
    outcome = reproduce_small(exploded, elsewhere, data, fp32)
    assert (outcome.verdict, outcome.first_different) == ("different", 2)
    assert outcome.detail == f"recorded: {elsewhere.reason} Now: {old.reason}"
    sound = trained.trials[0]
    no_more = replace(sound, epochs=sound.epochs[:1], status="diverged")
    outcome = reproduce_small(trained, no_more, shapes_small, fp32)
    assert (outcome.verdict, outcome.first_different) == ("different", 2)
    assert outcome.detail.endswith("Now the loss is finite.")


def test_a_run_that_diverges_now_and_did_not_then_is_different(
    exploded: SearchState, fp32: Numerics
) -> None:
    old = exploded.trials[0]
    data = load_recorded_data(exploded, old, SHAPES)
    epochs = [old.epochs[0], old.epochs[0].model_copy(update={"epoch": 2})]
    finite = replace(old, epochs=epochs, status="stopped")
    outcome = reproduce_small(exploded, finite, data, fp32)
    assert (outcome.verdict, outcome.first_different) == ("different", 2)
    assert outcome.detail == f"epoch 2: recorded as finished, now {old.reason}"


@pytest.fixture
def shapes_small(trained: SearchState) -> Any:
    return load_recorded_data(trained, trained.trials[0], SHAPES)


def test_only_as_many_epochs_as_were_recorded_are_trained(
    shapes_small: Any, trained: SearchState, fp32: Numerics
) -> None:
    old = trained.trials[0]
    stopped = replace(old, epochs=old.epochs[:1], status="stopped")
    outcome, trainer = reproduce_run(trained, stopped, shapes_small, fp32, ignore_pair)
    assert trainer is not None and (outcome.verdict, outcome.epochs, trainer.epoch) == (
        "identical",
        1,
        1,
    )


def test_a_run_without_an_epoch_is_refused(tmp_path: Path, trained: SearchState) -> None:
    rewrite(tmp_path, trained)
    path = search_folder(tmp_path, "small") / "record.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    sentence = refuse_run(RecordError, tmp_path)
    assert sentence == "small:0: the run has no recorded epoch to compare."


def test_an_unknown_run_is_refused_with_the_nearest_name(
    tmp_path: Path, trained: SearchState
) -> None:
    rewrite(tmp_path, trained)
    words = ("--data", "shapes", "--storage", str(tmp_path))
    assert "Did you mean small?" in refuse(RecordError, "reproduce", "smal:0", *words)
    assert "no trial 7 in search small" in refuse(RecordError, "reproduce", "small:7", *words)
    assert "a run id must be NAME:TRIAL such as s10-cpu-1:7" in refuse(
        RecordError, "reproduce", "small", *words
    )


def test_a_run_on_synthetic_data_needs_no_data_option(tmp_path: Path, trained: SearchState) -> None:
    rewrite(tmp_path, trained)
    assert invoke("reproduce", "small:0", "--storage", str(tmp_path)).exit_code == 0


def test_a_run_on_cifar10_refuses_synthetic_data(tmp_path: Path, trained: SearchState) -> None:
    info = trained.header.data.model_copy(update={"name": "cifar10", "split_hash": "0123"})
    rewrite(tmp_path, trained, data=info)
    sentence = refuse_run(ConfigError, tmp_path)
    assert sentence == "small was trained on cifar10, got shapes. Give its data as `data`."


@pytest.mark.parametrize(
    "words",
    [(), ("small:0", "--best"), ("--best",), ("small:0", "--no-retrain"), ("small:0", "--again")],
    ids=" ".join,
)
def test_options_that_contradict_each_other_are_wrong_usage(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    answer = invoke("reproduce", *words, "--storage", str(tmp_path))
    assert answer.exit_code == 2 and "Invalid value" in answer.stderr


def test_reproduce_best_takes_the_best_trial_of_the_named_search(
    tmp_path: Path, trained: SearchState
) -> None:
    rewrite(tmp_path, trained)
    words = ("reproduce", "--best", "--data", "shapes", "--storage", str(tmp_path), "--json")
    answer = invoke(*words, "--search", "small")
    assert answer.exit_code == 0 and json.loads(answer.stdout)["run_id"] == "small:0"
    of_space = refuse(RecordError, *words, "--space", "smoke")
    assert "no finished search on synthetic data of space smoke" in of_space
    usual = [word for word in words if word not in ("--data", "shapes")]
    assert "no finished search on CIFAR-10" in refuse(RecordError, *usual, "--space", "smoke")


# Failed runs


def make_faulty(step: int, exception: Exception) -> type[S7Net]:
    """Return s7 with a training step (from 1) that raises."""

    class Faulty(S7Net):
        num_steps = 0

        def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
            self.num_steps += self.training
            if self.training and self.num_steps == step:
                raise exception
            return super().forward(images_NCHW)

    return Faulty


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
NO_MEMORY_NOW = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34.00 MiB.")
STEPS_PER_EPOCH = SMALL_KNOBS["train_size"] // SMALL_KNOBS["batch_size"]


def fail_small(storage: Path, numerics: Numerics, step: int = STEPS_PER_EPOCH + 1) -> SearchState:
    """Return a training that ran out of memory, by default in its second epoch."""
    record, data = open_small(storage, numerics)
    with pytest.MonkeyPatch.context() as patch, record:
        patch.setitem(MODELS, "s7", make_faulty(step, NO_MEMORY))
        with pytest.raises(torch.OutOfMemoryError):
            run_training(record, data, numerics, ignore_event)
    return read_state(record.state.folder)


def test_a_failed_run_fails_again_here_with_its_traceback_and_is_identical(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception's type and epoch must agree; its message need not."""
    assert fail_small(tmp_path, fp32).trials[0].status == "failed"
    monkeypatch.setitem(MODELS, "s7", make_faulty(STEPS_PER_EPOCH + 1, NO_MEMORY_NOW))
    answer = reproduce(tmp_path)
    assert answer.exit_code == 0, answer.output
    lines = answer.stdout.splitlines()
    assert lines[0].startswith("small:0 (smoke, train, failed, 1 epochs) is trained again")
    assert lines[1].endswith("agrees") and lines[2] == "Traceback (most recent call last):"
    message = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 34.00 MiB."
    assert lines[-3:] == [message, "identical over 1 epochs", f"It fails again: {message}"]
    assert "in _train_step" in answer.stdout
    found = json.loads(reproduce(tmp_path, "--json").stdout)
    assert (found["verdict"], found["epochs"], found["first_different"]) == ("identical", 1, None)
    assert found["traceback"].startswith("Traceback")
    assert found["traceback"].endswith(f"{message}\n")


def test_a_fault_that_does_not_come_back_is_different_and_not_the_configurations(
    tmp_path: Path, fp32: Numerics
) -> None:
    fail_small(tmp_path, fp32)
    answer = reproduce(tmp_path)
    assert answer.exit_code == 1 and "different over 2 epochs" in answer.stdout
    before = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."
    cause = "the machine (memory, disk, a killed process), not the configuration"
    after = f"does not fail now: the cause was {cause}."
    assert f"It failed in epoch 2 ({before}) and {after}" in answer.stdout
    assert json.loads(reproduce(tmp_path, "--json").stdout)["traceback"] == ""


@pytest.mark.parametrize(
    ("step", "exception", "detail"),
    [
        (1, NO_MEMORY, "epoch 1: recorded as finished, now torch.OutOfMemoryError: CUDA out"),
        (
            3,
            RuntimeError("odd"),
            "epoch 2: recorded as failed with torch.OutOfMemoryError: CUDA out",
        ),
    ],
)
def test_a_failure_elsewhere_or_of_another_type_is_different_and_shown(
    tmp_path: Path,
    fp32: Numerics,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    exception: Exception,
    detail: str,
) -> None:
    fail_small(tmp_path, fp32)
    monkeypatch.setitem(MODELS, "s7", make_faulty(step, exception))
    answer = reproduce(tmp_path)
    assert answer.exit_code == 1 and "Traceback (most recent call last):" in answer.stdout
    assert detail in answer.stdout.splitlines()[-1]


def test_a_failed_run_whose_epochs_differ_is_different_before_its_failure(
    tmp_path: Path, fp32: Numerics
) -> None:
    failed = fail_small(tmp_path / "first", fp32)
    state = rewrite(tmp_path, failed, change_epoch(1, train_loss=add_ulp))
    trial = state.trials[0]
    outcome = reproduce_small(state, trial, load_recorded_data(state, trial, SHAPES), fp32)
    assert (outcome.verdict, outcome.first_different, outcome.traceback) == ("different", 1, "")
    assert outcome.detail.startswith("epoch 1: train_loss recorded ")


def test_a_run_that_failed_before_its_first_epoch_is_reproduced_under_any_numerics(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No epoch is compared, so the seed noise is not needed."""
    (tmp_path / "none.json").write_text('{"spaces": {}}')
    monkeypatch.setattr("tune_cifar.verify.reproduce.SEED_NOISE_FILE", tmp_path / "none.json")
    state = fail_small(tmp_path / "first", fp32, step=1)
    rewrite(tmp_path, state, numerics=with_torch(fp32, "2.0.0"))
    monkeypatch.setitem(MODELS, "s7", make_faulty(1, NO_MEMORY))
    found = json.loads(reproduce(tmp_path, "--json").stdout)
    assert (found["verdict"], found["epochs"]) == ("within tolerance", 0)
    assert found["numerics"] == [f"torch: 2.0.0 -> {fp32.versions['torch']}"]


def test_a_run_that_failed_when_it_was_trained_does_not_fail_now(
    tmp_path: Path, fp32: Numerics
) -> None:
    """A folder at the weights' path makes writing them fail, whatever the user's rights."""
    record, data = open_small(tmp_path, fp32)
    with record:
        (record.state.trial_folder(0) / "weights.safetensors").mkdir(parents=True)
        with pytest.raises(CheckpointError, match="weights"):
            run_training(record, data, fp32, ignore_event)
    state = read_state(record.state.folder)
    trial = state.trials[0]
    assert (trial.status, trial.epochs_done) == ("failed", 2), "the third is reported after them"
    outcome = reproduce_small(state, trial, data, fp32)
    assert outcome.verdict == "different"
    assert outcome.detail.startswith("It failed in epoch 3 (tune_cifar.errors.CheckpointError: ")


# Trials in stages


def run_in_stages(storage: Path, numerics: Numerics, **knobs: Any) -> SearchState:
    """Return a search of one trial, really trained in stages of 1, 2 and 3 epochs."""
    driver = make_tiny_driver(storage, numerics, (1, 2, 3), **knobs)
    run_trials(driver, numerics)
    driver.finish()
    driver.record.close()
    return read_state(driver.record.state.folder)


def reproduce_stages(storage: Path, *words: str) -> Any:
    return invoke("reproduce", "c:0", "--data", "shapes", "--storage", str(storage), *words)


@pytest.mark.parametrize("replicates", [1, 2])
def test_a_trial_in_stages_is_trained_again_in_its_last_stage(
    tmp_path: Path, fp32: Numerics, replicates: int
) -> None:
    trial = run_in_stages(tmp_path, fp32, replicates=replicates).trials[0]
    assert (trial.status, trial.epochs_done) == ("complete", 3 + 3 * replicates)
    answer = reproduce_stages(tmp_path)
    assert answer.exit_code == 0, answer.output
    which = ", seed 2 of 2" if replicates == 2 else ""
    title = f"c:0 (smoke, baseline, complete, 3 epochs{which}) is trained again, fingerprint "
    assert answer.stdout.startswith(title)
    assert answer.stdout.splitlines()[-1] == "identical over 3 epochs"


@pytest.mark.slow
def test_a_trial_that_diverged_in_its_second_stage_does_so_again(
    tmp_path: Path, fp32: Numerics
) -> None:
    """In its second epoch, which the first stage does not have."""
    state = run_in_stages(tmp_path, fp32, **EXPLODING_KNOBS, batch_size=10)
    trial = state.trials[0]
    assert (trial.status, trial.stage) == ("diverged", 2), trial.reason
    assert (len(trial.epochs), trial.epochs_done) == (1, 2)
    assert trial.config.epochs == 2 and "at epoch 2, step " in trial.reason
    found = json.loads(reproduce_stages(tmp_path, "--json").stdout)
    assert (found["verdict"], found["epochs"]) == ("identical", 1)
    assert found["fingerprint"] == trial.fingerprint
    elsewhere = replace(trial, reason=trial.reason.replace("step ", "step 1"))
    outcome = reproduce_small(state, elsewhere, load_recorded_data(state, trial, SHAPES), fp32)
    assert (outcome.verdict, outcome.first_different) == ("different", 2)


def test_a_trial_that_failed_in_its_second_stage_does_so_again(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third step, which the first stage does not have."""
    monkeypatch.setitem(MODELS, "s7", make_faulty(3, RuntimeError("odd")))
    trial = run_in_stages(tmp_path, fp32).trials[0]
    assert (trial.status, trial.stage, len(trial.epochs), trial.epochs_done) == ("failed", 2, 1, 2)
    answer = reproduce_stages(tmp_path)
    assert answer.exit_code == 0, answer.output
    lines = answer.stdout.splitlines()
    assert lines[-2:] == ["identical over 1 epochs", "It fails again: RuntimeError: odd"]
    monkeypatch.undo()
    answer = reproduce_stages(tmp_path)
    assert answer.exit_code == 1
    assert "It failed in epoch 2 (RuntimeError: odd) and does not fail now" in answer.stdout


def test_a_trial_that_failed_at_the_start_of_its_second_stage_does_so_again(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first step of the second network that is made."""
    made: list[S7Net] = []

    class Faulty(S7Net):
        def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
            if self not in made:
                made.append(self)
            if self.training and made.index(self) == 1:
                raise RuntimeError("odd")
            return super().forward(images_NCHW)

    monkeypatch.setitem(MODELS, "s7", Faulty)
    trial = run_in_stages(tmp_path, fp32).trials[0]
    assert (trial.status, trial.config.epochs) == ("failed", 2)
    assert (trial.epochs, trial.epochs_done) == ([], 1)
    monkeypatch.setitem(MODELS, "s7", make_faulty(1, RuntimeError("odd")))
    answer = reproduce_stages(tmp_path, "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["detail"] == "It fails again: RuntimeError: odd"


# The test set


def read_log(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_is_evaluated_on_the_test_set_once_logged_and_again_only_with_the_option(
    workplace: Path, trained: SearchState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test log is the run store's, although ./analysis is there."""
    # A chunk of the 10,000 images: evaluating all of them takes 10 s in fp32.
    monkeypatch.setattr("tune_cifar.data.shapes._NUM_TEST_IMAGES", 1000)
    (workplace / "analysis").mkdir()
    storage = workplace / "runs"
    rewrite(storage, trained)
    words = ("reproduce", "small:0", "--data", "shapes", "--test", "--no-retrain")
    first = invoke(*words)
    assert first.exit_code == 0, first.output
    path = storage / TEST_LOG_FILE
    (row,) = read_log(path)
    assert tuple(row) == TEST_LOG_COLUMNS and b"\r" not in path.read_bytes()
    assert (row["run_id"], row["data"]) == ("small:0", "shapes")
    assert row["fingerprint"] == trained.trials[0].fingerprint
    assert (row["images"], row["seed"]) == ("1000", "0")
    assert row["command"] == "python -m tune_cifar " + " ".join(words)
    assert row["date"].endswith("Z") and 0 <= float(row["test_acc"]) <= 1
    percent = f"{100 * float(row['test_acc']):.2f} % on 1000 images, NOT CIFAR-10 (shapes)"
    assert f"test accuracy {percent}" in first.stdout and f"written into {path}" in first.stdout
    assert list((workplace / "analysis").iterdir()) == []
    folder = storage / "judge" / "small-0-test"
    evaluation = json.loads((folder / "judgement.json").read_text())
    assert evaluation["title"] == "small:0: 1,000 test images, NOT CIFAR-10 (shapes)"
    assert evaluation["part"] == "test"
    metrics = [str(evaluation[name]) for name in ("accuracy", "loss", "num_images")]
    assert metrics == [row["test_acc"], row["test_loss"], row["images"]], "one evaluation gave both"
    assert f"figures: {folder} (judgement.json, confusion.png, " in first.stdout
    assert all(sentence in first.stdout for sentence in evaluation["warnings"])

    shutil.rmtree(folder)
    content = path.read_bytes()
    # Without weights nothing could be evaluated again.
    shutil.rmtree(search_folder(storage, "small") / "trials")
    second = invoke(*words, "--json")
    assert second.exit_code == 0 and path.read_bytes() == content
    found = json.loads(second.stdout)
    assert found["test_opened_before"] is True
    assert found["test"]["test_acc"] == float(row["test_acc"])
    assert "evaluation" not in found and not folder.exists()
    assert f"evaluated before, for small:0 on {row['date']}; --again" in second.stderr

    folder.parent.rmdir()
    folder.parent.touch()  # figures that cannot be written do not undo the evaluation
    third = invoke("reproduce", "small:0", "--data", "shapes", "--test", "--again", "--json")
    assert third.exit_code == 0, third.output
    found = json.loads(third.stdout)
    assert (found["verdict"], found["test_opened_before"]) == ("identical", False)
    assert found["evaluation"]["confusion"] == evaluation["confusion"]
    assert f"{folder}: the figures cannot be written: Not a directory." in third.stderr
    rows = read_log(path)
    assert len(rows) == 2 and rows[0] == row and rows[1]["test_acc"] == row["test_acc"]
    assert rows[1]["test_loss"] == row["test_loss"], "the new training gives the kept weights"


def test_a_tested_run_is_trained_again_all_the_same(workplace: Path, trained: SearchState) -> None:
    storage = workplace / "runs"
    rewrite(storage, trained, change_epoch(1, train_loss=add_ulp))
    write_log(storage / TEST_LOG_FILE, trained.trials[0], "shapes")
    answer = reproduce(storage, "--test", "--json")
    assert answer.exit_code == 1
    found = json.loads(answer.stdout)
    assert found["verdict"] == "different" and "test" not in found


def write_log(path: Path, trial: TrialState, data: str) -> None:
    row = ("d", "c", trial.fingerprint, 0, trial.run_id, data, 10000, 0.5, 1.5, "x, y")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([OLD_COLUMNS, row])


def test_a_training_that_is_not_complete_is_not_tested(tmp_path: Path, fp32: Numerics) -> None:
    interrupt_small(tmp_path, fp32, epoch=1)
    rule = "only a complete training can be evaluated on the test set"
    for words in (("--test",), ("--test", "--no-retrain")):
        sentence = refuse_run(RecordError, tmp_path, "small:0", *words)
        assert sentence == f"small:0: {rule}, this one is running."


def test_missing_weights_are_refused_with_the_way_out(tmp_path: Path, trained: SearchState) -> None:
    state = rewrite(tmp_path, trained)
    (state.folder / str(state.trials[0].weights_file)).unlink()
    sentence = refuse_run(RecordError, tmp_path, "small:0", "--test", "--no-retrain")
    assert sentence.startswith("small:0: its weights were not kept")
    assert sentence.endswith("Leave out `no_retrain=True` to train it again.")
    assert not (tmp_path / TEST_LOG_FILE).exists()


def test_kept_weights_are_those_of_the_last_epoch(
    trained: SearchState, shapes_small: Any, fp32: Numerics
) -> None:
    trial = trained.trials[0]
    trainer, last = load_trained(trained, trial, shapes_small, fp32), trial.epochs[-1]
    assert trainer.evaluate(shapes_small.val) == (last.val_loss, last.val_acc)
    weights = load_weights(trained.folder / str(trial.weights_file))
    assert set(weights) == set(trainer.model.state_dict())


@pytest.fixture
def without_test(workplace: Path, cifar10: DataSource) -> Path:
    """A folder with links to CIFAR-10's files except the test file."""
    assert cifar10.folder is not None
    folder = workplace / "data" / BATCHES_FOLDER
    folder.mkdir(parents=True)
    for name in FILES:
        if name != TEST_FILE:
            (folder / name).symlink_to(cifar10.folder / BATCHES_FOLDER / name)
    return folder


@pytest.mark.slow
@pytest.mark.real_data
def test_training_works_without_the_test_file_and_the_test_names_it_until_it_is_back(
    workplace: Path, without_test: Path, cifar10: DataSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNE_CIFAR_DATA", raising=False)  # so that ./data is found
    (workplace / "analysis").mkdir()
    source = DataSource("cifar10", without_test.parent)
    quickest = resolve_numerics("cpu", "auto")
    assert train_small(workplace / "runs", quickest, source=source).trials[0].status == "complete"
    words = ("reproduce", "small:0", "--test", "--no-retrain")
    path = workplace / "runs" / TEST_LOG_FILE
    with limit_file_size(10), pytest.raises(RecordError, match=r"the test log cannot be written"):
        raise invoke(*words).exception or AssertionError  # before the test file is looked for
    sentence = refuse(DataError, *words)
    assert f"{without_test / TEST_FILE}: the file is missing." in sentence
    assert read_log(path) == []
    assert cifar10.folder is not None
    (without_test / TEST_FILE).symlink_to(cifar10.folder / BATCHES_FOLDER / TEST_FILE)
    answer = invoke(*words)
    assert answer.exit_code == 0, answer.output
    (row,) = read_log(path)
    assert (row["data"], row["images"]) == ("cifar10", "10000")
    assert row["data_digest"] == CIFAR10_DIGEST
    assert "NOT CIFAR-10" not in answer.stdout
    (without_test / TEST_FILE).unlink()
    assert f"evaluated before, for small:0 on {row['date']}" in invoke(*words).stdout
    # From another folder, which has an analysis/ as well.
    (workplace / "elsewhere" / "analysis").mkdir(parents=True)
    monkeypatch.chdir(workplace / "elsewhere")
    places = ("--storage", str(workplace / "runs"), "--data", str(workplace / "data"))
    answer = invoke(*words, *places)
    assert answer.exit_code == 0, answer.output
    assert f"evaluated before, for small:0 on {row['date']}" in answer.stdout


@pytest.mark.slow
@pytest.mark.real_data
def test_search_works_without_the_test_file(
    workplace: Path, without_test: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNE_CIFAR_DATA", raising=False)
    settings = ("train_size=200", "val_size=100", "batch_size=50", "epochs=2", "pct_start=0.3")
    words = ["search", "--space", "smoke", "--tier", "cpu", "--trials", "2", "--name", "x"]
    words.append("--max-concurrent=1")
    answer = run_in_a_process(*words, *(f"--set={setting}" for setting in settings))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "x ended after" in answer.stdout and not (without_test / TEST_FILE).exists()
    again = run_in_a_process("reproduce", "--best", "--space", "smoke")
    assert "identical over 2 epochs" in again.stdout


def test_without_a_measured_space_a_searchs_confirmation_gives_the_seed_noise(
    tmp_path: Path,
) -> None:
    space = load_space("smoke", "cpu")
    data = DataInfo(name="pets", digest="d", split_hash="h", num_classes=3)
    header = make_header("search", "mine", space, 0, data, NUMERICS, "a test")
    accs = [0.3] * (space.baseline.epochs - 1)
    done = SearchEnded(reason="all trials", wall_seconds=1.0)
    events = [*make_trial(0, [*accs, 0.5], "complete", space.baseline), done]
    state = write_record(tmp_path, header, events)
    assert find_seed_noise(state) is None
    confirmed, settled = make_confirmation(state, 1, 3, {})
    header = make_header("confirm", "mine-confirm", confirmed, 0, data, NUMERICS, "a test")
    events = []
    for number, acc in enumerate((0.50, 0.52, 0.54)):
        candidate, seed = settled.find(number)
        config = TrainConfig(**{**candidate.config, "seed": seed})
        events += make_trial(number, [*accs, acc], "complete", config)
    header = header.model_copy(update={"confirmation": settled})
    confirmation = write_record(tmp_path, header, [*events, done])
    assert find_seed_noise(state) == find_seed_noise(confirmation) == pytest.approx(0.02)
