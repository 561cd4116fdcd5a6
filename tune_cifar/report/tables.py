"""The data of the figures, as tidy tables.

Every function takes a recorded search (or several, or an evaluation) and returns a DataFrame whose
columns its docstring names. Accuracies are fractions; NaN means that there is none. Complete
trials are compared by their score, all trials by the accuracy at the first rung, which every trial
reaches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import create_trial

from tune_cifar.record.state import SearchState, TrialState, describe_counts
from tune_cifar.report.trials import (
    best_so_far,
    load_curves,
    load_trials,
    split_groups,
)
from tune_cifar.schema import TrainConfig, inactive_knobs, label_data
from tune_cifar.search.goals import estimate_scatter
from tune_cifar.search.rungs import is_promoted, list_compared
from tune_cifar.search.sampler import list_distributions, make_study
from tune_cifar.space.reader import parse_recorded
from tune_cifar.space.select import describe_distribution, load_header
from tune_cifar.train.metrics import Evaluation
from tune_cifar.train.optim import schedule_steps

# The ends of a bootstrap interval, as percentiles.
INTERVAL = (5, 95)
# The best fraction of the trials, which is compared with all of them.
TOP_FRACTION = 0.25
# With fewer scored trials no importances are computed.
MIN_TRIALS_FOR_IMPORTANCES = 10


def list_rungs(state: SearchState) -> tuple[int, ...]:
    """Return a search's rungs in epochs; of a training or a confirmation its last epoch."""
    return tuple(state.header.budget.get("rungs", ())) or (int(state.header.baseline["epochs"]),)


def make_facts(state: SearchState) -> pd.DataFrame:
    """Return what was done and on what, one row per fact: `fact` and `value` in words."""
    header, budget, numerics = state.header, state.header.budget, state.header.numerics
    end, sampler = state.finished, budget.get("sampler") or {}
    launch = " of its last launch" if state.resumes else ""
    took = f"{end.reason}, after {end.wall_seconds / 60:.1f} minutes{launch}" if end else ""
    train_size, val_size = header.baseline["train_size"], header.baseline["val_size"]
    rungs = ", ".join(map(str, list_rungs(state)))
    promoted = f"about one of {budget.get('reduction_factor', 'all')} trials is promoted at a rung"
    processor = f"{numerics.device_name}, {numerics.precision}"
    facts = {
        "space": f"{header.space} ({header.tier})",
        "data": header.data.label or header.data.name,
        "images": f"{train_size:,} to train, {val_size:,} to validate",
        "rungs": f"{rungs} epochs, fidelity {header.fidelity}",
        "early stopping": promoted,
        "sampler": f"{sampler.get('kind', 'none')}, seed {header.seed}",
        "trials": f"{len(state.trials)}: {describe_counts(state.counts)}",
        "epochs trained": str(sum(trial.epochs_done for trial in state.trials.values())),
        "started": f"{header.created[:16].replace('T', ' ')} UTC",
        "ended": took or "not ended",
        "processor": f"{processor}, threads for each trial: {numerics.threads}",
        "command": header.command,
    }
    return pd.DataFrame(list(facts.items()), columns=["fact", "value"])


def make_knobs(state: SearchState) -> pd.DataFrame:
    """Return one row per searched knob.

    Columns: `knob`, `searched` (its range in the space file's words), `baseline`, and `best` (of
    the best complete trial, None without one). A knob that is inactive in one is None there.
    """
    best, baseline = state.best, TrainConfig(**state.header.baseline)
    inactive = inactive_knobs(baseline)
    rows = [
        (
            knob,
            describe_distribution(found),
            None if knob in inactive else baseline.get(knob),
            None if best is None else best.find_value(knob),
        )
        for knob, found in list_distributions(state.header).items()
    ]
    return pd.DataFrame(rows, columns=["knob", "searched", "baseline", "best"], dtype="object")


def make_history(state: SearchState) -> pd.DataFrame:
    """Return one row per ended trial in the order of the ends.

    Columns: those of `best_so_far`, and `wall_seconds` since the search started (the time between
    an interruption and a resume counts).
    """
    history = best_so_far(load_trials([state]))
    start = datetime.fromisoformat(state.header.created)
    seconds = []
    for number in history["trial"]:
        ended = state.trials[number].ended
        if ended is None:  # an old record has no times
            seconds.append(math.nan)
        else:
            seconds.append((datetime.fromisoformat(ended) - start).total_seconds())
    return history.assign(wall_seconds=seconds)


