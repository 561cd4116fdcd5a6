"""What the figures of searches show, as tidy tables: the table first, the picture second.

Every function takes a recorded search (or several, or an evaluation) and returns a DataFrame whose columns its docstring
names. Accuracies are fractions; NaN is "there is none". Trials are compared by what is comparable: complete trials by
their score, all trials by the accuracy at the first rung, which everyone reaches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution
from optuna.importance import PedAnovaImportanceEvaluator

from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.report.trials import (
    best_so_far,
    estimate_scatter,
    load_curves,
    load_trials,
    split_groups,
)
from tune_cifar.schema import CHANCE_ACCURACY, TrainConfig, label_data
from tune_cifar.search.rungs import keep
from tune_cifar.search.sampler import list_distributions, make_study
from tune_cifar.space.reader import parse_space
from tune_cifar.space.select import describe_distribution, load_header
from tune_cifar.train.metrics import Evaluation
from tune_cifar.train.optim import schedule_steps

# Of a bootstrap interval: the ends in percent.
INTERVAL = (5, 95)
# The better trials, whose knobs are compared with those of all.
TOP_SHARE = 0.25


def list_rungs(state: SearchState) -> tuple[int, ...]:
    """The epochs after which a search judges its trials; of a training or a confirmation its last epoch alone."""
    return tuple(state.header.budget.get("rungs", ())) or (int(state.header.baseline["epochs"]),)


def make_facts(state: SearchState) -> pd.DataFrame:
    """What was done, on what: one row per fact, `fact` and `value` in words."""
    header, budget, numerics = state.header, state.header.budget, state.header.numerics
    counts = ", ".join(f"{count} {status}" for status, count in state.counts.items() if count)
    end, sampler = state.finished, budget.get("sampler") or {}
    facts = {
        "space": f"{header.space} ({header.tier})",
        "data": header.data.label or header.data.name,
        "images": f"{header.baseline['train_size']:,} to train, {header.baseline['val_size']:,} to validate",
        "rungs": f"{', '.join(map(str, list_rungs(state)))} epochs, fidelity {header.fidelity}",
        "early stopping": f"about one of {budget.get('reduction_factor', 'all')} goes on after a rung",
        "sampler": f"{sampler.get('kind', 'none')}, seed {header.seed}",
        "trials": f"{len(state.trials)}: {counts}",
        "epochs paid": str(sum(trial.epochs_done for trial in state.trials.values())),
        "begun": f"{header.created[:16].replace('T', ' ')} UTC",
        "ended": f"{end.reason}, after {end.wall_seconds / 60:.1f} minutes" if end else "not ended",
        "processor": f"{numerics.device_name}, {numerics.precision}, threads for each trial: {numerics.threads}",
        "command": header.command,
    }
    return pd.DataFrame(list(facts.items()), columns=["fact", "value"])


def make_knobs(state: SearchState) -> pd.DataFrame:
    """One row per searched knob: `knob`, `searched` (its range in the space file's words), `baseline`, and `best` of
    the best complete trial, None without one."""
    best = state.best
    rows = [
        (
            knob,
            describe_distribution(found),
            state.header.baseline[knob],
            best and best.params.get(knob),
        )
        for knob, found in list_distributions(state.header).items()
    ]
    return pd.DataFrame(rows, columns=["knob", "searched", "baseline", "best"], dtype="object")


def make_history(state: SearchState) -> pd.DataFrame:
    """One row per ended trial in the order of the ends: the columns of `best_so_far`, and `wall_seconds` since the
    search began (the time between an interruption and a resume counts)."""
    history = best_so_far(load_trials([state]))
    begin = datetime.fromisoformat(state.header.created)
    ended = [state.trials[number].ended for number in history["trial"]]
    history["wall_seconds"] = [
        math.nan if text is None else (datetime.fromisoformat(text) - begin).total_seconds()
        for text in ended
    ]
    return history


def make_histories(states: Iterable[SearchState]) -> pd.DataFrame:
    """`make_history` of several searches, one after another."""
    return pd.concat([make_history(state) for state in states], ignore_index=True)


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
        further = [
            n for n in here if any(n in state.arrivals.get(later, {}) for later in rungs[i + 1 :])
        ]
        pairs = [
            (score, state.trials[n].score)
            for n, score in here.items()
            if state.trials[n].status == "complete"
        ]
        rows.append((rung, len(here), len(further), len(pairs), _correlate_ranks(pairs)))
    return pd.DataFrame(
        rows, columns=["rung", "num_arrived", "num_went_on", "num_pairs", "rank_correlation"]
    )


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
            "value": getattr(trial.full_config, knob),
            "trial": trial.number,
            "status": trial.status,
            "origin": trial.origin,
            "rung_score": _score_at(trial, first),
            "score": trial.score
            if trial.status == "complete" and trial.score is not None
            else math.nan,
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
    told = [
        (params, score)
        for params, score in told
        if set(params) >= set(distributions) and not math.isnan(score)
    ]
    shares = _find_importances(told, distributions)
    dice = np.random.default_rng(seed)
    resampled = [
        _find_importances(
            [told[i] for i in dice.integers(len(told), size=len(told))], distributions
        )
        for _ in range(
            num_resamples if not math.isnan(next(iter(shares.values()), math.nan)) else 0
        )
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
                params={knob: params[knob] for knob in distributions},
                value=score,
                distributions=distributions,
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
    """Where epochs and seconds went: one row per search, cycle (its length in epochs) and status of the trials: `search`,
    `cycle`, `status`, `trials`, `epochs`, `seconds` of training."""
    rows = [
        (state.header.name, cycle, trial.status, trial.number, result.epoch_seconds)
        for state in states
        for trial in state.trials.values()
        for cycle, result in trial.trained_epochs
    ]
    table = pd.DataFrame(rows, columns=["search", "cycle", "status", "trial", "seconds"])
    groups = table.groupby(["search", "cycle", "status"], sort=True)
    return groups.agg(
        trials=("trial", "nunique"), epochs=("trial", "size"), seconds=("seconds", "sum")
    ).reset_index()


def make_comparison(states: Iterable[SearchState]) -> pd.DataFrame:
    """Searches beside each other, one row each; those whose trials compare have one `group` and stand together.

    Columns: `group` (in words, what the trials have alike), `search`, `space`, `trials`, `complete`, `baseline`,
    `best`, `gain` (the best of `complete` over the baseline, under one seed: an upper guess), `scatter` (standard
    deviation of such a difference by the validation images alone), `published` and `measured` (the source's accuracy,
    and on what: as the recorded space file has it), `epochs_paid`, `wall_seconds` (from the start to the last end).
    """
    by_name = {state.header.name: state for state in states}
    rows = [
        {"group": _describe_group(group)} | _compare(by_name[name])
        for group, trials in split_groups(load_trials(by_name.values()))
        for name in trials["search"].unique()
    ]
    columns = [
        "group",
        "search",
        "space",
        "trials",
        "complete",
        "baseline",
        "best",
        "gain",
        "scatter",
        "published",
    ]
    table = pd.DataFrame(rows, columns=[*columns, "measured", "epochs_paid", "wall_seconds"])
    return table.astype(
        dict.fromkeys(("baseline", "best", "gain", "scatter", "published"), "float64")
    )


def _describe_group(group: dict[str, Any]) -> str:
    label = label_data(group["data"])
    data = f"{label}, " if label else ""
    epochs = f"{group['epochs']} epoch{'s' if group['epochs'] > 1 else ''}"
    sizes = f"{group['train_size']:,} images, {group['val_size']:,} to validate"
    return f"{data}{epochs} of {sizes}, fidelity {group['fidelity']}"


def _compare(state: SearchState) -> dict[str, Any]:
    header, baseline, best = state.header, state.baseline_score, state.best
    published = parse_space(
        header.space_text, Path(f"{header.space}.yaml"), is_recorded=True
    ).header.published
    score = best.score if best is not None else None
    return {
        "search": header.name,
        "space": header.space,
        "trials": len(state.trials),
        "complete": state.counts["complete"],
        "baseline": baseline,
        "best": score,
        "gain": score - baseline if score is not None and baseline is not None else None,
        "scatter": estimate_scatter(score, header.baseline["val_size"])
        if score is not None
        else None,
        "published": published.accuracy,
        "measured": published.measured,
        "epochs_paid": sum(trial.epochs_done for trial in state.trials.values()),
        "wall_seconds": make_history(state)["wall_seconds"].max(),
    }


def make_sources(spaces: Iterable[str], tested: pd.DataFrame) -> pd.DataFrame:
    """What the sources published beside what was measured on the sealed test set after trainings as long as theirs.

    One row per space: `space`, `source`, `published`, `measured` (on what), `corrects` (what the baseline does
    otherwise), and of the tested trainings of its baseline and of its search's best `baseline_seeds`, `baseline_test`,
    `best_seeds`, `best_test` (means; NaN without any).

    Args:
        tested: analysis/ROWS.csv.
    """
    rows = []
    for space in spaces:
        header = load_header(space)
        row: dict[str, Any] = {
            "space": space,
            "source": header.source,
            "published": header.published.accuracy,
            "measured": header.published.measured,
            "corrects": " ".join(header.corrects),
        }
        for part in ("baseline", "best"):
            accs = tested[(tested["space"] == space) & (tested["part"] == part)]["test_acc"]
            row |= {
                f"{part}_seeds": len(accs),
                f"{part}_test": float(accs.mean()) if len(accs) else math.nan,
            }
        rows.append(row)
    return pd.DataFrame(rows)


def make_confusions(evaluation: Evaluation) -> pd.DataFrame:
    """One row per pair of classes that was mixed up, the most frequent first: `labelled`, `taken_for`, `images`,
    `share` (of all images with the label)."""
    names, counts = evaluation.class_names, evaluation.confusion
    rows = [
        (
            names[true],
            names[predicted],
            int(counts[true, predicted]),
            float(evaluation.confusion_shares[true, predicted]),
        )
        for true in range(len(names))
        for predicted in range(len(names))
        if true != predicted and counts[true, predicted]
    ]
    table = pd.DataFrame(rows, columns=["labelled", "taken_for", "images", "share"])
    return table.sort_values("images", ascending=False, kind="stable").reset_index(drop=True)


def make_mistakes(evaluation: Evaluation) -> pd.DataFrame:
    """The most confident mistakes in words: `image` (its place among the judged ones), `labelled`, `taken_for`,
    `confidence`."""
    names = evaluation.class_names
    rows = [
        (found.index, names[found.true], names[found.predicted], found.confidence)
        for found in evaluation.mistakes
    ]
    return pd.DataFrame(rows, columns=["image", "labelled", "taken_for", "confidence"])
