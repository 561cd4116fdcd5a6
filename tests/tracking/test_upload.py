"""MLflow as a view of the record, with a real MLflow throughout.

What is uploaded; uploading again changes nothing; a store that is down, slow, full or broken never
harms a search.
"""

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from tests.builders import (
    CONFIG,
    STAGE_ACCS,
    find_free_port,
    make_events,
    make_header,
    make_result,
    make_resume,
    make_staged_trial,
    make_start,
    make_trial,
    open_driver,
    upload_events,
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
from tune_cifar.tracking import upload as upload_module
from tune_cifar.tracking.address import make_tracking_uri
from tune_cifar.tracking.runs import EPOCH_METRICS
from tune_cifar.tracking.server import list_views, run_ui, stop_ui
from tune_cifar.tracking.upload import (
    BackgroundUploader,
    SyncReport,
    delete_runs,
    sync_search,
)
from tune_cifar.tracking.views import make_experiment_tags


def read_search(storage: Path) -> SearchState:
    return read_state(search_folder(storage, "s7-1"))


def sync(storage: Path) -> SyncReport:
    """Into the database of the run store."""
    uri = make_tracking_uri(storage, None)
    return sync_search(uri, storage, search_folder(storage, "s7-1"))


def make_hint(storage: Path, uri: str | None = None) -> str:
    more = f" --tracking-uri {uri}" if uri else ""
    command = f"python -m tune_cifar sync --search s7-1 --storage '{storage}'{more}"
    return f"The record is complete. Upload the rest: {command}"


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
def test_a_database_that_cannot_be_written_is_reported_with_a_hint_and_harms_nothing(
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
        faults = upload_events(storage, f"sqlite:///{path}", make_events())
    got = f"TrackingError: {path}: cannot write to this SQLite database: {words[where]}"
    end = make_hint(storage, f"'sqlite:///{path}'" if where == "folder" else None)
    assert faults == [f"MLflow upload incomplete, 6 left over: {got}. {end}"]


def test_the_hint_for_the_usual_run_store_is_short(workplace: Path) -> None:
    storage = find_storage(None)
    storage.mkdir()
    (storage / "mlflow.db").write_text("this is no database\n" * 40)
    (fault,) = upload_events(storage, make_tracking_uri(storage, None), make_events())
    assert fault.endswith(
        "The record is complete. Upload the rest: python -m tune_cifar sync --search s7-1"
    )


def test_sync_reads_a_record_once_nobody_else_uploads_it(tmp_path: Path) -> None:
    """A search that ends meanwhile would be set back to what it was before."""
    uri = f"sqlite:///{tmp_path}/no/such/folder/mlflow.db"
    state = write_record(tmp_path, make_header(), [make_start(0)])
    with ThreadPoolExecutor(1) as pool:
        with upload_module._make_lock(uri, state.folder):
            syncing = pool.submit(sync_search, uri, tmp_path, state.folder)
            time.sleep(0.5)
            with Record.open(state.folder) as record:
                for event in make_trial(0, [0.3, 0.5, 0.7], "complete")[1:]:
                    record.append(event)
        with pytest.raises(TrackingError, match="2 left over"):
            syncing.result()


def test_an_uploader_with_nothing_to_upload_closes_at_once(tmp_path: Path) -> None:
    """As after Ctrl-C in a training's first epochs: MLflow is not imported, no server is asked."""
    budget, events = {"trials": 1, "rungs": [2, 3]}, make_trial(0, [0.1], None)
    assert upload_events(tmp_path, "http://127.0.0.1:9", events, budget=budget) == []


def test_the_ui_of_a_store_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"mlflow\.db: there is no MLflow database\."):
        run_ui(make_tracking_uri(tmp_path, None), None)


@pytest.mark.slow
def test_a_ui_that_ends_at_once_says_why(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # no Python starts
    rule = "MLflow's UI ended with exit status 1: ModuleNotFoundError: .*encodings"
    with pytest.raises(TrackingError, match=rule):
        run_ui(make_tracking_uri(place, None), None)


def test_the_ui_of_a_file_that_is_no_database_says_so(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says\n" * 40)
    with pytest.raises(TrackingError, match="file is not a database"):
        run_ui(make_tracking_uri(tmp_path, None), None)


def test_a_port_in_use_is_refused_for_the_ui(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        rule = f"`port` must be free, got {port}, which is in use"
        with pytest.raises(TrackingError, match=rule):
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


# What is uploaded


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, for the tests that need not wait for their creation."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlruns.make_client(f"sqlite:///{path}")
    return path


@pytest.fixture
def place(tmp_path: Path, empty_database: Path) -> Path:
    """A run store whose database has MLflow's tables, empty ones."""
    shutil.copy(empty_database, tmp_path)
    return tmp_path


def connect(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


class UploadedSearch:
    """What MLflow holds of one uploaded search."""

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
    """A run store with one uploaded search; its name needs quoting in an address."""
    folder = tmp_path_factory.mktemp("my runs")
    assert upload_events(folder, make_tracking_uri(folder, None), make_events()) == []
    return folder


@pytest.fixture(scope="module")
def uploaded(storage: Path) -> UploadedSearch:
    return UploadedSearch(storage, "s7")


@pytest.mark.slow
def test_a_search_is_one_parent_run_with_a_child_per_trial(uploaded: UploadedSearch) -> None:
    assert uploaded.num_runs == 6
    assert set(uploaded.children) == {f"s7-1:{number}" for number in range(5)}
    parents = {run.data.tags["mlflow.parentRunId"] for run in uploaded.children.values()}
    assert parents == {uploaded.parent.info.run_id}
    assert uploaded.parent.info.run_name == "s7-1"
    assert uploaded.children["s7-1:4"].info.run_name == "004 s7-1"


@pytest.mark.slow
def test_statuses_and_tags_say_how_every_run_ended_and_on_what(uploaded: UploadedSearch) -> None:
    runs = uploaded.children.items()
    assert {run_id: (run.info.status, run.data.tags["status"]) for run_id, run in runs} == {
        "s7-1:0": ("FINISHED", "complete"),
        "s7-1:1": ("FINISHED", "complete"),
        "s7-1:2": ("FINISHED", "stopped"),
        "s7-1:3": ("FAILED", "diverged"),
        "s7-1:4": ("FAILED", "failed"),
    }
    tags = uploaded.children["s7-1:2"].data.tags
    wanted = {"search": "s7-1", "origin": "sampler", "reason": "it stopped", "data": "cifar10"}
    wanted |= {"split_hash": "h1", "fingerprint": CONFIG.fingerprint, "git_commit": "abc"}
    assert {name: tags[name] for name in wanted} == wanted
    parent = uploaded.parent.data.tags
    wanted = {"search": "s7-1", "kind": "search", "tier": "full", "seed": "1"}
    wanted |= {"data": "cifar10", "data_digest": "d1"}
    assert {name: parent[name] for name in wanted} == wanted


@pytest.mark.slow
def test_params_are_exactly_the_active_knobs(uploaded: UploadedSearch) -> None:
    knobs, inactive = CONFIG.model_dump(mode="json"), inactive_knobs(CONFIG)
    active = {name: str(value) for name, value in knobs.items() if name not in inactive}
    assert all(run.data.params == active for run in uploaded.children.values())


@pytest.mark.slow
def test_metrics_have_one_point_per_epoch_and_the_epoch_as_their_step(
    uploaded: UploadedSearch,
) -> None:
    run = uploaded.children["s7-1:1"]
    assert uploaded.read_history(run, "val_acc") == [(1, 0.4), (2, 0.6), (3, 0.8)]
    results = [make_result(epoch, acc) for epoch, acc in ((1, 0.4), (2, 0.6), (3, 0.8))]
    for name in EPOCH_METRICS:
        wanted = [(result.epoch, getattr(result, name)) for result in results]
        assert uploaded.read_history(run, name) == wanted
    assert uploaded.read_history(run, "score") == [(3, 0.8)]
    assert set(uploaded.children["s7-1:2"].data.metrics) == set(EPOCH_METRICS)  # stopped: no score
    assert uploaded.children["s7-1:4"].data.metrics == {}


@pytest.mark.slow
def test_times_follow_the_epochs_seconds(uploaded: UploadedSearch) -> None:
    run = uploaded.children["s7-1:1"]
    points = uploaded.client.get_metric_history(run.info.run_id, "val_acc")
    stamps = {point.step: point.timestamp for point in points}
    assert (stamps[2] - stamps[1], stamps[3] - stamps[2]) == (2000, 2000)
    assert stamps[1] - run.info.start_time == 2000
    assert 6000 <= run.info.end_time - run.info.start_time < 60_000
    assert uploaded.parent.info.start_time == 1769860800000  # 2026-01-31T12:00:00 UTC, the header's


@pytest.mark.slow
def test_artifacts_hold_config_numerics_environment_and_the_best_weights(
    uploaded: UploadedSearch, storage: Path
) -> None:
    always = {"config.json", "numerics.json", "environment.json"}
    found = {run_id: uploaded.list_artifacts(run) for run_id, run in uploaded.children.items()}
    assert found == {
        "s7-1:0": always,
        "s7-1:1": always | {"weights.safetensors"},
        "s7-1:2": always,
        "s7-1:3": always,
        "s7-1:4": always | {"error.txt"},
    }
    assert uploaded.list_artifacts(uploaded.parent) == {
        "space.yaml",
        "numerics.json",
        "header.json",
    }
    best = uploaded.children["s7-1:1"]
    assert TrainConfig(**json.loads(uploaded.read_artifact(best, "config.json"))) == CONFIG
    environment = json.loads(uploaded.read_artifact(best, "environment.json"))
    assert environment == {"git_commit": "abc", "split_hash": "h1"}
    assert uploaded.read_artifact(best, "weights.safetensors") == "the best weights"
    assert uploaded.read_artifact(uploaded.parent, "space.yaml") == make_header().space_text
    assert (storage / "mlartifacts" / "s7").is_dir(), "not where the command ran"


@pytest.mark.slow
def test_the_parent_ends_with_best_gain_and_reason(uploaded: UploadedSearch) -> None:
    assert uploaded.parent.info.status == "FINISHED"
    tags = uploaded.parent.data.tags
    assert (tags["end"], tags["best_run_id"]) == ("all trials", "s7-1:1")
    metrics = uploaded.parent.data.metrics
    assert metrics["best_val_acc"] == 0.8 and metrics["gain_over_baseline"] == pytest.approx(0.1)


@pytest.mark.slow
def test_a_search_on_synthetic_data_is_in_an_experiment_of_its_own_and_tagged(place: Path) -> None:
    """And an interrupted one is KILLED."""
    info = DataInfo(name="shapes", digest="d2", split_hash="h2")
    uri, events = make_tracking_uri(place, None), make_events("interrupted")
    assert upload_events(place, uri, events, data=info) == []
    uploaded = UploadedSearch(place, "s7 (shapes)")
    assert uploaded.client.get_experiment_by_name("s7") is None
    tags = [run.data.tags["data"] for run in (uploaded.parent, *uploaded.children.values())]
    assert tags == ["shapes"] * 6
    parent, best = uploaded.parent, uploaded.children["s7-1:1"]
    assert (parent.info.status, parent.data.tags["end"]) == ("KILLED", "interrupted")
    assert uploaded.read_artifact(best, "weights.safetensors") == "the best weights"


@pytest.mark.slow
def test_recorded_times_are_the_runs_times_and_an_end_is_never_before_the_last_epoch(
    place: Path,
) -> None:
    times = [
        ("2026-01-31T12:01:00+00:00", "2026-01-31T12:01:30.250000+00:00"),
        ("2026-01-31T12:02:00+00:00", "2026-01-31T11:02:10+00:00"),  # the clock was set back
    ]
    events: list[Event] = []
    for number, (start, end) in enumerate(times):
        events.append(make_start(number, time=start))
        events.append(EpochReported(trial=number, result=make_result(1)))
        events.append(TrialEnded(trial=number, status="stopped", reason="it stopped", time=end))
    events.append(SearchEnded(reason="x", wall_seconds=9))
    assert upload_events(place, make_tracking_uri(place, None), events) == []
    uploaded = UploadedSearch(place, "s7")
    runs = [run for _, run in sorted(uploaded.children.items())]
    spans = [(run.info.start_time, run.info.end_time) for run in runs]
    noon = 1769860800000
    assert spans == [(noon + 60_000, noon + 90_250), (noon + 120_000, noon + 122_000)]
    assert uploaded.parent.info.end_time == noon + 9_000


@pytest.mark.slow
def test_a_long_training_goes_into_several_batches_and_loses_nothing(place: Path) -> None:
    config = CONFIG.model_copy(update={"epochs": 200})
    events = make_trial(0, [epoch / 300 for epoch in range(200)], "complete", config)
    assert len(events) * len(EPOCH_METRICS) > mlruns.METRICS_PER_BATCH
    write_record(place, make_header(), events)
    assert sync(place) == SyncReport("s7-1", uploaded=1, already=0, closed=0)
    uploaded = UploadedSearch(place, "s7")
    history = uploaded.read_history(uploaded.children["s7-1:0"], "val_acc")
    assert history == [(epoch + 1, epoch / 300) for epoch in range(200)]


STAGES = {"trials": 4, "rungs": [1, 2, 3], "fidelity": "cycles"}


@pytest.mark.slow
def test_the_epochs_of_all_stages_follow_one_another(place: Path) -> None:
    """A metric's step counts all epochs; params are the longest stage's, the config the last's."""
    events = [
        *make_staged_trial(0, STAGE_ACCS, "complete"),
        *make_staged_trial(1, {1: [0.4], 2: [0.1, 0.3]}, "stopped"),
    ]
    events += [
        *make_staged_trial(2, {1: [0.2]}, "diverged", cycle=2),
        SearchEnded(reason="x", wall_seconds=9.0),
    ]
    assert upload_events(place, make_tracking_uri(place, None), events, budget=STAGES) == []
    uploaded = UploadedSearch(place, "s7")
    complete, stopped, diverged = (uploaded.children[f"s7-1:{number}"] for number in range(3))
    accs = [0.5, 0.2, 0.6, 0.1, 0.3, 0.7]
    assert uploaded.read_history(complete, "val_acc") == list(enumerate(accs, start=1))
    assert uploaded.read_history(complete, "score") == [(6, 0.7)]
    assert uploaded.read_history(stopped, "val_acc") == [(1, 0.4), (2, 0.1), (3, 0.3)]
    assert uploaded.read_history(diverged, "val_acc") == [(1, 0.2)]
    assert [run.data.tags["epochs_done"] for run in (complete, stopped, diverged)] == [
        "6",
        "3",
        "1",
    ]
    for run, epochs in ((complete, 3), (stopped, 2), (diverged, 2)):
        config = CONFIG.shorten(epochs)
        assert run.data.tags["fingerprint"] == config.fingerprint
        assert TrainConfig(**json.loads(uploaded.read_artifact(run, "config.json"))) == config
        assert run.data.params["epochs"] == "3"
    history = uploaded.client.get_metric_history(complete.info.run_id, "val_acc")
    stamps = sorted(point.timestamp for point in history)
    assert stamps == [complete.info.start_time + 2000 * epoch for epoch in range(1, 7)]


@pytest.mark.slow
def test_a_trial_with_stages_appears_at_the_end_of_each_and_continues_there_when_resumed(
    place: Path,
) -> None:
    start, *epochs, end = make_staged_trial(0, STAGE_ACCS, "complete")
    with open_driver(place, budget=STAGES) as driver:
        driver.report(start, epochs[0])
        wait_for(lambda: look(place).get("000 s7-1") == ("RUNNING", 1))
        wait_for(lambda: driver.uploader._pending == {})
        driver.report(epochs[1])  # epoch 1 of a stage of 2 is no rung
        assert driver.uploader._pending == {}
        driver.report(SearchEnded(reason="interrupted", wall_seconds=9.0))
        assert driver.uploader.close(600) == []
        assert look(place)["000 s7-1"] == ("KILLED", 2)
        driver.resume()
        driver.report(*epochs[2:], end, SearchEnded(reason="all trials", wall_seconds=9.0))
        assert driver.uploader.close(600) == []
    uploaded = UploadedSearch(place, "s7")
    history = uploaded.read_history(uploaded.children["s7-1:0"], "val_acc")
    assert history == list(enumerate([0.5, 0.2, 0.6, 0.1, 0.3, 0.7], start=1))


@pytest.mark.slow
def test_a_retried_trial_says_how_often_and_why(place: Path) -> None:
    start, *rest = make_trial(0, [0.3, 0.5, 0.7], "complete")
    died = TrialRetried(trial=0, fault="worker died", text="...")
    out_of_memory = TrialRetried(trial=0, fault="out of memory", text="...")
    write_record(place, make_header(), [start, died, out_of_memory, *rest])
    sync(place)
    tags = UploadedSearch(place, "s7").children["s7-1:0"].data.tags
    assert (tags["retries"], tags["faults"]) == ("2", "worker died, out of memory")


# While a search runs


class Broken:
    """MLflow's real client, which lists its calls and fails at one, before or after its work."""

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
    """Which of all calls to MLflow fails, counted from 1, and how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.number, self.is_late, self.fault = 0, False, BaseException()
        make_client = mlruns.make_client
        name = "tune_cifar.tracking.runs.make_client"
        monkeypatch.setattr(name, lambda uri: Broken(make_client(uri), self))

    def set(self, number: int, is_late: bool, fault: BaseException) -> None:
        self.calls.clear()
        self.number, self.is_late, self.fault = number, is_late, fault


def wait_for(condition: Callable[[], object], seconds: float = 600.0) -> None:
    """Wait for the background thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def look(storage: Path) -> dict[str, tuple[str, int]]:
    """Status and number of epochs of every run in the run store's database, by name."""
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
    with open_driver(place, budget={"trials": 1, "rungs": [2, 3]}) as driver:
        driver.report(start, first, second)
        wait_for(lambda: look(place).get("000 s7-1") == ("RUNNING", 2))
        assert look(place)["s7-1"] == ("RUNNING", 0)
        driver.report(third, end)
        wait_for(lambda: look(place)["000 s7-1"] == ("FINISHED", 3))
        assert breaks.calls.count("log_batch") == 3, "one each for the parent, the rung, the end"
        driver.report(SearchEnded(reason="all trials", wall_seconds=6.0))
        assert driver.uploader.close(600) == []
    assert look(place) == {"s7-1": ("FINISHED", 0), "000 s7-1": ("FINISHED", 3)}


@pytest.mark.slow
def test_a_trial_that_has_ended_before_its_upload_is_uploaded_in_one_batch(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks = Breaks(monkeypatch)
    write_record(place, make_header(), make_events())
    assert sync(place) == SyncReport("s7-1", uploaded=5, already=0, closed=0)
    assert breaks.calls.count("create_run") == 1 + 5
    assert breaks.calls.count("log_batch") == 2 + 5, "two for the parent: its start and its end"
    breaks.calls.clear()
    assert sync(place) == SyncReport("s7-1", uploaded=0, already=5, closed=0)
    assert breaks.calls == ["get_experiment_by_name", "search_runs"]


@pytest.mark.slow
def test_an_interrupted_search_is_killed_and_its_runs_continue_when_it_is_resumed(
    place: Path,
) -> None:
    start, first, *rest = make_trial(1, [0.4, 0.6, 0.8], "complete")
    third = make_trial(2, [0.2, 0.3, 0.4], "complete")
    with open_driver(place, budget={"trials": 3, "rungs": [2, 3]}) as driver:
        driver.report(*make_trial(0, [0.3, 0.5, 0.7], "complete"))
        driver.report(start, third[0], first, *third[1:3])
        driver.report(SearchEnded(reason="interrupted", wall_seconds=9.0))
        assert driver.uploader.close(600) == []
        killed = {"s7-1": ("KILLED", 0), "000 s7-1": ("FINISHED", 3), "001 s7-1": ("KILLED", 1)}
        assert look(place) == killed | {"002 s7-1": ("KILLED", 2)}
        driver.resume()
        runs = {"s7-1": ("RUNNING", 0), "000 s7-1": ("FINISHED", 3), "001 s7-1": ("RUNNING", 1)}
        wait_for(lambda: look(place) == runs | {"002 s7-1": ("RUNNING", 2)})
        driver.report(*rest, *third[3:], *make_trial(3, [0.1], "diverged"))
        driver.report(SearchEnded(reason="all trials", wall_seconds=9.0))
        assert driver.uploader.close(600) == []
    uploaded = UploadedSearch(place, "s7")
    statuses = [run.info.status for _, run in sorted(uploaded.children.items())]
    assert statuses == ["FINISHED", "FINISHED", "FINISHED", "FAILED"] and uploaded.num_runs == 5
    history = uploaded.read_history(uploaded.children["s7-1:1"], "val_acc")
    assert history == [(1, 0.4), (2, 0.6), (3, 0.8)]
    info, tags = uploaded.parent.info, uploaded.parent.data.tags
    assert (info.status, tags["end"], tags["resumes"]) == ("FINISHED", "all trials", "1")
    resumed = 1000 * datetime.fromisoformat(make_resume(5).time).timestamp()
    assert info.end_time == resumed + 9_000
    assert "resume-1.json" in uploaded.list_artifacts(uploaded.parent)
    assert uploaded.parent.data.metrics["best_val_acc"] == 0.8
    commits = [run.data.tags["git_commit"] for _, run in sorted(uploaded.children.items())]
    assert commits == ["abc", "def", "def", "def"], "under which driver each ended"
    assert sync(place) == SyncReport("s7-1", uploaded=0, already=4, closed=0)


@pytest.mark.slow
def test_events_reported_while_an_attempt_fails_are_uploaded_by_the_next(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.tracking.upload.FIRST_PAUSE_SECONDS", 0.1)
    begun, reported, make_client = threading.Event(), threading.Event(), mlruns.make_client

    def fail_once(uri: str) -> Any:
        if begun.is_set():
            return make_client(uri)
        begun.set()
        reported.wait(600)
        raise OSError("not yet")

    monkeypatch.setattr("tune_cifar.tracking.runs.make_client", fail_once)
    start, first, *rest = make_trial(0, [0.3, 0.5, 0.7], "complete")
    with open_driver(place) as driver:
        driver.report(start, first)
        assert begun.wait(600)
        driver.report(*rest)
        reported.set()
        wait_for(lambda: look(place).get("000 s7-1") == ("FINISHED", 3))
        assert driver.uploader.close(600) == []


@pytest.mark.slow
def test_a_resumed_search_first_uploads_what_mlflow_lacks(place: Path) -> None:
    events = [*make_trial(0, [0.3, 0.5, 0.7], "complete"), *make_trial(1, [], None)]
    events.append(SearchEnded(reason="interrupted", wall_seconds=9.0))
    write_record(place, make_header(), events)
    with closing(Record.open(search_folder(place, "s7-1"))) as record:
        record.append(make_resume(5))
        uploader = BackgroundUploader(make_tracking_uri(place, None), place, record.state)
        wait_for(lambda: look(place) == {"s7-1": ("RUNNING", 0), "000 s7-1": ("FINISHED", 3)})
        assert uploader.close(600) == []
    assert look(place) == {"s7-1": ("KILLED", 0), "000 s7-1": ("FINISHED", 3)}


KILLED = """
import sys, time
from pathlib import Path
from tests.builders import make_trial, open_driver
with open_driver(Path(sys.argv[1])) as driver:
    driver.report(*make_trial(0, [0.3, 0.5, 0.7], "complete"), *make_trial(1, [0.4], None))
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_drivers_runs_are_closed_by_sync_and_continue_when_the_search_is_resumed(
    place: Path,
) -> None:
    """They are not closed while it lives."""
    root = Path(__file__).parents[2]
    running = {"s7-1": ("RUNNING", 0), "000 s7-1": ("FINISHED", 3), "001 s7-1": ("RUNNING", 1)}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(place)], cwd=root) as driver:
        try:
            wait_for(lambda: look(place) == running)
            live = sync(place)
        finally:
            driver.kill()
    expected = SyncReport("s7-1", uploaded=0, already=2, closed=0, live=True)
    assert live == expected, "its own driver uploads"
    assert look(place) == running
    assert sync(place) == SyncReport("s7-1", uploaded=0, already=2, closed=2)
    closed = {"s7-1": ("KILLED", 0), "000 s7-1": ("FINISHED", 3), "001 s7-1": ("KILLED", 1)}
    assert look(place) == closed
    assert UploadedSearch(place, "s7").parent.data.tags["end"] == "driver died"
    assert sync(place) == SyncReport("s7-1", uploaded=0, already=2, closed=0)
    with closing(Record.open(search_folder(place, "s7-1"))) as record:
        uploader = BackgroundUploader(make_tracking_uri(place, None), place, record.state)
        wait_for(lambda: look(place) == running)
        events = make_trial(1, [0.4, 0.6, 0.8], "complete")[2:]
        for event in (*events, SearchEnded(reason="all trials", wall_seconds=9)):
            record.append(event)
            uploader.on_event(record.state, event)
        assert uploader.close(600) == []
    finished = {"s7-1": ("FINISHED", 0), "000 s7-1": ("FINISHED", 3), "001 s7-1": ("FINISHED", 3)}
    assert look(place) == finished


# The same record twice


SYNC = """
import sys
from pathlib import Path
from tune_cifar.record.store import search_folder
from tune_cifar.tracking.upload import sync_search
uri, storage, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
print(sync_search(uri, storage, search_folder(storage, name)))
"""


def start_sync(uri: str, storage: Path, name: str = "s7-1") -> subprocess.Popen[str]:
    """`sync_search` in another process."""
    command = [sys.executable, "-c", SYNC, uri, str(storage), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_all(client: Any, name: str) -> dict[str, Any]:
    """All that MLflow holds of a search, without its own ids; "it" replaces the search's name."""
    experiment = client.get_experiment_by_name("s7").experiment_id
    runs = client.search_runs([experiment], f"tags.search = '{name}'")
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    found: dict[str, Any] = {}
    for run in runs:
        tags = dict(run.data.tags)
        if run is not parent:
            assert tags.pop("mlflow.parentRunId") == parent.info.run_id
        points: list[Any] = []
        for metric in run.data.metrics:
            points += client.get_metric_history(run.info.run_id, metric)
        paths = Path(url2pathname(urlsplit(run.info.artifact_uri).path)).glob("*")
        key = run.info.run_name.replace(name, "it")
        assert key not in found
        found[key] = {
            "info": (run.info.status, run.info.start_time, run.info.end_time),
            "tags": {tag: value.replace(name, "it") for tag, value in tags.items()},
            "params": dict(run.data.params),
            "metrics": sorted((p.key, p.step, p.timestamp, p.value) for p in points),
            "artifacts": {path.name: path.read_text().replace(name, "it") for path in paths},
        }
    return found


@pytest.mark.slow
def test_uploading_a_record_again_also_from_another_process_changes_nothing(storage: Path) -> None:
    client = connect(make_tracking_uri(storage, None))
    before = read_all(client, "s7-1")
    assert sync(storage) == SyncReport("s7-1", uploaded=0, already=5, closed=0)
    process = start_sync(make_tracking_uri(storage, None), storage)
    out, err = process.communicate(timeout=600)
    assert out == f"{SyncReport('s7-1', uploaded=0, already=5, closed=0)}\n", err
    assert read_all(client, "s7-1") == before and len(before) == 6


def write_short_record(storage: Path, name: str) -> SearchState:
    """An interrupted search: a complete trial with weights, a failed one, an unfinished one."""
    end: Any = {"trial": 0, "status": "complete", "score": 0.7, "reason": "all epochs"}
    events = [
        *make_trial(0, [0.3, 0.5, 0.7], None),
        TrialEnded(**end, weights_file="weights"),
        *make_trial(1, [0.2], "failed"),
        *make_trial(2, [0.1], None),
        SearchEnded(reason="interrupted", wall_seconds=60.0),
    ]
    state = write_record(storage, make_header(name), events)
    (state.folder / "weights").write_text("the best weights")
    state.trial_folder(1).mkdir(parents=True)
    (state.trial_folder(1) / "error.txt").write_text("Traceback: it broke\n")
    return state


@pytest.mark.slow
def test_a_searchs_trials_come_back_from_mlflow_as_the_record_has_them(place: Path) -> None:
    """All that was uploaded: the seconds of training and the inactive knobs were not."""
    knobs = {"max_lr": 0.1 + 0.2, "cutout_p": 0.5, "cutout_size": 8, "warm_restarts": (1,)}
    events = [
        *make_events()[:-1],
        *make_trial(5, [0.2, 0.4, 0.6], "complete", CONFIG.model_copy(update=knobs)),
        make_start(6),
        TrialEnded(trial=6, status="failed", reason="it broke", score=None),
        SearchEnded(reason="x", wall_seconds=9.0),
    ]
    state = write_record(place, make_header(), events)
    uri = make_tracking_uri(place, None)
    sync_search(uri, place, state.folder)
    recorded, uploaded = load_trials([state]), load_uploaded_trials(uri, "s7-1")
    assert list(uploaded.columns) == list(recorded.columns) and len(uploaded) == 7
    absent = {knob: set(uploaded["trial"][uploaded[knob].isna()]) for knob in KNOBS}
    inactive: dict[str, set[int]] = {knob: set() for knob in KNOBS}
    for number, trial in state.trials.items():
        for knob in inactive_knobs(trial.full_config):
            inactive[knob].add(number)
    assert absent == inactive and uploaded["train_seconds"].isna().all()
    for name in recorded.columns.difference(["train_seconds", "ended_seq"]):
        known = ~uploaded["trial"].isin(inactive.get(name, set()))
        missing = -1 if name in ("val_acc", "score") else ""
        found, expected = (table[name][known].fillna(missing) for table in (uploaded, recorded))
        assert list(found) == list(expected), name
    assert sorted(uploaded["ended_seq"]) == list(range(1, 8))
    assert best_so_far(uploaded)["best"].max() == best_so_far(recorded)["best"].max() == 0.8
    groups = [(group, list(rows["trial"])) for group, rows in split_groups(uploaded)]
    assert groups == [(group, list(rows["trial"])) for group, rows in split_groups(recorded)]


@pytest.mark.slow
def test_the_newest_search_of_a_name_and_its_most_complete_runs_are_read(place: Path) -> None:
    uri = make_tracking_uri(place, None)
    sync_search(uri, place, write_record(place, make_header(), make_events()).folder)
    later = make_header(created="2026-02-01T12:00:00+00:00")
    events = make_trial(0, [0.3, 0.5, 0.9], "complete")
    sync_search(uri, place, write_record(place / "again", later, events).folder)
    tags = {"search": "s7-1", "search_created": later.created, "trial": "0", "run_id": "s7-1:0"}
    connect(uri).create_run("1", 1000, tags | {"origin": "baseline"}, "a copy")
    uploaded = load_uploaded_trials(uri, "s7-1")
    assert list(uploaded["trial"]) == [0] and list(uploaded["score"]) == [0.9]
    rule = r"no search named 's7-2' in MLflow\. Upload it: python -m"
    with pytest.raises(TrackingError, match=rule):
        load_uploaded_trials(uri, "s7-2")


def test_trials_of_a_database_that_is_not_there_are_refused_and_none_is_made(
    tmp_path: Path,
) -> None:
    with pytest.raises(TrackingError, match=r"mlflow\.db: there is no MLflow database\."):
        load_uploaded_trials(make_tracking_uri(tmp_path, None), "s7-1")
    assert not (tmp_path / "mlflow.db").exists()


class Crash(BaseException):
    """The process dies: nothing catches it."""


@pytest.mark.slow
@pytest.mark.parametrize("is_late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", [Crash, RuntimeError], ids=["a crash", "a fault"])
def test_after_any_single_call_that_failed_the_runs_are_those_of_an_undisturbed_upload(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], is_late: bool
) -> None:
    """A crash ends the process, and another one syncs; a fault is survived by the same one."""
    uri, breaks = make_tracking_uri(place, None), Breaks(monkeypatch)
    prefix = f"{kind.__name__}-{'late' if is_late else 'early'}"
    breaks.set(0, False, Crash())
    report = sync_search(uri, place, write_short_record(place, f"{prefix}-0").folder)
    assert report == SyncReport(f"{prefix}-0", uploaded=3, already=0, closed=0)
    num_calls = len(breaks.calls)
    client = connect(uri)
    expected = read_all(client, f"{prefix}-0")
    assert len(expected) == 4 and num_calls > 15
    for number in range(1, num_calls + 1):
        state = write_short_record(place, f"{prefix}-{number}")
        breaks.set(number, is_late, kind("it broke"))
        if kind is Crash:
            with pytest.raises(Crash):
                sync_search(uri, place, state.folder)
            sync_search(uri, place, state.folder)
        else:
            sync_search(uri, place, state.folder)
            assert len(breaks.calls) > num_calls, "some were made again"
        is_same = read_all(client, state.header.name) == expected
        assert is_same, f"call {number}, {breaks.calls[number - 1]}"
        report = SyncReport(state.header.name, uploaded=0, already=3, closed=0)
        assert sync_search(uri, place, state.folder) == report


@pytest.mark.slow
def test_duplicate_runs_are_deleted(place: Path) -> None:
    """A server that answers too late makes some: the client repeats the call."""
    uri = make_tracking_uri(place, None)
    assert upload_events(place, uri, make_events()) == []
    client = connect(uri)
    before = read_all(client, "s7-1")
    uploaded = UploadedSearch(place, "s7")
    identity = {"search": "s7-1", "search_created": make_header().created}
    experiment = uploaded.parent.info.experiment_id
    client.create_run(experiment, 1000, identity, "s7-1")
    for trial in ("0", "4"):
        tags = identity | {"trial": trial, "mlflow.parentRunId": uploaded.parent.info.run_id}
        client.create_run(experiment, 1000, tags, "a copy")
    assert len(client.search_runs([experiment])) == 6 + 3
    assert sync(place) == SyncReport("s7-1", uploaded=0, already=5, closed=0)
    assert read_all(client, "s7-1") == before


@pytest.mark.slow
def test_a_search_of_the_same_name_that_came_later_has_runs_of_its_own(place: Path) -> None:
    uri = make_tracking_uri(place, None)
    first = write_record(place, make_header(), make_events())
    sync_search(uri, place, first.folder)
    header = make_header(created="2026-02-01T12:00:00+00:00")
    second = write_record(place / "again", header, make_events())
    assert sync_search(uri, place, second.folder).uploaded == 5
    assert len(connect(uri).search_runs(["1"])) == 12
    assert delete_runs(uri, place, first) == 6
    assert delete_runs(uri, place, first) == 0
    assert sync_search(uri, place, second.folder).already == 5


@pytest.mark.slow
def test_two_processes_may_initialise_one_database_at_once(tmp_path: Path) -> None:
    uri, processes = f"sqlite:///{tmp_path}/both.db", []
    for name in ("s7-1", "s7-2"):
        write_record(tmp_path, make_header(name), make_events())
        processes.append(start_sync(uri, tmp_path, name))
    answers = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert all("uploaded=5, already=0" in out for out, _ in answers)
    experiment = connect(uri).get_experiment_by_name("s7")
    runs = connect(uri).search_runs([experiment.experiment_id])
    assert len(runs) == 2 * 6 and {run.data.tags["search"] for run in runs} == {"s7-1", "s7-2"}
    assert list(tmp_path.glob("*.new*")) == []


@pytest.mark.slow
def test_a_search_that_another_process_uploads_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.tracking.upload.LOCK_SECONDS", 0.1)
    with open_driver(place) as driver:
        driver.report(*make_trial(0, [0.3, 0.5, 0.7], "complete"))
        wait_for(lambda: "000 s7-1" in look(place))
        driver.record.close()  # else it would be a live search, which its own driver uploads
        with pytest.raises(TrackingError, match="another process uploads this search"):
            sync(place)
        assert driver.uploader.close(600) == []
    assert look(place)["s7-1"] == ("KILLED", 0), "no end was recorded"


@pytest.mark.slow
def test_a_deleted_experiment_is_named_with_the_way_back(place: Path) -> None:
    uri = make_tracking_uri(place, None)
    assert upload_events(place, uri, make_events()) == []
    connect(uri).delete_experiment("1")
    rule = r"MLflow's experiment 's7' is deleted\. Restore it: mlflow "
    with pytest.raises(TrackingError, match=rule):
        sync(place)
    connect(uri).restore_experiment("1")
    assert sync(place).already == 5


# Faults of the store


@contextmanager
def serve(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Start a server on loopback that gives every request this answer; yield its address."""

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
        driver = stack.enter_context(open_driver(place, uri))
        stack.callback(release.set)
        first, *rest = make_events()
        driver.report(first, *rest[:4])
        assert asked.wait(600)
        driver.report(*rest[4:])  # it still hangs
        (fault,) = driver.uploader.close(0.5)
        assert not release.is_set()
    assert fault.startswith("MLflow upload incomplete after 0.5 s. The record is complete.")
    assert sync(place) == SyncReport("s7-1", uploaded=5, already=0, closed=0)


@pytest.mark.slow
def test_a_server_that_hangs_ends_in_a_timeout(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    release = threading.Event()
    with serve(lambda request: release.wait(30) and None) as uri:
        (fault,) = upload_events(place, uri, make_events())
        release.set()
    assert "6 left over: MlflowException: ReadTimeoutError(" in fault
    assert "Read timed out" in fault


@pytest.mark.slow
def test_a_server_that_answers_500_is_reported_and_sync_completes_another_store(
    place: Path,
) -> None:
    with serve(lambda request: request.send_error(500)) as uri:
        (fault,) = upload_events(place, uri, make_events())
    assert fault.startswith("MLflow upload incomplete, 6 left over: MlflowException: ")
    assert "500" in fault
    assert f"--tracking-uri {uri}" in fault
    assert sync(place) == SyncReport("s7-1", uploaded=5, already=0, closed=0)


@pytest.mark.slow
def test_no_credentials_of_the_address_stand_in_a_sentence(place: Path) -> None:
    state = write_record(place, make_header("s7-2"), make_events())
    for host in (f"127.0.0.1:{find_free_port()}", "no such host"):
        uri = f"http://somebody:hunter2@{host}"
        sentences = upload_events(place / host, uri, make_events())
        for call in (
            functools.partial(sync_search, uri, place, state.folder),
            functools.partial(delete_runs, uri, place, state),
        ):
            with pytest.raises(TrackingError) as caught:
                call()
            sentences.append(str(caught.value))
        assert len(sentences) == 3
        for sentence in sentences:
            assert "hunter2" not in sentence and "somebody" not in sentence and "\n" not in sentence


@pytest.mark.slow
def test_faults_of_single_runs_do_not_stop_the_others(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials' artifacts cannot be written; the others arrive, and the two when they can."""
    log_artifacts = mlruns.SearchRuns._log_artifacts
    repaired = threading.Event()

    def refuse(self: mlruns.SearchRuns, run: mlruns.Run, files: Any) -> None:
        if run.tags.get("trial") in ("0", "1") and not repaired.is_set():
            raise OSError("no room for artifacts")
        log_artifacts(self, run, files)

    monkeypatch.setattr("tune_cifar.tracking.runs.SearchRuns._log_artifacts", refuse)
    (fault,) = upload_events(place, make_tracking_uri(place, None), make_events())
    problem = "MLflow upload incomplete, 2 left over: OSError: no room for artifacts. "
    assert fault.startswith(problem)
    statuses = {name: status for name, (status, _) in look(place).items()}
    assert statuses["s7-1"] == "FINISHED" and "RUNNING" not in statuses.values()
    repaired.set()
    assert sync(place) == SyncReport("s7-1", uploaded=2, already=3, closed=0)
    uploaded = UploadedSearch(place, "s7")
    assert "weights.safetensors" in uploaded.list_artifacts(uploaded.children["s7-1:1"])


@pytest.mark.slow
def test_a_full_disk_under_the_database_is_reported_and_sync_completes_it(
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
        with open_driver(tmp_path / "runs", uri) as driver:
            driver.report(*make_trial(0, [0.3, 0.5, 0.7], "complete"))
            wait_for(lambda: driver.uploader._pending == {})
            filler = disk / "filler"
            with (
                filler.open("wb", buffering=0) as file,
                pytest.raises(OSError, match="No space left"),
            ):
                while True:
                    file.write(bytes(4096))
            driver.report(*make_events()[5:])
            (fault,) = driver.uploader.close(600)
            assert "(sqlite3.OperationalError) database or disk is full" in fault
            assert driver.record.state.is_finished
        filler.unlink()
        folder = search_folder(tmp_path / "runs", "s7-1")
        assert sync_search(uri, tmp_path / "runs", folder).uploaded == 4
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
    other = write_record(place / "other", make_header("other"), make_events())
    sync_search(store, place, other.folder)  # the server needs a database
    events = make_events()
    with open_driver(place, f"http://127.0.0.1:{port}") as driver:
        driver.report(*events[:5])
        wait_for(lambda: "Connection refused" in driver.uploader._uploader.fault)
        server, _ = run_ui(store, port)
        try:
            wait_for(lambda: look(place).get("000 s7-1") == ("FINISHED", 3))
            driver.report(*events[5:7])
            wait_for(lambda: look(place).get("001 s7-1") == ("RUNNING", 1))
        finally:
            os.killpg(server.pid, 9)
            stop_ui(server)
        driver.report(*events[7:])
        (fault,) = driver.uploader.close(600)
        assert "5 left over: MlflowException: " in fault and driver.record.state.is_finished
    assert look(place)["s7-1"] == ("RUNNING", 0), "the server was dead"
    server, uri = run_ui(store, port)
    try:
        folder = search_folder(place, "s7-1")
        report = sync_search(uri, place, folder)
        assert report == SyncReport("s7-1", uploaded=4, already=1, closed=1)
        again = sync_search(uri, place, folder)
        assert again == SyncReport("s7-1", uploaded=0, already=5, closed=0)
    finally:
        stop_ui(server)
    found = {name: status for name, status in look(place).items() if name.endswith("s7-1")}
    assert len(found) == 6 and "RUNNING" not in {status for status, _ in found.values()}
    assert (found["s7-1"][0], found["001 s7-1"]) == ("FINISHED", ("FINISHED", 3))


# What the page of the UI opens on


RANGES = {"distributions": {"max_lr": "{}", "dropout": "{}"}, "tier": "cpu"}


@pytest.mark.slow
def test_an_experiment_has_views_of_its_searches_for_each_tier_and_keeps_changed_ones(
    place: Path,
) -> None:
    uri = make_tracking_uri(place, None)
    header = make_header("t", kind="train", distributions={})
    sync_search(uri, place, write_record(place, header, make_trial(0, [0.4], None)).folder)
    assert list_views(uri) == {}, "a training searches nothing"
    header = make_header("a", **RANGES)
    sync_search(uri, place, write_record(place, header, make_trial(0, [0.4], None)).folder)
    views = list_views(uri)
    assert list(views) == ["s7: Searches", "s7: Trials, best first (cpu)"]
    page = "runs?workflowType=machine_learning&viewStateShareKey=tune_cifar"
    experiment = connect(uri).get_experiment_by_name("s7")
    assert views["s7: Searches"] == f"/#/experiments/{experiment.experiment_id}/{page}_searches"
    view = json.loads(experiment.tags["mlflow.sharedViewState.tune_cifar_trials_cpu"])
    trials = json.loads(view["state"])
    assert trials["selectedColumns"][-2:] == ["params.`max_lr`", "params.`dropout`"]
    assert trials["compareRunCharts"][0]["selectedParams"] == ["max_lr", "dropout"]
    assert experiment.tags["mlflow.note.content"].startswith("The space s7 on cifar10.")

    mine = {
        "mlflow.note.content": "mine",
        "mlflow.sharedViewState.tune_cifar_searches": "mine, and no JSON",
    }
    for name, value in mine.items():
        connect(uri).set_experiment_tag(experiment.experiment_id, name, value)
    header = make_header("b", distributions={"max_lr": "{}"})
    sync_search(uri, place, write_record(place, header, []).folder)
    after = connect(uri).get_experiment_by_name("s7").tags
    full = {key: after[key] for key in after if key.endswith("tune_cifar_trials_full")}
    assert after == experiment.tags | mine | full
    trials_views = ["s7: Trials, best first (cpu)", "s7: Trials, best first (full)"]
    assert list(list_views(uri)) == trials_views


def test_a_view_that_is_too_long_for_a_tag_is_left_out() -> None:
    knobs = dict.fromkeys(KNOBS, "{}")
    found = make_experiment_tags(make_header("a", distributions=knobs)).keys()
    short = make_experiment_tags(make_header("a", distributions={"max_lr": "{}"})).keys()
    assert {name.rpartition(".")[2] for name in short - found} == {"tune_cifar_trials_full"}


@pytest.mark.slow
def test_a_trials_note_has_its_origin_and_the_command_to_train_it_again(
    uploaded: UploadedSearch,
) -> None:
    notes = {key: run.data.tags["mlflow.note.content"] for key, run in uploaded.children.items()}
    assert notes["s7-1:0"].startswith("The baseline of the space")
    command = "python -m tune_cifar reproduce s7-1:3"
    assert notes["s7-1:3"] == f"Proposed by the sampler. Train it again: `{command}`"
