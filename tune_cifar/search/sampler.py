"""Proposals of trials: at random, by Optuna's TPE, by a Gaussian process or quasi-random.

A proposal depends only on the seed, the trial's number and the recorded trials before it: samplers
are made anew with (seed + number) for each trial, and trial n takes point n of a quasi-random
sequence. So a resumed search proposes what an uninterrupted one would have.

TPE learns from one rung at a time, the highest that LEAST_AT_RUNG trials have reached. Told all of
a search with early stopping, Optuna ranks complete trials before stopped ones and calls a tenth of
*all* trials good: a third of the complete ones, whose average it then models.

A knob that a trial's other values make inactive is not part of its proposal, and the sampler is
told nothing of it.

Trials of other searches that were learned are never drawn again at random, though these searches
may have had the same seed.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import optuna
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from tune_cifar.dataset import CIFAR10
from tune_cifar.record.events import Confirmation, Header, Origin
from tune_cifar.schema import Status, TrainConfig
from tune_cifar.search.gaussian_process import Seen, UnitCube, propose_by_gp
from tune_cifar.space.layout import MAX_TRIALS
from tune_cifar.space.select import SearchSpace

LEAST_AT_RUNG = 10
"""Scores with which a rung is high enough for TPE to learn from it alone."""
# The largest seed that Optuna's samplers take (numpy's). A trial's is (seed + number).
MAX_SAMPLER_SEED = 2**32 - 1
# Times that values are drawn at random until they are no learned trial's.
MAX_DRAWS = 10


class Proposal(NamedTuple):
    """Searched values of a trial (of a confirmation: candidate and seed), origin, and recipe."""

    params: dict[str, Any]
    origin: Origin
    config: TrainConfig


class PastTrial(Protocol):
    """The part of a recorded trial (record.TrialState) that the sampler reads."""

    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def status(self) -> Status: ...
    @property
    def scores(self) -> dict[int, float]: ...


class Confirmer:
    """Proposes a confirmation's trials, which its header lists."""

    def __init__(self, confirmation: Confirmation) -> None:
        self._confirmation = confirmation

    def propose(self, number: int, trials: Collection[PastTrial]) -> Proposal:
        """Return the trial of this number; those before it do not count."""
        candidate, seed = self._confirmation.find(number)
        config = TrainConfig(**{**candidate.config, "seed": seed})
        return Proposal({"candidate": candidate.run_id, "seed": seed}, "confirm", config)


