"""Confirmations: candidates, seeds, gains over pairs, and evaluations on the test set."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest

from tests.builders import (
    CIFAR10,
    NUMERICS,
    SEARCH_WORDS,
    SHAPES,
    SHAPES_INFO,
    SMALL_SETTINGS,
    ignore_event,
    invoke,
    make_result,
    make_resume,
    make_stages_driver,
    make_trial,
    refuse,
    run_in_a_process,
    write_record,
)
from tune_cifar.cli.confirm import choose_name, describe_curse, describe_pairs
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import ConfigError, DataError, NameTakenError, RecordError
from tune_cifar.record.events import Confirmation, Event, Kind, Stage
from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.record.test_log import TEST_LOG_COLUMNS, TEST_LOG_FILE, TestEvaluation
from tune_cifar.schema import DataInfo, TrainConfig
from tune_cifar.search.driver import SearchDriver
from tune_cifar.search.plan import Cost, Resources, SearchPlan, SearchRequest
from tune_cifar.search.resume import restore_space
from tune_cifar.space.select import SearchSpace, load_space
from tune_cifar.train.recorded import make_header
from tune_cifar.verify.confirm import (
    Confirmed,
    Gain,
    check_confirmed,
    compare_pairs,
    find_confirmation,
    make_confirmation,
    make_final,
    summarise,
    summarise_tests,
)

SPACE = load_space("smoke", "cpu", {"epochs": 2})
# How a training ends: with its last accuracy, or its status; None keeps it running.
Outcome = float | str | None


def write_search(
    storage: Path,
    scores: Sequence[float | None],
    name: str = "x",
    space: SearchSpace = SPACE,
    **header: Any,
) -> SearchState:
    """Return a search of two epochs with these scores; a trial of None is stopped after one."""
    made = make_header("search", name, space, 3, header.pop("data", CIFAR10), NUMERICS, "test")
    events: list[Event] = []
    for number, score in enumerate(scores):
        config = space.baseline if number == 0 else space.config({"max_lr": 0.01 * (1 + number)})
        accs = [0.1] if score is None else [0.1] * (config.epochs - 1) + [score]
        events += make_trial(number, accs, "stopped" if score is None else "complete", config)
    return write_record(storage, made.model_copy(update=header), events)


def open_confirmation(
    storage: Path, made: tuple[SearchSpace, Confirmation], name: str = "x-confirm", **header: Any
) -> SearchDriver:
    """Return the driver of a new confirmation."""
    space, settled = made
    data = header.pop("data", CIFAR10)
    found = make_header("confirm", name, space, space.budget.seed, data, NUMERICS, "test")
    found = found.model_copy(update={"confirmation": settled, **header})
    record = Record.create(search_folder(storage, name), found)
    return SearchDriver(record, space, ignore_event)


def play(driver: SearchDriver, outcomes: Sequence[Outcome]) -> SearchState:
    """End the driver's next trainings like this, then the driver; returns what is on disk."""
    for outcome in outcomes:
        trial = driver.ask()
        assert trial is not None
        epochs = trial.config.epochs
        if outcome == "diverged":
            driver.end(trial.number, "diverged", "the loss must be finite")
        elif outcome == "failed":
            driver.fail(trial.number, "ValueError: no")
        elif outcome is not None:
            accs: list[float | None] = [None] * epochs
            if trial.config.val_size:
                accs = [0.1] * (epochs - 1) + [float(outcome)]
            for epoch, acc in enumerate(accs, 1):
                goes_on = driver.report(trial.number, Stage(epochs), make_result(epoch, acc))
                assert goes_on == (epoch < epochs)
    driver.finish()
    driver.record.close()
    return read_state(driver.record.state.folder)


def write_confirmed(
    storage: Path,
    state: SearchState,
    outcomes: Sequence[Outcome],
    top: int = 1,
    seeds: int = 2,
    **header: Any,
) -> SearchState:
    """Return a confirmation of a search with these outcomes, training by training."""
    made = make_confirmation(state, top, seeds, {})
    return play(open_confirmation(storage, made, data=state.header.data, **header), outcomes)


def list_runs(settled: Confirmation) -> list[str]:
    return [candidate.run_id for candidate in settled.candidates]


def list_scores(settled: Confirmation) -> list[tuple[str, float | None]]:
    return [(candidate.run_id, candidate.score) for candidate in settled.candidates]


# What is confirmed


def test_the_baseline_comes_first_and_then_the_best_of_equals_the_lower_number(
    tmp_path: Path,
) -> None:
    state = write_search(tmp_path, [0.5, 0.7, 0.8, 0.7, None, 0.6])
    space, settled = make_confirmation(state, 2, 3, {})
    assert list_runs(settled) == ["x:0", "x:2", "x:1"]
    assert [candidate.score for candidate in settled.candidates] == [0.5, 0.8, 0.7]
    configs = [TrainConfig(**candidate.config) for candidate in settled.candidates]
    assert configs == [state.trials[number].config for number in (0, 2, 1)]
    assert (settled.search, settled.final, settled.num_trials) == ("x", False, 9)
    budget = space.budget
    assert (budget.trials, budget.rungs, budget.max_time_seconds) == (9, (2,), None)
    assert space.baseline == SPACE.baseline
    assert (space.distributions, space.points, space.pinned) == ({}, (), {})


def test_as_many_as_there_are_are_confirmed(tmp_path: Path) -> None:
    state = write_search(tmp_path, [0.5, 0.7])
    assert list_runs(make_confirmation(state, 9, 1, {})[1]) == ["x:0", "x:1"]


def test_a_baseline_among_the_best_is_not_confirmed_twice(tmp_path: Path) -> None:
    state = write_search(tmp_path, [0.9, 0.7, 0.8])
    assert list_runs(make_confirmation(state, 1, 1, {})[1]) == ["x:0", "x:2"]
    assert list_runs(make_confirmation(write_search(tmp_path, [0.9], "y"), 1, 1, {})[1]) == ["y:0"]


