"""A search whose MLflow is a server with users, PostgreSQL and an object store: real ones."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.builders import find_free_port
from tests.faults.lab import RESTORED, Lab, count_epochs, interrupt, wait_until_it_answers
from tests.faults.netcluster import RAY

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

# In nothing that a search writes, prints or shows in the list of processes.
SECRET = "pa55word-of-the-tests"
ADMIN = f"admin-{SECRET}"


def find_programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, as Debian installs them."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def find_missing() -> str | None:
    packages = [name for name in ("psycopg2", "boto3", "moto", "flask_wtf", "s3fs")
                if importlib.util.find_spec(name) is None]  # fmt: skip
    if find_programs() is None:
        packages.append("PostgreSQL")
    return ", ".join(packages) or None


@pytest.fixture(autouse=True)
def _skip_without_servers() -> None:
    if missing := find_missing():
        pytest.skip(f"not installed: {missing} (make services)")


@contextmanager
def serve_postgres(folder: Path) -> Iterator[str]:
    """Run PostgreSQL on loopback as an unprivileged user; yield its address."""
    programs, port, user = find_programs(), find_free_port(), _get_user()
    assert programs is not None
    data, password = folder / "postgres", folder / "password"
    data.mkdir()
    password.write_text(SECRET)
    for path in (data, password):
        if user is not None:
            shutil.chown(path, user)
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o011)
    given = ["-D", str(data), "-U", "mlflow", f"--pwfile={password}", "-A", "scram-sha-256"]
    subprocess.run([programs / "initdb", *given], check=True, user=user, capture_output=True)
    options = ["-c", f"unix_socket_directories={data}", "-c", "listen_addresses=127.0.0.1"]
    server = subprocess.Popen(
        [programs / "postgres", "-D", str(data), "-p", str(port), *options],
        user=user,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_it_answers(port)
        yield f"postgresql+psycopg2://mlflow:{SECRET}@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def _get_user() -> str | None:
    """PostgreSQL does not run as root."""
    return "nobody" if os.geteuid() == 0 else None


@contextmanager
def serve_objects() -> Iterator[dict[str, str]]:
    """Run an S3 server with a bucket on loopback; yield the environment that leads to it."""
    import boto3
    import requests
    from moto.server import ThreadedMotoServer

    port = find_free_port()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    url = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET}
    environment = keys | {"MLFLOW_S3_ENDPOINT_URL": url, "AWS_ENDPOINT_URL": url}
    environment["AWS_DEFAULT_REGION"] = "us-east-1"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1",
        aws_access_key_id="testing", aws_secret_access_key=SECRET,
    )  # fmt: skip
    # All servers of a process hold the same objects.
    requests.post(f"{url}/moto-api/reset", timeout=60).raise_for_status()
    client.create_bucket(Bucket="mlflow")
    try:
        yield environment
    finally:
        server.stop()


@dataclass
class TrackingServer:
    """MLflow's server with users; it can be stopped and started again."""

    folder: Path
    database: str
    environment: dict[str, str]
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        config = self.folder / "auth.ini"
        users = f"sqlite:///{self.folder}/users.db"
        lines = ["[mlflow]", "default_permission = READ", f"database_uri = {users}"]
        lines += ["admin_username = admin", f"admin_password = {ADMIN}"]
        config.write_text("\n".join(lines) + "\n")
        more = {
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": SECRET,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_BACKEND_STORE_URI": self.database,
        }
        words = ["server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
        words += ["--port", str(self.port), "--workers", "2"]
        words += ["--artifacts-destination", "s3://mlflow"]
        with (self.folder / "mlflow.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words],
                env=os.environ | self.environment | more,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until_it_answers(self.port)

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TrackingServer]:
    with serve_postgres(tmp_path) as database, serve_objects() as environment:
        server = TrackingServer(tmp_path, database, environment, find_free_port())
        server.start()
        yield server
        server.stop()


def make_lab(tmp_path: Path, server: TrackingServer, password: str, *options: str) -> Lab:
    access = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
    return Lab(tmp_path / "lab", access, ("--tracking-uri", server.uri, *options))


def list_runs(server: TrackingServer) -> list[Any]:
    """Return all runs, asked for with the right password."""
    from mlflow import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN)
        client = MlflowClient(server.uri)
        experiments = [each.experiment_id for each in client.search_experiments()]
        return list(client.search_runs(experiments, max_results=1000))


