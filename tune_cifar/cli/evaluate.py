"""`judge`: what a run's kept weights make of its validation images, class by class; and how an evaluation is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, say, stderr, stdout
from tune_cifar.errors import RecordError

if TYPE_CHECKING:
    from rich.console import Console

    from tune_cifar.data.load import Split
    from tune_cifar.record.state import SearchState, TrialState
    from tune_cifar.train.metrics import Evaluation


def judge(
    run: options.RunId = None,
    best: options.Best = False,
    space: options.BestSpace = None,
    search: options.BestSearch = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="For the figures. Default: judge/RUN in the run store."
        ),
    ] = None,
    device: options.RecordedDevice = None,
    data: options.Data = None,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
    as_json: options.Json = False,
) -> None:
    """Judge a run's kept weights on its validation images: each class, confusion, calibration, the worst mistakes.

    Writes figures and judgement.json, and logs them to MLflow. The test set stays closed: see reproduce --test.

    Example: python -m tune_cifar judge --best --space s10
    """
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.data.files import find_data
    from tune_cifar.data.load import CLASS_NAMES
    from tune_cifar.record.store import find_storage
    from tune_cifar.train.metrics import evaluate_logits
    from tune_cifar.train.numerics import restore_numerics
    from tune_cifar.train.recorded import load_recorded_data, load_trained

    state, trial = options.choose_run(run, best, space, search, find_storage(storage), data)
    console = stderr() if as_json else stdout()
    if not trial.config.val_size:
        raise RecordError(
            f"{trial.run_id}: validation images must belong to the run, got none. Try reproduce --test."
        )
    loaded = load_recorded_data(state, trial, find_data(data))
    assert loaded.val is not None
    way_out = "Judge the best one: --best --search, or keep more: search --keep-weights."
    trainer = load_trained(
        state, trial, loaded, restore_numerics(trial.driver.numerics, device), way_out
    )
    print_synthetic_banner(console, loaded.info.name)
    names = CLASS_NAMES[loaded.info.name]
    evaluation = evaluate_logits(
        trainer.predict(loaded.val), loaded.val.labels_N, names, "validation"
    )
    _print_evaluation(trial, evaluation, console)
    kept = keep_evaluation(state, trial, evaluation, loaded.val, out, tracking_uri)
    say_kept(kept, console)
    if as_json:
        print_json({"run_id": trial.run_id, "recorded_val_acc": trial.val_acc, **kept})


def _print_evaluation(trial: TrialState, evaluation: Evaluation, console: Console) -> None:
    from rich.table import Table

    from tune_cifar.report.format import format_percent

    say(
        f"{trial.run_id} on its {evaluation.num_images:,} {evaluation.part} images", console, "bold"
    )
    table = Table("class", box=None, header_style="bold")
    for column in ("images", "accuracy", "predicted"):
        table.add_column(column, justify="right")
    for figures in evaluation.classes:
        numbers = (
            f"{figures.num_images:,}",
            format_percent(figures.accuracy),
            f"{figures.num_predicted:,}",
        )
        table.add_row(figures.name, *numbers)
    console.print(table)
    say(
        f"accuracy {format_percent(evaluation.accuracy)} (recorded: {format_percent(trial.val_acc)})",
        console,
    )
    say(
        f"loss {evaluation.loss:.4f}, expected calibration error {format_percent(evaluation.ece)}",
        console,
    )


def keep_evaluation(
    state: SearchState,
    trial: TrialState,
    evaluation: Evaluation,
    split: Split,
    out: Path | None,
    tracking_uri: str | None,
) -> dict[str, Any]:
    """Write the evaluation of these images (into `judge/` of the run store unless told where) and log it to MLflow; what
    was judged, the files, and MLflow's fault or None."""
    from tune_cifar.report.plots.evaluation import save_evaluation
    from tune_cifar.tracking.upload import make_tracking_uri, upload_evaluation
    from tune_cifar.train.metrics import find_evaluation_folder

    storage = state.storage
    folder = out or find_evaluation_folder(storage, trial.run_id, evaluation.part)
    label = state.header.data.label
    title = f"{trial.run_id}: {evaluation.num_images:,} {evaluation.part} images{f', {label}' if label else ''}"
    files = save_evaluation(
        evaluation, split.images_NCHW.permute(0, 2, 3, 1).numpy(), title, folder
    )
    found = evaluation.to_dict()
    fault = upload_evaluation(
        make_tracking_uri(storage, tracking_uri), storage, state, trial, found, files
    )
    return {
        **found,
        "folder": str(folder),
        "files": [file.name for file in files],
        "mlflow_fault": fault,
    }


def say_kept(kept: dict[str, Any], console: Console) -> None:
    """Where the figures of a kept evaluation are, its warnings, and MLflow's fault."""
    say(f"figures: {kept['folder']} ({', '.join(kept['files'])})", console)
    for sentence in (*kept["warnings"], kept["mlflow_fault"]):
        if sentence is not None:
            say(sentence, console, "yellow")
