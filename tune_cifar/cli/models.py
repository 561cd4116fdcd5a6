"""`models`: a network's layers."""

from __future__ import annotations

from typing import Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, stdout


def models(
    name: Annotated[str, typer.Argument(help="A network, such as s7, or your own FILE.py:NAME.")],
    as_json: options.Json = False,
) -> None:
    """Print a model's layers: output shape, parameters, multiply-adds, receptive field.

    Example: python -m tune_cifar models s7
    """
    from rich.table import Table

    from tune_cifar.models.summary import describe_model

    summary = describe_model(name)
    if as_json:
        print_json(summary.to_dict())
        return
    table = Table("layer", "kind", "output", box=None, header_style="bold")
    for column in ("params", "MACs", "receptive field"):
        table.add_column(column, justify="right")
    for layer in summary.layers:
        shape = " x ".join(map(str, layer.output_shape))
        numbers = (f"{layer.params:,}", f"{layer.macs:,}", _write(layer.receptive_field))
        table.add_row(layer.name, layer.kind, shape, *numbers)
    table.add_section()
    table.add_row(
        summary.name,
        "",
        "",
        f"{summary.params:,}",
        f"{summary.macs:,}",
        _write(summary.receptive_field),
    )
    stdout().print(table)


def _write(receptive_field: int | None) -> str:
    """A dash where the network computes between its layers."""
    return "-" if receptive_field is None else str(receptive_field)
