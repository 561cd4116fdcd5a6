"""The simulated search: exact where the answer is known, repeatable, and from any record."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from tests.builders import (
    STAGE_ACCS,
    make_budget,
    make_header,
    make_staged_trial,
    make_start,
    make_trial,
    simulate_search,
)
from tune_cifar.record.events import Event, Learned
from tune_cifar.record.state import SearchState
from tune_cifar.search.forecast import (
    START_SECONDS,
    Forecast,
    Spread,
    _find_advantage,
    forecast_search,
)
from tune_cifar.search.rungs import is_promoted
from tune_cifar.space.layout import Fidelity, SamplerBudget


def make_state(*events: Event) -> SearchState:
    state = SearchState(Path("/runs/searches/s7-1"), make_header())
    for event in events:
        state.apply(event)
    return state


def exactly(value: float) -> Spread:
    return Spread(value, value, value)


@pytest.mark.parametrize("fidelity", get_args(Fidelity))
@pytest.mark.parametrize(
    ("num_workers", "seconds"), [(1, 240.0), (2, 120.0), (3, 96.0), (99, 24.0)]
)
def test_without_a_rung_on_the_way_every_trial_trains_all_epochs(
    fidelity: Fidelity, num_workers: int, seconds: float
) -> None:
    found = forecast_search(make_budget((24,), fidelity, trials=10), num_workers, 1.0)
    assert found == Forecast(exactly(240), exactly(START_SECONDS + seconds), 10, 10, (10,))


@pytest.mark.parametrize(
    ("fidelity", "num_epochs"), [("cycles", 1 + 3 + 8), ("cycles/continue", 8), ("epochs", 8)]
)
def test_the_baseline_alone_is_never_stopped(fidelity: Fidelity, num_epochs: int) -> None:
    found = forecast_search(make_budget((1, 3, 8), fidelity, trials=1), 2, 0.5)
    seconds = START_SECONDS + 0.5 * num_epochs
    assert found == Forecast(exactly(num_epochs), exactly(seconds), 1, 1, (1, 1, 1))


@pytest.mark.parametrize("fidelity", get_args(Fidelity))
def test_the_second_of_two_is_promoted_every_other_time(fidelity: Fidelity) -> None:
    found = forecast_search(make_budget((2, 6), fidelity, trials=2), 1, 1.0)
    longer = 6 if fidelity == "cycles" else 4
    assert (found.epochs.low, found.epochs.high) == (4 + longer, 4 + 2 * longer)
    assert found.complete == pytest.approx(1.5, abs=0.1)
    assert found.epochs.mean == pytest.approx(4 + longer * found.complete)


@pytest.mark.parametrize(("trials", "factor"), [(9, 2), (30, 3), (30, 100)])
def test_as_many_pass_a_first_rung_as_chance_lets_pass(trials: int, factor: int) -> None:
    """The n-th to arrive is among the best ceil(n / factor) of n with that many chances in n.

    With a large factor only a new best is promoted. The baseline is the first.
    """
    exact = sum(-(-n // factor) / n for n in range(1, trials + 1))
    found = forecast_search(make_budget((1, 4), reduction_factor=factor, trials=trials), 1, 1.0)
    assert found.reached == (trials, found.complete)
    assert found.complete == pytest.approx(exact, rel=0.05)
    assert found.epochs.mean == pytest.approx(trials + 4 * found.complete)


def test_trials_are_compared_by_the_rule_for_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule decides, and it is given the rank among those that arrived."""
    asked: list[tuple[int, int, int]] = []

    def note(rank: int, num_scores: int, factor: int) -> bool:
        asked.append((rank, num_scores, factor))
        is_best = rank <= -(-num_scores // factor)
        assert is_promoted(-rank, range(-num_scores, 0), factor) == is_best
        return False

    monkeypatch.setattr("tune_cifar.search.forecast.is_promoted_rank", note)
    found = forecast_search(make_budget((1, 4), trials=9), 2, 1.0)
    assert found.epochs == exactly(9 + 4) and {factor for _, _, factor in asked} == {3}
    assert all(1 <= rank <= count for rank, count, _ in asked)
    assert [count for _, count, _ in asked[:8]] == list(range(2, 10))


def test_equal_arguments_give_equal_forecasts() -> None:
    budget = make_budget((1, 3, 8), trials=20)
    assert forecast_search(budget, 2, 1.0) == forecast_search(budget, 2, 1.0)


def expect_learning(kind: Literal["tpe", "gp", "random"], **changes: Any) -> Forecast:
    """Forecast 100 trials at rungs 6, 17 and 50 of one schedule, four at once."""
    startup = 0 if kind == "random" else 20
    sampler = SamplerBudget(kind=kind, startup=startup)
    budget = make_budget((6, 17, 50), "epochs", trials=100).model_copy(
        update={"window": 9, "sampler": sampler} | changes
    )
    return forecast_search(budget, 4, 1.0)


@pytest.mark.parametrize(
    ("kind", "reached"),
    [("random", (34.5, 13.5)), ("tpe", (37.1, 17.5)), ("gp", (41.4, 25.2))],
)
def test_as_many_reach_each_rung_as_did_on_lcbench(
    kind: Literal["tpe", "gp", "random"], reached: tuple[float, float]
) -> None:
    """Means of 12 simulated searches (analysis/FINDINGS.md, 2026-11-28)."""
    assert expect_learning(kind).reached[1:] == pytest.approx(reached, rel=0.05)


def test_until_its_startup_a_sampler_is_random() -> None:
    late = SamplerBudget(kind="gp", startup=1000)
    assert expect_learning("gp", sampler=late) == expect_learning("random")


def test_what_was_learned_counts_for_the_startup_and_the_baseline_is_no_proposal(
    tmp_path: Path,
) -> None:
    late, early = (
        make_budget((1, 3), trials=40).model_copy(
            update={"sampler": SamplerBudget(kind="gp", startup=startup)}
        )
        for startup in (30, 10)
    )
    expected = forecast_search(early, 1, 1.0)
    assert forecast_search(late, 1, 1.0) != expected
    assert forecast_search(late, 1, 1.0, num_learned=20) == expected
    learned = [Learned(run_id="x:1", params={}, status="complete", scores={})] * 20
    state = SearchState(tmp_path, make_header(learned=learned))
    assert forecast_search(late, 1, 1.0, state) == expected
    assert _find_advantage(0, late, 30) == 0.0 < _find_advantage(1, late, 30)


def test_the_longer_the_window_the_more_go_on_once_proposals_get_better() -> None:
    found = [expect_learning("gp", window=window).reached[-1] for window in (3, 9, 30, None)]
    assert all(less < more for less, more in itertools.pairwise(found))


def test_a_resumed_search_takes_no_step_twice(tmp_path: Path) -> None:
    """The recorded proposals were better than random already: their ranks are those of their own.

    With a window of all scores 9 of 10 more trials would go on if they were so much better again.
    """
    sampler = SamplerBudget(kind="gp", startup=1)
    update = {"window": None, "sampler": sampler}
    budget = make_budget((1, 3), trials=40).model_copy(update=update)
    found = forecast_search(budget, 1, 1.0, simulate_search(tmp_path, 30))
    assert 3 < found.complete < 7


def test_more_trials_cost_more_and_a_larger_factor_less() -> None:
    def expect(trials: int, factor: int) -> float:
        budget = make_budget((1, 3, 8), reduction_factor=factor, trials=trials)
        return forecast_search(budget, 2, 1.0).epochs.mean

    means = [expect(trials, 3) for trials in (1, 2, 5, 10, 50, 100, 500)]
    assert all(less < more for less, more in itertools.pairwise(means))
    assert expect(50, 2) > expect(50, 3) > expect(50, 10)


def test_the_range_holds_the_mean_and_most_searches() -> None:
    found = forecast_search(make_budget((3, 8, 24), trials=100), 2, 10.0)
    for spread in (found.epochs, found.seconds):
        assert 0.75 * spread.mean < spread.low < spread.mean < spread.high < 1.25 * spread.mean
    assert found.started == found.reached[0] == 100
    assert 100 > found.reached[1] > found.reached[2] == found.complete


def test_the_time_limit_cuts_running_trials_and_only_complete_epochs_count() -> None:
    """Two at once, epochs of 10 s, 35 s of training: 2 epochs each, then one epoch each."""
    budget = make_budget((2,), trials=9, max_time_seconds=START_SECONDS + 35.0)
    found = forecast_search(budget, 2, 10.0)
    assert found == Forecast(exactly(6), exactly(START_SECONDS + 35.0), 4, 2, (2,))


@pytest.mark.parametrize(
    ("seconds", "epochs"), [(1.0, 0), (START_SECONDS + 9.9, 0), (START_SECONDS + 30.0, 6)]
)
def test_an_epoch_that_ends_with_the_time_limit_counts(seconds: float, epochs: int) -> None:
    found = forecast_search(make_budget((3,), max_time_seconds=seconds), 2, 10.0)
    assert found.epochs == exactly(epochs) and found.seconds == exactly(seconds)


def test_a_time_limit_beyond_the_end_changes_nothing() -> None:
    budget, limited = make_budget((1, 3)), make_budget((1, 3), max_time_seconds=1e6)
    assert forecast_search(budget, 2, 1.0) == forecast_search(limited, 2, 1.0)


def test_the_time_limit_bounds_the_epochs_trained() -> None:
    for seconds in (10.0, 60.0, 300.0):
        found = forecast_search(make_budget((1, 3), trials=200, max_time_seconds=seconds), 2, 2.0)
        assert found.seconds.high <= seconds
        assert found.epochs.high <= 2 * (seconds - START_SECONDS) / 2.0


@pytest.mark.parametrize(
    ("stages", "left"),
    [({}, 6), ({1: [0.5]}, 5), ({1: [0.5], 2: [0.4]}, 4), ({**STAGE_ACCS, 3: [0.1]}, 2)],
)
def test_a_forecast_starts_from_the_record(stages: dict[int, list[float]], left: int) -> None:
    """Trial 0 alone is left: stages of 1, 2 and 3 epochs."""
    state = make_state(*make_staged_trial(0, stages, None))
    found = forecast_search(make_budget((1, 2, 3), trials=1), 2, 2.0, state, start_seconds=0.0)
    assert (found.epochs, found.seconds, found.started) == (exactly(left), exactly(2.0 * left), 1)


def test_ended_trials_take_no_more_epochs() -> None:
    complete = make_trial(0, [0.1, 0.2, 0.3], "complete")
    state = make_state(*complete, *make_trial(1, [0.1], "stopped"))
    found = forecast_search(make_budget((1, 3), "epochs", trials=2), 2, 1.0, state)
    assert found == Forecast(exactly(0), exactly(0), 0, 0, (0, 0))


@pytest.mark.parametrize("num_stopped", [0, 1, 3, 12])
def test_recorded_scores_are_compared_with(num_stopped: int) -> None:
    """Only a new best is promoted: after n scores the next in one case of n + 1."""
    events = make_trial(0, [0.1, 0.2, 0.3], "complete")
    for number in range(1, 1 + num_stopped):
        events += make_trial(number, [0.5], "stopped")
    state = make_state(*events, make_start(1 + num_stopped))
    budget = make_budget((1, 3), "epochs", reduction_factor=100, trials=2 + num_stopped)
    found = forecast_search(budget, 1, 1.0, state)
    assert found.started == found.reached[0] == 1
    assert found.complete == pytest.approx(1 / (2 + num_stopped), abs=0.07)


def test_a_long_search_is_simulated_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[int] = []
    find_spread = "tune_cifar.search.forecast._find_spread"
    monkeypatch.setattr(find_spread, lambda values: draws.append(len(values)))
    for trials, effort in ((100, 40_000), (1000, 40_000), (9, 400), (1000, 400)):
        forecast_search(make_budget((1,), trials=trials), 1, 1.0, effort=effort)
    assert draws[::2] == [200, 40, 44, 1]