def test_a_baseline_that_was_not_complete_is_confirmed_without_a_score(tmp_path: Path) -> None:
    settled = make_confirmation(write_search(tmp_path, [None, 0.7]), 1, 1, {})[1]
    assert list_scores(settled) == [("x:0", None), ("x:1", 0.7)]


def test_a_search_that_a_warm_start_left_without_a_baseline_trial_has_its_baseline_all_the_same(
    tmp_path: Path,
) -> None:
    header = make_header("search", "x", SPACE, 3, CIFAR10, NUMERICS, "test")
    trial = make_trial(1, [0.1, 0.7], "complete", SPACE.config({"max_lr": 0.01}))
    settled = make_confirmation(write_record(tmp_path, header, trial), 1, 1, {})[1]
    assert list_scores(settled) == [("x:baseline", None), ("x:1", 0.7)]


def test_changes_hold_for_all_candidates_alike(tmp_path: Path) -> None:
    state = write_search(tmp_path, [0.5, 0.7, 0.8])
    changes = {"epochs": 7, "train_size": 300, "dropout": 0.1}
    space, settled = make_confirmation(state, 2, 1, changes)
    for candidate, number in zip(settled.candidates, (0, 2, 1), strict=True):
        changed = state.trials[number].config.model_copy(update=changes)
        assert TrainConfig(**candidate.config) == changed
    assert (space.budget.rungs, space.pinned, space.baseline.train_size) == ((7,), changes, 300)


def test_candidates_that_a_change_makes_equal_are_one(tmp_path: Path) -> None:
    state = write_search(tmp_path, [0.5, 0.7, 0.8])
    assert list_runs(make_confirmation(state, 2, 1, {"max_lr": 0.2})[1]) == ["x:0"]


def test_a_baseline_that_was_scored_by_replicates_is_confirmed_once(tmp_path: Path) -> None:
    """Its last stage was trained under another seed."""
    driver = make_stages_driver(tmp_path, NUMERICS, replicates=2)
    driver.ask()
    for stage in (Stage(1), Stage(2), Stage(3), Stage(3, 1)):
        for epoch in range(1, stage.length + 1):
            driver.report(0, stage, make_result(epoch, 0.5))
    driver.record.close()
    assert list_runs(make_confirmation(driver.record.state, 2, 1, {})[1]) == ["c:0"]


@pytest.mark.parametrize(
    ("changes", "restarts"),
    [
        ({}, [1, 3]),
        ({"epochs": 9}, [1, 3]),
        ({"epochs": 3}, [1]),
        ({"epochs": 1}, []),
        ({"warm_restarts": (2,)}, [2]),
    ],
)
def test_warm_restarts_beyond_a_shorter_training_are_cut(
    tmp_path: Path, changes: dict[str, Any], restarts: list[int]
) -> None:
    space = load_space("smoke", "cpu", {"epochs": 4, "warm_restarts": [1, 3]})
    _, settled = make_confirmation(write_search(tmp_path, [0.5], space=space), 1, 1, changes)
    assert settled.candidates[0].config["warm_restarts"] == restarts


@pytest.mark.parametrize(
    ("used", "seeds"), [(0, [1, 2, 3]), (2, [0, 1, 3]), (3, [0, 1, 2]), (99, [0, 1, 2])]
)
def test_the_seeds_are_never_the_searchs_own(tmp_path: Path, used: int, seeds: list[int]) -> None:
    space = load_space("smoke", "cpu", {"epochs": 2, "seed": used})
    _, settled = make_confirmation(write_search(tmp_path, [0.5], space=space), 1, 3, {})
    assert settled.seeds == seeds


def test_the_seeds_of_replicates_are_the_searchs_own_too(tmp_path: Path) -> None:
    state = write_search(tmp_path, [0.5])
    budget = {**state.header.budget, "replicates": 3}
    state.header = state.header.model_copy(update={"budget": budget})
    assert make_confirmation(state, 1, 2, {})[1].seeds == [3, 4]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"seed": 1},
            "`settings` must not change seed, since every candidate is trained under several. Use",
        ),
        (
            {"val_size": 0, "train_size": 50_000},
            "`settings`: val_size >= 1 must hold, got 0. Candidates are compared on the validation",
        ),
        (
            {"batch_size": 4000},
            "configuration: batch_size <= train_size must hold, got batch_size 4000 and train_size",
        ),
        (
            {"warm_restarts": (2,)},
            "configuration: warm_restarts increasing from 1 to below epochs must hold",
        ),
    ],
)
def test_changes_that_make_no_sense_are_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    state = write_search(tmp_path, [0.5, 0.7])
    with pytest.raises(ConfigError) as caught:
        make_confirmation(state, 1, 1, changes)
    assert str(caught.value).startswith(sentence)


def test_a_search_without_a_complete_trial_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^x: no trial is complete, so there is none to confirm"):
        make_confirmation(write_search(tmp_path, [None, None]), 1, 1, {})


@pytest.mark.parametrize(
    ("kind", "words"), [("train", "a single training"), ("confirm", "a confirmation")]
)
def test_a_record_that_is_not_of_a_search_is_refused_with_its_kind(
    tmp_path: Path, kind: Kind, words: str
) -> None:
    state = write_search(tmp_path, [0.5], kind=kind)
    rule = rf"^`search` must be the name of a search, got x, {words}\.$"
    with pytest.raises(ConfigError, match=rule):
        make_confirmation(state, 1, 1, {})


# Results


def test_a_gain_has_students_interval_over_its_pairs() -> None:
    """By hand: differences 3, 1 and 2 points, sd 1 point, t(2 d.f., 97.5 %) = 4.3027."""
    gain = compare_pairs([(0.63, 0.60), (0.62, 0.61), (0.65, 0.63)])
    assert gain is not None and gain.interval is not None
    half = 4.3027 * 0.01 / 3**0.5
    assert (gain.mean, *gain.interval) == pytest.approx((0.02, 0.02 - half, 0.02 + half), abs=1e-6)
    assert describe_pairs(gain) == "+2.00 points, 95 % interval -0.48 to +4.48 (3 pairs)"


