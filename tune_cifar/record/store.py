"""Recorded searches: where they lie, which there are, the best trial."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record.events import NAME
from tune_cifar.record.journal import RECORD_FILE, check_name, is_live, read_state, replay
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.schema import Status, nearest_name

logger = logging.getLogger(__name__)


def find_storage(option: str | Path | None) -> Path:
    """The absolute folder of all searches: the option, else $TUNE_CIFAR_RUNS, else ./runs. It need not exist."""
    path = Path(option or os.environ.get("TUNE_CIFAR_RUNS") or "runs")
    with suppress(RuntimeError):  # ~ of a user who is not there: a folder of that name, then
        path = path.expanduser()
    return path.resolve()


def searches_folder(storage: Path) -> Path:
    return storage / "searches"


def search_folder(storage: Path, name: str) -> Path:
    """A search's own folder, existing or not, directly inside `searches_folder`."""
    return searches_folder(storage) / check_name(name)


def list_searches(storage: Path) -> list[Path]:
    """The folders of all searches, newest first. One whose header cannot be read comes last: its reader will tell."""

    def read_created(folder: Path) -> str:
        try:
            line, newline, _ = (folder / RECORD_FILE).read_bytes().partition(b"\n")
            return replay(folder, line + newline)[0].header.created
        except (OSError, RecordError):
            return ""

    folders = [path.parent for path in searches_folder(storage).glob(f"*/{RECORD_FILE}")]
    return sorted(folders, key=lambda folder: (read_created(folder), folder.name), reverse=True)


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
        raise RecordError(
            f"{storage}: a search of the name must be recorded, got {search!r}.{hint}"
        )
    return named


def load_searches(
    storage: Path, space: str | None = None, search: str | None = None
) -> list[SearchState]:
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
        live = is_live(
            folder
        )  # asked first: a search that ends meanwhile is not taken for one whose driver died
        state = read_state(folder)
    except (RecordError, ConfigError) as exc:
        return SearchRow(folder.name, "damaged", measure_folder(folder), error=str(exc))
    stage: Literal["running", "finished", "interrupted", "driver died"] = (
        "running" if live else "driver died"
    )
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
        raise RecordError(
            f"{match[1]}: a trial of the search must be named, got {match[2]} of {len(state.trials)}."
        )
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
        counts = (
            ", ".join(f"{count} {status}" for status, count in chosen.counts.items() if count)
            or "no trial"
        )
        hint = "Name another search with --search."
        raise RecordError(
            f"search {chosen.header.name}: a complete trial must be there, got {counts}. {hint}"
        )
    return chosen, chosen.best


def _check_space(state: SearchState, space: str | None) -> None:
    if space not in (None, state.header.space):
        raise RecordError(
            f"search {state.header.name}: its space must be {space}, got {state.header.space}."
        )


def _find_newest(states: list[SearchState], space: str | None) -> SearchState:
    searches = [
        state
        for state in states
        if state.header.kind == "search" and space in (None, state.header.space)
    ]
    finished = [state for state in searches if state.is_finished]
    on_cifar10 = [state for state in finished if state.header.data.name == "cifar10"]
    if on_cifar10:
        return max(on_cifar10, key=lambda state: (state.header.created, state.header.name))
    found = {
        "only on the stand-in (shapes)": [state.header.name for state in finished],
        "unfinished": [state.header.name for state in searches if not state.is_finished],
    }
    got = (
        "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names) or "none"
    )
    spaces = [state.header.space for state in states if state.header.kind == "search"]
    hint = (
        " Name one with --search to take it all the same."
        if searches
        else nearest_name(space or "", spaces)
    )
    where = "searches" if space is None else f"space {space}"
    raise RecordError(f"{where}: a finished search on CIFAR-10 must be recorded, got {got}.{hint}")
