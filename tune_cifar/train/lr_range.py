"""The learning-rate range test (Smith, arXiv:1506.01186) and its three estimators.

A sweep records the loss of single training steps while the learning rate grows exponentially.
Three estimators read the smoothed curve of each seed. A value is suggested only if their medians
over the seeds lie within a decade of each other. All but `run_sweeps` are pure functions of
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tune_cifar.data.load import TrainVal
from tune_cifar.errors import ConfigError
from tune_cifar.schema import MAX_SEED, Numerics, TrainConfig
from tune_cifar.train.trainer import Trainer

# Standard deviation of the smoothing kernel, in decades of learning rate. Of 0.1, 0.15, 0.2, 0.25,
# 0.3 and 0.4 it is the narrowest at which steepest stayed at the fall and did not jump to the bumps
# behind it. Wider ones move valley and minimum/10 down, 0.4 by up to a half (s8, 3 seeds of 100
# steps, s10, 1 of 60; tier cpu, CIFAR-10, 2026-11-21).
SMOOTHING_DECADES = 0.2
# With fewer the kernel would cover single steps.
MIN_STEPS_PER_DECADE = 5
# Of a sweep, so that what is typed cannot fill the memory.
MAX_STEPS = 100_000
# Weights that smooth a curve, at a time: a few arrays of 8 MB.
MAX_WEIGHTS = 2**20
# A sweep has diverged when its smoothed loss exceeds its lowest by this factor, as in fastai, and
# its first loss.
DIVERGENCE_FACTOR = 4.0
# A curve falls if its fall exceeds this fraction of its starting level, and this many standard
# deviations of the smoothed curve's noise: the highest and lowest of pure noise lie 4 to 5 apart.
MIN_FALL_FRACTION, MIN_FALL_SDS = 0.01, 8.0
# The fall starts after this fraction of it, and ends when the loss has risen by as much again.
WALL_FRACTION = 0.1
# A sweep starts within the fall if its first level lies above that of its first decade by more than
# this fraction of the way down.
BEGUN_FRACTION = 1 / 3
# With fewer losses there is no curve.
MIN_LOSSES = 5
# The estimators agree if their medians lie within this factor.
MAX_DISAGREEMENT = 10.0
# The proposed range exceeds the lowest and the highest estimator by this factor.
RANGE_FACTOR = 10.0
# The schema's upper bound of max_lr; the lower one is 0.
_BOUNDS = TrainConfig.model_fields["max_lr"].metadata
HIGHEST_LR = next(bound.le for bound in _BOUNDS if hasattr(bound, "le"))

Floats = NDArray[np.float64]


def make_lrs(low: float, high: float, num_steps: int) -> tuple[float, ...]:
    """Return learning rates from `low` to `high`, evenly spaced in their logarithm.

    Raises:
        ConfigError: a bound is not in (0, HIGHEST_LR], the range spans less than a decade, or has
            less than MIN_STEPS_PER_DECADE steps a decade or more than MAX_STEPS.
    """
    for name, value in (("low", low), ("high", high)):
        if not value > 0:
            raise ConfigError(f"`{name}` > 0 must hold, got {value!r}.")
        if not value <= HIGHEST_LR:
            raise ConfigError(f"`{name}` <= {HIGHEST_LR:g} must hold, got {value!r}.")
    if 10 * low > high:
        raise ConfigError(f"`low` must be at most a tenth of `high`, got {low:g} and {high:g}.")
    min_steps = MIN_STEPS_PER_DECADE * math.log10(high / low)
    if num_steps > MAX_STEPS:
        raise ConfigError(f"`steps` <= {MAX_STEPS} must hold, got {num_steps}.")
    if num_steps < min_steps:
        rule = f"`steps` must be at least {math.ceil(min_steps)} from {low:g} to {high:g}"
        raise ConfigError(f"{rule} ({MIN_STEPS_PER_DECADE} a decade), got {num_steps}.")
    return tuple(float(lr) for lr in np.geomspace(low, high, num_steps))


@dataclass(frozen=True)
class Sweep:
    """One seed's losses (nats per image), each finite and of a step at its learning rate."""

    seed: int
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    diverged_at: float | None
    """Learning rate of the step whose loss was not finite or, smoothed, too high; else None."""


def follow_sweep(seed: int, lrs: Sequence[float], losses: Iterable[float]) -> Sweep:
    """Take the losses of a sweep until it diverges; `losses` is not iterated further."""
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
        # The level is a line's end: behind a steep fall it undershoots, below 0 even.
        if level > max(DIVERGENCE_FACTOR * lowest, taken[0]):
            diverged_at = lr
            break
    return Sweep(seed, tuple(lrs[:count]), tuple(taken[:count].tolist()), diverged_at)