def test_a_single_pair_has_no_interval_and_no_pair_no_gain() -> None:
    gain = compare_pairs([(0.5, 0.53)])
    assert gain == Gain(pytest.approx(-0.03), None, 1)
    assert describe_pairs(gain) == "-3.00 points in 1 pair: no interval"
    assert compare_pairs([]) is None and describe_pairs(None) == "no pair"


def test_equal_differences_have_an_interval_without_width() -> None:
    gain = compare_pairs([(0.75, 0.5), (1.0, 0.75)])
    assert gain == Gain(0.25, (0.25, 0.25), 2)


def make_confirmed(
    search_score: float | None, scores: Sequence[float], same_recipe: bool = True
) -> Confirmed:
    return Confirmed("x:4", search_score, dict(enumerate(scores, 1)), None, same_recipe)


@pytest.mark.parametrize(
    ("scores", "mean", "sd"), [([], None, None), ([0.5], 0.5, None), ([0.5, 0.75, 1.0], 0.75, 0.25)]
)
def test_a_candidate_has_mean_and_sd_as_far_as_there_are_scores(
    scores: list[float], mean: float | None, sd: float | None
) -> None:
    found = make_confirmed(0.5, scores)
    assert (found.mean, found.sd) == (mean, sd)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            make_confirmed(0.75, [0.5, 0.625]),
            "x:4: 75.00 % in the search, 56.25 % over 2 new seeds: 18.75 points lower, since the "
            "best was chosen (the winner's curse).",
        ),
        (
            make_confirmed(0.5, [0.5, 0.5]),
            "x:4: 50.00 % in the search, 50.00 % over 2 new seeds: not lower than in the search.",
        ),
        (
            make_confirmed(0.5, [0.9], same_recipe=False),
            "x:4: 50.00 % in the search, with other settings: not comparable with these.",
        ),
        (make_confirmed(0.5, []), "x:4: nothing to compare yet."),
        (make_confirmed(None, [0.5]), "x:4: nothing to compare yet."),
    ],
)
def test_the_winners_curse_is_described_in_a_sentence(found: Confirmed, sentence: str) -> None:
    assert describe_curse(found) == sentence


def test_candidates_are_compared_in_pairs_of_equal_seeds(tmp_path: Path) -> None:
    state = write_search(tmp_path, [0.5, 0.7, 0.8])
    outcomes = [0.50, 0.60, 0.55, 0.52, 0.66, 0.55, 0.51, 0.60, 0.52]
    confirmed = summarise(write_confirmed(tmp_path, state, outcomes, top=2, seeds=3))
    assert [(found.run_id, found.scores) for found in confirmed] == [
        ("x:0", {1: 0.50, 2: 0.52, 3: 0.51}),
        ("x:2", {1: 0.60, 2: 0.66, 3: 0.60}),
        ("x:1", {1: 0.55, 2: 0.55, 3: 0.52}),
    ]
    baseline, best, other = confirmed
    assert baseline.gain is None and best.same_recipe
    assert best.gain == compare_pairs([(0.60, 0.50), (0.66, 0.52), (0.60, 0.51)])
    assert other.gain == compare_pairs([(0.55, 0.50), (0.55, 0.52), (0.52, 0.51)])
    values = best.to_dict()
    assert best.gain is not None and best.sd == statistics.stdev([0.60, 0.66, 0.60])
    assert values["gain"] == {"mean": best.gain.mean, "interval": best.gain.interval, "pairs": 3}
    assert values["scores"] == {"1": 0.60, "2": 0.66, "3": 0.60}
    assert (values["mean"], values["sd"]) == (best.mean, best.sd)
    assert baseline.to_dict()["gain"] is None


def test_a_diverged_training_counts_as_chance_and_a_failed_one_not_at_all(tmp_path: Path) -> None:
    outcomes = [0.50, "diverged", "failed", 0.60, 0.52, "failed"]
    state = write_search(tmp_path, [0.5, 0.7])
    baseline, best = summarise(write_confirmed(tmp_path, state, outcomes, seeds=3))
    assert (baseline.scores, best.scores) == ({1: 0.50, 3: 0.52}, {1: 0.1, 2: 0.60})
    assert best.gain == Gain(pytest.approx(-0.4), None, 1), "seed 1 alone has a pair"


def test_an_interrupted_confirmation_gives_the_pairs_that_there_are(tmp_path: Path) -> None:
    search = write_search(tmp_path, [0.5, 0.7])
    state = write_confirmed(tmp_path, search, [0.50, 0.60, 0.52], seeds=3)
    assert not state.is_finished
    baseline, best = summarise(state)
    assert (baseline.scores, best.scores) == ({1: 0.50, 2: 0.52}, {1: 0.60})
    assert best.gain == compare_pairs([(0.60, 0.50)])
    assert make_confirmed(0.7, []).to_dict()["mean"] is None


def test_other_settings_than_the_searchs_are_noted(tmp_path: Path) -> None:
    made = make_confirmation(write_search(tmp_path, [0.5, 0.7]), 1, 1, {"epochs": 1})
    confirmed = summarise(play(open_confirmation(tmp_path, made), [0.5, 0.6]))
    assert [found.same_recipe for found in confirmed] == [False, False]


# The driver of a confirmation


