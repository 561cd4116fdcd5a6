"""A search in its own processes to inject faults into, and the checks of what it left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.builders import curve
from tests.faults import SPACE
from tune_cifar.record.events import EpochReported, Event, TrialEnded, decode_event
from tune_cifar.record.journal import read_state
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.record.store import search_folder
from tune_cifar.search.rungs import is_promoted, list_compared

NAME = "x"
# What a resumed search says of its record.
RESTORED = re.compile(r"\d+ trials?; \d+ rungs? with \d+ scores?")
# A resumed search starts Ray again, on a machine that may be busy.
PATIENCE_SECONDS = 600.0


@dataclass
class Lab:
    """One search of SPACE called x, on synthetic data, in its own folder.

    Attributes:
        variables: environment variables of its processes, added to ours.
        options: options of every command that searches.
        prefix: words before every command, such as those that run it on another machine.
    """

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        (self.folder / "search_spaces").mkdir(parents=True, exist_ok=True)
        (self.folder / "search_spaces" / "faulty.yaml").write_text(SPACE, encoding="utf-8")

    @property
    def storage(self) -> Path:
        return Path(self.variables.get("TUNE_CIFAR_RUNS", self.folder / "runs"))

    @property
    def record(self) -> Path:
        return search_folder(self.storage, NAME) / "record.jsonl"

    @property
    def state(self) -> SearchState:
        return read_state(self.record.parent)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command in its own process group, as a terminal does."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | self.variables
        environment["TUNE_CIFAR_RUNS"] = str(self.storage)
        return subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "tune_cifar", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, status: int = 0) -> str:
        """Run a command to its end; returns what it printed, no traceback unless of `failures`."""
        process = self.start(*words)
        text, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == status, f"{words}: exit status {process.returncode}\n{text}"
        assert words[0] == "failures" or "Traceback (most recent call last)" not in text, text
        return text

    def search(self) -> subprocess.Popen[str]:
        """Start the search, or resume it once it has a record."""
        how = ("--resume",) if self.record.exists() else ("--space", "faulty")
        return self.start("search", *how, "--name", NAME, "--data", "shapes", *self.options)

    def finish(self) -> str:
        """Start or resume the search and wait for its end; returns what it printed."""
        process = self.search()
        text, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, text
        assert self.state.is_finished, text
        return text

    def wait_for(
        self, process: subprocess.Popen[str], holds: Callable[[SearchState], bool]
    ) -> None:
        """Wait until `holds` is true of the record's state."""
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            if self.record.exists() and self.record.stat().st_size and holds(self.state):
                return
            if process.poll() is not None:
                raise AssertionError(f"the search ended too early:\n{process.communicate()[0]}")
            time.sleep(0.05)
        raise AssertionError("the record never reached the expected state")

    def list_events(self) -> list[Event]:
        lines = self.record.read_bytes().splitlines()
        events = [decode_event(number, line) for number, line in enumerate(lines, 1)]
        return [event for event in events if event is not None]

    def list_processes(self) -> list[psutil.Process]:
        """Return all processes with this lab's run store in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TUNE_CIFAR_RUNS") == str(self.storage):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def list_workers(self) -> list[psutil.Process]:
        """Return the processes that train, by Ray's name for them."""
        return self.list_titled("ray::ResourceTrainable")

    def list_titled(self, title: str) -> list[psutil.Process]:
        """Return the processes whose command line has this in it."""
        return [found for found in self.list_processes() if title in " ".join(found.cmdline())]

    def list_runs(self) -> list[Any]:
        """Return all MLflow runs of the run store's database."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.storage}/mlflow.db")
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return list(client.search_runs(experiments, max_results=1000))


def kill(process: subprocess.Popen[str]) -> None:
    """Send kill -9 to the driver alone."""
    process.kill()
    process.communicate()


def interrupt(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> None:
    """Press Ctrl-C (SIGINT to every process of the group) or send another signal to the driver."""
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def check_complete(lab: Lab) -> None:
    """Check a finished search: its trials, its decisions, its processes and its MLflow runs.

    No trial is missing or double, no process is left, and no run of MLflow is RUNNING.
    """
    state = lab.state
    assert state.is_finished and list(state.trials) == list(range(state.num_trials))
    assert state.counts["running"] == 0
    check_decisions(lab)
    end = time.monotonic() + 120
    while (left := lab.list_processes()) and time.monotonic() < end:
        time.sleep(0.5)
    assert not left, [process.cmdline() for process in left]
    runs = lab.list_runs()
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED", "FAILED"}
    children = [run.data.tags["run_id"] for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert sorted(children) == sorted(trial.run_id for trial in state.trials.values())
    assert len(runs) == len(children) + 1


def check_decisions(lab: Lab) -> None:
    """Check that exactly those trials were stopped that the rule stops, given the scores so far."""
    state, scores = lab.state, dict[int, dict[int, float]]()
    rungs, factor = state.header.budget["rungs"][:-1], state.header.budget["reduction_factor"]
    must_stop = set()
    for event in lab.list_events():
        if isinstance(event, TrialEnded):
            assert (event.status == "stopped") == (event.trial in must_stop), event
        if not isinstance(event, EpochReported) or event.score is None:
            continue
        if event.result.epoch in rungs:
            at_rung = scores.setdefault(event.result.epoch, {})
            at_rung[event.trial] = event.score
            is_baseline = state.trials[event.trial].origin == "baseline"
            compared = list_compared(list(at_rung.values()), state.header.budget["window"])
            if not is_baseline and not is_promoted(event.score, compared, factor):
                must_stop.add(event.trial)


def check_equal(state: SearchState, reference: SearchState) -> None:
    """Check that every trial is the one of the uninterrupted search, bit for bit.

    Configurations are equal, and so are the curves of every stage as far as both trained it.
    """
    assert state.trials.keys() == reference.trials.keys()
    num_complete = 0
    for number, trial in state.trials.items():
        other = reference.trials[number]
        assert trial.full_config == other.full_config
        ours, theirs = list_curve(trial), list_curve(other)
        length = min(len(ours), len(theirs))
        assert ours[:length] == theirs[:length], f"trial {number}"
        if trial.status == other.status == "complete":
            assert trial.score == other.score
            num_complete += 1
    assert num_complete >= 1, "no trial was trained to its end by both"


def list_curve(trial: TrialState) -> list[Any]:
    """Return the reproducible values of every epoch, with the length of its stage."""
    return [(length, curve([result])) for length, result in trial.trained_epochs]


def count_epochs(state: SearchState) -> int:
    return sum(trial.epochs_done for trial in state.trials.values())


@contextmanager
def serve_mlflow(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a real MLflow server on loopback that keeps its runs in the folder."""
    options = {
        "host": "127.0.0.1",
        "port": str(port),
        "workers": "1",
        "backend-store-uri": f"sqlite:///{folder}/mlflow.db",
        "artifacts-destination": str(folder / "files"),
    }
    words = [f"--{name}={text}" for name, text in options.items()]
    variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words],
        env=os.environ | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_it_answers(port: int) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("MLflow's server never answered")
