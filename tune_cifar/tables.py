"""What the figures of one search show, as tidy tables: the table first, the picture second.

Every function takes a recorded search and returns a DataFrame whose columns its docstring names. Accuracies are
fractions; NaN is "there is none". Trials are compared by what is comparable: complete trials by their score, all
trials by the accuracy at the first rung, which everyone reaches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution
from optuna.importance import PedAnovaImportanceEvaluator

from tune_cifar.fidelity import keep
from tune_cifar.optim import schedule_steps
from tune_cifar.record import SearchState, TrialState
from tune_cifar.results import best_so_far, load_curves, load_trials
from tune_cifar.sampler import list_distributions, make_study
from tune_cifar.schema import CHANCE_ACCURACY, TrainConfig

# Of a bootstrap interval: the ends in percent.
INTERVAL = (5, 95)
# The better trials, whose knobs are compared with those of all.
TOP_SHARE = 0.25


def list_rungs(state: SearchState) -> tuple[int, ...]:
    """The epochs after which a search judges its trials; of a training or a confirmation its last epoch alone."""
    return tuple(state.header.budget.get("rungs", ())) or (int(state.header.baseline["epochs"]),)


def make_history(state: SearchState) -> pd.DataFrame:
    """One row per ended trial in the order of the ends: the columns of `best_so_far`, and `wall_seconds` since the
    search began (the time between an interruption and a resume counts)."""
    history = best_so_far(load_trials([state]))
    begin = datetime.fromisoformat(state.header.created)
    ended = [state.trials[number].ended for number in history["trial"]]
    history["wall_seconds"] = [
        math.nan if text is None else (datetime.fromisoformat(text) - begin).total_seconds() for text in ended
    ]
    return history


def make_curves(state: SearchState) -> pd.DataFrame:
    """One row per trained epoch: the columns of `load_curves`, `epochs_paid` (from 1 in each trial, over all its
    cycles) and the trial's `status` and `origin`."""
    curves = load_curves([state])
    curves["epochs_paid"] = curves.groupby("trial").cumcount() + 1
    for name in ("status", "origin"):
        curves[name] = [getattr(state.trials[number], name) for number in curves["trial"]]
    return curves


def make_rung_scores(state: SearchState) -> pd.DataFrame:
    """One row per trial and rung that it reached, as the rule saw it: `rung` (epochs), `trial`, `order` of arrival
    (from 1), `score`, `cutoff` (the lowest score of those that had arrived by then with which a trial went on) and
    `goes_on` (by the rule alone: the baseline goes on in any case; after the last rung nobody does)."""
    reduction = int(state.header.budget.get("reduction_factor", 2))
    rows = []
    rungs = list_rungs(state)
    for rung in rungs:
        seen: list[float] = []
        for trial, score in state.arrivals.get(rung, {}).items():
            seen.append(score)
            cutoff = sorted(seen, reverse=True)[math.ceil(len(seen) / reduction) - 1]
            goes_on = rung != rungs[-1] and keep(score, seen, reduction)
            rows.append((rung, trial, len(seen), score, cutoff, goes_on))
    return pd.DataFrame(rows, columns=["rung", "trial", "order", "score", "cutoff", "goes_on"])


def make_rungs(state: SearchState) -> pd.DataFrame:
    """One row per rung: `rung` (epochs), `num_arrived`, `num_went_on` (to report at least one epoch more),
    `num_pairs` of trials that also have a final score, and `rank_correlation` (Spearman) of the scores here with it.

    Only survivors have a final score, so the correlation is that of the better part: a low one need not mean a bad
    rung. NaN with fewer than three pairs.
    """
    rungs = list_rungs(state)
    rows = []
    for i, rung in enumerate(rungs):
        here = state.arrivals.get(rung, {})
        further = [n for n in here if any(n in state.arrivals.get(later, {}) for later in rungs[i + 1 :])]
        pairs = [(score, state.trials[n].score) for n, score in here.items() if state.trials[n].status == "complete"]
        rows.append((rung, len(here), len(further), len(pairs), _correlate_ranks(pairs)))
    return pd.DataFrame(rows, columns=["rung", "num_arrived", "num_went_on", "num_pairs", "rank_correlation"])


def _correlate_ranks(pairs: list[tuple[float, float | None]]) -> float:
    table = pd.DataFrame(pairs, columns=["here", "final"], dtype="float64").rank()
    if len(table) < 3 or table["here"].nunique() == 1 or table["final"].nunique() == 1:
        return math.nan
    return float(table["here"].corr(table["final"]))


