"""`train`: one training with a record of its own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import repeat_options, say, stdout, this_command

if TYPE_CHECKING:
    from tune_cifar.record.state import SearchState


def train(
    space: options.Space,
    settings: options.Settings = None,
    tier: Annotated[
        str,
        typer.Option(
            "--tier",
            metavar="full|cpu",
            help="Whose epochs and train_size to take.",
            rich_help_panel="What",
        ),
    ] = "full",
    name: Annotated[
        str | None,
        typer.Option("--name", help="Of the run. Default: space and time.", rich_help_panel="What"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with --name from its newest checkpoint.", rich_help_panel="What"
        ),
    ] = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    execution: options.Execution = "eager",
    cpus_per_trial: options.Cpus = 1,
    deterministic: options.Deterministic = False,
    data: options.Data = None,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
) -> None:
    """Train one configuration: a space's baseline with your changes. Checkpoints each minute; --resume goes on.

    Example: python -m tune_cifar train --space s10 --set max_lr=1e-2
    """
    from tune_cifar.cli.live import TrainingView
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.data.files import find_data
    from tune_cifar.record.events import EpochReported, Event
    from tune_cifar.record.journal import check_name
    from tune_cifar.record.store import find_storage
    from tune_cifar.space.select import load_space, parse_setting
    from tune_cifar.tracking.upload import BackgroundUploader, make_tracking_uri
    from tune_cifar.train.numerics import resolve_numerics
    from tune_cifar.train.recorded import open_training, run_training

    console = stdout()
    folder = find_storage(storage)
    if name is not None:
        check_name(name)
    source = find_data(data)
    found = load_space(space, tier, dict(parse_setting(setting) for setting in settings or []))
    numerics = resolve_numerics(device, precision, cpus_per_trial, deterministic, execution)
    print_synthetic_banner(console, source.name)
    record, loaded = open_training(found, source, numerics, folder, name, this_command(), resume)
    with record, TrainingView(console, loaded.info) as view:
        is_interrupted = False
        say(f"run {record.state.header.name}:0, fingerprint {found.baseline.fingerprint}")
        uploader = BackgroundUploader(make_tracking_uri(folder, tracking_uri), folder, record.state)

        def on_event(state: SearchState, event: Event) -> None:
            uploader.on_event(state, event)
            if isinstance(event, EpochReported):
                view.say(event.result)

        try:
            run_training(record, loaded, numerics, on_event, view.watch)
        except KeyboardInterrupt:
            is_interrupted = True
        finally:
            for fault in uploader.close():
                say(fault, style="yellow")
    if is_interrupted:
        say("interrupted; go on with:")
        console.print("  " + _describe_resume(record.state.header.name), soft_wrap=True)
        raise typer.Exit(130)
    _say_end(record.state, repeat_options(data=data, storage=storage))


def _describe_resume(name: str) -> str:
    """The command that goes on with this training: the one typed, for --resume asks for the same options again."""
    typed = sys.argv[1:]
    named = any(word.split("=")[0] == "--name" for word in typed)
    return this_command(
        [*([] if named else ["--name", name]), *([] if "--resume" in typed else ["--resume"])]
    )


def _say_end(state: SearchState, given: str) -> None:
    from tune_cifar.report.format import format_percent

    trial = state.trials[0]
    reason = f" ({trial.reason})" if trial.status == "diverged" else ""
    say(f"{trial.run_id}: {trial.status}, val_acc {format_percent(trial.val_acc)}{reason}")
    stdout().print(f"next: python -m tune_cifar reproduce {trial.run_id}{given}", soft_wrap=True)
