"""Records as tidy tables, the trial that a run id or `--best` means, and what failed.

pandas is imported inside the functions that build tables: all else needs none of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.schema import EpochResult, TrainConfig

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
