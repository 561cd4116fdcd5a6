"""`searches`, `failures`, `sync`: records and their copies, what failed in them, MLflow's view."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import (
    paste,
    print_json,
    repeat_launch,
    repeat_options,
    say,
    stderr,
    stdout,
)
from tune_cifar.errors import (
    RecordError,
    RenamedError,
    TrackingError,
    did_you_mean,
    hide_credentials,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.progress import Progress, TaskID

    from tune_cifar.record.failures import FailureGroup
    from tune_cifar.record.state import SearchState
    from tune_cifar.record.store import SearchRow

app = typer.Typer(
    help="The recorded searches and single trainings: list them, delete one.", no_args_is_help=True
)


@app.command("list")
def list_(as_json: options.Json = False, storage: options.Storage = None) -> None:
    """List the recorded searches and trainings, newest first.

    Example: python -m tune_cifar searches list
    """
    from dataclasses import asdict

    from tune_cifar.record.store import find_storage, list_rows

    rows = list_rows(find_storage(storage))
    if as_json:
        print_json([asdict(row) for row in rows])
    elif not rows:
        say("No search is recorded yet. Start with: python -m tune_cifar search --space smoke")
    else:
        _print_rows(rows, storage)


def _print_rows(rows: list[SearchRow], storage: str | None) -> None:
    from rich.filesize import decimal
    from rich.table import Table

    from tune_cifar.record.journal import read_state
    from tune_cifar.record.state import describe_counts
    from tune_cifar.record.store import find_storage, search_folder
    from tune_cifar.report.format import format_percent

    table = Table(box=None, header_style="bold")
    table.add_column("search", no_wrap=True)
    for column in ("kind", "space", "data", "created (UTC)", "state", "trials", "best"):
        table.add_column(column, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for row in rows:
        if row.error is not None:
            unknown = ("-", "-", "-", "-", row.stage, "-", "-")
            table.add_row(row.name, *unknown, decimal(row.size_bytes))
            continue
        space = f"{row.space} ({row.tier})" if row.tier else row.space
        created = (row.created or "")[:16].replace("T", " ")
        stage = f"finished ({row.end})" if row.stage == "finished" else row.stage
        counts = describe_counts(row.counts or {}) or "none"
        number = (row.best or "").partition(":")[2]
        best = f"{format_percent(row.best_val_acc)} (:{number})" if row.best else "-"
        cells = (row.kind, space, row.data, created, stage, counts, best)
        table.add_row(row.name, *cells, decimal(row.size_bytes))
    stdout().print(table)
    for row in rows:
        if row.error is not None:
            say(row.error, style="red")
    unfinished = [row for row in rows if row.stage in ("interrupted", "driver died")]
    for left in unfinished[:1]:
        given = repeat_options(storage=storage)
        given += repeat_launch(read_state(search_folder(find_storage(storage), left.name)))
        words = f"search --name {left.name} --resume{given}"
        paste(f"continue {left.name}: python -m tune_cifar {words}")


@app.command()
def mirror(
    name: Annotated[str, typer.Argument(help="A search from `searches list`.")],
    url: Annotated[str, typer.Argument(help="s3://, gs:// or file://, as --mirror.")],
    storage: options.Storage = None,
) -> None:
    """Copy a search to a mirror, or complete it there; `search --mirror` does so while it runs.

    Example: python -m tune_cifar searches mirror s10-cpu-1 s3://bucket/searches
    """
    from tune_cifar.record.mirror import check_mirror, copy_search
    from tune_cifar.record.store import find_storage

    check_mirror(url)
    folder = _find_folder(find_storage(storage), name)
    with stdout().status(f"copying {name} ..."):
        num_files = copy_search(folder, url)
    say(f"{name}: {_count(num_files, 'file')} in {hide_credentials(url)}")


@app.command()
def restore(
    url: Annotated[str, typer.Argument(help="Of a mirror.")],
    name: Annotated[
        str | None, typer.Argument(help="Of a search there. Default: all that are not here.")
    ] = None,
    storage: options.Storage = None,
) -> None:
    """Bring searches back from a mirror; `search --resume` then goes on with them.

    Example: python -m tune_cifar searches restore s3://bucket/searches s10-cpu-1
    """
    from tune_cifar.record.mirror import check_mirror, list_mirrored, restore_search
    from tune_cifar.record.store import find_storage, search_folder

    check_mirror(url)
    root = find_storage(storage)
    names = [name] if name is not None else list_mirrored(url)
    for each in names:
        if name is None and search_folder(root, each).exists():
            say(f"{each} is here already")
            continue
        with stdout().status(f"restoring {each} ..."):
            folder = restore_search(url, each, root)
        say(f"{each} is restored to {folder}")
    if not names:
        say(f"{hide_credentials(url)} has no search")


@app.command()
def delete(
    name: Annotated[str, typer.Argument(help="A search from `searches list`.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    keep_mlflow: Annotated[
        bool, typer.Option("--keep-mlflow", help="Leave its runs in MLflow.")
    ] = False,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
) -> None:
    """Delete a search for good, its evaluations, report and MLflow runs included.

    Example: python -m tune_cifar searches delete s10-cpu-1
    """
    from rich.filesize import decimal

    from tune_cifar.record.journal import read_state
    from tune_cifar.record.store import find_storage, measure_folder

    root = find_storage(storage)
    folder = _find_folder(root, name)
    _check_not_live(folder)
    state: SearchState | None = None
    unread = "a damaged record"
    try:
        state = read_state(folder)
    except RecordError as exc:
        if isinstance(exc, RenamedError):
            unread = "a record of another name"
        if not keep_mlflow:
            hint = (
                "Its runs in MLflow cannot be told from it: --keep-mlflow deletes the folder alone."
            )
            raise RecordError(f"{exc} {hint}") from exc
    size = decimal(measure_folder(folder))
    trials = unread if state is None else _count(len(state.trials), "trial")
    runs = "; its runs in MLflow stay" if keep_mlflow else " and its runs in MLflow"
    if not yes and not typer.confirm(f"Delete {name} ({trials}, {size}){runs}?", err=True):
        say("Nothing was deleted.", stderr())
        raise typer.Exit(1)
    num_runs = 0
    if state is not None and not keep_mlflow:
        num_runs = _delete_runs(root, tracking_uri, state)
    _delete_folder(folder)
    _delete_views(root, name, state)
    gone = "MLflow as it was" if keep_mlflow else f"{_count(num_runs, 'run')} in MLflow"
    say(f"{name} is deleted: {trials}, {size}, {gone}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _find_folder(root: Path, name: str) -> Path:
    """Return the folder of a search, readable or damaged.

    Raises:
        RecordError: when it is not there, or is a link.
    """
    from tune_cifar.record.store import search_folder, searches_folder

    folder = search_folder(root, name)
    if not folder.exists() and not folder.is_symlink():
        names = [path.name for path in searches_folder(root).glob("*")]
        raise RecordError(f"no search named {name!r} in {root}.{did_you_mean(name, names)}")
    if folder.resolve() != folder or not folder.is_dir():
        raise RecordError(f"{folder} is a link or a file, not a folder. Delete it by hand.")
    return folder


def _check_not_live(folder: Path) -> None:
    """Raise RecordError with the owner's name when a driver holds the search."""
    from tune_cifar.record.journal import RECORD_FILE, Record, is_live

    if (folder / RECORD_FILE).exists() and is_live(folder):
        Record.open(folder).close()


