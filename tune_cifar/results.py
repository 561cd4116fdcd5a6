"""Records as tidy tables, and the trial that a run id or `--best` means.

pandas is imported inside the functions that build tables: finding a run needs none of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_cifar.errors import RecordError
from tune_cifar.record import NAME, SearchState, TrialState, list_searches, read_state, search_folder
from tune_cifar.schema import EpochResult, TrainConfig, nearest_name

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

# Trials compete only with trials that agree in all of these.
GROUP_COLUMNS = ("data", "data_digest", "split_hash", "train_size", "val_size", "epochs")

# Fields of the schema by their type; a tuple is shown as text, what may be absent is NaN (floats) or NA.
DTYPES: dict[Any, str] = {int: "int64", float: "float64", float | None: "float64", bool: "boolean"}
KNOB_COLUMNS = {name: DTYPES.get(knob.annotation, "string") for name, knob in TrainConfig.model_fields.items()}
TRIAL_COLUMNS = {
    "search": "string",
    "space": "string",
    "kind": "string",
    "tier": "string",
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
CURVE_COLUMNS = {"search": "string", "trial": "int64", "run_id": "string"} | {
    name: DTYPES[result.annotation] for name, result in EpochResult.model_fields.items()
}


def load_searches(storage: Path, space: str | None = None, search: str | None = None) -> list[SearchState]:
    """The recorded searches and single trainings, newest first. One that cannot be read is told in the log and left
    out, so that a damaged record does not hide the others.

    Args:
        space: only those of this space.
        search: only this one, by name.

    Raises:
        RecordError: when the named search is unknown, damaged or of another space.
    """
    folders = list_searches(storage)
    if search is not None:
        names = [folder.name for folder in folders]
        if search not in names:
            hint = nearest_name(search, names)
            raise RecordError(f"{storage}: a search of the name must be recorded, got {search!r}.{hint}")
        state = read_state(search_folder(storage, search))
        _check_space(state, space)
        return [state]
    states = []
    for folder in folders:
        try:
            states.append(read_state(folder))
        except RecordError as exc:
            logger.warning("left out: %s", exc)
    return [state for state in states if space in (None, state.header.space)]


def find_run(storage: Path, run_id: str) -> tuple[SearchState, TrialState]:
    """The trial that a run id such as `s10-cpu-1:7` names, with its search.

    Raises:
        RecordError: when the text is no run id, or no such trial is recorded.
    """
    match = re.fullmatch(rf"({NAME}):([0-9]{{1,9}})", run_id)
    if match is None:
        raise RecordError(f"run id: NAME:TRIAL such as s10-cpu-1:7 must be given, got {run_id!r}.")
    (state,) = load_searches(storage, search=match[1])
    trial = state.trials.get(int(match[2]))
    if trial is None:
        raise RecordError(f"{match[1]}: a trial of the search must be named, got {match[2]} of {len(state.trials)}.")
    return state, trial


def find_best(
    states: Iterable[SearchState], space: str | None = None, search: str | None = None
) -> tuple[SearchState, TrialState]:
    """The complete trial of the highest score in the newest finished search (of the space) on CIFAR-10, or in the
    named search, whatever its data. Of equal scores the lower trial number wins.

    Raises:
        RecordError: when there is no such search, or none of its trials is complete; says what there is instead.
    """
    states = list(states)
    if search is None:
        chosen = _find_newest(states, space)
    else:
        by_name = {state.header.name: state for state in states}
        if search not in by_name:
            hint = nearest_name(search, list(by_name))
            raise RecordError(f"--search: a recorded search must be named, got {search!r}.{hint}")
        chosen = by_name[search]
        _check_space(chosen, space)
    if chosen.best is None:
        counts = ", ".join(f"{count} {status}" for status, count in chosen.counts.items() if count) or "no trial"
        hint = "Name another search with --search."
        raise RecordError(f"search {chosen.header.name}: a complete trial must be there, got {counts}. {hint}")
    return chosen, chosen.best


def _check_space(state: SearchState, space: str | None) -> None:
    if space not in (None, state.header.space):
        raise RecordError(f"search {state.header.name}: its space must be {space}, got {state.header.space}.")


def _find_newest(states: list[SearchState], space: str | None) -> SearchState:
    searches = [state for state in states if state.header.kind == "search" and space in (None, state.header.space)]
    finished = [state for state in searches if state.finished is not None]
    on_cifar10 = [state for state in finished if state.header.data.name == "cifar10"]
    if on_cifar10:
        return max(on_cifar10, key=lambda state: (state.header.created, state.header.name))
    found = {
        "only on the stand-in (shapes)": [state.header.name for state in finished],
        "unfinished": [state.header.name for state in searches if state.finished is None],
    }
    got = "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names) or "none"
    spaces = [state.header.space for state in states if state.header.kind == "search"]
    hint = " Name one with --search to take it all the same." if searches else nearest_name(space or "", spaces)
    where = "searches" if space is None else f"space {space}"
    raise RecordError(f"{where}: a finished search on CIFAR-10 must be recorded, got {got}.{hint}")


def load_trials(searches: Iterable[SearchState]) -> pd.DataFrame:
    """One row per trial: where it stands, how it ended, its competition group, then every knob of its configuration.

    `val_acc` is that of the last reported epoch; `score` is NaN unless the trial is complete (or diverged: chance);
    `train_seconds` sums its epochs; `ended_seq` orders the ends within a search.
    """
    return _make_frame(
        TRIAL_COLUMNS, [_make_row(state, trial) for state in searches for trial in state.trials.values()]
    )


def load_curves(searches: Iterable[SearchState]) -> pd.DataFrame:
    """The long form: one row per reported epoch, with the fields of its EpochResult."""
    rows = [
        {"search": state.header.name, "trial": trial.number, "run_id": trial.run_id, **result.model_dump()}
        for state in searches
        for trial in state.trials.values()
        for result in trial.epochs
    ]
    return _make_frame(CURVE_COLUMNS, rows)


def split_groups(trials: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """The competition groups of load_trials' table, each with its rows: complete trials by score, then the others by
    their last accuracy. CIFAR-10 before the stand-in, longer trainings before shorter ones."""
    ranked = (
        trials.assign(competes=(trials["status"] == "complete") & trials["score"].notna())
        .sort_values(["competes", "val_acc", "search", "trial"], ascending=[False, False, True, True])
        .drop(columns="competes")
    )
    groups = []
    for _, rows in ranked.groupby(list(GROUP_COLUMNS), sort=False):
        first = rows.iloc[0]
        group = {name: first[name] if TRIAL_COLUMNS[name] == "string" else int(first[name]) for name in GROUP_COLUMNS}
        groups.append((group, rows.reset_index(drop=True)))
    return sorted(groups, key=lambda pair: _order_group(pair[0]))


def _order_group(group: dict[str, Any]) -> tuple[Any, ...]:
    sizes = (-group["epochs"], -group["train_size"], -group["val_size"])
    return (group["data"] != "cifar10", *sizes, group["split_hash"], group["data_digest"])


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
    knobs = {name: str(value) if isinstance(value, tuple) else value for name, value in trial.config}
    return knobs | {
        "search": header.name,
        "space": header.space,
        "kind": header.kind,
        "tier": header.tier,
        "trial": trial.number,
        "run_id": trial.run_id,
        "status": trial.status,
        "origin": trial.origin,
        "epochs_done": trial.epochs_done,
        "val_acc": trial.val_acc,
        "score": trial.score,
        "train_seconds": sum(result.epoch_seconds for result in trial.epochs),
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
