"""Every MLflow call and every key name. Runs are shipped from the record by the driver alone, in one background thread;
trainings never talk to MLflow, and a tracking fault never hurts a search.

What stands where: one experiment per space; one parent run per search (or per single training's record); one child run
per trial, with the living knobs as params, the epoch's figures as metrics and the config, Numerics and environment as
artifacts.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from tune_cifar.errors import TrackingError
from tune_cifar.record import Event, SearchEnded, SearchState, TrialEnded, TrialState
from tune_cifar.schema import Status, dead_knobs

# Metrics of a child run, one point per epoch (the metric's step is the epoch); a complete trial has its `score` too.
EPOCH_METRICS = ("train_loss", "train_acc", "val_loss", "val_acc", "lr", "images_per_second")
# MLflow's own word for each of our states.
RUN_STATUS: dict[Status, str] = {
    "complete": "FINISHED",
    "stopped": "KILLED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "running": "RUNNING",
}
# A log_batch call takes at most this many metrics.
MAX_METRICS_PER_BATCH = 1000
# Another search may hold the database's write lock for so long.
SQLITE_TIMEOUT_SECONDS = 10.0


def make_tracking_uri(storage: Path, option: str | None) -> str:
    """The tracking address: the option, else an absolute SQLite address under the run store."""
    return option or f"sqlite:///{storage}/mlflow.db"


class Tracker:
    """Ships one record's runs to MLflow. All calls are made from one thread; a call that failed may be made again.

    Raises:
        TrackingError: when the store is a SQLite file that cannot be there. MLflow's own exceptions pass through:
            `Shipper` turns them into sentences.
    """

    def __init__(self, tracking_uri: str, storage: Path, state: SearchState) -> None:
        self._state = state
        self._client = _make_client(tracking_uri)
        header = state.header
        self._experiment = header.space if header.data.name == "cifar10" else f"{header.space} ({header.data.name})"
        local = tracking_uri.startswith("sqlite:")
        self._artifact_location = (storage / "mlartifacts" / self._experiment).as_uri() if local else None
        self._parent: str | None = None
        self._children: dict[int, str] = {}

    def ship_parent(self) -> None:
        """Create the search's parent run."""
        header = self._state.header
        tags = {
            "search": header.name,
            "kind": header.kind,
            "tier": header.tier or "",
            "data": header.data.name,
            "data_digest": header.data.digest,
            "split_hash": header.data.split_hash,
            "seed": str(header.seed),
            "git_commit": header.environment.get("git_commit", ""),
            "mlflow.note.content": f"`{header.command}`",
        }
        experiment_id = self._find_experiment()
        created = round(1000 * datetime.fromisoformat(header.created).timestamp())
        self._parent = self._client.create_run(experiment_id, created, tags, header.name).info.run_id
        self._log_artifacts(
            self._parent,
            {
                "space.yaml": header.space_text,
                "numerics.json": header.numerics.model_dump_json(indent=2),
                "header.json": header.model_dump_json(indent=2),
            },
        )

    def ship_trial(self, trial: TrialState) -> None:
        """Create an ended trial's child run, whole: params, all epochs in one batch, artifacts, status."""
        from mlflow.entities import Param

        if self._parent is None:
            self.ship_parent()
        if trial.number in self._children:  # an attempt that broke off
            self._client.delete_run(self._children.pop(trial.number))
        header = self._state.header
        tags = {
            "mlflow.parentRunId": self._parent or "",
            "search": header.name,
            "run_id": trial.run_id,
            "status": trial.status,
            "reason": trial.reason or "",
            "origin": trial.origin,
            "fingerprint": trial.fingerprint,
            "data": header.data.name,
            "split_hash": header.data.split_hash,
            "git_commit": header.environment.get("git_commit", ""),
        }
        name = f"{header.name}:{trial.number:03d}"
        start = round(1000 * (time.time() - sum(result.epoch_seconds for result in trial.epochs)))
        run_id: str = self._client.create_run(self._find_experiment(), start, tags, name).info.run_id
        self._children[trial.number] = run_id
        dead = dead_knobs(trial.config)
        living = {knob: value for knob, value in trial.config.model_dump(mode="json").items() if knob not in dead}
        metrics = _make_metrics(trial, start)
        params = [Param(knob, str(value)) for knob, value in living.items()]
        self._client.log_batch(run_id, metrics[:MAX_METRICS_PER_BATCH], params)
        for start in range(MAX_METRICS_PER_BATCH, len(metrics), MAX_METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics[start : start + MAX_METRICS_PER_BATCH])
        self._log_artifacts(
            run_id,
            {
                "config.json": trial.config.model_dump_json(indent=2),
                "numerics.json": header.numerics.model_dump_json(indent=2),
                "environment.json": json.dumps(header.environment | {"split_hash": header.data.split_hash}, indent=2),
            },
        )
        if trial.error_file is not None:
            self._client.log_artifact(run_id, str(self._state.folder / trial.error_file))
        self._client.set_terminated(run_id, status=RUN_STATUS[trial.status])

    def ship_end(self) -> None:
        """Close the parent run: best score, gain, the best trial's weights."""
        if self._parent is None:
            self.ship_parent()
        assert self._parent is not None and self._state.finished is not None
        best = self._state.best
        if best is not None and best.score is not None:
            self._client.log_metric(self._parent, "best_val_acc", best.score)
            self._client.set_tag(self._parent, "best_run_id", best.run_id)
            if self._state.baseline_score is not None:
                self._client.log_metric(self._parent, "gain_over_baseline", best.score - self._state.baseline_score)
            weights = self._state.folder / (best.weights_file or "")
            if best.weights_file and weights.exists() and best.number in self._children:
                self._client.log_artifact(self._children[best.number], str(weights))
        self._client.set_tag(self._parent, "end", self._state.finished.reason)
        interrupted = self._state.finished.reason == "interrupted"
        self._client.set_terminated(self._parent, status="KILLED" if interrupted else "FINISHED")

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(self._experiment, artifact_location=self._artifact_location))

    def _log_artifacts(self, run_id: str, texts: dict[str, str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in texts.items():
                Path(folder, name).write_text(text, encoding="utf-8")
            self._client.log_artifacts(run_id, folder)


class Shipper:
    """A background thread that hears the record's events and ships what they complete.

    What MLflow did not take is tried again when the next trial ends, and once more at the end. Faults are kept, never
    raised: `close` returns them as sentences.
    """

    def __init__(self, tracking_uri: str, storage: Path, state: SearchState) -> None:
        self._arguments = (tracking_uri, storage, state)
        self._tracker: Tracker | None = None
        self._events: queue.Queue[Event | None] = queue.Queue()
        self._due: list[TrialEnded | SearchEnded] = []
        self._fault = ""
        self._thread = threading.Thread(target=self._run, name="mlflow-shipper", daemon=True)
        self._thread.start()

    def hear(self, state: SearchState, event: Event) -> None:
        """Listener for record events; returns at once."""
        self._events.put(event)

    def close(self, timeout_seconds: float = 60.0) -> list[str]:
        """Wait until everything heard is shipped, at most this long; returns what went wrong, one sentence each."""
        self._events.put(None)
        self._thread.join(timeout_seconds)
        whole = "The record is whole."
        if self._thread.is_alive():
            return [f"MLflow must take all runs within {timeout_seconds:g} s, got no end of it. {whole}"]
        return (
            [f"MLflow must take all runs, got {len(self._due)} left over: {self._fault}. {whole}"] if self._due else []
        )

    def _run(self) -> None:
        is_over = False
        while not is_over:
            events = [self._events.get()]
            while not self._events.empty():
                events.append(self._events.get())
            is_over = None in events
            ended = [event for event in events if isinstance(event, TrialEnded | SearchEnded)]
            self._due += ended
            if ended or is_over:
                self._ship_due()

    def _ship_due(self) -> None:
        """Try each due event once, in order; two faults in a row mean that it is not the run's fault: wait."""
        num_faults = 0
        for event in list(self._due):
            try:
                self._tracker = self._tracker or Tracker(*self._arguments)
                if isinstance(event, TrialEnded):
                    self._tracker.ship_trial(self._arguments[2].trials[event.trial])
                else:
                    self._tracker.ship_end()
            except Exception as exc:  # whatever MLflow raises, the search goes on; the summary tells
                self._fault = (
                    f"{type(exc).__name__}: {str(exc).strip().splitlines()[0]}" if str(exc).strip() else repr(exc)
                )
                num_faults += 1
                if num_faults == 2:
                    return
            else:
                self._due.remove(event)
                num_faults = 0


def run_ui(tracking_uri: str, port: int | None) -> tuple[subprocess.Popen[bytes], str]:
    """Start MLflow's UI on loopback; returns the process and the page's address as soon as the page answers.

    `stop_ui` ends it. It runs in a session of its own: a terminal's Ctrl-C reaches the caller alone.

    Raises:
        TrackingError: when the store is a SQLite file that does not exist, the port is in use, or MLflow ends instead
            of answering.
    """
    path = _find_sqlite_file(tracking_uri)
    if path is not None and not path.exists():
        hint = "Run a search first, or give --storage."
        raise TrackingError(f"{path}: an MLflow database must be there, got none. {hint}")
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    elif _is_listening(port):
        raise TrackingError(f"--port: a free port must be given, got {port}, which is in use. Leave it out.")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", tracking_uri, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--uvicorn-opts", "--log-level warning"]
    environment = os.environ | MLFLOW_ENVIRONMENT | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # What it says on stdout is chatter; faults come on stderr.
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not _is_listening(port):
            if process.poll() is not None:
                raise TrackingError(f"ui: MLflow must keep running, got exit status {process.returncode}.")
            time.sleep(0.1)
    except BaseException:
        stop_ui(process)
        raise
    return process, f"http://127.0.0.1:{port}"


def stop_ui(process: subprocess.Popen[bytes]) -> None:
    """End the UI and every process that it started."""
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}


