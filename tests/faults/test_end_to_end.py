"""Faults done to whole searches, on real Ray and real MLflow; test_long.py has the rest (`make test-faults`)."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.lab import (
    Lab,
    check_equal,
    check_whole,
    count_epochs,
    find_free_port,
    interrupt,
    kill,
    serve_mlflow,
    wait_until_it_answers,
)
from tune_cifar.record.events import TrialRetried
from tune_cifar.record.state import SearchState

# In one process of pytest-xdist: the uninterrupted search, which all compare with, is made once.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.xdist_group("end to end")]


def kill_at_random(lab: Lab, dice: random.Random) -> None:
    """Start the search or go on with it, and kill its driver at a random moment: mostly once trials run."""
    process = lab.search()
    if dice.random() < 0.7:
        before = count_epochs(lab.state) if lab.record.exists() else 0
        lab.wait_for(process, lambda state: count_epochs(state) > before or state.is_finished)
    time.sleep(dice.uniform(0.0, 4.0))
    kill(process)


def test_a_search_whose_driver_is_killed_at_random_moments_loses_nothing(
    tmp_path: Path, reference: SearchState
) -> None:
    """KILLS=20 in `make test-faults`."""
    lab, dice = Lab(tmp_path), random.Random(0)
    for _ in range(int(os.environ.get("KILLS", "1"))):
        kill_at_random(lab, dice)
        if lab.record.exists() and lab.state.is_finished:
            lab.finish()  # prints the summary and has nothing to do; the next kills hit what is added now
            lab.options = ("--trials", f"+{dice.randint(2, 4)}")
    lab.options = ()
    text = lab.finish()
    assert "0 lost" in text or "ended after" in text
    check_whole(lab)
    first = {
        number: trial for number, trial in lab.state.trials.items() if number in reference.trials
    }
    state = lab.state
    state.trials = first
    check_equal(state, reference)


def test_a_trial_whose_worker_is_killed_goes_on_to_the_same_curve(
    tmp_path: Path, reference: SearchState
) -> None:
    lab = Lab(tmp_path)
    process = lab.search()
    lab.wait_for(process, lambda state: count_epochs(state) >= 3)
    lab.list_workers()[0].kill()
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    retries = [event for event in lab.list_events() if isinstance(event, TrialRetried)]
    assert [event.fault for event in retries] == ["worker died"]
    assert "The actor died unexpectedly" in retries[0].text
    assert lab.state.counts["failed"] == 0
    check_whole(lab)
    check_equal(lab.state, reference)
    assert "1 x" in lab.run("failures", "--search", "x")


@pytest.mark.parametrize(
    ("number", "is_urgent"),
    [
        (signal.SIGINT, False),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.faults),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.faults),
    ],
)
def test_a_signalled_search_ends_with_130_and_goes_on_to_the_same_curves(
    tmp_path: Path, reference: SearchState, number: signal.Signals, is_urgent: bool
) -> None:
    lab = Lab(tmp_path)
    process = lab.search()
    lab.wait_for(process, lambda state: count_epochs(state) >= 3)
    interrupt(process, number)
    if is_urgent:
        time.sleep(0.2)
        interrupt(process, number)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 130, text
    assert "search --name x --resume --data shapes" in text and "Traceback" not in text
    state = lab.state
    assert state.finished is not None and state.finished.reason == "interrupted"
    assert {run.info.status for run in lab.list_runs()} <= {"FINISHED", "KILLED", "FAILED"}
    if not is_urgent:  # what ran has a checkpoint of its last epoch
        for trial in state.trials.values():
            if trial.status == "running" and trial.epochs:
                newest = max((state.trial_folder(trial.number) / "checkpoints").iterdir())
                assert newest.name == f"checkpoint-{len(trial.epochs):04d}.pt"
    assert "0 lost" in lab.finish()
    check_whole(lab)
    check_equal(lab.state, reference)


@pytest.mark.faults
def test_a_search_whose_records_tail_is_torn_goes_on_and_one_flipped_in_the_middle_is_refused(
    tmp_path: Path, reference: SearchState
) -> None:
    lab = Lab(tmp_path)
    process = lab.search()
    lab.wait_for(process, lambda state: count_epochs(state) >= 6)
    kill(process)
    content = lab.record.read_bytes()
    middle = content.index(b'"epoch"') + 3
    lab.record.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    damaged = lab.record.read_bytes()
    text = lab.run("search", "--resume", "--name", "x", "--data", "shapes", status=1)
    line = content.count(b"\n", 0, middle) + 1
    assert f"record.jsonl:{line}: a line must be JSON that fits its CRC" in text
    assert lab.record.read_bytes() == damaged
    lab.record.write_bytes(content[:-17])
    assert "was torn" in lab.finish()
    check_whole(lab)
    check_equal(lab.state, reference)


@pytest.mark.faults
def test_a_search_ends_the_same_when_mlflow_is_gone_in_the_middle_and_sync_completes_it(
    tmp_path: Path, reference: SearchState
) -> None:
    port = find_free_port()
    uri = f"http://127.0.0.1:{port}"
    lab = Lab(tmp_path, options=("--tracking-uri", uri))
    lab.storage.mkdir()
    with serve_mlflow(lab.storage, port):
        wait_until_it_answers(port)
        process = lab.search()
        lab.wait_for(process, lambda state: state.counts["complete"] + state.counts["stopped"] >= 2)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert "The record is whole" in text and "sync --search x" in text and "Traceback" not in text
    check_equal(lab.state, reference)
    with serve_mlflow(lab.storage, port):
        wait_until_it_answers(port)
        first = lab.run("sync", "--search", "x", "--tracking-uri", uri)
        assert "0 shipped" not in first
        assert "0 trials shipped, 8 already there, 0 runs closed" in lab.run(
            "sync", "--search", "x", "--tracking-uri", uri
        )
    check_whole(lab)


def test_a_search_whose_disk_is_full_ends_with_a_sentence_and_goes_on_when_there_is_room(
    tmp_path: Path, reference: SearchState
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here: it takes root")
    try:
        lab = Lab(tmp_path / "lab", variables={"TUNE_CIFAR_RUNS": str(disk)})
        process = lab.search()
        lab.wait_for(process, lambda state: count_epochs(state) >= 3)
        with (disk / "ballast").open("wb", buffering=0) as ballast:
            while process.poll() is None:  # what the search itself deletes is filled, too
                try:
                    ballast.write(bytes(2**12))
                except OSError:
                    time.sleep(0.01)
        text, _ = process.communicate()
        assert process.returncode == 1, text
        assert re.search(
            r"(must reach the disk|must take it), got 'No space left on device'\. Make room", text
        ), text
        assert "Traceback" not in text
        (disk / "ballast").unlink()
        lab.finish()
        check_whole(lab)
        assert lab.state.counts["failed"] == 0
        check_equal(lab.state, reference)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
