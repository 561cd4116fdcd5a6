"""MLflow's address: any folder name, a user's own, and what is refused before anything is spent."""

from __future__ import annotations

import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from tests.builders import (
    ROOT,
    SEARCH_FINISHED,
    SEARCH_WORDS,
    SHAPES_INFO,
    find_free_port,
    invoke,
    make_budget,
    make_header,
    make_train_words,
    make_trial,
    refuse,
    upload_events,
    write_record,
)
from tune_cifar.errors import ConfigError, hide_credentials
from tune_cifar.report.trials import load_uploaded_trials
from tune_cifar.tracking.address import check_address, find_sqlite_file, make_tracking_uri
from tune_cifar.tracking.runs import make_client
from tune_cifar.tracking.store import check_tracking

FOLDERS = (
    *("st/what?x", "?first/x", "a#b", "100%", "a%20b", "a b", "größe ✓", "a;b&c=d", 'it\'s "q"'),
    *("a+b", "u:p@h", "[x]*", "$HOME", "back\\slash", "new\nline", "~x"),
)


# SQLAlchemy 2.0 escapes no path: a ? in it is refused there.
if version("sqlalchemy") < "2.1":
    FOLDERS = tuple(name for name in FOLDERS if "?" not in name)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_address_of_any_folder_leads_back_to_it(tmp_path: Path, name: str) -> None:
    uri = make_tracking_uri(tmp_path / name, None)
    assert find_sqlite_file(uri) == tmp_path / name / "mlflow.db"
    assert find_sqlite_file(check_address(uri)) == tmp_path / name / "mlflow.db"


def test_a_folder_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must fit into an address"):
        make_tracking_uri(tmp_path / "\udcff", None)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FOLDERS[:1], "a%20b #1;ü"])
def test_runs_and_artifacts_lie_in_a_run_store_of_any_name_and_nowhere_else(
    workplace: Path, name: str
) -> None:
    """Upload, read back, sync, delete, also with the same database as --tracking-uri."""
    storage = workplace / name
    events = make_trial(0, [0.3, 0.5, 0.7], "complete")
    assert upload_events(storage, make_tracking_uri(storage, None), events) == []
    uri = make_tracking_uri(storage, None)
    assert list(load_uploaded_trials(uri, "s7-1")["score"]) == [0.7]
    client = make_client(uri)
    (child,) = client.search_runs(["1"], "tags.trial = '0'")
    folder = storage / "mlartifacts" / "s7" / child.info.run_id / "artifacts"
    config = Path(client.download_artifacts(child.info.run_id, "config.json"))
    assert config.read_bytes() == (folder / "config.json").read_bytes()
    given = f"--storage={storage}"
    for words in (["sync", given], ["sync", given, f"--tracking-uri={uri}"]):
        answer = invoke(*words)
        assert answer.exit_code == 0 and "0 trials uploaded, 1 already there" in answer.stdout
    assert invoke("searches", "delete", "s7-1", "--yes", given).exit_code == 0
    top = Path(name).parts[0]
    assert [path.name for path in workplace.iterdir()] == [top]
    assert len(list((workplace / top).iterdir())) == (1 if "/" in name else 4)


# What no MLflow can have

BAD = {
    "localhost:5000": "Give http://localhost:5000.",
    "127.0.0.1:5000/mlflow": "Give http://127.0.0.1:5000/mlflow.",
    "[::1]:5000": "Give http://[::1]:5000.",
    "mlruns": "MLflow keeps runs in folders no longer.",
    "./mlruns": "Leave it out for the run store's own.",
    "file:///home/you/mlruns": "MLflow keeps runs in folders no longer.",
    "databricks": "Databricks is not supported",
    "databricks://profile": "Databricks is not supported",
    "htp://localhost:5000": "Did you mean http?",
    "postgres://host/mlflow": "Did you mean postgresql?",
    "sqllite:///x.db": "Did you mean sqlite?",
    "http:localhost:5000": "must be http://HOST:PORT",
    "http://localhost:port": "must be http://HOST:PORT",
    "http://localhost:5000 ": "must be http://HOST:PORT",
    "http://localhost:5000/#/experiments/1": "Give http://localhost:5000.",
    "http://localhost:5000/?x=1": "Give http://localhost:5000.",
    "sqlite://x.db": "must lead to a file, sqlite:///PATH",
    "sqlite://": "must lead to a file",
    "sqlite:///:memory:": "must lead to a file",
    "sqlite:///file:x.db": "must lead to a file",
    "sqlite:///what?x/mlflow.db": "must have %3F for a ?",
    "sqlite+aiosqlite:///x.db": "must lead to a file",
    "postgresql+psycopg2:///mlflow": "must be postgresql+psycopg2://USER:PASSWORD@HOST/DATABASE",
    "mssql+nodriver://host/mlflow": "with a driver of SQLAlchemy",
}


