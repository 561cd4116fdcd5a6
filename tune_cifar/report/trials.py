"""Recorded trials as tidy tables, and a search's gain in words.

pandas is imported inside the functions that build tables: describe_gain does not need it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tune_cifar.errors import TrackingError
from tune_cifar.record.journal import check_name
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.report.format import format_percent
from tune_cifar.schema import ARGUMENT, KNOBS, EpochResult, TrainConfig, inactive_knobs
from tune_cifar.search.goals import NUM_DEVIATIONS, estimate_scatter
from tune_cifar.tracking.address import find_sqlite_file
from tune_cifar.tracking.store import translate_errors
from tune_cifar.tracking.uploaded import read_trials

if TYPE_CHECKING:
    import pandas as pd


# Trials compete only with trials that agree in all of these.
GROUP_COLUMNS = (
    "data",
    "data_digest",
    "split_hash",
    "train_size",
    "val_size",
    "epochs",
    "fidelity",
)

# pandas' type of a field of the schema; a tuple is shown as text, a missing value is NaN or NA.
DTYPES: dict[Any, str] = {int: "int64", float: "float64", float | None: "float64", bool: "boolean"}
KNOB_COLUMNS = {
    name: DTYPES.get(knob.annotation, "string")
    for name, knob in TrainConfig.model_fields.items()
    if name in KNOBS
} | {"cutout_size": "Int64"}  # the one whole number that can be inactive, and then is missing
TRIAL_COLUMNS = {
    "search": "string",
    "space": "string",
    "kind": "string",
    "tier": "string",
    "fidelity": "string",
    "trial": "int64",
    "run_id": "string",
    "status": "string",
    "origin": "string",
    "epochs_done": "int64",
    "val_acc": "float64",
    "score": "float64",
    "train_seconds": "float64",
    "fingerprint": "string",
    "data": "string",
    "data_digest": "string",
    "split_hash": "string",
    "ended_seq": "Int64",
    "reason": "string",
    "node": "string",
} | KNOB_COLUMNS
CURVE_COLUMNS = {"search": "string", "trial": "int64", "run_id": "string", "stage": "int64"} | {
    name: DTYPES[result.annotation] for name, result in EpochResult.model_fields.items()
}


def describe_gain(state: SearchState, best: TrialState) -> str:
    """Return the best trial's gain over the baseline beside the noise of the validation set."""
    baseline = state.baseline_score
    if best.score is None or baseline is None:
        return "The baseline is not complete: the gain is unknown."
    if best.origin == "baseline":
        return f"No trial beat the baseline ({format_percent(baseline)}): there is no gain."
    gain = 100 * (best.score - baseline)
    num_images = best.config.val_size
    scatter = 100 * estimate_scatter(best.score, num_images)
    where = "within" if abs(gain) <= NUM_DEVIATIONS * scatter else "beyond"
    seeds = "one seed" if best.num_replicates == 1 else f"{best.num_replicates} seeds each"
    return (
        f"gain over the baseline ({format_percent(baseline)}): {gain:+.2f} points, {where} twice "
        f"the {scatter:.2f} points that {num_images} validation images alone scatter; {seeds}, "
        f"best of {state.counts['complete']}: an upper guess until it is confirmed over seeds"
    )


def load_trials(searches: Iterable[SearchState]) -> pd.DataFrame:
    """Return one row per trial: its search, how it ended, its data, then every knob.

    A knob that is inactive in a trial is missing there: it had no effect.
    `val_acc` is that of the last reported epoch. `score` is NaN unless the trial is complete (or
    diverged: chance); with replicates it is their mean. `train_seconds` is the sum over its epochs.
    `ended_seq` orders the ends of a search.
    """
    rows = [_make_row(state, trial) for state in searches for trial in state.trials.values()]
    return _make_frame(TRIAL_COLUMNS, rows)


def load_curves(searches: Iterable[SearchState]) -> pd.DataFrame:
    """Return one row per reported epoch: its trial, `stage` (length in epochs), its EpochResult."""
    rows = []
    for state in searches:
        for trial in state.trials.values():
            ids = {"search": state.header.name, "trial": trial.number, "run_id": trial.run_id}
            for stage, result in trial.trained_epochs:
                rows.append(ids | {"stage": stage} | dict(result))
    return _make_frame(CURVE_COLUMNS, rows)


