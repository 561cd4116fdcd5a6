"""MLflow as a view of the record: what is shipped, and that a dead store never hurts. Real MLflow throughout."""

from __future__ import annotations

import json
import socket
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.test_record import CONFIG, make_header, make_result, make_trial
from tune_cifar.errors import TrackingError
from tune_cifar.record import Event, Record, SearchEnded, TrialEnded, find_storage, search_folder
from tune_cifar.schema import DataInfo, TrainConfig, dead_knobs
from tune_cifar.tracking import EPOCH_METRICS, Shipper, make_tracking_uri, run_ui

WEIGHTS = "trials/0001/weights.safetensors"


def make_events(reason: str = "all trials") -> list[Event]:
    """A search with a trial of every ending; trial 1 is the best and keeps its weights."""
    second = make_trial(1, [0.4, 0.6, 0.8], None)
    second.append(TrialEnded(trial=1, status="complete", score=0.8, reason="all epochs", weights_file=WEIGHTS))
    return [
        *make_trial(0, [0.3, 0.5, 0.7], "complete"),
        *second,
        *make_trial(2, [0.2], "stopped"),
        *make_trial(3, [0.1], "diverged"),
        *make_trial(4, [], "failed"),
        SearchEnded(reason=reason, wall_seconds=60.0),
    ]


def ship(storage: Path, uri: str, events: list[Event], timeout: float = 60.0, **header: Any) -> list[str]:
    """Record the events and let a shipper hear of them, as the driver does; returns its faults."""
    with Record.create(search_folder(storage, "s7-1"), make_header(**header)) as record:
        folder = record.state.folder
        for number in (1, 4):
            (folder / f"trials/{number:04d}").mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(b"the best weights")
        (folder / "trials/0004/error.txt").write_text("Traceback: it broke\n")
        shipper = Shipper(uri, storage, record.state)
        for event in events:
            record.append(event)
            shipper.hear(record.state, event)
        return shipper.close(timeout)


def test_the_address_is_an_absolute_sqlite_file_in_the_run_store_unless_given(workplace: Path) -> None:
    assert make_tracking_uri(find_storage(None), None) == f"sqlite:///{workplace}/runs/mlflow.db"
    assert make_tracking_uri(find_storage("elsewhere"), None) == f"sqlite:///{workplace}/elsewhere/mlflow.db"
    assert make_tracking_uri(find_storage(None), "http://127.0.0.1:1") == "http://127.0.0.1:1"


@pytest.mark.parametrize("where", ["folder", "text", "locked"])
def test_a_database_that_cannot_be_written_is_told_at_once_and_hurts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("tune_cifar.tracking.SQLITE_TIMEOUT_SECONDS", 0.1)
    words = {"folder": "unable to open database file", "text": "file is not a database", "locked": "database is locked"}
    path = tmp_path / ("no/such/folder/mlflow.db" if where == "folder" else "mlflow.db")
    if where == "text":
        path.write_text("this is no database, whatever its name says\n" * 40)
    start = time.monotonic()
    with closing(sqlite3.connect(path if where == "locked" else ":memory:")) as other:
        other.execute("BEGIN IMMEDIATE")
        faults = ship(tmp_path, f"sqlite:///{path}", make_events())
    assert time.monotonic() - start < 10
    got = f"TrackingError: {path}: a SQLite database must be writable there, got: {words[where]}"
    assert faults == [f"MLflow must take all runs, got 6 left over: {got}. The record is whole."]


def test_a_shipper_that_heard_of_no_end_closes_at_once(tmp_path: Path) -> None:
    """Such as after Ctrl-C in a single training: nothing is due, MLflow is not even imported."""
    start = time.monotonic()
    assert ship(tmp_path, "http://127.0.0.1:9", make_trial(0, [0.1], None)) == []
    assert time.monotonic() - start < 5


