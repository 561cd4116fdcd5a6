"""Standard streams that cannot be written or read, of real processes started by a shell."""

from __future__ import annotations

import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.builders import COMMANDS, ROOT, curve, invoke, make_train_words
from tests.faults.disks import mount_small_disk
from tune_cifar.cli.streams import SHOWING, _make_text, _Output, is_result
from tune_cifar.record.journal import read_state
from tune_cifar.record.store import search_folder

# Commands whose output is their result.
TELLING = {
    *("leaderboard", "plan", "models", "spaces list", "spaces show", "spaces check"),
    *("spaces knobs", "spaces new", "searches list", "failures", "data verify", "data list"),
}
NO_ROOM = "error stdout: the output could not be written: No space left on device. "
CLOSED = "error stdout: the output could not be written: Bad file descriptor. "
SEARCH = (
    "search --space smoke --tier cpu --data shapes --trials 3 --set train_size=200 "
    "--set batch_size=10 --max-concurrent 1 --name x"
)


def run_in_a_shell(
    command: str, redirection: str, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command as typed with its redirection, a pipe being one; returns its own status."""
    words = shlex.join([sys.executable, "-m", "tune_cifar", *shlex.split(command)])
    return subprocess.run(
        ["bash", "-c", f"{words} {redirection}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TUNE_CIFAR_RUNS": str(folder / "runs")},
    )


def goes_on(fault: str) -> str:
    return f"stdout cannot be written ({fault}): the command goes on to its end without it.\n"


# --- The rule


def test_every_command_either_shows_what_it_does_or_prints_its_result() -> None:
    assert TELLING | (SHOWING - {"judge"}) == set(COMMANDS) and not TELLING & SHOWING


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("search --space smoke", False),
        ("data fetch", False),
        ("data verify", True),
        ("reproduce x:0", False),
        ("reproduce x:0 --json", True),
        ("search --help", True),
        ("leaderboard", True),
        ("", True),
    ],
)
def test_json_and_help_are_a_result_of_any_command(typed: str, expected: bool) -> None:
    assert is_result(typed.split()) is expected


# --- Results


@pytest.mark.parametrize("command", ["spaces show smoke", "spaces list --json", "search --help"])
@pytest.mark.parametrize(("redirection", "error"), [("> /dev/full", NO_ROOM), (">&-", CLOSED)])
def test_a_result_that_cannot_be_written_is_an_error(
    tmp_path: Path, command: str, redirection: str, error: str
) -> None:
    answer = run_in_a_shell(command, redirection, tmp_path)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == f"{error}Make room, or write it elsewhere.\n"


@pytest.mark.parametrize("command", ["spaces show smoke", "spaces list --json", "--help"])
def test_a_result_whose_reader_has_gone_ends_quietly(tmp_path: Path, command: str) -> None:
    answer = run_in_a_shell(command, "| true", tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_an_error_that_nobody_can_read_keeps_its_exit_status(
    tmp_path: Path, redirection: str
) -> None:
    answer = run_in_a_shell("spaces show smok", redirection, tmp_path)
    assert (answer.returncode, answer.stdout, answer.stderr) == (1, "", "")


def test_a_question_to_a_closed_stdin_is_not_answered(storage: Path) -> None:
    answer = run_in_a_shell("searches delete small", "<&-", storage.parent)
    assert answer.returncode == 1 and "Aborted" in answer.stderr
    assert "Traceback" not in answer.stderr and search_folder(storage, "small").exists()


# --- The stream itself


def make_output(number: int) -> tuple[_Output, list[OSError]]:
    faults: list[OSError] = []
    return _Output(number, faults.append), faults


def test_a_broken_output_drops_what_follows_for_child_processes_too() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    output, faults = make_output(writer)
    assert [output.write(b"one"), output.write(b"two")] == [3, 3]
    assert faults == [output.fault] and isinstance(output.fault, BrokenPipeError)
    assert subprocess.run(["echo", "three"], stdout=writer).returncode == 0
    os.close(writer)


def read_slowly(reader: int, size: int, found: list[bytes]) -> None:
    time.sleep(0.3)
    while sum(map(len, found)) < size and (part := os.read(reader, 65536)):
        found.append(part)


def test_what_the_encoding_lacks_is_escaped() -> None:
    """The name of a folder may hold bytes that are no text in any encoding."""
    reader, writer = os.pipe()
    with _make_text(make_output(writer)[0], None) as text:
        text.write(os.fsdecode(b"runs/\xff ") + "\u2026\n")
    os.close(writer)
    assert os.read(reader, 100) == b"runs/\\udcff \xe2\x80\xa6\n"
    os.close(reader)


def test_all_is_written_into_a_full_pipe_that_its_other_end_made_non_blocking() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    data, found = os.urandom(1_000_000), list[bytes]()
    thread = threading.Thread(target=read_slowly, args=(reader, len(data), found))
    thread.start()
    output, faults = make_output(writer)
    assert output.write(data) == len(data) and faults == []
    thread.join()
    assert b"".join(found) == data
    os.close(reader), os.close(writer)


def test_a_signals_handler_may_print_while_the_command_waits_for_a_slow_reader() -> None:
    reader, writer = os.pipe()
    text = _make_text(make_output(writer)[0], None)
    before = signal.signal(signal.SIGALRM, lambda number, frame: print("stopping", file=text))
    found: list[bytes] = []
    thread = threading.Thread(target=read_slowly, args=(reader, 1_000_009, found))
    thread.start()
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        text.write("x" * 1_000_000)
    finally:
        signal.signal(signal.SIGALRM, before)
    thread.join()
    assert sorted(b"".join(found)) == sorted(b"x" * 1_000_000 + b"stopping\n")
    os.close(reader), os.close(writer)


# --- Commands that leave something behind


# Each with what it leaves behind.
SHOWN = {
    "reproduce small:0": "runs",
    "evaluate small:0": "runs/judge/*/confusion.png",
    "export small:0 --format safetensors": "small-0.safetensors",
    "report --search small": "runs/reports/small.html",
    "sync": "runs/mlflow.db",
    "preview --space smoke --data shapes": "preview-smoke.png",
    "lr-range --space smoke --tier cpu --data shapes --steps 35 --seeds 1": "runs/lr_range/*",
}
# Runs each command in a process of its own; all are forks of one that has made the slow imports.
FORKS = """
import os, shlex, sys
import matplotlib.pyplot, mlflow, torch
from tune_cifar.cli.app import main

for command in sys.argv[1:]:
    if os.fork() == 0:
        sys.argv = ["tune_cifar", *shlex.split(command)]
        main()
    assert os.wait()[1] == 0, command
"""


@pytest.mark.slow
def test_a_command_that_only_shows_does_its_work_without_stdout(storage: Path) -> None:
    folder = storage.parent
    with Path("/dev/full").open("w") as full:
        answer = subprocess.run(
            [sys.executable, "-c", FORKS, *SHOWN],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.count(goes_on("No space left on device")) == len(SHOWN), answer.stderr
    assert "Traceback" not in answer.stderr
    assert [left for left in SHOWN.values() if not list(folder.glob(left))] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "stderr"),
    [("| true", goes_on("Broken pipe")), (">&-", goes_on("Bad file descriptor")), (">&- 2>&-", "")],
)
def test_a_training_ends_the_same_without_stdout(
    workplace: Path, redirection: str, stderr: str
) -> None:
    words = make_train_words(workplace, "t")
    answer = run_in_a_shell(shlex.join(words), redirection, workplace)
    assert (answer.returncode, answer.stderr) == (0, stderr)
    assert invoke(*make_train_words(workplace, "u")).exit_code == 0
    ours, theirs = (read_curves(workplace / "runs", name) for name in "tu")
    assert ours == theirs and len(ours) == 1


def read_curves(storage: Path, name: str) -> list[Any]:
    """What must be equal of two runs of one search: trials, their ends and their curves."""
    state = read_state(search_folder(storage, name))
    assert state.is_finished and state.finished is not None
    return [
        (trial.full_config, trial.status, trial.score, curve([r for _, r in trial.trained_epochs]))
        for trial in state.trials.values()
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The trials of SEARCH when everything that it prints is read."""
    folder = tmp_path_factory.mktemp("undisturbed")
    answer = run_in_a_shell(SEARCH, "", folder)
    assert answer.returncode == 0, answer.stderr
    return read_curves(folder / "runs", "x")


@pytest.mark.faults
@pytest.mark.xdist_group("streams")
@pytest.mark.parametrize(
    ("redirection", "stderr"),
    [
        ("| head -14", goes_on("Broken pipe")),
        (">&-", goes_on("Bad file descriptor")),
        ("<&- >&- 2>&-", ""),
    ],
)
def test_a_search_ends_the_same_without_stdout(
    tmp_path: Path, undisturbed: list[Any], redirection: str, stderr: str
) -> None:
    answer = run_in_a_shell(SEARCH, redirection, tmp_path)
    assert (answer.returncode, answer.stderr) == (0, stderr)
    assert len(answer.stdout.splitlines()) == (14 if "head" in redirection else 0)
    assert read_curves(tmp_path / "runs", "x") == undisturbed


@pytest.mark.faults
@pytest.mark.xdist_group("streams")
def test_a_search_ends_the_same_when_the_disk_of_its_log_is_full(
    tmp_path: Path, undisturbed: list[Any]
) -> None:
    with mount_small_disk(tmp_path / "disk", 64) as disk:
        (disk / "log").write_text("before\n")
        with (disk / "rest").open("wb", buffering=0) as rest, pytest.raises(OSError, match="28"):
            while True:
                rest.write(bytes(1024))
        answer = run_in_a_shell(SEARCH, f">> {disk}/log", tmp_path)
        assert (disk / "log").read_text().startswith("before\n╭")
    assert (answer.returncode, answer.stderr) == (0, goes_on("No space left on device"))
    assert read_curves(tmp_path / "runs", "x") == undisturbed


@pytest.mark.faults
@pytest.mark.xdist_group("streams")
def test_a_search_ends_the_same_when_its_terminal_goes_away(
    tmp_path: Path, undisturbed: list[Any]
) -> None:
    """In the middle, with the live display in motion; its shell has it ignore SIGHUP."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-c", f"trap '' HUP; exec {sys.executable} -m tune_cifar {SEARCH}"],
        stdin=its,
        stdout=its,
        stderr=its,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TUNE_CIFAR_RUNS": str(tmp_path / "runs")},
        start_new_session=True,
    )
    os.close(its)
    shown = b""
    while b"running" not in shown:
        assert select.select([ours], [], [], 300)[0], shown
        shown += os.read(ours, 65536)
    os.close(ours)
    assert process.wait(600) == 0
    assert read_curves(tmp_path / "runs", "x") == undisturbed
