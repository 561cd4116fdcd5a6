"""Faults injected into complete searches, with real Ray and real MLflow.

test_long.py has the rest (`make test-faults`).
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.builders import find_free_port
from tests.faults.disks import mount_small_disk
from tests.faults.lab import (
    RESTORED,
    Lab,
    check_complete,
    check_equal,
    count_epochs,
    interrupt,
    kill,
    serve_mlflow,
    wait_until_it_answers,
)
from tune_cifar.record.events import TrialRetried
from tune_cifar.record.state import SearchState

# One process of pytest-xdist runs them all: `reference`, which they compare with, is made once.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.xdist_group("end to end")]


def kill_at_random(lab: Lab, generator: random.Random) -> None:
    """Start or resume the search and kill its driver at a random moment, mostly once trials run."""
    process = lab.search()
    if generator.random() < 0.7:
        before = count_epochs(lab.state) if lab.record.exists() else 0
        lab.wait_for(process, lambda state: count_epochs(state) > before or state.is_finished)
    time.sleep(generator.uniform(0.0, 4.0))
    kill(process)


def test_a_search_whose_driver_is_killed_at_random_moments_loses_nothing(
    tmp_path: Path, reference: SearchState
) -> None:
    """KILLS=20 in `make test-faults`."""
    # Its first kill comes 0.4 s after the first epoch.
    lab, generator = Lab(tmp_path), random.Random(4)
    for _ in range(int(os.environ.get("KILLS", "1"))):
        kill_at_random(lab, generator)
        if lab.record.exists() and lab.state.is_finished:
            lab.finish()  # prints the summary and does nothing else
            # The next kills hit the trials that are added now.
            lab.options = ("--trials", f"+{generator.randint(2, 4)}")
    lab.options = ()
    is_over = lab.state.is_finished
    text = lab.finish()
    assert RESTORED.search(text) or is_over
    check_complete(lab)
    state = lab.state
    state.trials = {number: state.trials[number] for number in reference.trials}
    check_equal(state, reference)


def test_a_trial_whose_worker_is_killed_is_resumed_to_the_same_curve(
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
    check_complete(lab)
    check_equal(lab.state, reference)
    assert "1 x" in lab.run("failures", "--search", "x")


@pytest.mark.faults
def test_a_search_whose_ray_has_ended_says_so_and_is_resumed_to_the_same_curves(
    tmp_path: Path, reference: SearchState
) -> None:
    """Ray's node ends with its agent. Tune alone would wait forever."""
    lab = Lab(tmp_path)
    process = lab.search()
    lab.wait_for(process, lambda state: count_epochs(state) >= 3)
    (node,) = lab.list_titled("/raylet/raylet ")
    titles = {child: " ".join(child.cmdline()) for child in node.children()}
    (agent,) = (child for child, title in titles.items() if "ray::DashboardAgent" in title)
    agent.kill()
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 1, text
    assert "error ray: its processes on this machine have ended." in text
    assert "Traceback" not in text
    lab.finish()
    check_complete(lab)
    check_equal(lab.state, reference)


@pytest.mark.parametrize(
    ("number", "is_urgent"),
    [
        (signal.SIGINT, False),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.faults),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.faults),
    ],
)
def test_a_signalled_search_ends_with_130_and_is_resumed_to_the_same_curves(
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
    if not is_urgent:  # running trials have a checkpoint of their last epoch
        for trial in state.trials.values():
            if trial.status == "running" and trial.epochs:
                newest = max((state.trial_folder(trial.number) / "checkpoints").iterdir())
                assert newest.name == f"checkpoint-{len(trial.epochs):04d}.pt"
    assert RESTORED.search(lab.finish())
    check_complete(lab)
    check_equal(lab.state, reference)


@pytest.mark.faults
def test_a_record_with_a_torn_tail_is_resumed_and_one_with_a_flipped_bit_is_refused(
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
    assert f"record.jsonl:{line}: damaged line, not JSON that fits its CRC" in text
    assert lab.record.read_bytes() == damaged
    lab.record.write_bytes(content[:-17])
    assert "was torn" in lab.finish()
    check_complete(lab)
    check_equal(lab.state, reference)


@pytest.mark.faults
def test_a_search_that_loses_its_mlflow_server_ends_the_same_and_sync_completes_it(
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
    assert "The record is complete" in text and "sync --search x" in text
    assert "Traceback" not in text
    check_equal(lab.state, reference)
    with serve_mlflow(lab.storage, port):
        wait_until_it_answers(port)
        sync = ("sync", "--search", "x", "--tracking-uri", uri)
        assert ": 0 trials uploaded" not in lab.run(*sync)
        assert "0 trials uploaded, 8 already there, 0 runs closed" in lab.run(*sync)
    check_complete(lab)


@pytest.mark.faults
def test_a_search_on_a_full_disk_ends_with_a_sentence_and_is_resumed_once_there_is_space(
    tmp_path: Path, reference: SearchState
) -> None:
    with mount_small_disk(tmp_path / "disk", num_kb=64 * 1024) as disk:
        lab = Lab(tmp_path / "lab", variables={"TUNE_CIFAR_RUNS": str(disk)})
        process = lab.search()
        lab.wait_for(process, lambda state: count_epochs(state) >= 3)
        with (disk / "ballast").open("wb", buffering=0) as ballast:
            while process.poll() is None:  # also fill the space of files that the search deletes
                try:
                    ballast.write(bytes(2**12))
                except OSError:
                    time.sleep(0.01)
        text, _ = process.communicate()
        assert process.returncode == 1, text
        rule = r"cannot write .*: No space left on device\. Make room"
        assert re.search(rule, text) and "Traceback" not in text, text
        (disk / "ballast").unlink()
        lab.finish()
        check_complete(lab)
        assert lab.state.counts["failed"] == 0
        check_equal(lab.state, reference)
