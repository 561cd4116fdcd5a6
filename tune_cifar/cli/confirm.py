"""`confirm`: whether a search's best trials keep their scores under new seeds; with --final, on the sealed test set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli import options
from tune_cifar.cli.evaluate import keep_evaluation, say_kept
from tune_cifar.cli.search import AcceptChanges, run_plan
from tune_cifar.cli.terminal import print_json, repeat_options, say, stderr, stdout, this_command
from tune_cifar.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tune_cifar.data.files import DataSource
    from tune_cifar.record.state import SearchState
    from tune_cifar.search.plan import SearchPlan
    from tune_cifar.verify.confirm import Confirmed


Final = Annotated[
    bool,
    typer.Option(
        "--final",
        help="Train the confirmed best and the baseline on all 50,000 images and open the test set once for each.",
        rich_help_panel="What",
    ),
]
# Options that a recorded confirmation has settled.
SETTLED = (
    *("top", "seeds", "settings"),
    *("device", "precision", "execution", "cpus_per_trial", "deterministic"),
)


def confirm(
    context: typer.Context,
    search: Annotated[
        str,
        typer.Option(
            "--search", metavar="NAME", help="The search to confirm.", rich_help_panel="What"
        ),
    ],
    top: Annotated[
        int,
        typer.Option(
            "--top",
            metavar="K",
            min=1,
            help="Its best K trials, and the baseline.",
            rich_help_panel="What",
        ),
    ] = 5,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", metavar="N", min=1, help="New seeds for each.", rich_help_panel="What"
        ),
    ] = 5,
    settings: options.Settings = None,
    final: Final = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="Default: the search's, -confirm or -final.", rich_help_panel="What"
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the newest one of --search, or --name.",
            rich_help_panel="Going on",
        ),
    ] = False,
    accept_changes: AcceptChanges = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    execution: options.Execution = "eager",
    cpus_per_trial: options.Cpus = 1,
    gpus_per_trial: options.Gpus = None,
    max_concurrent: options.MaxConcurrent = None,
    deterministic: options.Deterministic = False,
    data: options.Data = None,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
    as_json: options.Json = False,
) -> None:
    """Train a search's best trials again under new seeds, beside its baseline: mean, spread, gain in pairs.

    With --final the confirmed best goes to the sealed test set. Ctrl-C ends it in order; --resume goes on.

    Example: python -m tune_cifar confirm --search s8-cpu-1 --top 5 --seeds 5
    """
    from tune_cifar.record.store import find_storage

    _refuse_misplaced(context, final, resume, accept_changes)
    folder = find_storage(storage)
    given = {
        "storage": folder,
        "gpus_per_trial": gpus_per_trial,
        "max_concurrent": max_concurrent,
        "command": this_command(),
        "tracking_uri": tracking_uri,
    }
    console = stderr() if as_json else stdout()
    state = _find_recorded(folder, search, final, name) if resume else None
    plan: SearchPlan | None = None
    if state is None:
        given |= {
            "device": device,
            "precision": precision,
            "execution": execution,
            "deterministic": deterministic,
        }
        given |= {
            "cpus_per_trial": cpus_per_trial,
            "name": name or f"{search}-{'final' if final else 'confirm'}",
        }
        plan = _plan(given, data, search, (top, seeds), settings or [], final, console)
    elif not state.is_finished:
        plan = _plan_resume(given, data, state, accept_changes, console)
    if plan is not None:
        state, faults = run_plan(plan, console)
        for fault in faults:
            say(fault, console, "yellow")
    assert state is not None
    again = (
        f"python -m tune_cifar confirm{repeat_options(search=search, data=data, storage=storage)}"
    )
    if not state.is_finished:
        again += f"{' --final' if final else ''}{repeat_options(name=name)} --resume"
        console.print(f"\ngo on with:\n  {again}", soft_wrap=True)
        raise typer.Exit(130)
    if final:
        _open_tests(state, data, tracking_uri, console)
    _report(state, as_json, console)
    if not (final or as_json):
        console.print(f"\nnext:\n  {again} --final", soft_wrap=True)


def _refuse_misplaced(
    context: typer.Context, is_final: bool, resumes: bool, accepts_changes: bool
) -> None:
    """Refuse options that what is recorded answers already."""
    if is_final:
        words = "belongs to the confirmation: --final trains what was confirmed."
        options.refuse_given(context, ("top", "settings"), words)
    if resumes:
        options.refuse_given(context, SETTLED, "belongs to a new confirmation: the record has it.")
    elif accepts_changes:
        raise typer.BadParameter("--accept-changes belongs to --resume.")


def _find_recorded(folder: Path, search: str, is_final: bool, name: str | None) -> SearchState:
    """The confirmation to go on with; of that name, if one is given."""
    from tune_cifar.record.store import load_searches
    from tune_cifar.verify.confirm import find_confirmation

    states = [state for state in load_searches(folder) if name in (None, state.header.name)]
    state = find_confirmation(states, search, is_final)
    if state is None:
        what = f"a {'final ' if is_final else ''}confirmation of {search}{f' named {name}' if name else ''}"
        raise ConfigError(f"--resume: {what} must be recorded, got none. Leave --resume out.")
    return state


def _find_source(state: SearchState, data: str | None) -> DataSource:
    """The data that a search or its confirmation was trained on."""
    from tune_cifar.data.files import find_data

    header = state.header
    source = find_data(data or ("shapes" if header.data.name == "shapes" else None))
    if source.name != header.data.name:
        raise ConfigError(
            f"--data: {header.data.name} must be given as in {header.name}, got {source.name}."
        )
    return source


def _plan(
    given: dict[str, Any],
    data: str | None,
    search: str,
    wanted: tuple[int, int],
    settings: list[str],
    is_final: bool,
    console: Console,
) -> SearchPlan:
    """Settle a new confirmation and say what it will train."""
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.record.store import load_searches
    from tune_cifar.search.plan import SearchRequest
    from tune_cifar.space.select import parse_setting
    from tune_cifar.verify.confirm import (
        check_confirmed,
        find_confirmation,
        make_confirmation,
        make_final,
    )

    changes = dict(parse_setting(setting) for setting in settings)
    (state,) = load_searches(given["storage"], search=search)
    source = _find_source(state, data)
    num_top, num_seeds = wanted
    if is_final:
        states = load_searches(given["storage"])
        confirmation = check_confirmed(find_confirmation(states, search, is_final=False), search)
        space, settled = make_final(state, confirmation, num_seeds)
    else:
        space, settled = make_confirmation(state, num_top, num_seeds, changes)
    print_synthetic_banner(console, source.name)
    names = ", ".join(candidate.run_id for candidate in settled.candidates)
    seeds = ", ".join(map(str, settled.seeds))
    config = space.baseline
    say(
        f"{names} under the seeds {seeds}: {config.epochs} epochs of {config.train_size:,} images each",
        console,
    )
    with console.status("measuring 20 training steps and starting the workers ..."):
        from tune_cifar.search.run import prepare_search

        given["keep_weights"] = (
            settled.num_trials if is_final else 1
        )  # the test set asks for all of them
        plan = prepare_search(space, SearchRequest(source=source, **given), settled)
    say(plan.describe(), console)
    return plan


def _plan_resume(
    given: dict[str, Any],
    data: str | None,
    state: SearchState,
    accepts_changes: bool,
    console: Console,
) -> SearchPlan:
    """Settle how a recorded confirmation goes on and say what of it is there."""
    from tune_cifar.search.plan import SearchRequest

    header = state.header
    assert header.confirmation is not None
    given["keep_weights"] = header.confirmation.num_trials if header.confirmation.final else 1
    request = SearchRequest(
        source=_find_source(state, data), device=header.numerics.device, name=header.name, **given
    )
    with console.status("reading the record and starting the workers ..."):
        from tune_cifar.search.run import prepare_resume

        plan = prepare_resume(request, None, None, accepts_changes)
    for note in (*plan.notes, plan.describe()):
        say(note, console)
    return plan


def _report(state: SearchState, as_json: bool, console: Console) -> None:
    """Say what a finished confirmation found."""
    from tune_cifar.record.test_log import find_test_log, load_test_log
    from tune_cifar.verify.confirm import summarise, summarise_tests

    settled = state.header.confirmation
    assert settled is not None
    answer: dict[str, Any] = {
        "search": settled.search,
        "name": state.header.name,
        "final": settled.final,
    }
    if settled.final:
        ledger = find_test_log(state.storage, state.header.data.name)
        confirmed = summarise_tests(state, load_test_log(ledger))
        answer["test_log"] = str(ledger)
    else:
        confirmed = summarise(state)
    if as_json:
        print_json(answer | {"candidates": [found.to_dict() for found in confirmed]})
        return
    print_confirmed(confirmed, state, console)


def _open_tests(
    state: SearchState, data: str | None, tracking_uri: str | None, console: Console
) -> None:
    """Open the test set once for every complete training that it was not opened for."""
    from tune_cifar.record.test_log import find_openings, find_test_log
    from tune_cifar.train.numerics import restore_numerics
    from tune_cifar.train.recorded import load_recorded_data, load_trained
    from tune_cifar.verify.test_set import open_test

    header = state.header
    ledger = find_test_log(state.storage, header.data.name)
    complete = [trial for trial in state.trials.values() if trial.status == "complete"]
    sealed = [
        trial
        for trial in complete
        if not find_openings(ledger, trial.fingerprint, header.data.name)
    ]
    if not sealed:
        return
    source = _find_source(state, data)
    for trial in sealed:
        loaded = load_recorded_data(state, trial, source)
        way_out = "They belong to what is confirmed: confirm it under another --name."
        trainer = load_trained(
            state, trial, loaded, restore_numerics(trial.driver.numerics), way_out
        )
        opening, evaluation, split = open_test(trainer, trial, source, ledger, this_command())
        say(
            f"{trial.run_id}: test accuracy {100 * opening.test_acc:.2f} %, written into {ledger}",
            console,
        )
        try:
            say_kept(keep_evaluation(state, trial, evaluation, split, None, tracking_uri), console)
        except ConfigError as exc:  # the opening is written down: this must not look undone
            say(str(exc), console, "yellow")


def print_confirmed(confirmed: Sequence[Confirmed], state: SearchState, console: Console) -> None:
    """A row per candidate (the baseline is the first); of a validation, then the winner's curse in words."""
    from rich.table import Table

    from tune_cifar.report.format import format_percent

    header, settled = state.header, state.header.confirmation
    assert settled is not None
    part = "test" if settled.final else "validation"
    data = f", {header.data.label}" if header.data.label else ""
    length = f"{header.baseline['epochs']} epochs of {header.baseline['train_size']:,} images"
    num_ended = sum(trial.status != "running" for trial in state.trials.values())
    so_far = "" if state.is_finished else f", {num_ended} of {settled.num_trials} trainings so far"
    say(f"{header.name}: {part} accuracy over seeds after {length}{data}{so_far}", console, "bold")
    table = Table(
        "candidate", "search said", "mean", "sd", "seeds", "gain over the baseline", box=None
    )
    for i, found in enumerate(confirmed):
        gain = (
            "the baseline" if i == 0 else "no pair" if found.gain is None else found.gain.describe()
        )
        numbers = (
            format_percent(found.search_score),
            format_percent(found.mean),
            format_percent(found.sd),
        )
        table.add_row(found.run_id, *numbers, str(len(found.scores)), gain)
    console.print(table)
    for trial in state.trials.values():
        if trial.status in ("diverged", "failed"):
            counted = "counts as a guesser" if trial.status == "diverged" else "is left out"
            say(f"{trial.run_id} {trial.status}: it {counted}", console, "yellow")
    if not settled.final:
        for found in confirmed[1:]:
            say(found.describe_curse(), console)
