"""`spaces list | show | check | knobs`."""

from __future__ import annotations

from typing import Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, say, stderr, stdout
from tune_cifar.errors import ConfigError

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
    if published := space.header.describe_published():
        say(f"published: {published}")
    for sentence in space.header.corrects:
        say(f"corrects: {sentence}")
    table = Table("knob", "baseline", "searched", box=None, header_style="bold")
    for knob in (*KNOBS, *space.baseline.arguments):
        if knob in searched or knob not in inactive:
            table.add_row(knob, str(space.baseline.get(knob)), searched.get(knob, ""))
    stdout().print(table)
    say(f"budget: {space.budget.describe()}")


@app.command()
def check(name: Name) -> None:
    """Check a space file in every tier; say what is wrong and where.

    Example: python -m tune_cifar spaces check my_space.yaml
    """
    from tune_cifar.space.select import find_space, read_space, select_tier

    path = find_space(name)
    file = read_space(path)
    knobs = [f"{len(found.searched)} knobs in tier {tier}" for tier, found in file.tiers.items()]
    if ":" in file.baseline["model"]:
        from tune_cifar.dataset import CIFAR10
        from tune_cifar.train.network import resolve_network

        resolve_network(select_tier(file, "full"), CIFAR10)
        knobs.append(f"{file.baseline['model']} works")
    say(f"{path}: sound ({', '.join(knobs)})")


@app.command()
def new(
    model: Annotated[str, typer.Argument(help="FILE.py:NAME or package.module:NAME.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Of the space. Default: the file's or NAME.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take max_lr from an LR range test (minutes).")
    ] = False,
    data: options.Data = None,
) -> None:
    """Print a complete space file for a network of your own; the name must be the file's.

    Example: python -m tune_cifar spaces new wide.py:WideNet
    """
    from pathlib import Path

    from tune_cifar.dataset import CIFAR10
    from tune_cifar.models.custom import check_network
    from tune_cifar.schema import OWN_MODEL, TrainConfig
    from tune_cifar.space.template import make_space_text

    if data is not None and not measure:
        raise typer.BadParameter("--data belongs to --measure.")
    if not OWN_MODEL.fullmatch(model):
        raise ConfigError(f"MODEL must be FILE.py:NAME or package.module:NAME, got {model!r}.")
    where, network = model.rsplit(":", 1)
    name = name or (Path(where).stem if where.endswith(".py") else network)
    tried = TrainConfig(
        model=model, optimizer="sgd", schedule="constant", max_lr=0.1, batch_size=128, epochs=1
    )
    found = check_network(tried, CIFAR10, Path(), needs_all=False)
    arguments = [(each.name, each.kind, each.default) for each in found.arguments]
    given = (model, name, found.takes_dropout, arguments)
    text = make_space_text(*given)
    if measure:
        text = make_space_text(*given, _measure_lr(text, name, data))
    stdout().file.write(text)


def _measure_lr(text: str, name: str, data: str | None) -> float | None:
    """Return the suggestion of an LR range test of a space file's baseline; None without one."""
    from pathlib import Path

    from tune_cifar.cli.lr_range import measure_lr
    from tune_cifar.data.files import describe_data, find_data
    from tune_cifar.space.reader import parse_space
    from tune_cifar.space.select import select_tier
    from tune_cifar.train.network import resolve_network

    source = find_data(data)
    about = describe_data(source)
    space = select_tier(parse_space(text, Path(f"{name}.yaml")), "cpu", None, about)
    max_lr = measure_lr(resolve_network(space, about).baseline, source, stderr())
    return None if max_lr is None else float(f"{max_lr:.3g}")


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
