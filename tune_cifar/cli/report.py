"""`report`: a search as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, say, stderr


def report(
    search: Annotated[str, typer.Option("--search", help="Of this name.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: reports/ in the run store.")
    ] = None,
    as_json: options.Json = False,
    storage: options.Storage = None,
) -> None:
    """Write a search as one HTML file: figures, tables, health of the space, commands to reproduce.

    It is read offline and prints well; a report that is there is replaced.

    Example: python -m tune_cifar report --search s10-main
    """
    from tune_cifar.record import find_storage
    from tune_cifar.report import write_report
    from tune_cifar.results import load_searches

    folder = find_storage(storage)
    (state,) = load_searches(folder, search=search)
    path = out or folder / "reports" / f"{search}.html"
    with stderr().status("drawing the figures"):
        write_report(state, path)
    if as_json:
        print_json({"search": search, "file": str(path)})
    else:
        say(f"report: {path}")
