"""`search`: the main job; with --resume, whatever a record holds goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.plan import choose_space
from tune_cifar.cli.terminal import repeat_options, say, stderr, stdout, this_command

if TYPE_CHECKING:
    from tune_cifar.record.state import SearchState
    from tune_cifar.search.plan import SearchPlan, SearchRequest
    from tune_cifar.space.select import SearchSpace

WarmStart = Annotated[
    str | None,
    typer.Option(
        "--warm-start",
        metavar="SEARCH",
        help="Try that search's best trials right after the baseline.",
        rich_help_panel=options.SEARCHING,
    ),
]
WarmTrials = Annotated[
    int,
    typer.Option(
        "--warm-trials",
        metavar="K",
        min=1,
        help="How many of them.",
        rich_help_panel=options.SEARCHING,
    ),
]
KeepWeights = Annotated[
    int,
    typer.Option(
        "--keep-weights",
        metavar="K",
        min=1,
        help="Of the best K complete trials.",
        rich_help_panel=options.RECORDS,
    ),
]
# Options that only a search has.
SEARCHS = ("trials", "max_time", "keep_weights", "seed", "warm_start", "warm_trials")


def search(
    context: typer.Context,
    space: Annotated[str | None, options.SPACE] = None,
    tier: options.Tier = None,
    trials: options.Trials = None,
    max_time: options.MaxTime = None,
    settings: options.Settings = None,
    name: options.Name = None,
    resume: options.Resume = False,
    data: options.Data = None,
    device: options.Device = "auto",
    gpus_per_trial: options.Gpus = None,
    max_concurrent: options.MaxConcurrent = None,
    cpus_per_trial: options.Cpus = 1,
    precision: options.Precision = "auto",
    execution: options.Execution = "eager",
    deterministic: options.Deterministic = False,
    seed: options.Seed = None,
    warm_start: WarmStart = None,
    warm_trials: WarmTrials = 5,
    keep_weights: KeepWeights = 3,
    accept_changes: options.AcceptChanges = False,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
) -> None:
    """Search a space: Optuna proposes, parallel trials train, weak ones are stopped early.

    Ctrl-C once ends it in order, twice at once. --name X --resume continues a search, a
    confirmation or a training.

    Example: python -m tune_cifar search --space s10 --max-time 8m
    """
    from tune_cifar.data.files import find_data
    from tune_cifar.record.journal import check_name
    from tune_cifar.record.store import find_storage
    from tune_cifar.search.plan import SearchRequest

    folder = find_storage(storage)
    if name is not None:
        check_name(name)
    if space is None and not resume:
        raise typer.BadParameter("Give --space for a new search, or --resume with --name.")
    if resume:
        state = _find_resumed(context, folder, name)
        if state.header.kind != "search":
            _resume_other(state, data, tracking_uri, gpus_per_trial, max_concurrent, accept_changes)
            return
        _leave_if_over(state, trials, max_time, data, storage)
        source = options.find_recorded_data(state, data)
        device = state.header.numerics.device
    elif accept_changes:
        raise typer.BadParameter("--accept-changes belongs to --resume.")
    else:
        source = find_data(data)
    request = SearchRequest(
        source=source,
        storage=folder,
        command=this_command(),
        name=name,
        seed=seed,
        device=device,
        precision=precision,
        deterministic=deterministic,
        execution=execution,
        cpus_per_trial=cpus_per_trial,
        gpus_per_trial=gpus_per_trial,
        max_concurrent=max_concurrent,
        tracking_uri=tracking_uri,
        keep_weights=keep_weights,
        warm_start=warm_start,
        warm_trials=None if warm_start is None else warm_trials,
    )
    if resume:
        plan = _plan_resume(request, trials, max_time, accept_changes)
    else:
        assert space is not None
        found = choose_space(request, space, tier, settings or [], trials, max_time)
        plan = _plan_search(_warm_start(found, request), request)
    _run(plan, repeat_options(data=data), repeat_options(storage=storage))


def _find_resumed(context: typer.Context, storage: Path, name: str | None) -> SearchState:
    """Return the record to continue; refuse options that differ from it."""
    from tune_cifar.record.store import load_searches

    if name is None:
        raise typer.BadParameter("--resume needs --name. Names stand in `searches list`.")
    (state,) = load_searches(storage, search=name)
    header = state.header
    if header.kind != "search":
        options.refuse_given(context, SEARCHS, "is a search's.")
    more = {"seed": header.seed, "warm_start": header.warm_start}
    if header.warm_start is not None:
        more["warm_trials"] = header.warm_trials
    options.refuse_changed(context, header, more)
    return state


def _warm_start(space: SearchSpace, request: SearchRequest) -> SearchSpace:
    """Put another search's best trials first, if one is named, and say which do not fit."""
    from tune_cifar.record.store import load_searches
    from tune_cifar.search.resume import warm_start

    if request.warm_start is None or request.warm_trials is None:
        return space
    (state,) = load_searches(request.storage, search=request.warm_start)
    space, notes = warm_start(space, state, request.warm_trials)
    for note in notes:
        say(note, stderr())
    return space


