"""Access to an MLflow store: the client, a SQLite database, experiments and runs, its errors."""

from __future__ import annotations

import logging
import os
import re
import shlex
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

from filelock import FileLock

from tune_cifar.errors import ConfigError, TrackingError, hide_credentials
from tune_cifar.record.files import find_lock_problem
from tune_cifar.tracking.address import (
    DATABASES,
    OWN_DATABASE,
    find_sqlite_file,
    make_sqlite_uri,
    make_tracking_uri,
)

MAX_FAULT_CHARACTERS = 300
# A line that may precede the database's own message.
SQLALCHEMY_CHATTER = "(raised as a result of Query-invoked autoflush"

# How long to wait for another process that writes to the database, or initialises it.
SQLITE_TIMEOUT_SECONDS = 10.0
INITIALISING_SECONDS = 120.0
# How long a database's host may take to answer before the first trial.
CONNECT_SECONDS = 5.0
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
RUNS_PER_PAGE = 200
# The folder of a run store's artifacts, beside its own database.
ARTIFACTS = "mlartifacts"
# A part of MLflow's message on a server that answers with a page.
NOT_MLFLOW = "successful but the response body was not in a valid JSON"
# MLflow's message on a schema that is older or newer than its own.
OTHER_SCHEMA = re.compile(r"out-of-date database schema \(found version (\w+)")
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

    It never touches MLflow's global state. An empty SQLite database is initialised; that of a run
    store that was moved gets the new locations of its artifacts.

    Raises:
        TrackingError: when a SQLite database cannot be written (MLflow would try for minutes) or is
            not MLflow's, or a database has the schema of another MLflow.
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
    try:
        client = MlflowClient(tracking_uri)
    except Exception as exc:
        if (found := OTHER_SCHEMA.search(str(exc))) is not None:
            raise TrackingError(_describe_schema(tracking_uri, found[1])) from exc
        raise
    if path is not None and path.name == OWN_DATABASE:
        _follow_move(path)
    return client


def check_tracking(storage: Path, option: str | None) -> str | None:
    """Check where MLflow's runs will go, before anything is spent.

    Returns:
        None, or a sentence when MLflow cannot be reached now: that harms nothing.

    Raises:
        ConfigError: when the option can never take an upload.
    """
    uri = make_tracking_uri(storage, option)
    path, fault = find_sqlite_file(uri), ""
    try:
        if path is not None:
            if path.exists():
                _check_sqlite(path)
            elif option and not path.absolute().parent.is_dir():
                raise FileNotFoundError(f"{path}: the folder of this SQLite file is not there")
        elif uri.startswith(DATABASES):
            _check_port(uri)
        else:
            make_client(uri).search_experiments(max_results=1)
    except Exception as exc:  # whatever MLflow raises
        fault = str(exc) if isinstance(exc, TrackingError) else describe_error(exc)
        if " 401 " in fault:
            hint = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
            rule = "`tracking_uri` must be MLflow's and have a user and a password that it knows"
            raise ConfigError(f"{rule}, got {hide_credentials(uri)!r}. {hint}") from exc
        if option and not _is_away(exc):
            refused = f"`tracking_uri` must be MLflow's, got {hide_credentials(uri)!r}"
            raise ConfigError(f"{refused}: {fault.rstrip('.')}.") from exc
    if not fault:
        return None
    return f"MLflow cannot be reached now: {fault.rstrip('.')}. The record does without it."


def _check_port(tracking_uri: str) -> None:
    """Raise OSError unless the database's host answers: MLflow itself would try for a minute."""
    from sqlalchemy import make_url

    url = make_url(tracking_uri)
    port = url.port or DATABASE_PORTS[url.get_backend_name()]
    socket.create_connection((str(url.host), port), timeout=CONNECT_SECONDS).close()


def _is_away(exc: Exception) -> bool:
    """Return whether a fault may pass by itself, as that of a server that does not run now."""
    if isinstance(exc, TrackingError):
        return "locked" in str(exc.__cause__)
    if NOT_MLFLOW in str(exc):
        return False
    status = getattr(exc, "get_http_status_code", lambda: 503)()
    return status >= 500 or status in (408, 429)