def test_a_confirmation_runs_seed_after_seed_and_another_driver_trains_what_is_missing(
    tmp_path: Path,
) -> None:
    made = make_confirmation(write_search(tmp_path, [0.5, 0.7]), 1, 2, {"dropout": 0.1})
    broken = play(open_confirmation(tmp_path, made), [0.50, None])
    assert broken.finished is not None and broken.finished.reason == "interrupted"
    assert [trial.params for trial in broken.trials.values()] == [
        {"candidate": "x:0", "seed": 1},
        {"candidate": "x:1", "seed": 1},
    ]
    assert {trial.origin for trial in broken.trials.values()} == {"confirm"}
    with Record.open(broken.folder) as record:
        record.append(make_resume(record.state.num_trials))
        space = restore_space(record.state.header)
        assert (space.baseline, space.budget) == (made[0].baseline, made[0].budget)
        assert space.pinned == {"dropout": 0.1}
        assert (space.distributions, space.obstacle) == ({}, None)
        driver = SearchDriver(record, space.limit(record.state.num_trials), ignore_event)
        resumed = play(driver, [0.60, 0.52, 0.66])
    assert resumed.is_finished and driver.is_exhausted
    order = [(trial.params["candidate"], trial.config.seed) for trial in resumed.trials.values()]
    assert order == [("x:0", 1), ("x:1", 1), ("x:0", 2), ("x:1", 2)]
    for trial in resumed.trials.values():
        candidate, seed = made[1].find(trial.number)
        assert trial.config == TrainConfig(**{**candidate.config, "seed": seed})
    assert summarise(resumed)[1].gain == compare_pairs([(0.60, 0.50), (0.66, 0.52)])


def make_plan(made: tuple[SearchSpace, Confirmation | None]) -> SearchPlan:
    space, settled = made
    request = SearchRequest(SHAPES, Path("runs"), "test")
    what = (space, request, "n", CIFAR10, NUMERICS)
    cost = Cost(0.5, 700.0, 24_000.0)
    return SearchPlan(*what, Resources(1, 0.0, 2, 0), cost, confirmation=settled)


def test_a_plan_says_what_it_is_of(tmp_path: Path) -> None:
    rest = "; 2 at once on a processor, fp32, 1 thread each. "
    rest += "An epoch of the baseline takes about 0.5 s; a trial holds 0.68 of 23 GB: about "
    state = write_search(tmp_path, [0.5, 0.7])
    text = make_plan(make_confirmation(state, 1, 3, {})).describe()
    assert text == f"confirmation n: 6 trainings of 2 epochs each{rest}12 trial-epochs in 0:00:07."
    text = make_plan(make_confirmation(state, 1, 3, {"epochs": 1})).describe()
    assert text == f"confirmation n: 6 trainings of 1 epoch each{rest}6 trial-epochs in 0:00:06."
    space = load_space("smoke", "cpu", {"epochs": 1})
    plan = make_plan((space, None))
    assert plan.describe().startswith("search n: 4 trials, 1 epoch each, sampler gp (startup 1), ")
    for seconds, words in {0.0123: "0.012 s", 113.0: "110 s", 4321.0: "4300 s"}.items():
        other = replace(plan, cost=plan.cost._replace(epoch_seconds=seconds))
        assert f"takes about {words};" in other.describe_cost()


# The final


def test_the_best_confirmed_mean_and_the_baseline_go_to_the_test_on_all_images(
    tmp_path: Path,
) -> None:
    """x:2 was the best in the search, x:1 is the best under new seeds."""
    state = write_search(tmp_path, [0.5, 0.7, 0.8])
    made = make_confirmation(state, 2, 2, {"epochs": 1})
    confirmation = play(open_confirmation(tmp_path, made), [0.50, 0.60, 0.65, 0.52, 0.61, 0.64])
    space, settled = make_final(state, confirmation, 3)
    assert (list_runs(settled), settled.final, settled.seeds) == (["x:0", "x:1"], True, [1, 2, 3])
    assert [candidate.score for candidate in settled.candidates] == [0.5, 0.7]
    changes = {"epochs": 1, "train_size": 50_000, "val_size": 0}
    for candidate, number in zip(settled.candidates, (0, 1), strict=True):
        changed = state.trials[number].config.model_copy(update=changes)
        assert TrainConfig(**candidate.config) == changed
    assert (space.baseline.val_size, space.budget.trials, space.budget.rungs) == (0, 6, (1,))
    assert space.pinned == changes
    final = play(open_confirmation(tmp_path, (space, settled), "x-final"), [0.0] * 6)
    assert final.is_finished and [trial.score for trial in final.trials.values()] == [None] * 6
    assert restore_space(final.header).baseline == space.baseline


def test_shorter_trainings_of_a_confirmation_leave_the_final_ones_as_long_as_the_recipe(
    tmp_path: Path,
) -> None:
    state = write_search(tmp_path, [0.5, 0.7])
    made = make_confirmation(state, 1, 2, {"dropout": 0.1}, epochs=1)
    assert [found.config["epochs"] for found in made[1].candidates] == [1, 1]
    assert made[1].epochs == 1 and made[0].pinned == {"dropout": 0.1, "epochs": 1}
    confirmation = play(open_confirmation(tmp_path, made), [0.5, 0.6, 0.5, 0.6])
    _, final = make_final(state, confirmation, 2)
    recipe = state.header.baseline["epochs"]
    assert recipe > 1
    for found in final.candidates:
        assert (found.config["epochs"], found.config["dropout"]) == (recipe, 0.1)
        assert (found.config["train_size"], found.config["val_size"]) == (50_000, 0)
    with pytest.raises(ConfigError, match="`settings` must not have epochs beside `epochs`"):
        make_confirmation(state, 1, 1, {"epochs": 1}, epochs=1)


def test_the_baseline_alone_goes_to_the_test_when_it_is_the_best(tmp_path: Path) -> None:
    state = write_search(tmp_path, [0.5, 0.7])
    confirmation = write_confirmed(tmp_path, state, [0.60, 0.60, 0.61, 0.61])
    assert list_runs(make_final(state, confirmation, 1)[1]) == ["x:0"], "of equals the baseline"


