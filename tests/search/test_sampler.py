"""Proposals of the sampler, what it learns, and that a resumed search proposes the same."""

from __future__ import annotations

import logging
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna
import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from tests.builders import PastTrial
from tune_cifar.errors import ConfigError
from tune_cifar.schema import Status, inactive_knobs
from tune_cifar.search.rungs import is_promoted
from tune_cifar.search.sampler import Sampler
from tune_cifar.space.layout import SamplerBudget
from tune_cifar.space.select import SearchSpace, load_space

KINDS = [
    SamplerBudget(kind="tpe", startup=5),
    SamplerBudget(kind="random"),
    SamplerBudget(kind="qmc"),
    SamplerBudget(kind="gp", startup=5),
]
LEARNING = [KINDS[0], KINDS[3]]


def make_space(sampler: SamplerBudget, name: str = "s10", points: bool = True) -> SearchSpace:
    space = load_space(name, "cpu")
    budget = space.budget.model_copy(update={"sampler": sampler})
    return replace(space, budget=budget, points=space.points if points else ())


def measure(params: dict[str, Any]) -> float:
    """A smooth accuracy with its optimum away from the baseline of s10, at max_lr 5e-3."""
    params = {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4, **params}
    loss: float = 0.12 * (math.log10(params["max_lr"]) + 2.3) ** 2
    loss += 2 * (params["dropout"] - 0.1) ** 2
    loss += 2 * (params["pct_start"] - 0.25) ** 2
    loss += 0.02 * (math.log10(params["div_factor"]) - 1) ** 2
    return 0.8 - loss - 0.01 * (math.log10(params["final_div_factor"]) - 3) ** 2


def end_trial(trial: PastTrial) -> None:
    """End a trial in a way that depends on its number; its scores at rungs 1 and 3 are known."""
    value = measure(trial.params)
    ends: tuple[Status, ...]
    ends = ("complete", "stopped", "complete", "diverged", "failed", "stopped")
    trial.status = ends[trial.number % 6]
    if trial.status == "complete":
        trial.scores, trial.score = {1: value / 2, 2: value / 3, 3: value}, value
    elif trial.status == "diverged":
        trial.score = 0.1
    elif trial.status == "stopped" and trial.number % 12 != 5:  # else cut before its first rung
        trial.scores = {1: value / 2, 2: value / 3}


def run_search(sampler: Sampler, trials: list[PastTrial], until: int) -> None:
    """Run up to `until` trials, three at once; they end out of order, the second oldest first.

    The youngest of the running ones has passed its first rung.
    """
    while len(trials) < until:
        params, _ = sampler.ask(len(trials), trials)
        trials.append(PastTrial(len(trials), params))
        running = [trial for trial in trials if trial.status == "running"]
        running[-1].scores = {1: measure(params) / 2}
        if len(running) > 3:
            end_trial(running[1])


def end_all(
    sampler: Sampler, num_trials: int, score: Callable[[dict[str, Any]], float | None]
) -> list[PastTrial]:
    """Run trials one after another to their ends; without a score a trial diverges."""
    trials: list[PastTrial] = []
    for number in range(num_trials):
        params, _ = sampler.ask(len(trials), trials)
        found = score(params)
        scores = {} if found is None else {1: found, 3: found}
        status: Status = "diverged" if found is None else "complete"
        trials.append(PastTrial(number, params, status, found, scores))
    return trials


@pytest.mark.parametrize(("name", "is_conditional"), [("s10", True), ("s8", True), ("s8", False)])
@pytest.mark.parametrize("budget", KINDS, ids=lambda budget: budget.kind)
def test_a_proposal_depends_on_the_recorded_trials_alone(
    budget: SamplerBudget, name: str, is_conditional: bool
) -> None:
    """So a resumed search, with a new sampler, proposes what the uninterrupted one does."""
    space = make_space(budget, name)
    uninterrupted: list[PastTrial] = []
    run_search(Sampler(space, 7, is_conditional), uninterrupted, 40)
    for num_first in (9, 19, 28):
        first: list[PastTrial] = []
        run_search(Sampler(space, 7, is_conditional), first, num_first)
        assert [trial.status for trial in first].count("running") == 3
        run_search(Sampler(space, 7, is_conditional), first, 40)
        assert [trial.params for trial in first] == [trial.params for trial in uninterrupted]


