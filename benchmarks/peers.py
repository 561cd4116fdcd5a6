"""What users would use instead, for simulated searches (lcbench.py): Ray Tune, Optuna, Syne Tune.

Each is its own library's code with the defaults of its documentation, told every epoch's score.
Syne Tune comes with the extra `peers`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from lcbench import NUM_EPOCHS, Lcbench, Search, Trial
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner

METRIC, TIME = "val_acc", "training_iteration"


class RandomConfigs:
    """Random configurations, each trained to its end."""

    def __init__(self, lcbench: Lcbench, seed: int) -> None:
        self._lcbench, self._seed, self._num_trials = lcbench, seed, 0

    def ask(self) -> Trial | None:
        (params,) = self._lcbench.draw(1, self._seed + self._num_trials)
        self._num_trials += 1
        return Trial(self._num_trials - 1, params)

    def report(self, number: int, stage: int, epoch: int, score: float) -> bool:
        return True


class FirstEpochs(RandomConfigs):
    """Random configurations for a few epochs; then the best `num_best` are trained to the end.

    Args:
        num_paid: epochs of the whole search, which settle how many configurations there are.
    """

    def __init__(
        self, lcbench: Lcbench, seed: int, num_paid: int, num_epochs: int = 3, num_best: int = 3
    ) -> None:
        super().__init__(lcbench, seed)
        left = num_paid - num_best * (NUM_EPOCHS - num_epochs)
        self._num_configs, self._num_epochs = max(num_best, left // num_epochs), num_epochs
        self._num_best = num_best
        self._tried: list[tuple[float, Trial]] = []
        self._started: dict[int, Trial] = {}
        self._finalists: list[Trial] | None = None

    def ask(self) -> Trial | None:
        if self._num_trials < self._num_configs:
            trial = super().ask()
            assert trial is not None
            self._started[trial.number] = trial
            return trial
        if len(self._tried) < self._num_configs:
            return None
        if self._finalists is None:
            best = sorted(self._tried, key=lambda each: -each[0])[: self._num_best]
            self._finalists = [trial for _, trial in best]
        if not self._finalists:
            return None
        params = self._finalists.pop(0).params
        self._num_trials += 1
        # It goes on from its first epochs, which are paid already.
        return Trial(self._num_trials - 1, params, first_epoch=self._num_epochs + 1)

    def report(self, number: int, stage: int, epoch: int, score: float) -> bool:
        if number >= self._num_configs or epoch < self._num_epochs:
            return True
        self._tried.append((score, self._started[number]))
        return False


class RayTune:
    """Ray Tune as its tutorial has it: ASHA's defaults, and OptunaSearch or random search."""

    def __init__(self, lcbench: Lcbench, seed: int, is_random: bool = False) -> None:
        from ray.tune.schedulers import AsyncHyperBandScheduler
        from ray.tune.search.optuna import OptunaSearch

        np.random.seed(seed % 2**32)
        self._scheduler = AsyncHyperBandScheduler(
            time_attr=TIME, metric=METRIC, mode="max", max_t=NUM_EPOCHS
        )
        self._random = RandomConfigs(lcbench, seed) if is_random else None
        space: Any = lcbench.distributions
        self._searcher = OptunaSearch(space=space, metric=METRIC, mode="max", seed=seed)
        self._trials: list[SimpleNamespace] = []

    def ask(self) -> Trial | None:
        number = len(self._trials)
        trial: Any = SimpleNamespace(trial_id=str(number))
        self._trials.append(trial)
        self._scheduler.on_trial_add(None, trial)
        if self._random is not None:
            return self._random.ask()
        params = self._searcher.suggest(trial.trial_id)
        assert params is not None
        return Trial(number, params)

    def report(self, number: int, stage: int, epoch: int, score: float) -> bool:
        trial: Any = self._trials[number]
        result = {METRIC: score, TIME: epoch}
        decision = self._scheduler.on_trial_result(None, trial, result)
        goes_on = bool(decision == "CONTINUE")
        if self._random is None:
            self._searcher.on_trial_result(trial.trial_id, result)
            if not goes_on:
                self._searcher.on_trial_complete(trial.trial_id, result)
        return goes_on


class Optuna:
    """Optuna's TPE with one of its pruners."""

    def __init__(self, lcbench: Lcbench, seed: int, pruner: BasePruner) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed)
        # Hyperband draws a trial's bracket by the name.
        self._study = optuna.create_study(
            study_name=str(seed), direction="maximize", sampler=sampler, pruner=pruner
        )
        self._distributions = lcbench.distributions
        self._trials: list[optuna.Trial] = []

    def ask(self) -> Trial:
        trial = self._study.ask(self._distributions)
        self._trials.append(trial)
        return Trial(len(self._trials) - 1, trial.params)

    def report(self, number: int, stage: int, epoch: int, score: float) -> bool:
        trial = self._trials[number]
        trial.report(score, epoch)
        if epoch == NUM_EPOCHS:
            self._study.tell(trial, score)
            return False
        if trial.should_prune():
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return False
        return True


class SyneTune:
    """One of Syne Tune's schedulers with its defaults: ASHA, BOHB or ASHACQR."""

    def __init__(self, lcbench: Lcbench, seed: int, name: str) -> None:
        from syne_tune import config_space
        from syne_tune.optimizer import baselines

        space = {}
        for key, found in lcbench.distributions.items():
            bounds: Any = found
            is_int = isinstance(bounds.low, int)
            kind = ("log" if bounds.log else "") + ("randint" if is_int else "uniform")
            space[key] = getattr(config_space, kind)(bounds.low, bounds.high)
        np.random.seed(seed % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._scheduler = getattr(baselines, name)(
                space,
                metric=METRIC,
                time_attr=TIME,
                max_t=NUM_EPOCHS,
                do_minimize=False,
                random_seed=seed % 2**31,
            )
        self._trials: list[Any] = []

    def ask(self) -> Trial:
        from syne_tune.backend.trial_status import Trial as SyneTrial

        number, now = len(self._trials), datetime.now()
        suggestion = self._scheduler.suggest()
        trial = SyneTrial(trial_id=number, config=suggestion.config, creation_time=now)
        self._trials.append(trial)
        self._scheduler.on_trial_add(trial)
        return Trial(number, suggestion.config)

    def report(self, number: int, stage: int, epoch: int, score: float) -> bool:
        trial, result = self._trials[number], {METRIC: score, TIME: epoch}
        if epoch == NUM_EPOCHS:
            self._scheduler.on_trial_complete(trial, result)
            return False
        return str(self._scheduler.on_trial_result(trial, result)) == "CONTINUE"


PEERS: dict[str, Callable[[Lcbench, int], Search]] = {
    "random": RandomConfigs,
    "Ray Tune: ASHA, OptunaSearch": RayTune,
    "Ray Tune: ASHA, random": partial(RayTune, is_random=True),
    "Optuna: TPE, Hyperband": partial(Optuna, pruner=HyperbandPruner(max_resource=NUM_EPOCHS)),
    "Optuna: TPE, Median": partial(Optuna, pruner=MedianPruner()),
    "Syne Tune: ASHA": partial(SyneTune, name="ASHA"),
    "Syne Tune: BOHB": partial(SyneTune, name="BOHB"),
    "Syne Tune: ASHACQR": partial(SyneTune, name="ASHACQR"),
}
# Made for the epochs that they may pay.
FIXED: dict[str, Callable[[Lcbench, int, int], Search]] = {"3 epochs, then the best 3": FirstEpochs}
