"""The rule that stops trials: properties for any scores, and the arithmetic of rungs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import make_budget
from tune_cifar.search.rungs import is_promoted, list_compared, list_stages, list_steps
from tune_cifar.space.layout import Fidelity

SCORES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=50)
FACTORS = st.integers(2, 10)


@given(SCORES, FACTORS)
def test_best_score_is_always_promoted(scores: list[float], factor: int) -> None:
    assert is_promoted(max(scores), scores, factor)


@given(SCORES, FACTORS)
def test_no_score_stops_while_a_worse_one_is_promoted(scores: list[float], factor: int) -> None:
    decisions = [is_promoted(score, scores, factor) for score in sorted(scores)]
    assert decisions == sorted(decisions)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=50, unique=True), FACTORS)
def test_number_promoted_of_different_scores_is_a_factor_th_rounded_up(
    scores: list[float], factor: int
) -> None:
    num_promoted = sum(is_promoted(score, scores, factor) for score in scores)
    assert num_promoted == math.ceil(len(scores) / factor)


@given(st.floats(0.0, 1.0), st.integers(1, 50), FACTORS)
def test_equal_scores_are_all_promoted(score: float, count: int, factor: int) -> None:
    assert is_promoted(score, [score] * count, factor)


@given(SCORES, FACTORS)
def test_order_of_arrival_of_the_others_does_not_matter(scores: list[float], factor: int) -> None:
    first = scores[0]
    assert is_promoted(first, scores, factor) == is_promoted(first, sorted(scores), factor)


@given(st.floats(0.0, 1.0), FACTORS)
def test_first_trial_at_a_rung_is_promoted(score: float, factor: int) -> None:
    assert is_promoted(score, [score], factor)


def test_second_trial_is_promoted_only_when_it_is_better() -> None:
    assert is_promoted(0.6, [0.5, 0.6], 3)
    assert not is_promoted(0.4, [0.5, 0.4], 3)


def test_nan_is_a_fault_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="a score must be a number"):
        is_promoted(0.5, [0.5, math.nan], 3)


def test_own_score_must_be_among_the_rungs_scores() -> None:
    with pytest.raises(AssertionError, match="own score"):
        is_promoted(0.5, [0.4], 3)


def test_reduction_factor_one_is_a_fault_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="below 2"):
        is_promoted(0.5, [0.5], 1)


@pytest.mark.parametrize(
    ("fidelity", "stages"), [("cycles", (1, 3, 8)), ("cycles/continue", (8,)), ("epochs", (8,))]
)
def test_trial_trains_from_scratch_once_or_once_for_every_rung(
    fidelity: Fidelity, stages: tuple[int, ...]
) -> None:
    found = list_stages(make_budget((1, 3, 8), fidelity))
    assert found == tuple((length, 0) for length in stages)


def test_the_last_stage_is_repeated_under_other_seeds() -> None:
    budget = make_budget((1, 3), "cycles").model_copy(update={"replicates": 3})
    assert list_stages(budget) == ((1, 0), (3, 0), (3, 1), (3, 2))
    assert list_steps(budget) == (1, 9)


def test_from_rung_to_rung_a_trial_trains_a_stage_or_the_epochs_in_between() -> None:
    assert list_steps(make_budget((1, 3, 8), "cycles")) == (1, 3, 8)
    assert list_steps(make_budget((1, 3, 8), "cycles/continue")) == (1, 2, 5)
    assert list_steps(make_budget((1, 3, 8), "epochs")) == (1, 2, 5)
    assert list_steps(make_budget((8,), "epochs")) == (8,)


def test_only_the_last_arrivals_are_compared_and_all_without_a_window() -> None:
    """As proposals get better, what was good at the start no longer is."""
    arrived = [number / 100 for number in range(40)]
    assert list_compared(arrived, None) == arrived
    assert list_compared(arrived, 9) == arrived[-9:]
    assert list_compared(arrived[:4], 9) == arrived[:4]
    late = [*arrived, 0.33]  # better than most since the start, worse than the last six
    assert is_promoted(0.33, list_compared(late, None), 3)
    assert not is_promoted(0.33, list_compared(late, 9), 3)
