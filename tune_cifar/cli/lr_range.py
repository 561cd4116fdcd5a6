"""`lr-range`: which learning rates a recipe bears."""

from __future__ import annotations

import codecs
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, say, stderr, stdout, this_command
from tune_cifar.errors import ConfigError, SpaceError, TrackingError
from tune_cifar.schema import label_data

if TYPE_CHECKING:
    from rich.console import Console

    from tune_cifar.data.files import DataSource
    from tune_cifar.data.load import TrainVal
    from tune_cifar.dataset import DataDescription
    from tune_cifar.schema import Numerics, TrainConfig
    from tune_cifar.space.layout import SpaceFile
    from tune_cifar.space.select import SearchSpace
    from tune_cifar.train.lr_range import Sweep

# The document of --json: what was found. How it was found stands in sweeps.json.
JSON_KEYS = (
    *("name", "space", "tier", "fingerprint", "data"),
    *("estimators", "disagreement", "suggestion", "verdict"),
)

Tier = Annotated[
    str,
    typer.Option(
        "--tier", metavar="full|cpu|night", help="Whose batch_size and train_size to take."
    ),
]
Low = Annotated[float, typer.Option("--low", metavar="LR", help="The first step's.")]
High = Annotated[float, typer.Option("--high", metavar="LR", help="The last step's.")]
Steps = Annotated[
    int,
    typer.Option("--steps", metavar="N", help="Training steps of a sweep."),
]
Seeds = Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Sweeps, a seed each.")]
Write = Annotated[
    bool,
    typer.Option("--write", help="Propose max_lr's range for the space file, as a diff."),
]
Yes = Annotated[
    bool,
    typer.Option("--yes", help="With --write: change the file without asking."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="For curve.png and sweeps.json. Default: lr_range/SPACE-TIER-TIME in the run store.",
        rich_help_panel=options.RECORDS,
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
    execution: options.Execution = "auto",
    cpus_per_trial: options.Cpus = 1,
    deterministic: options.Deterministic = False,
    data: options.Data = None,
    out: Out = None,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
    as_json: options.Json = False,
) -> None:
    """Run an LR range test: raise the learning rate each step and watch the loss.

    Three estimators read the curves of several seeds. Where they disagree by more than a decade,
    nothing is suggested.

    Example: python -m tune_cifar lr-range --space s10 --tier cpu
    """
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.data.files import describe_data, find_data
    from tune_cifar.data.load import load_train_val
    from tune_cifar.record.store import find_storage
    from tune_cifar.report.lr_range import make_report, make_report_folder, save_report
    from tune_cifar.search.disk import check_folder
    from tune_cifar.train.lr_range import make_lrs
    from tune_cifar.train.network import choose_execution
    from tune_cifar.train.numerics import resolve_numerics

    if yes and not write:
        raise typer.BadParameter("--yes belongs to --write.")
    lrs = make_lrs(low, high, steps)
    source = find_data(data)
    recipe = _load_recipe(space, tier, settings or [], describe_data(source))
    execution = choose_execution(recipe.baseline, execution)
    if write:
        _check_proposable(space, settings or [])
    store = find_storage(storage)
    name = f"{recipe.name}-{recipe.tier}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = out or store / "lr_range" / name
    check_folder(folder, "the test's folder", "out" if out else "storage")
    if out is not None and (out / "sweeps.json").exists():
        raise ConfigError(f"--out: a folder without another test must be given, got {folder}.")
    options.check_tracking_uri(store, tracking_uri, stderr() if as_json else stdout())
    numerics = resolve_numerics(device, precision, cpus_per_trial, deterministic, execution)
    console = stderr() if as_json else stdout()
    print_synthetic_banner(console, source.name)
    images = load_train_val(source, recipe.baseline.train_size, val_size=0)
    sweeps = _sweep(recipe.baseline, images, numerics, lrs, seeds, console)
    if out is None:
        folder = make_report_folder(folder)
        name = folder.name
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


def _load_recipe(space: str, tier: str, settings: list[str], data: DataDescription) -> SearchSpace:
    """Load the baseline without its schedule; settings that only a schedule reads are refused."""
    from tune_cifar.space.select import load_space, parse_setting
    from tune_cifar.train.network import resolve_network

    pins = dict(parse_setting(setting) for setting in settings)
    for knob in ("schedule", "max_lr"):
        if knob in pins:
            way_out = "--low and --high bound it."
            raise ConfigError(f"--set: the sweep sets {knob}, got {pins[knob]}. {way_out}")
    chosen = load_space(space, tier, {**pins, "schedule": "constant"}, data)
    return resolve_network(chosen, data)


def measure_lr(config: TrainConfig, source: DataSource, console: Console) -> float | None:
    """Return the suggestion of a test of three seeds from 1e-4 to 10; None without one."""
    from tune_cifar.data.load import load_train_val
    from tune_cifar.train.lr_range import fit_curve, make_lrs, summarise
    from tune_cifar.train.network import choose_execution
    from tune_cifar.train.numerics import resolve_numerics

    images = load_train_val(source, config.train_size, val_size=0)
    config = config.model_copy(update={"schedule": "constant"})
    numerics = resolve_numerics(execution=choose_execution(config, "auto"))
    sweeps = _sweep(config, images, numerics, make_lrs(1e-4, 10.0, 100), 3, console)
    summary = summarise([fit_curve(sweep) for sweep in sweeps])
    say(summary.verdict, console)
    return summary.suggestion


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

    steps = f"{num_seeds} x {len(lrs)} steps from lr {lrs[0]:g} to {lrs[-1]:g}"
    recipe = f"{config.model}, {config.optimizer}, momentum {config.momentum:g}"
    hardware = f"{numerics.precision} on {numerics.device_name}"
    say(f"{steps}: {recipe}, batches of {config.batch_size}, {hardware}", console)
    sweeps = []
    with SweepView(console, num_seeds, len(lrs)) as view:
        for sweep in run_sweeps(config, data, numerics, lrs, num_seeds, view.step):
            view.say(sweep)
            sweeps.append(sweep)
    return sweeps


def _print_findings(report: dict[str, Any], console: Console) -> None:
    """Print the estimators, why some gave nothing, and the verdict."""
    from rich.table import Table

    columns = ("estimator", "median lr", "spread (max/min)", "geometric sd", "seeds")
    table = Table(*columns, box=None, header_style="bold")
    num_seeds = len(report["sweeps"])
    names_by_reason: dict[str, list[str]] = {}
    for name, found in report["estimators"].items():
        spread, sd = found["factor"], found["geometric_sd"]
        table.add_row(
            name,
            "-" if found["lr"] is None else f"{found['lr']:.2e}",
            "-" if spread is None else f"x {spread:.2f}",
            "-" if sd is None else f"x {sd:.2f}",
            f"{found['num_seeds']} of {num_seeds}",
        )
        if found["reason"]:
            names_by_reason.setdefault(found["reason"], []).append(name)
    console.print(table)
    for reason, names in names_by_reason.items():
        say(f"a seed without {', '.join(names)}: {reason}", console, "yellow")
    say(report["verdict"], console, "bold" if report["suggestion"] else "bold yellow")
    say(f"baseline: max_lr {report['config']['max_lr']:.2e}", console)


def _track(
    uri: str | None, store: Path, report: dict[str, Any], folder: Path, console: Console
) -> None:
    """Log to MLflow; a fault is a sentence. The folder has everything."""
    from tune_cifar.tracking.address import make_tracking_uri
    from tune_cifar.tracking.lr_range import upload_lr_range

    try:
        upload_lr_range(make_tracking_uri(store, uri), store, report, folder)
    except TrackingError as exc:
        note = f"MLflow lacks the test; {folder} has all of it."
        say(f"{str(exc).rstrip('.')}. {note}", console, "yellow")


def _check_proposable(space: str, settings: list[str]) -> None:
    """Refuse before the sweeps what --write could not write after them."""
    from tune_cifar.space.reader import describe_path, find_range
    from tune_cifar.space.select import PACKAGED, read_space

    if settings:
        raise ConfigError(
            f"--write: the file's own recipe must be swept, got --set {settings[0]}. Leave one out."
        )
    file = read_space(space)
    find_range(file, "max_lr")
    if file.path.resolve().is_relative_to(PACKAGED.resolve()):
        raise SpaceError(
            f"{describe_path(file.path)}: the package's own spaces are not changed. Copy the file "
            f"into ./search_spaces, which is searched first (cp {file.path} search_spaces/)."
        )


def _propose(
    space: str, report: dict[str, Any], yes: bool, as_json: bool, console: Console
) -> dict[str, Any]:
    """Show the file's change as a diff and, when it is accepted, make it."""
    from tune_cifar.space.layout import Range
    from tune_cifar.space.reader import describe_edit, set_range
    from tune_cifar.space.select import read_space
    from tune_cifar.train.lr_range import propose_range

    file = read_space(space)
    medians = [found["lr"] for found in report["estimators"].values() if found["lr"] is not None]
    keep = [values["max_lr"] for values in (file.baseline, *file.points) if "max_lr" in values]
    text = set_range(file, "max_lr", Range(*propose_range(medians, keep), log=True))
    diff = describe_edit(file, text)
    console.print(diff, end="", soft_wrap=True)
    if label := label_data(report["data"]["name"]):
        say(f"{label}: this range says nothing about CIFAR-10.", console, "bold yellow")
    if not diff:
        note, accepted = f"{file.path}: max_lr has the proposed range already", False
    elif yes or (sys.stdin.isatty() and sys.stderr.isatty() and not as_json):
        accepted = yes or typer.confirm("Change the file?", err=True)
        note = f"written into {file.path}" if accepted else "not written"
    else:
        note, accepted = "not written: there is no terminal to ask at; --yes writes it", False
    if accepted:
        _write(file, text)
    say(note, console)
    return {"path": str(file.path), "diff": diff, "written": accepted}


def _write(file: SpaceFile, text: str) -> None:
    """Write a space file's new text, unless the file has changed since it was read."""
    from tune_cifar.record.files import write_atomically
    from tune_cifar.space.reader import describe_path

    path, label = file.path.resolve(), describe_path(file.path)
    try:
        before, mode = path.read_bytes(), path.stat().st_mode
        encoding = "utf-8-sig" if before.startswith(codecs.BOM_UTF8) else "utf-8"
        if before != file.text.encode(encoding):
            raise SpaceError(f"{label}: the file has changed since it was read. Try again.")
        write_atomically(path, text.encode(encoding))
        path.chmod(mode)
    except OSError as exc:
        raise SpaceError(f"{label}: the file must be writable, got {exc.strerror!r}.") from exc
