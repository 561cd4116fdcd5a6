"""The run store: find, list and load recorded searches; find a run, and the best trial."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from tune_cifar.errors import RecordError, RenamedError, did_you_mean
from tune_cifar.record.events import NAME
from tune_cifar.record.files import number_names
from tune_cifar.record.journal import (
    RECORD_FILE,
    check_name,
    is_live,
    is_taken,
    read_state,
    replay,
)
from tune_cifar.record.state import SearchState, TrialState, describe_counts
from tune_cifar.schema import Status

logger = logging.getLogger(__name__)

SearchStatus = Literal["running", "finished", "interrupted", "driver died", "renamed", "damaged"]
# A name has 64 characters at most; this leaves 20 for the time and a number.
MAX_START = 44
DATA_WORDS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "shapes": "synthetic data"}


def find_storage(option: str | Path | None) -> Path:
    """Return the absolute path of the run store: the option, else $TUNE_CIFAR_RUNS, else ./runs.

    It need not exist.
    """
    path = Path(option or os.environ.get("TUNE_CIFAR_RUNS") or "runs")
    with suppress(RuntimeError):  # `~name` of an unknown user stays as it is
        path = path.expanduser()
    return path.resolve()


def repeat_storage(storage: Path) -> str:
    """Return the option that leads a command to a run store, after a space; nothing if it need not.

    For the command line that a sentence tells to type.
    """
    return "" if storage == find_storage(None) else f" --storage {shlex.quote(str(storage))}"


def searches_folder(storage: Path) -> Path:
    """Return the folder of all searches."""
    return storage / "searches"


def search_folder(storage: Path, name: str) -> Path:
    """Return a search's own folder, directly inside `searches_folder`; it need not exist.

    Raises:
        RecordError: when the name is not fit for a search.
    """
    return searches_folder(storage) / check_name(name)


def make_name(storage: Path, start: str) -> str:
    """Return a free name for a record that was given none: a start, the time, perhaps a number.

    Another process can take it before the record is created: see `Record.create_numbered`.
    """
    name = f"{start[:MAX_START]}-{datetime.now():%Y%m%d-%H%M%S}"
    free = (each for each in number_names(name) if not is_taken(search_folder(storage, each)))
    return next(free)


def list_searches(storage: Path) -> list[Path]:
    """Return the folders of all searches, newest first, those with an unreadable header last."""

    def read_created(folder: Path) -> str:
        try:
            with (folder / RECORD_FILE).open("rb") as file:
                return replay(folder, file.readline())[0].header.created
        except (OSError, RecordError):
            return ""

    folders = [path.parent for path in searches_folder(storage).glob(f"*/{RECORD_FILE}")]
    return sorted(folders, key=lambda folder: (read_created(folder), folder.name), reverse=True)


def find_searches(storage: Path, search: str | None = None) -> list[Path]:
    """Return the folders of all searches and single trainings, newest first, or the named one.

    Raises:
        RecordError: when the named search is unknown.
    """
    folders = list_searches(storage)
    if search is None:
        return folders
    named = [folder for folder in folders if folder.name == search]
    if not named:
        hint = did_you_mean(search, [folder.name for folder in folders])
        raise RecordError(f"no search named {search!r} in {storage}.{hint}")
    return named


def load_searches(
    storage: Path, space: str | None = None, search: str | None = None
) -> list[SearchState]:
    """Load the recorded searches and single trainings, newest first.

    A damaged record is logged and left out, so that it does not hide the others.

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
    """The summary of a recorded search or single training.

    Attributes:
        stage: `running` while a driver holds it; `driver died` when none does and no end is
            recorded; `renamed` where the folder has another name than its record.
        end: why its last driver ended.
        counts: number of trials of every status.
        best: run id of the best complete trial.
        size_bytes: of all files in its folder.
        error: why a damaged or renamed one is not read; only its name and size are known then.
    """

    name: str
    stage: SearchStatus
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
    """Summarize every recorded search and single training, newest first."""
    return [_make_search_row(folder) for folder in list_searches(storage)]


def _make_search_row(folder: Path) -> SearchRow:
    try:
        live = is_live(folder)  # first: a search that ends meanwhile must not look as if it died
        state = read_state(folder)
    except RecordError as exc:
        problem: SearchStatus = "renamed" if isinstance(exc, RenamedError) else "damaged"
        return SearchRow(folder.name, problem, measure_folder(folder), error=str(exc))
    stage: SearchStatus = "running" if live else "driver died"
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
    """Return the bytes of all files below a folder, links not followed.

    A file that is deleted meanwhile does not count.
    """
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(root, name).lstat().st_size
    return size


def find_run(storage: Path, run_id: str) -> tuple[SearchState, TrialState]:
    """Return the search and the trial that a run id such as `s10-cpu-1:7` names.

    Raises:
        RecordError: when the text is not a run id, or no such trial is recorded.
    """
    match = re.fullmatch(rf"({NAME}):([0-9]{{1,9}})", run_id)
    if match is None:
        raise RecordError(f"a run id must be NAME:TRIAL such as s10-cpu-1:7, got {run_id!r}.")
    (state,) = load_searches(storage, search=match[1])
    trial = state.trials.get(int(match[2]))
    if trial is None:
        count = len(state.trials)
        raise RecordError(f"no trial {match[2]} in search {match[1]} (trials: {count}).")
    return state, trial


def find_best(
    states: Iterable[SearchState],
    space: str | None = None,
    search: str | None = None,
    data: str = "cifar10",
) -> tuple[SearchState, TrialState]:
    """Return the complete trial of the highest score, and its search.

    The search is the named one, or the newest finished one (of the space) on the data. Of equal
    scores the lower trial number wins.

    Raises:
        RecordError: when there is no such search, or it has no complete trial. The message says
            what there is instead.
    """
    states = list(states)
    if search is None:
        chosen = _find_newest(states, space, data)
    else:
        by_name = {state.header.name: state for state in states}
        if search not in by_name:
            hint = did_you_mean(search, list(by_name))
            raise RecordError(f"`search` must name a recorded search, got {search!r}.{hint}")
        chosen = by_name[search]
        _check_space(chosen, space)
    if chosen.best is None:
        counts = describe_counts(chosen.counts) or "none"
        problem = f"search {chosen.header.name} has no complete trial (trials: {counts})"
        raise RecordError(f"{problem}. Name another search with `search`.")
    return chosen, chosen.best


def _check_space(state: SearchState, space: str | None) -> None:
    name, own = state.header.name, state.header.space
    if space not in (None, own):
        raise RecordError(f"search {name} must be of space {space}, got one of {own}.")


def _find_newest(states: list[SearchState], space: str | None, data: str) -> SearchState:
    searches = [state for state in states if state.header.kind == "search"]
    spaces = [state.header.space for state in searches]
    if space is not None:
        searches = [state for state in searches if state.header.space == space]
    finished = [state for state in searches if state.is_finished]
    on_data = [state for state in finished if state.header.data.name == data]
    if on_data:
        return max(on_data, key=lambda state: (state.header.created, state.header.name))
    problem = f"no finished search on {DATA_WORDS.get(data, data)}"
    if space is not None:
        problem += f" of space {space}"
    if not searches:
        raise RecordError(f"{problem}.{did_you_mean(space or '', spaces)}")
    found: dict[str, list[str]] = {}
    for state in finished:
        name = state.header.data.name
        found.setdefault(f"on {DATA_WORDS.get(name, name)}", []).append(state.header.name)
    found["unfinished"] = [state.header.name for state in searches if not state.is_finished]
    others = "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names)
    raise RecordError(f"{problem}, only {others}. Name one with `search` to use it.")
