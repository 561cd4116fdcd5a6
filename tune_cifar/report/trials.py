"""Records as tidy tables, the trial that a run id or `--best` means, and what failed.

pandas is imported inside the functions that build tables: all else needs none of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tune_cifar.errors import TrackingError
from tune_cifar.record.journal import check_name
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.schema import EpochResult, TrainConfig
from tune_cifar.tracking.runs import read_trials
from tune_cifar.tracking.store import find_sqlite_file

if TYPE_CHECKING:
    import pandas as pd
from tune_cifar.tracking.store import translate_errors

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

# Fields of the schema by their type; a tuple is shown as text, what may be absent is NaN (floats) or NA.
DTYPES: dict[Any, str] = {int: "int64", float: "float64", float | None: "float64", bool: "boolean"}
KNOB_COLUMNS = {
    name: DTYPES.get(knob.annotation, "string") for name, knob in TrainConfig.model_fields.items()
}
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
} | KNOB_COLUMNS
CURVE_COLUMNS = {"search": "string", "trial": "int64", "run_id": "string", "cycle": "int64"} | {
    name: DTYPES[result.annotation] for name, result in EpochResult.model_fields.items()
}


def estimate_scatter(accuracy: float, num_images: int) -> float:
    """Standard deviation of a difference of two accuracies by the luck of the images alone: one accuracy p on n images
    has sqrt(p (1 - p) / n), the difference about 1.4 times that."""
    return float((2 * accuracy * (1 - accuracy) / num_images) ** 0.5)


def describe_gain(state: SearchState, best: TrialState) -> str:
    """The gain beside the noise of the validation set; and the best of many is chosen partly by luck."""
    if best.score is None or state.baseline_score is None:
        return "The baseline did not finish: no gain can be told."
    if best.origin == "baseline":
        return f"No trial beat the baseline ({100 * state.baseline_score:.2f} %): there is no gain."
    gain = 100 * (best.score - state.baseline_score)
    sd = 100 * estimate_scatter(best.score, best.config.val_size)
    verdict = "within" if abs(gain) <= 2 * sd else "beyond"
    return (
        f"gain over the baseline ({100 * state.baseline_score:.2f} %): {gain:+.2f} points, {verdict} twice the "
        f"{sd:.2f} points that {best.config.val_size} validation images alone scatter; one seed, best of "
        f"{state.counts['complete']}: an upper guess until it is confirmed over seeds"
    )


def load_trials(searches: Iterable[SearchState]) -> pd.DataFrame:
    """One row per trial: where it stands, how it ended, its competition group, then every knob of its configuration.

    `val_acc` is that of the last reported epoch; `score` is NaN unless the trial is complete (or diverged: chance);
    `train_seconds` sums its epochs; `ended_seq` orders the ends within a search.
    """
    return _make_frame(
        TRIAL_COLUMNS,
        [_make_row(state, trial) for state in searches for trial in state.trials.values()],
    )


def make_uploaded_trials(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """load_trials' table from what another store was told of trials: whole numbers, too, may be absent there."""
    return _make_frame(
        {name: dtype.replace("int64", "Int64") for name, dtype in TRIAL_COLUMNS.items()}, rows
    )


def load_curves(searches: Iterable[SearchState]) -> pd.DataFrame:
    """The long form: one row per reported epoch, with the length of its cycle and the fields of its EpochResult."""
    rows = [
        {"search": state.header.name, "trial": trial.number, "run_id": trial.run_id, "cycle": cycle}
        | dict(result)
        for state in searches
        for trial in state.trials.values()
        for cycle, result in trial.trained_epochs
    ]
    return _make_frame(CURVE_COLUMNS, rows)


def split_groups(trials: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """The competition groups of load_trials' table, each with its rows: complete trials by score, then the others by
    their last accuracy. CIFAR-10 before the stand-in, longer trainings before shorter ones."""
    ranked = (
        trials.assign(competes=(trials["status"] == "complete") & trials["score"].notna())
        .sort_values(
            ["competes", "val_acc", "search", "trial"], ascending=[False, False, True, True]
        )
        .drop(columns="competes")
    )
    groups = []
    for _, rows in ranked.groupby(list(GROUP_COLUMNS), sort=False):
        first = rows.iloc[0]
        group = {
            name: first[name] if TRIAL_COLUMNS[name] == "string" else int(first[name])
            for name in GROUP_COLUMNS
        }
        groups.append((group, rows.reset_index(drop=True)))
    return sorted(groups, key=lambda pair: _order_group(pair[0]))


def _order_group(group: dict[str, Any]) -> tuple[Any, ...]:
    sizes = (-group["epochs"], -group["train_size"], -group["val_size"])
    return (
        group["data"] != "cifar10",
        *sizes,
        group["split_hash"],
        group["data_digest"],
        group["fidelity"],
    )


def best_so_far(trials: pd.DataFrame) -> pd.DataFrame:
    """The course of each search, one row per ended trial in the order of the ends.

    Columns: search, trial, run_id, status, `order` (from 1 in each search), `epochs_spent` (of all trials ended so
    far), `score` (NaN unless complete), `best` (the highest so far, NaN before the first), `is_best` (set it).
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
    knobs = {
        name: str(value) if isinstance(value, tuple) else value for name, value in trial.full_config
    }
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
    }


def _make_frame(dtypes: dict[str, str], rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=list(dtypes)).astype(dtypes)


def load_uploaded_trials(tracking_uri: str, search: str) -> pd.DataFrame:
    """load_trials' table of one search as MLflow tells it, for where the record is not at hand.

    What MLflow is not told is absent: `train_seconds`, and the knobs without effect in a trial. `ended_seq` is the rank
    of the end.

    Raises:
        TrackingError: when MLflow cannot be reached or has no such search.
    """
    path = find_sqlite_file(tracking_uri)
    if path is not None and not path.exists():
        raise TrackingError(f"{path}: an MLflow database must be there, got none.")
    with translate_errors(f"{check_name(search)}: MLflow must tell its trials"):
        return make_uploaded_trials(read_trials(tracking_uri, search))
