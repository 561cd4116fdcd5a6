"""Forecast of a search's epochs and time by simulation, before it starts or from where it stands.

The simulated search has no trainings: as many trials at once as there are workers, each compared by
the real rule when it arrives at a rung, the baseline never stopped there, running trials cut at the
time limit. It assumes one pace for all epochs, no trial that diverges or fails, scores at
successive rungs that are correlated as measured (CORRELATION), and proposals that get better as
measured (LEARNING): each is compared with worse ones, so more than one of `reduction_factor` go on.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate, chain, islice
from statistics import NormalDist, fmean
from typing import NamedTuple

from tune_cifar.record.state import SearchState
from tune_cifar.search.rungs import is_promoted_rank, list_steps
from tune_cifar.space.layout import Budget

# Between a trial's scores at two rungs, as normal variables. Kendall's tau between stages of 1 and
# of 8 epochs is 0.54, which is a correlation of sin(0.54 pi / 2) (40 configurations of s8,
# analysis/FINDINGS.md, 2026-11-21).
CORRELATION = 0.75
# From the driver's start to the first training step: workers import torch and read the data. 3.0 to
# 5.4 s in six smoke searches (two workers on two cores of an AMD EPYC Zen 4, 2026-11-21).
START_SECONDS = 4.0
# How much better than random a sampler's proposals are, in standard deviations of random ones: from
# its first one on, and more for each one after it, up to MAX_LEARNT of them. Fitted to the trials
# that reached each rung in 12 searches of 100 trials and 12 of 27 on LCBench (analysis/FINDINGS.md,
# 2026-11-28).
LEARNING = {"tpe": (1.2, 0.01), "gp": (2.5, 0.05)}
MAX_LEARNT = 100
MAX_DRAWS = 200
# A search without a window compares with all scores; so many of them tell as much.
MAX_COMPARED = 500


class Spread(NamedTuple):
    """Mean and 10 % and 90 % quantiles of a quantity over the simulated searches."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """Expectations from here on.

    Attributes:
        epochs: trained by all trials together; only complete ones count.
        seconds: to the search's end.
        started: trials that start or are resumed.
        complete: trials that reach the last rung.
        reached: trials that reach each rung.
    """

    epochs: Spread
    seconds: Spread
    started: float
    complete: float
    reached: tuple[float, ...]


class _Task(NamedTuple):
    """A trial on its way to a rung; tasks are ordered by their time of arrival there."""

    end: float
    number: int
    rung: int
    num_epochs: int
    """From the task's start to the rung."""
    quality: float
    """Common part of the trial's scores, a standard normal variable."""


# A trial that waits for a worker: number, next rung, epochs up to it, quality (None: unknown).
_Waiting = tuple[int, int, int, float | None]


