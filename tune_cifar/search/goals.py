"""Goals that end a search before its trials do: an accuracy, or no gain for some time."""

from __future__ import annotations

from collections.abc import Iterable

from tune_cifar.record.state import TrialState
from tune_cifar.space.layout import Budget

# Standard deviations of a difference that a gain must exceed.
NUM_DEVIATIONS = 2.0


def find_reached_goal(trials: Iterable[TrialState], budget: Budget) -> str | None:
    """Return the goal of the budget that ended trials have reached, in words, or None.

    The target is reached by the first complete trial with at least that score. Patience is over
    after so many ended trials, complete or not, without a gain: a score beyond the noise of a
    difference above the last one that was. Gains too small to show add up until they do.
    """
    if budget.target is None and budget.patience is None:
        return None
    best, num_since = None, 0
    ended = [trial for trial in trials if trial.ended_seq is not None]
    for trial in sorted(ended, key=lambda trial: trial.ended_seq or 0):
        score = trial.score if trial.status == "complete" else None
        if score is not None and budget.target is not None and score >= budget.target:
            return f"{100 * budget.target:g} % reached"
        if score is not None and (best is None or is_gain(score - best, score, trial)):
            best, num_since = score, 0
        elif best is not None:
            num_since += 1
        if num_since == budget.patience:
            return f"no gain in {budget.patience} trials"
    return None


def is_gain(difference: float, score: float, trial: TrialState) -> bool:
    """Return whether a difference exceeds what validation images alone scatter."""
    return difference > NUM_DEVIATIONS * estimate_scatter(score, trial.full_config.val_size)


def estimate_scatter(accuracy: float, num_images: int) -> float:
    """Return the standard deviation of a difference of two accuracies from the images alone.

    One accuracy p on n images has sqrt(p (1 - p) / n); the difference has sqrt(2) times that.

    Args:
        accuracy: a fraction.
        num_images: on which both were measured.
    """
    return float((2 * accuracy * (1 - accuracy) / num_images) ** 0.5)