def split_groups(trials: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Return the groups of trials that compare, each with its rows of load_trials' table.

    Within a group: complete trials by score, then the others by their last accuracy. CIFAR-10
    stands before synthetic data, longer trainings before shorter ones.
    """
    ranked = trials.assign(
        competes=(trials["status"] == "complete") & trials["score"].notna(),
        accuracy=find_accuracies(trials),
    )
    order = {"competes": False, "accuracy": False, "search": True, "trial": True}
    ranked = ranked.sort_values(list(order), ascending=list(order.values()))[trials.columns]
    groups = []
    for _, rows in ranked.groupby(list(GROUP_COLUMNS), sort=False):
        first = rows.iloc[0]
        group = {
            name: first[name] if TRIAL_COLUMNS[name] == "string" else int(first[name])
            for name in GROUP_COLUMNS
        }
        groups.append((group, rows.reset_index(drop=True)))
    return sorted(groups, key=lambda pair: _order_group(pair[0]))


def find_accuracies(trials: pd.DataFrame) -> pd.Series:
    """Return what tables show of each trial: the score if complete, else the last val_acc."""
    return trials["score"].where(trials["status"] == "complete", trials["val_acc"])


def _order_group(group: dict[str, Any]) -> tuple[Any, ...]:
    sizes = (-group["epochs"], -group["train_size"], -group["val_size"])
    names = (group["split_hash"], group["data_digest"], group["fidelity"])
    return group["data"] != "cifar10", *sizes, *names


def best_so_far(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the progress of each search, one row per ended trial in the order of the ends.

    Columns: `search`, `trial`, `run_id`, `status`, `order` (from 1 in each search), `epochs_spent`
    (of all trials that ended so far), `score` (NaN unless complete), `best` (the highest score so
    far, NaN before the first), `is_best` (whether this trial set it).
    """
    import pandas as pd

    ended = trials[trials["ended_seq"].notna()].sort_values("ended_seq")
    score = ended["score"].where(ended["status"] == "complete")
    search = pd.Categorical(ended["search"], categories=trials["search"].unique())
    table = ended[["search", "trial", "run_id", "status"]].assign(
        order=ended.groupby("search").cumcount() + 1,
        epochs_spent=ended.groupby("search")["epochs_done"].cumsum(),
        score=score,
        best=score.groupby(ended["search"]).cummax().groupby(ended["search"]).ffill(),
        position=search.codes,
    )
    before = table.groupby("search")["best"].shift()
    table["is_best"] = (table["score"].notna() & ~(table["score"] <= before)).astype("boolean")
    return table.sort_values(["position", "order"]).drop(columns="position").reset_index(drop=True)


def _make_row(state: SearchState, trial: TrialState) -> dict[str, Any]:
    header = state.header
    texts = {name: str(v) for name, v in trial.full_config if isinstance(v, tuple)}
    inactive = dict.fromkeys(inactive_knobs(trial.full_config))
    knobs = dict(trial.full_config) | texts | inactive | trial.full_config.arguments
    return knobs | {
        "search": header.name,
        "space": header.space,
        "kind": header.kind,
        "tier": header.tier,
        "fidelity": header.fidelity,
        "trial": trial.number,
        "run_id": trial.run_id,
        "status": trial.status,
        "origin": trial.origin,
        "epochs_done": trial.epochs_done,
        "val_acc": trial.val_acc,
        "score": trial.score,
        "train_seconds": sum(result.epoch_seconds for _, result in trial.trained_epochs),
        "fingerprint": trial.fingerprint,
        "data": header.data.name,
        "data_digest": header.data.digest,
        "split_hash": header.data.split_hash,
        "ended_seq": trial.ended_seq,
        "reason": trial.reason,
        "node": trial.node,
    }


def _make_frame(dtypes: dict[str, str], rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    # The arguments of networks of the user's own, each a column.
    arguments = sorted({name for row in rows for name in row if name.startswith(ARGUMENT)})
    table = pd.DataFrame(rows, columns=[*dtypes, *arguments])
    return table.astype(dtypes | dict.fromkeys(arguments, "object"))


def load_uploaded_trials(tracking_uri: str, search: str) -> pd.DataFrame:
    """Return load_trials' table of one search from MLflow, where the record is not available.

    MLflow does not hold `train_seconds`: they are missing, as inactive knobs are. `ended_seq` is
    the rank of the end.

    Raises:
        TrackingError: when MLflow cannot be reached or has no such search.
    """
    path = find_sqlite_file(tracking_uri)
    if path is not None and not path.exists():
        raise TrackingError(f"{path}: there is no MLflow database. Check `tracking_uri`.")
    # Integers may be missing there, too.
    dtypes = {name: dtype.replace("int64", "Int64") for name, dtype in TRIAL_COLUMNS.items()}
    with translate_errors(f"{check_name(search)}: reading its trials from MLflow"):
        return _make_frame(dtypes, read_trials(tracking_uri, search))
