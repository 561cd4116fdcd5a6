"""The faults of a search: how tracebacks are parsed and grouped."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builders import (
    OUT_OF_MEMORY,
    SEARCH_FINISHED,
    TRACEBACK_MESSAGE,
    make_failed_trial,
    make_trial,
    write_failures,
    write_search,
)
from tune_cifar.record.events import Event, TrialRetried
from tune_cifar.record.failures import Failure, group_failures, parse_failure
from tune_cifar.record.journal import check_name


def catch(action: Callable[[], object]) -> str:
    """The traceback of an action that fails."""
    try:
        action()
    except Exception:
        return traceback.format_exc()
    raise AssertionError("it did not fail")


def misname_in_a_handler() -> None:
    try:
        int("x")
    except ValueError:
        check_name("../x")


def test_a_traceback_has_type_message_and_the_last_place_in_the_package() -> None:
    failure = parse_failure(catch(lambda: check_name("../x")))
    assert failure.kind == "RecordError"
    assert failure.what.startswith("tune_cifar.errors.RecordError: a search's name must have 1 to ")
    file, line, *function = failure.where.replace(":", " ").split()
    assert (file, function) == ("record/journal.py", ["in", "check_name"]) and int(line) > 1
    outside = parse_failure(catch(lambda: int("x")))
    message = "ValueError: invalid literal for int() with base 10: 'x'"
    assert outside == Failure("ValueError", message, "")


def test_of_chained_exceptions_the_last_counts() -> None:
    assert parse_failure(catch(misname_in_a_handler)).kind == "RecordError"


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        (
            OUT_OF_MEMORY,
            Failure(
                "OutOfMemoryError",
                "torch.OutOfMemoryError: " + TRACEBACK_MESSAGE.partition("\n")[0],
                "train/trainer.py:131 in _train_step",
            ),
        ),
        (
            "worker process died\nActorDiedError(7)\nworker died, 3 times",
            Failure("", "worker process died", ""),
        ),
        ("OSError(28, 'No space left')", Failure("OSError", "OSError(28, 'No space left')", "")),
        ("KeyError: 'x'", Failure("KeyError", "KeyError: 'x'", "")),
        ("", Failure("", "no message", "")),
    ],
)
def test_messages_about_a_fault_are_parsed(text: str, failure: Failure) -> None:
    assert parse_failure(text) == failure


def test_failures_are_grouped_by_what_failed_and_where_and_the_most_frequent_comes_first(
    tmp_path: Path,
) -> None:
    bigger = OUT_OF_MEMORY.replace("20.00", "1024.50").replace("GPU 0", "GPU 3")
    elsewhere = OUT_OF_MEMORY.replace("in _train_step", "in evaluate")
    other = OUT_OF_MEMORY.replace("torch.OutOfMemoryError", "RuntimeError")

    def make_events() -> list[Event]:
        return [
            *make_trial(0, [0.3, 0.5, 0.7], "complete"),
            *make_failed_trial(1, elsewhere, tmp_path),
            *make_failed_trial(2, OUT_OF_MEMORY, tmp_path),
            *make_failed_trial(3, other, tmp_path),
            *make_failed_trial(4, bigger, tmp_path),
        ]

    memory, first, second = group_failures(write_failures(tmp_path, make_events))
    message = "CUDA out of memory. Tried to allocate # MiB. GPU # has # MiB left."
    assert memory.what == f"torch.OutOfMemoryError: {message}"
    assert memory.where == "train/trainer.py:131 in _train_step"
    assert (memory.count, memory.failed) == (2, (2, 4))
    assert (memory.retried, memory.run_id, memory.traceback) == ((), "s7-1:2", OUT_OF_MEMORY)
    assert (first.where, first.failed) == ("train/trainer.py:131 in evaluate", (1,))
    assert "Tried to allocate 20.00 MiB" in first.what, "numbers that agree are kept"
    assert second.what.startswith("RuntimeError: ") and second.failed == (3,)


def test_faults_that_led_to_a_retry_are_counted_with_those_that_ended_trials(
    tmp_path: Path,
) -> None:
    def retry(number: int) -> TrialRetried:
        text = f"worker process died\nprocess {number}00"
        return TrialRetried(trial=number, fault="worker died", text=text)

    died_text = "worker process died\nprocess 7\nworker died, 3 times"

    def make_events() -> list[Event]:
        start, *rest = make_trial(0, [0.3, 0.5, 0.7], "complete")
        return [
            start,
            retry(0),
            *rest,
            *make_failed_trial(1, died_text, tmp_path, [retry(1), retry(1)]),
            *make_failed_trial(2, None, tmp_path),
        ]

    died, other = group_failures(write_failures(tmp_path, make_events))
    assert (died.what, died.where, died.count) == ("worker process died", "", 4)
    assert (died.failed, died.retried) == ((1,), (0,))
    assert (died.run_id, died.traceback) == ("s7-1:1", died_text), "one that failed is replayed"
    assert (other.what, other.traceback) == ("ValueError: 3 channels", "ValueError: 3 channels")


def test_digits_of_names_are_kept_and_those_of_addresses_are_not(tmp_path: Path) -> None:
    def make_events() -> list[Event]:
        text = "ValueError: conv1 of float32 at {} of cuda:0"
        return [
            *make_failed_trial(0, text.format("0x7f3a"), tmp_path),
            *make_failed_trial(1, text.format("0x81bc"), tmp_path),
        ]

    (group,) = group_failures(write_failures(tmp_path, make_events))
    assert group.what == "ValueError: conv1 of float32 at # of cuda:#"


def test_a_search_without_a_fault_has_no_group(tmp_path: Path) -> None:
    events = [*make_trial(0, [], "diverged"), SEARCH_FINISHED]
    assert group_failures(write_search(tmp_path, "s7-1", 1, events)) == []
