"""`search`: the main job; with --resume, whatever a record holds goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli import options
from tune_cifar.cli.plan import Limits, choose_space
from tune_cifar.cli.terminal import repeat_options, say, stdout

if TYPE_CHECKING:
    from tune_cifar.record.state import SearchState
    from tune_cifar.search.plan import SearchPlan, SearchRequest
    from tune_cifar.space.select import SearchSpace

WarmStart = Annotated[
    list[str] | None,
    typer.Option(
        "--warm-start",
        metavar="SEARCH",
        help="Try that search's best trials right after the baseline. Repeatable.",
        rich_help_panel=options.SEARCHING,
    ),
]
WarmTrials = Annotated[
    int,
    typer.Option(
        "--warm-trials",
        metavar="K",
        min=1,
        help="How many of each.",
        rich_help_panel=options.SEARCHING,
    ),
]
Target = Annotated[
    float | None,
    typer.Option(
        "--target",
        metavar="0.90",
        help="Start no trial once one has this val_acc.",
        rich_help_panel=options.SEARCHING,
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(
        "--patience",
        metavar="N",
        help="Start no trial once N have brought no gain beyond the noise.",
        rich_help_panel=options.SEARCHING,
    ),
]
Learn = Annotated[
    bool,
    typer.Option(
        "--learn",
        help="With --warm-start: tell the sampler its results; train only the baseline again.",
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
Continue = Annotated[
    bool,
    typer.Option(
        "--continue",
        help="Begin the search --name, or go on with it where it is.",
        rich_help_panel=options.RECORDS,
    ),
]
# Options that only a search has.
SEARCHS = (
    "trials",
    "max_time",
    "target",
    "patience",
    "keep_weights",
    "seed",
    "warm_start",
    "warm_trials",
    "learn",
)
# Options that a search and a confirmation have.
SEVERAL = (
    "max_concurrent",
    "gpus_per_trial",
    "address",
    "allow_mixed",
    "mirror",
    "accept_changes",
)


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
    execution: options.Execution = "auto",
    deterministic: options.Deterministic = False,
    address: options.Address = None,
    allow_mixed: options.AllowMixed = False,
    seed: options.Seed = None,
    target: Target = None,
    patience: Patience = None,
    warm_start: WarmStart = None,
    warm_trials: WarmTrials = 5,
    learn: Learn = False,
    keep_weights: KeepWeights = 3,
    continue_: Continue = False,
    accept_changes: options.AcceptChanges = False,
    tracking_uri: options.TrackingUri = None,
    mirror: options.Mirror = None,
    storage: options.Storage = None,
) -> None:
    """Search a space: a sampler proposes, parallel trials train, weak ones are stopped early.

    Ctrl-C once ends it in order, twice at once. --name X --resume continues a search, a
    confirmation or a training.

    Example: python -m tune_cifar search --space s10 --max-time 8m
    """
    from tune_cifar.data.files import find_data
    from tune_cifar.record.journal import check_name
    from tune_cifar.record.store import find_storage

    folder, limits = find_storage(storage), Limits(trials, max_time, target, patience)
    if name is not None:
        check_name(name)
    if continue_:
        resume = resume or _is_begun(folder, name)
    if resume:
        state = _find_resumed(context, folder, name)
        if state.header.kind != "search":
            _resume_other(context, state, data, tracking_uri, accept_changes)
            return
        _leave_if_over(state, Limits(None, None) if continue_ else limits, data, storage)
        source = options.find_recorded_data(state, data)
        device = state.header.numerics.device
        keep_weights = choose_keep_weights(context, state)
    else:
        _refuse_misplaced(context, space, continue_)
        source = find_data(data)
    more = {"device": device, "keep_weights": keep_weights}
    request = options.make_request(context, source, **more)
    if resume:
        plan = _plan_resume(request, limits, accept_changes)
    else:
        assert space is not None
        found = choose_space(request, space, tier, settings or [], limits)
        plan = _plan_search(found, request)
    _run(plan, repeat_options(data=data), repeat_options(storage=storage))


def _is_begun(storage: Path, name: str | None) -> bool:
    """Return whether a search of the name is recorded."""
    from tune_cifar.record.journal import is_taken
    from tune_cifar.record.store import search_folder

    if name is None:
        raise typer.BadParameter("--continue needs --name.")
    return is_taken(search_folder(storage, name))


def _refuse_misplaced(context: typer.Context, space: str | None, may_go_on: bool) -> None:
    """Refuse what a new search must or must not have.

    Args:
        may_go_on: the same command will go on with it.
    """
    if space is None:
        raise typer.BadParameter("Give --space for a new search, or --resume with --name.")
    if not may_go_on:
        options.refuse_given(context, ("accept_changes",), "belongs to --resume.")
    if not context.params["warm_start"]:
        options.refuse_given(context, ("learn", "warm_trials"), "belongs to --warm-start.")
    elif context.params["learn"]:
        options.refuse_given(context, ("warm_trials",), "is for --warm-start without --learn.")


def _find_resumed(context: typer.Context, storage: Path, name: str | None) -> SearchState:
    """Return the record to continue; refuse options that differ from it."""
    from tune_cifar.record.store import load_searches

    if name is None:
        raise typer.BadParameter("--resume needs --name. Names stand in `searches list`.")
    (state,) = load_searches(storage, search=name)
    header = state.header
    if header.kind != "search":
        options.refuse_given(context, SEARCHS, "is a search's.")
    if header.kind == "train":
        options.refuse_given(context, SEVERAL, "is of no use to a single training.")
    more: dict[str, Any] = {
        "seed": header.seed,
        "warm_start": header.warm_start or None,
        "warm_trials": header.warm_trials,
        "learn": bool(header.learned),
    }
    options.refuse_changed(context, header, more)
    return state


def choose_keep_weights(context: typer.Context, state: SearchState) -> int:
    """Return how many weights a resumed search keeps: unless it is typed, no fewer than it has."""
    given: int = context.params["keep_weights"]
    if "keep_weights" in dict(options.list_given(context)):
        return given
    return max(given, options.count_kept_weights(state))


def _plan_search(space: SearchSpace, request: SearchRequest) -> SearchPlan:
    """Settle a new search."""
    from tune_cifar.cli.summary import print_synthetic_banner

    print_synthetic_banner(stdout(), request.source.name)
    with stdout().status("measuring 20 training steps and starting the workers ..."):
        from tune_cifar.search.run import prepare_search

        return prepare_search(space, request)


def _plan_resume(request: SearchRequest, limits: Limits, accepts_changes: bool) -> SearchPlan:
    """Settle how a recorded search goes on."""
    from tune_cifar.cli.summary import print_synthetic_banner

    goals, max_seconds = (limits.target, limits.patience), limits.max_time_seconds
    print_synthetic_banner(stdout(), request.source.name)
    with stdout().status("reading the record and starting the workers ..."):
        from tune_cifar.search.run import prepare_resume

        return prepare_resume(request, limits.trials, max_seconds, accepts_changes, *goals)


def _leave_if_over(
    state: SearchState, limits: Limits, data: str | None, storage: str | None
) -> None:
    """Tell how a finished search ended, and leave, unless it is to have more trials or time."""
    from tune_cifar.cli.summary import print_search_summary
    from tune_cifar.search.plan import count_trials

    num_started, num_trials = len(state.trials), state.num_trials
    if limits.trials is not None:
        num_trials = count_trials(limits.trials, num_started)
    # After a time limit or a goal, trials, time or another goal are asked for anew by naming them.
    has_more = num_started < num_trials and any(given is not None for given in limits)
    if state.is_finished and not has_more:
        repeated = repeat_options(data=data), repeat_options(storage=storage)
        print_search_summary(stdout(), state, [], [], *repeated)
        raise typer.Exit


def _resume_other(
    context: typer.Context,
    state: SearchState,
    data: str | None,
    tracking_uri: str | None,
    accepts_changes: bool,
) -> None:
    """Continue a confirmation or a single training."""
    from tune_cifar.cli.confirm import resume_confirmation
    from tune_cifar.cli.train import resume_training

    if state.header.kind == "train":
        resume_training(state, data, tracking_uri)
    else:
        resume_confirmation(context, state, data, accepts_changes)


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
