"""`plan`: what a search would take, before anything is spent."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import paste, print_json, say, stderr, stdout

if TYPE_CHECKING:
    from tune_cifar.search.plan import SearchPlan, SearchRequest
    from tune_cifar.space.select import SearchSpace


def plan(
    context: typer.Context,
    space: options.Space,
    tier: options.Tier = None,
    trials: options.Trials = None,
    max_time: options.MaxTime = None,
    settings: options.Settings = None,
    seed: options.Seed = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    execution: options.Execution = "auto",
    cpus_per_trial: options.Cpus = 1,
    gpus_per_trial: options.Gpus = None,
    max_concurrent: options.MaxConcurrent = None,
    deterministic: options.Deterministic = False,
    address: options.Address = None,
    allow_mixed: options.AllowMixed = False,
    data: options.Data = None,
    storage: options.Storage = None,
    as_json: options.Json = False,
) -> None:
    """Predict what a search takes, from 20 measured training steps and a simulation.

    Shows how many trials are expected at each rung, trial-epochs, wall time, memory and disk.
    Nothing is started. A search tells at its end how far off its prediction was.

    Example: python -m tune_cifar plan --space s10 --max-time 8m
    """
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.data.files import find_data

    request = options.make_request(context, find_data(data), command=_describe_search())
    found = choose_space(request, space, tier, settings or [], Limits(trials, max_time))
    console = stderr() if as_json else stdout()
    print_synthetic_banner(console, request.source.name)
    with console.status("measuring 20 training steps ..."):
        settled = _settle(found, request)
    if as_json:
        print_json(_to_dict(settled))
    else:
        _print_plan(settled)


def _settle(space: SearchSpace, request: SearchRequest) -> SearchPlan:
    """Plan a search; Ray is imported only for a cluster."""
    from tune_cifar.search.plan import settle_search

    if request.address is None:
        return settle_search(space, request)
    from tune_cifar.search.survey import make_survey

    return settle_search(space, request, survey=make_survey(request))


class Limits(NamedTuple):
    """Options that end a search, as typed."""

    trials: str | None
    max_time: str | None
    target: float | None = None
    patience: int | None = None

    @property
    def max_time_seconds(self) -> float | None:
        from tune_cifar.space.rules import parse_duration

        return parse_duration(self.max_time) if self.max_time else None


def choose_space(
    request: SearchRequest,
    space: str,
    tier: str | None,
    settings: list[str],
    limits: Limits,
) -> SearchSpace:
    """Load the space that a new search, or the plan of one, searches; options as typed."""
    from tune_cifar.data.files import describe_data
    from tune_cifar.search.plan import count_trials
    from tune_cifar.space.select import load_space, parse_setting

    pinned = dict(parse_setting(setting) for setting in settings)
    num_trials = count_trials(limits.trials) if limits.trials else None
    read = (num_trials, limits.max_time_seconds, limits.target, limits.patience)
    about = describe_data(request.source)
    if tier is None:
        # A mistake is told before torch is imported to look for a GPU.
        load_space(space, "cpu", pinned, about).limit(*read)
        tier = find_tier(request)
        if tier == "cpu":
            say("No GPU here: tier cpu, a small budget (--tier full for the real one).", stderr())
    return load_space(space, tier, pinned, about).limit(*read)


def find_tier(request: SearchRequest) -> str:
    """Return `full` where a GPU may be used, on this machine or on the cluster, else `cpu`."""
    if request.address is None:
        return request.default_tier
    from tune_cifar.search.cluster import find_tier as find_tier_of_nodes

    return find_tier_of_nodes(request)


def _describe_search() -> str:
    """The search that was planned, as a command."""
    words = [word for word in sys.argv[2:] if word != "--json"]
    return f"python -m tune_cifar {shlex.join(['search', *words])}"


def _to_dict(plan: SearchPlan) -> dict[str, Any]:
    space, expected, needs = plan.space, plan.forecast, plan.disk_needs
    rungs = zip(space.budget.rungs, expected.reached, strict=True)
    return {
        "space": space.name,
        "tier": space.tier,
        "data": plan.data.name,
        "device": plan.numerics.device_name,
        "precision": plan.numerics.precision,
        "cpus_per_trial": plan.resources.cpus_per_trial,
        "gpus_per_trial": plan.resources.gpus_per_trial,
        "max_concurrent": plan.resources.max_concurrent,
        "budget": space.budget.model_dump(mode="json"),
        "epoch_seconds": plan.cost.epoch_seconds,
        "memory_mb": plan.cost.memory_mb,
        "rungs": [{"epochs": rung, "trials": count} for rung, count in rungs],
        "trials": {"started": expected.started, "complete": expected.complete},
        "trial_epochs": expected.epochs._asdict(),
        "wall_seconds": expected.seconds._asdict(),
        "nodes": [
            {
                "node": offer.node,
                "address": offer.address,
                "trials": offer.slots,
                "device": offer.numerics.device_name,
                "epoch_seconds": offer.cost.epoch_seconds,
            }
            for offer in plan.offers
        ],
        "disk_bytes": {
            "checkpoints": needs.checkpoints,
            "weights": needs.weights,
            "records": needs.records,
            "total": needs.total,
        },
        "command": plan.request.command,
    }


def _print_plan(plan: SearchPlan) -> None:
    from rich.table import Table

    from tune_cifar.report.format import format_seconds

    budget, expected = plan.space.budget, plan.forecast
    say(f"{plan.space.name} ({plan.space.tier}): {budget.describe()}", style="bold")
    say(f"{plan.describe_cost()}.")
    if 0 < plan.resources.gpus_per_trial < 1:
        say(
            "That was measured alone: trials that share a GPU slow each other down.", style="yellow"
        )
    if plan.offers:
        _print_offers(plan)
    table = Table("rung", "trials that reach it", box=None, header_style="bold")
    for rung, count in zip(budget.rungs, expected.reached, strict=True):
        table.add_row(
            f"{rung} epoch{'s' if rung > 1 else ''}", f"{count:.1f} of {expected.started:.1f}"
        )
    stdout().print(table)
    table = Table("", "expected", "10 % to 90 % of searches", box=None, header_style="bold")
    epochs, seconds = expected.epochs, expected.seconds
    table.add_row("trial-epochs", f"{epochs.mean:.0f}", f"{epochs.low:.0f} to {epochs.high:.0f}")
    times = [format_seconds(value) for value in seconds]
    table.add_row("wall time", times[0], f"{times[1]} to {times[2]}")
    stdout().print(table)
    say("at the speed that the machine has now: the ranges are the luck at the rungs alone")
    needs = plan.disk_needs
    say(f"disk: at most {needs.total / 1e6:,.0f} MB ({needs.describe()})")
    say("\nstart it with:")
    paste(f"  {plan.request.command}")


def _print_offers(plan: SearchPlan) -> None:
    """Print a row for each node of the cluster."""
    from rich.table import Table

    table = Table("node", "trials at once", "an epoch takes", "device", box=None)
    for offer in plan.offers:
        seconds = f"{offer.cost.epoch_seconds:.2g} s"
        table.add_row(offer.node, str(offer.slots), seconds, offer.numerics.device_name)
    stdout().print(table)
