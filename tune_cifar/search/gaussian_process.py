"""Proposals by a Gaussian process over (hyperparameters, rung).

Every score at every rung is an observation, so that stopped trials count for what they showed. The
rung is one more input: how much a low rung says about the last one is learned. Targets are normal
scores of the ranks within a rung, so that neither the scale of a metric nor an outlier matters.

Kernel: Matern 5/2 with a length scale for each input and noise, all chosen by their posterior under
log-normal priors. Acquisition: expected improvement at the last rung over the best mean of the
trials so far. Sources: Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning";
Jones et al. 1998, "Efficient Global Optimization".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri

Array = NDArray[np.float64]

MAX_OBSERVATIONS = 1000
"""The newest ones of the highest rungs count: a proposal takes 0.2 s."""
MAX_FITTED = 128
"""Observations that length scales are fitted to: 10 to 20 ms."""
MAX_STEPS = 30
NUM_RANDOM = 1500
NUM_LOCAL = 500
NUM_CENTRES = 10
NUM_BOUNDING = 128
"""Observations that bound the deviations of all candidates."""
NUM_FIRST = 64
"""Candidates whose expected improvement is computed before the bounds leave the others out."""
JITTER = 1e-6
# Log-normal priors of length scales and of the noise's variance: mean and deviation of the
# logarithm. A typical distance in the unit cube grows with the root of its dimensions, and so does
# the length scale's prior.
LENGTH_PRIOR = (math.log(0.4), 0.75)
NOISE_PRIOR = (math.log(0.05), 1.0)


class Seen(NamedTuple):
    """A trial as it is known; `params` lacks inactive hyperparameters. Higher scores are better."""

    params: dict[str, Any]
    scores: dict[int, float]
    """By rung."""
    is_running: bool


class UnitCube:
    """The unit cube of a space: a number lies at its fraction of its range, a choice in its cell.

    In logarithms, where the range is logarithmic.

    Args:
        distributions: Optuna's, by the names of the hyperparameters.
    """

    def __init__(self, distributions: Mapping[str, Any]) -> None:
        self.distributions = dict(distributions)

    def locate(self, proposals: Sequence[dict[str, Any]]) -> Array:
        """Return the places (proposals, hyperparameters); inactive ones have 0.5."""
        places = np.full((len(proposals), len(self.distributions)), 0.5)
        for column, name in enumerate(self.distributions):
            has = [row for row, params in enumerate(proposals) if name in params]
            places[has, column] = self._locate(name, [proposals[row][name] for row in has])
        return places

    def _locate(self, name: str, values: Sequence[Any] | Array) -> Array:
        found = self.distributions[name]
        if hasattr(found, "choices"):
            cells = np.array([found.choices.index(value) for value in values])
            return (cells + 0.5) / len(found.choices)
        if found.low == found.high:
            return np.full(len(values), 0.5)
        scale = np.log if found.log else np.asarray
        low, high = scale(found.low), scale(found.high)
        return np.asarray((scale(values) - low) / (high - low), dtype=np.float64)

    def read(self, place: Array) -> dict[str, Any]:
        """Return the proposal at a place: every hyperparameter, within its distribution."""
        names = zip(self.distributions, place, strict=True)
        return {name: self._read(name, float(fraction)) for name, fraction in names}

    def _read(self, name: str, fraction: float) -> Any:
        found = self.distributions[name]
        if hasattr(found, "choices"):
            return found.choices[int(_find_cells(found, np.array(fraction)))]
        value = _find_values(found, np.array(fraction))
        return int(value) if isinstance(found.low, int) else float(value)

    def snap(self, places: Array) -> Array:
        """Return the places of what is read at these: of choices and steps there are few."""
        snapped = places.copy()
        for column, (name, found) in enumerate(self.distributions.items()):
            if hasattr(found, "choices"):
                cells = _find_cells(found, places[:, column])
                snapped[:, column] = (cells + 0.5) / len(found.choices)
            elif found.step is not None:
                snapped[:, column] = self._locate(name, _find_values(found, places[:, column]))
        return snapped

    def encode(self, places: Array) -> Array:
        """Return the kernel's inputs (places, inputs); differing choices are at a distance of 1."""
        columns = []
        for found, column in zip(self.distributions.values(), places.T, strict=True):
            if hasattr(found, "choices"):
                columns.append(
                    np.eye(len(found.choices))[_find_cells(found, column)] / math.sqrt(2)
                )
            else:
                columns.append(column[:, None])
        return np.hstack(columns)


