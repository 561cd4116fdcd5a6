"""`train`: one training with a record of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import (
    paste,
    repeat_launch,
    repeat_place,
    say,
    stdout,
    this_command,
)
from tune_cifar.errors import ConfigError

if TYPE_CHECKING:
    from tune_cifar.data.files import DataSource
    from tune_cifar.record.state import SearchState
    from tune_cifar.schema import Numerics
    from tune_cifar.space.select import SearchSpace


def train(
    context: typer.Context,
    space: options.Space,
    tier: Annotated[
        str,
        typer.Option(
            "--tier", metavar="full|cpu|night", help="Whose epochs and train_size to take."
        ),
    ] = "full",
    settings: options.Settings = None,
    name: options.Name = None,
    resume: options.Resume = False,
    data: options.Data = None,
    device: options.Device = "auto",
    cpus_per_trial: options.Cpus = 1,
    precision: options.Precision = "auto",
    execution: options.Execution = "auto",
    deterministic: options.Deterministic = False,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
) -> None:
    """Train one configuration: a space's baseline with your changes.

    It saves a checkpoint each minute; --resume continues it.

    Example: python -m tune_cifar train --space s10 --tier cpu --set max_lr=1e-2
    """
    from tune_cifar.data.files import describe_data, find_data
    from tune_cifar.record.journal import check_name
    from tune_cifar.record.store import find_storage
    from tune_cifar.space.select import load_space, parse_setting
    from tune_cifar.train.network import choose_execution, resolve_network
    from tune_cifar.train.numerics import resolve_numerics

    folder = find_storage(storage)
    if name is not None:
        check_name(name)
        if resume:
            resume_training(_find_recorded(context, folder, name), data, tracking_uri)
            return
    source = find_data(data)
    pins = dict(parse_setting(setting) for setting in settings or [])
    about = describe_data(source)
    found = resolve_network(load_space(space, tier, pins, about), about)
    execution = choose_execution(found.baseline, execution)
    numerics = resolve_numerics(device, precision, cpus_per_trial, deterministic, execution)
    _train(found, source, numerics, folder, name, resume, tracking_uri, data)


def _find_recorded(context: typer.Context, storage: Path, name: str) -> SearchState:
    """Return the training to continue; refuse options that differ from it."""
    from tune_cifar.record.events import KIND_WORDS
    from tune_cifar.record.store import load_searches

    (state,) = load_searches(storage, search=name)
    kind = state.header.kind
    if kind != "train":
        way_out = f"Use `search --name {name} --resume`."
        raise ConfigError(f"{name} must be a single training, got {KIND_WORDS[kind]}. {way_out}")
    options.refuse_changed(context, state.header)
    return state


def resume_training(state: SearchState, data: str | None, tracking_uri: str | None) -> None:
    """Continue a recorded training, from its record alone."""
    from tune_cifar.search.resume import restore_space
    from tune_cifar.train.numerics import restore_numerics

    header = state.header
    if state.is_finished:
        _say_end(state, data)
        return
    source = options.find_recorded_data(state, data)
    numerics = restore_numerics(header.numerics)
    space = restore_space(header)
    _train(space, source, numerics, state.storage, header.name, True, tracking_uri, data)


def _train(
    space: SearchSpace,
    source: DataSource,
    numerics: Numerics,
    storage: Path,
    name: str | None,
    resume: bool,
    tracking_uri: str | None,
    data_option: str | None,
) -> None:
    """Train to the end, showing it; exit status 130 when it was interrupted."""
    from tune_cifar.cli.live import TrainingView
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.record.events import EpochReported, Event
    from tune_cifar.tracking.address import make_tracking_uri
    from tune_cifar.tracking.upload import BackgroundUploader
    from tune_cifar.train.recorded import open_training, run_training

    options.check_tracking_uri(storage, tracking_uri, stdout())
    print_synthetic_banner(stdout(), source.name)
    record, data = open_training(space, source, numerics, storage, name, this_command(), resume)
    name, is_interrupted = record.state.header.name, False
    with record, TrainingView(stdout(), data.info) as view:
        say(f"run {name}:0, fingerprint {space.baseline.fingerprint}")
        uri = make_tracking_uri(storage, tracking_uri)
        uploader = BackgroundUploader(uri, storage, record.state)

        def on_event(state: SearchState, event: Event) -> None:
            uploader.on_event(state, event)
            if isinstance(event, EpochReported):
                view.say(event.result)

        try:
            run_training(record, data, numerics, on_event, view.watch)
        except KeyboardInterrupt:
            is_interrupted = True
        finally:
            for fault in uploader.close():
                say(fault, style="yellow")
    if is_interrupted:
        say("interrupted; continue it with:")
        given = repeat_place(record.state) + repeat_launch(record.state)
        paste(f"  python -m tune_cifar search --name {name} --resume{given}")
        raise typer.Exit(130)
    _say_end(record.state, data_option)


def _say_end(state: SearchState, data: str | None) -> None:
    from tune_cifar.report.format import format_percent

    trial = state.trials[0]
    reason = f" ({trial.reason})" if trial.status == "diverged" else ""
    say(f"{trial.run_id}: {trial.status}, val_acc {format_percent(trial.val_acc)}{reason}")
    paste(f"next: python -m tune_cifar reproduce {trial.run_id}{repeat_place(state, data)}")