def _find_sqlite_file(tracking_uri: str) -> Path | None:
    """The database file of a SQLite address, None for a server's."""
    return Path(tracking_uri.removeprefix("sqlite:///")) if tracking_uri.startswith("sqlite:///") else None


def _check_sqlite(path: Path) -> None:
    """Refuse at once a database that cannot be written: MLflow itself would try for minutes.

    Raises:
        TrackingError: with SQLite's own words.
    """
    try:
        with closing(sqlite3.connect(path, timeout=SQLITE_TIMEOUT_SECONDS)) as database:
            database.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as exc:
        raise TrackingError(f"{path}: a SQLite database must be writable there, got: {exc}") from exc


def _make_client(tracking_uri: str) -> Any:
    """A client that never touches MLflow's global state; bounded retries, no telemetry, no migration chatter."""
    path = _find_sqlite_file(tracking_uri)
    if path is not None:
        _check_sqlite(path)
    os.environ.update({name: os.environ.get(name, value) for name, value in MLFLOW_ENVIRONMENT.items()})
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):  # after the import, which sets levels of its own
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri)


def _make_metrics(trial: TrialState, start: int) -> list[Any]:
    """All epochs' metrics; the time of an epoch's is `start` (milliseconds since 1970) plus the epochs' seconds."""
    from mlflow.entities import Metric

    metrics, now = [], float(start)
    for result in trial.epochs:
        now += 1000 * result.epoch_seconds
        values = {name: getattr(result, name) for name in EPOCH_METRICS}
        metrics += [
            Metric(name, value, round(now), result.epoch) for name, value in values.items() if value is not None
        ]
    if trial.score is not None and trial.status == "complete":
        metrics.append(Metric("score", trial.score, round(now), trial.epochs_done))
    return metrics
