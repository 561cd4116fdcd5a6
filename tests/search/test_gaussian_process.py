"""The Gaussian process: places in the unit cube, targets, fit, prediction."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from tune_cifar.search.gaussian_process import (
    NUM_BOUNDING,
    NUM_FIRST,
    GaussianProcess,
    Seen,
    UnitCube,
    find_best,
    fit,
    propose_by_gp,
    rank_targets,
)
from tune_cifar.space.select import load_space

DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-3, 1.0, log=True),
    "dropout": FloatDistribution(0.0, 0.4),
    "width": IntDistribution(4, 20, step=2),
    "schedule": CategoricalDistribution(["constant", "onecycle", "step"]),
}


def test_a_number_lies_at_its_fraction_a_choice_in_its_cell_and_what_is_inactive_halfway() -> None:
    cube = UnitCube({**DISTRIBUTIONS, "only": FloatDistribution(0.3, 0.3)})
    proposals: list[dict[str, Any]] = [
        {"lr": 1e-3, "dropout": 0.4, "width": 12, "schedule": "constant", "only": 0.3},
        {"lr": 0.1, "schedule": "step"},
    ]
    places = [[0, 1, 0.5, 1 / 6, 0.5], [2 / 3, 0.5, 0.5, 5 / 6, 0.5]]
    assert cube.locate(proposals) == pytest.approx(np.array(places))


@pytest.mark.parametrize("name", ["s6", "s7", "s8", "s10"])
def test_every_place_is_read_as_values_of_the_space_and_located_again(name: str) -> None:
    distributions = load_space(name, "full").distributions
    cube, random = UnitCube(distributions), np.random.default_rng(0)
    corners = [np.zeros(len(distributions)), np.ones(len(distributions))]
    for place in [*random.random((50, len(distributions))), *corners]:
        params = cube.read(place)
        for knob, value in params.items():
            found = distributions[knob]
            assert found._contains(found.to_internal_repr(value)), (knob, value)
            assert type(value) is type(getattr(found, "low", value))
        again = cube.read(cube.locate([params])[0])
        assert again == pytest.approx(params) if name == "s7" else again.keys() == params.keys()


@pytest.mark.parametrize("name", ["s6", "s8"])
def test_a_snapped_place_is_that_of_what_is_read(name: str) -> None:
    cube = UnitCube(load_space(name, "full").distributions)
    places = np.random.default_rng(0).random((200, len(cube.distributions)))
    snapped = cube.snap(places)
    proposals = [cube.read(place) for place in places]
    assert cube.locate(proposals) == pytest.approx(snapped)
    for proposal, place in zip(proposals, snapped, strict=True):
        assert cube.read(place) == pytest.approx(proposal)


def test_what_was_tried_is_not_proposed_again_while_anything_is_left() -> None:
    """The same hyperparameters are the same training, bit for bit."""
    cube = UnitCube(
        {"width": IntDistribution(1, 3), "schedule": CategoricalDistribution(["constant", "step"])}
    )
    everything = [
        {"width": width, "schedule": schedule}
        for width in (1, 2, 3)
        for schedule in ("constant", "step")
    ]
    for left in everything:
        tried = [params for params in everything if params != left]
        seen = [Seen(params, {1: 0.1 * i}, is_running=i == 4) for i, params in enumerate(tried)]
        for seed in range(3):
            assert propose_by_gp(cube, seen, (1,), seed, dict) == left
    seen = [Seen(params, {1: 0.1 * i}, is_running=False) for i, params in enumerate(everything)]
    assert propose_by_gp(cube, seen, (1,), 0, dict) in everything


def test_choices_are_as_far_apart_as_the_ends_of_a_range() -> None:
    cube = UnitCube(DISTRIBUTIONS)
    base = {"lr": 1e-3, "dropout": 0.0, "width": 4, "schedule": "constant"}
    others: list[dict[str, Any]] = [{"schedule": "step"}, {"schedule": "onecycle"}, {"width": 20}]
    inputs = cube.encode(cube.locate([{**base, **other} for other in [{}, *others]]))
    assert np.linalg.norm(inputs[1:] - inputs[0], axis=1) == pytest.approx([1, 1, 1])


def test_the_fit_finds_the_input_that_matters_and_the_noise() -> None:
    random = np.random.default_rng(1)
    inputs = random.random((80, 3))
    targets = np.sin(6 * inputs[:, 1]) + 0.1 * random.standard_normal(80)
    lengths, noise = fit(inputs, targets)
    assert lengths[1] < 0.5 * min(lengths[0], lengths[2])
    assert 0.005 < noise < 0.05


def test_the_fit_ends_at_a_maximum_of_the_posterior() -> None:
    """No step away from where the fit ends raises the density by the textbook."""
    random = np.random.default_rng(2)
    inputs = random.random((30, 2))
    targets = np.cos(4 * inputs[:, 0]) + 0.2 * random.standard_normal(30)
    lengths, noise = fit(inputs, targets)
    best = measure_posterior(inputs, targets, lengths, noise)
    for factor in (0.8, 1.25):
        for axis in range(2):
            moved = lengths.copy()
            moved[axis] *= factor
            assert measure_posterior(inputs, targets, moved, noise) < best
        assert measure_posterior(inputs, targets, lengths, noise * factor) < best


def measure_posterior(inputs: Any, targets: Any, lengths: Any, noise: float) -> float:
    """Log density by the textbook: scipy's multivariate normal and the log-normal priors."""
    from scipy.stats import multivariate_normal, norm

    distances = np.linalg.norm((inputs[:, None] - inputs[None]) / lengths, axis=2) * math.sqrt(5)
    covariance = (1 + distances + distances**2 / 3) * np.exp(-distances)
    covariance += (noise + 1e-6) * np.eye(len(targets))
    centre = math.log(0.4) + 0.5 * math.log(inputs.shape[1])
    prior = norm(centre, 0.75).logpdf(np.log(lengths)).sum()
    prior += norm(math.log(0.05), 1.0).logpdf(math.log(noise))
    return float(multivariate_normal(np.zeros(len(targets)), covariance).logpdf(targets) + prior)


