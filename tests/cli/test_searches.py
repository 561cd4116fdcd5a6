"""Searches listed and deleted; what failed in one; MLflow brought up to the records."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.builders import (
    OUT_OF_MEMORY,
    SEARCH_FINISHED,
    SEARCH_INTERRUPTED,
    SHAPES_INFO,
    TINY_SETTINGS,
    TRIALS,
    invoke,
    make_failed_trial,
    make_header,
    make_lockless,
    make_trial,
    refuse,
    run_in_a_process,
    write_failures,
    write_search,
)
from tune_cifar.cli.app import app
from tune_cifar.cli.searches import _delete_folder
from tune_cifar.errors import RecordError, TrackingError
from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A run store with a search of every status, and one that is damaged."""
    write_search(
        tmp_path, "whole", 1, [*make_trial(0, [0.3, 0.5, 0.7], "complete"), SEARCH_FINISHED]
    )
    write_search(
        tmp_path, "stopped", 2, [*make_trial(0, [0.3], None), SEARCH_INTERRUPTED], data=SHAPES_INFO
    )
    write_search(tmp_path, "killed", 3, TRIALS)
    damage(write_search(tmp_path, "torn", 4, TRIALS).folder)
    return tmp_path


def damage(folder: Path) -> None:
    """Change a figure in the middle of a record."""
    path = folder / "record.jsonl"
    content = path.read_bytes()
    assert b'"val_acc": 0.9' in content
    path.write_bytes(content.replace(b'"val_acc": 0.9', b'"val_acc": 0.8'))


def answer_with(text: str, *words: str) -> Any:
    """Run a command that asks."""
    return CliRunner().invoke(app, words, input=text)


def list_names(storage: Path) -> set[str]:
    return {path.name for path in (storage / "searches").iterdir()}


# searches list


def test_the_list_shows_how_far_each_search_came_and_how_to_go_on(storage: Path) -> None:
    with Record.create(
        search_folder(storage, "live"), make_header("live", created="2026-01-05T09:30:00+00:00")
    ):
        answer = invoke("searches", "list", "--storage", str(storage))
    assert answer.exit_code == 0, answer.output
    header, *rows, error, hint = answer.stdout.splitlines()
    assert header.split() == [
        "search",
        "kind",
        "space",
        "data",
        "created",
        "(UTC)",
        "state",
        "trials",
        "best",
        "size",
    ]
    assert [row.split()[0] for row in rows] == ["live", "torn", "killed", "stopped", "whole"]
    assert "2026-01-05 09:30  running" in rows[0] and "none" in rows[0]
    assert "damaged" in rows[1] and "driver died" in rows[2] and "interrupted" in rows[3]
    assert (
        "1 running, 3 complete, 1 stopped, 1 diverged, 1 failed" in rows[2]
        and "80.00 % (:1)" in rows[2]
    )
    assert (
        "s7 (full)" in rows[4]
        and "finished (all trials)" in rows[4]
        and rows[4].rstrip().endswith(" kB")
    )
    assert "shapes" in rows[3] and "cifar10" in rows[4]
    assert error.startswith(f"{storage}/searches/torn/record.jsonl:") and "fits its CRC" in error
    command = f"search --name killed --resume --storage {storage}"
    assert hint == f"continue killed: python -m tune_cifar {command}"


def test_the_list_repeats_where_an_unfinished_search_ran(tmp_path: Path) -> None:
    typed = "python -m tune_cifar search --space s7 --address auto --data cifar100 --trials 4"
    events = [*make_trial(0, [0.3], None), SEARCH_INTERRUPTED]
    write_search(tmp_path, "stopped", 2, events, command=typed)
    hint = invoke("searches", "list", "--storage", str(tmp_path)).stdout.splitlines()[-1]
    options = f"--resume --storage {tmp_path} --address auto --data cifar100"
    assert hint == f"continue stopped: python -m tune_cifar search --name stopped {options}"


