"""`search`: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli import options
from tune_cifar.cli.plan import choose_search
from tune_cifar.cli.terminal import repeat_options, say, stderr, stdout, this_command
from tune_cifar.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from tune_cifar.record.state import SearchState
    from tune_cifar.search.plan import SearchPlan

Name = Annotated[
    str | None,
    typer.Option(
        "--name", help="Of the search. Default: space, tier and time.", rich_help_panel="What"
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the search --name, from its record.",
        rich_help_panel="Going on",
    ),
]
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="With --resume: although code, data or numerics have changed.",
        rich_help_panel="Going on",
    ),
]
WarmStart = Annotated[
    str | None,
    typer.Option(
        "--warm-start",
        metavar="SEARCH",
        help="Try that search's best trials right after the baseline.",
        rich_help_panel="Going on",
    ),
]
WarmTrials = Annotated[
    int,
    typer.Option(
        "--warm-trials", metavar="K", min=1, help="How many of them.", rich_help_panel="Going on"
    ),
]
KeepWeights = Annotated[
    int,
    typer.Option(
        "--keep-weights",
        metavar="K",
        min=1,
        help="Of the best K finished trials.",
        rich_help_panel="Where",
    ),
]


def search(
    context: typer.Context,
    space: Annotated[
        str | None,
        typer.Option(
            "--space",
            help="A name from `spaces list`, or the path of a space file.",
            rich_help_panel="What",
            autocompletion=options.complete_space,
        ),
    ] = None,
    tier: options.Tier = None,
    trials: options.Trials = None,
    max_time: options.MaxTime = None,
    settings: options.Settings = None,
    name: Name = None,
    seed: options.Seed = None,
    resume: Resume = False,
    accept_changes: AcceptChanges = False,
    warm_start: WarmStart = None,
    warm_trials: WarmTrials = 5,
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
    keep_weights: KeepWeights = 3,
) -> None:
    """Search a space: Optuna proposes, parallel trials train, the hopeless are stopped early, validation chooses.

    Ctrl-C once ends it in order, twice at once; --resume goes on.

    Example: python -m tune_cifar search --space s10 --max-time 8m
    """
    from tune_cifar.record.journal import check_name
    from tune_cifar.record.store import find_storage

    if name is not None:
        check_name(name)
    if (space is None) != resume:
        raise typer.BadParameter("Give --space for a new search, or --resume with --name.")
    given = {
        "storage": find_storage(storage),
        "name": name,
        "gpus_per_trial": gpus_per_trial,
        "max_concurrent": max_concurrent,
        "command": this_command(),
        "tracking_uri": tracking_uri,
        "keep_weights": keep_weights,
    }
    repeated = repeat_options(data=data), repeat_options(storage=storage)
    if resume:
        _refuse_new_choices(context)
        plan = _plan_resume(given, data, trials, max_time, accept_changes, repeated)
        dropped: list[str] = []
    else:
        assert space is not None
        if accept_changes:
            raise typer.BadParameter("--accept-changes belongs to --resume.")
        given |= {"seed": seed, "device": device, "precision": precision}
        given |= {"execution": execution, "deterministic": deterministic}
        given |= {"cpus_per_trial": cpus_per_trial}
        warm = (warm_start, warm_trials) if warm_start else None
        plan = _plan_search(given, space, tier, settings or [], trials, max_time, data, warm)
        dropped = list(plan.space.dropped)
    _run(plan, dropped, repeated)


# Options that a recorded search has settled.
SETTLED = (
    *("space", "tier", "settings", "seed", "warm_start", "warm_trials"),
    *("device", "precision", "execution", "cpus_per_trial", "deterministic"),
)


def _refuse_new_choices(context: typer.Context) -> None:
    """Refuse, with --resume, the options that the record answers already."""
    options.refuse_given(context, SETTLED, "belongs to a new search: the record has it.")
    if context.params["name"] is None:
        raise typer.BadParameter("--resume needs --name. Names stand in `searches list`.")


def _plan_search(
    given: dict[str, Any],
    space: str,
    tier: str | None,
    settings: list[str],
    trials: str | None,
    max_time: str | None,
    data: str | None,
    warm: tuple[str, int] | None,
) -> SearchPlan:
    """Settle a new search and say what it will do."""
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.record.store import load_searches

    found, request = choose_search(given, space, tier, settings, (trials, max_time), data)
    if warm is not None:
        from tune_cifar.search.resume import warm_start

        (state,) = load_searches(request.storage, search=warm[0])
        found, notes = warm_start(found, state, warm[1])
        for note in notes:
            say(note, stderr())
    print_synthetic_banner(stdout(), request.source.name)
    with stdout().status("measuring 20 training steps and starting the workers ..."):
        from tune_cifar.search.run import prepare_search

        plan = prepare_search(found, request)
    say(plan.describe())
    return plan


def _plan_resume(
    given: dict[str, Any],
    data: str | None,
    trials: str | None,
    max_time: str | None,
    accepts_changes: bool,
    repeated: tuple[str, str],
) -> SearchPlan:
    """Settle how a recorded search goes on and say what of it is there; of one that is finished, and is not to have
    more trials, say how it ended and leave."""
    from tune_cifar.cli.summary import print_search_summary, print_synthetic_banner
    from tune_cifar.data.files import find_data
    from tune_cifar.record.events import KIND_WORDS
    from tune_cifar.record.store import load_searches
    from tune_cifar.search.plan import SearchRequest
    from tune_cifar.space.rules import parse_duration

    (state,) = load_searches(given["storage"], search=given["name"])
    header = state.header
    if header.kind != "search":
        hint = f"Use `{header.kind} --resume`."
        raise ConfigError(
            f"--resume: a search must be named, got {header.name}, {KIND_WORDS[header.kind]}. {hint}"
        )
    max_seconds = parse_duration(max_time) if max_time else None
    may_go_on = max_seconds is not None and len(state.trials) < state.num_trials
    if state.is_finished and trials is None and not may_go_on:
        print_search_summary(stdout(), state, [], [], *repeated)
        raise typer.Exit
    stand_in = "shapes" if header.data.name == "shapes" else None
    request = SearchRequest(
        source=find_data(data or stand_in), device=header.numerics.device, **given
    )
    print_synthetic_banner(stdout(), request.source.name)
    with stdout().status("reading the record and starting the workers ..."):
        from tune_cifar.search.run import prepare_resume

        plan = prepare_resume(request, trials, max_seconds, accepts_changes)
    for note in plan.notes:
        say(note)
    say(plan.describe())
    return plan


def _run(plan: SearchPlan, dropped: list[str], repeated: tuple[str, str]) -> None:
    """Run a settled search and say what it found; exit status 130 when it was interrupted."""
    from tune_cifar.cli.summary import print_search_summary

    state, faults = run_plan(plan, stdout())
    print_search_summary(stdout(), state, faults, dropped, *repeated)
    if not state.is_finished:
        raise typer.Exit(130)


def run_plan(plan: SearchPlan, console: Console) -> tuple[SearchState, list[str]]:
    """Run what is settled under the eyes of its user; the record as it ends, and what MLflow did not take."""
    from tune_cifar.cli.live import SearchView
    from tune_cifar.search.run import run_search

    with SearchView(
        console, plan.space.budget, plan.resources.max_concurrent, plan.cost.epoch_seconds
    ) as view:
        return run_search(plan, view.on_event, view.stop)
