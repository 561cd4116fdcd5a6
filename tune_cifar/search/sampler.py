"""Proposals of trials: an in-memory Optuna study, rebuilt from the record when a search is resumed.

A proposal depends only on the seed, the trial's number and the results before it: the sampler is
seeded anew with (seed + number) for each trial, and trial n takes point n of a quasi-random
sequence. So a resumed search, whose study is told the recorded trials, proposes what an
uninterrupted one would have.

A knob that a trial's other values make inactive is not part of its proposal, and the sampler is
told nothing of it.
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

# The largest seed that Optuna's samplers take (numpy's). A trial's is (seed + number).
MAX_SAMPLER_SEED = 2**32 - 1


class Proposal(NamedTuple):
    """Searched values of a trial (of a confirmation: candidate and seed), origin, and recipe."""

    params: dict[str, Any]
    origin: Origin
    config: TrainConfig


class PastTrial(Protocol):
    """The part of a recorded trial (record.TrialState) that the sampler reads."""

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
    """Proposes a search's trials."""

    def propose(self, number: int) -> Proposal:
        """Return the next trial; numbers come in order."""

    def tell(
        self, number: int, status: Status, rung_scores: dict[int, float], score: float | None
    ) -> None:
        """Take in how a trial ended."""


class Confirmer:
    """Proposes a confirmation's trials, which its header lists."""

    def __init__(self, confirmation: Confirmation) -> None:
        self._confirmation = confirmation

    def propose(self, number: int) -> Proposal:
        candidate, seed = self._confirmation.find(number)
        config = TrainConfig(**{**candidate.config, "seed": seed})
        return Proposal({"candidate": candidate.run_id, "seed": seed}, "confirm", config)

    def tell(
        self, number: int, status: Status, rung_scores: dict[int, float], score: float | None
    ) -> None:
        """Do nothing: the trials are fixed."""


