"""`leaderboard`: all trials, confirmations and test evaluations."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, say, stdout
from tune_cifar.errors import RecordError, did_you_mean
from tune_cifar.schema import label_data

if TYPE_CHECKING:
    import pandas as pd

    from tune_cifar.record.state import SearchState


def leaderboard(
    space: Annotated[
        str | None, typer.Option("--space", help="Only searches of this space.")
    ] = None,
    search: Annotated[str | None, typer.Option("--search", help="Only this search.")] = None,
    as_json: options.Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, all knobs.")] = False,
    top: Annotated[
        int,
        typer.Option("--top", metavar="N", min=1, help="Rows per group in the table."),
    ] = 15,
    storage: options.Storage = None,
) -> None:
    """All trials, best first: validation, confirmed and test apart.

    Only trials of one data set, split, length and size compete: each such group is a table. Below
    stand the confirmations (means over new seeds) and the evaluations on the test set.

    Example: python -m tune_cifar leaderboard --space s10
    """
    from tune_cifar.record.store import find_storage, load_searches
    from tune_cifar.report.trials import load_trials

    folder = find_storage(storage)
    states = load_searches(folder, space, search)
    if space is not None and not states:
        _check_space_name(space, folder)
    trials = load_trials(states)
    if as_json:
        values = trials.astype("object").where(trials.notna(), None)
        print_json(values.to_dict("records"))
    elif as_csv:
        sys.stdout.write(str(trials.to_csv(index=False)))
    elif trials.empty:
        say("No trial is recorded yet. Start with: python -m tune_cifar search --space smoke")
    else:
        if search is not None:  # its confirmations have names of their own
            states += [state for state in load_searches(folder) if _confirms(state, search)]
        searched = [knob for state in states for knob in state.header.distributions]
        _print_groups(trials[trials["kind"] != "confirm"], list(dict.fromkeys(searched)), top)
        _print_confirmations(states)
        _print_tests(states, folder)


def _check_space_name(space: str, storage: Path) -> None:
    """Refuse a space that no file and no recorded search has."""
    from tune_cifar.record.store import load_searches
    from tune_cifar.space.select import list_spaces

    known = [path.stem for path in list_spaces()]
    if space not in known:
        known += [state.header.space for state in load_searches(storage)]
        hint = did_you_mean(space, known)
        raise RecordError(f"`space` must name a search space, got {space!r}.{hint}")


def _confirms(state: SearchState, search: str) -> bool:
    return state.header.confirmation is not None and state.header.confirmation.search == search


def _select_confirmations(states: list[SearchState], final: bool) -> list[SearchState]:
    """The confirmations among these records: those on validation images, or the final ones."""
    return [
        state
        for state in states
        if state.header.confirmation is not None and state.header.confirmation.final == final
    ]


def _print_confirmations(states: list[SearchState]) -> None:
    """Print each candidate's mean over new seeds, a table for each confirmation."""
    from tune_cifar.cli.confirm import print_confirmed
    from tune_cifar.verify.confirm import summarise

    found = _select_confirmations(states, final=False)
    if found:
        title = "CONFIRMED: validation accuracy under new seeds, in pairs with the baseline"
        say(title, style="bold")
    for state in found:
        print_confirmed(summarise(state), state, stdout())
        say("")


def _print_tests(states: list[SearchState], storage: Path) -> None:
    """Print these searches' test evaluations: a table per final confirmation, else a line."""
    from tune_cifar.cli.confirm import print_confirmed
    from tune_cifar.record.test_log import load_test_logs
    from tune_cifar.report.format import format_percent
    from tune_cifar.verify.confirm import summarise_tests

    logged = load_test_logs(storage)
    finals = _select_confirmations(states, final=True)
    # Run ids repeat in other run stores, so a training is named by its fingerprint and data too.
    shown, summarised = set(), set()
    for state in states:
        for trial in state.trials.values():
            training = (trial.fingerprint, state.header.data)
            shown.add((trial.run_id, *training))
            if state in finals:
                summarised.add(training)
    all_data = {state.header.data for state in states}
    others = []
    for found in logged:
        for data in filter(found.is_on, all_data):
            training = (found.fingerprint, data)
            if (found.run_id, *training) in shown and training not in summarised:
                others.append(found)
                break
    if finals or others:
        say("TEST: accuracy on the test set, chosen by validation alone", style="bold")
    for state in finals:
        print_confirmed(summarise_tests(state, logged), state, stdout())
        say("")
    for found in others:
        label = label_data(found.data)
        images = f"{found.images:,} images{f', {label}' if label else ''}"
        acc = format_percent(found.test_acc)
        say(f"{found.run_id}: test accuracy {acc} on {images}, evaluated {found.date}")


def _print_groups(trials: pd.DataFrame, searched: list[str], top: int) -> None:
    from rich.table import Table

    from tune_cifar.report.format import format_percent, format_value
    from tune_cifar.report.trials import find_accuracies, split_groups

    if not trials.empty:
        title = "VALIDATION: single trials; the best of many is an upper estimate"
        say(title, style="bold")
    for group, rows in split_groups(trials):
        label = label_data(group["data"])
        title = f"{label}, " if label else ""
        title += f"{group['epochs']} epochs of {group['train_size']} images, "
        title += f"{group['val_size']} to validate, "
        title += f"split {group['split_hash']}, fidelity {group['fidelity']}"
        # An argument of a network of the user's own has no column before its search has a trial.
        knobs = [knob for knob in searched if knob in rows and rows[knob].nunique() > 1][:6]
        nodes = ["node"] if rows["node"].notna().any() else []
        columns = ("run", "status", *nodes, "epochs", "val_acc", *knobs)
        table = Table(*columns, box=None, header_style="bold")
        rows = rows.assign(accuracy=find_accuracies(rows))
        for row in rows.head(min(top, len(rows))).to_dict("records"):
            acc = None if math.isnan(row["accuracy"]) else row["accuracy"]
            cells = [format_value(row[name]) for name in (*nodes, "epochs_done")]
            cells.append(format_percent(acc))
            cells += [format_value(row[knob]) for knob in knobs]
            table.add_row(row["run_id"], row["status"], *cells)
        say(title, style="bold")
        stdout().print(table)
        say(f"... and {len(rows) - top} more (--top, --csv)\n" if len(rows) > top else "")
