"""Records as tidy tables, the trial that a run id or `--best` means, and what failed.

pandas is imported inside the functions that build tables: all else needs none of it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record.events import NAME
from tune_cifar.record.journal import is_live, list_searches, read_state
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.schema import EpochResult, Status, TrainConfig, nearest_name

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

# Trials compete only with trials that agree in all of these.
GROUP_COLUMNS = ("data", "data_digest", "split_hash", "train_size", "val_size", "epochs", "fidelity")

# Fields of the schema by their type; a tuple is shown as text, what may be absent is NaN (floats) or NA.
DTYPES: dict[Any, str] = {int: "int64", float: "float64", float | None: "float64", bool: "boolean"}
KNOB_COLUMNS = {name: DTYPES.get(knob.annotation, "string") for name, knob in TrainConfig.model_fields.items()}
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


def find_searches(storage: Path, search: str | None = None) -> list[Path]:
    """The folders of all recorded searches and single trainings, newest first, or of the named one.

    Raises:
        RecordError: when the named search is unknown.
    """
    folders = list_searches(storage)
    if search is None:
        return folders
    named = [folder for folder in folders if folder.name == search]
    if not named:
        hint = nearest_name(search, [folder.name for folder in folders])
        raise RecordError(f"{storage}: a search of the name must be recorded, got {search!r}.{hint}")
    return named


def load_searches(storage: Path, space: str | None = None, search: str | None = None) -> list[SearchState]:
    """The recorded searches and single trainings, newest first. One that cannot be read is told in the log and left
    out, so that a damaged record does not hide the others.

    Args:
        space: only those of this space.
        search: only this one, by name.

    Raises:
        RecordError: when the named search is unknown, damaged or of another space.
    """
    folders = find_searches(storage, search)
    if search is not None:
        state = read_state(folders[0])
        _check_space(state, space)
        return [state]
    states = []
    for folder in folders:
        try:
            states.append(read_state(folder))
        except RecordError as exc:
            logger.warning("left out: %s", exc)
    return [state for state in states if space in (None, state.header.space)]


@dataclass(frozen=True)
class SearchRow:
    """A recorded search or single training at a glance.

    Attributes:
        stage: `running` while a driver holds it; `driver died` when none does and none told an end.
        end: why its last driver ended.
        counts: number of trials of every status.
        best: run id of the best complete trial.
        size_bytes: of all files in its folder.
        error: why a damaged one cannot be read; all but its name and size are absent then.
    """

    name: str
    stage: Literal["running", "finished", "interrupted", "driver died", "damaged"]
    size_bytes: int
    kind: str | None = None
    space: str | None = None
    tier: str | None = None
    data: str | None = None
    created: str | None = None
    end: str | None = None
    counts: dict[Status, int] | None = None
    best: str | None = None
    best_val_acc: float | None = None
    error: str | None = None


def list_rows(storage: Path) -> list[SearchRow]:
    """Every recorded search and single training, newest first."""
    return [_make_search_row(folder) for folder in list_searches(storage)]


def _make_search_row(folder: Path) -> SearchRow:
    try:
        live = is_live(folder)  # asked first: a search that ends meanwhile is not taken for one whose driver died
        state = read_state(folder)
    except (RecordError, ConfigError) as exc:
        return SearchRow(folder.name, "damaged", measure_folder(folder), error=str(exc))
    stage: Literal["running", "finished", "interrupted", "driver died"] = "running" if live else "driver died"
    if state.finished is not None:
        stage = "finished" if state.is_finished else "interrupted"
    header, best = state.header, state.best
    return SearchRow(
        name=header.name,
        stage=stage,
        size_bytes=measure_folder(folder),
        kind=header.kind,
        space=header.space,
        tier=header.tier,
        data=header.data.name,
        created=header.created,
        end=state.finished.reason if state.finished else None,
        counts=state.counts,
        best=best.run_id if best else None,
        best_val_acc=best.score if best else None,
    )


def measure_folder(folder: Path) -> int:
    """Bytes of all files below a folder. Links are not followed; a file that goes meanwhile does not count."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(root, name).lstat().st_size
    return size


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
    finished = [state for state in searches if state.is_finished]
    on_cifar10 = [state for state in finished if state.header.data.name == "cifar10"]
    if on_cifar10:
        return max(on_cifar10, key=lambda state: (state.header.created, state.header.name))
    found = {
        "only on the stand-in (shapes)": [state.header.name for state in finished],
        "unfinished": [state.header.name for state in searches if not state.is_finished],
    }
    got = "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names) or "none"
    spaces = [state.header.space for state in states if state.header.kind == "search"]
    hint = " Name one with --search to take it all the same." if searches else nearest_name(space or "", spaces)
    where = "searches" if space is None else f"space {space}"
    raise RecordError(f"{where}: a finished search on CIFAR-10 must be recorded, got {got}.{hint}")


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


