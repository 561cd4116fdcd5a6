"""MLflow's UI as a local server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

from tune_cifar.errors import TrackingError, hide_credentials
from tune_cifar.tracking.store import (
    MLFLOW_ENVIRONMENT,
    find_sqlite_file,
    list_experiments,
    make_client,
    translate_errors,
)
from tune_cifar.tracking.views import list_view_links

# Of MLflow's UI, where it is free.
UI_PORT = 5077


def run_ui(tracking_uri: str, port: int | None) -> tuple[subprocess.Popen[bytes], str]:
    """Start MLflow's UI on loopback; returns the process and the page's address as soon as the page answers.

    `stop_ui` ends it. It runs in a session of its own: a terminal's Ctrl-C reaches the caller alone.

    Raises:
        TrackingError: when there is no such SQLite file, the port is in use, or MLflow ends instead of answering.
    """
    path = find_sqlite_file(tracking_uri)
    if path is not None and not path.exists():
        hint = "Run a search first, or give --storage."
        raise TrackingError(f"{path}: an MLflow database must be there, got none. {hint}")
    if port is None:
        port = _find_port()
    elif _is_listening(port):
        raise TrackingError(
            f"--port: a free port must be given, got {port}, which is in use. Leave it out."
        )
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        tracking_uri,
        "--workers",
        "1",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--uvicorn-opts", "--log-level warning"]
    environment = os.environ | MLFLOW_ENVIRONMENT | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryFile() as said:  # what its libraries deprecate, and why it ended
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=said, stderr=said
        )
        try:
            while not _is_listening(port):
                if process.poll() is not None:
                    said.seek(0)
                    lines = said.read().decode(errors="replace").splitlines()
                    fault = hide_credentials(
                        next((line for line in reversed(lines) if "Error" in line), "no word")
                    )
                    raise TrackingError(
                        f"ui: MLflow must keep running, got exit status {process.returncode}: {fault}."
                    )
                time.sleep(0.1)
        except BaseException:
            stop_ui(process)
            raise
    return process, f"http://127.0.0.1:{port}"


def list_views(tracking_uri: str) -> dict[str, str]:
    """What MLflow's UI can open at once, behind its address: our views of every experiment, by names.

    Raises:
        TrackingError: when MLflow cannot be reached.
    """
    with translate_errors("ui: MLflow must list its experiments"):
        experiments = list_experiments(make_client(tracking_uri))
    return {
        f"{name}: {view}": link
        for name, experiment_id, tags in experiments
        for view, link in list_view_links(experiment_id, tags).items()
    }


def stop_ui(process: subprocess.Popen[bytes]) -> None:
    """End the UI and every process that it started."""
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def _find_port() -> int:
    """The same one whenever it can be had: a browser keeps the page's layout by its address."""
    for port in (UI_PORT, 0):
        with socket.socket() as free, suppress(OSError):
            free.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # not kept by connections that are closing
            free.bind(("127.0.0.1", port))
            return int(free.getsockname()[1])
    raise TrackingError("--port: a port must be free on loopback, got none.")


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