def make_histories(states: Iterable[SearchState]) -> pd.DataFrame:
    """Return `make_history` of several searches, one after another."""
    return pd.concat([make_history(state) for state in states], ignore_index=True)


def make_curves(state: SearchState) -> pd.DataFrame:
    """Return one row per trained epoch.

    Columns: those of `load_curves`, `epochs_trained` (from 1 in each trial, over all its stages),
    `replicate` (of its stage, from 0), and the trial's `status` and `origin`.
    """
    curves = load_curves([state])
    curves["epochs_trained"] = curves.groupby("trial").cumcount() + 1
    curves["replicate"] = curves.groupby(["trial", "stage", "epoch"]).cumcount()
    for name in ("status", "origin"):
        curves[name] = [getattr(state.trials[number], name) for number in curves["trial"]]
    return curves


def make_rung_scores(state: SearchState) -> pd.DataFrame:
    """Return one row per rung and trial that reached it.

    Columns: `rung` (epochs), `trial`, `order` of arrival (from 1), `score`, `cutoff` (the lowest
    score among those that it was compared with that is promoted) and `is_promoted` (by the rule
    alone: the baseline is promoted in any case; at the last rung no trial is).
    """
    budget = state.header.budget
    reduction, window = int(budget.get("reduction_factor", 2)), budget.get("window")
    rows = []
    rungs = list_rungs(state)
    for rung in rungs:
        arrivals = state.arrivals.get(rung, {})
        scores = list(arrivals.values())
        for order, (trial, score) in enumerate(arrivals.items(), 1):
            compared = list_compared(scores[:order], window)
            cutoff = sorted(compared, reverse=True)[math.ceil(len(compared) / reduction) - 1]
            promoted = rung != rungs[-1] and is_promoted(score, compared, reduction)
            rows.append((rung, trial, order, score, cutoff, promoted))
    return pd.DataFrame(rows, columns=["rung", "trial", "order", "score", "cutoff", "is_promoted"])


def make_rungs(state: SearchState) -> pd.DataFrame:
    """Return one row per rung.

    Columns: `rung` (epochs), `num_arrived`, `num_promoted` (that reached a later rung),
    `num_pairs` of trials that also have a final score, and `rank_correlation` (Spearman) of the
    scores here with it.

    Only complete trials have a final score, so the correlation is that of the better ones: a low
    one need not mean a bad rung. NaN with fewer than three pairs.
    """
    rungs = list_rungs(state)
    rows = []
    for i, rung in enumerate(rungs):
        here = state.arrivals.get(rung, {})
        later = {n for after in rungs[i + 1 :] for n in state.arrivals.get(after, {})}
        complete = [n for n in here if state.trials[n].status == "complete"]
        pairs = [(here[n], state.trials[n].score) for n in complete]
        num_promoted = len(later & set(here))
        rows.append((rung, len(here), num_promoted, len(pairs), _correlate_ranks(pairs)))
    columns = ["rung", "num_arrived", "num_promoted", "num_pairs", "rank_correlation"]
    return pd.DataFrame(rows, columns=columns)


def _correlate_ranks(pairs: list[tuple[float, float | None]]) -> float:
    table = pd.DataFrame(pairs, columns=["here", "final"], dtype="float64").rank()
    if len(table) < 3 or table["here"].nunique() == 1 or table["final"].nunique() == 1:
        return math.nan
    return float(table["here"].corr(table["final"]))


def make_slices(state: SearchState) -> pd.DataFrame:
    """Return one row per trial and searched knob.

    Columns: `knob`, `value` (None where the knob is inactive), `trial`, `status`, `origin`,
    `rung_score` (at the first rung; chance for a diverged trial) and `score` (NaN unless the trial
    is complete).
    """
    first = list_rungs(state)[0]
    rows = []
    for trial in state.trials.values():
        score = trial.score if trial.status == "complete" else None
        scores = (_score_at(trial, first), math.nan if score is None else score)
        for knob in state.header.distributions:
            rows.append(
                (knob, trial.find_value(knob), trial.number, trial.status, trial.origin, *scores)
            )
    columns = ["knob", "value", "trial", "status", "origin", "rung_score", "score"]
    dtypes = {"value": "object", "rung_score": "float64", "score": "float64"}
    return pd.DataFrame(rows, columns=columns).astype(dtypes)


def _score_at(trial: TrialState, rung: int) -> float:
    """Return a trial's score at a rung as the sampler would get it; NaN when it has none."""
    if rung in trial.scores:
        return trial.scores[rung]
    return trial.chance if trial.status == "diverged" else math.nan