def _delete_runs(root: Path, tracking_uri: str | None, state: SearchState) -> int:
    from tune_cifar.tracking.address import make_tracking_uri
    from tune_cifar.tracking.upload import delete_runs

    try:
        return delete_runs(make_tracking_uri(root, tracking_uri), root, state)
    except TrackingError as exc:
        hint = "The search is still there; --keep-mlflow deletes its folder alone."
        raise TrackingError(f"{str(exc).rstrip('.')}. {hint}") from exc


def _delete_folder(folder: Path) -> None:
    """Delete a search's folder; links in it go, their targets stay.

    The record goes last, so that an interrupted deletion leaves a search that is listed and can be
    deleted.
    """
    import shutil

    from tune_cifar.record.journal import RECORD_FILE

    _check_not_live(folder)
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == RECORD_FILE):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.rmdir()
    except OSError as exc:
        raise RecordError(
            f"{folder} could not be deleted: {exc.strerror} ({exc.filename})."
        ) from exc


def _delete_views(root: Path, name: str, state: SearchState | None) -> None:
    """Delete the report of a search and, where its record could be read, its evaluations."""
    import shutil

    from tune_cifar.cli.report import find_report
    from tune_cifar.train.metrics import find_evaluation_folder

    report = find_report(root, name)
    try:
        report.unlink(missing_ok=True)
        for run_id in [] if state is None else [trial.run_id for trial in state.trials.values()]:
            for folder in (
                find_evaluation_folder(root, run_id, "validation"),
                find_evaluation_folder(root, run_id, "test"),
            ):
                if folder.is_dir() and not folder.is_symlink():
                    shutil.rmtree(folder)
    except OSError as exc:
        raise RecordError(
            f"{root}: report and evaluations of {name} stay: {exc.strerror}."
        ) from exc


