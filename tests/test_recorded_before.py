"""A run store that version 0.1.0 recorded at commit 2f461d6, before the packages, still opens.

It has two searches of `smoke` on synthetic data, fp32, one thread: `done` (4 trials) and `cut`,
interrupted in its third trial. They were made in an empty folder by these commands, the second
ended by SIGTERM after nine lines of its record:

    S="--space smoke --tier full --data shapes --precision fp32 --set train_size=60"
    S="$S --set val_size=50 --keep-weights 1"
    python -m tune_cifar search $S --set batch_size=5 --trials 4 --name done
    python -m tune_cifar search $S --set train_size=400 --set batch_size=4 --max-concurrent 1 \\
        --trials 4 --name cut

MLflow's absolute artifact locations are stored as `/recorded/`, as in a run store that was moved.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.builders import invoke, refuse
from tune_cifar.errors import ConfigError
from tune_cifar.record.files import CHECKPOINTS
from tune_cifar.record.journal import read_state
from tune_cifar.record.store import find_best, load_searches, search_folder
from tune_cifar.report.trials import load_trials, load_uploaded_trials
from tune_cifar.train.checkpoint import CheckpointFolder, load_weights

ARCHIVE = Path(__file__).parent / "recorded" / "before-the-move.tar.xz"


@pytest.fixture
def recorded(workplace: Path) -> Path:
    """The run store, unpacked."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(workplace, filter="data")
    return workplace / "runs"


def test_records_checkpoints_and_weights_open(recorded: Path) -> None:
    done = read_state(search_folder(recorded, "done"))
    assert done.is_finished and done.counts["complete"] + done.counts["stopped"] == 4
    best = find_best([done], search="done")[1]
    assert best.weights_file is not None
    assert len(load_weights(done.folder / best.weights_file)) > 10
    cut = read_state(search_folder(recorded, "cut"))
    assert not cut.is_finished and cut.trials[2].status == "running"
    state, problems = CheckpointFolder(cut.trial_folder(2) / CHECKPOINTS).load_newest()
    assert state is not None and (state["epoch"], problems) == (1, [])


def test_fingerprints_are_unchanged(recorded: Path) -> None:
    for state in load_searches(recorded):
        for trial in state.trials.values():
            assert trial.config.fingerprint == trial.fingerprint


def test_the_leaderboard_shows_them(recorded: Path) -> None:
    answer = invoke("leaderboard")
    assert answer.exit_code == 0 and "done:0" in answer.stdout and "cut:2" in answer.stdout


@pytest.mark.slow
def test_mlflows_store_opens_and_has_everything_already(recorded: Path) -> None:
    uri = f"sqlite:///{recorded}/mlflow.db"
    uploaded = load_uploaded_trials(uri, "done")
    ours = load_trials(load_searches(recorded, search="done"))
    assert list(uploaded["score"].fillna(-1)) == list(ours["score"].fillna(-1))
    answer = invoke("sync", "--search", "done")
    assert answer.exit_code == 0, answer.output
    line = "done: 0 trials uploaded, 4 already there, 0 runs closed"
    assert answer.stdout.startswith(line), answer.stdout


@pytest.mark.slow
def test_a_run_is_reproduced_and_reported(recorded: Path) -> None:
    answer = invoke("reproduce", "--best", "--search", "done", "--data", "shapes")
    # Another kind of processor may compute other figures, which so few images make far apart.
    assert answer.exit_code == 0 or "numerics differ: capability" in answer.stdout, answer.output
    answer = invoke("report", "--search", "done")
    assert answer.exit_code == 0, answer.output
    assert "done:0" in (recorded / "reports" / "done.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.faults
def test_an_interrupted_search_asks_once_and_is_resumed(recorded: Path) -> None:
    words = ("search", "--name", "cut", "--resume", "--data", "shapes")
    assert "accept_changes=True" in refuse(ConfigError, *words)
    answer = invoke(*words, "--accept-changes")
    assert answer.exit_code == 0, answer.output
    state = read_state(search_folder(recorded, "cut"))
    assert state.is_finished and len(state.trials) == 4
    (event,) = state.resumes  # this processor may differ from the recorded one, too
    assert any(change.startswith("code:") for change in event.changes)
