"""Goals that end a search before its trials do: decided from the record, whoever resumes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.builders import SHAPES_INFO, ignore_event, make_result, make_resume, make_space
from tune_cifar.record.events import SearchEnded, SearchResumed, Stage, utc_now
from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.state import TIME_LIMIT, SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import Numerics
from tune_cifar.search.driver import SearchDriver
from tune_cifar.search.goals import find_reached_goal
from tune_cifar.search.resume import restore_limits, restore_space
from tune_cifar.space.select import SearchSpace
from tune_cifar.train.recorded import make_header


def make_goal(val_size: int = 1000, **goals: Any) -> SearchSpace:
    """Twenty trials of one epoch each, of which none is stopped."""
    space = make_space(20, rungs=(1,)).limit(**goals)
    baseline = space.baseline.model_copy(update={"epochs": 1, "val_size": val_size})
    return dataclasses.replace(space, baseline=baseline)


def run(driver: SearchDriver, scores: list[float | None]) -> SearchState:
    """Run trials one at a time; without a score a trial diverges."""
    for score in scores:
        trial = driver.ask()
        if trial is None:
            break
        if score is None:
            driver.end(trial.number, "diverged", "the loss must be finite")
        else:
            driver.report(trial.number, Stage(1), make_result(1, score))
    driver.finish()
    driver.record.close()
    return driver.record.state


def start(storage: Path, numerics: Numerics, space: SearchSpace) -> SearchDriver:
    header = make_header("search", "x", space, 0, SHAPES_INFO, numerics, "test")
    return SearchDriver(Record.create(search_folder(storage, "x"), header), space, ignore_event)


@pytest.mark.parametrize(
    ("goals", "scores", "num_trials", "reason"),
    [
        ({"target": 0.6}, [0.5, 0.59, 0.6, 0.9], 3, "60 % reached"),
        ({"target": 0.605}, [0.7], 1, "60.5 % reached"),
        ({"patience": 3}, [0.5, 0.5, 0.52, 0.4, 0.9], 4, "no gain in 3 trials"),
        ({"patience": 2}, [0.5, None, None, 0.9], 3, "no gain in 2 trials"),
        # 2 x 2.2 points are noise on 1,000 images: 0.54 gains nothing, 0.55 does.
        ({"patience": 2}, [0.5, 0.54, 0.55, 0.58, 0.58, 0.9], 5, "no gain in 2 trials"),
        ({"patience": 3, "target": 0.9}, [0.5, 0.5, 0.9], 3, "90 % reached"),
    ],
)
def test_a_reached_goal_ends_the_search(
    tmp_path: Path,
    fp32: Numerics,
    goals: dict[str, Any],
    scores: list[float | None],
    num_trials: int,
    reason: str,
) -> None:
    state = run(start(tmp_path, fp32, make_goal(**goals)), scores)
    assert state.finished is not None and state.finished.reason == reason
    assert len(state.trials) == num_trials and state.is_finished


def test_patience_begins_with_the_first_complete_trial(tmp_path: Path, fp32: Numerics) -> None:
    state = run(start(tmp_path, fp32, make_goal(patience=2)), [None, None, None, 0.5, 0.5])
    assert state.finished is not None and state.finished.reason == "interrupted"


def test_small_gains_add_up_until_they_show(tmp_path: Path, fp32: Numerics) -> None:
    """Each is within the noise of the one before; every third is beyond that of the last gain."""
    scores: list[float | None] = [0.5 + 0.02 * number for number in range(15)]
    state = run(start(tmp_path, fp32, make_goal(patience=3)), scores)
    assert len(state.trials) == 15


def test_without_a_goal_no_trial_is_looked_at() -> None:
    assert find_reached_goal([], make_goal().budget) is None


def test_running_trials_are_finished_after_the_goal(tmp_path: Path, fp32: Numerics) -> None:
    driver = start(tmp_path, fp32, make_goal(target=0.6))
    first, second = driver.ask(), driver.ask()
    assert first is not None and second is not None
    driver.report(first.number, Stage(1), make_result(1, 0.7))
    assert driver.ask() is None and not driver.is_exhausted
    driver.report(second.number, Stage(1), make_result(1, 0.8))
    assert driver.is_exhausted
    assert run(driver, []).counts["complete"] == 2


def test_an_interrupted_search_keeps_its_goals_and_an_ended_one_goes_on_without(
    tmp_path: Path, fp32: Numerics
) -> None:
    space = make_goal(target=0.6, patience=9)
    driver = start(tmp_path, fp32, space)
    run(driver, [0.5])
    state = read_state(driver.record.state.folder)
    assert state.finished is not None and not state.is_finished
    kept = restore_limits(restore_space(state.header), state).budget
    assert (kept.target, kept.patience) == (0.6, 9)
    event = SearchResumed(
        time=utc_now(),
        trials=20,
        changes=[],
        target=0.7,
        numerics=fp32,
        environment={},
        command="test",
    )
    with Record.open(state.folder) as record:
        record.append(event)
        changed = restore_limits(restore_space(state.header), record.state).budget
        assert (changed.target, changed.patience) == (0.7, None)
        driver = SearchDriver(record, space.limit(target=0.7), ignore_event)
        assert run(driver, [0.65, 0.75]).is_finished
        over = restore_limits(restore_space(state.header), record.state).budget
    assert (over.target, over.patience) == (None, None)


def test_a_resumed_search_has_the_time_of_its_last_launch(tmp_path: Path, fp32: Numerics) -> None:
    """An old record has it in the header alone."""
    space = make_goal(target=0.6).limit(max_time_seconds=480.0)
    driver = start(tmp_path, fp32, space)
    run(driver, [0.5])
    state = driver.record.state

    def read_limit() -> float | None:
        return restore_limits(restore_space(state.header), state).budget.max_time_seconds

    found = [read_limit()]
    for seconds in (None, 3600.0):
        state.apply(make_resume().model_copy(update={"max_time_seconds": seconds}))
        found.append(read_limit())
        state.apply(SearchEnded(reason=TIME_LIMIT, wall_seconds=1.0))
    assert [*found, read_limit()] == [480.0, 480.0, 3600.0, 3600.0]
