"""A search in processes of its own that faults are done to, and what must hold of it afterwards."""

from __future__ import annotations

import os
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

from tests.faults import SPACE
from tune_cifar.record.events import EpochReported, Event, TrialEnded, decode_event
from tune_cifar.record.journal import read_state
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import REPRODUCIBLE_FIELDS
from tune_cifar.search.rungs import keep

NAME = "x"
# A resumed search starts Ray anew, on a machine that may be busy.
PATIENCE_SECONDS = 600.0


@dataclass
class Lab:
    """One search called x of SPACE, on the stand-in, in a folder of its own.

    Attributes:
        variables: environment of its processes, beside ours.
        options: of every command that searches.
    """

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()

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
        """A command in a process group of its own, as a terminal starts one."""
        environment = (
            os.environ
            | {"TUNE_CIFAR_RUNS": str(self.storage), "PYTHONUNBUFFERED": "1"}
            | self.variables
        )
        return subprocess.Popen(
            [sys.executable, "-m", "tune_cifar", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, status: int = 0) -> str:
        """A command to its end; what it printed: a traceback only where it is asked for one."""
        process = self.start(*words)
        text, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == status, f"{words}: exit status {process.returncode}\n{text}"
        assert words[0] == "failures" or "Traceback (most recent call last)" not in text, text
        return text

    def search(self) -> subprocess.Popen[str]:
        """Start the search, or go on with it."""
        how = (
            ("--resume", "--name", NAME)
            if self.record.exists()
            else ("--space", "faulty", "--name", NAME)
        )
        return self.start("search", *how, "--data", "shapes", *self.options)

    def finish(self) -> str:
        """Start the search or go on with it, to its end."""
        process = self.search()
        text, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, text
        assert self.state.is_finished, text
        return text

    def wait_for(
        self, process: subprocess.Popen[str], holds: Callable[[SearchState], bool]
    ) -> None:
        """Until the record says so."""
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            if self.record.exists() and self.record.stat().st_size and holds(self.state):
                return
            assert process.poll() is None, (
                f"the search ended too early:\n{process.communicate()[0]}"
            )
            time.sleep(0.05)
        raise AssertionError("the record never said so")

    def list_events(self) -> list[Event]:
        lines = self.record.read_bytes().splitlines()
        return [
            event
            for number, line in enumerate(lines, 1)
            if (event := decode_event(number, line)) is not None
        ]

    def list_processes(self) -> list[psutil.Process]:
        """Everything that still runs with this lab's run store in its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TUNE_CIFAR_RUNS") == str(self.storage):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def list_workers(self) -> list[psutil.Process]:
        """The processes that train."""
        return [
            process for process in self.list_processes() if "ray::" in " ".join(process.cmdline())
        ]

    def list_runs(self) -> list[Any]:
        """All MLflow runs of the run store's database."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.storage}/mlflow.db")
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return list(client.search_runs(experiments, max_results=1000))


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 of the driver alone."""
    process.kill()
    process.communicate()


def interrupt(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> None:
    """What Ctrl-C in a terminal does (SIGINT to every process of the group), or `kill` (SIGTERM to the driver)."""
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def check_whole(lab: Lab) -> None:
    """No trial is missing or double, every stop follows from the scores that had arrived, no process is left, and
    MLflow has every trial once and none RUNNING."""
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
    """Walk through the events: a trial was stopped at a rung if and only if the rule says so of the scores by then."""
    state, scores = lab.state, dict[int, dict[int, float]]()
    rungs, factor = state.header.budget["rungs"][:-1], state.header.budget["reduction_factor"]
    must_stop = set()
    for event in lab.list_events():
        if (
            isinstance(event, EpochReported)
            and event.result.epoch in rungs
            and event.score is not None
        ):
            arrived = scores.setdefault(event.result.epoch, {})
            arrived[event.trial] = event.score
            is_baseline = state.trials[event.trial].origin == "baseline"
            if not is_baseline and not keep(event.score, list(arrived.values()), factor):
                must_stop.add(event.trial)
        elif isinstance(event, TrialEnded):
            assert (event.status == "stopped") == (event.trial in must_stop), event


def check_equal(state: SearchState, reference: SearchState) -> None:
    """Every trial has the configuration of the uninterrupted search, and the same curves bit for bit, cycle after
    cycle, as far as both trained them; those that both trained to the end are equal in the end too."""
    assert {n: trial.full_config for n, trial in state.trials.items()} == {
        n: trial.full_config for n, trial in reference.trials.items()
    }
    num_complete = 0
    for number, trial in state.trials.items():
        other = reference.trials[number]
        curves = [
            [(c, [getattr(r, name) for name in REPRODUCIBLE_FIELDS]) for c, r in t.trained_epochs]
            for t in (trial, other)
        ]
        length = min(map(len, curves))
        assert curves[0][:length] == curves[1][:length], f"trial {number}"
        if trial.status == other.status == "complete":
            assert trial.score == other.score
            num_complete += 1
    assert num_complete >= 1, "no trial was trained to its end by both"


def count_epochs(state: SearchState) -> int:
    return sum(trial.epochs_done for trial in state.trials.values())


@contextmanager
def serve_mlflow(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A real MLflow server on loopback that keeps its runs in the folder."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    server = subprocess.Popen(
        command,
        env=environment,
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


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
