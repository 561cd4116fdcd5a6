"""Access to an MLflow store: the client, a SQLite database, experiments and runs, its errors."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from tune_cifar.errors import TrackingError, hide_credentials
from tune_cifar.record.files import find_lock_problem

MAX_FAULT_CHARACTERS = 300
# A line that may precede the database's own message.
SQLALCHEMY_CHATTER = "(raised as a result of Query-invoked autoflush"

# How long to wait for another process that writes to the database, or initialises it.
SQLITE_TIMEOUT_SECONDS = 10.0
INITIALISING_SECONDS = 120.0
RUNS_PER_PAGE = 200
# For our processes only. The HTTP client must not retry: it would create a run a second time that a
# slow server has created.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def make_client(tracking_uri: str) -> Any:
    """Return a client with short timeouts, without telemetry and log output.

    It never touches MLflow's global state. An empty SQLite database is initialised.

    Raises:
        TrackingError: when a SQLite database cannot be written; MLflow would try for minutes.
    """
    os.environ.update(
        {name: os.environ.get(name, value) for name, value in MLFLOW_ENVIRONMENT.items()}
    )
    path = find_sqlite_file(tracking_uri)
    if path is not None:
        _check_sqlite(path)
    from mlflow import MlflowClient

    # After the import, which sets levels of its own. MLflow also logs what it raises.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if path is not None:
        _initialise_sqlite(path)
    return MlflowClient(tracking_uri)


def find_sqlite_file(tracking_uri: str) -> Path | None:
    """Return the database file of a SQLite address, None for a server's."""
    path = tracking_uri.removeprefix("sqlite:///")
    return None if path == tracking_uri else Path(path)


def _check_sqlite(path: Path) -> None:
    """Raise a TrackingError unless the file can be written; create an empty one if need be."""
    try:
        with closing(sqlite3.connect(path, timeout=SQLITE_TIMEOUT_SECONDS)) as database:
            database.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as exc:
        raise TrackingError(f"{path}: cannot write to this SQLite database: {exc}") from exc


def _initialise_sqlite(path: Path) -> None:
    """Let MLflow create the tables of an empty database.

    It does so in a new file that then replaces the empty one, under a lock: a kill leaves nothing
    half done, and of two processes the second finds it done (MLflow's own migrations collide).
    """
    if path.stat().st_size:
        return
    from mlflow import MlflowClient

    check_locks(path.parent)
    with FileLock(f"{path}.lock", timeout=INITIALISING_SECONDS):
        if path.stat().st_size:
            return
        new = path.with_name(f"{path.name}.{uuid4().hex[:8]}.new")
        try:
            MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


def check_locks(folder: Path) -> None:
    """Raise a TrackingError where files cannot be locked; filelock would wait, or lock softly."""
    if problem := find_lock_problem(folder):
        raise TrackingError(f"{folder}: {problem}")


def place_experiment(
    tracking_uri: str, storage: Path, space: str, data_name: str
) -> tuple[str, str | None]:
    """Return the name of a space's experiment, and the address of its artifacts' folder.

    Synthetic data have an experiment of their own. A server chooses the folder itself: None.
    """
    name = space if data_name == "cifar10" else f"{space} ({data_name})"
    if not tracking_uri.startswith("sqlite:"):
        return name, None
    return name, (storage / "mlartifacts" / name).as_uri()


def find_experiment(client: Any, name: str) -> tuple[str, dict[str, str]] | None:
    """Return id and tags of an experiment, None if there is none.

    Raises:
        TrackingError: when it is deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        return None
    if found.lifecycle_stage != "active":
        hint = f"Restore it: mlflow experiments restore --experiment-id {found.experiment_id}"
        raise TrackingError(f"MLflow's experiment {name!r} is deleted. {hint}")
    return str(found.experiment_id), dict(found.tags)


def create_experiment(client: Any, name: str, artifacts: str | None, tags: dict[str, str]) -> str:
    """Create an experiment and return its id, also when another process has just created it."""
    try:
        return str(client.create_experiment(name, artifact_location=artifacts, tags=tags))
    except Exception:
        if (found := find_experiment(client, name)) is None:
            raise
        return found[0]


def list_experiments(client: Any) -> list[tuple[str, str, dict[str, str]]]:
    """Return name, id and tags of the experiments, the last changed first."""
    experiments = client.search_experiments(order_by=["last_update_time DESC"])
    return [(found.name, found.experiment_id, dict(found.tags)) for found in experiments]


def search_runs(client: Any, experiments: list[str], tags: Mapping[str, str]) -> Iterator[Any]:
    """Yield MLflow's objects of all runs in these experiments that have these tags."""
    filter_string = " and ".join(f"tags.{name} = '{value}'" for name, value in tags.items())
    token: str | None = None
    while experiments:
        page = client.search_runs(
            experiments, filter_string, max_results=RUNS_PER_PAGE, page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def describe_error(exc: Exception) -> str:
    """Return an exception's type and the first line of its message, without credentials.

    Of a failed HTTP request's message only the cause is returned.
    """
    lines = str(exc).strip().splitlines()
    text = next((line for line in lines if not line.startswith(SQLALCHEMY_CHATTER)), "no message")
    cause = re.search(r"\(Caused by (.+)\)", text)
    full = f"{type(exc).__name__}: {cause[1] if cause else text}"
    return hide_credentials(full)[:MAX_FAULT_CHARACTERS]


@contextmanager
def translate_errors(task: str) -> Iterator[None]:
    """Turn any exception into a TrackingError that says that the task failed."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as exc:
        raise TrackingError(f"{task} failed: {describe_error(exc)}.") from exc
