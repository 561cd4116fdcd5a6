"""Early stopping: what a trial trains up to each rung, and as a pure rule which of those that reached one go on
(asynchronous successive halving).

A score in the middle of a schedule ranks noise, since the learning rate is still high. So at every rung a trial has
trained a complete schedule of that length (`budget.fidelity: cycles`); other ways stay to be chosen. A trial is judged
when it arrives, against those that arrived before it; nobody waits for the others (Li et al. 2020, "A System for
Massively Parallel Hyperparameter Tuning"). Higher scores are better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

from tune_cifar.space.layout import Budget


def keep(score: float, scores_at_rung: Collection[float], reduction_factor: int) -> bool:
    """Whether a trial goes on after a rung: it is among the best ceil(n / reduction_factor) of the n that came by.

    Ties go on. The first trial at a rung always does.

    Args:
        score: val_acc at the rung, never NaN (a diverged trial is a result of its own and asks nobody).
        scores_at_rung: of all trials that reached the rung so far, this one included.
        reduction_factor: about one trial in this many goes on.
    """
    assert score in scores_at_rung, "the trial's own score must be among the rung's"
    assert not any(math.isnan(other) for other in scores_at_rung), "a score must be a number"
    assert reduction_factor >= 2, "a reduction factor below 2 stops nothing"
    rank = 1 + sum(other > score for other in scores_at_rung)
    return goes_on(rank, len(scores_at_rung), reduction_factor)


def goes_on(rank: int, num_scores: int, reduction_factor: int) -> bool:
    """The rule itself: `keep` for a trial whose place (1 is the best) among the scores at the rung is known."""
    return rank <= math.ceil(num_scores / reduction_factor)


def list_stages(budget: Budget) -> tuple[int, ...]:
    """Lengths in epochs of the trainings from scratch that a trial goes through, one after another."""
    return budget.rungs if budget.fidelity == "cycles" else budget.rungs[-1:]


def list_steps(budget: Budget) -> tuple[int, ...]:
    """Epochs that a trial pays for from each rung to the next: a cycle from scratch, or what one schedule lacks."""
    if budget.fidelity == "cycles":
        return budget.rungs
    return tuple(end - start for start, end in itertools.pairwise((0, *budget.rungs)))
