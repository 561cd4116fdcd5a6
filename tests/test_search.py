"""A whole search on real Ray and real MLflow: what it records, stops, keeps and refuses; and the driver without Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHAPES
from tune_cifar.driver import SearchDriver
from tune_cifar.errors import ConfigError
from tune_cifar.record import Record, SearchState, read_state, search_folder
from tune_cifar.schema import EpochResult, Numerics
from tune_cifar.search import SearchRequest, resolve_resources
from tune_cifar.space import SearchSpace, load_space
from tune_cifar.train import make_header

# A pinned pct_start: in so few steps the smallest searched one would be no warm-up at all, and is refused.
SMALL = {"train_size": 400, "val_size": 200, "batch_size": 8, "pct_start": 0.3}


def make_space(trials: int = 9, **changes: Any) -> SearchSpace:
    """The smoke space with rungs 1 and 3, three epochs and no time limit."""
    space = load_space("smoke", "cpu", {**SMALL, "epochs": 3})
    budget = {"rungs": (1, 3), "trials": trials, "reduction_factor": 3, "max_time_seconds": None, **changes}
    return dataclasses.replace(space, budget=space.budget.model_copy(update=budget))


@pytest.fixture
def driver(tmp_path: Path, fp32: Numerics) -> Any:
    space = make_space()
    info = {"name": "shapes", "digest": "d", "split_hash": "s"}
    header = make_header("search", "x", space, 0, _info(info), fp32, "test")
    with Record.create(search_folder(tmp_path, "x"), header) as record:
        yield SearchDriver(record, space, lambda state, event: None)


def _info(values: dict[str, Any]) -> Any:
    from tune_cifar.schema import DataInfo

    return DataInfo(**values)


def result_of(epoch: int, val_acc: float) -> EpochResult:
    """An epoch's result that says val_acc and nothing else of interest."""
    return EpochResult(
        epoch=epoch,
        step=epoch * 4,
        train_loss=1.0,
        train_acc=0.5,
        val_loss=1.0,
        val_acc=val_acc,
        lr=0.1,
        epoch_seconds=1.0,
        images_per_second=100.0,
        peak_memory_mb=100.0,
    )


def test_driver_asks_for_the_baseline_first_and_then_the_points(driver: SearchDriver) -> None:
    first, second = driver.ask(), driver.ask()
    assert first is not None and second is not None
    assert (first.origin, second.origin) == ("baseline", "point")
    assert first.config == make_space().baseline


def test_driver_stops_the_worse_at_a_rung_and_never_the_baseline(driver: SearchDriver) -> None:
    for _ in range(4):
        driver.ask()
    assert driver.report(1, result_of(1, 0.5))  # the first at the rung goes on
    assert driver.report(0, result_of(1, 0.2))  # the baseline goes on although it is worse
    assert not driver.report(2, result_of(1, 0.3))
    assert driver.report(3, result_of(1, 0.6))
    trials = driver.record.state.trials
    assert [trials[n].status for n in range(4)] == ["running", "running", "stopped", "running"]
    assert trials[2].reason == "rung 1: 1 of 3 scores were better"


def test_driver_completes_a_trial_at_its_last_epoch_only(driver: SearchDriver) -> None:
    driver.ask()
    assert driver.report(0, result_of(1, 0.9))
    assert driver.report(0, result_of(2, 0.8))
    assert not driver.report(0, result_of(3, 0.7))
    trial = driver.record.state.trials[0]
    assert (trial.status, trial.score) == ("complete", 0.7)


def test_driver_passes_over_epochs_that_a_resumed_trial_tells_again(driver: SearchDriver) -> None:
    driver.ask()
    driver.report(0, result_of(1, 0.4))
    assert driver.report(0, result_of(1, 0.4))
    assert driver.record.state.trials[0].epochs_done == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_driver_keeps_only_the_best_trials_weights(driver: SearchDriver, order: tuple[int, int]) -> None:
    for number in (0, 1):
        driver.ask()
        weights = driver.record.state.trial_folder(number) / "weights.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(b"weights")
    for number in order:
        for epoch in (1, 2, 3):
            driver.report(number, result_of(epoch, (0.5, 0.7)[number] + epoch / 100))
    kept = [n for n in (0, 1) if (driver.record.state.trial_folder(n) / "weights.safetensors").exists()]
    assert kept == [1]


