"""`confirm`: a search's best trials under new seeds; with --final, on the test set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli import options
from tune_cifar.cli.evaluate import evaluate_test, say_test
from tune_cifar.cli.terminal import (
    paste,
    print_json,
    repeat_launch,
    repeat_place,
    say,
    stderr,
    stdout,
    this_command,
)
from tune_cifar.errors import ConfigError, NameTakenError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tune_cifar.record.events import Confirmation
    from tune_cifar.record.state import SearchState
    from tune_cifar.search.plan import SearchPlan, SearchRequest
    from tune_cifar.verify.confirm import Confirmed, Gain


Final = Annotated[
    bool,
    typer.Option(
        "--final", help="Train the best and the baseline on all 50,000 images, test each once."
    ),
]
Search = Annotated[str, typer.Option("--search", metavar="NAME", help="The search to confirm.")]
Top = Annotated[
    int,
    typer.Option("--top", metavar="K", min=1, help="Its best K trials, beside the baseline."),
]
Seeds = Annotated[
    int, typer.Option("--seeds", metavar="N", min=1, help="New training seeds for each.")
]
Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs",
        metavar="N",
        min=1,
        help="Of each training here; --final trains the recipe's. Default: the recipe's.",
    ),
]
Name = Annotated[
    str | None, typer.Option("--name", help="Default: the search's, -confirm or -final.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the newest one of --search, or --name.")
]
WAY_OUT = "Continue or show it with `resume=True`, or give `name` for another."


def confirm(
    context: typer.Context,
    search: Search,
    top: Top = 5,
    seeds: Seeds = 5,
    epochs: Epochs = None,
    settings: options.Settings = None,
    final: Final = False,
    name: Name = None,
    resume: Resume = False,
    data: options.Data = None,
    device: options.Device = "auto",
    gpus_per_trial: options.Gpus = None,
    as_json: options.Json = False,
    max_concurrent: options.MaxConcurrent = None,
    cpus_per_trial: options.Cpus = 1,
    precision: options.Precision = "auto",
    execution: options.Execution = "auto",
    deterministic: options.Deterministic = False,
    address: options.Address = None,
    allow_mixed: options.AllowMixed = False,
    accept_changes: options.AcceptChanges = False,
    tracking_uri: options.TrackingUri = None,
    mirror: options.Mirror = None,
    storage: options.Storage = None,
) -> None:
    """Train a search's best trials again under new seeds, beside its baseline.

    It gives mean, standard deviation and the gain over the baseline in pairs of equal seeds. With
    --final the confirmed best is evaluated on the test set, once. Ctrl-C ends it in order; --resume
    continues.

    Example: python -m tune_cifar confirm --search s8-cpu-1 --top 5 --seeds 5
    """
    from tune_cifar.record.store import find_storage, load_searches
    from tune_cifar.space.select import parse_setting

    _refuse_misplaced(context, final)
    if accept_changes and not resume:
        raise typer.BadParameter("--accept-changes belongs to --resume.")
    folder = find_storage(storage)
    if resume:
        recorded = _find_recorded(folder, search, final, name)
        _refuse_changed(context, recorded)
        resume_confirmation(context, recorded, data, accept_changes, as_json)
        return
    (state,) = load_searches(folder, search=search)
    request = options.make_request(context, options.find_recorded_data(state, data))
    console = stderr() if as_json else stdout()
    given = dict(parse_setting(setting) for setting in settings or [])
    plan = _plan(state, request, (top, seeds, given, epochs), final, console)
    _run(plan, data, as_json)


def resume_confirmation(
    context: typer.Context,
    state: SearchState,
    data: str | None,
    accepts_changes: bool,
    as_json: bool = False,
) -> None:
    """Continue a recorded confirmation; tell a finished one again."""
    header, settled = state.header, state.header.confirmation
    assert settled is not None
    if state.is_finished:
        _finish(state, data, context.params["tracking_uri"], as_json)
        return
    request = options.make_request(
        context,
        options.find_recorded_data(state, data),
        storage=state.storage,
        name=header.name,
        device=header.numerics.device,
        keep_weights=count_weights(settled),
    )
    console = stderr() if as_json else stdout()
    with console.status("reading the record and starting the workers ..."):
        from tune_cifar.search.run import prepare_resume

        plan = prepare_resume(request, None, None, accepts_changes)
    _run(plan, data, as_json)


def count_weights(settled: Confirmation) -> int:
    """Of how many trainings the weights are kept: the test set needs all of them."""
    return settled.num_trials if settled.final else 1


def _run(plan: SearchPlan, data: str | None, as_json: bool) -> None:
    """Run a settled confirmation and tell what it found."""
    from tune_cifar.cli.live import run_plan

    console = stderr() if as_json else stdout()
    state, faults = run_plan(plan, console)
    for fault in faults:
        say(fault, console, "yellow")
    _finish(state, data, plan.request.tracking_uri, as_json)


def _finish(state: SearchState, data: str | None, tracking_uri: str | None, as_json: bool) -> None:
    """Report, after the test set where it is final; exit status 130 when it is unfinished."""
    settled, console = state.header.confirmation, stderr() if as_json else stdout()
    assert settled is not None
    if not state.is_finished:
        given = repeat_place(state) + repeat_launch(state)
        command = f"python -m tune_cifar search --name {state.header.name} --resume{given}"
        paste(f"\ncontinue it with:\n  {command}", console)
        raise typer.Exit(130)
    if settled.final:
        evaluate_tests(state, data, this_command(), tracking_uri, console)
    _report(state, as_json, console)
    if not (settled.final or as_json):
        given = repeat_place(state, data)
        command = f"python -m tune_cifar confirm --search {settled.search}{given} --final"
        paste(f"\nnext:\n  {command}", console)


def _refuse_misplaced(context: typer.Context, is_final: bool) -> None:
    """Refuse options that the confirmation has settled for a final one."""
    if is_final:
        words = "belongs to the confirmation: --final trains what was confirmed."
        options.refuse_given(context, ("top", "settings", "epochs"), words)


def _refuse_changed(context: typer.Context, recorded: SearchState) -> None:
    """Refuse options that differ from the confirmation to continue."""
    settled = recorded.header.confirmation
    assert settled is not None
    top = len(settled.candidates) - 1 if settled.top is None else settled.top
    more = {"top": top, "seeds": len(settled.seeds), "epochs": settled.epochs}
    options.refuse_changed(context, recorded.header, more)


def choose_name(storage: Path, search: str, is_final: bool, way_out: str = WAY_OUT) -> str:
    """Return the name of a confirmation that was given none: the search's, -confirm or -final.

    A number is added where something else has the name.

    Args:
        way_out: what to do where the search's own confirmation has it.

    Raises:
        NameTakenError: when the search's own confirmation has it.
    """
    from tune_cifar.record.files import number_names
    from tune_cifar.record.journal import is_taken
    from tune_cifar.record.store import load_searches, search_folder

    for name in number_names(f"{search[:54]}-{'final' if is_final else 'confirm'}"):
        if not is_taken(search_folder(storage, name)):
            return name
        settled = load_searches(storage, search=name)[0].header.confirmation
        if settled is not None and (settled.search, settled.final) == (search, is_final):
            what = "final confirmation" if is_final else "confirmation"
            raise NameTakenError(f"{name}: a {what} of this search exists already. {way_out}")
    raise AssertionError("the numbers never end")


def find_same(storage: Path, settled: Confirmation, name: str | None) -> SearchState | None:
    """Return the newest recorded confirmation of the same trainings, of that name if one is given.

    None where there is none.
    """
    from tune_cifar.record.store import load_searches
    from tune_cifar.verify.confirm import find_confirmation

    states = [
        state
        for state in load_searches(storage)
        if state.header.confirmation == settled and name in (None, state.header.name)
    ]
    return find_confirmation(states, settled.search, settled.final)


def _find_recorded(folder: Path, search: str, is_final: bool, name: str | None) -> SearchState:
    """Return the confirmation to continue; of that name, if one is given."""
    from tune_cifar.record.store import load_searches
    from tune_cifar.verify.confirm import find_confirmation

    states = [state for state in load_searches(folder) if name in (None, state.header.name)]
    state = find_confirmation(states, search, is_final)
    if state is None:
        kind = "final confirmation" if is_final else "confirmation"
        named = f" named {name}" if name else ""
        raise ConfigError(f"There is no {kind} of {search}{named} to resume. Leave --resume out.")
    return state


def _plan(
    state: SearchState,
    request: SearchRequest,
    wanted: tuple[int, int, dict[str, Any], int | None],
    is_final: bool,
    console: Console,
) -> SearchPlan:
    """Settle a new confirmation of a search and say what it will train.

    Args:
        wanted: best trials, seeds, settings and epochs; a final one reads the seeds alone.
    """
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.data.files import describe_data
    from tune_cifar.verify.confirm import make_confirmation, settle_final

    if is_final:
        space, settled = settle_final(state, wanted[1], describe_data(request.source))
    else:
        space, settled = make_confirmation(state, *wanted)
    print_synthetic_banner(console, request.source.name)
    names = ", ".join(candidate.run_id for candidate in settled.candidates)
    seeds, config = ", ".join(map(str, settled.seeds)), space.baseline
    length = f"{config.epochs} epochs of {config.train_size:,} images each"
    say(f"{names} under the seeds {seeds}: {length}", console)
    with console.status("measuring 20 training steps and starting the workers ..."):
        from tune_cifar.search.run import prepare_search

        name = request.name or choose_name(request.storage, state.header.name, is_final)
        request = replace(request, name=name, keep_weights=count_weights(settled))
        return prepare_search(space, request, settled)


def _report(state: SearchState, as_json: bool, console: Console) -> None:
    """Say what a finished confirmation found."""
    from tune_cifar.record.test_log import find_test_log, load_test_logs
    from tune_cifar.verify.confirm import summarise, summarise_tests

    settled, name = state.header.confirmation, state.header.name
    assert settled is not None
    answer: dict[str, Any] = {"search": settled.search, "name": name, "final": settled.final}
    if settled.final:
        confirmed = summarise_tests(state, load_test_logs(state.storage))
        answer["test_log"] = str(find_test_log(state.storage))
    else:
        confirmed = summarise(state)
    if as_json:
        print_json(answer | {"candidates": [found.to_dict() for found in confirmed]})
        return
    print_confirmed(confirmed, state, console)


def evaluate_tests(
    state: SearchState, data: str | None, command: str, tracking_uri: str | None, console: Console
) -> None:
    """Evaluate on the test set every complete training that was not evaluated on it before.

    Args:
        command: of the user, for the test log.
    """
    from tune_cifar.record.test_log import find_test_evaluations
    from tune_cifar.train.numerics import restore_numerics
    from tune_cifar.train.recorded import load_recorded_data, load_trained

    storage, info = state.storage, state.header.data
    complete = [trial for trial in state.trials.values() if trial.status == "complete"]
    untested = [t for t in complete if not find_test_evaluations(storage, t.fingerprint, info)]
    if not untested:
        return
    options.check_tracking_uri(state.storage, tracking_uri, console)
    source = options.find_recorded_data(state, data)
    for trial in untested:
        loaded = load_recorded_data(state, trial, source)
        way_out = "They belong to what is confirmed: confirm it under another --name."
        numerics = restore_numerics(trial.numerics)
        trainer = load_trained(state, trial, loaded, numerics, way_out)
        row, kept = evaluate_test(state, trial, trainer, source, command, tracking_uri, console)
        if kept is None:
            before = f"evaluated before, for {row.run_id} on {row.date}"
            say_test(trial.run_id, row, before, console)


def print_confirmed(confirmed: Sequence[Confirmed], state: SearchState, console: Console) -> None:
    """Print a row per candidate, the baseline first; then the winner's curse in words."""
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
    table = Table("candidate", "search", "mean", "sd", "seeds", "gain over the baseline", box=None)
    for i, found in enumerate(confirmed):
        gain = "the baseline" if i == 0 else describe_pairs(found.gain)
        numbers = map(format_percent, (found.search_score, found.mean, found.sd))
        table.add_row(found.run_id, *numbers, str(len(found.scores)), gain)
    console.print(table)
    for trial in state.trials.values():
        if trial.status in ("diverged", "failed"):
            counted = "counts as chance" if trial.status == "diverged" else "is left out"
            say(f"{trial.run_id} {trial.status}: it {counted}", console, "yellow")
    if not settled.final:
        for found in confirmed[1:]:
            say(describe_curse(found), console)


def describe_pairs(gain: Gain | None) -> str:
    """Return a mean gain and its interval in points."""
    if gain is None:
        return "no pair"
    mean = f"{100 * gain.mean:+.2f} points"
    if gain.interval is None:
        return f"{mean} in {gain.num_pairs} pair: no interval"
    low, high = (100 * end for end in gain.interval)
    return f"{mean}, 95 % interval {low:+.2f} to {high:+.2f} ({gain.num_pairs} pairs)"


def describe_curse(found: Confirmed) -> str:
    """Return a sentence that compares the search's score with the mean over new seeds."""
    from tune_cifar.report.format import format_percent

    if found.search_score is None or found.mean is None:
        return f"{found.run_id}: nothing to compare yet."
    searched = f"{found.run_id}: {format_percent(found.search_score)} in the search"
    if not found.same_recipe:
        return f"{searched}, with other settings: not comparable with these."
    compared = f"{searched}, {format_percent(found.mean)} over {len(found.scores)} new seeds"
    excess = 100 * (found.search_score - found.mean)
    if excess <= 0:
        return f"{compared}: not lower than in the search."
    return f"{compared}: {excess:.2f} points lower, since the best was chosen (the winner's curse)."
