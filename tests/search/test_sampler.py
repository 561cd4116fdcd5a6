"""Proposals of the sampler, what it learns, and that a resumed search proposes the same."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import optuna
import pytest

from tests.builders import PastTrial
from tune_cifar.errors import ConfigError
from tune_cifar.schema import Status, inactive_knobs
from tune_cifar.search.rungs import is_promoted
from tune_cifar.search.sampler import Sampler, find_outcome
from tune_cifar.space.layout import SamplerBudget
from tune_cifar.space.select import SearchSpace, load_space

KINDS = [
    SamplerBudget(kind="tpe", startup=5),
    SamplerBudget(kind="random"),
    SamplerBudget(kind="qmc"),
]


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


def end_trial(sampler: Sampler, past: PastTrial) -> None:
    """End a trial in a way that depends on its number, and store what a record would."""
    value = measure(past.params)
    past.status = ("complete", "stopped", "complete", "diverged", "failed", "stopped")[
        past.number % 6
    ]
    rungs = {1: value / 2}
    if past.status == "complete":
        rungs[3] = value
        past.scores = {1: value / 2, 2: value / 3, 3: value}
        past.score = value
    elif past.status == "stopped" and past.number % 12 == 5:
        rungs = {}  # cut before its first rung
    elif past.status == "stopped":
        past.scores = {1: value / 2, 2: value / 3}
    else:
        rungs, past.score = {}, 0.1 if past.status == "diverged" else None
    sampler.tell(past.number, past.status, rungs, past.score)


def run_search(sampler: Sampler, trials: list[PastTrial], until: int) -> None:
    """Run up to `until` trials, three at once; they end out of order, the second oldest first."""
    while len(trials) < until:
        params, _ = sampler.ask(len(trials))
        trials.append(PastTrial(len(trials), params))
        running = [trial for trial in trials if trial.status == "running"]
        if len(running) > 3:
            end_trial(sampler, running[1])


@pytest.mark.parametrize(("name", "is_conditional"), [("s10", True), ("s8", True), ("s8", False)])
@pytest.mark.parametrize("budget", KINDS, ids=lambda budget: budget.kind)
def test_rebuilt_sampler_proposes_what_the_uninterrupted_one_does(
    budget: SamplerBudget, name: str, is_conditional: bool
) -> None:
    """With s8 some of the trials that run at the interruption leave out knobs."""
    space = make_space(budget, name)

    def make(history: Iterable[PastTrial] = ()) -> Sampler:
        return Sampler(space, 7, history, is_conditional)

    uninterrupted: list[PastTrial] = []
    run_search(make(), uninterrupted, 40)
    for num_first in (9, 19, 28):
        first: list[PastTrial] = []
        run_search(make(), first, num_first)
        assert [trial.status for trial in first].count("running") == 3
        run_search(make(reversed(first)), first, 40)
        assert [trial.params for trial in first] == [trial.params for trial in uninterrupted]


class OptunaAlone:
    """A search's proposals by Optuna's own samplers, asked for all knobs of the space at once."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space, self._seed, self._trials = space, seed, []  # type: ignore[var-annotated]
        self._study = optuna.create_study(direction="maximize")

    def ask(self, number: int) -> tuple[dict[str, Any], str]:
        found = self._space.budget.sampler
        seed = self._seed + number
        self._study.sampler = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=found.startup)
            if found.kind == "tpe"
            else optuna.samplers.RandomSampler(seed=seed)
        )
        if number == 0:
            self._study.sampler = optuna.samplers.RandomSampler(seed=seed)
            self._study.enqueue_trial(self._space.baseline_params)
        trial = self._study.ask(self._space.distributions)
        self._trials.append(trial)
        return trial.params, ""

    def tell(
        self, number: int, status: Status, rung_scores: dict[int, float], score: float | None
    ) -> None:
        outcome = find_outcome(status, rung_scores, score)
        for epoch, value in outcome.scores.items():
            self._trials[number].report(value, step=epoch)
        self._study.tell(self._trials[number], outcome.value, outcome.state)


