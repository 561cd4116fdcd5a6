"""Bad input: names, settings, resources, ports, folders that cannot be used.

Each is refused in one sentence before anything is created, and no name leads out of the run store.
"""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

from tests.builders import (
    TINY_SETTINGS,
    find_free_port,
    invoke,
    make_train_words,
    refuse,
    run_in_a_process,
)
from tests.faults.disks import drop_root
from tune_cifar.cli.terminal import this_command
from tune_cifar.errors import ConfigError, RecordError, TrackingError
from tune_cifar.record.journal import check_is_new, read_state
from tune_cifar.record.store import search_folder
from tune_cifar.train.numerics import count_cores

TRAIN = ("train", "--space", "smoke", "--tier", "cpu", "--data", "shapes")
SEARCH = ("search", "--space", "smoke", "--tier", "cpu", "--data", "shapes", "--device", "cpu")

# Names

NAMES = {
    "spaces": "my search",
    "umlauts": "Größe",
    "200 characters": "x" * 200,
    "65 characters": "x" * 65,
    "a parent": "../x",
    "an absolute path": "/tmp/x",
    "a folder": "a/b",
    "nothing": "",
    "one dot": ".",
    "two dots": "..",
    "a hidden file": ".x",
    "two lines": "a\nb",
    "a zero byte's escape": "a\\0b",
    "a pattern": "*",
    "an option": "-x",
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize(
    "words",
    [
        (*TRAIN, "--name"),
        (*TRAIN, "--resume", "--name"),
        (*SEARCH, "--name"),
        ("search", "--resume", "--name"),
        ("searches", "delete", "--yes", "--"),
        ("failures", "--search"),
        ("leaderboard", "--search"),
        ("sync", "--search"),
    ],
    ids=" ".join,
)
def test_a_name_unfit_for_a_folder_is_refused_in_a_sentence_and_makes_nothing(
    workplace: Path, words: tuple[str, ...], case: str
) -> None:
    (workplace / "runs").mkdir()
    (workplace / "x").mkdir()
    sentence = refuse(RecordError, *words, NAMES[case])
    rule = r"(a search's name must have 1 to 64 of|no search named )"
    assert re.search(rule, sentence)
    assert repr(NAMES[case]) in sentence
    assert sorted(path.name for path in workplace.rglob("*")) == ["runs", "x"]


# Settings


MODELS = "'s6', 's7', 's8', 's10', 's10_postact' or your own FILE.py:NAME"


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "max_lr=../../etc/passwd",
            "`settings`: max_lr: input should be a valid number, got '../../etc/passwd'.",
        ),
        ("model=../s7", f"`settings`: model must be {MODELS}, got '../s7'. Did you mean s7?"),
        ("model=/dev/null", f"`settings`: model must be {MODELS}, got '/dev/null'."),
        ("../max_lr=1", "`settings`: '../max_lr' is not a known knob. Did you mean max_lr?"),
        ("storage=/tmp", "`settings`: 'storage' is not a known knob."),
        ("=1", "`settings`: '' is not a known knob."),
        ("", "`settings` must be NAME=VALUE, got ''."),
        ("epochs=1000000", "`settings`: epochs <= 1000 must hold, got 1000000."),
        ("epochs=${HOME}", "`settings`: epochs: input should be a valid integer, got '${HOME}'."),
    ],
)
@pytest.mark.parametrize("command", [TRAIN, SEARCH], ids=["train", "search"])
def test_a_setting_is_a_knobs_value_and_never_a_path(
    workplace: Path, command: tuple[str, ...], setting: str, sentence: str
) -> None:
    assert refuse(ConfigError, *command, "--set", setting) == sentence
    assert list(workplace.iterdir()) == []


# Resources


@pytest.mark.parametrize("command", [TRAIN, SEARCH], ids=["train", "search"])
def test_more_cores_than_there_are_is_refused_before_anything_starts(
    workplace: Path, command: tuple[str, ...]
) -> None:
    cores = count_cores()
    wanted = max(64, cores + 1)
    sentence = refuse(ConfigError, *command, "--cpus-per-trial", str(wanted))
    assert sentence == f"`cpus_per_trial` must be 1 to {cores} (the cores here), got {wanted}."
    assert list(workplace.iterdir()) == []


FRACTION = "must be 0 or 0.0001 to 1, since a trial uses one GPU"


@pytest.mark.parametrize(
    ("gpus", "problem"),
    [
        ("0.5", "must be 0 on a CPU, got 0.5. Leave it out."),
        *((gpus, f"{FRACTION}, got {gpus}.") for gpus in ("1.5", "nan", "inf")),
    ],
)
def test_a_fraction_of_an_absent_gpu_is_refused_before_the_workers_start(
    workplace: Path, gpus: str, problem: str
) -> None:
    sentence = refuse(ConfigError, *SEARCH, "--gpus-per-trial", gpus)
    assert sentence == f"`gpus_per_trial` {problem}"
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize(
    "words", [("--gpus-per-trial", "all"), ("--cpus-per-trial", "1.5"), ("--max-concurrent", "x")]
)
def test_a_resource_that_is_not_a_number_is_a_usage_error(
    workplace: Path, words: tuple[str, str]
) -> None:
    answer = invoke(*SEARCH, *words)
    assert answer.exit_code == 2 and words[0] in answer.output
    assert list(workplace.iterdir()) == []


# Ports