def _find_cells(found: Any, fractions: Array) -> NDArray[np.int64]:
    """Return the numbers of the choices in whose cells these fractions lie."""
    cells = (fractions * len(found.choices)).astype(np.int64)
    return np.minimum(cells, len(found.choices) - 1)


def _find_values(found: Any, fractions: Array) -> Array:
    """Return the numbers at these fractions of a range, on its steps."""
    low, high = found.low, found.high
    if found.log:
        values = np.exp(_mix(math.log(low), math.log(high), fractions))
    else:
        values = _mix(low, high, fractions)
    if found.step is not None:
        values = low + np.round((values - low) / found.step) * found.step
    return np.clip(values, low, high)


def propose_by_gp(
    cube: UnitCube,
    trials: Sequence[Seen],
    rungs: tuple[int, ...],
    seed: int,
    select_active: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Return the proposal of the highest expected improvement at the last rung.

    Running trials are believed to get what is expected of them.

    Args:
        trials: at least one of them has a score; the oldest first.
        select_active: returns a proposal without inactive hyperparameters.
    """
    random = np.random.default_rng(seed)
    targets_by_rung = {rung: rank_targets(trials, rung) for rung in rungs}
    seen = [(rung, *each) for rung, found in targets_by_rung.items() for each in found.items()]
    at, index, targets = (
        np.array(column) for column in zip(*seen[-MAX_OBSERVATIONS:], strict=True)
    )
    everywhere = cube.locate([trial.params for trial in trials])
    places = everywhere[index]
    inputs = _add_rung(cube.encode(places), at, rungs)
    chosen = random.permutation(len(at))[:MAX_FITTED]
    lengths, noise = fit(inputs[chosen], targets[chosen])
    # The highest rungs first: they bound deviations at the last rung best.
    process = GaussianProcess(inputs[::-1], targets[::-1], lengths, noise)

    def encode_ends(at_places: Array) -> Array:
        """Return the inputs of these places at the last rung."""
        ends = np.full(len(at_places), rungs[-1])
        return _add_rung(cube.encode(at_places), ends, rungs)

    running = [i for i, trial in enumerate(trials) if trial.is_running]
    if running:
        process = process.believe(encode_ends(everywhere[running]))
    tried = np.unique(places, axis=0)
    means = process.predict_means(encode_ends(tried))
    centres = tried[np.argsort(means, kind="stable")[-NUM_CENTRES:]]
    candidates = cube.snap(_draw_candidates(centres, random))
    _centre_inactive(cube, candidates, select_active)
    candidates = _drop_tried(candidates, everywhere)
    return cube.read(candidates[find_best(process, encode_ends(candidates), means.max())])


def _draw_candidates(centres: Array, random: np.random.Generator) -> Array:
    """Draw places: uniform ones, and steps of all sizes from the centres in some coordinates."""
    num_axes = centres.shape[1]
    starts = centres[random.integers(0, len(centres), NUM_LOCAL)]
    sizes = 10.0 ** random.uniform(-2.0, -0.5, (NUM_LOCAL, 1))
    moved = random.random((NUM_LOCAL, num_axes)) < max(0.3, 1.0 / num_axes)
    steps = np.where(moved, sizes * random.standard_normal((NUM_LOCAL, num_axes)), 0.0)
    near = np.abs(starts + steps)
    near = np.clip(1.0 - np.abs(1.0 - near), 0.0, 1.0)  # reflected at both ends
    return np.vstack([random.random((NUM_RANDOM, num_axes)), near])


def _drop_tried(candidates: Array, tried: Array) -> Array:
    """Return the candidates without those that were tried, unless all were.

    The same hyperparameters under the same seed are the same training, bit for bit.
    """
    known = {row.tobytes() for row in np.round(tried, 9)}
    untried = [row.tobytes() not in known for row in np.round(candidates, 9)]
    return candidates[untried] if any(untried) else candidates


def _centre_inactive(
    cube: UnitCube, places: Array, select_active: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Move inactive hyperparameters to where `UnitCube.locate` has them.

    What is active depends on choices; numbers that switch something off lie at the end of a range.
    """
    names = list(cube.distributions)
    choices = [i for i, name in enumerate(names) if hasattr(cube.distributions[name], "choices")]
    sizes = np.array([len(cube.distributions[names[i]].choices) for i in choices])
    cells = (places[:, choices] * sizes).astype(int)
    for row in np.unique(cells, axis=0):
        alike = (cells == row).all(axis=1)
        active = select_active(cube.read(places[int(alike.argmax())]))
        inactive = [i for i, name in enumerate(names) if name not in active]
        places[np.ix_(alike, inactive)] = 0.5


def _add_rung(inputs: Array, at: NDArray[Any], rungs: tuple[int, ...]) -> Array:
    """Return the inputs with a rung each: 0 for the first, 1 for the last, in logarithms."""
    span = math.log(rungs[-1] / rungs[0])
    fraction = np.log(at / rungs[0]) / span if span else np.zeros(len(inputs))
    return np.hstack([inputs, fraction[:, None]])


def find_best(process: GaussianProcess, inputs: Array, target: float) -> int:
    """Return the index of the input with the highest expected improvement over a target.

    A few observations bound the deviations, and so the improvements, from above. Those that the
    bounds leave a chance are compared exactly.
    """
    bounds = _expect(
        process.predict_means(inputs) - target, process.bound_deviations(inputs, NUM_BOUNDING)
    )
    order = np.argsort(-bounds, kind="stable")

    def expect(at: NDArray[Any]) -> Array:
        means, deviations = process.predict(inputs[at])
        return _expect(means - target, deviations)

    first = order[:NUM_FIRST]
    exact = expect(first)
    rest = order[NUM_FIRST:]
    rest = rest[bounds[rest] > exact.max()]
    if rest.size:
        first, exact = np.append(first, rest), np.append(exact, expect(rest))
    return int(first[exact.argmax()])


def _expect(gains: Array, deviations: Array) -> Array:
    """Return the expected improvements where the means gain so much over the target."""
    scaled = gains / deviations
    density = np.exp(-0.5 * scaled**2) / math.sqrt(2.0 * math.pi)
    expected: Array = deviations * (scaled * ndtr(scaled) + density)
    return expected


class GaussianProcess:
    """A Gaussian process of zero mean and unit variance with fixed length scales and noise."""

    def __init__(self, inputs: Array, targets: Array, lengths: Array, noise: float) -> None:
        self._inputs, self._targets = inputs / lengths, targets
        self._lengths, self._noise = lengths, noise
        self._factor = self._factorise(_correlate(self._inputs, self._inputs))
        self._weights = cho_solve((self._factor, True), targets)

    def _factorise(self, covariance: Array) -> Array:
        """Return the lower Cholesky factor of a covariance of noisy observations."""
        covariance[np.diag_indices_from(covariance)] += self._noise + JITTER
        factor: Array = cholesky(covariance, lower=True)
        return factor

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation of the noiseless function (inputs,) each."""
        return self.predict_means(inputs), self.bound_deviations(inputs, len(self._inputs))

    def predict_means(self, inputs: Array) -> Array:
        """Return the mean alone, for a fraction of the time."""
        means: Array = _correlate(inputs / self._lengths, self._inputs) @ self._weights
        return means

    def bound_deviations(self, inputs: Array, count: int) -> Array:
        """Return the standard deviations (inputs,) after the first `count` observations.

        Each further one lowers them.
        """
        cross = _correlate(self._inputs[:count], inputs / self._lengths)
        spread = solve_triangular(self._factor[:count, :count], cross, lower=True)
        deviations: Array = np.sqrt(np.maximum(1.0 - (spread**2).sum(axis=0), 1e-12))
        return deviations

    def believe(self, inputs: Array) -> GaussianProcess:
        """Return the process that has also seen its own means at these inputs."""
        # The factor is continued: one made anew takes as long as the first.
        extended = copy.copy(self)
        added = inputs / self._lengths
        cross = solve_triangular(self._factor, _correlate(self._inputs, added), lower=True)
        corner = self._factorise(_correlate(added, added) - cross.T @ cross)
        extended._factor = np.block([[self._factor, np.zeros(cross.shape)], [cross.T, corner]])
        extended._inputs = np.vstack([self._inputs, added])
        extended._targets = np.concatenate([self._targets, self.predict_means(inputs)])
        extended._weights = cho_solve((extended._factor, True), extended._targets)
        return extended


def fit(inputs: Array, targets: Array) -> tuple[Array, float]:
    """Return length scales (inputs,) and noise variance of the highest posterior density."""
    differences = (inputs[:, None, :] - inputs[None, :, :]) ** 2
    num_inputs = inputs.shape[1]
    centre = LENGTH_PRIOR[0] + 0.5 * math.log(num_inputs)
    means = np.array([centre] * num_inputs + [NOISE_PRIOR[0]])
    deviations = np.array([LENGTH_PRIOR[1]] * num_inputs + [NOISE_PRIOR[1]])

    def measure(logs: Array) -> tuple[float, Array]:
        """Return the negative log posterior and its gradient."""
        lengths, noise = np.exp(logs[:-1]), math.exp(logs[-1])
        distances = np.sqrt(5.0 * (differences @ lengths**-2))
        decay = np.exp(-distances)
        covariance = (1.0 + distances + distances**2 / 3.0) * decay
        covariance[np.diag_indices_from(covariance)] += noise + JITTER
        factor = cholesky(covariance, lower=True)
        inverse = cho_solve((factor, True), np.eye(len(targets)))
        weights = inverse @ targets
        outer = np.outer(weights, weights) - inverse
        slopes = outer * (5.0 / 3.0) * (1.0 + distances) * decay
        gradient = -0.5 * np.einsum("ij,ijk->k", slopes, differences) * lengths**-2
        gradient = np.append(gradient, -0.5 * noise * np.trace(outer))
        standard = (logs - means) / deviations
        loss = 0.5 * targets @ weights + np.log(np.diag(factor)).sum() + 0.5 * standard @ standard
        return float(loss), gradient + standard / deviations

    bounds = np.stack([means - 4.0 * deviations, means + 4.0 * deviations], axis=1)
    options = {"maxiter": MAX_STEPS}
    found = minimize(measure, means, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return np.exp(found.x[:-1]), math.exp(found.x[-1])


def rank_targets(trials: Sequence[Seen], rung: int) -> dict[int, float]:
    """Return the normal scores of the ranks at a rung by the trial's index.

    The trials that ended before the rung rank below all that reached it: those at a high rung are a
    selection, and among themselves half of them would look bad. Equal scores, such as those of
    diverged trials, have the lowest of their ranks.
    """
    reached = [i for i, trial in enumerate(trials) if rung in trial.scores]
    if not reached:
        return {}
    num_out = sum(not trial.is_running and rung not in trial.scores for trial in trials)
    scores = np.array([trials[i].scores[rung] for i in reached])
    num_below = num_out + np.searchsorted(np.sort(scores), scores)
    targets = ndtri((num_below + 0.5) / (num_out + len(reached)))
    return dict(zip(reached, targets.tolist(), strict=True))


def _correlate(a: Array, b: Array) -> Array:
    """Return the kernel's covariance (a, b) of inputs divided by their length scales.

    In place, which takes half the time: millions of numbers do not fit into a cache.
    """
    squares: Array = a @ b.T
    squares *= -2.0
    squares += (a**2).sum(axis=1)[:, None]
    squares += (b**2).sum(axis=1)
    np.maximum(squares, 0.0, out=squares)
    squares *= 5.0
    distances = np.sqrt(squares)
    squares /= 3.0
    squares += distances
    squares += 1.0
    np.negative(distances, out=distances)
    squares *= np.exp(distances, out=distances)
    return squares


def _mix(low: float, high: float, fractions: Array) -> Array:
    return low + (high - low) * fractions