@pytest.mark.parametrize("uri", BAD)
def test_an_address_that_no_mlflow_can_have_is_refused_with_the_right_form(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", ModuleType("psycopg2"))  # as if installed
    with pytest.raises(ConfigError, match="`tracking_uri`") as caught:
        check_address(uri)
    assert BAD[uri] in str(caught.value)


def test_a_database_without_its_driver_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("psycopg", "psycopg2", "MySQLdb"):
        monkeypatch.setitem(sys.modules, name, None)
    for scheme in ("postgresql", "postgresql+psycopg2", "mysql"):
        with pytest.raises(ConfigError, match=r"needs the module .*, not installed here"):
            check_address(f"{scheme}://user:secret@host/mlflow")


@pytest.mark.parametrize(
    "uri",
    [
        "user:secret@localhost:5000",
        "http://user:sec/secret@localhost:x",
        "http://user:secret@localhost:5000/#/experiments",
        "htp://user:secret@localhost",
        "postgresql+nodriver://user:secret@host/db",
        "htp://host/?password=secret",
    ],
)
def test_a_refused_address_shows_no_password(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_address(uri)
    assert "secret" not in str(caught.value)


def test_credentials_are_hidden_in_any_address() -> None:
    assert hide_credentials("a http://u:p/w@h:1/x b") == "a http://***@h:1/x b"
    assert hide_credentials("postgresql://h/d?password=abc&x=1") == (
        "postgresql://h/d?password=***&x=1"
    )
    assert hide_credentials("sqlite:////home/a@b/x.db") == "sqlite:////home/a@b/x.db"


# Before anything is spent


def list_commands_with_an_address(storage: Path) -> list[list[str]]:
    given = ["--storage", str(storage), "--data", "shapes"]
    evaluated = ["s7-1:0", *given]
    return [
        [*SEARCH_WORDS, "--storage", str(storage)],
        ["train", "--space", "smoke", *given],
        ["lr-range", "--space", "smoke", *given],
        ["confirm", "--search", "s7-1", *given],
        ["evaluate", *evaluated],
        ["reproduce", *evaluated, "--test"],
        ["sync", "--storage", str(storage)],
        ["searches", "delete", "s7-1", "--yes", "--storage", str(storage)],
        ["ui", "--storage", str(storage)],
    ]


def test_every_command_refuses_a_bad_address_before_it_does_anything(tmp_path: Path) -> None:
    events = make_trial(0, [0.3, 0.5, 0.7], "complete")
    text = (ROOT / "search_spaces" / "s7.yaml").read_text(encoding="utf-8")
    budget = make_budget((1, 2, 3)).model_dump(mode="json")
    header = make_header("s7-1", data=SHAPES_INFO, space_text=text, budget=budget)
    write_record(tmp_path, header, [*events, SEARCH_FINISHED])
    before = sorted(tmp_path.rglob("*"))
    for words in list_commands_with_an_address(tmp_path):
        sentence = refuse(ConfigError, *words, "--tracking-uri", "localhost:5000")
        assert "Give http://localhost:5000." in sentence, words
    assert sorted(tmp_path.rglob("*")) == before


def test_a_database_that_is_no_mlflows_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE studies (number)")
        database.execute("CREATE TABLE alembic_version (version_num)")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is not MLflow's, it has studies"):
        check_tracking(tmp_path, f"sqlite:///{path}")
    assert path.read_bytes() == before
    text = tmp_path / "text.db"
    text.write_text("this is no database, whatever its name says\n" * 40)
    with pytest.raises(ConfigError, match="file is not a database"):
        check_tracking(tmp_path, f"sqlite:///{text}")


def test_a_database_in_a_folder_that_is_not_there_is_away_and_nothing_is_made(
    tmp_path: Path,
) -> None:
    """Its disk may be mounted again."""
    note = check_tracking(tmp_path, f"sqlite:///{tmp_path}/no/x.db")
    assert note is not None and "the folder of this SQLite file is not there" in note
    assert check_tracking(tmp_path, f"sqlite:///{tmp_path}/new.db") is None
    assert list(tmp_path.iterdir()) == []


def test_faults_of_the_run_stores_own_database_are_notes(tmp_path: Path) -> None:
    assert check_tracking(tmp_path / "new", None) is None
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says\n" * 40)
    note = check_tracking(tmp_path, None)
    assert note is not None and note.startswith("MLflow cannot be reached now: ")


def test_a_locked_database_is_away_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.tracking.store.SQLITE_TIMEOUT_SECONDS", 0.05)
    with closing(sqlite3.connect(tmp_path / "x.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        note = check_tracking(tmp_path, f"sqlite:///{tmp_path}/x.db")
    assert note is not None and "database is locked" in note


@contextmanager
def answer_with(status: int, body: bytes) -> Iterator[str]:
    """A server that answers every request in this way."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "body", "is_refused"),
    [
        (200, b'{"experiments": []}', None),
        (200, b"<html>another page</html>", True),
        (404, b"not found", True),
        (401, b"who are you?", True),
        (503, b"later", False),
    ],
)
def test_a_server_that_is_not_mlflow_is_refused_and_one_that_is_away_is_a_note(
    tmp_path: Path, status: int, body: bytes, is_refused: bool | None
) -> None:
    with answer_with(status, body) as uri:
        if is_refused:
            with pytest.raises(ConfigError, match="`tracking_uri` must be MLflow's"):
                check_tracking(tmp_path, uri)
            return
        note = check_tracking(tmp_path, uri)
    assert (note is None) == (is_refused is None)


@pytest.mark.slow
def test_a_training_says_at_its_start_that_the_server_is_away(workplace: Path) -> None:
    uri = f"http://user:secret@127.0.0.1:{find_free_port()}"
    answer = invoke(*make_train_words(workplace, "x"), "--tracking-uri", uri)
    assert answer.exit_code == 0 and "secret" not in answer.output
    start, _, end = answer.output.partition("epoch 1")
    assert "MLflow cannot be reached now: " in start and "Connection refused" in start
    assert "Upload the rest: " in end


def test_a_databases_host_that_does_not_answer_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", ModuleType("psycopg2"))  # as if installed
    uri = f"postgresql+psycopg2://u:secret@127.0.0.1:{find_free_port()}/mlflow"
    note = check_tracking(tmp_path, uri)
    assert note is not None and "Connection refused" in note and "secret" not in note
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"postgresql+psycopg2://u:p@127.0.0.1:{server.getsockname()[1]}/mlflow"
        assert check_tracking(tmp_path, uri) is None