class Sampler:
    """Proposes trials: the baseline, the space's points, then those of the budget's sampler.

    Args:
        space: distributions, baseline, points and the sampler's kind.
        seed: of the proposals.
        is_conditional: leave inactive knobs out; False for a search whose record has them.
        learned: ended trials of other searches, of this very space; they come before all others.

    Raises:
        ConfigError: when all knobs of the space are pinned.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int,
        is_conditional: bool = True,
        learned: Sequence[PastTrial] = (),
        chance: float = CIFAR10.chance,
    ) -> None:
        space.check_searchable()
        self._space = space
        self._seed = seed
        self._is_conditional = is_conditional
        self._learned = learned
        self._chance = chance
        self._fixed = [space.baseline_params, *space.points]
        is_sequence = space.budget.sampler.kind == "qmc"
        self._sequence = _Sequence(space.distributions, seed) if is_sequence else None
        self._cube = UnitCube(space.distributions)

    def propose(self, number: int, trials: Collection[PastTrial]) -> Proposal:
        """Return the trial of this number, given those before it, in the order of their numbers."""
        params, origin = self.ask(number, trials)
        return Proposal(params, origin, self._space.config(params))

    def ask(self, number: int, trials: Collection[PastTrial] = ()) -> tuple[dict[str, Any], Origin]:
        """Return the values of a trial's searched knobs and their origin; see `propose`."""
        if number < len(self._fixed):
            origin: Origin = "point" if number else "baseline"
            return self._select_active(self._fixed[number]), origin
        known = [*self._learned, *trials]
        return self._select_active(self._draw(number, known)), "sampler"

    def _select_active(self, params: dict[str, Any]) -> dict[str, Any]:
        return self._space.select_active(params) if self._is_conditional else dict(params)

    def _draw(self, number: int, trials: Collection[PastTrial]) -> dict[str, Any]:
        """Return the sampler's values of all searched knobs, inactive ones included."""
        if self._sequence is not None:
            return self._sequence.point(number)
        seed, rungs, found = (
            self._seed + number,
            self._space.budget.rungs,
            self._space.budget.sampler,
        )
        if found.kind == "random" or _count_ended(trials, rungs) < found.startup:
            return self._draw_at_random(seed)
        if found.kind == "gp":
            seen = [_see(trial, rungs, self._chance) for trial in trials]
            return propose_by_gp(self._cube, seen, rungs, seed, self._select_active)
        study = make_study(self._make_tpe(seed))
        study.add_trials(self._freeze(trials, find_rung(trials, rungs)))
        return study.ask(self._space.distributions).params

    def _draw_at_random(self, seed: int) -> dict[str, Any]:
        """Return random values of all searched knobs; not those of a learned trial, if it can."""
        known = [trial.params for trial in self._learned]
        # No trial of this search has one of the further seeds.
        for each in range(seed, seed + MAX_DRAWS * MAX_TRIALS, MAX_TRIALS):
            params = make_study(RandomSampler(seed=each)).ask(self._space.distributions).params
            if self._select_active(params) not in known:
                break
        return params

    def _freeze(self, trials: Iterable[PastTrial], rung: int) -> list[FrozenTrial]:
        """Return what TPE learns from: the trials that reached the rung, and the running ones.

        A diverged trial counts as one with the accuracy of chance. Running trials count as bad, so
        that proposals spread.
        """
        frozen = []
        for trial in trials:
            score = self._chance if trial.status == "diverged" else trial.scores.get(rung)
            if score is None and trial.status != "running":
                continue
            state = TrialState.RUNNING if score is None else TrialState.COMPLETE
            distributions = {name: self._space.distributions[name] for name in trial.params}
            frozen.append(
                create_trial(
                    state=state, value=score, params=trial.params, distributions=distributions
                )
            )
        return frozen

    def _make_tpe(self, seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # Optuna 5's defaults: all knobs at once. With `group`, knobs that are active in the
            # same trials are drawn at once.
            return TPESampler(seed=seed, n_startup_trials=1, group=self._is_conditional)


def find_rung(trials: Iterable[PastTrial], rungs: Sequence[int]) -> int:
    """Return the highest rung that at least LEAST_AT_RUNG trials have reached, else the first."""
    reached = Counter(rung for trial in trials for rung in trial.scores)
    return next((rung for rung in reversed(rungs) if reached[rung] >= LEAST_AT_RUNG), rungs[0])


def _see(trial: PastTrial, rungs: Sequence[int], chance: float) -> Seen:
    """Return what the Gaussian process sees: a diverged trial has chance at all rungs it missed."""
    missing = chance if trial.status == "diverged" else None
    scores = {rung: trial.scores.get(rung, missing) for rung in rungs}
    known = {rung: score for rung, score in scores.items() if score is not None}
    return Seen(trial.params, known, trial.status == "running")


def _count_ended(trials: Iterable[PastTrial], rungs: Sequence[int]) -> int:
    """Return the number of trials that ended with a score: at a rung, or by diverging."""
    ended = [trial for trial in trials if trial.status != "running"]
    return sum(t.status == "diverged" or any(rung in t.scores for rung in rungs) for t in ended)


def list_distributions(header: Header) -> dict[str, BaseDistribution]:
    """Return the searched knobs of a recorded search and their ranges, in the file's order."""
    return {name: json_to_distribution(text) for name, text in header.distributions.items()}


def fit_point(space: SearchSpace, config: TrainConfig) -> dict[str, Any] | None:
    """Return a recipe's active values of the searched knobs.

    None when one is outside of its range, or an argument that its network does not have.
    """
    try:
        point = space.select_active({name: config.get(name) for name in space.distributions})
        distributions = {name: space.distributions[name] for name in point}
        create_trial(params=point, distributions=distributions, value=0.0)
    except (KeyError, ValueError):
        return None
    return point


class _Sequence:
    """The points of a scrambled Sobol sequence by number.

    They come from a study that is never told a result, so that point n depends on nothing else.
    Point 0 is not of the sequence (Optuna draws it at random to learn the space); trial 0 is the
    baseline and does not need it.
    """

    def __init__(self, distributions: dict[str, BaseDistribution], seed: int) -> None:
        self._distributions = distributions
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler = QMCSampler(
                qmc_type="sobol",
                scramble=True,
                seed=seed,
                independent_sampler=RandomSampler(seed=seed),
            )
        self._study = make_study(sampler)
        self._points: list[dict[str, Any]] = []

    def point(self, number: int) -> dict[str, Any]:
        while len(self._points) <= number:
            self._points.append(self._study.ask(self._distributions).params)
        return self._points[number]


def make_study(
    sampler: BaseSampler, storage: BaseStorage | None = None, name: str | None = None
) -> optuna.Study:
    """Create a study that maximises, by default in memory, without Optuna's log line."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            direction="maximize", sampler=sampler, storage=storage, study_name=name
        )
    finally:
        optuna.logging.set_verbosity(verbosity)
