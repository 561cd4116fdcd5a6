"""`spaces list | show | check | knobs`."""

from __future__ import annotations

from typing import Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, say, stdout

app = typer.Typer(
    help="The search spaces: list them, read one, check a file of your own.", no_args_is_help=True
)
Name = Annotated[
    str,
    typer.Argument(
        help="A name from `spaces list`, or a path.", autocompletion=options.complete_space
    ),
]
Tier = Annotated[
    str, typer.Option("--tier", help="full, cpu or night: the budget tier whose knobs are shown.")
]


@app.command("list")
def list_(as_json: options.Json = False) -> None:
    """List the search spaces that can be named.

    Example: python -m tune_cifar spaces list
    """
    from rich.table import Table

    from tune_cifar.space.select import list_spaces, load_header

    headers = [(path, load_header(path)) for path in list_spaces()]
    if as_json:
        print_json(
            [{"path": str(path), **header.model_dump(mode="json")} for path, header in headers]
        )
        return
    table = Table("space", "source", "published", box=None, header_style="bold")
    for _, header in headers:
        table.add_row(header.space, header.source, header.describe_published())
    stdout().print(table)


@app.command()
def show(name: Name, tier: Tier = "full", as_json: options.Json = False) -> None:
    """Show a space: its source, what its baseline corrects, and every searched knob.

    Example: python -m tune_cifar spaces show s10 --tier cpu
    """
    from rich.table import Table

    from tune_cifar.schema import KNOBS, inactive_knobs
    from tune_cifar.space.select import describe_distribution, load_space

    space = load_space(name, tier)
    searched = {knob: describe_distribution(found) for knob, found in space.distributions.items()}
    baseline = space.baseline.model_dump(mode="json")
    if as_json:
        header = space.header.model_dump(mode="json")
        budget = space.budget.model_dump(mode="json")
        print_json(
            {**header, "tier": tier, "baseline": baseline, "search": searched, "budget": budget}
        )
        return
    inactive = inactive_knobs(space.baseline)
    say(f"{space.name} ({tier})  {space.header.source}")
    say(f"published: {space.header.describe_published()}")
    for sentence in space.header.corrects:
        say(f"corrects: {sentence}")
    table = Table("knob", "baseline", "searched", box=None, header_style="bold")
    for knob in KNOBS:
        if knob in searched or knob not in inactive:
            table.add_row(knob, str(baseline[knob]), searched.get(knob, ""))
    stdout().print(table)
    say(f"budget: {space.budget.describe()}")


@app.command()
def check(name: Name) -> None:
    """Check a space file in every tier; say what is wrong and where.

    Example: python -m tune_cifar spaces check my_space.yaml
    """
    from tune_cifar.space.select import find_space, read_space

    path = find_space(name)
    tiers = read_space(path).tiers
    knobs = [f"{len(found.searched)} knobs in tier {tier}" for tier, found in tiers.items()]
    say(f"{path}: sound ({', '.join(knobs)})")


@app.command()
def knobs(as_json: options.Json = False) -> None:
    """List every hyperparameter (knob): values, when it has an effect, which space searches it.

    Example: python -m tune_cifar spaces knobs
    """
    from dataclasses import asdict

    from rich.table import Table

    from tune_cifar.space.overview import COLUMNS, list_knobs

    found = list_knobs()
    if as_json:
        print_json([asdict(knob) for knob in found])
        return
    table = Table(*COLUMNS, box=None, header_style="bold")
    for knob in found:
        table.add_row(*knob.row)
    stdout().print(table)