def make_slices(state: SearchState) -> pd.DataFrame:
    """One row per trial and searched knob: `knob`, `value` (as text for a choice), `trial`, `status`, `origin`,
    `rung_score` (at the first rung; chance for a diverged trial) and `score` (complete trials only)."""
    first = list_rungs(state)[0]
    rows = [
        {
            "knob": knob,
            "value": getattr(trial.whole, knob),
            "trial": trial.number,
            "status": trial.status,
            "origin": trial.origin,
            "rung_score": _score_at(trial, first),
            "score": trial.score if trial.status == "complete" and trial.score is not None else math.nan,
        }
        for trial in state.trials.values()
        for knob in state.header.distributions
    ]
    columns = ["knob", "value", "trial", "status", "origin", "rung_score", "score"]
    return pd.DataFrame(rows, columns=columns).astype({"rung_score": "float64", "score": "float64"})


def _score_at(trial: TrialState, rung: int) -> float:
    """A trial's score at a rung, as the sampler would be told it; NaN when it has none."""
    if rung in trial.scores:
        return trial.scores[rung]
    return CHANCE_ACCURACY if trial.status == "diverged" else math.nan


def make_importances(state: SearchState, num_resamples: int = 100, seed: int = 0) -> pd.DataFrame:
    """One row per searched knob, the most important first: `knob`, `importance` (how far its values in the best quarter
    of the trials differ from those in all, as shares of 1), and `low` and `high`, the 5th and 95th percentile over
    resampled trials.

    Optuna's PED-ANOVA on the accuracies at the first rung (Watanabe et al. 2023). NaN everywhere with fewer than ten
    trials or when nothing sets them apart. Knobs that the user pinned are not searched and not listed.
    """
    first, distributions = list_rungs(state)[0], list_distributions(state.header)
    told = [(trial.params, _score_at(trial, first)) for trial in state.trials.values()]
    told = [(params, score) for params, score in told if set(params) >= set(distributions) and not math.isnan(score)]
    shares = _find_importances(told, distributions)
    dice = np.random.default_rng(seed)
    resampled = [
        _find_importances([told[i] for i in dice.integers(len(told), size=len(told))], distributions)
        for _ in range(num_resamples if not math.isnan(next(iter(shares.values()), math.nan)) else 0)
    ]
    rows = []
    for knob, share in shares.items():
        values = [found[knob] for found in resampled if not math.isnan(found[knob])]
        low, high = np.percentile(values, INTERVAL) if values else (math.nan, math.nan)
        rows.append((knob, share, float(low), float(high)))
    table = pd.DataFrame(rows, columns=["knob", "importance", "low", "high"])
    return table.sort_values("importance", ascending=False, kind="stable").reset_index(drop=True)


def _find_importances(
    told: list[tuple[dict[str, Any], float]], distributions: dict[str, BaseDistribution]
) -> dict[str, float]:
    nothing = dict.fromkeys(distributions, math.nan)
    if len(told) < 10 or len({score for _, score in told}) < 2:
        return nothing
    study = make_study(optuna.samplers.RandomSampler())
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={knob: params[knob] for knob in distributions}, value=score, distributions=distributions
            )
            for params, score in told
        ]
    )
    evaluator = PedAnovaImportanceEvaluator(target_quantile=TOP_SHARE)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=True)
    total = sum(found.values())
    return {knob: found.get(knob, 0.0) for knob in distributions} if total > 0 else nothing


def make_schedules(configs: dict[str, TrainConfig]) -> pd.DataFrame:
    """One row per named configuration and step of its training: `name`, `step` (from 1), `epoch` (a fraction of
    epochs done before the step), `lr`, `momentum` (Adam's beta1)."""
    rows = [
        (name, step + 1, step / config.num_steps_per_epoch, settings.lr, settings.momentum)
        for name, config in configs.items()
        for step, settings in enumerate(schedule_steps(config))
    ]
    return pd.DataFrame(rows, columns=["name", "step", "epoch", "lr", "momentum"])


def make_costs(states: Iterable[SearchState]) -> pd.DataFrame:
    """Where epochs and seconds went: one row per search, cycle (its length in epochs) and fate of the trials: `search`,
    `cycle`, `status`, `trials`, `epochs`, `seconds` of training."""
    rows = [
        (state.header.name, cycle, trial.status, trial.number, result.epoch_seconds)
        for state in states
        for trial in state.trials.values()
        for cycle, result in trial.paid
    ]
    table = pd.DataFrame(rows, columns=["search", "cycle", "status", "trial", "seconds"])
    groups = table.groupby(["search", "cycle", "status"], sort=True)
    return groups.agg(trials=("trial", "nunique"), epochs=("trial", "size"), seconds=("seconds", "sum")).reset_index()
