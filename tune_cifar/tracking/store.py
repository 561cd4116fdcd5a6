"""Reaching an MLflow store: a client that changes nothing global, a SQLite database laid out once, what lies in it."""

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

MAX_FAULT_CHARACTERS = 300
# May stand before what the database said.
SQLALCHEMY_CHATTER = "(raised as a result of Query-invoked autoflush"

# Another process may hold the database's write lock for so long, or be initialising the database.
SQLITE_TIMEOUT_SECONDS = 10.0
INITIALISING_SECONDS = 120.0
RUNS_PER_PAGE = 200
# For our processes only. No retries in the HTTP client: it would create a run again that a slow server has created.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def make_client(tracking_uri: str) -> Any:
    """A client that never touches MLflow's global state: short timeouts, no telemetry, no chatter.

    Raises:
        TrackingError: when a SQLite database cannot be written; MLflow itself would try for minutes.
    """
    os.environ.update(
        {name: os.environ.get(name, value) for name, value in MLFLOW_ENVIRONMENT.items()}
    )
    path = find_sqlite_file(tracking_uri)
    if path is not None:
        _check_sqlite(path)
    from mlflow import MlflowClient

    # After the import, which sets levels of its own. MLflow logs what it raises, with tracebacks.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if path is not None:
        _initialise_sqlite(path)
    return MlflowClient(tracking_uri)


def find_sqlite_file(tracking_uri: str) -> Path | None:
    """The database file of a SQLite address, None for a server's."""
    return (
        Path(tracking_uri.removeprefix("sqlite:///"))
        if tracking_uri.startswith("sqlite:///")
        else None
    )


def _check_sqlite(path: Path) -> None:
    """Leave a file that can be written, empty if there was none; TrackingError with SQLite's own words otherwise."""
    try:
        with closing(sqlite3.connect(path, timeout=SQLITE_TIMEOUT_SECONDS)) as database:
            database.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as exc:
        raise TrackingError(
            f"{path}: a SQLite database must be writable there, got: {exc}"
        ) from exc


def _initialise_sqlite(path: Path) -> None:
    """Let MLflow lay out an empty database, in a file beside it that takes its place when it is whole: of two processes
    at once the second finds it done (MLflow's own migrations would collide), and a kill leaves nothing by halves."""
    if path.stat().st_size:
        return
    from mlflow import MlflowClient

    with FileLock(f"{path}.lock", timeout=INITIALISING_SECONDS):
        if path.stat().st_size:
            return
        new = path.with_name(f"{path.name}.{uuid4().hex[:8]}.new")
        try:
            MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


def place_experiment(
    tracking_uri: str, storage: Path, space: str, data_name: str
) -> tuple[str, str | None]:
    """The name of a space's experiment (the stand-in has one of its own), and its folder where no server keeps it."""
    name = space if data_name == "cifar10" else f"{space} ({data_name})"
    return name, (storage / "mlartifacts" / name).as_uri() if tracking_uri.startswith(
        "sqlite:"
    ) else None


def find_experiment(client: Any, name: str) -> tuple[str, dict[str, str]] | None:
    """Id and tags of an active experiment."""
    found = client.get_experiment_by_name(name)
    if found is None:
        return None
    if found.lifecycle_stage != "active":
        hint = f"Restore it: mlflow experiments restore --experiment-id {found.experiment_id}"
        raise TrackingError(
            f"MLflow: experiment {name!r} must be active, got a deleted one. {hint}"
        )
    return str(found.experiment_id), dict(found.tags)


def create_experiment(client: Any, name: str, artifacts: str | None, tags: dict[str, str]) -> str:
    try:
        return str(client.create_experiment(name, artifact_location=artifacts, tags=tags))
    except Exception:
        if (found := find_experiment(client, name)) is None:  # else another process was faster
            raise
        return found[0]


def list_experiments(client: Any) -> list[tuple[str, str, dict[str, str]]]:
    """Name, id and tags of the experiments, the one that was changed last first."""
    found = client.search_experiments(order_by=["last_update_time DESC"])
    return [
        (experiment.name, experiment.experiment_id, dict(experiment.tags)) for experiment in found
    ]


def search_runs(client: Any, experiments: list[str], tags: Mapping[str, str]) -> Iterator[Any]:
    """MLflow's own objects of all runs in these experiments that have these tags, page by page."""
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
    """The kind of a fault and the first line that tells of it, of an HTTP request's only its cause; no credentials."""
    lines = [
        line for line in str(exc).strip().splitlines() if not line.startswith(SQLALCHEMY_CHATTER)
    ]
    text = lines[0] if lines else "no words"
    cause = re.search(r"\(Caused by (.+)\)", text)
    return hide_credentials(f"{type(exc).__name__}: {cause[1] if cause else text}")[
        :MAX_FAULT_CHARACTERS
    ]


@contextmanager
def translate_errors(rule: str) -> Iterator[None]:
    try:
        yield
    except TrackingError:
        raise
    except Exception as exc:
        raise TrackingError(f"{rule}, got {describe_error(exc)}.") from exc