class Sampler:
    """Proposes trials in the order of their numbers: the baseline, the space's points, Optuna's.

    Args:
        space: distributions, baseline, points and the sampler's kind.
        seed: of the proposals.
        history: the recorded trials of a resumed search, running ones included.
        is_conditional: leave inactive knobs out; False for a search whose record has them.

    Raises:
        ConfigError: when all knobs of the space are pinned.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int,
        history: Iterable[PastTrial] = (),
        is_conditional: bool = True,
    ) -> None:
        space.check_searchable()
        self._space = space
        self._seed = seed
        self._is_conditional = is_conditional
        self._random = RandomSampler(seed=seed)
        self._study = make_study(self._random)
        self._trials: list[Trial] = []
        self._fixed = [space.baseline_params, *space.points]
        is_sequence = space.budget.sampler.kind == "qmc"
        self._sequence = _Sequence(space.distributions, seed) if is_sequence else None
        rungs = space.budget.rungs
        for trial in sorted(history, key=lambda trial: trial.number):
            self._start(trial.number, trial.params)
            if trial.status != "running":
                scores = {rung: trial.scores[rung] for rung in rungs if rung in trial.scores}
                self.tell(trial.number, trial.status, scores, trial.score)

    def propose(self, number: int) -> Proposal:
        """Return what `ask` returns, with the full recipe."""
        params, origin = self.ask(number)
        return Proposal(params, origin, self._space.config(params))

    def ask(self, number: int) -> tuple[dict[str, Any], Origin]:
        """Return the values of a trial's searched knobs and their origin.

        Args:
            number: of the trial; numbers come without a gap, from 0 or from the end of the history.

        Raises:
            ValueError: when another number comes next.
        """
        if number < len(self._fixed):
            origin: Origin = "baseline" if number == 0 else "point"
            params = self._fixed[number]
        else:
            origin, params = "sampler", self._draw(number)
        return self._start(number, self._leave_out_inactive(params)), origin

    def tell(
        self, number: int, status: Status, rung_scores: dict[int, float], score: float | None
    ) -> None:
        """Tell the study how a trial ended, see `find_outcome`.

        Args:
            rung_scores: val_acc by epoch of the rungs that the trial reached.
            score: val_acc of the last epoch of a complete trial.
        """
        trial = self._trials[number]
        outcome = find_outcome(status, rung_scores, score)
        for epoch, value in sorted(outcome.scores.items()):
            trial.report(value, step=epoch)
        self._study.tell(trial, outcome.value, outcome.state)

    def _draw(self, number: int) -> dict[str, Any]:
        """Return the sampler's values of all searched knobs, inactive ones included.

        They come from a trial that counts as failed, from which nothing is learned: while a trial
        runs, Optuna reads all that was drawn for it, not what it was started with.
        """
        if self._sequence is not None:
            return self._sequence.point(number)
        self._study.sampler = self._make_sampler(self._seed + number)
        trial = self._study.ask(self._space.distributions)
        self._study.tell(trial, state=TrialState.FAIL)
        self._study.sampler = self._random
        return trial.params

    def _leave_out_inactive(self, params: dict[str, Any]) -> dict[str, Any]:
        return self._space.select_active(params) if self._is_conditional else params

    def _start(self, number: int, params: dict[str, Any]) -> dict[str, Any]:
        """Start a trial with these values; return them."""
        expected = len(self._trials)
        if number != expected:
            raise ValueError(f"trials must be asked for in order, {expected} next, got {number}.")
        self._study.enqueue_trial(params)
        distributions = self._space.distributions.items()
        trial = self._study.ask({name: found for name, found in distributions if name in params})
        self._trials.append(trial)
        return dict(trial.params)

    def _make_sampler(self, seed: int) -> BaseSampler:
        if self._space.budget.sampler.kind == "random":
            return RandomSampler(seed=seed)
        startup = self._space.budget.sampler.startup
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # Optuna 5's defaults: all knobs at once; running trials count as bad: proposals spread.
            # With `group`, knobs that are active in the same trials are drawn at once.
            return TPESampler(seed=seed, n_startup_trials=startup, group=self._is_conditional)


class Outcome(NamedTuple):
    """An ended trial for Optuna: state, a complete one's value, a pruned one's scores by epoch."""

    state: TrialState
    value: float | None
    scores: dict[int, float]


def find_outcome(status: Status, rung_scores: dict[int, float], score: float | None) -> Outcome:
    """Return what Optuna learns from how a trial ended.

    A stopped trial counts as pruned, with its scores at the rungs; before its first rung it says
    nothing about its knobs and counts as failed. A diverged trial counts as pruned at epoch 0 with
    the accuracy of chance: as a complete one it would rank before all pruned ones, and TPE would
    learn from it as from the best.

    Raises:
        ValueError: when the trial is still running.
    """
    if status == "complete":
        return Outcome(TrialState.COMPLETE, score, {})
    if status == "diverged":
        return Outcome(TrialState.PRUNED, None, {0: CHANCE_ACCURACY})
    if status == "stopped" and rung_scores:
        return Outcome(TrialState.PRUNED, None, rung_scores)
    if status in ("failed", "stopped"):
        return Outcome(TrialState.FAIL, None, {})
    raise ValueError(f"a trial must have ended before its outcome is told, got {status}.")


def list_distributions(header: Header) -> dict[str, BaseDistribution]:
    """Return the searched knobs of a recorded search and their ranges, in the file's order."""
    return {name: json_to_distribution(text) for name, text in header.distributions.items()}


def fit_point(space: SearchSpace, params: dict[str, Any]) -> dict[str, Any] | None:
    """Return the searched knobs' active values, or None when one is outside of its range."""
    point = space.select_active({name: params[name] for name in space.distributions})
    distributions = {name: space.distributions[name] for name in point}
    try:
        optuna.create_trial(params=point, distributions=distributions, value=0.0)
    except ValueError:
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