def test_predictions_pass_through_exact_observations_and_return_to_the_prior() -> None:
    inputs = np.array([[0.0], [0.5], [1.0]])
    targets = np.array([-1.0, 0.5, 1.0])
    process = GaussianProcess(inputs, targets, np.array([0.2]), 1e-6)
    means, deviations = process.predict(np.vstack([inputs, [[9.0]]]))
    assert means == pytest.approx([-1.0, 0.5, 1.0, 0.0], abs=1e-3)
    assert deviations == pytest.approx([0, 0, 0, 1], abs=1e-2)


def test_believing_a_running_trial_keeps_the_mean_and_removes_the_doubt() -> None:
    process = GaussianProcess(np.array([[0.0]]), np.array([1.0]), np.array([0.5]), 0.01)
    there = np.array([[0.4]])
    before, after = process.predict(there), process.believe(there).predict(there)
    assert after[0] == pytest.approx(before[0], abs=0.01)
    assert after[1] < 0.3 * before[1]


def test_believing_continues_the_process_as_if_it_had_been_made_with_all() -> None:
    process, lengths, noise = make_process(150)
    running = np.random.default_rng(8).random((5, 3))
    believed = process.believe(running)
    inputs, targets = make_observations(150)
    targets = np.append(targets, process.predict_means(running))
    anew = GaussianProcess(np.vstack([inputs, running]), targets, lengths, noise)
    there = np.random.default_rng(9).random((40, 3))
    for one, other in zip(believed.predict(there), anew.predict(there), strict=True):
        assert one == pytest.approx(other, abs=1e-9)


def make_observations(count: int) -> tuple[Any, Any]:
    random = np.random.default_rng(7)
    inputs = random.random((count, 3))
    return inputs, np.sin(5 * inputs[:, 0]) + inputs[:, 1] + 0.3 * random.standard_normal(count)


def make_process(count: int) -> tuple[GaussianProcess, Any, float]:
    lengths, noise = np.array([0.4, 0.8, 2.0]), 0.1
    return GaussianProcess(*make_observations(count), lengths, noise), lengths, noise


@pytest.mark.parametrize("count", [20, 400])  # fewer than bound a deviation, and more
def test_the_best_candidate_is_that_of_all_improvements_computed(count: int) -> None:
    """The bounds leave out only what cannot win."""
    from scipy.stats import norm

    process, _, _ = make_process(count)
    wins = 0
    for seed in range(20):
        candidates = np.random.default_rng(seed).random((500, 3))
        means, deviations = process.predict(candidates)
        target = np.sort(means)[-1 - 20 * seed]
        gains = (means - target) / deviations
        expected = deviations * (gains * norm.cdf(gains) + norm.pdf(gains))
        best = find_best(process, candidates, target)
        assert best == expected.argmax()
        bounds = process.bound_deviations(candidates, NUM_BOUNDING)
        assert (bounds >= deviations - 1e-12).all()
        wins += best not in np.argsort(-bounds)[:NUM_FIRST]
    assert wins, "the best of some lies beyond those of the widest bounds"


def test_those_that_ended_before_a_rung_rank_below_all_that_reached_it() -> None:
    def seen(scores: dict[int, float], is_running: bool = False) -> Seen:
        return Seen({}, scores, is_running)

    trials = [
        seen({1: 0.3}),
        seen({1: 0.2}),
        seen({1: 0.5, 3: 0.6}),
        seen({1: 0.4, 3: 0.7}),
        seen({1: 0.1}, is_running=True),
        seen({}, is_running=True),
    ]
    first, last = rank_targets(trials, 1), rank_targets(trials, 3)
    assert sorted(first, key=first.__getitem__) == [4, 1, 0, 3, 2]
    assert list(last) == [2, 3] and 0 < last[2] < last[3]
    assert rank_targets(trials, 9) == {}


def test_the_scale_of_the_scores_does_not_matter() -> None:
    """Nor that of a hyperparameter: nothing but the order of scores and the place in the range."""
    cube = UnitCube(DISTRIBUTIONS)
    random = np.random.default_rng(3)
    params = [cube.read(place) for place in random.random((20, 4))]
    scores = random.random(20)
    asked = []
    for scale in (1.0, 0.01):
        trials = [Seen(p, {1: s * scale}, False) for p, s in zip(params, scores, strict=True)]
        asked.append(propose_by_gp(cube, trials, (1, 3), 5, lambda found: found))
    assert asked[0] == asked[1]


def test_proposals_close_in_on_the_best() -> None:
    cube = UnitCube(DISTRIBUTIONS)

    def score(params: dict[str, Any]) -> float:
        loss = (math.log10(params["lr"]) + 1) ** 2 + 10 * (params["dropout"] - 0.1) ** 2
        return float(-loss - (params["schedule"] != "step") - 0.01 * abs(params["width"] - 10))

    random = np.random.default_rng(4)
    trials = [Seen(p, {3: score(p)}, False) for p in map(cube.read, random.random((8, 4)))]
    for number in range(25):
        params = propose_by_gp(cube, trials, (3,), number, lambda found: found)
        trials.append(Seen(params, {3: score(params)}, False))
    best = max(trials, key=lambda trial: trial.scores[3]).params
    assert best["schedule"] == "step" and 0.05 < best["lr"] < 0.2
