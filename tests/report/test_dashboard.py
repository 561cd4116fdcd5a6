"""Recorded searches as Optuna studies, and that optuna-dashboard shows them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from urllib.request import urlopen

import optuna
import psutil
import pytest
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.trial import TrialState

from tests.builders import (
    CONFIG,
    ROOT,
    invoke,
    make_header,
    make_staged_trial,
    make_start,
    make_trial,
    refuse,
    simulate_search,
    write_record,
)
from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record.events import EpochReported, TrialEnded
from tune_cifar.record.state import SearchState
from tune_cifar.report.dashboard import make_studies
from tune_cifar.search.sampler import list_distributions

MAX_LR = distribution_to_json(FloatDistribution(0.001, 1.0, log=True))


def load_study(states: list[SearchState], name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=make_studies(states))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> SearchState:
    """A simulated search of 12 trials in stages; trial 5 diverged."""
    return simulate_search(tmp_path_factory.mktemp("runs"), 12, diverging=5)


def test_a_study_says_of_every_trial_what_the_record_says(
    searched: SearchState, tmp_path: Path
) -> None:
    study = load_study([searched], "x")
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert study.metric_names == ["score"]
    assert study.user_attrs["space"] == "smoke" and study.user_attrs["data"] == "cifar10"
    assert len(study.trials) == 12
    states = {
        "complete": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "diverged": TrialState.PRUNED,
    }
    for number, found in enumerate(study.trials):
        trial = searched.trials[number]
        assert found.state == states[trial.status] and found.params == trial.params
        assert found.distributions == list_distributions(searched.header)
        scores = {0: 0.1} if trial.status == "diverged" else trial.scores
        assert found.intermediate_values == scores
        values = {"complete": trial.score, "stopped": trial.val_acc, "diverged": 0.1}
        assert found.value == values[trial.status]
        names = ("run_id", "status", "origin", "reason", "epochs_done", "fingerprint")
        assert found.user_attrs == {name: getattr(trial, name) for name in names}
        assert trial.started is not None and trial.ended is not None
        assert found.datetime_start is not None and found.datetime_complete is not None
        assert found.datetime_start.astimezone() == datetime.fromisoformat(trial.started)
        assert found.datetime_complete.astimezone() == datetime.fromisoformat(trial.ended)
    assert searched.best is not None and study.best_trial.number == searched.best.number
    assert {trial.status for trial in searched.trials.values()} == set(states)


def test_a_conditional_search_shows_each_trial_with_its_active_knobs(tmp_path: Path) -> None:
    state = simulate_search(tmp_path, 12, name="s8")
    found = load_study([state], "x").trials
    assert [trial.params for trial in found] == [trial.params for trial in state.trials.values()]
    assert {len(trial.params) for trial in found} == {3, 6}
    assert all(set(trial.distributions) == set(trial.params) for trial in found)


def test_every_ending_and_none_has_its_state(tmp_path: Path) -> None:
    """Written by hand: stopped before the first rung and between two, failed, still running."""
    header = make_header(distributions={"max_lr": MAX_LR}, budget={"trials": 6, "rungs": [2, 3]})
    events = [
        *make_trial(0, [0.3, 0.5, 0.7], "complete"),
        *make_trial(1, [0.2], "stopped"),
        *make_trial(2, [0.2, 0.4], "stopped"),
        *make_trial(3, [0.2], "failed"),
        *make_trial(4, [0.6, 0.65], None),
        *make_trial(5, [0.6], "diverged"),
    ]
    state = write_record(tmp_path, header, events)
    trials = load_study([state], "s7-1").trials
    assert [(trial.state.name, trial.value, trial.intermediate_values) for trial in trials] == [
        ("COMPLETE", 0.7, {1: 0.3, 2: 0.5, 3: 0.7}),
        ("FAIL", None, {1: 0.2}),
        ("PRUNED", 0.4, {1: 0.2, 2: 0.4}),
        ("FAIL", None, {1: 0.2}),
        ("RUNNING", None, {1: 0.6, 2: 0.65}),
        ("PRUNED", 0.1, {0: 0.1}),
    ]
    assert trials[4].datetime_complete is None
    statuses = [trial.status for trial in state.trials.values()]
    assert [trial.user_attrs["status"] for trial in trials] == statuses


def test_only_searches_have_studies_and_all_of_them_stand_on_one_page(tmp_path: Path) -> None:
    complete, running = make_trial(0, [0.3, 0.5, 0.7], "complete"), make_trial(0, [0.4], None)
    events = {"a": complete, "b": make_staged_trial(0, {1: [0.5]}, None), "new": []}
    training = make_header("t", kind="train", distributions={})
    states = [write_record(tmp_path, training, running)]
    for name, found in events.items():
        header = make_header(name, distributions={"max_lr": MAX_LR})
        states.append(write_record(tmp_path, header, found))
    assert optuna.get_all_study_names(make_studies(states)) == ["a", "b", "new"]
    assert load_study(states, "b").trials[0].intermediate_values == {1: 0.5}
    assert load_study(states, "new").trials == []


def test_a_record_without_times_is_exported_too(tmp_path: Path) -> None:
    header = make_header(distributions={"max_lr": MAX_LR})
    start, *rest = make_trial(0, [0.3, 0.5, 0.7], "complete")
    assert start == make_start(0) and start.time is None and isinstance(rest[-1], TrialEnded)
    assert rest[-1].time is None and isinstance(rest[0], EpochReported)
    state = write_record(tmp_path, header, [start, *rest])
    (trial,) = load_study([state], "s7-1").trials
    created = datetime.fromisoformat(header.created).astimezone().replace(tzinfo=None)
    assert trial.datetime_start == trial.datetime_complete == created
    assert trial.params == {"max_lr": CONFIG.max_lr}


def test_what_cannot_be_shown_is_refused_in_a_sentence(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hint = "Run a search first, or give another `storage`."
    assert refuse(RecordError, "ui", "--optuna") == f"`optuna`: nothing is recorded. {hint}"
    training = make_header("t", kind="train", distributions={})
    write_record(workplace / "runs", training, make_trial(0, [0.4], None))
    rule = "no search is recorded, only t (a single training)"
    assert refuse(RecordError, "ui", "--optuna") == f"`optuna`: {rule}. {hint}"
    assert "'u'" in refuse(RecordError, "ui", "--optuna", "--search", "u")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sentence = refuse(ConfigError, "ui", "--optuna")
    assert sentence.startswith("optuna-dashboard is not installed. Run `python -m pip install opt")


@pytest.mark.parametrize(
    "words",
    [("--search", "x"), ("--optuna", "--tracking-uri", "sqlite:///x.db")],
    ids=lambda words: words[-2],
)
def test_options_of_the_other_page_are_wrong_usage(workplace: Path, words: tuple[str, ...]) -> None:
    answer = invoke("ui", *words)
    assert answer.exit_code == 2 and words[-2] in answer.output


@pytest.mark.slow
def test_ui_optuna_shows_the_search_and_ends_with_ctrl_c(
    searched: SearchState, tmp_path: Path
) -> None:
    """The command in a process of its own; it leaves no file."""
    words = ("ui", "--optuna", "--storage", str(searched.storage))
    command = [sys.executable, "-m", "tune_cifar", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = r"(http://127\.0\.0\.1:\d+)"
        found = re.fullmatch(rf"optuna-dashboard: {address}  \(Ctrl-C ends it\)\n", line)
        assert found is not None, line
        with urlopen(found[1], timeout=120) as page:
            assert page.status == 200 and b"Optuna Dashboard" in page.read()
        with urlopen(f"{found[1]}/api/studies", timeout=120) as answer:
            (study,) = json.load(answer)["study_summaries"]
        assert study["study_name"] == "x"
        with urlopen(f"{found[1]}/api/studies/{study['study_id']}", timeout=120) as answer:
            trials = json.load(answer)["trials"]
        names = {"complete": "Complete", "stopped": "Pruned", "diverged": "Pruned"}
        states = [names[trial.status] for trial in searched.trials.values()]
        assert [trial["state"] for trial in trials] == states
        assert psutil.Process(process.pid).children(recursive=True) == []
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (0, "ended\n", "")
        assert list(tmp_path.iterdir()) == []
    finally:
        process.terminate()  # ends the page too
        process.communicate(timeout=120)
