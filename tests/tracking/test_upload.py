"""MLflow as a view of the record: what is shipped, that shipping it again changes nothing, and that a store which is
down, slow, full or broken never hurts. Real MLflow throughout."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from tests.builders import (
    CONFIG,
    COURSES,
    drive,
    find_free_port,
    make_cycles,
    make_events,
    make_header,
    make_result,
    make_start,
    make_tracking_resume,
    make_trial,
    ship,
    write_record,
)
from tune_cifar.errors import TrackingError
from tune_cifar.record.events import (
    EpochReported,
    Event,
    SearchEnded,
    TrialEnded,
    TrialRetried,
)
from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import find_storage, search_folder
from tune_cifar.report.trials import best_so_far, load_trials, load_uploaded_trials, split_groups
from tune_cifar.schema import KNOBS, DataInfo, TrainConfig, inactive_knobs
from tune_cifar.tracking import runs as mlruns
from tune_cifar.tracking.runs import EPOCH_METRICS
from tune_cifar.tracking.server import list_views, run_ui, stop_ui
from tune_cifar.tracking.upload import (
    BackgroundUploader,
    SyncReport,
    delete_runs,
    make_tracking_uri,
    sync_search,
)
from tune_cifar.tracking.views import make_experiment_tags


def read_search(storage: Path) -> SearchState:
    return read_state(search_folder(storage, "s7-1"))


def sync(storage: Path, **options: Any) -> SyncReport:
    """Into the database of the run store."""
    return sync_search(make_tracking_uri(storage, None), storage, read_search(storage), **options)


def way_out(storage: Path, uri: str | None = None) -> str:
    more = f" --tracking-uri {uri}" if uri else ""
    command = f"python -m tune_cifar sync --search s7-1 --storage '{storage}'{more}"
    return f"The record is whole. Complete MLflow from it: {command}"


def test_the_address_is_an_absolute_sqlite_file_in_the_run_store_unless_given(
    workplace: Path,
) -> None:
    assert make_tracking_uri(find_storage(None), None) == f"sqlite:///{workplace}/runs/mlflow.db"
    assert (
        make_tracking_uri(find_storage("elsewhere"), None)
        == f"sqlite:///{workplace}/elsewhere/mlflow.db"
    )
    assert make_tracking_uri(find_storage(None), "http://127.0.0.1:1") == "http://127.0.0.1:1"


@pytest.mark.parametrize("where", ["folder", "text", "locked"])
def test_a_database_that_cannot_be_written_is_told_with_the_way_out_and_hurts_nothing(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("tune_cifar.tracking.store.SQLITE_TIMEOUT_SECONDS", 0.05)
    words = {
        "folder": "unable to open database file",
        "text": "file is not a database",
        "locked": "database is locked",
    }
    storage = workplace / "my runs"
    path = storage / ("no/such/folder/mlflow.db" if where == "folder" else "mlflow.db")
    storage.mkdir()
    if where == "text":
        path.write_text("this is no database, whatever its name says\n" * 40)
    with closing(sqlite3.connect(path if where == "locked" else ":memory:")) as other:
        other.execute("BEGIN IMMEDIATE")
        faults = ship(storage, f"sqlite:///{path}", make_events())
    got = f"TrackingError: {path}: a SQLite database must be writable there, got: {words[where]}"
    end = way_out(storage, f"'sqlite:///{path}'" if where == "folder" else None)
    assert faults == [f"MLflow must take all runs, got 6 left over: {got}. {end}"]


def test_the_way_out_of_the_usual_run_store_is_short(workplace: Path) -> None:
    storage = find_storage(None)
    storage.mkdir()
    (storage / "mlflow.db").write_text("this is no database\n" * 40)
    (fault,) = ship(storage, make_tracking_uri(storage, None), make_events())
    assert fault.endswith(
        "The record is whole. Complete MLflow from it: python -m tune_cifar sync --search s7-1"
    )


def test_a_shipper_that_heard_of_nothing_due_closes_at_once(tmp_path: Path) -> None:
    """Such as after Ctrl-C in a training's first epochs: MLflow is not even imported, its server not asked."""
    budget = {"trials": 1, "rungs": [2, 3]}
    assert ship(tmp_path, "http://127.0.0.1:9", make_trial(0, [0.1], None), budget=budget) == []


def test_the_ui_of_a_store_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TrackingError, match=r"mlflow\.db: an MLflow database must be there, got none\."
    ):
        run_ui(make_tracking_uri(tmp_path, None), None)


