"""`lr-range`: which learning rates a recipe bears."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, say, stderr, stdout, this_command
from tune_cifar.errors import ConfigError, TrackingError
from tune_cifar.schema import label_data

if TYPE_CHECKING:
    from rich.console import Console

    from tune_cifar.data.load import TrainVal
    from tune_cifar.schema import Numerics, TrainConfig
    from tune_cifar.space.select import SearchSpace
    from tune_cifar.train.lr_range import Sweep

# The document of --json: what was found. How it was found stands in sweeps.json.
JSON_KEYS = (
    "name",
    "space",
    "tier",
    "fingerprint",
    "data",
    "estimators",
    "disagreement",
    "suggestion",
    "verdict",
)

WHAT = "What"
Tier = Annotated[
    str,
    typer.Option(
        "--tier",
        metavar="full|cpu",
        help="Whose batch_size and train_size to take.",
        rich_help_panel=WHAT,
    ),
]
Low = Annotated[
    float, typer.Option("--low", metavar="LR", help="The first step's.", rich_help_panel=WHAT)
]
High = Annotated[
    float, typer.Option("--high", metavar="LR", help="The last step's.", rich_help_panel=WHAT)
]
Steps = Annotated[
    int,
    typer.Option("--steps", metavar="N", help="Training steps of a sweep.", rich_help_panel=WHAT),
]
Seeds = Annotated[
    int, typer.Option("--seeds", metavar="N", help="Sweeps, a seed each.", rich_help_panel=WHAT)
]
Write = Annotated[
    bool,
    typer.Option(
        "--write",
        help="Propose max_lr's range for the space file, as a diff.",
        rich_help_panel=WHAT,
    ),
]
Yes = Annotated[
    bool,
    typer.Option(
        "--yes", help="With --write: change the file without asking.", rich_help_panel=WHAT
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Folder of curve.png and sweeps.json. Default: lr_range/SPACE-TIER-TIME in the run store.",
        rich_help_panel="Where",
    ),
]


def lr_range(
    space: options.Space,
    settings: options.Settings = None,
    tier: Tier = "full",
    low: Low = 1e-6,
    high: High = 10.0,
    steps: Steps = 200,
    seeds: Seeds = 3,
    write: Write = False,
    yes: Yes = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    execution: options.Execution = "eager",
    cpus_per_trial: options.Cpus = 1,
    deterministic: options.Deterministic = False,
    data: options.Data = None,
    out: Out = None,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
    as_json: options.Json = False,
) -> None:
    """LR range test: raise the learning rate step by step, see where the loss falls and where it blows up.

    Three estimators read the curve over several seeds; where they disagree by more than a decade, nothing is suggested.

    Example: python -m tune_cifar lr-range --space s10 --tier cpu
    """
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.data.files import find_data
    from tune_cifar.data.load import load_train_val
    from tune_cifar.record.store import find_storage
    from tune_cifar.report.lr_range import make_report, save_report
    from tune_cifar.search.plan import check_folder
    from tune_cifar.train.lr_range import make_lrs
    from tune_cifar.train.numerics import resolve_numerics

    if yes and not write:
        raise typer.BadParameter("--yes belongs to --write.")
    if seeds < 1:
        raise ConfigError(f"--seeds: a number >= 1 must be given, got {seeds}.")
    lrs = make_lrs(low, high, steps)
    recipe = _load_recipe(space, tier, settings or [])
    if write:
        _check_proposable(space, settings or [])
    store = find_storage(storage)
    name = f"{recipe.name}-{recipe.tier}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = out or store / "lr_range" / name
    check_folder(folder, "the test's folder", "--out" if out else "--storage")
    if (folder / "sweeps.json").exists():
        raise ConfigError(f"--out: a folder without another test must be given, got {folder}.")
    source, numerics = (
        find_data(data),
        resolve_numerics(device, precision, cpus_per_trial, deterministic, execution),
    )
    console = stderr() if as_json else stdout()
    print_synthetic_banner(console, source.name)
    images = load_train_val(source, recipe.baseline.train_size, val_size=0)
    sweeps = _sweep(recipe.baseline, images, numerics, lrs, seeds, console)
    report = make_report(f"lr-range-{name}", recipe, images.info, numerics, sweeps, this_command())
    _print_findings(report, console)
    save_report(report, folder)
    say(f"curve: {folder / 'curve.png'}", console)
    _track(tracking_uri, store, report, folder, console)
    answer = {key: report[key] for key in JSON_KEYS} | {"folder": str(folder)}
    if write and report["suggestion"] is not None:
        answer["proposal"] = _propose(space, report, yes, as_json, console)
    if as_json:
        print_json(answer)
    if write and report["suggestion"] is None:
        raise ConfigError(f"--write: the estimators must agree, got {report['verdict']}.")


def _load_recipe(space: str, tier: str, settings: list[str]) -> SearchSpace:
    """The baseline with its pins, and without a schedule: knobs that only a schedule reads are refused as pins."""
    from tune_cifar.space.select import load_space, parse_setting

    pins = dict(parse_setting(setting) for setting in settings)
    for knob in ("schedule", "max_lr"):
        if knob in pins:
            raise ConfigError(
                f"--set: {knob} must be left to the sweep, got {pins[knob]}. --low and --high bound it."
            )
    return load_space(space, tier, {**pins, "schedule": "constant"})


def _sweep(
    config: TrainConfig,
    data: TrainVal,
    numerics: Numerics,
    lrs: tuple[float, ...],
    num_seeds: int,
    console: Console,
) -> list[Sweep]:
    from tune_cifar.cli.live import SweepView
    from tune_cifar.train.lr_range import run_sweeps

    say(
        f"{num_seeds} x {len(lrs)} steps from lr {lrs[0]:g} to {lrs[-1]:g}: {config.model}, {config.optimizer}, "
        f"momentum {config.momentum:g}, batches of {config.batch_size}, {numerics.precision} on {numerics.device_name}",
        console,
    )
    sweeps = []
    with SweepView(console, num_seeds, len(lrs)) as view:
        for sweep in run_sweeps(config, data, numerics, lrs, num_seeds, view.step):
            view.say(sweep)
            sweeps.append(sweep)
    return sweeps


def _print_findings(report: dict[str, Any], console: Console) -> None:
    """The estimators' table, why some gave nothing, and the verdict."""
    from rich.table import Table

    table = Table(
        "estimator",
        "median lr",
        "spread (max/min)",
        "geometric sd",
        "seeds",
        box=None,
        header_style="bold",
    )
    num_seeds = len(report["sweeps"])
    for name, found in report["estimators"].items():
        cells = [
            f"x {found[key]:.2f}" if found[key] is not None else "-"
            for key in ("factor", "geometric_sd")
        ]
        median = "-" if found["lr"] is None else f"{found['lr']:.2e}"
        table.add_row(name, median, *cells, f"{found['num_seeds']} of {num_seeds}")
    console.print(table)
    for reason in dict.fromkeys(
        found["reason"] for found in report["estimators"].values() if found["reason"]
    ):
        names = [name for name, found in report["estimators"].items() if found["reason"] == reason]
        say(f"a seed without {', '.join(names)}: {reason}", console, "yellow")
    say(report["verdict"], console, "bold" if report["suggestion"] else "bold yellow")
    say(f"baseline: max_lr {report['config']['max_lr']:.2e}", console)


