"""The learning-rate range test: the loss of single training steps while the learning rate grows exponentially (Smith,
arXiv:1506.01186), and what can be read off that curve.

The first part is pure: numbers in, numbers out. Three estimators read the smoothed curve of each seed; only where their
medians over the seeds lie within a decade of each other is a value suggested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tune_cifar.data.load import TrainVal
from tune_cifar.errors import ConfigError
from tune_cifar.schema import Numerics, TrainConfig
from tune_cifar.train.trainer import Trainer

# Standard deviation of the smoothing kernel, in decades of learning rate. Of 0.1, 0.15, 0.2, 0.25, 0.3 and 0.4 the
# narrowest at which steepest stayed at the fall and did not jump to the bumps behind it; wider ones move valley and
# minimum/10 down, at 0.4 by up to a half (s8, 3 seeds of 100 steps, s10, 1 of 60; tier cpu, CIFAR-10, 2026-11-21).
SMOOTHING_DECADES = 0.2
# Fewer and the kernel would see single steps.
MIN_STEPS_PER_DECADE = 5
# A sweep has diverged when its smoothed loss exceeds so many times the lowest so far, as in fastai.
DIVERGENCE_FACTOR = 4.0
# A curve falls when it does so by more than this fraction of its starting level, and by more than so many standard
# deviations of the smoothed curve's noise: the highest and lowest of pure noise lie 4 to 5 apart.
MIN_FALL_FRACTION, MIN_FALL_SDS = 0.01, 8.0
# The fall has begun after this fraction of it, and is over when the loss has risen by as much again.
WALL_FRACTION = 0.1
# A sweep has begun within the fall when its first level lies above that of its first decade by more than this fraction
# of the way down.
BEGUN_FRACTION = 1 / 3
# With fewer losses there is no curve.
MIN_LOSSES = 5
# Medians further apart, as a factor, are no agreement.
MAX_DISAGREEMENT = 10.0
# What --write proposes goes so far beyond the lowest and the highest estimator.
RANGE_FACTOR = 10.0
# The schema's bound of max_lr; its lower one is 0.
HIGHEST_LR = next(
    rule.le for rule in TrainConfig.model_fields["max_lr"].metadata if hasattr(rule, "le")
)

Floats = NDArray[np.float64]


def make_lrs(low: float, high: float, num_steps: int) -> tuple[float, ...]:
    """Learning rates from low to high, each the same factor above the one before.

    Raises:
        ConfigError: when they are no learning rates, span less than a decade, or are too few.
    """
    for option, value in (("--low", low), ("--high", high)):
        if not value > 0:
            raise ConfigError(f"{option} > 0 must hold, got {value!r}.")
        if not value <= HIGHEST_LR:
            raise ConfigError(f"{option} <= {HIGHEST_LR:g} must hold, got {value!r}.")
    if 10 * low > high:
        raise ConfigError(f"--low: at most a tenth of --high must hold, got {low:g} and {high:g}.")
    num_decades = math.log10(high / low)
    if num_steps < MIN_STEPS_PER_DECADE * num_decades:
        rule = f"--steps: at least {math.ceil(MIN_STEPS_PER_DECADE * num_decades)} must hold from {low:g} to {high:g}"
        raise ConfigError(f"{rule} ({MIN_STEPS_PER_DECADE} a decade), got {num_steps}.")
    return tuple(float(lr) for lr in np.geomspace(low, high, num_steps))


@dataclass(frozen=True)
class Sweep:
    """One seed's curve: the finite losses (nats per image), each of a training step at its learning rate."""

    seed: int
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    diverged_at: float | None
    """The learning rate of the step whose loss was not finite or, smoothed, too high; None of a whole sweep."""


def follow_sweep(seed: int, lrs: Sequence[float], losses: Iterable[float]) -> Sweep:
    """Take the losses of a sweep until it diverges; what would come after is not asked for."""
    log_lrs, taken, lowest = np.log10(lrs), np.empty(len(lrs)), math.inf
    count, diverged_at = 0, None
    for lr, loss in zip(lrs, losses, strict=False):
        if not math.isfinite(loss):
            diverged_at = lr
            break
        taken[count] = loss
        count += 1
        level = float(smooth(log_lrs[:count], taken[:count], log_lrs[count - 1 : count])[0][0])
        lowest = min(lowest, level)
        if level > DIVERGENCE_FACTOR * lowest:
            diverged_at = lr
            break
    return Sweep(seed, tuple(lrs[:count]), tuple(taken[:count].tolist()), diverged_at)


