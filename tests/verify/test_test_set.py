"""The test set is opened once for a training: whatever folder, path or process asks for it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.builders import (
    CONFIG,
    ROOT,
    SHAPES,
    invoke,
    make_data_files,
    make_trial,
    refuse,
    write_search,
)
from tune_cifar.cli.confirm import evaluate_tests
from tune_cifar.cli.evaluate import evaluate_test, say_test
from tune_cifar.cli.terminal import stdout
from tune_cifar.errors import DataError, RecordError
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.record.test_log import (
    TEST_LOG_FILE,
    TestEvaluation,
    find_test_log,
    load_test_log,
    lock_test_log,
    write_test_log,
)
from tune_cifar.train.recorded import load_recorded_data, load_trained
from tune_cifar.verify.test_set import evaluate_test_set, list_near_duplicates, measure_unique

TEST_WORDS = ("reproduce", "x:0", "--test", "--no-retrain")

OTHER = CONFIG.model_copy(update={"max_lr": 0.2})


@pytest.fixture
def tested(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> SearchState:
    """A run on CIFAR-10 in the run store, whose test evaluation is logged nowhere yet.

    Its weights are gone: to evaluate it again fails. The package runs from the checkout/ there.
    """
    data = make_data_files(workplace / "data")
    monkeypatch.setenv("TUNE_CIFAR_DATA", str(data))
    monkeypatch.setattr("tune_cifar.record.test_log.PACKAGE", workplace / "checkout" / "tune_cifar")
    return write_search(workplace / "runs", "x", 1, make_trial(0, [0.3, 0.5, 0.7], "complete"))


def make_row(state: SearchState, **changes: object) -> TestEvaluation:
    """The test evaluation of a record's first trial."""
    trial, data = state.trials[0], state.header.data
    row = TestEvaluation(
        date="2026-02-01T12:00:00Z",
        commit="c",
        fingerprint=trial.fingerprint,
        seed=trial.config.seed,
        run_id=trial.run_id,
        data=data.name,
        images=10_000,
        test_acc=0.8125,
        test_loss=1.5,
        command="x, y",
        data_digest=data.digest,
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def check_known(*words: str, run_id: str = "x:0", shown: str = "81.25 %") -> None:
    """Check that the first result is shown with its date, and nothing is evaluated."""
    for more in ((), ("--json",)):
        answer = invoke(*(words or TEST_WORDS), *more)
        assert answer.exit_code == 0, (answer.output, answer.exception)
        known = f"(evaluated before, for {run_id} on 2026-02-01T12:00:00Z; --again does it once"
        assert f"test accuracy {shown}" in answer.output and known in answer.output
    assert json.loads(answer.stdout)["test_opened_before"] is True


# Where a command is typed


def go_to_a_folder_with_analysis(workplace: Path) -> str:
    folder = workplace / "elsewhere"
    (folder / "analysis").mkdir(parents=True)
    os.chdir(folder)
    return str(workplace / "runs")


def go_to_a_project_with_a_log_of_its_own(workplace: Path) -> str:
    storage = go_to_a_folder_with_analysis(workplace)
    write_test_log(Path("analysis") / TEST_LOG_FILE, [])
    return storage


def use_a_relative_path(workplace: Path) -> str:
    (workplace / "elsewhere").mkdir()
    os.chdir(workplace / "elsewhere")
    return "../runs"


def use_a_link(workplace: Path) -> str:
    (workplace / "link").symlink_to(workplace / "runs")
    return str(workplace / "link")


def move_the_run_store(workplace: Path) -> str:
    (workplace / "runs").rename(workplace / "moved")
    return str(workplace / "moved")


def copy_the_run_store(workplace: Path) -> str:
    shutil.copytree(workplace / "runs", workplace / "copied")
    return str(workplace / "copied")


@pytest.mark.parametrize(
    "prepare",
    [
        go_to_a_folder_with_analysis,
        go_to_a_project_with_a_log_of_its_own,
        use_a_relative_path,
        use_a_link,
        move_the_run_store,
        copy_the_run_store,
    ],
)
def test_what_the_run_stores_log_has_is_known_in_every_folder_and_by_every_path(
    workplace: Path,
    tested: SearchState,
    prepare: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(workplace)  # and back to where it was afterwards
    write_test_log(find_test_log(tested.storage), [make_row(tested)])
    check_known(*TEST_WORDS, "--storage", prepare(workplace))


@pytest.mark.parametrize("place", ["checkout", "."])
def test_what_the_committed_log_has_is_known_to_every_run_store(
    workplace: Path, tested: SearchState, place: str
) -> None:
    """A second run store of the project, with a copied record, too."""
    write_test_log(workplace / place / "analysis" / TEST_LOG_FILE, [make_row(tested)])
    check_known()
    second = search_folder(workplace / "second", "x")
    shutil.copytree(tested.folder, second)
    check_known(*TEST_WORDS, "--storage", str(workplace / "second"))
    assert not find_test_log(tested.storage).exists()


def test_the_same_training_under_another_name_is_known(tested: SearchState) -> None:
    write_search(tested.storage, "y", 2, make_trial(0, [0.3, 0.5, 0.7], "complete"))
    write_test_log(find_test_log(tested.storage), [make_row(tested)])
    check_known("reproduce", "y:0", "--test", "--no-retrain")


def test_after_several_evaluations_the_first_result_counts_everywhere(
    workplace: Path, tested: SearchState
) -> None:
    again = make_row(tested, date="2026-03-01T12:00:00Z", test_acc=0.9)
    write_test_log(find_test_log(tested.storage), [again])
    write_test_log(workplace / "checkout" / "analysis" / TEST_LOG_FILE, [make_row(tested)])
    check_known()


def test_a_training_without_a_logged_evaluation_is_evaluated(tested: SearchState) -> None:
    """What the tests above would see otherwise."""
    row = make_row(tested, fingerprint="another")
    write_test_log(find_test_log(tested.storage), [row, make_row(tested, data_digest="d2")])
    assert "data_batch_1: the file must have MD5" in refuse(DataError, *TEST_WORDS)


def test_the_leaderboard_shows_the_same_in_every_folder(
    workplace: Path, tested: SearchState, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_search(workplace / "runs", "y", 2, make_trial(0, [0.1] * 3, "complete", OTHER))
    write_test_log(find_test_log(tested.storage), [make_row(tested)])
    copied = make_row(other, date="2026-01-01T12:00:00Z", test_acc=0.75, data_digest="")
    write_test_log(workplace / "checkout" / "analysis" / TEST_LOG_FILE, [make_row(tested), copied])
    pages = set()
    for name in ("here", "there"):
        (workplace / name / "analysis").mkdir(parents=True)
        monkeypatch.chdir(workplace / name)
        pages.add(invoke("leaderboard").stdout)
    (page,) = pages
    assert page.splitlines()[-2:] == [
        "y:0: test accuracy 75.00 % on 10,000 images, evaluated 2026-01-01T12:00:00Z",
        "x:0: test accuracy 81.25 % on 10,000 images, evaluated 2026-02-01T12:00:00Z",
    ]


@pytest.mark.parametrize("place", ["runs", "checkout/analysis", "analysis"])
def test_a_log_that_cannot_be_read_refuses_the_evaluation(
    workplace: Path, tested: SearchState, place: str
) -> None:
    """None of its lines is known: the training may have been evaluated."""
    (workplace / place / TEST_LOG_FILE).mkdir(parents=True)
    sentence = refuse(RecordError, *TEST_WORDS)
    assert sentence.endswith("TEST_OPENINGS.csv: the test log cannot be read: Is a directory.")


# Several at once


@pytest.fixture
def few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_cifar.data.shapes._NUM_TEST_IMAGES", 1000)


@pytest.mark.usefixtures("few_test_images")
def test_an_evaluation_that_was_logged_meanwhile_is_not_repeated(
    storage: Path, trained: SearchState
) -> None:
    state = replace(trained, folder=search_folder(storage, "small"))
    trial = state.trials[0]
    trainer = load_trained(
        state, trial, load_recorded_data(state, trial, SHAPES), trial.driver.numerics
    )
    first, fresh = evaluate_test_set(trainer, state, trial, SHAPES, "a test")
    assert fresh is not None and fresh[0].accuracy == first.test_acc and len(fresh[1]) == 1000
    assert first.data_digest == state.header.data.digest
    assert evaluate_test_set(trainer, state, trial, SHAPES, "a test") == (first, None)
    assert evaluate_test(state, trial, trainer, SHAPES, "x", None, stdout()) == (first, None)
    again, fresh = evaluate_test_set(trainer, state, trial, SHAPES, "a test", again=True)
    assert fresh is not None
    assert load_test_log(find_test_log(storage)) == [first, again]


@pytest.mark.usefixtures("few_test_images")
def test_the_log_has_the_command_that_the_caller_gives(storage: Path, trained: SearchState) -> None:
    """In a notebook the process was started by another one."""
    state = replace(trained, folder=search_folder(storage, "small"))
    evaluate_tests(state, "shapes", "run.confirm(final=True)", None, stdout())
    (row,) = load_test_log(find_test_log(storage))
    assert row.command == "run.confirm(final=True)"


def start(storage: Path, folder: Path) -> subprocess.Popen[str]:
    """Start a test evaluation in a folder of its own."""
    folder.mkdir()
    words = ("reproduce", "small:0", "--test", "--no-retrain", "--storage", str(storage))
    return subprocess.Popen(
        [sys.executable, "-m", "tune_cifar", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TUNE_CIFAR_DATA": "shapes"},
    )


@pytest.mark.slow
def test_of_two_commands_at_once_one_evaluates_and_the_other_shows_its_result(
    storage: Path, workplace: Path
) -> None:
    """Both have looked into the log before either evaluates."""
    with lock_test_log(storage):
        processes = [start(storage, workplace / name) for name in ("here", "there")]
        for process in processes:
            assert process.stdout is not None
            for line in process.stdout:
                if "another test evaluation is running, waiting for its end" in line:
                    break
    answers = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    (row,) = load_test_log(find_test_log(storage))
    before, written = sorted(answers, key=lambda answer: "written into" in answer)
    assert f"written into {find_test_log(storage)}" in written
    assert f"evaluated before, for small:0 on {row.date}" in before
    assert all(f"test accuracy {100 * row.test_acc:.2f} %" in answer for answer in answers)


@pytest.mark.slow
def test_an_evaluation_that_was_killed_leaves_a_whole_log_and_no_lock(
    storage: Path, workplace: Path
) -> None:
    path = find_test_log(storage)
    process = start(storage, workplace / "here")
    while not (path.exists() and path.stat().st_size) and process.poll() is None:
        time.sleep(0.01)  # now it evaluates 10,000 images
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL and "test accuracy" not in output
    assert load_test_log(path) == []
    process = start(storage, workplace / "there")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "written into" in output, output
    assert len(load_test_log(path)) == 1


def test_the_list_of_near_duplicates_is_the_published_one() -> None:
    """With the four nearest pairs of it."""
    found = list_near_duplicates("cifar10")
    assert len(found) == len(set(found)) == 286 and sorted(found) == found
    assert all(index in range(10_000) for index in found)
    assert {6611, 159, 7293, 6080} <= set(found)
    assert list_near_duplicates("shapes") == []


def test_near_duplicates_are_left_out_of_the_second_accuracy() -> None:
    """All of them are right and half of the others: 50 % beside more than that."""
    duplicates, labels = list_near_duplicates("cifar10"), torch.arange(10_000) % 10
    is_right = torch.zeros(10_000, dtype=torch.bool)
    others = torch.ones(10_000, dtype=torch.bool)
    others[duplicates] = False
    is_right[duplicates] = True
    is_right[others.nonzero().flatten()[::2]] = True
    predicted = torch.where(is_right, labels, (labels + 1) % 10)
    logits = torch.nn.functional.one_hot(predicted, 10).float()
    assert measure_unique(logits, labels, "cifar10") == pytest.approx(0.5)
    assert is_right.double().mean() > 0.51
    assert measure_unique(logits, labels, "shapes") is None


def test_a_second_accuracy_is_said_beside_the_usual_one_where_it_is_known(
    tested: SearchState, capsys: pytest.CaptureFixture[str]
) -> None:
    for unique, expected in ((0.887, "; 88.70 % without the near duplicates"), (None, "")):
        say_test("x:0", make_row(tested, test_acc_unique=unique), "here", stdout())
        text = " ".join(capsys.readouterr().out.split())
        assert ("without the near duplicates" in text) == bool(expected) and expected in text