@dataclass(frozen=True)
class _Past:
    """The recorded part of a search.

    Attributes:
        scores: at each rung, in the order of arrival; simulated from the trials' ranks at the
            first rung.
        running: the unfinished trials.
        advantage: mean of the scored trials' advantage over random ones; their ranks hold it.
        num_learned: trials of other searches that the sampler knew from the start.
    """

    num_started: int
    scores: tuple[tuple[float, ...], ...]
    running: tuple[_Waiting, ...]
    advantage: float
    num_learned: int


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
    num_learned: int = 0,
) -> Forecast:
    """Forecast a search from many simulated ones; equal arguments give equal forecasts.

    Args:
        budget: of the search; its time limit, if any, starts now.
        num_workers: trials at once.
        epoch_seconds: of every epoch.
        state: of a search to resume; by default nothing has happened.
        start_seconds: until the workers train.
        effort: trials to simulate in all, about; at most MAX_DRAWS searches are simulated.
        num_learned: trials of other searches that the sampler knows; a `state` says its own.
    """
    steps, past = list_steps(budget), _read_past(budget, state, num_learned)
    num_left = max(1, budget.trials - past.num_started + len(past.running))
    generator = random.Random(0)
    num_draws = min(MAX_DRAWS, max(1, effort // num_left))
    pace = (num_workers, start_seconds, epoch_seconds)
    courses = [_simulate(budget, steps, pace, past, generator) for _ in range(num_draws)]
    reached_by_rung = zip(*(course.reached for course in courses), strict=True)
    reached = tuple(fmean(counts) for counts in reached_by_rung)
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
    generator: random.Random,
) -> _Course:
    """Simulate one search; `pace` is workers, seconds until they train, seconds of an epoch."""
    num_workers, start_seconds, epoch_seconds = pace
    limit = math.inf if budget.max_time_seconds is None else budget.max_time_seconds
    course = _Course(reached=[0] * len(steps))
    scores = [list(found) for found in past.scores]
    shared, own = math.sqrt(CORRELATION), math.sqrt(1.0 - CORRELATION)
    running: list[_Task] = []
    numbers = range(past.num_started, budget.trials)
    new_trials = ((number, 0, steps[0], None) for number in numbers)
    waiting: Iterator[_Waiting] = chain(past.running, new_trials)

    def push(now: float, number: int, rung: int, num_epochs: int, quality: float) -> None:
        end = now + num_epochs * epoch_seconds
        heappush(running, _Task(end, number, rung, num_epochs, quality))

    def start(now: float, count: int = 1) -> None:
        for number, rung, num_epochs, quality in islice(waiting, count):
            course.num_started += 1
            expected = _find_advantage(number, budget, past.num_learned) - past.advantage
            known = generator.gauss(expected, 1.0) if quality is None else quality
            push(now, number, rung, num_epochs, known)

    start(start_seconds, num_workers)
    while running:
        end, number, rung, num_epochs, quality = running[0]
        if end > limit:
            course.num_epochs += sum(_count_done(task, limit, epoch_seconds) for task in running)
            course.seconds = limit
            break
        heappop(running)
        course.num_epochs += num_epochs
        course.reached[rung] += 1
        course.seconds = end
        if rung + 1 < len(steps):
            score = shared * quality + own * generator.gauss(0.0, 1.0)
            scores[rung].append(score)
            compared = scores[rung][-(budget.window or MAX_COMPARED) :]
            rank = 1 + sum(other > score for other in compared)
            is_baseline = number == 0  # never stopped
            if is_baseline or is_promoted_rank(rank, len(compared), budget.reduction_factor):
                push(end, number, rung + 1, steps[rung + 1], quality)
                continue
        start(end)
    return course


def _find_advantage(number: int, budget: Budget, num_learned: int) -> float:
    """Return how much better than random this trial is expected to be; the baseline is not."""
    step, drift = LEARNING.get(budget.sampler.kind, (0.0, 0.0))
    num_learnt = number + num_learned - budget.sampler.startup
    return step + drift * min(num_learnt, MAX_LEARNT) if number and num_learnt >= 0 else 0.0


def _count_done(task: _Task, limit: float, epoch_seconds: float) -> int:
    """Return the complete epochs of a task at the limit, which comes before its end."""
    num_missing = math.ceil((task.end - limit) / epoch_seconds - 1e-9)
    return max(0, task.num_epochs - num_missing)


def _read_past(budget: Budget, state: SearchState | None, num_learned: int) -> _Past:
    """Read the trials alone: another thread may add some meanwhile."""
    if state is not None:
        num_learned = len(state.header.learned)
    trials = list(state.trials.values()) if state else []
    ends = list(accumulate(list_steps(budget)))
    first_rung = budget.rungs[0]
    scored = [trial for trial in trials if first_rung in trial.scores]
    scored.sort(key=lambda trial: (trial.scores[first_rung], trial.number))
    normal = NormalDist()
    qualities = {
        trial.number: normal.inv_cdf(rank / (len(scored) + 1))
        for rank, trial in enumerate(scored, 1)
    }
    running: list[_Waiting] = []
    for trial in trials:
        if trial.status == "running":
            rung = min(bisect_right(ends, trial.epochs_done), len(ends) - 1)
            num_epochs = max(0, ends[rung] - trial.epochs_done)
            running.append((trial.number, rung, num_epochs, qualities.get(trial.number)))
    arrivals = state.arrivals if state else {}
    scores = tuple(
        tuple(qualities[number] for number in list(arrivals.get(rung, ())) if number in qualities)
        for rung in budget.rungs
    )
    advantages = [_find_advantage(number, budget, num_learned) for number in qualities]
    advantage = fmean(advantages) if advantages else 0.0
    return _Past(len(trials), scores, tuple(running), advantage, num_learned)


def _find_spread(values: list[float]) -> Spread:
    ordered, tenth = sorted(values), len(values) // 10
    return Spread(fmean(ordered), ordered[tenth], ordered[-1 - tenth])