def test_a_final_confirmation_keeps_all_weights_for_the_test_set(tmp_path: Path) -> None:
    """There is no score to choose the best one by."""
    state = write_search(tmp_path, [0.5, 0.7])
    made = make_final(state, write_confirmed(tmp_path, state, [0.5, 0.6, 0.5, 0.6]), 2)
    driver = open_confirmation(tmp_path, made, "x-final")
    for number in range(4):
        folder = driver.record.state.trial_folder(number)
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"weights")
    final = play(driver, [0.0] * 4)
    assert all((final.folder / str(trial.weights_file)).exists() for trial in final.trials.values())


def test_only_a_finished_confirmation_with_a_score_chooses_what_is_tested(tmp_path: Path) -> None:
    state = write_search(tmp_path, [0.5, 0.7])
    finished = write_confirmed(tmp_path, state, [0.5, 0.6, 0.5, 0.6])
    assert check_confirmed(finished, "x") is finished
    unfinished = write_confirmed(tmp_path, state, [0.5], name="half")
    failed = write_confirmed(tmp_path, state, ["failed"] * 4, name="bad")
    sentences = {
        "search x is not confirmed. Confirm it first, without `final`.": None,
        "confirmation half is not finished. Continue it first: `resume=True`, without `final`.": (
            unfinished
        ),
        "no training of confirmation bad has a score. `failures --search bad` says why.": failed,
    }
    for sentence, found in sentences.items():
        with pytest.raises(RecordError) as caught:
            check_confirmed(found, "x")
        assert str(caught.value) == f"`final`: {sentence}"


def test_of_a_searchs_confirmations_the_newest_counts_and_finals_apart(tmp_path: Path) -> None:
    state = write_search(tmp_path, [0.5, 0.7])
    other = write_search(tmp_path, [0.5, 0.7], "y")
    made = make_confirmation(state, 1, 1, {})
    final = made[0], made[1].model_copy(update={"final": True})
    others = make_confirmation(other, 1, 1, {})
    days = {"a": (1, made), "c": (3, made), "b": (2, made), "final": (4, final), "z": (5, others)}
    states = []
    for name, (day, made_of) in days.items():
        created = f"2026-01-{day:02d}T12:00:00+00:00"
        states.append(play(open_confirmation(tmp_path, made_of, name, created=created), []))
    for order in (states, states[::-1]):
        found = find_confirmation([state, other, *order], "x", is_final=False)
        assert found is not None and found.header.name == "c"
        found = find_confirmation(order, "x", is_final=True)
        assert found is not None and found.header.name == "final"
        assert find_confirmation(order, "y", is_final=True) is None


def write_final(
    storage: Path, outcomes: Sequence[Outcome], data: DataInfo = CIFAR10
) -> SearchState:
    """Return a final confirmation of the baseline and x:1 under two seeds."""
    state = write_search(storage, [0.5, 0.7], data=data)
    made = make_final(state, write_confirmed(storage, state, [0.5, 0.6, 0.5, 0.6]), 2)
    return play(open_confirmation(storage, made, "x-final", data=data), outcomes)


def make_row(state: SearchState, number: int, acc: float, **changes: Any) -> TestEvaluation:
    trial = state.trials[number]
    values: dict[str, Any] = {
        "date": f"2026-02-{number + 1:02d}T12:00:00Z",
        "commit": "c",
        "fingerprint": trial.fingerprint,
        "seed": trial.config.seed,
        "run_id": trial.run_id,
        "data": state.header.data.name,
        "images": 10_000,
        "test_acc": acc,
        "test_loss": 1.0,
        "command": "x",
    }
    return TestEvaluation(**{**values, **changes})


def write_log(path: Path, rows: Sequence[TestEvaluation]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([TEST_LOG_COLUMNS, *(astuple(row) for row in rows)])


def test_test_accuracies_are_read_from_the_test_log(tmp_path: Path) -> None:
    state = write_final(tmp_path, [0.0] * 4)
    rows = [make_row(state, n, acc) for n, acc in enumerate((0.8, 0.875, 0.75))]
    rows.append(make_row(state, 3, 0.99, data="shapes"))
    rows.append(make_row(state, 3, 0.98, fingerprint="another"))
    rows.append(make_row(state, 2, 0.97))  # --again: the first one counts
    rows.append(make_row(state, 3, 0.96, data_digest="d2"))
    baseline, best = summarise_tests(state, rows)
    assert (baseline.scores, best.scores) == ({1: 0.8, 2: 0.75}, {1: 0.875})
    assert best.gain == Gain(0.875 - 0.8, None, 1) and not best.same_recipe
    assert [found.scores for found in summarise_tests(state, [])] == [{}, {}]


def test_a_test_of_the_same_training_under_another_name_counts(tmp_path: Path) -> None:
    """It is not evaluated on the test set again."""
    state = write_final(tmp_path, [0.0] * 4)
    (baseline, _) = summarise_tests(state, [make_row(state, 0, 0.8, run_id="x-final-1:0")])
    assert baseline.scores == {1: 0.8}


def test_a_final_training_that_diverged_counts_as_chance_in_the_test(tmp_path: Path) -> None:
    state = write_final(tmp_path, [0.0, "diverged", "failed", 0.0])
    rows = [make_row(state, 0, 0.8), make_row(state, 3, 0.9)]
    baseline, best = summarise_tests(state, rows)
    assert (baseline.scores, best.scores) == ({1: 0.8}, {1: 0.1, 2: 0.9})


# The command


def confirm(*words: str) -> Any:
    return invoke("confirm", "--search", "x", "--data", "shapes", *words)


def squeeze(text: str) -> str:
    """Return the text with single spaces."""
    return " ".join(text.split())


@pytest.fixture
def store(workplace: Path) -> Path:
    """A run store with a search on synthetic data, x, and its confirmation."""
    storage = workplace / "runs"
    state = write_search(storage, [0.5, 0.7, 0.8], data=SHAPES_INFO)
    write_confirmed(storage, state, [0.50, 0.60, 0.52, 0.61])
    return storage


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--top 0", "Invalid value for '--top'"),
        ("--seeds 0", "Invalid value for '--seeds'"),
        (
            "--final --set epochs=1",
            "--set belongs to the confirmation: --final trains what was confirmed.",
        ),
        (
            "--final --top 2",
            "--top belongs to the confirmation: --final trains what was confirmed.",
        ),
        ("--resume --seeds 3", "x-confirm is recorded with --seeds 2, got 3. Leave out what"),
        ("--resume --top 2", "x-confirm is recorded with --top 1, got 2."),
        ("--resume --set epochs=1", "x-confirm is recorded with --set epochs unset, got 1."),
        ("--resume --device cuda", "x-confirm is recorded with --device cpu, got cuda."),
        ("--accept-changes", "--accept-changes belongs to --resume."),
    ],
)
@pytest.mark.usefixtures("store")
def test_options_that_contradict_each_other_are_wrong_usage(words: str, sentence: str) -> None:
    answer = confirm(*words.split())
    assert answer.exit_code == 2
    assert sentence in " ".join(answer.stderr.replace("│", "").split())