@pytest.mark.slow
def test_a_store_that_hangs_is_left_alone_when_the_time_is_over(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        start = time.monotonic()
        faults = ship(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", make_events(), timeout=0.5)
    assert time.monotonic() - start < 10
    assert faults == ["MLflow must take all runs within 0.5 s, got no end of it. The record is whole."]


def test_the_ui_of_a_store_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"mlflow\.db: an MLflow database must be there, got none\."):
        run_ui(make_tracking_uri(tmp_path, None), None)


def test_a_port_in_use_is_refused_for_the_ui(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(TrackingError, match=f"--port: a free port must be given, got {port}, which is in use"):
            run_ui(make_tracking_uri(tmp_path, None), port)


@pytest.mark.slow
def test_a_server_that_is_down_is_told_in_bounded_time(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    (fault,) = ship(tmp_path, f"http://127.0.0.1:{port}", make_events())
    assert time.monotonic() - start < 59
    assert fault.startswith("MLflow must take all runs, got 6 left over: MlflowException: ") and "\n" not in fault
    assert fault.endswith("The record is whole.")


def connect(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


class Shipped:
    """What MLflow holds of one shipped search."""

    def __init__(self, storage: Path, experiment: str) -> None:
        self.client = connect(make_tracking_uri(storage, None))
        found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        runs = self.client.search_runs([found.experiment_id])
        (self.parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        self.children = {run.data.tags["run_id"]: run for run in runs if run is not self.parent}
        self.num_runs = len(runs)

    def list_artifacts(self, run: Any) -> set[str]:
        return {item.path for item in self.client.list_artifacts(run.info.run_id)}

    def read_artifact(self, run: Any, name: str) -> str:
        return Path(self.client.download_artifacts(run.info.run_id, name)).read_text(encoding="utf-8")

    def read_history(self, run: Any, metric: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(run.info.run_id, metric)
        return sorted((point.step, point.value) for point in history)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run store with one shipped search; its name needs quoting in an address."""
    folder = tmp_path_factory.mktemp("my runs")
    assert ship(folder, make_tracking_uri(folder, None), make_events()) == []
    return folder


@pytest.fixture(scope="module")
def shipped(storage: Path) -> Shipped:
    return Shipped(storage, "s7")


@pytest.mark.slow
def test_a_search_is_one_parent_run_with_a_child_per_trial(shipped: Shipped) -> None:
    assert shipped.num_runs == 6 and set(shipped.children) == {f"s7-1:{number}" for number in range(5)}
    parents = {run.data.tags["mlflow.parentRunId"] for run in shipped.children.values()}
    assert parents == {shipped.parent.info.run_id}
    assert shipped.parent.info.run_name == "s7-1"
    assert shipped.children["s7-1:4"].info.run_name == "s7-1:004"


@pytest.mark.slow
def test_statuses_and_tags_say_how_every_run_ended_and_on_what(shipped: Shipped) -> None:
    statuses = {run_id: (run.info.status, run.data.tags["status"]) for run_id, run in shipped.children.items()}
    assert statuses == {
        "s7-1:0": ("FINISHED", "complete"),
        "s7-1:1": ("FINISHED", "complete"),
        "s7-1:2": ("KILLED", "stopped"),
        "s7-1:3": ("FAILED", "diverged"),
        "s7-1:4": ("FAILED", "failed"),
    }
    tags = shipped.children["s7-1:2"].data.tags
    wanted = {"search": "s7-1", "origin": "sampler", "reason": "it stopped", "data": "cifar10", "split_hash": "h1"}
    wanted |= {"fingerprint": CONFIG.fingerprint, "git_commit": "abc"}
    assert {name: tags[name] for name in wanted} == wanted
    parent = shipped.parent.data.tags
    wanted = {"search": "s7-1", "kind": "search", "tier": "full", "data": "cifar10", "data_digest": "d1", "seed": "1"}
    assert {name: parent[name] for name in wanted} == wanted


@pytest.mark.slow
def test_params_are_exactly_the_living_knobs(shipped: Shipped) -> None:
    dead = dead_knobs(CONFIG)
    living = {name: str(value) for name, value in CONFIG.model_dump(mode="json").items() if name not in dead}
    assert all(run.data.params == living for run in shipped.children.values())


@pytest.mark.slow
def test_metrics_have_one_point_per_epoch_and_the_epoch_as_their_step(shipped: Shipped) -> None:
    run = shipped.children["s7-1:1"]
    assert shipped.read_history(run, "val_acc") == [(1, 0.4), (2, 0.6), (3, 0.8)]
    for name in EPOCH_METRICS:
        wanted = [(epoch, getattr(make_result(epoch, acc), name)) for epoch, acc in enumerate((0.4, 0.6, 0.8), 1)]
        assert shipped.read_history(run, name) == wanted
    assert shipped.read_history(run, "score") == [(3, 0.8)]
    assert set(shipped.children["s7-1:2"].data.metrics) == set(EPOCH_METRICS)  # stopped: no score
    assert shipped.children["s7-1:4"].data.metrics == {}


@pytest.mark.slow
def test_times_follow_the_epochs_seconds(shipped: Shipped) -> None:
    run = shipped.children["s7-1:1"]
    points = shipped.client.get_metric_history(run.info.run_id, "val_acc")
    stamps = {point.step: point.timestamp for point in points}
    assert (stamps[2] - stamps[1], stamps[3] - stamps[2]) == (2000, 2000)
    assert stamps[1] - run.info.start_time == 2000 and 6000 <= run.info.end_time - run.info.start_time < 60_000
    assert shipped.parent.info.start_time == 1769860800000  # 2026-01-31T12:00:00 UTC, the header's


@pytest.mark.slow
def test_artifacts_hold_config_numerics_environment_and_the_best_weights(shipped: Shipped, storage: Path) -> None:
    always = {"config.json", "numerics.json", "environment.json"}
    found = {run_id: shipped.list_artifacts(run) for run_id, run in shipped.children.items()}
    assert found == {
        "s7-1:0": always,
        "s7-1:1": always | {"weights.safetensors"},
        "s7-1:2": always,
        "s7-1:3": always,
        "s7-1:4": always | {"error.txt"},
    }
    assert shipped.list_artifacts(shipped.parent) == {"space.yaml", "numerics.json", "header.json"}
    best = shipped.children["s7-1:1"]
    assert TrainConfig(**json.loads(shipped.read_artifact(best, "config.json"))) == CONFIG
    environment = json.loads(shipped.read_artifact(best, "environment.json"))
    assert environment == {"git_commit": "abc", "split_hash": "h1"}
    assert shipped.read_artifact(best, "weights.safetensors") == "the best weights"
    assert shipped.read_artifact(shipped.parent, "space.yaml") == make_header().space_text
    assert (storage / "mlartifacts" / "s7").is_dir(), "artifacts lie in the run store, not where the command ran"


@pytest.mark.slow
def test_the_parent_ends_with_best_gain_and_reason(shipped: Shipped) -> None:
    assert shipped.parent.info.status == "FINISHED"
    assert shipped.parent.data.tags["end"] == "all trials" and shipped.parent.data.tags["best_run_id"] == "s7-1:1"
    metrics = shipped.parent.data.metrics
    assert metrics["best_val_acc"] == 0.8 and metrics["gain_over_baseline"] == pytest.approx(0.1)


@pytest.mark.slow
def test_a_search_on_the_stand_in_is_kept_apart_and_tagged(tmp_path: Path) -> None:
    """And an interrupted one is KILLED."""
    info = DataInfo(name="shapes", digest="d2", split_hash="h2")
    assert ship(tmp_path, make_tracking_uri(tmp_path, None), make_events("interrupted"), data=info) == []
    shipped = Shipped(tmp_path, "s7 (shapes)")
    assert shipped.client.get_experiment_by_name("s7") is None
    tags = [run.data.tags["data"] for run in (shipped.parent, *shipped.children.values())]
    assert tags == ["shapes"] * 6
    assert (shipped.parent.info.status, shipped.parent.data.tags["end"]) == ("KILLED", "interrupted")
    assert shipped.read_artifact(shipped.children["s7-1:1"], "weights.safetensors") == "the best weights"


@pytest.mark.slow
def test_what_a_store_did_not_take_is_shipped_when_it_is_back_once(tmp_path: Path) -> None:
    """First there is no store at all; then one trial's artifact is missing, which breaks its run off half-way."""
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    with Record.create(search_folder(tmp_path, "s7-1"), make_header()) as record:
        shipper = Shipper(uri, tmp_path, record.state)

        def hear(events: list[Event]) -> None:
            for event in events:
                record.append(event)
                shipper.hear(record.state, event)

        hear(make_trial(0, [0.3, 0.5, 0.7], "complete"))
        wait_for(lambda: "unable to open database file" in shipper._fault)
        (tmp_path / "store").mkdir()
        hear(make_trial(1, [], "failed"))
        wait_for(lambda: "No such file" in shipper._fault or "error.txt" in shipper._fault)
        error = record.state.folder / "trials/0001/error.txt"
        error.parent.mkdir(parents=True)
        error.write_text("Traceback\n")
        hear([SearchEnded(reason="all trials", wall_seconds=1.0)])
        assert shipper.close() == []
    found = connect(uri)
    experiment = found.get_experiment_by_name("s7")
    runs = found.search_runs([experiment.experiment_id])
    names = sorted(run.info.run_name for run in runs)
    assert names == ["s7-1", "s7-1:000", "s7-1:001"], "the run that broke off is deleted"


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Until the background thread got there."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