@pytest.mark.slow
def test_a_ui_that_ends_at_once_says_why(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says\n" * 40)
    with pytest.raises(
        TrackingError, match=r"must keep running, got exit status 1: .*file is not a database"
    ):
        run_ui(make_tracking_uri(tmp_path, None), None)


def test_a_port_in_use_is_refused_for_the_ui(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            TrackingError, match=f"--port: a free port must be given, got {port}, which is in use"
        ):
            run_ui(make_tracking_uri(tmp_path, None), port)


def test_the_ui_has_the_same_port_each_time_unless_it_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tune_cifar.tracking.server import _find_port

    port = find_free_port()
    monkeypatch.setattr("tune_cifar.tracking.server.UI_PORT", port)
    assert _find_port() == port
    with socket.create_server(("127.0.0.1", port)):
        assert _find_port() != port


def test_there_are_no_runs_to_delete_where_there_is_no_database(tmp_path: Path) -> None:
    state = write_record(tmp_path, make_header(), make_events())
    assert delete_runs(make_tracking_uri(tmp_path, None), tmp_path, state) == 0
    assert not (tmp_path / "mlflow.db").exists()


# What is shipped


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As MLflow lays it out, which takes seconds: for those tests that are not about that."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlruns.make_client(f"sqlite:///{path}")
    return path


@pytest.fixture
def place(tmp_path: Path, empty_database: Path) -> Path:
    """A run store whose database is laid out, and empty."""
    shutil.copy(empty_database, tmp_path)
    return tmp_path


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
        return Path(self.client.download_artifacts(run.info.run_id, name)).read_text(
            encoding="utf-8"
        )

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
    assert shipped.num_runs == 6 and set(shipped.children) == {
        f"s7-1:{number}" for number in range(5)
    }
    parents = {run.data.tags["mlflow.parentRunId"] for run in shipped.children.values()}
    assert parents == {shipped.parent.info.run_id}
    assert shipped.parent.info.run_name == "s7-1"
    assert shipped.children["s7-1:4"].info.run_name == "004 s7-1"


@pytest.mark.slow
def test_statuses_and_tags_say_how_every_run_ended_and_on_what(shipped: Shipped) -> None:
    statuses = {
        run_id: (run.info.status, run.data.tags["status"])
        for run_id, run in shipped.children.items()
    }
    assert statuses == {
        "s7-1:0": ("FINISHED", "complete"),
        "s7-1:1": ("FINISHED", "complete"),
        "s7-1:2": ("KILLED", "stopped"),
        "s7-1:3": ("FAILED", "diverged"),
        "s7-1:4": ("FAILED", "failed"),
    }
    tags = shipped.children["s7-1:2"].data.tags
    wanted = {
        "search": "s7-1",
        "origin": "sampler",
        "reason": "it stopped",
        "data": "cifar10",
        "split_hash": "h1",
    }
    wanted |= {"fingerprint": CONFIG.fingerprint, "git_commit": "abc"}
    assert {name: tags[name] for name in wanted} == wanted
    parent = shipped.parent.data.tags
    wanted = {
        "search": "s7-1",
        "kind": "search",
        "tier": "full",
        "data": "cifar10",
        "data_digest": "d1",
        "seed": "1",
    }
    assert {name: parent[name] for name in wanted} == wanted


@pytest.mark.slow
def test_params_are_exactly_the_living_knobs(shipped: Shipped) -> None:
    dead = inactive_knobs(CONFIG)
    living = {
        name: str(value)
        for name, value in CONFIG.model_dump(mode="json").items()
        if name not in dead
    }
    assert all(run.data.params == living for run in shipped.children.values())


@pytest.mark.slow
def test_metrics_have_one_point_per_epoch_and_the_epoch_as_their_step(shipped: Shipped) -> None:
    run = shipped.children["s7-1:1"]
    assert shipped.read_history(run, "val_acc") == [(1, 0.4), (2, 0.6), (3, 0.8)]
    for name in EPOCH_METRICS:
        wanted = [
            (epoch, getattr(make_result(epoch, acc), name))
            for epoch, acc in enumerate((0.4, 0.6, 0.8), 1)
        ]
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
    assert (
        stamps[1] - run.info.start_time == 2000
        and 6000 <= run.info.end_time - run.info.start_time < 60_000
    )
    assert shipped.parent.info.start_time == 1769860800000  # 2026-01-31T12:00:00 UTC, the header's


@pytest.mark.slow
def test_artifacts_hold_config_numerics_environment_and_the_best_weights(
    shipped: Shipped, storage: Path
) -> None:
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
    assert (storage / "mlartifacts" / "s7").is_dir(), (
        "artifacts lie in the run store, not where the command ran"
    )


@pytest.mark.slow
def test_the_parent_ends_with_best_gain_and_reason(shipped: Shipped) -> None:
    assert shipped.parent.info.status == "FINISHED"
    assert (
        shipped.parent.data.tags["end"] == "all trials"
        and shipped.parent.data.tags["best_run_id"] == "s7-1:1"
    )
    metrics = shipped.parent.data.metrics
    assert metrics["best_val_acc"] == 0.8 and metrics["gain_over_baseline"] == pytest.approx(0.1)


@pytest.mark.slow
def test_a_search_on_the_stand_in_is_kept_apart_and_tagged(place: Path) -> None:
    """And an interrupted one is KILLED."""
    info = DataInfo(name="shapes", digest="d2", split_hash="h2")
    assert ship(place, make_tracking_uri(place, None), make_events("interrupted"), data=info) == []
    shipped = Shipped(place, "s7 (shapes)")
    assert shipped.client.get_experiment_by_name("s7") is None
    tags = [run.data.tags["data"] for run in (shipped.parent, *shipped.children.values())]
    assert tags == ["shapes"] * 6
    assert (shipped.parent.info.status, shipped.parent.data.tags["end"]) == (
        "KILLED",
        "interrupted",
    )
    assert (
        shipped.read_artifact(shipped.children["s7-1:1"], "weights.safetensors")
        == "the best weights"
    )


@pytest.mark.slow
def test_recorded_times_are_the_runs_times_and_an_end_is_never_before_the_last_epoch(
    place: Path,
) -> None:
    times = [("2026-01-31T12:01:00+00:00", "2026-01-31T12:01:30.250000+00:00")]
    times.append(
        ("2026-01-31T12:02:00+00:00", "2026-01-31T11:02:10+00:00")
    )  # the clock was set back
    events: list[Event] = []
    for number, (start, end) in enumerate(times):
        events += [
            make_start(number, time=start),
            EpochReported(trial=number, result=make_result(1)),
        ]
        events.append(TrialEnded(trial=number, status="stopped", reason="it stopped", time=end))
    assert (
        ship(
            place,
            make_tracking_uri(place, None),
            [*events, SearchEnded(reason="x", wall_seconds=9)],
        )
        == []
    )
    shipped = Shipped(place, "s7")
    spans = [
        (run.info.start_time, run.info.end_time) for _, run in sorted(shipped.children.items())
    ]
    noon = 1769860800000
    assert spans == [(noon + 60_000, noon + 90_250), (noon + 120_000, noon + 122_000)]
    assert shipped.parent.info.end_time == noon + 9_000


@pytest.mark.slow
def test_a_long_training_goes_into_several_batches_and_loses_nothing(place: Path) -> None:
    config = CONFIG.model_copy(update={"epochs": 200})
    events = make_trial(0, [epoch / 300 for epoch in range(200)], "complete", config)
    assert len(events) * len(EPOCH_METRICS) > mlruns.METRICS_PER_BATCH
    write_record(place, make_header(), events)
    assert sync(place) == SyncReport("s7-1", shipped=1, already=0, closed=0)
    shipped = Shipped(place, "s7")
    history = shipped.read_history(shipped.children["s7-1:0"], "val_acc")
    assert history == [(epoch + 1, epoch / 300) for epoch in range(200)]


CYCLES = {"trials": 4, "rungs": [1, 2, 3], "fidelity": "cycles"}


@pytest.mark.slow
def test_the_epochs_of_all_cycles_follow_one_another(place: Path) -> None:
    """A metric's step counts what was paid for; params are the whole training's, the config that of the last cycle."""
    events = [
        *make_cycles(0, COURSES, "complete"),
        *make_cycles(1, {1: [0.4], 2: [0.1, 0.3]}, "stopped"),
    ]
    events += [
        *make_cycles(2, {1: [0.2]}, "diverged", cycle=2),
        SearchEnded(reason="x", wall_seconds=9.0),
    ]
    assert ship(place, make_tracking_uri(place, None), events, budget=CYCLES) == []
    shipped = Shipped(place, "s7")
    whole, stopped, diverged = (shipped.children[f"s7-1:{number}"] for number in range(3))
    assert shipped.read_history(whole, "val_acc") == list(
        enumerate([0.5, 0.2, 0.6, 0.1, 0.3, 0.7], 1)
    )
    assert shipped.read_history(whole, "score") == [(6, 0.7)]
    assert shipped.read_history(stopped, "val_acc") == [(1, 0.4), (2, 0.1), (3, 0.3)]
    assert shipped.read_history(diverged, "val_acc") == [(1, 0.2)]
    assert [run.data.tags["epochs_done"] for run in (whole, stopped, diverged)] == ["6", "3", "1"]
    for run, epochs in ((whole, 3), (stopped, 2), (diverged, 2)):
        assert run.data.tags["fingerprint"] == CONFIG.shorten(epochs).fingerprint
        assert TrainConfig(
            **json.loads(shipped.read_artifact(run, "config.json"))
        ) == CONFIG.shorten(epochs)
        assert run.data.params["epochs"] == "3"
    stamps = [
        point.timestamp for point in shipped.client.get_metric_history(whole.info.run_id, "val_acc")
    ]
    assert sorted(stamps) == [whole.info.start_time + 2000 * epoch for epoch in range(1, 7)]


@pytest.mark.slow
def test_a_trial_in_cycles_appears_at_the_end_of_each_and_goes_on_there_when_it_is_resumed(
    place: Path,
) -> None:
    start, *epochs, end = make_cycles(0, COURSES, "complete")
    with drive(place, budget=CYCLES) as driver:
        driver.tell(start, epochs[0])
        wait_for(lambda: look(place).get("000 s7-1") == ("RUNNING", 1))
        wait_for(lambda: driver.uploader._pending == {})
        driver.tell(epochs[1])  # epoch 1 of a cycle of 2 is no rung
        assert driver.uploader._pending == {}
        driver.tell(SearchEnded(reason="interrupted", wall_seconds=9.0))
        assert driver.uploader.close(600) == []
        assert look(place)["000 s7-1"] == ("KILLED", 2)
        driver.resume()
        driver.tell(*epochs[2:], end, SearchEnded(reason="all trials", wall_seconds=9.0))
        assert driver.uploader.close(600) == []
    shipped = Shipped(place, "s7")
    history = shipped.read_history(shipped.children["s7-1:0"], "val_acc")
    assert history == list(enumerate([0.5, 0.2, 0.6, 0.1, 0.3, 0.7], 1))


@pytest.mark.slow
def test_a_retried_trial_says_how_often_and_why(place: Path) -> None:
    start, *rest = make_trial(0, [0.3, 0.5, 0.7], "complete")
    retries = [
        TrialRetried(trial=0, fault=fault, text="...") for fault in ("worker died", "out of memory")
    ]
    write_record(place, make_header(), [start, *retries, *rest])
    sync(place)
    tags = Shipped(place, "s7").children["s7-1:0"].data.tags
    assert (tags["retries"], tags["faults"]) == ("2", "worker died, out of memory")


# While a search runs


class Broken:
    """MLflow's real client that counts its calls by name and breaks at one of them: before or after it did its work."""

    def __init__(self, real: Any, breaks: Breaks) -> None:
        self.real, self.breaks = real, breaks

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method, breaks = getattr(self.real, name), self.breaks

        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            breaks.calls.append(name)
            is_it = len(breaks.calls) == breaks.number
            if is_it and not breaks.is_late:
                raise breaks.fault
            result = method(*args, **options)
            if is_it:
                raise breaks.fault
            return result

        return call


class Breaks:
    """What breaks of all calls to MLflow, counted from 1, and how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.number, self.is_late, self.fault = 0, False, BaseException()
        make_client = mlruns.make_client
        monkeypatch.setattr(
            "tune_cifar.tracking.runs.make_client", lambda uri: Broken(make_client(uri), self)
        )

    def set(self, number: int, is_late: bool, fault: BaseException) -> None:
        self.calls.clear()
        self.number, self.is_late, self.fault = number, is_late, fault


def wait_for(condition: Callable[[], object], seconds: float = 600.0) -> None:
    """Until the background thread got there."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def look(storage: Path) -> dict[str, tuple[str, int]]:
    """Status and number of epochs of every run in the run store's database, by name; empty before there is any."""
    path = storage / "mlflow.db"
    if not path.exists() or not path.stat().st_size:
        return {}
    client = connect(make_tracking_uri(storage, None))
    experiments = [found.experiment_id for found in client.search_experiments()]
    found = {}
    for run in client.search_runs(experiments):
        history = client.get_metric_history(run.info.run_id, "val_acc")
        assert run.info.run_name not in found, "a run must be there once"
        found[run.info.run_name] = (run.info.status, len(history))
    return found


@pytest.mark.slow
def test_a_trial_appears_at_a_rung_and_is_completed_at_its_end_with_a_batch_each(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks = Breaks(monkeypatch)
    start, first, second, third, end = make_trial(0, [0.3, 0.5, 0.7], "complete")
    with drive(place, budget={"trials": 1, "rungs": [2, 3]}) as driver:
        driver.tell(start, first, second)
        wait_for(lambda: look(place).get("000 s7-1") == ("RUNNING", 2))
        assert look(place)["s7-1"] == ("RUNNING", 0)
        driver.tell(third, end)
        wait_for(lambda: look(place)["000 s7-1"] == ("FINISHED", 3))
        assert breaks.calls.count("log_batch") == 3, (
            "one for the parent, one for the rung, one for the end"
        )
        driver.tell(SearchEnded(reason="all trials", wall_seconds=6.0))
        assert driver.uploader.close(600) == []
    assert look(place) == {"s7-1": ("FINISHED", 0), "000 s7-1": ("FINISHED", 3)}


@pytest.mark.slow
def test_a_trial_that_has_ended_when_the_shipper_gets_to_it_goes_in_one_batch(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks = Breaks(monkeypatch)
    write_record(place, make_header(), make_events())
    assert sync(place) == SyncReport("s7-1", shipped=5, already=0, closed=0)
    assert breaks.calls.count("create_run") == 1 + 5
    assert breaks.calls.count("log_batch") == 2 + 5, "two for the parent: its start and its end"
    breaks.calls.clear()
    assert sync(place) == SyncReport("s7-1", shipped=0, already=5, closed=0)
    assert breaks.calls == ["get_experiment_by_name", "search_runs"]


@pytest.mark.slow
def test_an_interrupted_search_is_killed_and_its_runs_go_on_when_it_is_resumed(place: Path) -> None:
    start, first, *rest = make_trial(1, [0.4, 0.6, 0.8], "complete")
    third = make_trial(2, [0.2, 0.3, 0.4], "complete")
    with drive(place, budget={"trials": 3, "rungs": [2, 3]}) as driver:
        driver.tell(
            *make_trial(0, [0.3, 0.5, 0.7], "complete"), start, third[0], first, *third[1:3]
        )
        driver.tell(SearchEnded(reason="interrupted", wall_seconds=9.0))
        assert driver.uploader.close(600) == []
        killed = {"s7-1": ("KILLED", 0), "000 s7-1": ("FINISHED", 3), "001 s7-1": ("KILLED", 1)}
        assert look(place) == killed | {"002 s7-1": ("KILLED", 2)}
        driver.resume()
        going = {"s7-1": ("RUNNING", 0), "000 s7-1": ("FINISHED", 3), "001 s7-1": ("RUNNING", 1)}
        wait_for(lambda: look(place) == going | {"002 s7-1": ("RUNNING", 2)})
        driver.tell(*rest, *third[3:], *make_trial(3, [0.1], "diverged"))
        driver.tell(SearchEnded(reason="all trials", wall_seconds=9.0))
        assert driver.uploader.close(600) == []
    shipped = Shipped(place, "s7")
    statuses = [run.info.status for _, run in sorted(shipped.children.items())]
    assert statuses == ["FINISHED", "FINISHED", "FINISHED", "FAILED"] and shipped.num_runs == 5
    assert shipped.read_history(shipped.children["s7-1:1"], "val_acc") == [
        (1, 0.4),
        (2, 0.6),
        (3, 0.8),
    ]
    tags = shipped.parent.data.tags
    assert (shipped.parent.info.status, tags["end"], tags["resumes"]) == (
        "FINISHED",
        "all trials",
        "1",
    )
    assert shipped.parent.info.end_time == 1769860800000 + 3_600_000 + 9_000, (
        "counted from the resume"
    )
    assert "resume-1.json" in shipped.list_artifacts(shipped.parent)
    assert shipped.parent.data.metrics["best_val_acc"] == 0.8
    commits = [run.data.tags["git_commit"] for _, run in sorted(shipped.children.items())]
    assert commits == ["abc", "def", "def", "def"], "under which driver each ended"
    assert sync(place) == SyncReport("s7-1", shipped=0, already=4, closed=0)


@pytest.mark.slow
def test_what_is_heard_while_an_attempt_fails_is_shipped_by_the_next(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.tracking.upload.FIRST_PAUSE_SECONDS", 0.1)
    begun, told, make_client = threading.Event(), threading.Event(), mlruns.make_client

    def fail_once(uri: str) -> Any:
        if begun.is_set():
            return make_client(uri)
        begun.set()
        told.wait(600)
        raise OSError("not yet")

    monkeypatch.setattr("tune_cifar.tracking.runs.make_client", fail_once)
    start, first, *rest = make_trial(0, [0.3, 0.5, 0.7], "complete")
    with drive(place) as driver:
        driver.tell(start, first)
        assert begun.wait(600)
        driver.tell(*rest)
        told.set()
        wait_for(lambda: look(place).get("000 s7-1") == ("FINISHED", 3))
        assert driver.uploader.close(600) == []


@pytest.mark.slow
def test_a_resumed_search_first_ships_what_mlflow_lacks(place: Path) -> None:
    events = [*make_trial(0, [0.3, 0.5, 0.7], "complete"), *make_trial(1, [], None)]
    write_record(
        place, make_header(), [*events, SearchEnded(reason="interrupted", wall_seconds=9.0)]
    )
    with closing(Record.open(search_folder(place, "s7-1"))) as record:
        record.append(make_tracking_resume())
        uploader = BackgroundUploader(make_tracking_uri(place, None), place, record.state)
        wait_for(lambda: look(place) == {"s7-1": ("RUNNING", 0), "000 s7-1": ("FINISHED", 3)})
        assert uploader.close(600) == []
    assert look(place) == {"s7-1": ("KILLED", 0), "000 s7-1": ("FINISHED", 3)}


KILLED = """
import sys, time
from pathlib import Path
from tests.tracking.test_upload import make_start, make_trial
from tests.builders import drive
with drive(Path(sys.argv[1])) as driver:
    driver.tell(*make_trial(0, [0.3, 0.5, 0.7], "complete"), *make_trial(1, [0.4], None))
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_drivers_runs_are_closed_by_sync_and_go_on_when_the_search_is_resumed(
    place: Path,
) -> None:
    """While it lives they are left alone."""
    root = Path(__file__).parents[2]
    running = {"s7-1": ("RUNNING", 0), "000 s7-1": ("FINISHED", 3), "001 s7-1": ("RUNNING", 1)}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(place)], cwd=root) as driver:
        try:
            wait_for(lambda: look(place) == running)
            live = sync(place, is_live=True)
        finally:
            driver.kill()
    assert live == SyncReport("s7-1", shipped=0, already=2, closed=0), "its own driver ships"
    assert look(place) == running
    assert sync(place) == SyncReport("s7-1", shipped=0, already=2, closed=2)
    assert look(place) == {
        "s7-1": ("KILLED", 0),
        "000 s7-1": ("FINISHED", 3),
        "001 s7-1": ("KILLED", 1),
    }
    assert Shipped(place, "s7").parent.data.tags["end"] == "driver died"
    assert sync(place) == SyncReport("s7-1", shipped=0, already=2, closed=0)
    with closing(Record.open(search_folder(place, "s7-1"))) as record:
        uploader = BackgroundUploader(make_tracking_uri(place, None), place, record.state)
        wait_for(lambda: look(place) == running)
        for event in (
            *make_trial(1, [0.4, 0.6, 0.8], "complete")[2:],
            SearchEnded(reason="all trials", wall_seconds=9),
        ):
            record.append(event)
            uploader.on_event(record.state, event)
        assert uploader.close(600) == []
    assert look(place) == {
        "s7-1": ("FINISHED", 0),
        "000 s7-1": ("FINISHED", 3),
        "001 s7-1": ("FINISHED", 3),
    }


# The same record twice


SYNC = """
import sys
from pathlib import Path
from tune_cifar.record.journal import read_state
from tune_cifar.record.store import search_folder
from tune_cifar.tracking.upload import sync_search
uri, storage, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
print(sync_search(uri, storage, read_state(search_folder(storage, name))))
"""


def start_sync(uri: str, storage: Path, name: str = "s7-1") -> subprocess.Popen[str]:
    """`sync_search` in another process."""
    command = [sys.executable, "-c", SYNC, uri, str(storage), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_all(client: Any, name: str) -> dict[str, Any]:
    """All that MLflow holds of a search, but for the ids it makes up; the search's name is left out of the texts."""
    experiment = client.get_experiment_by_name("s7").experiment_id
    runs = client.search_runs([experiment], f"tags.search = '{name}'")
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    found: dict[str, Any] = {}
    for run in runs:
        tags = dict(run.data.tags)
        if run is not parent:
            assert tags.pop("mlflow.parentRunId") == parent.info.run_id
        points = [client.get_metric_history(run.info.run_id, metric) for metric in run.data.metrics]
        folder = Path(url2pathname(urlsplit(run.info.artifact_uri).path))
        key = run.info.run_name.replace(name, "it")
        assert key not in found
        found[key] = {
            "info": (run.info.status, run.info.start_time, run.info.end_time),
            "tags": {tag: value.replace(name, "it") for tag, value in tags.items()},
            "params": dict(run.data.params),
            "metrics": sorted(
                (p.key, p.step, p.timestamp, p.value) for history in points for p in history
            ),
            "artifacts": {
                path.name: path.read_text().replace(name, "it") for path in folder.glob("*")
            },
        }
    return found


@pytest.mark.slow
def test_shipping_a_record_again_also_from_another_process_changes_nothing(storage: Path) -> None:
    client = connect(make_tracking_uri(storage, None))
    before = read_all(client, "s7-1")
    assert sync(storage) == SyncReport("s7-1", shipped=0, already=5, closed=0)
    process = start_sync(make_tracking_uri(storage, None), storage)
    out, err = process.communicate(timeout=600)
    assert out == f"{SyncReport('s7-1', shipped=0, already=5, closed=0)}\n", err
    assert read_all(client, "s7-1") == before and len(before) == 6


def write_short_record(storage: Path, name: str) -> SearchState:
    """An interrupted search: trials complete with weights, failed with an error file, unfinished."""
    first = make_trial(0, [0.3, 0.5, 0.7], None)
    first.append(
        TrialEnded(
            trial=0, status="complete", score=0.7, reason="all epochs", weights_file="weights"
        )
    )
    end = SearchEnded(reason="interrupted", wall_seconds=60.0)
    state = write_record(
        storage,
        make_header(name),
        [*first, *make_trial(1, [0.2], "failed"), *make_trial(2, [0.1], None), end],
    )
    (state.folder / "weights").write_text("the best weights")
    state.trial_folder(1).mkdir(parents=True)
    (state.trial_folder(1) / "error.txt").write_text("Traceback: it broke\n")
    return state


@pytest.mark.slow
def test_a_searchs_trials_come_back_from_mlflow_as_the_record_has_them(place: Path) -> None:
    """All that was shipped; the seconds of training and the dead knobs were not."""
    recipe = CONFIG.model_copy(
        update={"max_lr": 0.1 + 0.2, "cutout_p": 0.5, "cutout_size": 8, "warm_restarts": (1,)}
    )
    ending = [
        TrialEnded(trial=6, status="failed", reason="it broke", score=None),
        SearchEnded(reason="x", wall_seconds=9.0),
    ]
    events = [
        *make_events()[:-1],
        *make_trial(5, [0.2, 0.4, 0.6], "complete", recipe),
        make_start(6),
        *ending,
    ]
    state = write_record(place, make_header(), events)
    uri = make_tracking_uri(place, None)
    sync_search(uri, place, state)
    recorded, shipped = load_trials([state]), load_uploaded_trials(uri, "s7-1")
    assert list(shipped.columns) == list(recorded.columns) and len(shipped) == 7
    absent = {knob: set(shipped["trial"][shipped[knob].isna()]) for knob in KNOBS}
    dead = {
        knob: {n for n, trial in state.trials.items() if knob in inactive_knobs(trial.full_config)}
        for knob in KNOBS
    }
    assert absent == dead and shipped["train_seconds"].isna().all()
    for name in recorded.columns.difference(["train_seconds", "ended_seq"]):
        known = ~shipped["trial"].isin(dead.get(name, set()))
        assert list(
            shipped[name][known].fillna(-1 if name in ("val_acc", "score") else "")
        ) == list(recorded[name][known].fillna(-1 if name in ("val_acc", "score") else "")), name
    assert sorted(shipped["ended_seq"]) == list(range(1, 8))
    assert best_so_far(shipped)["best"].max() == best_so_far(recorded)["best"].max() == 0.8
    groups = [(group, list(rows["trial"])) for group, rows in split_groups(shipped)]
    assert groups == [(group, list(rows["trial"])) for group, rows in split_groups(recorded)]


@pytest.mark.slow
def test_the_newest_search_of_a_name_and_its_fuller_copies_are_read(place: Path) -> None:
    uri = make_tracking_uri(place, None)
    sync_search(uri, place, write_record(place, make_header(), make_events()))
    later = make_header(created="2026-02-01T12:00:00+00:00")
    sync_search(
        uri, place, write_record(place / "again", later, make_trial(0, [0.3, 0.5, 0.9], "complete"))
    )
    client, tags = (
        connect(uri),
        {"search": "s7-1", "search_created": later.created, "trial": "0", "run_id": "s7-1:0"},
    )
    client.create_run("1", 1000, tags | {"origin": "baseline"}, "a copy")
    shipped = load_uploaded_trials(uri, "s7-1")
    assert list(shipped["trial"]) == [0] and list(shipped["score"]) == [0.9]
    with pytest.raises(
        TrackingError, match=r"a search of the name must be there, got 's7-2'\. Ship it: python -m"
    ):
        load_uploaded_trials(uri, "s7-2")


def test_trials_of_a_database_that_is_not_there_are_refused_and_none_is_made(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        TrackingError, match=r"mlflow\.db: an MLflow database must be there, got none\."
    ):
        load_uploaded_trials(make_tracking_uri(tmp_path, None), "s7-1")
    assert not (tmp_path / "mlflow.db").exists()


class Crash(BaseException):
    """The process dies: nothing catches it."""


@pytest.mark.slow
@pytest.mark.parametrize("is_late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", [Crash, RuntimeError], ids=["a crash", "a fault"])
def test_after_any_single_call_that_broke_the_runs_are_those_of_a_whole_shipping(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], is_late: bool
) -> None:
    """A crash ends the process, and another one syncs; a fault is survived by the same one."""
    uri, client, breaks = make_tracking_uri(place, None), None, Breaks(monkeypatch)
    names = (f"{kind.__name__}-{'late' if is_late else 'early'}-{number}" for number in range(1000))
    whole = write_short_record(place, next(names))
    breaks.set(0, False, Crash())
    assert sync_search(uri, place, whole) == SyncReport(
        whole.header.name, shipped=3, already=0, closed=0
    )
    num_calls = len(breaks.calls)
    client = connect(uri)
    expected = read_all(client, whole.header.name)
    assert len(expected) == 4 and num_calls > 15
    for number in range(1, num_calls + 1):
        state = write_short_record(place, next(names))
        breaks.set(number, is_late, kind("it broke"))
        if kind is Crash:
            with pytest.raises(Crash):
                sync_search(uri, place, state)
            sync_search(uri, place, state)
        else:
            sync_search(uri, place, state)
            assert len(breaks.calls) > num_calls, "some were made again"
        is_same = read_all(client, state.header.name) == expected
        assert is_same, f"call {number}, {breaks.calls[number - 1]}"
        report = SyncReport(state.header.name, shipped=0, already=3, closed=0)
        assert sync_search(uri, place, state) == report


@pytest.mark.slow
def test_second_copies_of_runs_are_deleted(place: Path) -> None:
    """A server that answers too late makes some: the run was created, and nobody heard of it."""
    uri = make_tracking_uri(place, None)
    assert ship(place, uri, make_events()) == []
    client = connect(uri)
    before = read_all(client, "s7-1")
    shipped = Shipped(place, "s7")
    identity = {"search": "s7-1", "search_created": make_header().created}
    experiment = shipped.parent.info.experiment_id
    client.create_run(experiment, 1000, identity, "s7-1")
    for trial in ("0", "4"):
        tags = identity | {"trial": trial, "mlflow.parentRunId": shipped.parent.info.run_id}
        client.create_run(experiment, 1000, tags, "a copy")
    assert len(client.search_runs([experiment])) == 6 + 3
    assert sync(place) == SyncReport("s7-1", shipped=0, already=5, closed=0)
    assert read_all(client, "s7-1") == before


@pytest.mark.slow
def test_a_search_of_the_same_name_that_came_later_has_runs_of_its_own(place: Path) -> None:
    uri = make_tracking_uri(place, None)
    first = write_record(place, make_header(), make_events())
    sync_search(uri, place, first)
    second = write_record(
        place / "again", make_header(created="2026-02-01T12:00:00+00:00"), make_events()
    )
    assert sync_search(uri, place, second).shipped == 5
    assert len(connect(uri).search_runs(["1"])) == 12
    assert delete_runs(uri, place, first) == 6
    assert delete_runs(uri, place, first) == 0
    assert sync_search(uri, place, second).already == 5


@pytest.mark.slow
def test_two_processes_may_initialise_one_database_at_once(tmp_path: Path) -> None:
    uri, processes = f"sqlite:///{tmp_path}/both.db", []
    for name in ("s7-1", "s7-2"):
        write_record(tmp_path, make_header(name), make_events())
        processes.append(start_sync(uri, tmp_path, name))
    answers = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert all("shipped=5, already=0" in out for out, _ in answers)
    experiment = connect(uri).get_experiment_by_name("s7")
    runs = connect(uri).search_runs([experiment.experiment_id])
    assert len(runs) == 2 * 6 and {run.data.tags["search"] for run in runs} == {"s7-1", "s7-2"}
    assert list(tmp_path.glob("*.new*")) == []


@pytest.mark.slow
def test_a_search_that_another_process_ships_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.tracking.upload.LOCK_SECONDS", 0.1)
    with drive(place) as driver:
        driver.tell(*make_trial(0, [0.3, 0.5, 0.7], "complete"))
        wait_for(lambda: "000 s7-1" in look(place))
        with pytest.raises(
            TrackingError, match="one process alone must ship a search, got another at it"
        ):
            sync(place)
        assert driver.uploader.close(600) == []
    assert look(place)["s7-1"] == ("KILLED", 0), "no end was recorded"


@pytest.mark.slow
def test_a_deleted_experiment_is_named_with_the_way_back(place: Path) -> None:
    uri = make_tracking_uri(place, None)
    assert ship(place, uri, make_events()) == []
    connect(uri).delete_experiment("1")
    with pytest.raises(
        TrackingError,
        match=r"experiment 's7' must be active, got a deleted one\. Restore it: mlflow ",
    ):
        sync(place)
    connect(uri).restore_experiment("1")
    assert sync(place).already == 5


# Faults of the store


@contextmanager
def serve(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A tiny server on loopback that answers everything so; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_PUT = do_PATCH = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
def test_a_server_that_hangs_blocks_neither_the_driver_nor_the_end(place: Path) -> None:
    asked, release = threading.Event(), threading.Event()

    def hang(request: BaseHTTPRequestHandler) -> None:
        asked.set()
        release.wait(30)

    with serve(hang) as uri, ExitStack() as stack:
        driver = stack.enter_context(drive(place, uri))
        stack.callback(release.set)
        first, *rest = make_events()
        driver.tell(first, *rest[:4])
        assert asked.wait(600)
        driver.tell(*rest[4:])  # it still hangs
        (fault,) = driver.uploader.close(0.5)
        assert not release.is_set()
    assert fault.startswith(
        "MLflow must take all runs within 0.5 s, got no end of it. The record is whole."
    )
    assert sync(place) == SyncReport("s7-1", shipped=5, already=0, closed=0)


@pytest.mark.slow
def test_a_server_that_hangs_is_given_up_at_the_timeout(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    release = threading.Event()
    with serve(lambda request: release.wait(30) and None) as uri:
        (fault,) = ship(place, uri, make_events())
        release.set()
    assert (
        "got 6 left over: MlflowException: ReadTimeoutError(" in fault and "Read timed out" in fault
    )


@pytest.mark.slow
def test_a_server_that_answers_500_is_told_and_sync_completes_elsewhere(place: Path) -> None:
    with serve(lambda request: request.send_error(500)) as uri:
        (fault,) = ship(place, uri, make_events())
    assert (
        fault.startswith("MLflow must take all runs, got 6 left over: MlflowException: ")
        and "500" in fault
    )
    assert f"--tracking-uri {uri}" in fault
    assert sync(place) == SyncReport("s7-1", shipped=5, already=0, closed=0)


@pytest.mark.slow
def test_no_credentials_of_the_address_stand_in_a_sentence(place: Path) -> None:
    state = write_record(place, make_header("s7-2"), make_events())
    for host in (f"127.0.0.1:{find_free_port()}", "no such host"):
        uri = f"http://somebody:hunter2@{host}"
        sentences = ship(place / host, uri, make_events())
        for call in (sync_search, delete_runs):
            with pytest.raises(TrackingError) as caught:
                call(uri, place, state)
            sentences.append(str(caught.value))
        assert len(sentences) == 3
        for sentence in sentences:
            assert "hunter2" not in sentence and "somebody" not in sentence and "\n" not in sentence


@pytest.mark.slow
def test_faults_of_single_runs_do_not_keep_the_others_back(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials' artifacts cannot be written; the others arrive, and the two when they can."""
    log_artifacts = mlruns.SearchRuns._log_artifacts
    cured = threading.Event()

    def refuse(self: mlruns.SearchRuns, run: mlruns.Run, files: Any) -> None:
        if run.tags.get("trial") in ("0", "1") and not cured.is_set():
            raise OSError("no room for artifacts")
        log_artifacts(self, run, files)

    monkeypatch.setattr("tune_cifar.tracking.runs.SearchRuns._log_artifacts", refuse)
    (fault,) = ship(place, make_tracking_uri(place, None), make_events())
    assert fault.startswith(
        "MLflow must take all runs, got 2 left over: OSError: no room for artifacts. "
    )
    statuses = {name: status for name, (status, _) in look(place).items()}
    assert statuses["s7-1"] == "FINISHED" and "RUNNING" not in statuses.values()
    cured.set()
    assert sync(place) == SyncReport("s7-1", shipped=2, already=3, closed=0)
    assert Shipped(place, "s7").list_artifacts(Shipped(place, "s7").children["s7-1:1"]) >= {
        "weights.safetensors"
    }


@pytest.mark.slow
def test_a_disk_that_is_full_under_the_database_is_told_and_sync_completes_it(
    tmp_path: Path,
) -> None:
    """A small tmpfs: MLflow's empty database alone takes most of it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs must be mounted: needs root")
    try:
        uri = f"sqlite:///{disk}/mlflow.db"
        with drive(tmp_path / "runs", uri) as driver:
            driver.tell(*make_trial(0, [0.3, 0.5, 0.7], "complete"))
            wait_for(lambda: driver.uploader._pending == {})
            filler = disk / "filler"
            with (
                filler.open("wb", buffering=0) as file,
                pytest.raises(OSError, match="No space left"),
            ):
                while True:
                    file.write(bytes(4096))
            driver.tell(*make_events()[5:])
            (fault,) = driver.uploader.close(600)
            assert "(sqlite3.OperationalError) database or disk is full" in fault
            assert driver.record.state.is_finished
        filler.unlink()
        state = read_search(tmp_path / "runs")
        assert sync_search(uri, tmp_path / "runs", state).shipped == 4
        runs = connect(uri).search_runs(["1"])
        assert len(runs) == 6 and "RUNNING" not in {run.info.status for run in runs}
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_server_may_be_down_at_the_start_come_be_killed_and_come_back(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.tracking.upload.FIRST_PAUSE_SECONDS", 0.2)
    store, port = make_tracking_uri(place, None), find_free_port()
    write_record(place / "other", make_header("other"), make_events())
    sync_search(
        store, place, read_state(search_folder(place / "other", "other"))
    )  # a database for the server
    events = make_events()
    with drive(place, f"http://127.0.0.1:{port}") as driver:
        driver.tell(*events[:5])
        wait_for(lambda: "Connection refused" in driver.uploader._uploader.fault)
        server, _ = run_ui(store, port)
        try:
            wait_for(lambda: look(place).get("000 s7-1") == ("FINISHED", 3))
            driver.tell(*events[5:7])
            wait_for(lambda: look(place).get("001 s7-1") == ("RUNNING", 1))
        finally:
            os.killpg(server.pid, 9)
            stop_ui(server)
        driver.tell(*events[7:])
        (fault,) = driver.uploader.close(600)
        assert "got 5 left over: MlflowException: " in fault and driver.record.state.is_finished
    assert look(place)["s7-1"] == ("RUNNING", 0), "the server is dead: nobody could say more"
    server, uri = run_ui(store, port)
    try:
        report = sync_search(uri, place, read_search(place))
        assert report == SyncReport("s7-1", shipped=4, already=1, closed=1)
        again = sync_search(uri, place, read_search(place))
        assert again == SyncReport("s7-1", shipped=0, already=5, closed=0)
    finally:
        stop_ui(server)
    found = {name: status for name, status in look(place).items() if name.endswith("s7-1")}
    assert len(found) == 6 and "RUNNING" not in {status for status, _ in found.values()}
    assert (found["s7-1"][0], found["001 s7-1"]) == ("FINISHED", ("FINISHED", 3))


# What the page of the UI opens on


RANGES = {"distributions": {"max_lr": "{}", "dropout": "{}"}, "tier": "cpu"}


@pytest.mark.slow
def test_an_experiment_has_views_of_its_searches_for_each_tier_and_keeps_what_was_changed(
    place: Path,
) -> None:
    uri = make_tracking_uri(place, None)
    single = write_record(
        place, make_header("t", kind="train", distributions={}), make_trial(0, [0.4], None)
    )
    sync_search(uri, place, single)
    assert list_views(uri) == {}, "a training searches nothing"
    sync_search(
        uri, place, write_record(place, make_header("a", **RANGES), make_trial(0, [0.4], None))
    )
    views = list_views(uri)
    assert list(views) == ["s7: Searches", "s7: Trials, best first (cpu)"]
    page = "runs?workflowType=machine_learning&viewStateShareKey=tune_cifar"
    experiment = connect(uri).get_experiment_by_name("s7")
    assert views["s7: Searches"] == f"/#/experiments/{experiment.experiment_id}/{page}_searches"
    trials = json.loads(
        json.loads(experiment.tags["mlflow.sharedViewState.tune_cifar_trials_cpu"])["state"]
    )
    assert trials["selectedColumns"][-2:] == ["params.`max_lr`", "params.`dropout`"]
    assert trials["compareRunCharts"][0]["selectedParams"] == ["max_lr", "dropout"]
    assert experiment.tags["mlflow.note.content"].startswith("The space s7 on cifar10.")

    mine = {
        "mlflow.note.content": "mine",
        "mlflow.sharedViewState.tune_cifar_searches": "mine, and no JSON",
    }
    for name, value in mine.items():
        connect(uri).set_experiment_tag(experiment.experiment_id, name, value)
    sync_search(
        uri, place, write_record(place, make_header("b", distributions={"max_lr": "{}"}), [])
    )
    after = connect(uri).get_experiment_by_name("s7").tags
    assert after == experiment.tags | mine | {
        key: value for key, value in after.items() if key.endswith("tune_cifar_trials_full")
    }
    assert list(list_views(uri)) == [
        "s7: Trials, best first (cpu)",
        "s7: Trials, best first (full)",
    ]


def test_a_view_too_long_for_a_tag_of_mlflow_is_left_out() -> None:
    knobs = dict.fromkeys(KNOBS, "{}")
    found = make_experiment_tags(make_header("a", distributions=knobs)).keys()
    short = make_experiment_tags(make_header("a", distributions={"max_lr": "{}"})).keys()
    assert {name.rpartition(".")[2] for name in short - found} == {"tune_cifar_trials_full"}


@pytest.mark.slow
def test_a_trials_note_says_where_it_comes_from_and_how_it_is_trained_again(
    shipped: Shipped,
) -> None:
    notes = {
        run_id: run.data.tags["mlflow.note.content"] for run_id, run in shipped.children.items()
    }
    assert notes["s7-1:0"].startswith("The baseline of the space")
    assert (
        notes["s7-1:3"]
        == "Proposed by the sampler. Train it again: `python -m tune_cifar reproduce s7-1:3`"
    )