def test_a_search_must_be_named() -> None:
    assert invoke("confirm").exit_code == 2


@pytest.mark.parametrize(
    ("words", "kind", "sentence"),
    [
        ("--search y", RecordError, "no search named 'y' in "),
        (
            "--search x-confirm",
            ConfigError,
            "`search` must be the name of a search, got x-confirm, a confirmation.",
        ),
        ("--search x --name ../y", RecordError, "a search's name must have 1 to 64 of"),
        (
            "--search x",
            NameTakenError,
            "x-confirm: a confirmation of this search exists already. Continue or show it with "
            "`resume=True`, or give `name` for another.",
        ),
        (
            "--search x --name x-confirm",
            NameTakenError,
            "x-confirm: a search of this name exists already.",
        ),
        ("--search x --set seed=1", ConfigError, "`settings` must not change seed"),
        ("--search x --set maxlr=1", ConfigError, "`settings`: 'maxlr' is not a known knob."),
        (
            "--search x --resume --name z",
            ConfigError,
            "There is no confirmation of x named z to resume. Leave --resume out.",
        ),
        (
            "--search x --resume --final",
            ConfigError,
            "There is no final confirmation of x to resume. Leave --resume out.",
        ),
    ],
)
@pytest.mark.usefixtures("store")
def test_a_mistake_is_answered_in_one_sentence(words: str, kind: Any, sentence: str) -> None:
    assert sentence in refuse(kind, "confirm", *words.split(), "--data", "shapes")


@pytest.mark.usefixtures("store")
def test_the_command_of_a_confirmation_with_resume_appended_is_accepted() -> None:
    options = "--device cpu --precision fp32 --cpus-per-trial 1"
    answer = confirm(*f"--top 1 --seeds 2 {options} --resume".split())
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == confirm("--resume").stdout


def test_a_confirmation_nobody_named_takes_a_number_where_something_else_has_its_name(
    store: Path,
) -> None:
    write_search(store, [0.5], "y-confirm", data=SHAPES_INFO)
    assert choose_name(store, "y", False) == "y-confirm-2"
    assert choose_name(store, "x", True) == "x-final"
    assert choose_name(store, "z" * 64, False) == f"{'z' * 54}-confirm"
    with pytest.raises(NameTakenError):
        choose_name(store, "x", False)


def test_a_confirmation_from_before_there_was_a_top_counts_its_candidates(workplace: Path) -> None:
    state = write_search(workplace / "runs", [0.5, 0.7, 0.8], data=SHAPES_INFO)
    space, settled = make_confirmation(state, 5, 1, {})
    assert settled.top == 5
    made = space, settled.model_copy(update={"top": None})
    play(open_confirmation(workplace / "runs", made, data=SHAPES_INFO), [0.5, 0.6, 0.6])
    assert confirm("--resume", "--top", "2").exit_code == 0
    assert confirm("--resume", "--top", "5").exit_code == 2


def test_nothing_is_resumed_and_nothing_tested_before_there_is_a_confirmation(
    workplace: Path,
) -> None:
    write_search(workplace / "runs", [0.5, 0.7], data=SHAPES_INFO)
    words = ("confirm", "--search", "x", "--data", "shapes")
    sentence = "There is no confirmation of x to resume. Leave --resume out."
    assert refuse(ConfigError, *words, "--resume") == sentence
    assert "`final`: search x is not confirmed." in refuse(RecordError, *words, "--final")


def test_the_data_must_be_the_searchs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNE_CIFAR_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    write_search(workplace / "runs", [0.5, 0.7])
    write_search(workplace / "runs", [0.5, 0.7], "on-shapes", data=SHAPES_INFO)
    sentence = refuse(ConfigError, "confirm", "--search", "x", "--data", "shapes")
    assert sentence == "x was trained on cifar10, got shapes. Give its data as `data`."
    assert "data fetch" in refuse(
        DataError, "confirm", "--search", "on-shapes", "--data", str(workplace)
    )


@pytest.mark.usefixtures("store")
def test_search_resume_continues_a_confirmation_by_its_name() -> None:
    answer = invoke("search", "--name", "x-confirm", "--resume", "--data", "shapes")
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == confirm("--resume").stdout
    answer = invoke("search", "--name", "x-confirm", "--resume", "--max-time", "1m")
    assert answer.exit_code == 2 and "--max-time" in answer.stderr