def test_the_ui_refuses_a_port_in_use(workplace: Path) -> None:
    (workplace / "runs").mkdir()
    (workplace / "runs" / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        sentence = refuse(TrackingError, "ui", "--port", str(port))
    assert sentence == f"`port` must be free, got {port}, which is in use. Leave it out."


@pytest.mark.parametrize("port", ["0", "-1", "65536", "http"])
def test_an_impossible_port_is_a_usage_error(workplace: Path, port: str) -> None:
    answer = invoke("ui", "--port", port)
    assert answer.exit_code == 2 and "--port" in answer.output


# Folders that cannot be used

PLACES = ("/dev/null/x", "/proc/x", "/proc/sys/x/y")


@pytest.mark.parametrize("place", PLACES)
def test_a_training_refuses_a_run_store_that_cannot_be_written(workplace: Path, place: str) -> None:
    sentence = refuse(RecordError, *TRAIN, *TINY_SETTINGS, "--storage", place, "--name", "t")
    assert sentence.startswith(f"{place}/searches/t: cannot create the search: ")


@pytest.mark.parametrize("place", PLACES)
def test_a_search_refuses_a_run_store_that_cannot_be_written_before_its_workers_start(
    workplace: Path, place: str
) -> None:
    sentence = refuse(ConfigError, *SEARCH, "--storage", place)
    assert sentence.startswith(f"{place}: the run store must be writable, got ")
    assert sentence.endswith("Give another folder as `storage`.")


@pytest.mark.parametrize("place", PLACES)
def test_a_run_store_that_cannot_exist_is_empty_to_look_at(workplace: Path, place: str) -> None:
    for words in (("leaderboard",), ("searches", "list"), ("sync",)):
        answer = invoke(*words, "--storage", place)
        assert answer.exit_code == 0 and "is recorded yet. Start with: " in answer.stdout
    assert "there is no MLflow database" in refuse(TrackingError, "ui", "--storage", place)


def test_a_run_store_of_an_unknown_users_home_is_a_folder_of_that_name(workplace: Path) -> None:
    answer = invoke("leaderboard", "--storage", "~nobody-of-that-name/runs")
    assert answer.exit_code == 0 and "No trial is recorded yet" in answer.stdout


def test_a_run_store_without_permission_to_look_does_not_count_as_a_name_in_use(
    tmp_path: Path,
) -> None:
    """The error comes when something is written there."""
    (tmp_path / "locked").mkdir(mode=0o000)
    with drop_root():
        check_is_new(search_folder(tmp_path / "locked" / "runs", "x"))
    (tmp_path / "locked").chmod(0o700)


def test_a_search_refuses_a_temporary_folder_that_is_not_there(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    sentence = refuse(ConfigError, *SEARCH)
    assert sentence.startswith(
        "/no/such/folder: the temporary folder must be writable, got 'No such file or directory'"
    )
    assert not (workplace / "runs").exists()


@pytest.mark.slow
def test_a_training_needs_neither_a_home_nor_the_named_temporary_folder(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/dev/null/x")
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    words = ("--set", "epochs=2", "--storage", str(workplace / "runs"), "--name", "t")
    answer = run_in_a_process(*TRAIN, *TINY_SETTINGS, *words)
    assert (answer.returncode, answer.stderr) == (0, ""), answer.stdout + answer.stderr
    assert "MLflow upload" not in answer.stdout, answer.stdout
    assert read_state(search_folder(workplace / "runs", "t")).trials[0].status == "complete"


@pytest.mark.faults
@pytest.mark.slow
def test_a_search_needs_no_home_when_data_and_run_store_are_given(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, "/dev/null/x")
    words = ("--trials", "2", "--storage", str(workplace / "runs"), "--name", "s")
    answer = run_in_a_process(*SEARCH, *words)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "MLflow upload" not in answer.stdout, answer.stdout
    state = read_state(search_folder(workplace / "runs", "s"))
    assert state.is_finished and state.counts["complete"] + state.counts["stopped"] == 2


@pytest.mark.slow
def test_a_search_in_a_process_without_its_temporary_folder_ends_with_a_sentence_and_status_1(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    answer = run_in_a_process(*SEARCH)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    (error,) = [line for line in answer.stderr.splitlines() if line.startswith("error ")]
    rule = "the temporary folder must be writable"
    assert error.startswith(f"error /no/such/folder: {rule}, got ")
    assert list(workplace.iterdir()) == []


# Secrets


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("--tracking-uri http://me:hunter2@host:5000", "--tracking-uri 'http://***@host:5000'"),
        ("--tracking-uri=https://hunter2@host/x", "'--tracking-uri=https://***@host/x'"),
        ("--tracking-uri http://me:hunter2@hunter2@host", "--tracking-uri 'http://***@host'"),
        ("--tracking-uri postgresql://me:hunter2@h/db", "--tracking-uri 'postgresql://***@h/db'"),
        ("--tracking-uri sqlite:////runs@home/x.db", "--tracking-uri sqlite:////runs@home/x.db"),
        ("--data me@home", "--data me@home"),
    ],
)
def test_the_recorded_command_has_every_word_but_no_secret(
    monkeypatch: pytest.MonkeyPatch, typed: str, kept: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune_cifar", "search", *typed.split()])
    assert this_command() == f"python -m tune_cifar search {kept}"


@pytest.mark.slow
def test_a_training_writes_the_secret_of_its_tracking_address_nowhere(workplace: Path) -> None:
    port = find_free_port()
    words = make_train_words(workplace, "t")
    words[words.index("--tracking-uri") + 1] = f"http://me:hunter2@127.0.0.1:{port}"
    answer = run_in_a_process(*words)
    assert answer.returncode == 0 and "left over" in answer.stdout, answer.stdout + answer.stderr
    assert "hunter2" not in answer.stdout + answer.stderr
    files = [path for path in workplace.rglob("*") if path.is_file()]
    assert search_folder(workplace / "runs", "t") / "record.jsonl" in files
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
    assert "***@" in read_state(search_folder(workplace / "runs", "t")).header.command