def check_uploaded(lab: Lab, server: TrackingServer) -> None:
    """Check that MLflow has every trial, closed, with all its epochs, and its files in S3."""
    import boto3

    runs = list_runs(server)
    children = {run.data.tags["run_id"]: run for run in runs if "trial" in run.data.tags}
    state = lab.state
    assert len(runs) == 1 + len(state.trials)
    for trial in state.trials.values():
        run = children[trial.run_id]
        assert run.info.status in ("FINISHED", "FAILED")
        assert run.data.tags["epochs_done"] == str(trial.epochs_done)
    with pytest.MonkeyPatch.context() as patch:
        for name, text in server.environment.items():
            patch.setenv(name, text)
        found = boto3.client("s3").list_objects_v2(Bucket="mlflow").get("Contents", [])
    names = [each["Key"] for each in found]
    assert sum(name.endswith("numerics.json") for name in names) == len(runs)
    assert any(name.endswith("weights.safetensors") for name in names)


def check_secret(lab: Lab, text: str) -> None:
    """Check that no password stands in what was printed or written."""
    assert SECRET not in text
    for path in lab.storage.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def list_command_lines() -> str:
    return "\n".join(" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))


def test_a_search_outlives_a_restart_of_its_server_and_shows_no_password(
    tmp_path: Path, server: TrackingServer
) -> None:
    lab = make_lab(tmp_path, server, ADMIN)
    process = lab.search()
    lab.wait_for(process, lambda state: count_epochs(state) >= 4)
    assert SECRET not in list_command_lines()
    server.stop()
    lab.wait_for(process, lambda state: count_epochs(state) >= 10)
    server.start()
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text
    text += lab.run("sync", "--tracking-uri", server.uri)
    check_uploaded(lab, server)
    check_secret(lab, text)


def test_a_wrong_password_is_refused_before_anything_is_spent(
    tmp_path: Path, server: TrackingServer
) -> None:
    lab = make_lab(tmp_path, server, f"wrong-{SECRET}")
    words = ("search", "--space", "faulty", "--data", "shapes", *lab.options)
    text = lab.run(*words, status=1)
    assert f"and have a user and a password that it knows, got '{server.uri}'." in text
    assert not lab.record.exists() and not list_runs(server)
    # The other way to give it: in the address. It goes into no record.
    lab.variables = {}
    lab.options = ("--tracking-uri", server.uri.replace("http://", f"http://admin:{ADMIN}@"))
    text += lab.finish()
    check_uploaded(lab, server)
    check_secret(lab, text)


def test_sixteen_trials_at_once_are_all_uploaded(tmp_path: Path, server: TrackingServer) -> None:
    """On a cluster that says it has 16 cores, joined with `auto`."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    words = ["--head", "--num-cpus=16", "--include-dashboard=false", "--disable-usage-stats"]
    subprocess.run([RAY, "start", *words], check=True, env=environment, capture_output=True)
    try:
        small = ("--set", "train_size=100", "--set", "val_size=50", "--trials", "32")
        lab = make_lab(tmp_path, server, ADMIN, "--address", "auto", *small)
        lab.variables["RAY_AUTH_MODE"] = "disabled"
        process = lab.search()
        lab.wait_for(process, lambda state: state.counts["running"] == 16)
        text, _ = process.communicate(timeout=900)
        assert process.returncode == 0, text
        text += lab.run("sync", "--tracking-uri", server.uri)  # what the end did not wait for
        check_uploaded(lab, server)
        check_secret(lab, text)
    finally:
        subprocess.run([RAY, "stop", "--force"], env=environment, capture_output=True)


def test_a_mirror_in_an_object_store_brings_a_search_back_on_a_bare_machine(
    tmp_path: Path,
) -> None:
    with serve_objects() as environment:
        lab = Lab(tmp_path / "lab", environment, ("--mirror", "s3://mlflow/searches"))
        process = lab.search()
        lab.wait_for(process, lambda state: count_epochs(state) >= 6)
        interrupt(process)
        text, _ = process.communicate(timeout=900)
        assert process.returncode == 130, text
        shutil.rmtree(lab.storage)
        time.sleep(0.1)
        assert "x is restored" in lab.run("searches", "restore", "s3://mlflow/searches", "x")
        text += lab.finish()
        assert RESTORED.search(text) and "mirror" not in text.replace("--mirror", "")
        check_secret(lab, text)
