"""Early stopping as a pure rule: which of the trials that reached a rung go on (asynchronous successive halving).

A trial is judged when it arrives, against those that arrived before it; nobody waits for the others (Li et al. 2020,
"A System for Massively Parallel Hyperparameter Tuning"). Higher scores are better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

from tune_cifar.errors import ConfigError
from tune_cifar.space import find_rungs_problem


def check_rungs(rungs: tuple[int, ...], epochs: int) -> None:
    """Rungs increase, and the last is the whole training.

    Raises:
        ConfigError: when they do not.
    """
    if problem := find_rungs_problem(rungs, epochs):
        raise ConfigError(f"rungs: {problem}")


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
    return rank <= math.ceil(len(scores_at_rung) / reduction_factor)


def expected_epochs(rungs: tuple[int, ...], reduction_factor: int) -> float:
    """Epochs that a trial of a long search trains on average, when scores come in no particular order.

    The first few trials of a search cost more: the rule keeps at least one at every rung.
    """
    starts = (0, *rungs)
    return sum(
        (end - start) / float(reduction_factor) ** i for i, (start, end) in enumerate(itertools.pairwise(starts))
    )