def make_importances(state: SearchState, num_resamples: int = 100, seed: int = 0) -> pd.DataFrame:
    """Return one row per searched knob, the most important first.

    Optuna's PED-ANOVA on the accuracies at the first rung (Watanabe et al. 2023); a knob counts in
    the trials in which it is active. Knobs that the user pinned are not searched and not listed.

    Columns: `knob`, `importance` (how far its values in the best quarter of the trials differ from
    those in all; the importances sum to 1), and `low` and `high`, the 5th and 95th percentile over
    resampled trials. All are NaN with fewer than ten trials or when all scores are equal.
    """
    first, distributions = list_rungs(state)[0], list_distributions(state.header)
    scored = []
    for trial in state.trials.values():
        score, inactive = _score_at(trial, first), inactive_knobs(trial.full_config)
        active = [knob for knob in distributions if knob not in inactive]
        if set(trial.params) >= set(active) and not math.isnan(score):
            scored.append(({knob: trial.params[knob] for knob in active}, score))
    importances = _find_importances(scored, distributions)
    is_known = bool(importances) and not any(map(math.isnan, importances.values()))
    generator = np.random.default_rng(seed)
    resampled = []
    for _ in range(num_resamples if is_known else 0):
        sample = generator.integers(len(scored), size=len(scored))
        resampled.append(_find_importances([scored[i] for i in sample], distributions))
    rows = []
    for knob, importance in importances.items():
        values = [found[knob] for found in resampled if not math.isnan(found[knob])]
        low, high = np.percentile(values, INTERVAL) if values else (math.nan, math.nan)
        rows.append((knob, importance, float(low), float(high)))
    table = pd.DataFrame(rows, columns=["knob", "importance", "low", "high"])
    return table.sort_values("importance", ascending=False, kind="stable").reset_index(drop=True)


def _find_importances(
    scored: list[tuple[dict[str, Any], float]], distributions: dict[str, BaseDistribution]
) -> dict[str, float]:
    """Return every knob's importance from trials as (parameters, score); NaN when unknown."""
    unknown = dict.fromkeys(distributions, math.nan)
    if len(scored) < MIN_TRIALS_FOR_IMPORTANCES or len({score for _, score in scored}) < 2:
        return unknown
    study = make_study(optuna.samplers.RandomSampler())
    for params, score in scored:
        active = {knob: distributions[knob] for knob in params}
        study.add_trial(create_trial(params=params, value=score, distributions=active))
    evaluator = PedAnovaImportanceEvaluator(target_quantile=TOP_FRACTION)
    with warnings.catch_warnings():
        # A knob that is active in a single trial does not count there; the intervals tell.
        warnings.filterwarnings(
            "ignore", message="Some regimes for parameter", category=UserWarning
        )
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=True)
    is_known = sum(found.values()) > 0
    return {knob: found.get(knob, 0.0) for knob in distributions} if is_known else unknown


def make_schedules(configs: dict[str, TrainConfig]) -> pd.DataFrame:
    """Return one row per named configuration and step of its training.

    Columns: `name`, `step` (from 1), `epoch` (epochs before the step, as a fraction), `lr`,
    `momentum` (Adam's beta1).
    """
    rows = [
        (name, step + 1, step / config.num_steps_per_epoch, settings.lr, settings.momentum)
        for name, config in configs.items()
        for step, settings in enumerate(schedule_steps(config))
    ]
    return pd.DataFrame(rows, columns=["name", "step", "epoch", "lr", "momentum"])


def make_costs(states: Iterable[SearchState]) -> pd.DataFrame:
    """Return where epochs and seconds went: one row per search, stage and status of the trials.

    Columns: `search`, `stage` (its length in epochs), `status`, `trials`, `epochs`, `seconds` of
    training.
    """
    rows = [
        (state.header.name, stage, trial.status, trial.number, result.epoch_seconds)
        for state in states
        for trial in state.trials.values()
        for stage, result in trial.trained_epochs
    ]
    table = pd.DataFrame(rows, columns=["search", "stage", "status", "trial", "seconds"])
    groups = table.groupby(["search", "stage", "status"], sort=True)
    return groups.agg(
        trials=("trial", "nunique"), epochs=("trial", "size"), seconds=("seconds", "sum")
    ).reset_index()


