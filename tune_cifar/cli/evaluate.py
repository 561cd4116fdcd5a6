"""`evaluate`: a run's kept weights on its validation images; and how evaluations are kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, say, stderr, stdout
from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.schema import label_data

if TYPE_CHECKING:
    from rich.console import Console

    from tune_cifar.data.files import DataSource
    from tune_cifar.data.load import Split
    from tune_cifar.record.state import SearchState, TrialState
    from tune_cifar.record.test_log import TestEvaluation
    from tune_cifar.train.metrics import Evaluation
    from tune_cifar.train.trainer import Trainer

Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="For the figures. Default: judge/RUN in the run store."
    ),
]


def evaluate(
    context: typer.Context,
    run: options.RunId = None,
    best: options.Best = False,
    space: options.BestSpace = None,
    search: options.BestSearch = None,
    out: Out = None,
    device: options.RecordedDevice = None,
    data: options.Data = None,
    as_json: options.Json = False,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
) -> None:
    """Evaluate a run's kept weights on its validation images: classes, calibration, mistakes.

    Writes figures and judgement.json, and logs them to MLflow. For the test set: reproduce --test.

    Example: python -m tune_cifar evaluate --best --space s10
    """
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.record.store import find_storage
    from tune_cifar.train.recorded import evaluate_trained, load_recorded_data

    if context.info_name == "judge":
        say("`judge` is called `evaluate` now; the old name goes with the next release.", stderr())
    state, trial = options.choose_run(run, best, space, search, find_storage(storage), data)
    console = stderr() if as_json else stdout()
    if not trial.config.val_size:
        way_out = "Try: reproduce --test."
        raise RecordError(f"{trial.run_id} was trained without validation images. {way_out}")
    options.check_tracking_uri(state.storage, tracking_uri, console)
    loaded = load_recorded_data(state, trial, options.find_recorded_data(state, data))
    print_synthetic_banner(console, loaded.info.name)
    way_out = "Evaluate the best one: --best --search, or keep more: search --keep-weights."
    evaluation, split = evaluate_trained(state, trial, loaded, way_out, device)
    _print_evaluation(trial, evaluation, console)
    kept = keep_evaluation(state, trial, evaluation, split, out, tracking_uri)
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
        accuracy = format_percent(figures.accuracy)
        table.add_row(
            figures.name, f"{figures.num_images:,}", accuracy, f"{figures.num_predicted:,}"
        )
    console.print(table)
    recorded = format_percent(trial.val_acc)
    say(f"accuracy {format_percent(evaluation.accuracy)} (recorded: {recorded})", console)
    error = format_percent(evaluation.ece)
    say(f"loss {evaluation.loss:.4f}, expected calibration error {error}", console)


def keep_evaluation(
    state: SearchState,
    trial: TrialState,
    evaluation: Evaluation,
    split: Split,
    out: Path | None,
    tracking_uri: str | None,
) -> dict[str, Any]:
    """Write an evaluation's figures and log them to MLflow.

    Args:
        split: the images that were evaluated.
        out: a folder; None is the run's own below `judge/` in the run store.

    Returns:
        the evaluation as JSON has it, with `folder`, `files` and `mlflow_fault` (or None).
    """
    from tune_cifar.report.plots.evaluation import save_evaluation
    from tune_cifar.tracking.address import make_tracking_uri
    from tune_cifar.tracking.upload import upload_evaluation
    from tune_cifar.train.metrics import find_evaluation_folder

    folder = out or find_evaluation_folder(state.storage, trial.run_id, evaluation.part)
    label = state.header.data.label
    title = f"{trial.run_id}: {evaluation.num_images:,} {evaluation.part} images"
    title += f", {label}" if label else ""
    images_NHWC = split.images_NCHW.permute(0, 2, 3, 1).numpy()
    files = save_evaluation(evaluation, images_NHWC, title, folder)
    uri, found = make_tracking_uri(state.storage, tracking_uri), evaluation.to_dict()
    fault = upload_evaluation(uri, state.storage, state, trial, found, files)
    names = [file.name for file in files]
    return {**found, "folder": str(folder), "files": names, "mlflow_fault": fault}


def say_kept(kept: dict[str, Any], console: Console) -> None:
    """Say where the figures of a kept evaluation are, its warnings, and MLflow's fault."""
    say(f"figures: {kept['folder']} ({', '.join(kept['files'])})", console)
    for sentence in (*kept["warnings"], kept["mlflow_fault"]):
        if sentence is not None:
            say(sentence, console, "yellow")


def evaluate_test(
    state: SearchState,
    trial: TrialState,
    trainer: Trainer,
    source: DataSource,
    command: str,
    tracking_uri: str | None,
    console: Console,
    again: bool = False,
) -> tuple[TestEvaluation, dict[str, Any] | None]:
    """Evaluate on the test set, write it into the test log, and keep its figures.

    Args:
        command: of the user, for the log.
        again: although this training was evaluated before.

    Returns:
        the row of the test log, and what `keep_evaluation` returns. None when another command has
        evaluated this training meanwhile: the row is its first evaluation, nothing is said.
    """
    from tune_cifar.record.test_log import find_test_log
    from tune_cifar.verify.test_set import evaluate_test_set

    row, fresh = evaluate_test_set(trainer, state, trial, source, command, again)
    if fresh is None:
        return row, None
    evaluation, split = fresh
    say_test(trial.run_id, row, f"written into {find_test_log(state.storage)}", console)
    try:
        kept = keep_evaluation(state, trial, evaluation, split, None, tracking_uri)
    except ConfigError as exc:  # the log has the evaluation, so this is no failure of the command
        say(str(exc), console, "yellow")
        return row, evaluation.to_dict()
    say_kept(kept, console)
    return row, kept


def say_test(run_id: str, row: TestEvaluation, where: str, console: Console) -> None:
    """Say a test evaluation in a line."""
    from tune_cifar.report.format import format_percent

    label = label_data(row.data)
    images = f"{row.images} images{f', {label}' if label else ''}"
    figures = f"test accuracy {format_percent(row.test_acc)} on {images}, loss {row.test_loss:.4f}"
    if row.test_acc_unique is not None:
        unique = format_percent(row.test_acc_unique)
        figures += f"; {unique} without the near duplicates of training images"
    say(f"{run_id}: {figures} ({where})", console)