def failures(
    search: Annotated[str, typer.Option("--search", help="A search by name.")],
    as_json: options.Json = False,
    storage: options.Storage = None,
) -> None:
    """Show what failed in a search, grouped by error and place, with the command that repeats it.

    Example: python -m tune_cifar failures --search s10-cpu-1
    """
    from dataclasses import asdict

    from tune_cifar.record.failures import group_failures
    from tune_cifar.record.store import find_storage, load_searches

    (state,) = load_searches(find_storage(storage), search=search)
    groups = group_failures(state)
    given = repeat_options(storage=storage) + repeat_launch(state, ("--data",))
    commands = [f"python -m tune_cifar reproduce {group.run_id}{given}" for group in groups]
    if as_json:
        pairs = zip(groups, commands, strict=True)
        print_json([asdict(group) | {"command": command} for group, command in pairs])
        return
    if not groups:
        trials = _count(len(state.trials), "trial")
        say(f"{search}: no trial failed, and none was retried ({trials}).")
    for group, command in zip(groups, commands, strict=True):
        _print_group(group, command)


def _print_group(group: FailureGroup, command: str) -> None:
    say(f"{group.count} x {group.what}", style="bold red")
    numbers = {"in": group.where, "failed": group.failed, "retried": group.retried}
    for what, found in numbers.items():
        if found:
            say(f"  {what}: {found if isinstance(found, str) else ', '.join(map(str, found))}")
    paste(f"  repeat: {command}\n\n{group.traceback.rstrip()}\n")


def sync(
    search: Annotated[str | None, typer.Option("--search", help="Only this search.")] = None,
    tracking_uri: options.TrackingUri = None,
    as_json: options.Json = False,
    storage: options.Storage = None,
) -> None:
    """Upload to MLflow what it lacks of the records, as after a time without its server.

    Example: python -m tune_cifar sync --search s10-cpu-1
    """
    from functools import partial

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from tune_cifar.record.store import find_searches, find_storage
    from tune_cifar.tracking.address import make_tracking_uri

    root = find_storage(storage)
    uri = make_tracking_uri(root, tracking_uri)
    console = stderr() if as_json else stdout()
    answers: list[dict[str, Any]] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("trials"),
    )
    with Progress(
        *columns,
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        for folder in find_searches(root, search):
            task = progress.add_task(folder.name, total=None)
            on_upload = partial(_advance, progress, task)
            answers.append(_sync_one(uri, root, folder, console, on_upload))
            progress.remove_task(task)
    if as_json:
        print_json(answers)
    elif not answers:
        say("No search is recorded yet. Start with: python -m tune_cifar search --space smoke")
    if any("error" in answer for answer in answers):
        raise typer.Exit(1)


def _advance(progress: Progress, task: TaskID, num_trials: int) -> None:
    progress.update(task, advance=1, total=num_trials)


def _sync_one(
    uri: str,
    root: Path,
    folder: Path,
    console: Console,
    on_upload: Callable[[int], None],
) -> dict[str, Any]:
    """Upload what MLflow lacks of one search, and print what was done.

    The answer has an error when something could not be uploaded.
    """
    from dataclasses import asdict

    from tune_cifar.tracking.upload import sync_search

    try:
        report = sync_search(uri, root, folder, on_upload)
    except (RecordError, TrackingError) as exc:
        say(str(exc), stderr(), "red")
        return {"search": folder.name, "error": str(exc)}
    uploaded, closed = _count(report.uploaded, "trial"), _count(report.closed, "run")
    line = f"{folder.name}: {uploaded} uploaded, {report.already} already there, {closed} closed"
    say(line + ("; it is running: the rest is left to its driver" if report.live else ""), console)
    return asdict(report)