def _plan_search(space: SearchSpace, request: SearchRequest) -> SearchPlan:
    """Settle a new search and say what it will do."""
    from tune_cifar.cli.summary import print_synthetic_banner

    print_synthetic_banner(stdout(), request.source.name)
    with stdout().status("measuring 20 training steps and starting the workers ..."):
        from tune_cifar.search.run import prepare_search

        plan = prepare_search(space, request)
    for note in (*plan.notes, plan.describe()):
        say(note)
    return plan


def _plan_resume(
    request: SearchRequest, trials: str | None, max_time: str | None, accepts_changes: bool
) -> SearchPlan:
    """Settle how a recorded search goes on and say what of it is there."""
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.space.rules import parse_duration

    max_seconds = parse_duration(max_time) if max_time else None
    print_synthetic_banner(stdout(), request.source.name)
    with stdout().status("reading the record and starting the workers ..."):
        from tune_cifar.search.run import prepare_resume

        plan = prepare_resume(request, trials, max_seconds, accepts_changes)
    for note in (*plan.notes, plan.describe()):
        say(note)
    return plan


def _leave_if_over(
    state: SearchState,
    trials: str | None,
    max_time: str | None,
    data: str | None,
    storage: str | None,
) -> None:
    """Tell how a finished search ended, and leave, unless it is to have more trials or time."""
    from tune_cifar.cli.summary import print_search_summary
    from tune_cifar.search.plan import count_trials

    num_started, num_trials = len(state.trials), state.num_trials
    if trials is not None:
        num_trials = count_trials(trials, num_started)
    # After a time limit, trials or time are asked for anew by naming them.
    has_more = num_started < num_trials and (trials is not None or max_time is not None)
    if state.is_finished and not has_more:
        repeated = repeat_options(data=data), repeat_options(storage=storage)
        print_search_summary(stdout(), state, [], [], *repeated)
        raise typer.Exit


def _resume_other(
    state: SearchState,
    data: str | None,
    tracking_uri: str | None,
    gpus_per_trial: float | None,
    max_concurrent: int | None,
    accepts_changes: bool,
) -> None:
    """Continue a confirmation or a single training."""
    from tune_cifar.cli.confirm import resume_confirmation
    from tune_cifar.cli.train import resume_training

    if state.header.kind == "train":
        resume_training(state, data, tracking_uri)
    else:
        resume_confirmation(
            state, data, tracking_uri, gpus_per_trial, max_concurrent, accepts_changes
        )


def _run(plan: SearchPlan, data_option: str, storage_option: str) -> None:
    """Run a settled search and say what it found; exit status 130 when it was interrupted."""
    from tune_cifar.cli.live import run_plan
    from tune_cifar.cli.summary import print_search_summary

    state, faults = run_plan(plan, stdout())
    if state.header.name != plan.name:
        say(f"{plan.name} was taken meanwhile by another search: this one is {state.header.name}.")
    dropped = list(plan.space.dropped) if plan.past is None else []
    print_search_summary(stdout(), state, faults, dropped, data_option, storage_option)
    if not state.is_finished:
        raise typer.Exit(130)