def _describe_schema(tracking_uri: str, found: str) -> str:
    """Return what to do with a database whose schema another version of MLflow made."""
    import mlflow

    shown = hide_credentials(tracking_uri)
    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    what = f"the schema of MLflow's database must be that of MLflow {mlflow.__version__}"
    if any(migrations.glob(f"{found}_*.py")):
        upgrade = f"python -m mlflow db upgrade {shlex.quote(shown)}"
        hint = f"Copy the database, then run `{upgrade}`."
        return f"{shown}: {what}, got an older one ({found}). {hint}"
    return f"{shown}: {what}, got an unknown one ({found}). Install the newer MLflow that made it."


def _check_sqlite(path: Path) -> None:
    """Raise a TrackingError unless the file can be written; create an empty one if need be.

    Into another program's database MLflow would put its own tables.
    """
    try:
        with closing(sqlite3.connect(path, timeout=SQLITE_TIMEOUT_SECONDS)) as database:
            database.execute("BEGIN IMMEDIATE")
            found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {name for (name,) in found if not name.startswith(("alembic_", "sqlite_"))}
    except sqlite3.Error as exc:
        raise TrackingError(f"{path}: cannot write to this SQLite database: {exc}.") from exc
    if tables and "experiments" not in tables:
        names = ", ".join(sorted(tables)[:3])
        raise TrackingError(f"{path}: this SQLite database is not MLflow's, it has {names}.")


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
            MlflowClient(make_sqlite_uri(new)).search_experiments(max_results=1)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


def check_locks(folder: Path) -> None:
    """Raise a TrackingError where files cannot be locked; filelock would wait, or lock softly."""
    if problem := find_lock_problem(folder):
        raise TrackingError(f"{folder}: {problem}")


def _follow_move(path: Path) -> None:
    """Give the artifacts of a run store that was moved or renamed the locations that they have now.

    MLflow stores absolute addresses and would make the old folder again. An old address stays where
    its files are there and not here.
    """
    root = path.resolve().parent / ARTIFACTS
    try:
        with closing(sqlite3.connect(path, timeout=SQLITE_TIMEOUT_SECONDS)) as database:
            if not _list_moved(database, root):
                return
            with FileLock(f"{path}.lock", timeout=INITIALISING_SECONDS), database:
                for statement, address, key in _list_moved(database, root):
                    database.execute(statement, (address, key))
    except sqlite3.Error as exc:
        raise TrackingError(f"{path}: cannot write to this SQLite database: {exc}.") from exc


def _list_moved(database: sqlite3.Connection, root: Path) -> list[tuple[str, str, Any]]:
    """Return the UPDATE of each address below another `mlartifacts`: statement, address, key."""
    moved = []
    experiments = database.execute("SELECT experiment_id, name, artifact_location FROM experiments")
    for experiment, name, location in experiments.fetchall():
        folder = root / name
        if _is_moved(location, folder, (ARTIFACTS, name)):
            statement = "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?"
            moved.append((statement, folder.as_uri(), experiment))
        runs = database.execute(
            "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ? "
            "AND artifact_uri != ? || '/' || run_uuid || '/artifacts'",
            (experiment, folder.as_uri()),
        )
        for run, address in runs.fetchall():
            place = folder / run / "artifacts"
            if _is_moved(address, place, (ARTIFACTS, name, run, "artifacts")):
                statement = "UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?"
                moved.append((statement, place.as_uri(), run))
    return moved


def _is_moved(address: str | None, here: Path, end: tuple[str, ...]) -> bool:
    """Return whether an address, which ends like `here`, is another one that leads nowhere now."""
    if not (address or "").startswith("file:///"):
        return False
    there = Path(unquote(str(address).removeprefix("file://")))
    if there == here or there.parts[-len(end) :] != end:
        return False
    return here.exists() or not there.exists()


def place_experiment(
    tracking_uri: str, storage: Path, space: str, data_name: str
) -> tuple[str, str | None]:
    """Return the name of a space's experiment, and the address of its artifacts' folder.

    Synthetic data have an experiment of their own. A server chooses the folder itself: None.
    """
    name = space if data_name == "cifar10" else f"{space} ({data_name})"
    if find_sqlite_file(tracking_uri) is None:
        return name, None
    return name, (storage / ARTIFACTS / name).as_uri()


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
    full = hide_credentials(f"{type(exc).__name__}: {cause[1] if cause else text}").rstrip(".")
    # Our own message ends with what helps.
    return full if isinstance(exc, TrackingError) else full[:MAX_FAULT_CHARACTERS]


@contextmanager
def translate_errors(task: str) -> Iterator[None]:
    """Turn any exception into a TrackingError that says that the task failed."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as exc:
        raise TrackingError(f"{task} failed: {describe_error(exc)}.") from exc
