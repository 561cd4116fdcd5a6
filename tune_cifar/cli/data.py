"""`data fetch | verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, say, stdout

app = typer.Typer(help="CIFAR-10: download it, check its files.", no_args_is_help=True)


Folder = Annotated[
    Path | None,
    typer.Argument(help="Where to put it. Default: $TUNE_CIFAR_DATA, else the user cache."),
]


@app.command()
def fetch(folder: Folder = None) -> None:
    """Download CIFAR-10 (163 MB) and check it, unless it is there already.

    Example: python -m tune_cifar data fetch
    """
    from tune_cifar.data.files import fetch_data

    source = fetch_data(folder)
    say(f"CIFAR-10 lies in {source.folder}")


@app.command()
def verify(data: options.Data = None, as_json: options.Json = False) -> None:
    """Check every file of CIFAR-10 against its official MD5; exit status 1 when one does not match.

    Example: python -m tune_cifar data verify --data ./data
    """
    from rich.table import Table

    from tune_cifar.data.files import find_data, verify_data

    checks = verify_data(find_data(data))
    if as_json:
        print_json([check.__dict__ for check in checks])
    elif not checks:
        say("Synthetic data are generated: they have no files.")
    else:
        table = Table("file", "bytes", "MD5", "result", box=None, header_style="bold")
        for check in checks:
            table.add_row(
                check.name,
                str(check.num_bytes),
                check.found_md5 or "",
                check.problem or "as published",
            )
        stdout().print(table)
    if any(check.problem for check in checks):
        raise typer.Exit(1)
