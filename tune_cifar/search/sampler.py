"""What to try next: an in-memory Optuna study, rebuilt from the record whenever a search goes on.

A proposal depends only on the seed, the trial's number and what was told before: the sampler is seeded anew with
(seed + number) for each trial, and a quasi-random point is the sequence's number-th. So an interrupted search, its past
told again, proposes what an uninterrupted one would have.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import optuna
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import Trial, TrialState

from tune_cifar.record.events import Confirmation, Header, Origin
from tune_cifar.schema import CHANCE_ACCURACY, Status, TrainConfig
from tune_cifar.space.select import SearchSpace


class Proposal(NamedTuple):
    """What to try next: the searched knobs' values (of a confirmation, candidate and seed), and the whole recipe."""

    params: dict[str, Any]
    origin: Origin
    config: TrainConfig


class PastTrial(Protocol):
    """What the sampler needs of a recorded trial (record.TrialState)."""

    @property
    def number(self) -> int: ...
    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def status(self) -> Status: ...
    @property
    def score(self) -> float | None: ...
    @property
    def scores(self) -> dict[int, float]: ...


class Proposer(Protocol):
    """Whoever says what a search tries next."""

    def propose(self, number: int) -> Proposal:
        """Trial by trial, in the order of the numbers."""

    def tell(
        self, number: int, status: Status, rung_scores: dict[int, float], score: float | None
    ) -> None:
        """Hear how a trial ended."""


class Confirmer:
    """Proposes a confirmation's trials, which are settled from the start."""

    def __init__(self, confirmation: Confirmation) -> None:
        self._confirmation = confirmation

    def propose(self, number: int) -> Proposal:
        candidate, seed = self._confirmation.find(number)
        config = TrainConfig(**{**candidate.config, "seed": seed})
        return Proposal({"candidate": candidate.run_id, "seed": seed}, "confirm", config)

    def tell(
        self, number: int, status: Status, rung_scores: dict[int, float], score: float | None
    ) -> None:
        """Nothing to learn from it."""


class Sampler:
    """Proposes trial after trial, in the order of their numbers: the baseline, the space's points, then Optuna.

    Args:
        space: distributions, baseline, points and the sampler's kind.
        seed: of the proposals.
        history: the recorded trials of an interrupted search, running ones included; they are told again.

    Raises:
        ConfigError: when the space's pins left nothing to search.
    """

    def __init__(self, space: SearchSpace, seed: int, history: Iterable[PastTrial] = ()) -> None:
        space.check_searchable()
        self._space = space
        self._seed = seed
        self._study = make_study(RandomSampler(seed=seed))
        self._trials: list[Trial] = []
        self._fixed = [space.baseline_params, *space.points]
        self._sequence = (
            _Sequence(space.distributions, seed) if space.budget.sampler.kind == "qmc" else None
        )
        for trial in sorted(history, key=lambda trial: trial.number):
            self._start(trial.number, trial.params)
            if trial.status != "running":
                rungs = {
                    rung: trial.scores[rung] for rung in space.budget.rungs if rung in trial.scores
                }
                self.tell(trial.number, trial.status, rungs, trial.score)

    def propose(self, number: int) -> Proposal:
        """What `ask` says, with the whole recipe."""
        params, origin = self.ask(number)
        return Proposal(params, origin, self._space.config(params))

    def ask(self, number: int) -> tuple[dict[str, Any], Origin]:
        """The searched knobs of a trial and where the values come from.

        Args:
            number: of the trial; numbers come without a gap, from 0 or from the end of the history.
        """
        if number < len(self._fixed):
            return self._start(number, self._fixed[number]), "baseline" if number == 0 else "point"
        if self._sequence is not None:
            return self._start(number, self._sequence.point(number)), "sampler"
        self._study.sampler = self._make_sampler(self._seed + number)
        return self._start(number, None), "sampler"

    def tell(
        self, number: int, status: Status, rung_scores: dict[int, float], score: float | None
    ) -> None:
        """Let the sampler learn how a trial ended (see `find_outcome`).

        Args:
            rung_scores: val_acc by epoch of the rungs that the trial reached.
            score: val_acc of the last epoch of a complete trial.
        """
        trial = self._trials[number]
        outcome = find_outcome(status, rung_scores, score)
        for epoch, value in sorted(outcome.scores.items()):
            trial.report(value, step=epoch)
        self._study.tell(trial, outcome.value, outcome.state)

    def _start(self, number: int, params: dict[str, Any] | None) -> dict[str, Any]:
        """A new running trial of the study, with these values or with proposed ones."""
        if number != len(self._trials):
            raise ValueError(
                f"trials must be asked for in order: {len(self._trials)} comes next, got {number}"
            )
        if params is not None:
            self._study.enqueue_trial(params)
        trial = self._study.ask(self._space.distributions)
        self._trials.append(trial)
        return dict(trial.params)

    def _make_sampler(self, seed: int) -> BaseSampler:
        if self._space.budget.sampler.kind == "random":
            return RandomSampler(seed=seed)
        # Optuna 5's defaults are meant: all knobs at once, and running trials count as bad so that proposals spread.
        return TPESampler(seed=seed, n_startup_trials=self._space.budget.sampler.startup)


class Outcome(NamedTuple):
    """What Optuna is told of an ended trial: its state, a complete one's value, a pruned one's scores by epoch."""

    state: TrialState
    value: float | None
    scores: dict[int, float]


def find_outcome(status: Status, rung_scores: dict[int, float], score: float | None) -> Outcome:
    """What the sampler learns from how a trial ended.

    A stopped trial counts with its scores at the rungs; one that was cut before its first rung says nothing about its
    knobs and counts as little as a failed one. A diverged trial counts as a guesser, pruned before its first epoch:
    told as complete, it would rank before all stopped ones, and TPE would learn from it as from the best.
    """
    if status == "complete":
        return Outcome(TrialState.COMPLETE, score, {})
    if status == "diverged":
        return Outcome(TrialState.PRUNED, None, {0: CHANCE_ACCURACY})
    if status == "stopped" and rung_scores:
        return Outcome(TrialState.PRUNED, None, rung_scores)
    if status in ("failed", "stopped"):
        return Outcome(TrialState.FAIL, None, {})
    raise ValueError(f"a trial that is told must have ended, got {status}")


def list_distributions(header: Header) -> dict[str, BaseDistribution]:
    """The searched knobs of a recorded search and their ranges, in the space file's order."""
    return {name: json_to_distribution(text) for name, text in header.distributions.items()}


def fit_point(space: SearchSpace, params: dict[str, Any]) -> dict[str, Any] | None:
    """The values of the space's searched knobs out of a configuration's, or None when one lies outside of its range."""
    point = {name: params[name] for name in space.distributions}
    try:
        optuna.create_trial(params=point, distributions=space.distributions, value=0.0)
    except ValueError:
        return None
    return point


class _Sequence:
    """The points of a scrambled Sobol sequence by number: a study of its own that is only ever asked, so that point n
    does not depend on what became of the others. Point 0 is not of the sequence (Optuna draws it at random to learn
    the space); trial 0 is the baseline and never needs it."""

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
    """A study to be maximised, in memory unless a storage is given, made without Optuna's notice of it."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            direction="maximize", sampler=sampler, storage=storage, study_name=name
        )
    finally:
        optuna.logging.set_verbosity(verbosity)