@pytest.mark.parametrize(
    ("name", "tier", "is_conditional"),
    [("s10", "full", True), ("s7", "cpu", True), ("s8", "cpu", False)],
)
@pytest.mark.parametrize("budget", KINDS[:2], ids=lambda budget: budget.kind)
def test_proposals_are_optunas_for_all_knobs_where_none_is_inactive_and_for_old_records(
    budget: SamplerBudget, name: str, tier: str, is_conditional: bool
) -> None:
    space = load_space(name, tier)
    space = replace(space, points=(), budget=space.budget.model_copy(update={"sampler": budget}))
    ours: list[PastTrial] = []
    alone: list[PastTrial] = []
    run_search(Sampler(space, 7, (), is_conditional), ours, 30)
    run_search(OptunaAlone(space, 7), alone, 30)  # type: ignore[arg-type]
    assert [trial.params for trial in ours] == [trial.params for trial in alone]


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


@pytest.mark.parametrize("budget", KINDS[1:], ids=lambda budget: budget.kind)
def test_trainings_of_random_and_quasi_random_search_are_as_before(budget: SamplerBudget) -> None:
    space = make_space(budget, "s8")
    found = []
    for is_conditional in (True, False):
        sampler = Sampler(space, 7, (), is_conditional)
        found.append([sampler.propose(number).config.fingerprint for number in range(24)])
    assert found[0] == found[1]


def test_what_is_told_of_a_constant_schedule_does_not_move_onecycles_knobs() -> None:
    """The best trial is constant, with an idle pct_start of 0.05; under OneCycle it was 0.3."""
    space = make_space(KINDS[0], "s8", points=False)
    rest = {"max_lr": 0.01, "dropout": 0.1}
    shape = {"pct_start": 0.3, "div_factor": 10.0, "final_div_factor": 100.0}
    idle = {"pct_start": 0.05, "div_factor": 2.0, "final_div_factor": 1.0}
    onecycle = {"schedule": "onecycle", **rest, **shape}
    others = [PastTrial(n, onecycle, "complete", 0.3 + n / 100) for n in range(1, 22)]
    num_near = []
    for is_conditional in (True, False):
        told = {"schedule": "constant", **rest, **({} if is_conditional else idle)}
        history = [PastTrial(0, told, "complete", 0.9), *others]
        asked = [
            Sampler(space, 1000 * seed, history, is_conditional).ask(22)[0] for seed in range(20)
        ]
        num_near.append(sum(params.get("pct_start", 0.3) < 0.15 for params in asked))
    assert num_near[0] == 0 and num_near[1] >= 4


def test_tpe_does_not_repeat_itself_without_the_history() -> None:
    """The control of the test above: TPE's proposals do depend on what was told."""
    space = make_space(KINDS[0])
    trials: list[PastTrial] = []
    run_search(Sampler(space, seed=7), trials, 20)
    history = [PastTrial(trial.number, trial.params) for trial in trials[:-1]]
    blank = Sampler(space, seed=7, history=history)
    assert blank.ask(19)[0] != trials[19].params


@pytest.mark.parametrize("budget", KINDS, ids=lambda budget: budget.kind)
@pytest.mark.parametrize("name", ["s6", "s7", "s8", "s10", "s10_postact"])
def test_every_proposal_is_a_training_within_the_distributions(
    name: str, budget: SamplerBudget
) -> None:
    space = make_space(budget, name)
    sampler = Sampler(space, seed=1)
    for number in range(20):
        params, _ = sampler.ask(number)
        sampler.tell(number, "complete", {}, 0.5 + number / 100)
        config = space.config(params)
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
    asked = [sampler.ask(number) for number in range(5)]
    assert [origin for _, origin in asked] == ["baseline", "point", "point", "sampler", "sampler"]
    assert space.config(asked[0][0]) == space.baseline
    assert [params for params, _ in asked[1:3]] == list(space.points)


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