def _track(
    uri: str | None, store: Path, report: dict[str, Any], folder: Path, console: Console
) -> None:
    """Log to MLflow; a fault is a sentence. The folder has everything."""
    from tune_cifar.tracking.upload import make_tracking_uri, upload_lr_range

    try:
        upload_lr_range(make_tracking_uri(store, uri), store, report, folder)
    except TrackingError as exc:
        say(
            f"{str(exc).rstrip('.')}. MLflow lacks the test; {folder} has all of it.",
            console,
            "yellow",
        )


def _check_proposable(space: str, settings: list[str]) -> None:
    """Refuse before the sweeps what --write could not write after them."""
    from tune_cifar.space.edit import check_editable
    from tune_cifar.space.select import read_space

    if settings:
        raise ConfigError(
            f"--write: the file's own recipe must be swept, got --set {settings[0]}. Leave one out."
        )
    check_editable(read_space(space), "max_lr")


def _propose(
    space: str, report: dict[str, Any], yes: bool, as_json: bool, console: Console
) -> dict[str, Any]:
    """Show the file's change as a diff and, when it is accepted, make it."""
    from tune_cifar.space.edit import describe_edit, edit_range, write_space
    from tune_cifar.space.layout import Range
    from tune_cifar.space.select import read_space
    from tune_cifar.train.lr_range import propose_range

    file = read_space(space)
    medians = [found["lr"] for found in report["estimators"].values() if found["lr"] is not None]
    keep = [values["max_lr"] for values in (file.baseline, *file.points) if "max_lr" in values]
    text = edit_range(file, "max_lr", Range(*propose_range(medians, keep), log=True))
    diff = describe_edit(file, text)
    console.print(diff, end="", soft_wrap=True)
    if label := label_data(report["data"]["name"]):
        say(f"{label}: this range says nothing about CIFAR-10.", console, "bold yellow")
    if not diff:
        note, accepted = f"{file.path}: max_lr has the proposed range already", False
    elif yes or (sys.stdin.isatty() and not as_json):
        accepted = yes or typer.confirm("Change the file?", err=True)
        note = f"written into {file.path}" if accepted else "not written"
    else:
        note, accepted = "not written: there is no terminal to ask at; --yes writes it", False
    if accepted:
        write_space(file, text)
    say(note, console)
    return {"path": str(file.path), "diff": diff, "written": accepted}