def smooth(log_lrs: Floats, losses: Floats, at: Floats | None = None) -> tuple[Floats, Floats]:
    """Smooth a curve; return its values and its slopes per decade.

    At each point a line is fitted to the losses under Gaussian weights of sd SMOOTHING_DECADES.
    Between even steps that equals a symmetric mean, which shifts no feature. At the ends, where all
    neighbours lie on one side, a plain mean would be biased along the slope, and a line is not.

    Args:
        log_lrs: log10 of the learning rates, like `at`.
        at: where to evaluate; by default at all points.
    """
    places = log_lrs if at is None else at
    size = max(1, MAX_WEIGHTS // len(log_lrs))
    starts = range(0, len(places), size)
    parts = [_smooth_at(log_lrs, losses, places[start : start + size]) for start in starts]
    values, slopes = (np.concatenate(part) for part in zip(*parts, strict=True))
    return values, slopes


def _smooth_at(log_lrs: Floats, losses: Floats, at: Floats) -> tuple[Floats, Floats]:
    offsets = log_lrs[None, :] - at[:, None]
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
    """A smoothed sweep and its fall.

    Attributes:
        slopes: of the loss per decade.
        first: index at which a tenth of the fall is done; 0 if the sweep starts within the fall.
        lowest: index at which the fall is complete.
        rises: whether the loss rises again or diverges after `lowest`, so it is a minimum.
        problem: why there is no fall; then `first` and `lowest` mean nothing.
    """

    lrs: tuple[float, ...]
    smoothed: Floats
    slopes: Floats
    first: int = 0
    lowest: int = 0
    rises: bool = False
    problem: str = ""


def fit_curve(sweep: Sweep) -> Curve:
    """Smooth a sweep and find its fall, which starts from the median loss of the first decade."""
    log_lrs, losses = np.log10(sweep.lrs), np.array(sweep.losses)
    count = len(losses)
    if count < MIN_LOSSES:
        problem = f"the loss diverges after {count} steps, {MIN_LOSSES} are needed; lower `low`"
        return Curve(sweep.lrs, losses, np.zeros(count), problem=problem)
    start = float(np.median(losses[log_lrs <= log_lrs[0] + 1]))
    # A loss of thousands in the last step would raise the curve before it.
    smoothed, slopes = smooth(log_lrs, np.minimum(losses, DIVERGENCE_FACTOR * start))
    lowest = int(smoothed.argmin())
    start = min(start, float(smoothed[: lowest + 1].max()))  # the first decade may rise
    fall = start - float(smoothed[lowest])
    # Standard deviation of one loss from the median residual, which diverging steps do not move: of
    # a normal distribution it is 1.48 times the median.
    noise = 1.48 * float(np.median(np.abs(losses - smoothed)))
    # A mean under a Gaussian of sd s over steps d apart has d / (2 sqrt(pi) s) of that variance.
    noise *= math.sqrt((log_lrs[1] - log_lrs[0]) / (2 * math.sqrt(math.pi) * SMOOTHING_DECADES))
    needed = max(MIN_FALL_FRACTION * start, MIN_FALL_SDS * noise)
    if fall <= needed:
        found = f"the loss falls by {max(0.0, fall):.2g}"
        problem = f"{found}, more than {needed:.2g} is needed to stand out from its noise"
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


STILL_FALLING = "the loss does not rise again before the sweep's end; raise `high`"
FALLS_AT_ONCE = "the sweep starts within the fall of the loss; lower `low`"
STEEPEST_AT_END = "the fall is steepest at the sweep's end; raise `high` or `steps`"


def find_steepest(curve: Curve) -> Estimate:
    """Find where the loss falls fastest per decade (torch-lr-finder's suggestion)."""
    if curve.problem:
        return Estimate(None, curve.problem)
    if curve.first == 0:
        return Estimate(None, FALLS_AT_ONCE)
    index = curve.first + int(curve.slopes[curve.first : curve.lowest + 1].argmin())
    # At the end of a sweep the slope is little more than noise, and beyond it may be steeper.
    if curve.lrs[index] > curve.lrs[-1] / 10**SMOOTHING_DECADES:
        return Estimate(None, STEEPEST_AT_END)
    return Estimate(curve.lrs[index])


def find_valley(curve: Curve) -> Estimate:
    """Find the middle of the fall, in log10 of the learning rate (fastai's suggestion).

    Unlike in fastai, the fall starts where a tenth of it is done, not with the longest falling
    subsequence of steps: that one starts where the sweep does, so `low` would move the answer.
    """
    if curve.problem:
        return Estimate(None, curve.problem)
    if not curve.rises:
        return Estimate(None, STILL_FALLING)
    if curve.first == 0:
        return Estimate(None, FALLS_AT_ONCE)
    return Estimate(math.sqrt(curve.lrs[curve.first] * curve.lrs[curve.lowest]))


def find_minimum_tenth(curve: Curve) -> Estimate:
    """Find a tenth of the learning rate with the lowest loss (fastai's older suggestion)."""
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
        lr: the median of the seeds' values, in log10; None unless more than half of the seeds have
            a value.
        factor: the highest of the values over the lowest; None for fewer than two.
        geometric_sd: their standard deviation as a factor; None for fewer than two.
        num_seeds: how many seeds have a value.
        reason: why the first seed without a value has none.
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
        disagreement: the highest median over the lowest; None for fewer than two.
        suggestion: the median of the medians, in log10; None if they do not agree.
    """

    estimators: dict[str, SeedsEstimate]
    disagreement: float | None
    suggestion: float | None

    @property
    def medians(self) -> dict[str, float]:
        """Median of each estimator that has one."""
        return {name: found.lr for name, found in self.estimators.items() if found.lr is not None}

    @property
    def verdict(self) -> str:
        """The suggestion, or why there is none, in words."""
        values = ", ".join(f"{name} {lr:.2e}" for name, lr in self.medians.items()) or "none"
        if self.disagreement is None:
            return f"no suggestion: two estimators or more must give a value, got {values}"
        factor = f"a factor of {self.disagreement:.3g}"
        if self.suggestion is None:
            limit = f"more than {MAX_DISAGREEMENT:g}"
            return f"no suggestion: the estimators disagree by {factor}, {limit}: {values}"
        return f"suggestion: max_lr {self.suggestion:.2e}; the estimators lie within {factor}"


def summarise(curves: Sequence[Curve]) -> Summary:
    """Apply every estimator to every curve, and decide whether the estimators agree."""
    found = {}
    for name, find in ESTIMATORS.items():
        found[name] = _summarise_seeds([find(curve) for curve in curves])
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


def propose_range(medians: Sequence[float], include: Sequence[float]) -> tuple[float, float]:
    """Propose bounds for the search of max_lr.

    They reach from a tenth of the lowest estimator's median to ten times the highest's: two decades
    around the suggestion, and more if the estimators differ. They are widened to contain the values
    of `include` (such as the baseline's), rounded outwards to two significant digits, and lie
    within the schema's bounds.
    """
    low = round_to_two_digits(min(min(medians) / RANGE_FACTOR, *include), math.floor)
    high = round_to_two_digits(max(max(medians) * RANGE_FACTOR, *include), math.ceil)
    return low, min(high, HIGHEST_LR)


def round_to_two_digits(value: float, towards: Callable[[float], int]) -> float:
    """Round to two significant digits, by math.floor or math.ceil."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log10(abs(value))) - 1
    # The inner rounding removes binary noise: 5.2e-4 must not be rounded up to 5.3e-4.
    return float(f"{towards(round(value / 10.0**exponent, 6))}e{exponent}")


def run_sweeps(
    config: TrainConfig,
    data: TrainVal,
    numerics: Numerics,
    lrs: Sequence[float],
    num_seeds: int,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[Sweep]:
    """Sweep a new network for each of `num_seeds` seeds, starting with the config's seed.

    Args:
        config: with schedule constant. Its momentum is used at every step.
        on_step: called after each training step.

    Yields:
        the Sweep of each seed.

    Raises:
        ConfigError: before the first sweep, when the last seed would be too large.
    """
    if config.seed + num_seeds - 1 > MAX_SEED:
        rule = f"`seeds` <= {MAX_SEED - config.seed + 1} (from seed {config.seed} on) must hold"
        raise ConfigError(f"{rule}, got {num_seeds}.")

    def watch(losses: Iterable[float]) -> Iterator[float]:
        for loss in losses:
            on_step()
            yield loss

    for seed in range(config.seed, config.seed + num_seeds):
        seeded = TrainConfig(**{**config.model_dump(), "seed": seed})
        # Nothing holds the Trainer longer: the next one takes its captured step.
        yield follow_sweep(seed, lrs, watch(Trainer(seeded, data, numerics).sweep(lrs)))