def test_a_search_on_the_stand_in_goes_on_with_the_stand_in(tmp_path: Path) -> None:
    write_search(
        tmp_path, "stopped", 2, [*make_trial(0, [0.3], None), SEARCH_INTERRUPTED], data=SHAPES_INFO
    )
    lines = invoke("searches", "list", "--storage", str(tmp_path)).stdout.splitlines()
    assert lines[-1].endswith(f"search --name stopped --resume --storage {tmp_path}")


def test_the_list_with_json_is_one_document_in_the_same_order(storage: Path) -> None:
    rows = json.loads(invoke("searches", "list", "--json", "--storage", str(storage)).stdout)
    assert [row["name"] for row in rows] == ["torn", "killed", "stopped", "whole"]
    assert rows[0]["error"] is not None and rows[1]["error"] is None
    assert (rows[3]["stage"], rows[3]["best_val_acc"], rows[3]["counts"]["complete"]) == (
        "finished",
        0.7,
        1,
    )


def test_an_empty_run_store_is_said_to_be_empty(tmp_path: Path) -> None:
    answer = invoke("searches", "list", "--storage", str(tmp_path))
    assert answer.exit_code == 0 and answer.stdout.startswith("No search is recorded yet.")
    assert json.loads(invoke("searches", "list", "--json", "--storage", str(tmp_path)).stdout) == []