@pytest.mark.parametrize(
    ("name", "tier", "is_conditional"),
    [("s10", "full", True), ("s7", "cpu", True), ("s8", "cpu", True), ("s8", "cpu", False)],
)
def test_tpe_is_optunas_told_of_the_highest_rung_that_ten_trials_have_reached(
    name: str, tier: str, is_conditional: bool
) -> None:
    space = load_space(name, tier)
    changes = {"sampler": KINDS[0], "rungs": (1, 3)}
    space = replace(space, points=(), budget=space.budget.model_copy(update=changes))
    sampler = Sampler(space, 7, is_conditional)
    trials: list[PastTrial] = []
    run_search(sampler, trials, 40)
    told_rungs = set()
    for number in range(20, 40):
        before = trials[:number]
        num_at_last = sum(3 in trial.scores for trial in before)
        rung = 3 if num_at_last >= 10 else 1
        told_rungs.add(rung)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            tpe = optuna.samplers.TPESampler(
                seed=7 + number, n_startup_trials=1, group=is_conditional
            )
        study = optuna.create_study(direction="maximize", sampler=tpe)
        for trial in before:
            score = 0.1 if trial.status == "diverged" else trial.scores.get(rung)
            if score is not None or trial.status == "running":
                is_running = score is None
                study.add_trial(
                    optuna.create_trial(
                        params=trial.params,
                        distributions={key: space.distributions[key] for key in trial.params},
                        value=score,
                        state=TrialState.RUNNING if is_running else TrialState.COMPLETE,
                    )
                )
        asked = study.ask(space.distributions).params
        expected = space.select_active(asked) if is_conditional else asked
        assert sampler.ask(number, before)[0] == expected
    assert told_rungs == {1, 3}


@pytest.mark.parametrize("budget", KINDS, ids=lambda budget: budget.kind)
@pytest.mark.parametrize("name", ["s6", "s8"])
def test_inactive_knobs_are_left_out_of_baseline_points_and_proposals(
    name: str, budget: SamplerBudget
) -> None:
    space = make_space(budget, name)
    trials: list[PastTrial] = []
    run_search(Sampler(space, seed=7), trials, 24)
    schedules = {trial.params["schedule"] for trial in trials}
    assert schedules == set(space.distributions["schedule"].choices)  # type: ignore[attr-defined]
    for trial in trials:
        inactive = inactive_knobs(space.config(trial.params))
        assert list(trial.params) == [knob for knob in space.distributions if knob not in inactive]
    assert ("pct_start" in trials[0].params) == (space.baseline.schedule == "onecycle")


@pytest.mark.parametrize("budget", KINDS[1:3], ids=lambda budget: budget.kind)
def test_trainings_of_random_and_quasi_random_search_are_as_before(budget: SamplerBudget) -> None:
    space = make_space(budget, "s8")
    found = []
    for is_conditional in (True, False):
        sampler = Sampler(space, 7, is_conditional)
        found.append([sampler.propose(number, ()).config.fingerprint for number in range(24)])
    assert found[0] == found[1]


def test_what_is_told_of_a_constant_schedule_does_not_move_onecycles_knobs() -> None:
    """The best trial is constant, with an idle pct_start of 0.05; under OneCycle it was 0.3."""
    space = make_space(KINDS[0], "s8", points=False)
    rest = {"max_lr": 0.01, "dropout": 0.1}
    shape = {"pct_start": 0.3, "div_factor": 10.0, "final_div_factor": 100.0}
    idle = {"pct_start": 0.05, "div_factor": 2.0, "final_div_factor": 1.0}
    onecycle = {"schedule": "onecycle", **rest, **shape}
    others = [
        PastTrial(n, onecycle, "complete", scores={1: 0.3 + n / 100, 3: 0.3 + n / 100})
        for n in range(1, 22)
    ]
    num_near = []
    for is_conditional in (True, False):
        told = {"schedule": "constant", **rest, **({} if is_conditional else idle)}
        history = [PastTrial(0, told, "complete", scores={1: 0.9, 3: 0.9}), *others]
        asked = [
            Sampler(space, 1000 * seed, is_conditional).ask(22, history)[0] for seed in range(20)
        ]
        num_near.append(sum(params.get("pct_start", 0.3) < 0.15 for params in asked))
    assert num_near[0] == 0 and num_near[1] >= 4


