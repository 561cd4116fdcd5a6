"""What a search will pay, by simulation: before it starts, and from where it stands.

The search itself without its trainings: as many trials at once as there are workers, each judged by the real rule when
it arrives at a rung, the baseline never stopped there, what still runs at the time limit cut. Assumed are one pace for
all epochs, no trial that diverges or fails, a sampler that learns nothing, and scores of which the one at a rung
foretells the next as well as was measured (CORRELATION).
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate, chain, islice
from statistics import NormalDist, fmean
from typing import NamedTuple

from tune_cifar.record.state import SearchState
from tune_cifar.search.rungs import goes_on, list_steps
from tune_cifar.space.layout import Budget

# Between a trial's scores at two rungs, as normal variables. Kendall's tau between complete cycles of 1 and of 8 epochs
# is 0.54, which is a correlation of sin(0.54 pi / 2) (40 configurations of s8, analysis/FINDINGS.md, 2026-11-21).
CORRELATION = 0.75
# From the driver's start to the first training step: workers import torch and read the data. 3.0 to 5.4 s in six smoke
# searches (two workers on two cores of an AMD EPYC Zen 4, 2026-11-21).
START_SECONDS = 4.0
MAX_DRAWS = 200


class Spread(NamedTuple):
    """Of what is not certain: the mean, and what 10 % and 90 % of the simulated searches stay below."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """What is expected from here on.

    Attributes:
        epochs: trained by all trials together; only whole ones count.
        seconds: to the search's end.
        started: trials that are begun or gone on with.
        complete: trials that reach the last rung.
        reached: trials that reach each rung.
    """

    epochs: Spread
    seconds: Spread
    started: float
    complete: float
    reached: tuple[float, ...]


class _Task(NamedTuple):
    """A trial on its way to a rung; tasks order by the time at which they arrive there."""

    end: float
    number: int
    rung: int
    num_epochs: int
    """Missing when the task began."""
    quality: float
    """What its scores have in common, a standard normal variable."""


# A trial that is to be run: its number, the rung that comes next, the epochs up to it, its quality if that is settled.
_Waiting = tuple[int, int, int, float | None]


@dataclass(frozen=True)
class _Past:
    """What a search has behind it. A trial's place among all at the first rung stands for its quality and scores.

    Attributes:
        scores: that arrived at each rung, ascending.
        running: what comes next for each.
    """

    num_started: int
    scores: tuple[tuple[float, ...], ...]
    running: tuple[_Waiting, ...]


@dataclass
class _Course:
    """One simulated search."""

    reached: list[int]
    num_epochs: int = 0
    seconds: float = 0.0
    num_started: int = 0


def forecast_search(
    budget: Budget,
    num_workers: int,
    epoch_seconds: float,
    state: SearchState | None = None,
    start_seconds: float = START_SECONDS,
    effort: int = 40_000,
) -> Forecast:
    """Simulate a search many times, with the same dice every time.

    Args:
        budget: of the search; its time limit, if any, begins now.
        num_workers: trials at once.
        epoch_seconds: of every epoch.
        state: of a search that goes on; by default nothing has happened.
        start_seconds: until the workers train.
        effort: trials to simulate in all, about; what 200 searches have is enough.
    """
    steps, past = list_steps(budget), _read_past(budget, state)
    num_left = max(1, budget.trials - past.num_started + len(past.running))
    dice = random.Random(0)
    num_draws = min(MAX_DRAWS, max(1, effort // num_left))
    pace = (num_workers, start_seconds, epoch_seconds)
    courses = [_simulate(budget, steps, pace, past, dice) for _ in range(num_draws)]
    reached = tuple(
        fmean(counts) for counts in zip(*(course.reached for course in courses), strict=True)
    )
    return Forecast(
        epochs=_find_spread([course.num_epochs for course in courses]),
        seconds=_find_spread([course.seconds for course in courses]),
        started=fmean(course.num_started for course in courses),
        complete=reached[-1],
        reached=reached,
    )


def _simulate(
    budget: Budget,
    steps: Sequence[int],
    pace: tuple[int, float, float],
    past: _Past,
    dice: random.Random,
) -> _Course:
    num_workers, start_seconds, epoch_seconds = pace
    limit = math.inf if budget.max_time_seconds is None else budget.max_time_seconds
    course = _Course(reached=[0] * len(steps))
    scores = [list(found) for found in past.scores]
    shared, own = math.sqrt(CORRELATION), math.sqrt(1.0 - CORRELATION)
    running: list[_Task] = []
    fresh = range(past.num_started, budget.trials)
    waiting: Iterator[_Waiting] = chain(
        past.running, ((number, 0, steps[0], None) for number in fresh)
    )

    def begin(now: float, count: int = 1) -> None:
        for number, rung, num_epochs, quality in islice(waiting, count):
            course.num_started += 1
            known = dice.gauss(0.0, 1.0) if quality is None else quality
            heappush(
                running, _Task(now + num_epochs * epoch_seconds, number, rung, num_epochs, known)
            )

    begin(start_seconds, num_workers)
    while running:
        end, number, rung, num_epochs, quality = running[0]
        if end > limit:
            course.num_epochs += sum(_count_whole(task, limit, epoch_seconds) for task in running)
            course.seconds = limit
            break
        heappop(running)
        course.num_epochs += num_epochs
        course.reached[rung] += 1
        course.seconds = end
        if rung + 1 < len(steps):
            score = shared * quality + own * dice.gauss(0.0, 1.0)
            insort(scores[rung], score)
            count = len(scores[rung])
            if number == 0 or goes_on(
                1 + count - bisect_right(scores[rung], score), count, budget.reduction_factor
            ):
                more = steps[rung + 1]
                heappush(
                    running, _Task(end + more * epoch_seconds, number, rung + 1, more, quality)
                )
                continue
        begin(end)
    return course


def _count_whole(task: _Task, limit: float, epoch_seconds: float) -> int:
    """Epochs that a task has done at the limit, which comes before its end."""
    num_missing = math.ceil((task.end - limit) / epoch_seconds - 1e-9)
    return max(0, task.num_epochs - num_missing)


def _read_past(budget: Budget, state: SearchState | None) -> _Past:
    """From the trials alone, which may grow while they are read."""
    trials = list(state.trials.values()) if state else []
    ends = list(accumulate(list_steps(budget)))
    first = sorted(
        (score, trial.number)
        for trial in trials
        if (score := trial.scores.get(budget.rungs[0])) is not None
    )
    normal, count = NormalDist(), len(first)
    places = {number: normal.inv_cdf((i + 1) / (count + 1)) for i, (_, number) in enumerate(first)}
    running: list[_Waiting] = []
    for trial in trials:
        if trial.status == "running":
            rung = min(bisect_right(ends, trial.epochs_done), len(ends) - 1)
            num_epochs = max(0, ends[rung] - trial.epochs_done)
            running.append((trial.number, rung, num_epochs, places.get(trial.number)))
    found = [(trial.scores, places[trial.number]) for trial in trials if trial.number in places]
    scores = tuple(
        tuple(sorted(place for told, place in found if rung in told)) for rung in budget.rungs
    )
    return _Past(len(trials), scores, tuple(running))


def _find_spread(values: list[float]) -> Spread:
    ordered, tenth = sorted(values), len(values) // 10
    return Spread(fmean(ordered), ordered[tenth], ordered[-1 - tenth])