def test_a_finished_confirmation_is_reported_again_with_the_next_command_and_its_options(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNE_CIFAR_RUNS")
    monkeypatch.chdir(store)
    answer = confirm("--resume", "--storage", str(store))
    assert answer.exit_code == 0, answer.output
    title, header, baseline, best, curse, empty, *hint = answer.stdout.splitlines()
    length = "2 epochs of 1,000 images, NOT CIFAR-10 (shapes)"
    assert title == f"x-confirm: validation accuracy over seeds after {length}"
    assert squeeze(header) == "candidate search mean sd seeds gain over the baseline"
    assert squeeze(baseline) == "x:0 50.00 % 51.00 % 1.41 % 2 the baseline"
    interval = "95 % interval +3.15 to +15.85 (2 pairs)"
    assert squeeze(best) == f"x:2 80.00 % 60.50 % 0.71 % 2 +9.50 points, {interval}"
    excess = "19.50 points lower, since the best was chosen (the winner's curse)."
    assert curse == f"x:2: 80.00 % in the search, 60.50 % over 2 new seeds: {excess}"
    command = f"  python -m tune_cifar confirm --search x --data shapes --storage {store} --final"
    assert (empty, hint) == ("", ["next:", command])
    named = confirm("--resume", "--name", "x-confirm", "--storage", str(store))
    assert named.exit_code == 0 and named.stdout.splitlines()[:5] == answer.stdout.splitlines()[:5]


@pytest.mark.usefixtures("store")
def test_a_finished_confirmation_as_json_is_one_document() -> None:
    answer = confirm("--resume", "--json")
    found = json.loads(answer.stdout)
    assert (found["search"], found["name"], found["final"]) == ("x", "x-confirm", False)
    baseline, best = found["candidates"]
    assert (baseline["scores"], best["scores"]) == ({"1": 0.5, "2": 0.52}, {"1": 0.6, "2": 0.61})
    assert best["gain"]["pairs"] == 2 and "next:" not in answer.stderr


def test_a_finished_confirmation_is_reported_without_its_data(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_CIFAR_DATA", str(workplace / "nowhere"))
    storage = workplace / "runs"
    write_confirmed(storage, write_search(storage, [0.5, 0.7]), [0.5, 0.6, 0.52, 0.61])
    answer = invoke("confirm", "--search", "x", "--resume")
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.startswith(
        "x-confirm: validation accuracy over seeds after 2 epochs of 1,000 images\n"
    )


def test_a_candidate_without_a_pair_is_not_taken_for_the_baseline(workplace: Path) -> None:
    storage = workplace / "runs"
    state = write_search(storage, [0.5, 0.7], data=SHAPES_INFO)
    write_confirmed(storage, state, ["failed", "diverged", "failed", 0.6])
    lines = confirm("--resume").stdout.splitlines()
    assert squeeze(lines[2]) == "x:0 50.00 % - - 0 the baseline"
    assert squeeze(lines[3]) == "x:1 70.00 % 35.00 % 35.36 % 2 no pair"
    assert lines[4:7] == [
        "x-confirm:0 failed: it is left out",
        "x-confirm:1 diverged: it counts as chance",
        "x-confirm:2 failed: it is left out",
    ]


# The leaderboard


def list_starts(text: str) -> list[str]:
    """Return the first words of a leaderboard's lines."""
    return [line.split()[0] for line in text.splitlines() if line.strip()]


def test_the_leaderboard_keeps_validation_confirmed_and_test_apart(workplace: Path) -> None:
    (workplace / "analysis").mkdir()
    storage = workplace / "runs"
    final = write_final(storage, [0.0] * 4)
    searched, other = read_state(search_folder(storage, "x")), write_search(storage, [0.5], "other")
    rows = [make_row(final, n, acc) for n, acc in enumerate((0.8, 0.875, 0.75, 0.875))]
    rows += [make_row(other, 0, 0.76), make_row(searched, 1, 0.77)]
    rows.append(make_row(searched, 0, 0.11, fingerprint="of another run store"))
    write_log(workplace / "analysis" / TEST_LOG_FILE, rows)
    text = invoke("leaderboard", "--search", "x").stdout
    starts = list_starts(text)
    parts = [starts.index(word) for word in ("VALIDATION:", "CONFIRMED:", "TEST:")]
    assert starts[parts[0] + 1 : parts[1]] == ["2", "run", "x:1", "x:0"]
    assert starts[parts[1] + 1 : parts[2]] == ["x-confirm:", "candidate", "x:0", "x:1", "x:1:"]
    assert starts[parts[2] + 1 :] == ["x-final:", "candidate", "x:0", "x:1", "x:1:"]
    assert "x-final: test accuracy over seeds after 2 epochs of 50,000 images\n" in text
    assert "+9.75 points" not in text and "+10.00 points" in text
    assert (
        text.splitlines()[-1]
        == "x:1: test accuracy 77.00 % on 10,000 images, evaluated 2026-02-02T12:00:00Z"
    )
    assert "other:0: test accuracy 76.00 %" in invoke("leaderboard", "--space", "smoke").stdout
    assert invoke("leaderboard", "--space", "s7").stdout.startswith("No trial is recorded yet.")
    only = list_starts(invoke("leaderboard", "--search", "x-confirm").stdout)
    assert only == ["CONFIRMED:", "x-confirm:", "candidate", "x:0", "x:1", "x:1:"]


def test_the_leaderboards_data_stay_a_row_per_trial(workplace: Path) -> None:
    write_final(workplace / "runs", [0.0, 0.0])
    rows = json.loads(invoke("leaderboard", "--json").stdout)
    kinds = {row["run_id"]: row["kind"] for row in rows}
    assert kinds == {
        **{f"x:{number}": "search" for number in range(2)},
        **{f"x-confirm:{number}": "confirm" for number in range(4)},
        **{f"x-final:{number}": "confirm" for number in range(2)},
    }
    assert len(json.loads(invoke("leaderboard", "--search", "x", "--json").stdout)) == 2
    assert len(invoke("leaderboard", "--csv").stdout.splitlines()) == 9


def test_the_leaderboard_names_synthetic_data_and_what_is_unfinished(workplace: Path) -> None:
    storage = workplace / "runs"
    state = write_search(storage, [0.5, 0.7], data=SHAPES_INFO)
    write_confirmed(storage, state, [0.5, 0.6, 0.5])
    write_log(storage / TEST_LOG_FILE, [make_row(state, 1, 0.4, images=1000)])
    text = invoke("leaderboard").stdout
    assert "2 epochs of 1,000 images, NOT CIFAR-10 (shapes), 3 of 4 trainings so far" in text
    *_, last = text.splitlines()
    assert last.startswith("x:1: test accuracy 40.00 % on 1,000 images, NOT CIFAR-10 (shapes), ")
    assert last.endswith(" 2026-02-02T12:00:00Z")


def test_a_leaderboard_with_confirmations_needs_neither_torch_nor_ray(workplace: Path) -> None:
    write_final(workplace / "runs", [0.0] * 4)
    code = (
        "import sys\n"
        "from tune_cifar.cli.app import app\n"
        "try: app(['leaderboard'], prog_name='tune_cifar')\n"
        "except SystemExit as exc: assert not exc.code\n"
        "heavy = {'ray', 'torch', 'mlflow', 'optuna', 'albumentations', 'scipy.stats'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0 and "TEST:" in answer.stdout, answer.stderr[-2000:]


# From here on: real Ray.


def read_log(storage: Path) -> list[str]:
    return (storage / TEST_LOG_FILE).read_text(encoding="utf-8").splitlines()


@pytest.mark.faults  # it takes long, as these do
@pytest.mark.slow
def test_a_search_is_confirmed_interrupted_and_resumed(tmp_path: Path) -> None:
    settings = (*SMALL_SETTINGS, "--set=epochs=1", "--trials=2", "--name=x")
    answer = run_in_a_process(*SEARCH_WORDS, *settings, folder=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    words = ("confirm", "--search", "x", "--data", "shapes")
    started = [sys.executable, "-m", "tune_cifar", *words]
    environment = os.environ | {"TUNE_CIFAR_RUNS": str(tmp_path / "runs")}
    process = subprocess.Popen(
        [*started, "--seeds=2", "--top=1", "--max-concurrent=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    record = search_folder(tmp_path / "runs", "x-confirm") / "record.jsonl"
    end = time.monotonic() + 600
    while time.monotonic() < end and not (record.exists() and '"epoch"' in record.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 130 and "Traceback" not in text, text
    assert "x-confirm: 4 trainings of 1 epoch each; 1 at once" in text
    options = "--data shapes --max-concurrent=1"
    command = f"python -m tune_cifar search --name x-confirm --resume {options}"
    assert f"continue it with:\n  {command}\n" in text
    broken = read_state(record.parent)
    assert not broken.is_finished and len(broken.trials) < 4

    answer = run_in_a_process(*words, "--resume", "--json", folder=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "confirmation x-confirm: 4 trainings of 1 epoch each" in answer.stderr
    state, found = read_state(record.parent), json.loads(answer.stdout)
    assert state.finished is not None and state.finished.reason == "all trials"
    assert state.counts["complete"] == 4
    assert [trial.config.seed for trial in state.trials.values()] == [1, 1, 2, 2]
    assert [candidate["run_id"] for candidate in found["candidates"]] == ["x:0", "x:1"]
    by_seed = {(t.params["candidate"], str(t.config.seed)): t.score for t in state.trials.values()}
    for candidate in found["candidates"]:
        run_id = candidate["run_id"]
        assert candidate["scores"] == {seed: by_seed[run_id, seed] for seed in ("1", "2")}
    assert found["candidates"][1]["gain"]["pairs"] == 2
    for trial, before in zip(state.trials.values(), broken.trials.values(), strict=False):
        assert (trial.params, trial.fingerprint) == (before.params, before.fingerprint)


@pytest.mark.slow
@pytest.mark.faults  # it takes long, as these do
def test_a_final_evaluates_each_training_on_the_test_set_once(tmp_path: Path) -> None:
    """One epoch on 50,000 synthetic images; the search and its confirmation are written by hand."""
    storage = tmp_path / "runs"
    data = load_train_val(SHAPES, 10, 10).info
    space = load_space("smoke", "cpu", {"epochs": 1, "batch_size": 250})
    state = write_search(storage, [0.5], space=space, data=data)
    write_confirmed(storage, state, [0.5], seeds=1)
    words = ("confirm", "--search", "x", "--final", "--seeds", "1", "--data", "shapes")
    first = run_in_a_process(*words, folder=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    final = read_state(search_folder(storage, "x-final"))
    (trial,) = final.trials.values()
    assert (trial.status, trial.config.train_size, trial.config.val_size) == ("complete", 50_000, 0)
    header, row = read_log(storage)
    assert row.split(",")[2:7] == [trial.fingerprint, "1", "x-final:0", "shapes", "10000"]
    assert "x-final:0: test accuracy " in first.stdout
    assert "test accuracy over seeds after 1 epoch" in first.stdout

    again = run_in_a_process(*words[:4], "--data", "shapes", "--resume", "--json", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    (candidate,) = json.loads(again.stdout)["candidates"]
    assert candidate["scores"] == {"1": float(row.split(",")[7])}
    assert read_log(storage) == [header, row]


@pytest.mark.parametrize("num_seeds", [0, -1, 50_001, 10**400])
def test_a_confirmation_has_at_least_one_seed_and_no_more_trainings_than_a_search(
    tmp_path: Path, num_seeds: int
) -> None:
    state = write_search(tmp_path, [0.5, 0.7])
    rule = "`seeds` must be 1 to 50000 (with 2 candidates)"
    with pytest.raises(ConfigError, match=f"^{re.escape(rule)}, got {num_seeds}\\.$"):
        make_confirmation(state, 1, num_seeds, {})


@pytest.mark.parametrize("seed", [-1, 2**32 - 100])
def test_an_old_search_with_a_seed_out_of_bounds_can_be_confirmed(
    tmp_path: Path, seed: int
) -> None:
    state = write_search(tmp_path, [0.5, 0.7], seed=seed)
    assert write_confirmed(tmp_path, state, [0.5, 0.7], seeds=1).is_finished