@pytest.mark.parametrize("budget", LEARNING, ids=lambda budget: budget.kind)
def test_a_proposal_of_a_sampler_that_learns_depends_on_the_scores(budget: SamplerBudget) -> None:
    space = make_space(budget)
    trials: list[PastTrial] = []
    run_search(Sampler(space, seed=7), trials, 20)
    asked = Sampler(space, seed=7).ask(20, trials)[0]
    for trial in trials:
        trial.scores = {rung: 0.5 - value / 2 for rung, value in trial.scores.items()}
    assert Sampler(space, seed=7).ask(20, trials)[0] != asked


@pytest.mark.parametrize("budget", KINDS, ids=lambda budget: budget.kind)
@pytest.mark.parametrize("name", ["s6", "s7", "s8", "s10", "s10_postact"])
def test_every_proposal_is_a_training_within_the_distributions(
    name: str, budget: SamplerBudget
) -> None:
    space = make_space(budget, name)
    for number, trial in enumerate(end_all(Sampler(space, seed=1), 20, lambda params: 0.5)):
        params, config = trial.params, space.config(trial.params)
        assert trial.number == number
        assert all(getattr(config, knob) == value for knob, value in params.items())
        for knob in params:
            found = space.distributions[knob]
            low, high = getattr(found, "low", 0), getattr(found, "high", 0)
            if hasattr(found, "choices"):
                assert params[knob] in found.choices
            else:
                assert low <= params[knob] <= high


@pytest.mark.parametrize("budget", KINDS, ids=lambda budget: budget.kind)
def test_baseline_comes_first_then_the_points_then_the_sampler(budget: SamplerBudget) -> None:
    space = make_space(budget, "s7")
    sampler = Sampler(space, seed=0)
    asked = [sampler.ask(number) for number in range(6)]
    assert [origin for _, origin in asked] == ["baseline", *["point"] * 3, "sampler", "sampler"]
    assert space.config(asked[0][0]) == space.baseline
    points = [space.select_active(point) for point in space.points]
    assert [params for params, _ in asked[1:4]] == points


@pytest.mark.parametrize("budget", KINDS, ids=lambda budget: budget.kind)
def test_seed_decides_the_proposals(budget: SamplerBudget) -> None:
    space = make_space(budget)
    proposals = []
    for seed in (0, 0, 1):
        trials: list[PastTrial] = []
        run_search(Sampler(space, seed), trials, 12)
        proposals.append([trial.params for trial in trials])
    assert proposals[0] == proposals[1]
    assert all(a != b for a, b in zip(proposals[0][2:], proposals[2][2:], strict=True))


@pytest.mark.parametrize("budget", KINDS, ids=lambda budget: budget.kind)
def test_no_proposal_repeats_another(budget: SamplerBudget) -> None:
    trials: list[PastTrial] = []
    run_search(Sampler(make_space(budget), seed=3), trials, 40)
    assert len({tuple(trial.params.values()) for trial in trials}) == 40


def test_quasi_random_points_fill_every_dimension_evenly() -> None:
    """Of the first 32 points (trials 1 to 32) one lies in each 32nd of every axis."""
    space = make_space(KINDS[2], points=False)
    sampler = Sampler(space, seed=11)
    params = [sampler.ask(number)[0] for number in range(33)][1:]
    for knob in ("dropout", "pct_start"):
        found: Any = space.distributions[knob]
        cells = sorted(int(32 * (p[knob] - found.low) / (found.high - found.low)) for p in params)
        assert cells == list(range(32))


@pytest.mark.parametrize("budget", LEARNING, ids=lambda budget: budget.kind)
def test_samplers_learn_from_the_rung_scores_of_stopped_trials(budget: SamplerBudget) -> None:
    """No trial completes; proposals still move to where the rung scores were high."""
    sampler = Sampler(make_space(budget, points=False), seed=0)
    trials: list[PastTrial] = []
    for number in range(40):
        params, _ = sampler.ask(len(trials), trials)
        trials.append(PastTrial(number, params, "stopped", scores={1: 1 - params["dropout"]}))
    dropouts = [trial.params["dropout"] for trial in trials]
    assert statistics.mean(dropouts[20:]) < 0.1 < statistics.mean(dropouts[1:6])


@pytest.mark.parametrize("budget", LEARNING, ids=lambda budget: budget.kind)
def test_samplers_learn_from_running_trials_that_have_passed_a_rung(budget: SamplerBudget) -> None:
    space = make_space(budget, points=False)
    trials = end_all(Sampler(space, seed=0), 12, lambda params: 0.5 + params["dropout"])
    for trial in trials:
        trial.status, trial.scores = "stopped", {1: trial.scores[1]}
    low, high = (
        PastTrial(12, {**trials[5].params, "dropout": 0.0}, scores={1: score})
        for score in (0.2, 0.99)
    )
    asked = [Sampler(space, seed=0).ask(13, [*trials, each])[0] for each in (low, high)]
    assert asked[0] != asked[1]


