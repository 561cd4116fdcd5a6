"""Asynchronous successive halving (ASHA), stopping variant: which trials go on after a rung.

A trial is compared when it arrives at a rung, with the trials that arrived before it; no trial
waits for another. Higher scores are better. Source: Li et al. 2020, "A System for Massively
Parallel Hyperparameter Tuning".

Unlike there, only the last arrivals count (`window`). Proposals get better during a search:
compared with all since its start, most of the late ones would go on and the rungs stop nothing.

A score in the middle of a learning rate schedule ranks noise, since the learning rate is still
high. With `fidelity: cycles` a trial therefore has a stage for each rung: a training from scratch
over a complete schedule of that length, at the last rung one for each replicate. With the other
fidelities it has one stage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

from tune_cifar.record.events import Stage
from tune_cifar.space.layout import Budget


def is_promoted(score: float, scores_at_rung: Collection[float], reduction_factor: int) -> bool:
    """Return whether a trial at a rung is among the best ceil(n / reduction_factor) of n.

    A promoted trial goes on, the others stop. Of equal scores all are promoted; so is the first
    trial at a rung.

    Args:
        score: val_acc at the rung, never NaN (a diverged trial reaches no rung).
        scores_at_rung: those of the trials that it is compared with, this one included.
        reduction_factor: about one trial in this many is promoted, at least 2.
    """
    assert score in scores_at_rung, "the trial's own score must be among the rung's"
    assert not any(math.isnan(other) for other in scores_at_rung), "a score must be a number"
    assert reduction_factor >= 2, "a reduction factor below 2 stops nothing"
    rank = 1 + sum(other > score for other in scores_at_rung)
    return is_promoted_rank(rank, len(scores_at_rung), reduction_factor)


def list_compared(arrived: Sequence[float], window: int | None) -> Sequence[float]:
    """Return the scores that the last one is compared with, itself included.

    Args:
        arrived: scores at the rung in the order of their arrival.
        window: number of the last ones that count; None for all, as in old records.
    """
    return arrived if window is None else arrived[-window:]


def is_promoted_rank(rank: int, num_scores: int, reduction_factor: int) -> bool:
    """Return what `is_promoted` does, given the rank at the rung (1 is the best)."""
    return rank <= math.ceil(num_scores / reduction_factor)


def list_stages(budget: Budget) -> tuple[Stage, ...]:
    """Return a trial's stages in their order; each is a training from scratch."""
    lengths = budget.rungs if budget.fidelity == "cycles" else budget.rungs[-1:]
    replicates = (Stage(lengths[-1], number) for number in range(1, budget.replicates))
    return (*map(Stage, lengths), *replicates)


def list_steps(budget: Budget) -> tuple[int, ...]:
    """Return the epochs that a trial trains on its way to each rung from the one before."""
    if budget.fidelity == "cycles":
        return (*budget.rungs[:-1], budget.replicates * budget.rungs[-1])
    return tuple(end - start for start, end in itertools.pairwise((0, *budget.rungs)))
