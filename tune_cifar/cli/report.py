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
        Path | None,
        typer.Option("--out", metavar="FILE", help="Default: reports/ in the run store."),
    ] = None,
    data: options.Data = None,
    as_json: options.Json = False,
    storage: options.Storage = None,
) -> None:
    """Write a search as one HTML file: figures, tables, health of the space, commands to reproduce.

    It can be read offline and printed; an old report is replaced. Where the data are found, the
    best trial is evaluated on its validation images.

    Example: python -m tune_cifar report --search s10-main
    """
    from tune_cifar.record.store import find_storage, load_searches
    from tune_cifar.report.html import write_report

    folder = find_storage(storage)
    (state,) = load_searches(folder, search=search)
    path = out or find_report(folder, search)
    with stderr().status("drawing the figures"):
        missing = write_report(state, path, data)
    if as_json:
        print_json({"search": search, "file": str(path), "missing": missing})
        return
    say(f"report: {path}")
    if missing is not None:
        say(f"Without the figures of images. {missing}", style="yellow")


def find_report(storage: Path, search: str) -> Path:
    """Where the report of a search is kept, unless told otherwise."""
    return storage / "reports" / f"{search}.html"