@pytest.mark.parametrize("budget", LEARNING, ids=lambda budget: budget.kind)
def test_trial_cut_before_its_first_rung_counts_as_little_as_a_failed_one(
    budget: SamplerBudget,
) -> None:
    space = make_space(budget, points=False)
    trials = end_all(Sampler(space, seed=0), 20, lambda params: 0.5 + params["dropout"] / 10)
    ends: tuple[Status, ...] = ("stopped", "failed", "complete")
    asked = []
    for end in ends:
        scores = {1: 0.9, 3: 0.9} if end == "complete" else {}
        last = PastTrial(20, trials[3].params, end, scores=scores)
        asked.append(Sampler(space, seed=0).ask(21, [*trials, last])[0])
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize("budget", LEARNING, ids=lambda budget: budget.kind)
def test_diverged_trials_drive_samplers_away(budget: SamplerBudget) -> None:
    def score(params: dict[str, Any]) -> float | None:
        return None if params["max_lr"] > 1e-3 else 0.5 + params["dropout"] / 10

    trials = end_all(Sampler(make_space(budget, points=False), seed=0), 60, score)
    outcomes = [trial.status for trial in trials]
    assert outcomes[20:].count("diverged") < 12, "of 40; 24 by chance"


@pytest.mark.parametrize("budget", LEARNING, ids=lambda budget: budget.kind)
def test_samplers_keep_away_where_most_of_a_range_diverges(budget: SamplerBudget) -> None:
    """Few trials pass three rungs; diverged ones must not be among the best."""
    num_diverged = 0
    for seed in range(3):
        space = make_space(budget, points=False)
        rungs = space.budget.model_copy(update={"rungs": (1, 2, 3)})
        sampler = Sampler(replace(space, budget=rungs), 1000 * seed)
        found: dict[int, list[float]] = {1: [], 2: [], 3: []}
        trials: list[PastTrial] = []
        for number in range(60):
            params, _ = sampler.ask(len(trials), trials)
            if number and params["max_lr"] > 3e-4:  # four fifths of the range
                trials.append(PastTrial(number, params, "diverged", 0.1))
                num_diverged += number >= 30
                continue
            value, scores = measure(params), {}
            for rung, passed in found.items():
                scores[rung] = value
                passed.append(value)
                if not is_promoted(value, passed, 3):
                    break
            status: Status = "complete" if len(scores) == 3 else "stopped"
            trials.append(PastTrial(number, params, status, scores=scores))
    assert num_diverged < 45, "of 90, half"


@pytest.mark.slow
def test_samplers_that_learn_beat_random_search_on_a_known_function() -> None:
    """Median over 12 seeds of the best of 30 trials, with the baseline (below all medians)."""
    best: dict[str, list[float]] = {}
    for budget in (KINDS[1], *LEARNING):
        space = make_space(budget, points=False)
        for seed in range(12):
            trials = end_all(Sampler(space, 1000 * seed), 30, measure)
            values = [measure(trial.params) for trial in trials]
            best.setdefault(budget.kind, []).append(max(values))
    medians = {kind: statistics.median(found) for kind, found in best.items()}
    assert values[0] < medians["random"] < min(medians["tpe"], medians["gp"])


def test_space_whose_knobs_are_all_pinned_is_refused() -> None:
    pins = {
        "max_lr": 0.01,
        "dropout": 0.0,
        "pct_start": 0.3,
        "div_factor": 25,
        "final_div_factor": 10,
    }
    with pytest.raises(ConfigError, match="`settings` must leave a searched knob, got none"):
        Sampler(load_space("s10", "cpu", pins), seed=0)


@pytest.mark.parametrize("budget", KINDS, ids=lambda budget: budget.kind)
def test_optuna_says_nothing_and_keeps_its_verbosity(
    budget: SamplerBudget, capfd: pytest.CaptureFixture[str]
) -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.INFO)
    try:
        trials: list[PastTrial] = []
        run_search(Sampler(make_space(budget), seed=0), trials, 12)
        assert optuna.logging.get_verbosity() == logging.INFO
    finally:
        optuna.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")
