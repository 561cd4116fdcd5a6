"""`leaderboard`: all trials, confirmations and test evaluations."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import say, stdout
from tune_cifar.schema import label_data

if TYPE_CHECKING:
    import pandas as pd

    from tune_cifar.record.state import SearchState, TrialState


def leaderboard(
    space: Annotated[
        str | None, typer.Option("--space", help="Only searches of this space.")
    ] = None,
    search: Annotated[str | None, typer.Option("--search", help="Only this search.")] = None,
    as_json: options.Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, all knobs.")] = False,
    top: Annotated[
        int, typer.Option("--top", metavar="N", help="Rows per group in the table.")
    ] = 15,
    storage: options.Storage = None,
) -> None:
    """All trials, best first: validation, confirmed and test apart.

    Only trials of one data set, split, length and size compete: groups stand apart.

    Below stand the confirmations, each candidate's mean over new seeds, and what the test set was opened for.

    Example: python -m tune_cifar leaderboard --space s10
    """
    from tune_cifar.record.store import find_storage, load_searches
    from tune_cifar.report.trials import load_trials

    folder = find_storage(storage)
    states = load_searches(folder, space, search)
    trials = load_trials(states)
    if as_json:
        sys.stdout.write(str(trials.to_json(orient="records", indent=2)) + "\n")
    elif as_csv:
        sys.stdout.write(str(trials.to_csv(index=False)))
    elif trials.empty:
        say("No trial is recorded yet. Start with: python -m tune_cifar search --space smoke")
    else:
        if search is not None:  # its confirmations have names of their own
            states += [state for state in load_searches(folder) if _confirms(state, search)]
        searched = list(
            dict.fromkeys(knob for state in states for knob in state.header.distributions)
        )
        _print_groups(trials[trials["kind"] != "confirm"], searched, top)
        _print_confirmations(states)
        _print_tests(states, folder)


def _confirms(state: SearchState, search: str) -> bool:
    return state.header.confirmation is not None and state.header.confirmation.search == search


def _print_confirmations(states: list[SearchState]) -> None:
    """Candidates' means over new seeds, a table for each confirmation."""
    from tune_cifar.cli.confirm import print_confirmed
    from tune_cifar.verify.confirm import summarise

    found = [
        state
        for state in states
        if (settled := state.header.confirmation) is not None and not settled.final
    ]
    if found:
        say(
            "CONFIRMED: validation accuracy under new seeds, in pairs with the baseline",
            style="bold",
        )
    for state in found:
        print_confirmed(summarise(state), state, stdout())
        say("")


def _print_tests(states: list[SearchState], storage: Path) -> None:
    """What the sealed test set was opened for, of these searches alone: a final confirmation's candidates in a table,
    any other run in a line."""
    from tune_cifar.cli.confirm import print_confirmed
    from tune_cifar.record.test_log import find_test_log, load_test_log
    from tune_cifar.verify.confirm import summarise_tests

    files = {find_test_log(storage, state.header.data.name) for state in states}
    openings = sorted(
        (opening for path in files for opening in load_test_log(path)), key=lambda found: found.date
    )
    finals = [
        state
        for state in states
        if (settled := state.header.confirmation) is not None and settled.final
    ]
    shown = {_name_training(state, trial) for state in states for trial in state.trials.values()}
    summarised = {
        _name_training(state, trial)[1:] for state in finals for trial in state.trials.values()
    }
    others = [
        opening
        for opening in openings
        if (opening.run_id, opening.fingerprint, opening.data) in shown
        and (opening.fingerprint, opening.data) not in summarised
    ]
    if finals or others:
        say("TEST: accuracy on the sealed test set, chosen by validation alone", style="bold")
    for state in finals:
        print_confirmed(summarise_tests(state, openings), state, stdout())
        say("")
    for found in others:
        label = label_data(found.data)
        data = f", {label}" if label else ""
        acc = f"{100 * found.test_acc:.2f} %"
        say(
            f"{found.run_id}: test accuracy {acc} on {found.images:,} images{data}, opened {found.date}"
        )


def _name_training(state: SearchState, trial: TrialState) -> tuple[str, str, str]:
    """As the ledger names it: run, fingerprint, data. Runs of another run store may have the same ids."""
    return trial.run_id, trial.fingerprint, state.header.data.name


def _print_groups(trials: pd.DataFrame, searched: list[str], top: int) -> None:
    from rich.table import Table

    from tune_cifar.report.format import format_percent, format_value
    from tune_cifar.report.trials import split_groups

    if not trials.empty:
        say(
            "VALIDATION: single trials, each of one seed; the best of many is an upper guess",
            style="bold",
        )
    for group, rows in split_groups(trials):
        label = label_data(group["data"])
        data = f"{label}, " if label else ""
        title = (
            f"{data}{group['epochs']} epochs of {group['train_size']} images, {group['val_size']} to validate, "
            f"split {group['split_hash']}, fidelity {group['fidelity']}"
        )
        knobs = [knob for knob in searched if rows[knob].nunique() > 1][:6]
        table = Table("run", "status", "epochs", "val_acc", *knobs, box=None, header_style="bold")
        for row in rows.head(top).to_dict("records"):
            acc = None if math.isnan(row["val_acc"]) else row["val_acc"]
            cells = [format_value(row[knob]) for knob in knobs]
            table.add_row(
                row["run_id"], row["status"], str(row["epochs_done"]), format_percent(acc), *cells
            )
        say(title, style="bold")
        stdout().print(table)
        say(f"... and {len(rows) - top} more (--top, --csv)\n" if len(rows) > top else "")
