"""The rule that stops trials: properties for any scores, and the arithmetic of rungs."""

from __future__ import annotations

import math
import random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_cifar.fidelity import expected_epochs, keep, list_cycles
from tune_cifar.space import Budget
from tune_cifar.space.layout import Fidelity, SamplerBudget

SCORES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=50)
FACTORS = st.integers(2, 10)


@given(SCORES, FACTORS)
def test_best_score_is_always_kept(scores: list[float], factor: int) -> None:
    assert keep(max(scores), scores, factor)


@given(SCORES, FACTORS)
def test_no_score_is_dropped_while_a_worse_one_is_kept(scores: list[float], factor: int) -> None:
    decisions = [keep(score, scores, factor) for score in sorted(scores)]
    assert decisions == sorted(decisions)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=50, unique=True), FACTORS)
def test_number_kept_of_different_scores_is_a_factor_th_rounded_up(scores: list[float], factor: int) -> None:
    assert sum(keep(score, scores, factor) for score in scores) == math.ceil(len(scores) / factor)


@given(st.floats(0.0, 1.0), st.integers(1, 50), FACTORS)
def test_equal_scores_are_all_kept(score: float, count: int, factor: int) -> None:
    assert keep(score, [score] * count, factor)


@given(SCORES, FACTORS)
def test_order_of_arrival_of_the_others_does_not_matter(scores: list[float], factor: int) -> None:
    assert keep(scores[0], scores, factor) == keep(scores[0], sorted(scores), factor)


@given(st.floats(0.0, 1.0), FACTORS)
def test_first_trial_at_a_rung_is_kept(score: float, factor: int) -> None:
    assert keep(score, [score], factor)


def test_second_trial_is_kept_only_when_it_is_better() -> None:
    assert keep(0.6, [0.5, 0.6], 3)
    assert not keep(0.4, [0.5, 0.4], 3)


def test_nan_is_a_fault_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="a score must be a number"):
        keep(0.5, [0.5, math.nan], 3)


def test_own_score_must_be_among_the_rungs_scores() -> None:
    with pytest.raises(AssertionError, match="own score"):
        keep(0.5, [0.4], 3)


def test_reduction_factor_one_is_a_fault_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="below 2"):
        keep(0.5, [0.5], 1)


def make_budget(rungs: tuple[int, ...], fidelity: Fidelity = "cycles", reduction_factor: int = 3) -> Budget:
    return Budget(
        trials=9,
        fidelity=fidelity,
        rungs=rungs,
        reduction_factor=reduction_factor,
        sampler=SamplerBudget(kind="random"),
        seed=0,
    )


@pytest.mark.parametrize(("fidelity", "cycles"), [("cycles", (1, 3, 8)), ("cycles/continue", (8,)), ("epochs", (8,))])
def test_trial_trains_from_scratch_once_or_once_for_every_rung(fidelity: Fidelity, cycles: tuple[int, ...]) -> None:
    assert list_cycles(make_budget((1, 3, 8), fidelity)) == cycles


@pytest.mark.parametrize("fidelity", get_args(Fidelity))
def test_expected_epochs_without_a_middle_rung_are_all_epochs(fidelity: Fidelity) -> None:
    assert expected_epochs(make_budget((24,), fidelity)) == 24


@pytest.mark.parametrize("fidelity", get_args(Fidelity))
def test_expected_epochs_agree_with_a_long_simulated_search(fidelity: Fidelity) -> None:
    budget, dice = make_budget((1, 3, 9), fidelity), random.Random(0)
    reached: dict[int, list[float]] = {rung: [] for rung in budget.rungs}
    total = 0
    for _ in range(1000):
        before = 0
        for rung in budget.rungs:
            total += rung - before
            before = 0 if fidelity == "cycles" else rung
            score = dice.random()
            reached[rung].append(score)
            if not keep(score, reached[rung], budget.reduction_factor):
                break
    assert total / 1000 == pytest.approx(expected_epochs(budget), rel=0.1)