def make_comparison(states: Iterable[SearchState]) -> pd.DataFrame:
    """Return searches beside each other, one row each; those whose trials compare stand together.

    Columns:
        group: what the trials have in common, in words.
        search, space, trials, complete: names, and numbers of trials.
        baseline, best: their scores.
        gain: best minus baseline, under one seed: an upper guess.
        scatter: standard deviation of such a difference from the validation images alone.
        published, measured: the source's accuracy, and on what, as the recorded space file says.
        epochs_trained, wall_seconds: of all trials; from the start to the last end.
    """
    by_name = {state.header.name: state for state in states}
    groups = split_groups(load_trials(by_name.values()))
    texts = [_describe_group(group) for group, _ in groups]
    rows = []
    for (group, trials), text in zip(groups, texts, strict=True):
        if texts.count(text) > 1:
            text += f", data {group['data_digest'][:6]}, split {group['split_hash'][:6]}"
        rows += [{"group": text} | _compare(by_name[name]) for name in trials["search"].unique()]
    accuracies = ["baseline", "best", "gain", "scatter", "published"]
    columns = ["group", "search", "space", "trials", "complete", *accuracies]
    table = pd.DataFrame(rows, columns=[*columns, "measured", "epochs_trained", "wall_seconds"])
    return table.astype(dict.fromkeys(accuracies, "float64"))


def _describe_group(group: dict[str, Any]) -> str:
    label = label_data(group["data"])
    data = f"{label}, " if label else ""
    epochs = f"{group['epochs']} epoch{'s' if group['epochs'] > 1 else ''}"
    sizes = f"{group['train_size']:,} images, {group['val_size']:,} to validate"
    return f"{data}{epochs} of {sizes}, fidelity {group['fidelity']}"


def _compare(state: SearchState) -> dict[str, Any]:
    """Return a search's row in make_comparison's table without the group."""
    header, baseline = state.header, state.baseline_score
    score = state.best.score if state.best is not None else None
    gain = scatter = None
    if score is not None:
        gain = None if baseline is None else score - baseline
        scatter = estimate_scatter(score, header.baseline["val_size"])
    published = parse_recorded(header.space_text, header.space).header.published
    return {
        "search": header.name,
        "space": header.space,
        "trials": len(state.trials),
        "complete": state.counts["complete"],
        "baseline": baseline,
        "best": score,
        "gain": gain,
        "scatter": scatter,
        "published": None if published is None else published.accuracy,
        "measured": None if published is None else published.measured,
        "epochs_trained": sum(trial.epochs_done for trial in state.trials.values()),
        "wall_seconds": make_history(state)["wall_seconds"].max(),
    }


def make_sources(spaces: Iterable[str], tested: pd.DataFrame) -> pd.DataFrame:
    """Return what the sources published beside what was measured on the test set after trainings as
    long as theirs, one row per space.

    Columns: `space`, `source`, `published`, `measured` (on what), `corrects` (what the baseline
    does differently), and of the tested trainings of the baseline and of the search's best trial
    `baseline_seeds`, `baseline_test`, `best_seeds`, `best_test` (means; NaN without any).

    Args:
        tested: analysis/ROWS.csv.
    """
    rows = []
    for space in spaces:
        header = load_header(space)
        row: dict[str, Any] = {
            "space": space,
            "source": header.source,
            "published": header.published.accuracy if header.published else math.nan,
            "measured": header.published.measured if header.published else "",
            "corrects": " ".join(header.corrects),
        }
        for part in ("baseline", "best"):
            accs = tested[(tested["space"] == space) & (tested["part"] == part)]["test_acc"]
            row[f"{part}_seeds"] = len(accs)
            row[f"{part}_test"] = float(accs.mean()) if len(accs) else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def make_confusions(evaluation: Evaluation) -> pd.DataFrame:
    """Return one row per pair of classes that was mixed up, the most frequent first.

    Columns: `labelled`, `taken_for`, `images`, `share` (of all images with the label).
    """
    names = evaluation.class_names
    rows = []
    for true, predicted in evaluation.confusion.nonzero().tolist():
        if true != predicted:
            number = int(evaluation.confusion[true, predicted])
            share = float(evaluation.confusion_shares[true, predicted])
            rows.append((names[true], names[predicted], number, share))
    table = pd.DataFrame(rows, columns=["labelled", "taken_for", "images", "share"])
    return table.sort_values("images", ascending=False, kind="stable").reset_index(drop=True)


def make_mistakes(evaluation: Evaluation) -> pd.DataFrame:
    """Return the most confident mistakes in words.

    Columns: `image` (its index among the evaluated images), `labelled`, `taken_for`, `confidence`.
    """
    names = evaluation.class_names
    rows = [
        (found.index, names[found.true], names[found.predicted], found.confidence)
        for found in evaluation.mistakes
    ]
    return pd.DataFrame(rows, columns=["image", "labelled", "taken_for", "confidence"])