@pytest.mark.parametrize("command", ["searches list", "failures --search killed", "sync --help"])
def test_looking_at_searches_imports_nothing_heavy(storage: Path, command: str) -> None:
    code = (
        "import sys\n"
        "from tune_cifar.cli.app import app\n"
        f"try: app({command.split()!r}, prog_name='tune_cifar')\n"
        "except SystemExit as exc: assert not exc.code\n"
        "heavy = {'ray', 'torch', 'mlflow', 'optuna', 'pandas', 'albumentations', 'matplotlib'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = os.environ | {"TUNE_CIFAR_RUNS": str(storage)}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert answer.returncode == 0, answer.stderr[-2000:]


# searches delete


def test_a_deleted_search_is_gone_and_the_others_stay(storage: Path) -> None:
    (storage / "searches" / "whole" / "trials" / "0000").mkdir(parents=True)
    (storage / "searches" / "whole" / "trials" / "0000" / "weights").write_bytes(bytes(2_000_000))
    views = ["reports/whole.html", "reports/whole-2.html"]
    views += [
        "judge/whole-0/a.png",
        "judge/whole-0-test/a.png",
        "judge/whole-2-0/a.png",
        "judge/whole-1/a.png",
    ]
    for view in views:
        (storage / view).parent.mkdir(parents=True, exist_ok=True)
        (storage / view).touch()
    answer = invoke(
        "searches", "delete", "whole", "--yes", "--keep-mlflow", "--storage", str(storage)
    )
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == "whole is deleted: 1 trial, 2.0 MB, MLflow as it was\n"
    assert list_names(storage) == {"stopped", "killed", "torn"}
    assert [view for view in views if (storage / view).exists()] == [
        "reports/whole-2.html",
        "judge/whole-2-0/a.png",
        "judge/whole-1/a.png",  # no trial of it
    ]


def test_the_record_goes_last(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted deletion leaves a search that is listed and can be deleted."""
    folder, deleted = storage / "searches" / "whole", list[str]()
    record, unlink = (folder / "record.jsonl").read_bytes(), os.unlink
    for name in ("record.jsonl", "a", "m", "z"):
        (folder / name).unlink(missing_ok=True)
    for name in ("a", "z", "record.jsonl", "m", "nonce"):  # whatever the order of a folder's files
        (folder / name).write_bytes(record if name == "record.jsonl" else b"")

    def note(path: Any, **more: Any) -> None:
        deleted.append(Path(path).name)
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", note)
    _delete_folder(folder)
    assert len(deleted) >= 5 and deleted[-1] == "record.jsonl" and not folder.exists()


def test_nothing_is_deleted_unless_the_answer_is_yes(storage: Path) -> None:
    words = ("searches", "delete", "killed", "--keep-mlflow", "--storage", str(storage))
    for text in ("n\n", "\n", ""):
        answer = answer_with(text, *words)
        assert answer.exit_code == 1 and "Delete killed (7 trials, " in answer.stderr
        assert len(list_names(storage)) == 4
    answer = answer_with("y\n", *words)
    assert answer.exit_code == 0 and "killed" not in list_names(storage)


def test_a_live_search_is_not_deleted_and_its_owner_is_named(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.record.journal.LOCK_SECONDS", 0.1)
    words = ("searches", "delete", "stopped", "--yes", "--keep-mlflow", "--storage", str(storage))
    with Record.open(search_folder(storage, "stopped")):
        sentence = refuse(RecordError, *words)
        assert f"in use by process {os.getpid()} on " in sentence
        assert len(list_names(storage)) == 4
    assert invoke(*words).exit_code == 0


def test_a_search_that_starts_while_the_question_stands_is_not_deleted(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.record.journal.LOCK_SECONDS", 0.1)
    opened: list[Record] = []

    def confirm(*_: Any, **__: Any) -> bool:
        opened.append(Record.open(search_folder(storage, "stopped")))
        return True

    monkeypatch.setattr("typer.confirm", confirm)
    refuse(RecordError, "searches", "delete", "stopped", "--keep-mlflow", "--storage", str(storage))
    with opened[0]:
        assert len(list_names(storage)) == 4 and opened[0].state.trials


def test_a_damaged_search_is_deleted_only_without_its_runs(storage: Path) -> None:
    (storage / "searches" / "empty").mkdir()
    words = ("--yes", "--storage", str(storage))
    for name, what in (("torn", "fits its CRC"), ("empty", "cannot open its record")):
        sentence = refuse(RecordError, "searches", "delete", name, *words)
        assert what in sentence and sentence.endswith("--keep-mlflow deletes the folder alone.")
        assert name in list_names(storage)
        answer = invoke("searches", "delete", name, "--keep-mlflow", *words)
        assert answer.exit_code == 0 and "a damaged record" in answer.stdout
    assert list_names(storage) == {"whole", "stopped", "killed"}


@pytest.mark.parametrize("name", ["../away", "a/b", "..", ".hidden", "", "/etc", "ü"])
def test_a_name_that_could_lead_elsewhere_is_refused(storage: Path, name: str) -> None:
    (storage / "away").mkdir()
    sentence = refuse(
        RecordError,
        "searches",
        "delete",
        "--yes",
        "--keep-mlflow",
        "--storage",
        str(storage),
        "--",
        name,
    )
    assert sentence.startswith("a search's name must have 1 to 64 of A-Z a-z 0-9 . _ - ")
    assert (storage / "away").is_dir() and len(list_names(storage)) == 4


def test_an_unknown_search_is_refused_with_the_nearest_name(storage: Path) -> None:
    sentence = refuse(RecordError, "searches", "delete", "wole", "--yes", "--storage", str(storage))
    assert sentence == f"no search named 'wole' in {storage}. Did you mean whole?"


def test_no_link_is_followed(storage: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    away = tmp_path_factory.mktemp("away")
    elsewhere = write_search(away, "precious", 1, TRIALS).folder
    folder = storage / "searches" / "linked"
    folder.symlink_to(elsewhere)
    words = ("--yes", "--keep-mlflow", "--storage", str(storage))
    sentence = refuse(RecordError, "searches", "delete", "linked", *words)
    assert sentence == f"{folder} is a link or a file, not a folder. Delete it by hand."
    folder.unlink()
    (storage / "searches" / "whole" / "trials").symlink_to(away)
    (storage / "searches" / "whole" / "file").symlink_to(elsewhere / "record.jsonl")
    assert invoke("searches", "delete", "whole", *words).exit_code == 0
    assert "whole" not in list_names(storage)
    assert read_state(elsewhere).num_events > 20, "links in it went, what they led to is whole"
    other = away / "other"
    other.mkdir()
    (other / "searches").symlink_to(storage / "searches")
    refuse(
        RecordError,
        "searches",
        "delete",
        "killed",
        "--yes",
        "--keep-mlflow",
        "--storage",
        str(other),
    )
    assert "killed" in list_names(storage)


def test_without_a_database_there_are_no_runs_to_delete_and_none_is_made(storage: Path) -> None:
    answer = invoke("searches", "delete", "whole", "--yes", "--storage", str(storage))
    assert answer.exit_code == 0 and answer.stdout.endswith(" 0 runs in MLflow\n")
    assert "whole" not in list_names(storage) and not (storage / "mlflow.db").exists()


def test_when_mlflow_cannot_be_reached_the_folder_goes_only_when_its_runs_may_stay(
    storage: Path,
) -> None:
    (storage / "mlflow.db").write_text("this is no database, whatever its name says\n" * 40)
    words = ("searches", "delete", "whole", "--yes", "--storage", str(storage))
    sentence = refuse(TrackingError, *words)
    assert "cannot write to this SQLite database: file is not a database." in sentence
    assert sentence.endswith("The search is still there; --keep-mlflow deletes its folder alone.")
    assert "whole" in list_names(storage)
    assert invoke(*words, "--keep-mlflow").exit_code == 0 and "whole" not in list_names(storage)


def test_a_copied_folder_is_deleted_without_the_originals_runs_and_not_called_damaged(
    storage: Path,
) -> None:
    shutil.copytree(storage / "searches" / "whole", storage / "searches" / "copy")
    words = ("searches", "delete", "copy", "--yes", "--storage", str(storage))
    error = invoke(*words).exception
    assert isinstance(error, RecordError) and "a copy of search whole" in str(error)
    assert "--keep-mlflow deletes the folder alone" in str(error)
    answer = invoke(*words, "--keep-mlflow")
    assert answer.exit_code == 0 and "copy is deleted: a record of another name" in answer.stdout
    assert list_names(storage) == {"whole", "stopped", "killed", "torn"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        errno.ENOLCK,
        pytest.param(errno.ENOSYS, marks=pytest.mark.faults),
        pytest.param(errno.EOPNOTSUPP, marks=pytest.mark.faults),
    ],
)
def test_a_file_system_without_locks_is_named_and_its_searches_can_be_read(
    storage: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The system's flock fails in a process of its own; what is recorded there was copied there."""
    monkeypatch.setenv("LD_PRELOAD", str(make_lockless(storage, number)))
    place = ("--storage", str(storage))
    train = ("train", "--space", "smoke", "--data", "shapes", *TINY_SETTINGS, "--name", "new")
    resume = ("search", "--name", "stopped", "--resume")
    rule = f"the file system must have locks (flock), got '{os.strerror(number)}'"
    for words in (train, resume) if number == errno.ENOLCK else (train,):
        answer = run_in_a_process(*words, *place)
        assert answer.returncode == 1, answer.stdout
        assert f"{rule}. Give a folder elsewhere as --storage." in answer.stderr
        assert "Traceback" not in answer.stderr
    answer = run_in_a_process("searches", "list", *place)
    assert answer.returncode == 0, answer.stderr
    states = [line for line in answer.stdout.splitlines() if "  search  s7 " in line]
    assert ["driver died" in line for line in states] == [True, False, False]
    assert list_names(storage) == {"whole", "stopped", "killed", "torn"}
    answer = run_in_a_process("sync", "--search", "whole", *place)
    assert answer.returncode == 1 and rule in answer.stderr and "Warning" not in answer.stderr


# failures


@pytest.fixture
def failed(tmp_path: Path) -> SearchState:
    """Two trials out of memory, one with another fault."""

    def make_events() -> list[Any]:
        events = [
            make_failed_trial(1, OUT_OF_MEMORY.replace("20", "99"), tmp_path),
            make_failed_trial(2, OUT_OF_MEMORY, tmp_path),
        ]
        return [
            *make_trial(0, [0.3], None),
            *events[0],
            *events[1],
            *make_failed_trial(3, "KeyError: [red]", tmp_path),
        ]

    return write_failures(tmp_path, make_events)


def test_failures_are_shown_with_their_trials_a_traceback_and_the_command_that_repeats_one(
    tmp_path: Path, failed: SearchState
) -> None:
    answer = invoke("failures", "--search", "s7-1", "--storage", str(tmp_path))
    assert answer.exit_code == 0, answer.output
    lines = answer.stdout.splitlines()
    message = "CUDA out of memory. Tried to allocate # MiB. GPU # has # MiB left."
    assert lines[0] == f"2 x torch.OutOfMemoryError: {message}"
    assert lines[1:3] == ["  in: train/trainer.py:131 in _train_step", "  failed: 1, 2"]
    command = f"python -m tune_cifar reproduce s7-1:1 --storage {tmp_path}"
    assert lines[3] == f"  repeat: {command}"
    assert OUT_OF_MEMORY.replace("20", "99") in answer.stdout
    assert "1 x KeyError: [red]" in lines
    groups = json.loads(
        invoke("failures", "--search", "s7-1", "--json", "--storage", str(tmp_path)).stdout
    )
    assert [(group["count"], group["failed"], group["run_id"]) for group in groups] == [
        (2, [1, 2], "s7-1:1"),
        (1, [3], "s7-1:3"),
    ]
    assert groups[0]["command"] == command


def test_a_failed_run_on_synthetic_data_is_repeated_without_a_data_option(tmp_path: Path) -> None:
    write_search(tmp_path, "s7-1", 1, make_trial(0, [], "failed"), data=SHAPES_INFO)
    (group,) = json.loads(
        invoke("failures", "--search", "s7-1", "--json", "--storage", str(tmp_path)).stdout
    )
    assert group["command"] == f"python -m tune_cifar reproduce s7-1:0 --storage {tmp_path}"
    assert group["traceback"] == "it failed", "its error file is gone: the recorded reason"


def test_a_failed_run_is_repeated_with_the_data_that_its_search_was_given(tmp_path: Path) -> None:
    typed = "python -m tune_cifar search --space s7 --data '/my data' --max-concurrent 2"
    write_search(tmp_path, "s7-1", 1, make_trial(0, [], "failed"), command=typed)
    answer = invoke("failures", "--search", "s7-1", "--storage", str(tmp_path))
    command = f"python -m tune_cifar reproduce s7-1:0 --storage {tmp_path} --data '/my data'"
    assert f"  repeat: {command}\n" in answer.stdout


def test_a_search_without_failures_says_so(storage: Path) -> None:
    answer = invoke("failures", "--search", "whole", "--storage", str(storage))
    assert (answer.exit_code, answer.stdout) == (
        0,
        "whole: no trial failed, and none was retried (1 trial).\n",
    )
    assert (
        json.loads(
            invoke("failures", "--search", "whole", "--json", "--storage", str(storage)).stdout
        )
        == []
    )
    assert "Did you mean whole?" in refuse(
        RecordError, "failures", "--search", "wole", "--storage", str(storage)
    )


# sync


def test_a_damaged_record_is_told_and_an_empty_store_is_nothing_to_sync(storage: Path) -> None:
    answer = invoke("sync", "--search", "torn", "--storage", str(storage))
    assert answer.exit_code == 1 and answer.stdout == "" and "fits its CRC" in answer.stderr
    (only,) = json.loads(
        invoke("sync", "--search", "torn", "--json", "--storage", str(storage)).stdout
    )
    assert only["search"] == "torn" and "fits its CRC" in only["error"]
    assert "Did you mean whole?" in refuse(
        RecordError, "sync", "--search", "wole", "--storage", str(storage)
    )
    answer = invoke("sync", "--storage", str(storage / "nowhere"))
    assert answer.exit_code == 0 and answer.stdout.startswith("No search is recorded yet.")


def test_a_store_that_refuses_is_told_once_for_each_search(storage: Path) -> None:
    (storage / "mlflow.db").write_text("this is no database, whatever its name says\n" * 40)
    answer = invoke("sync", "--storage", str(storage))
    assert answer.exit_code == 1 and answer.stdout == ""
    lines = answer.stderr.splitlines()
    assert len(lines) == 4 and "fits its CRC" in lines[0]
    for line, name in zip(lines[1:], ("killed", "stopped", "whole"), strict=True):
        assert line.startswith(f"{name}: MLflow upload incomplete, ")
        assert f"python -m tune_cifar sync --search {name} --storage {storage}" in line


def list_runs(uri: str) -> list[Any]:
    """All runs of all experiments that are not deleted."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return list(
        client.search_runs(
            [found.experiment_id for found in client.search_experiments()], max_results=1000
        )
    )


@pytest.mark.slow
def test_sync_ships_what_is_missing_once_and_a_deleted_search_takes_its_runs_along(
    storage: Path,
) -> None:
    words = ("sync", "--storage", str(storage))
    answer = invoke(*words)
    assert answer.exit_code == 1 and len(answer.stderr.splitlines()) == 1, (
        "torn is told, the others go on"
    )
    lines = answer.stdout.splitlines()
    assert lines[0].startswith("killed: 7 trials uploaded, 0 already there, ")
    assert lines[1].startswith("stopped: 1 trial uploaded, 0 already there, ")
    assert lines[2].startswith("whole: 1 trial uploaded, 0 already there, ")
    uri = f"sqlite:///{storage}/mlflow.db"
    runs = list_runs(uri)
    assert len(runs) == 3 + 9 and {run.info.status for run in runs} == {
        "FINISHED",
        "KILLED",
        "FAILED",
    }
    again = json.loads(invoke(*words, "--json").stdout)
    assert [entry["search"] for entry in again] == ["torn", "killed", "stopped", "whole"]
    report = {"search": "killed", "uploaded": 0, "already": 7, "closed": 0, "live": False}
    assert again[1] == report and [entry["uploaded"] for entry in again[2:]] == [0, 0]
    assert len(list_runs(uri)) == len(runs)
    answer = invoke("searches", "delete", "killed", "--yes", "--storage", str(storage))
    assert answer.exit_code == 0 and answer.stdout.endswith(" 8 runs in MLflow\n")
    assert {run.data.tags["search"] for run in list_runs(uri)} == {"stopped", "whole"}


@pytest.mark.slow
def test_a_live_search_is_left_to_its_driver(storage: Path) -> None:
    with Record.open(search_folder(storage, "stopped")):
        answer = invoke("sync", "--search", "stopped", "--storage", str(storage))
    assert answer.exit_code == 0
    assert answer.stdout.rstrip().endswith(
        " 0 runs closed; it is running: the rest is left to its driver"
    )
    assert "RUNNING" in {run.info.status for run in list_runs(f"sqlite:///{storage}/mlflow.db")}


@pytest.mark.slow
def test_a_server_that_is_away_is_one_sentence_and_nothing_is_deleted(storage: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{free.getsockname()[1]}"
    words = ("--storage", str(storage), "--tracking-uri", uri)
    answer = invoke("sync", "--search", "whole", *words)
    assert answer.exit_code == 1 and len(answer.stderr.splitlines()) == 1 and answer.stdout == ""
    assert (
        answer.stderr.startswith("whole: MLflow upload incomplete, ")
        and "secret" not in answer.output
    )
    sentence = refuse(TrackingError, "searches", "delete", "whole", "--yes", *words)
    assert "secret" not in sentence and sentence.endswith("--keep-mlflow deletes its folder alone.")
    assert "whole" in list_names(storage)
