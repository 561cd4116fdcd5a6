"""`leaderboard`, `ui`, `models`, `preview`: looking at what is there."""

from __future__ import annotations

import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, say, stdout
from tune_cifar.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd


# One image of each class.
NUM_PREVIEW_ROWS = 10


def leaderboard(
    space: Annotated[str | None, typer.Option("--space", help="Only searches of this space.")] = None,
    search: Annotated[str | None, typer.Option("--search", help="Only this search.")] = None,
    as_json: options.Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, all knobs.")] = False,
    top: Annotated[int, typer.Option("--top", metavar="N", help="Rows per group in the table.")] = 15,
    storage: options.Storage = None,
) -> None:
    """All trials, best first. Only trials of one data set, split, length and size compete: groups stand apart.

    Example: python -m tune_cifar leaderboard --space s10
    """
    from tune_cifar.record import find_storage
    from tune_cifar.results import load_searches, load_trials

    states = load_searches(find_storage(storage), space, search)
    trials = load_trials(states)
    if as_json:
        sys.stdout.write(str(trials.to_json(orient="records", indent=2)) + "\n")
    elif as_csv:
        sys.stdout.write(str(trials.to_csv(index=False)))
    elif trials.empty:
        say("No trial is recorded yet. Start with: python -m tune_cifar search --space smoke")
    else:
        searched = list(dict.fromkeys(knob for state in states for knob in state.header.distributions))
        _print_groups(trials, searched, top)


def _print_groups(trials: pd.DataFrame, searched: list[str], top: int) -> None:
    from rich.table import Table

    from tune_cifar.live import format_percent, format_value
    from tune_cifar.results import split_groups

    for group, rows in split_groups(trials):
        data = "" if group["data"] == "cifar10" else f"NOT CIFAR-10 ({group['data']}), "
        title = (
            f"{data}{group['epochs']} epochs of {group['train_size']} images, {group['val_size']} to validate, "
            f"split {group['split_hash']}, fidelity {group['fidelity']}"
        )
        knobs = [knob for knob in searched if rows[knob].nunique() > 1][:6]
        table = Table("run", "status", "epochs", "val_acc", *knobs, box=None, header_style="bold")
        for row in rows.head(top).to_dict("records"):
            acc = None if math.isnan(row["val_acc"]) else row["val_acc"]
            cells = [format_value(row[knob]) for knob in knobs]
            table.add_row(row["run_id"], row["status"], str(row["epochs_done"]), format_percent(acc), *cells)
        say(title, style="bold")
        stdout().print(table)
        say(f"... and {len(rows) - top} more (--top, --csv)\n" if len(rows) > top else "")


def ui(
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Default: a free one.")] = None,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
) -> None:
    """Start the MLflow UI on loopback. Ctrl-C ends it.

    Example: python -m tune_cifar ui
    """
    from tune_cifar.record import find_storage
    from tune_cifar.tracking import make_tracking_uri, run_ui, stop_ui

    # A closed terminal and `kill` end it as Ctrl-C does: nothing of MLflow stays behind.
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    process = None
    try:
        with stdout().status("starting MLflow's UI ..."):
            process, address = run_ui(make_tracking_uri(find_storage(storage), tracking_uri), port)
        say(f"MLflow UI: {address}  (Ctrl-C ends it)")
        raise typer.Exit(process.wait())
    except KeyboardInterrupt:
        say("ended")
    finally:
        if process is not None:
            stop_ui(process)
        for number, handler in before.items():
            signal.signal(number, handler)


def models(
    name: Annotated[str, typer.Argument(help="s6, s7, s8, s10 or s10_postact.")],
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
        numbers = (f"{layer.params:,}", f"{layer.macs:,}", str(layer.receptive_field))
        table.add_row(layer.name, layer.kind, shape, *numbers)
    table.add_section()
    table.add_row(summary.name, "", "", f"{summary.params:,}", f"{summary.macs:,}", str(summary.receptive_field))
    stdout().print(table)


def preview(
    space: options.Space,
    settings: options.Settings = None,
    out: Annotated[Path | None, typer.Option("--out", help="PNG file. Default: preview-SPACE.png.")] = None,
    data: options.Data = None,
) -> None:
    """Write a grid of what the network sees: each row one training image, first as it is, then augmented.

    Example: python -m tune_cifar preview --space s7
    """
    from tune_cifar.augment.preview import make_preview
    from tune_cifar.data import find_data, load_train_val
    from tune_cifar.plots import save_preview
    from tune_cifar.space import load_space, parse_setting

    found = load_space(space, "full", dict(parse_setting(setting) for setting in settings or []))
    path = out or Path(f"preview-{found.name}.png")
    if not path.parent.is_dir():
        raise ConfigError(f"--out: the folder must be there, got {path.parent}.")
    source = find_data(data)
    images = load_train_val(source, NUM_PREVIEW_ROWS, NUM_PREVIEW_ROWS).train.images_NCHW
    pictures = make_preview(found.baseline, images).numpy()
    save_preview(pictures, f"{found.name} on {source.name}: what the network sees", path)
    say(str(path))
