"""`data fetch | verify | import | list`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import paste, print_json, say, stderr, stdout

app = typer.Typer(
    help="Images: download CIFAR, check its files, import your own.", no_args_is_help=True
)


Folder = Annotated[
    Path | None,
    typer.Argument(help="Where to put it. Default: $TUNE_CIFAR_DATA, else the user cache."),
]


@app.command()
def fetch(
    folder: Folder = None,
    name: Annotated[
        str, typer.Option("--name", metavar="cifar10|cifar100", help="Which data set.")
    ] = "cifar10",
) -> None:
    """Download CIFAR-10 or CIFAR-100 (163 MB) and check it, unless it is there already.

    Example: python -m tune_cifar data fetch
    """
    from tune_cifar.data.files import fetch_data
    from tune_cifar.record.store import DATA_WORDS

    source = fetch_data(folder, name)
    say(f"{DATA_WORDS[name]} lies in {source.folder}")


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="A folder of class folders, an .npz or a .parquet file.")
    ],
    name: Annotated[str, typer.Option("--name", help="Of the data set, for --data.")],
    size: Annotated[
        int | None,
        typer.Option("--size", metavar="32", help="Side to which images are resized, in pixels."),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option("--test", help="Test images. Default: a sixth of each class of SOURCE."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Where to put it. Default: the user's data folder."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Import images of your own, so that --data NAME takes them.

    A folder holds a folder for each class, with PNG, JPEG or WebP files; an .npz holds `images`
    (uint8) and `labels`; a Parquet file holds image files and labels, as Hugging Face writes it.

    Example: python -m tune_cifar data import photos/ --name flowers --size 32
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from tune_cifar.data.importing import import_data

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=stderr(), transient=True) as progress:
        task = progress.add_task("images", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        found = import_data(source, name, size, test, folder, show)
    about = found.data.description
    place = name if folder is None else str(found.folder)
    console = stderr() if as_json else stdout()
    counts = f"{about.num_train:,} training, {about.num_val:,} validation and {about.num_test:,}"
    images = f"{about.num_classes} classes, {about.side}x{about.side} pixels"
    say(f"{name}: {counts} test images, {images}, in {found.folder}", console)
    for note in found.notes:
        say(note, console, "yellow")
    paste(f"next: python -m tune_cifar search --space s7 --data {shlex.quote(place)}", console)
    if as_json:
        print_json({**found.data.model_dump(mode="json"), "folder": str(found.folder)})


@app.command("list")
def list_(as_json: options.Json = False) -> None:
    """List the imported data sets.

    Example: python -m tune_cifar data list
    """
    from rich.table import Table

    from tune_cifar.data.imported import find_home, list_imported, read_imported

    found = {name: read_imported(find_home() / name) for name in list_imported()}
    if as_json:
        print_json({name: data.model_dump(mode="json") for name, data in found.items()})
        return
    table = Table("name", "classes", "side", box=None, header_style="bold")
    for column in ("training", "validation", "test"):
        table.add_column(column, justify="right")
    table.add_column("imported from")
    for name, data in found.items():
        about = data.description
        counts = (about.num_train, about.num_val, about.num_test)
        numbers = (str(about.num_classes), str(about.side), *(f"{count:,}" for count in counts))
        table.add_row(name, *numbers, f"{data.imported_from}, {data.created}")
    stdout().print(table)


@app.command()
def verify(data: options.Data = None, as_json: options.Json = False) -> None:
    """Check CIFAR's files against their official MD5; exit status 1 when one does not match.

    Example: python -m tune_cifar data verify --data ./data
    """
    from rich.table import Table

    from tune_cifar.data.files import find_data, verify_data

    source = find_data(data)
    checks = verify_data(source)
    if as_json:
        print_json([check.__dict__ for check in checks])
    elif source.name == "shapes":
        say("Synthetic data are generated: they have no files.")
    elif not checks:
        say("Imported data are checked whenever they are read.")
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
