"""The run store's own MLflow database: moved, of another MLflow, uploaded by an older version."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.builders import (
    SEARCH_FINISHED,
    invoke,
    make_events,
    make_header,
    make_trial,
    open_driver,
    refuse,
    upload_events,
    write_record,
)
from tune_cifar.errors import TrackingError
from tune_cifar.record.journal import read_state
from tune_cifar.record.store import search_folder
from tune_cifar.tracking.address import make_tracking_uri
from tune_cifar.tracking.runs import make_client
from tune_cifar.tracking.upload import sync_search

pytestmark = pytest.mark.slow


def query(database: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(database)) as connection, connection:
        return connection.execute(statement).fetchall()


def list_artifacts(storage: Path) -> dict[str, set[str]]:
    """The files of every run, by its name, as MLflow finds them."""
    client = make_client(make_tracking_uri(storage, None))
    return {
        run.info.run_name: {item.path for item in client.list_artifacts(run.info.run_id)}
        for run in client.search_runs(["1"])
    }


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A run store with a search, uploaded at another place that is gone."""
    storage = tmp_path / "before"
    assert upload_events(storage, make_tracking_uri(storage, None), make_events()) == []
    return storage.rename(tmp_path / "was moved #1")


def upload_another(storage: Path, name: str) -> None:
    events = [*make_trial(0, [0.3, 0.5, 0.7], "complete"), SEARCH_FINISHED]
    state = write_record(storage, make_header(name), events)
    sync_search(make_tracking_uri(storage, None), storage, state.folder)


def test_artifacts_follow_a_run_store_that_was_moved(moved: Path) -> None:
    """Old ones are found, new ones of the old experiment are beside them, the old path is gone."""
    upload_another(moved, "later")
    files = list_artifacts(moved)
    assert files["001 s7-1"] >= {"config.json", "weights.safetensors"}
    assert "config.json" in files["000 later"] and "space.yaml" in files["later"]
    assert [path.name for path in moved.parent.iterdir()] == [moved.name]
    assert query(moved / "mlflow.db", "SELECT artifact_location FROM experiments")[1] == (
        (moved / "mlartifacts" / "s7").as_uri(),
    )


def test_a_search_that_was_interrupted_and_moved_goes_on_at_its_new_place(tmp_path: Path) -> None:
    """Runs without any artifact yet follow, too, and the weights of the best."""
    with open_driver(tmp_path / "before") as driver:
        driver.report(*make_trial(0, [0.3], None))
        driver.uploader.close(600)
    storage = (tmp_path / "before").rename(tmp_path / "after")
    shutil.rmtree(storage / "mlartifacts")
    state = read_state(search_folder(storage, "s7-1"))
    sync_search(make_tracking_uri(storage, None), storage, state.folder)
    upload_another(storage, "later")
    assert [path.name for path in tmp_path.iterdir()] == ["after"]


def test_a_copy_of_a_run_store_has_artifacts_of_its_own(moved: Path) -> None:
    copy = Path(shutil.copytree(moved, moved.parent / "copy"))
    list_artifacts(moved)
    upload_another(copy, "later")
    assert "config.json" in list_artifacts(copy)["000 later"]
    assert "000 later" not in list_artifacts(moved)
    assert len(list((moved / "mlartifacts" / "s7").iterdir())) == 6


def test_artifacts_that_an_older_version_put_into_the_old_path_stay_readable(moved: Path) -> None:
    here, there = moved / "mlartifacts" / "s7", moved.parent / "before" / "mlartifacts" / "s7"
    there.mkdir(parents=True)
    ((run,),) = query(moved / "mlflow.db", "SELECT run_uuid FROM runs WHERE name = '000 s7-1'")
    (here / run).rename(there / run)
    upload_another(moved, "later")
    assert "config.json" in list_artifacts(moved)["000 s7-1"]
    assert [path.name for path in there.iterdir()] == [run]
    assert "config.json" in list_artifacts(moved)["000 later"]


def test_only_the_run_stores_own_database_is_changed(moved: Path) -> None:
    other = (moved / "mlflow.db").rename(moved / "all.db")
    before = query(other, "SELECT artifact_uri FROM runs")
    make_client(f"sqlite:///{other}")
    assert query(other, "SELECT artifact_uri FROM runs") == before


# Of another MLflow


UPGRADE = "Copy the database, then run `python -m mlflow db upgrade 'sqlite:///{database}'`"


@pytest.mark.parametrize(
    ("version", "helps"),
    [
        ("75868b020152", f"got an older one (75868b020152). {UPGRADE}"),
        ("ffffffffffff", "got an unknown one (ffffffffffff). Install the newer MLflow"),
    ],
    ids=["older", "newer"],
)
def test_a_database_of_another_mlflow_is_named_with_what_helps(
    moved: Path, version: str, helps: str
) -> None:
    ((own,),) = query(moved / "mlflow.db", "SELECT version_num FROM alembic_version")
    query(moved / "mlflow.db", f"UPDATE alembic_version SET version_num = '{version}'")
    sentence = helps.format(database=moved / "mlflow.db")
    given = ("--storage", str(moved))
    assert sentence in refuse(TrackingError, "ui", *given)
    assert sentence in invoke("sync", *given).stderr
    assert sentence in refuse(TrackingError, "searches", "delete", "s7-1", "--yes", *given)
    query(moved / "mlflow.db", f"UPDATE alembic_version SET version_num = '{own}'")
    assert invoke("sync", *given).exit_code == 0


def test_the_ui_of_another_programs_database_says_so_and_leaves_it(tmp_path: Path) -> None:
    query(tmp_path / "mlflow.db", "CREATE TABLE studies (number)")
    before = (tmp_path / "mlflow.db").read_bytes()
    sentence = refuse(TrackingError, "ui", "--storage", str(tmp_path))
    assert "this SQLite database is not MLflow's, it has studies" in sentence
    assert (tmp_path / "mlflow.db").read_bytes() == before


# Of an older version


def test_sync_shows_a_stopped_trial_that_was_killed_before_as_finished(moved: Path) -> None:
    status = "SELECT name, status FROM runs WHERE name = '002 s7-1'"
    query(moved / "mlflow.db", "UPDATE runs SET status = 'KILLED' WHERE name = '002 s7-1'")
    for uploaded in (1, 0):
        answer = invoke("sync", "--storage", str(moved))
        line = f"s7-1: {uploaded} trial{'' if uploaded == 1 else 's'} uploaded, {5 - uploaded} "
        assert answer.stdout.startswith(line), answer.output
        assert query(moved / "mlflow.db", status) == [("002 s7-1", "FINISHED")]