def test_tpe_learns_from_the_rung_scores_of_stopped_trials() -> None:
    """No trial completes; proposals still move to where the rung scores were high."""
    space = make_space(KINDS[0], points=False)
    sampler = Sampler(space, seed=0)
    dropouts = []
    for number in range(40):
        params, _ = sampler.ask(number)
        sampler.tell(number, "stopped", {1: 1 - params["dropout"]}, None)
        dropouts.append(params["dropout"])
    assert statistics.mean(dropouts[20:]) < 0.1 < statistics.mean(dropouts[1:6])


def test_trial_cut_before_its_first_rung_counts_as_little_as_a_failed_one() -> None:
    proposals = []
    ends: tuple[Status, ...] = ("stopped", "failed", "complete")
    for end in ends:
        sampler = Sampler(make_space(KINDS[0], points=False), seed=0)
        for number in range(20):
            params, _ = sampler.ask(number)
            status = "complete" if number % 2 == 0 else end
            sampler.tell(number, status, {}, params["dropout"] if status == "complete" else None)
        proposals.append(sampler.ask(20)[0])
    assert proposals[0] == proposals[1] != proposals[2]


def test_diverged_trials_drive_tpe_away() -> None:
    space = make_space(KINDS[0], points=False)
    sampler = Sampler(space, seed=0)
    outcomes: list[Status] = []
    for number in range(60):
        params, _ = sampler.ask(number)
        diverged = params["max_lr"] > 1e-3
        outcomes.append("diverged" if diverged else "complete")
        sampler.tell(number, outcomes[-1], {}, None if diverged else 0.5 + params["dropout"] / 10)
    assert outcomes[:15].count("diverged") > outcomes[45:].count("diverged")


def test_tpe_keeps_away_where_most_of_a_range_diverges() -> None:
    """Few trials pass three rungs; diverged ones must not be in TPE's best tenth."""
    num_diverged = 0
    for seed in range(3):
        sampler = Sampler(make_space(KINDS[0], points=False), 1000 * seed)
        found: dict[int, list[float]] = {1: [], 2: [], 3: []}
        for number in range(60):
            params, _ = sampler.ask(number)
            if number and params["max_lr"] > 3e-4:  # four fifths of the range
                sampler.tell(number, "diverged", {}, None)
                num_diverged += number >= 30
                continue
            value, scores = measure(params), {}
            for rung, passed in found.items():
                scores[rung] = value
                passed.append(value)
                if not is_promoted(value, passed, 3):
                    break
            is_complete = len(scores) == 3
            status: Status = "complete" if is_complete else "stopped"
            sampler.tell(number, status, scores, value if is_complete else None)
    assert num_diverged < 45, "of 90, half"


@pytest.mark.slow
def test_tpe_beats_random_search_on_a_known_function() -> None:
    """Median over 20 seeds of the best of 40 trials, with the baseline (below both medians)."""
    best: dict[str, list[float]] = {"tpe": [], "random": []}
    for budget in KINDS[:2]:
        space = make_space(budget, points=False)
        for seed in range(20):
            sampler = Sampler(space, 1000 * seed)
            values = []
            for number in range(40):
                params, _ = sampler.ask(number)
                values.append(measure(params))
                sampler.tell(number, "complete", {}, values[-1])
            best[budget.kind].append(max(values))
    assert values[0] < statistics.median(best["random"]) < statistics.median(best["tpe"])


def test_trials_must_be_asked_for_in_order() -> None:
    sampler = Sampler(make_space(KINDS[1]), seed=0)
    with pytest.raises(ValueError, match="0 next, got 1"):
        sampler.ask(1)


def test_history_with_a_gap_is_refused() -> None:
    space = make_space(KINDS[1])
    history = [PastTrial(number, space.baseline_params) for number in (0, 2)]
    with pytest.raises(ValueError, match="1 next, got 2"):
        Sampler(space, 0, history)


def test_running_trial_cannot_be_told() -> None:
    sampler = Sampler(make_space(KINDS[1]), seed=0)
    sampler.ask(0)
    with pytest.raises(ValueError, match="must have ended before its outcome is told, got running"):
        sampler.tell(0, "running", {}, None)


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
