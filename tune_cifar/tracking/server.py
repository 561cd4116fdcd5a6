"""MLflow's UI as a local server."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

from tune_cifar.errors import TrackingError, hide_credentials
from tune_cifar.record.priority import make_session_nice
from tune_cifar.tracking.address import find_sqlite_file
from tune_cifar.tracking.store import (
    MLFLOW_ENVIRONMENT,
    list_experiments,
    make_client,
    translate_errors,
)
from tune_cifar.tracking.views import list_view_links

# The port of MLflow's UI, unless it is in use.
UI_PORT = 5077
# A line of the process that names an exception.
ERROR = re.compile(r"\w(?:Error|Exception)\b")


def run_ui(tracking_uri: str, port: int | None) -> tuple[subprocess.Popen[bytes], str]:
    """Start MLflow's UI on loopback, and return the process and the page's address.

    It returns as soon as the page answers. `stop_ui` ends the process, which has a session of its
    own: Ctrl-C in the terminal reaches only the caller.

    Args:
        port: None takes UI_PORT, or any free port when that is in use.

    Raises:
        TrackingError: when there is no such SQLite file, MLflow cannot open the database, the port
            is in use, or the process ends.
    """
    path = find_sqlite_file(tracking_uri)
    if path is not None and not path.exists():
        hint = "Run a search first, or give `storage`."
        raise TrackingError(f"{path}: there is no MLflow database. {hint}")
    if port is None:
        port = _find_port()
    elif _is_listening(port):
        raise TrackingError(f"`port` must be free, got {port}, which is in use. Leave it out.")
    with translate_errors("opening MLflow's store"):
        make_client(tracking_uri)  # says why it cannot; moved artifacts are found again
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", tracking_uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]
    environment = os.environ | MLFLOW_ENVIRONMENT | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=output, stderr=output
        )
        try:
            make_session_nice(process.pid)
            while not _is_listening(port):
                if process.poll() is not None:
                    output.seek(0)
                    lines = output.read().decode(errors="replace").splitlines()
                    errors = [hide_credentials(line) for line in lines if ERROR.search(line)]
                    fault = errors[-1] if errors else "no message"
                    status = f"exit status {process.returncode}"
                    raise TrackingError(f"MLflow's UI ended with {status}: {fault}.")
                time.sleep(0.1)
        except BaseException:
            stop_ui(process)
            raise
    return process, f"http://127.0.0.1:{port}"


def list_views(tracking_uri: str) -> dict[str, str]:
    """Return the links to our views of every experiment, relative to the UI's address, by name.

    Raises:
        TrackingError: when MLflow cannot be reached.
    """
    with translate_errors("listing MLflow's experiments"):
        experiments = list_experiments(make_client(tracking_uri))
    return {
        f"{name}: {view}": link
        for name, experiment_id, tags in experiments
        for view, link in list_view_links(experiment_id, tags).items()
    }


def stop_ui(process: subprocess.Popen[bytes]) -> None:
    """Stop the UI and every process that it started."""
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def _find_port() -> int:
    """Return UI_PORT if it is free, since a browser stores the page's layout by its address."""
    for port in (UI_PORT, 0):
        with socket.socket() as free, suppress(OSError):
            # A port whose last connections are closing counts as free.
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))
            return int(free.getsockname()[1])
    raise TrackingError("no port is free on loopback.")


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
