"""`search`: the main job."""

from __future__ import annotations

from typing import Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import repeat_options, say, stderr, stdout, this_command

Tier = Annotated[
    str | None,
    typer.Option(
        "--tier", metavar="full|cpu", help="Budget. Default: full with a GPU, else cpu.", rich_help_panel="What"
    ),
]
Trials = Annotated[int | None, typer.Option("--trials", metavar="N", help="At most N trials.", rich_help_panel="What")]
MaxTime = Annotated[
    str | None, typer.Option("--max-time", metavar="8m", help="Such as 90s, 8m, 2h.", rich_help_panel="What")
]
Name = Annotated[
    str | None, typer.Option("--name", help="Of the search. Default: space, tier and time.", rich_help_panel="What")
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Of the sampler.", rich_help_panel="What")]
Gpus = Annotated[
    float | None,
    typer.Option("--gpus-per-trial", metavar="X", help="A fraction packs trials on a GPU.", rich_help_panel="How"),
]
MaxConcurrent = Annotated[
    int | None,
    typer.Option("--max-concurrent", metavar="N", help="Trials at once. Default: as fit.", rich_help_panel="How"),
]


def search(
    space: options.Space,
    tier: Tier = None,
    trials: Trials = None,
    max_time: MaxTime = None,
    settings: options.Settings = None,
    name: Name = None,
    seed: Seed = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    cpus_per_trial: options.Cpus = 1,
    gpus_per_trial: Gpus = None,
    max_concurrent: MaxConcurrent = None,
    deterministic: options.Deterministic = False,
    data: options.Data = None,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
) -> None:
    """Search a space: Optuna proposes, parallel trials train, the hopeless are stopped early, validation chooses.

    Example: python -m tune_cifar search --space s10 --max-time 8m
    """
    from tune_cifar.data import find_data
    from tune_cifar.live import SearchView, format_seconds, print_search_summary, print_stand_in_banner
    from tune_cifar.record import find_storage
    from tune_cifar.space import load_space, parse_duration, parse_setting

    console = stdout()
    pinned = dict(parse_setting(setting) for setting in settings or [])
    max_seconds = parse_duration(max_time) if max_time else None
    source = find_data(data)
    load_space(space, tier or "cpu", pinned).limit(trials, max_seconds)  # a mistake is told before Ray is imported
    from tune_cifar.search import SearchRequest, prepare_search, run_search

    request = SearchRequest(
        source=source,
        storage=find_storage(storage),
        name=name,
        device=device,
        precision=precision,
        cpus_per_trial=cpus_per_trial,
        gpus_per_trial=gpus_per_trial,
        max_concurrent=max_concurrent,
        deterministic=deterministic,
        seed=seed,
        command=this_command(),
        tracking_uri=tracking_uri,
    )
    if tier is None:
        tier = request.default_tier
        if tier == "cpu":
            say("No GPU here: tier cpu, a small budget (--tier full for the real one).", stderr())
    found = load_space(space, tier, pinned).limit(trials, max_seconds)
    print_stand_in_banner(console, source.name)
    with console.status("measuring 20 training steps and starting the workers ..."):
        plan = prepare_search(found, request)
    say(plan.describe())
    view = SearchView(
        console,
        plan.epoch_seconds,
        plan.epochs_per_trial,
        found.budget.max_time_seconds,
        found.budget.trials,
        plan.resources.max_concurrent,
    )
    with view:
        state, faults = run_search(plan, view.hear)
    given = repeat_options(data=data), repeat_options(storage=storage)
    print_search_summary(console, state, faults, list(found.dropped), *given)
    if state.finished is not None and state.finished.reason == "interrupted":
        say(f"interrupted after {format_seconds(state.finished.wall_seconds)}; all that had ended is recorded.")
        raise typer.Exit(130)