def test_driver_cuts_running_trials_when_it_finishes_early(driver: SearchDriver) -> None:
    driver.ask()
    driver.report(0, result_of(1, 0.4))
    driver.finish()
    state = read_state(driver.record.state.folder)
    assert state.finished is not None and state.finished.reason == "interrupted"
    assert state.trials[0].status == "stopped" and state.trials[0].reason == "cut after epoch 1: interrupted"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cpus_per_trial": 0}, r"--cpus-per-trial: 1 to \d+ \(the cores here\) must hold, got 0"),
        ({"cpus_per_trial": 9999}, r"--cpus-per-trial: 1 to \d+ \(the cores here\) must hold, got 9999"),
        ({"gpus_per_trial": 0.5}, "--gpus-per-trial: 0 must hold on a CPU, got 0.5"),
        ({"max_concurrent": 0}, "--max-concurrent: a number >= 1 must be given, got 0"),
    ],
)
def test_resources_that_do_not_fit_are_refused(
    tmp_path: Path, fp32: Numerics, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve_resources(SearchRequest(SHAPES, tmp_path, "test", **changes), fp32, 0)


@pytest.mark.parametrize(
    ("gpus", "num_gpus", "fits"), [(0.25, 1, 4), (0.5, 2, 4), (1.0, 2, 2), (2.0, 2, 1), (0.3, 1, 3)]
)
def test_trials_are_packed_on_gpus_by_their_fractions(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch, gpus: float, num_gpus: int, fits: int
) -> None:
    monkeypatch.setattr("psutil.Process.cpu_affinity", lambda self: list(range(64)))
    on_gpu = fp32.model_copy(update={"device": "cuda"})
    request = SearchRequest(SHAPES, tmp_path, "test", gpus_per_trial=gpus)
    assert resolve_resources(request, on_gpu, num_gpus).max_concurrent == fits


def test_a_gpu_count_that_is_neither_a_fraction_nor_whole_is_refused(tmp_path: Path, fp32: Numerics) -> None:
    on_gpu = fp32.model_copy(update={"device": "cuda"})
    with pytest.raises(ConfigError, match=r"a whole number must be given, got 1\.5"):
        resolve_resources(SearchRequest(SHAPES, tmp_path, "test", gpus_per_trial=1.5), on_gpu, 2)


# From here on: whole searches.


def run_cli(folder: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, in an empty folder."""
    command = [sys.executable, "-m", "tune_cifar", *words]
    environment = os.environ | {"TUNE_CIFAR_RUNS": str(folder / "runs")}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=240, **options)


SEARCH = ("search", "--space", "smoke", "--data", "shapes", "--tier", "cpu")
SETTINGS = tuple(word for name, value in SMALL.items() for word in ("--set", f"{name}={value}"))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchState, str]:
    """One finished search of 6 trials on the stand-in: its folder, its record and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    # One at a time, so that scores reach a rung in one order and the same trials are stopped every time.
    words = ("--set", "epochs=3", "--trials", "6", "--name", "demo", "--seed", "3", "--max-concurrent", "1")
    answer = run_cli(folder, *SEARCH, *SETTINGS, *words)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return folder, read_state(search_folder(folder / "runs", "demo")), answer.stdout + answer.stderr


@pytest.mark.slow
def test_a_search_records_every_trial_to_its_end(searched: tuple[Path, SearchState, str]) -> None:
    _, state, _ = searched
    assert state.finished is not None and state.finished.reason == "all trials"
    assert len(state.trials) == 6 and state.counts["running"] == 0 and state.counts["failed"] == 0
    assert state.trials[0].origin == "baseline" and state.trials[0].status == "complete"
    assert state.counts["stopped"] >= 1
    assert len({trial.fingerprint for trial in state.trials.values()}) == 6
    assert {trial.config.seed for trial in state.trials.values()} == {0}


@pytest.mark.slow
def test_a_search_says_what_it_does_and_what_comes_next(searched: tuple[Path, SearchState, str]) -> None:
    _, _, text = searched
    assert "NOT CIFAR-10" in text
    assert "An epoch of the baseline takes about" in text
    assert "gain over the baseline (" in text or "No trial beat the baseline" in text
    assert "reproduce --best --search demo --data shapes" in text
    assert "pinned for all trials: " in text and "epochs = 3" in text
    assert "ray" not in text.lower() and "Traceback" not in text


@pytest.mark.slow
def test_a_pinned_knob_holds_for_all_trials_and_trial_0_too(searched: tuple[Path, SearchState, str]) -> None:
    _, state, _ = searched
    assert {trial.config.batch_size for trial in state.trials.values()} == {8}
    assert "batch_size" not in state.header.distributions


@pytest.mark.slow
def test_mlflow_shows_one_parent_and_a_child_per_trial(searched: tuple[Path, SearchState, str]) -> None:
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
def test_the_best_trial_comes_back_bit_for_bit_in_a_fresh_process(searched: tuple[Path, SearchState, str]) -> None:
    folder, state, _ = searched
    answer = run_cli(folder, "reproduce", "--best", "--search", "demo", "--data", "shapes", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["verdict"] == "identical"
    assert state.best is not None and json.loads(answer.stdout)["run_id"] == state.best.run_id


@pytest.mark.slow
def test_the_leaderboard_lists_every_trial(searched: tuple[Path, SearchState, str]) -> None:
    folder, state, _ = searched
    rows = json.loads(run_cli(folder, "leaderboard", "--search", "demo", "--json").stdout)
    assert {row["run_id"]: row["status"] for row in rows} == {
        trial.run_id: trial.status for trial in state.trials.values()
    }


@pytest.mark.slow
def test_a_taken_name_is_refused(searched: tuple[Path, SearchState, str]) -> None:
    folder, _, _ = searched
    answer = run_cli(folder, *SEARCH, "--name", "demo")
    assert answer.returncode == 1
    assert "demo" in answer.stderr and answer.stderr.count("error") == 1 and "Traceback" not in answer.stderr


@pytest.mark.slow
def test_ctrl_c_ends_a_search_cleanly_with_a_summary(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tune_cifar", *SEARCH, *SETTINGS, "--set", "epochs=200", "--name", "cut"]
    environment = os.environ | {"TUNE_CIFAR_RUNS": str(tmp_path / "runs")}
    search = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment
    )
    record = search_folder(tmp_path / "runs", "cut") / "record.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (record.exists() and '"epoch"' in record.read_text()):
        time.sleep(0.2)
    search.send_signal(signal.SIGINT)
    text, _ = search.communicate(timeout=90)
    assert search.returncode == 130, text
    state = read_state(record.parent)
    assert state.finished is not None and state.finished.reason == "interrupted"
    assert state.counts["running"] == 0 and "cut ended after" in text and "Traceback" not in text


@pytest.mark.slow
def test_a_trial_that_raises_is_reported_with_its_traceback_and_the_search_goes_on(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    # A folder where trial 1's weights must go: writing them fails, whatever the user's rights.
    (runs / "searches").mkdir(parents=True)
    script = (
        "from pathlib import Path\n"
        "from tune_cifar.data import find_data\n"
        "from tune_cifar.search import SearchRequest, prepare_search, run_search\n"
        "from tune_cifar.space import load_space\n"
        "from tune_cifar.record import TrialStarted\n"
        f"space = load_space('smoke', 'cpu', {dict(SMALL, epochs=2)!r}).limit(4, None)\n"
        f"request = SearchRequest(find_data('shapes'), Path({str(runs)!r}), 'test', name='faulty')\n"
        "def block(state, event):\n"
        "    if isinstance(event, TrialStarted) and event.trial == 0:\n"
        "        (state.trial_folder(0) / 'weights.safetensors' / 'x').mkdir(parents=True)\n"
        "run_search(prepare_search(space, request), block)\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr[-3000:]
    state = read_state(search_folder(runs, "faulty"))
    assert state.trials[0].status == "failed" and state.trials[0].error_file is not None
    assert "Traceback" in (state.folder / state.trials[0].error_file).read_text()
    assert state.counts["complete"] >= 1 and len(state.trials) == 4


def test_a_request_prefers_the_cpu_tier_without_a_gpu(tmp_path: Path) -> None:
    assert SearchRequest(SHAPES, tmp_path, "test", device="cpu").default_tier == "cpu"