@dataclass(frozen=True)
class Failure:
    """What a traceback, or words about a worker's death, tells.

    Attributes:
        kind: the exception's type without its module; empty where the text names none.
        what: type and message, the first line of it.
        where: the last frame in this package, as `engine.py:131 in _train_step`; empty without one.
    """

    kind: str
    what: str
    where: str


@dataclass(frozen=True)
class FailureGroup:
    """Faults of one kind at one place.

    Attributes:
        what: type and message; numbers stand as # where they differ within the group.
        where: see Failure.
        count: of faults; a trial that was retried may have met several.
        failed: numbers of the trials that ended by it.
        retried: numbers of the trials that went on after it.
        run_id: of the first trial to replay, one that failed if any did.
        traceback: of that trial.
    """

    what: str
    where: str
    count: int
    failed: tuple[int, ...]
    retried: tuple[int, ...]
    run_id: str
    traceback: str


FRAME = re.compile(r'^ +File "(?:.*/)?tune_cifar/([\w/]+\.py)", line (\d+), in (.+)$', re.MULTILINE)
EXCEPTION = re.compile(r"(?:\w+\.)*([A-Z]\w*)(?=[:(]|$)")
# Addresses, ids of Ray, counts, sizes; not the digits of a name such as conv1 or float32.
NUMBERS = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{16,}\b|(?<!\w)\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)


def parse_failure(text: str) -> Failure:
    """Read a traceback (of exceptions that led to one another, the last) or any other words about a fault."""
    last = text.rpartition("Traceback (most recent call last):\n")[2]
    lines = [line for line in last.splitlines() if line.strip()]
    what = next((line.strip() for line in lines if not line.startswith(" ")), "no word of what happened")
    kind = EXCEPTION.match(what)
    frames = FRAME.findall(last)
    where = "{}:{} in {}".format(*frames[-1]) if frames else ""
    return Failure(kind[1] if kind else "", what, where)


def read_error(state: SearchState, trial: TrialState) -> str:
    """A failed trial's traceback; the recorded reason when the file is gone."""
    if trial.error_file is not None:
        with suppress(OSError):
            return (state.folder / trial.error_file).read_text(encoding="utf-8", errors="replace")
    return trial.reason


def group_failures(state: SearchState) -> list[FailureGroup]:
    """What went wrong in a search: faults of failed trials, and those that trials were retried after, by what failed
    and where. The most frequent first, of equals the one met by the lower trial number."""
    faults: dict[tuple[str, str], list[tuple[TrialState, bool, str]]] = {}
    for trial in state.trials.values():
        found = [(trial, False, retry.text) for retry in trial.retries]
        found += [(trial, True, read_error(state, trial))] if trial.status == "failed" else []
        for fault in found:
            failure = parse_failure(fault[2])
            faults.setdefault((NUMBERS.sub("#", failure.what), failure.where), []).append(fault)
    groups = [_make_failure_group(*key, found) for key, found in faults.items()]
    return sorted(groups, key=lambda group: (-group.count, min(group.failed + group.retried)))


def _make_failure_group(what: str, where: str, faults: list[tuple[TrialState, bool, str]]) -> FailureGroup:
    failed = sorted({trial.number for trial, has_ended, _ in faults if has_ended})
    retried = sorted({trial.number for trial, has_ended, _ in faults if not has_ended} - set(failed))
    first, _, text = min(faults, key=lambda fault: (not fault[1], fault[0].number))
    words = {parse_failure(text).what for _, _, text in faults}
    what = words.pop() if len(words) == 1 else what
    return FailureGroup(what, where, len(faults), tuple(failed), tuple(retried), first.run_id, text)


def load_trials(searches: Iterable[SearchState]) -> pd.DataFrame:
    """One row per trial: where it stands, how it ended, its competition group, then every knob of its configuration.

    `val_acc` is that of the last reported epoch; `score` is NaN unless the trial is complete (or diverged: chance);
    `train_seconds` sums its epochs; `ended_seq` orders the ends within a search.
    """
    return _make_frame(
        TRIAL_COLUMNS, [_make_row(state, trial) for state in searches for trial in state.trials.values()]
    )


def make_shipped_trials(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """load_trials' table from what another store was told of trials: whole numbers, too, may be absent there."""
    return _make_frame({name: dtype.replace("int64", "Int64") for name, dtype in TRIAL_COLUMNS.items()}, rows)


def load_curves(searches: Iterable[SearchState]) -> pd.DataFrame:
    """The long form: one row per reported epoch, with the length of its cycle and the fields of its EpochResult."""
    rows = [
        {"search": state.header.name, "trial": trial.number, "run_id": trial.run_id, "cycle": cycle} | dict(result)
        for state in searches
        for trial in state.trials.values()
        for cycle, result in trial.paid
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
    return (group["data"] != "cifar10", *sizes, group["split_hash"], group["data_digest"], group["fidelity"])


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
    knobs = {name: str(value) if isinstance(value, tuple) else value for name, value in trial.whole}
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
        "train_seconds": sum(result.epoch_seconds for _, result in trial.paid),
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