def smooth(log_lrs: Floats, losses: Floats, at: Floats | None = None) -> tuple[Floats, Floats]:
    """A curve, and its slope per decade, at all its points or at those given (log10 of the learning rate).

    At each point the line is taken that fits best under Gaussian weights of sd SMOOTHING_DECADES. Between even steps
    that is a symmetric mean, which shifts no feature; at the ends, where the neighbours lie on one side only, a plain
    mean would drag the curve along its slope, and a line does not.
    """
    offsets = log_lrs[None, :] - (log_lrs if at is None else at)[:, None]
    weights = np.exp(-0.5 * (offsets / SMOOTHING_DECADES) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    centres = (weights * offsets).sum(axis=1)
    deviations = weights * (offsets - centres[:, None])
    variances = (deviations * offsets).sum(axis=1)
    slopes = np.divide(
        deviations @ losses, variances, out=np.zeros_like(centres), where=variances > 1e-12
    )
    return weights @ losses - slopes * centres, slopes


@dataclass(frozen=True)
class Curve:
    """A smoothed sweep, and where it falls.

    Attributes:
        slopes: of the loss per decade.
        first, lowest: the indices between which the loss falls: a tenth of the fall is done, all of it is done. 0 for
            first: the sweep began within the fall.
        rises: after that the loss rises again, or the sweep diverges: the minimum is one.
        problem: why there is no fall; then first and lowest mean nothing.
    """

    lrs: tuple[float, ...]
    smoothed: Floats
    slopes: Floats
    first: int = 0
    lowest: int = 0
    rises: bool = False
    problem: str = ""


def fit_curve(sweep: Sweep) -> Curve:
    """Smooth a sweep and find its fall. Where it starts from is the median loss of its first decade."""
    log_lrs, losses = np.log10(sweep.lrs), np.array(sweep.losses)
    count = len(losses)
    if count < MIN_LOSSES:
        problem = f"at least {MIN_LOSSES} steps must be done before the loss diverges, got {count}; lower --low"
        return Curve(sweep.lrs, losses, np.zeros(count), problem=problem)
    start = float(np.median(losses[log_lrs <= log_lrs[0] + 1]))
    # A loss of thousands in the last step would drag the curve before it up.
    smoothed, slopes = smooth(log_lrs, np.minimum(losses, DIVERGENCE_FACTOR * start))
    lowest = int(smoothed.argmin())
    start = min(start, float(smoothed[: lowest + 1].max()))  # the first decade may rise
    fall = start - float(smoothed[lowest])
    # Of the residuals' median, which steps in a blow-up do not move: 1.48 makes it the sd of a normal distribution.
    noise = 1.48 * float(np.median(np.abs(losses - smoothed)))
    # A mean under a Gaussian of sd s over steps d apart has so much of one loss's variance.
    noise *= math.sqrt((log_lrs[1] - log_lrs[0]) / (2 * math.sqrt(math.pi) * SMOOTHING_DECADES))
    needed = max(MIN_FALL_FRACTION * start, MIN_FALL_SDS * noise)
    if fall <= needed:
        problem = f"the loss must fall by more than {needed:.2g} to stand out from its noise, got {max(0.0, fall):.2g}"
        return Curve(sweep.lrs, smoothed, slopes, problem=problem)
    has_begun = smoothed[0] - start > BEGUN_FRACTION * (smoothed[0] - smoothed[lowest])
    before = np.flatnonzero(smoothed[:lowest] >= start - WALL_FRACTION * fall)
    first = 0 if has_begun or not len(before) else int(before[-1])
    rise = float(smoothed[lowest:].max() - smoothed[lowest])
    rises = sweep.diverged_at is not None or rise >= WALL_FRACTION * fall
    return Curve(sweep.lrs, smoothed, slopes, first, lowest, rises)


@dataclass(frozen=True)
class Estimate:
    """A learning rate, or why the curve does not give one."""

    lr: float | None
    reason: str = ""


STILL_FALLING = "the loss must rise again before the sweep's end, got none of it; raise --high"
FALLS_AT_ONCE = (
    "the sweep must start before the loss falls, got a start within the fall; lower --low"
)


def find_steepest(curve: Curve) -> Estimate:
    """Where the loss falls fastest per decade (torch-lr-finder's suggestion)."""
    if curve.problem:
        return Estimate(None, curve.problem)
    if curve.first == 0:
        return Estimate(None, FALLS_AT_ONCE)
    index = curve.first + int(curve.slopes[curve.first : curve.lowest + 1].argmin())
    # At the very end of a sweep the slope is little more than noise, and beyond it may be steeper.
    if curve.lrs[index] > curve.lrs[-1] / 10**SMOOTHING_DECADES:
        return Estimate(
            None,
            "the steepest fall must lie within the sweep, got it at the end; raise --high or --steps",
        )
    return Estimate(curve.lrs[index])


def find_valley(curve: Curve) -> Estimate:
    """The middle of the fall, in log10 of the learning rate (fastai's suggestion).

    Deviates from fastai: the fall begins where a tenth of it is done, not with the longest falling subsequence of
    steps. That one begins wherever the sweep does, and --low would move the answer.
    """
    if curve.problem:
        return Estimate(None, curve.problem)
    if not curve.rises:
        return Estimate(None, STILL_FALLING)
    if curve.first == 0:
        return Estimate(None, FALLS_AT_ONCE)
    return Estimate(math.sqrt(curve.lrs[curve.first] * curve.lrs[curve.lowest]))


def find_minimum_tenth(curve: Curve) -> Estimate:
    """A tenth of where the loss is lowest (fastai's older suggestion): a decade clear of the divergence."""
    if curve.problem:
        return Estimate(None, curve.problem)
    return Estimate(curve.lrs[curve.lowest] / 10) if curve.rises else Estimate(None, STILL_FALLING)


ESTIMATORS: dict[str, Callable[[Curve], Estimate]] = {
    "steepest": find_steepest,
    "valley": find_valley,
    "minimum/10": find_minimum_tenth,
}


@dataclass(frozen=True)
class SeedsEstimate:
    """One estimator over all seeds.

    Attributes:
        lr: the median of the seeds' values, in log10; None where no more than half of the seeds gave one.
        factor: the highest of the values over the lowest; None of fewer than two.
        geometric_sd: their standard deviation as a factor; None of fewer than two.
        num_seeds: how many gave one.
        reason: of the first seed that gave none.
    """

    lr: float | None
    factor: float | None
    geometric_sd: float | None
    num_seeds: int
    reason: str


@dataclass(frozen=True)
class Summary:
    """All estimators over all seeds.

    Attributes:
        disagreement: the highest median over the lowest; None of fewer than two.
        suggestion: the middle one of the medians, in log10; None where they do not agree.
    """

    estimators: dict[str, SeedsEstimate]
    disagreement: float | None
    suggestion: float | None

    @property
    def medians(self) -> dict[str, float]:
        """Of the estimators that have one."""
        return {name: found.lr for name, found in self.estimators.items() if found.lr is not None}

    @property
    def verdict(self) -> str:
        """What is suggested, or why nothing is."""
        values = ", ".join(f"{name} {lr:.2e}" for name, lr in self.medians.items()) or "none"
        if self.disagreement is None:
            return f"no suggestion: two estimators or more must give a value, got {values}"
        if self.suggestion is None:
            factor = f"{self.disagreement:.3g}, more than {MAX_DISAGREEMENT:g}"
            return f"no suggestion: the estimators disagree by a factor of {factor}: {values}"
        return f"suggestion: max_lr {self.suggestion:.2e}; the estimators lie within a factor of {self.disagreement:.3g}"


def summarise(curves: Sequence[Curve]) -> Summary:
    """Read every curve with every estimator, and say whether the estimators agree."""
    found = {
        name: _summarise_seeds([find(curve) for curve in curves])
        for name, find in ESTIMATORS.items()
    }
    lrs = [estimate.lr for estimate in found.values() if estimate.lr is not None]
    disagreement = max(lrs) / min(lrs) if len(lrs) >= 2 else None
    agree = disagreement is not None and disagreement <= MAX_DISAGREEMENT
    return Summary(found, disagreement, _find_log_median(lrs) if agree else None)


def _summarise_seeds(estimates: Sequence[Estimate]) -> SeedsEstimate:
    lrs = [estimate.lr for estimate in estimates if estimate.lr is not None]
    reason = next((estimate.reason for estimate in estimates if estimate.lr is None), "")
    return SeedsEstimate(
        lr=_find_log_median(lrs) if 2 * len(lrs) > len(estimates) else None,
        factor=max(lrs) / min(lrs) if len(lrs) >= 2 else None,
        geometric_sd=float(np.exp(np.std(np.log(lrs), ddof=1))) if len(lrs) >= 2 else None,
        num_seeds=len(lrs),
        reason=reason,
    )


def _find_log_median(lrs: Sequence[float]) -> float:
    return float(np.exp(np.median(np.log(lrs))))


def propose_range(medians: Sequence[float], keep: Sequence[float]) -> tuple[float, float]:
    """What to search max_lr in: from a tenth of the lowest estimator's median to ten times the highest's, so two
    decades around the suggestion and more where the estimators lie apart. Widened to hold `keep` (the baseline, for
    one), rounded outwards to two significant digits, and within the schema's bounds."""
    low = round_to_two_digits(min(min(medians) / RANGE_FACTOR, *keep), math.floor)
    high = round_to_two_digits(max(max(medians) * RANGE_FACTOR, *keep), math.ceil)
    return low, min(high, HIGHEST_LR)


def round_to_two_digits(value: float, towards: Callable[[float], int]) -> float:
    """Round to two significant digits, by math.floor or math.ceil."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log10(abs(value))) - 1
    # The first rounding undoes what binary fractions add: 5.2e-4 is no more than itself.
    return float(f"{towards(round(value / 10.0**exponent, 6))}e{exponent}")


def run_sweeps(
    config: TrainConfig,
    data: TrainVal,
    numerics: Numerics,
    lrs: Sequence[float],
    num_seeds: int,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[Sweep]:
    """Sweep a fresh network for each of so many seeds, the config's first.

    Args:
        config: of schedule constant. Its momentum holds throughout, also for a recipe whose OneCycle would cycle it.
        on_step: called after each training step.
    """

    def watch(losses: Iterable[float]) -> Iterator[float]:
        for loss in losses:
            on_step()
            yield loss

    for seed in range(config.seed, config.seed + num_seeds):
        trainer = Trainer(TrainConfig(**{**config.model_dump(), "seed": seed}), data, numerics)
        yield follow_sweep(seed, lrs, watch(trainer.sweep(lrs)))
