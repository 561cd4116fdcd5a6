"""`reproduce`: a recorded run, trained again and compared; with --test, on the test set."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli import options
from tune_cifar.cli.evaluate import evaluate_test, say_test
from tune_cifar.cli.terminal import paste, print_json, say, stderr, stdout, this_command

if TYPE_CHECKING:
    from rich.console import Console

    from tune_cifar.data.load import TrainVal
    from tune_cifar.record.state import SearchState, TrialState
    from tune_cifar.record.test_log import TestEvaluation
    from tune_cifar.schema import EpochResult, Numerics
    from tune_cifar.train.trainer import Trainer

Test = Annotated[
    bool, typer.Option("--test", help="Evaluate on the test set, once, and log it there.")
]
NoRetrain = Annotated[
    bool, typer.Option("--no-retrain", help="With --test: take the kept weights, train nothing.")
]
Again = Annotated[
    bool, typer.Option("--again", help="With --test: although this training was tested before.")
]
STYLES = {"identical": "bold green", "within tolerance": "green", "different": "bold red"}


def reproduce(
    run: options.RunId = None,
    best: options.Best = False,
    space: options.BestSpace = None,
    search: options.BestSearch = None,
    test: Test = False,
    no_retrain: NoRetrain = False,
    again: Again = False,
    device: options.RecordedDevice = None,
    data: options.Data = None,
    as_json: options.Json = False,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
) -> None:
    """Train a recorded run again: identical, within tolerance, or different (exit 1).

    A failed run must fail again, and shows its whole traceback; `failures` names such runs.

    Example: python -m tune_cifar reproduce --best --space s10
    """
    from tune_cifar.record.store import find_storage
    from tune_cifar.record.test_log import find_test_evaluations
    from tune_cifar.train.numerics import restore_numerics
    from tune_cifar.train.recorded import load_recorded_data, load_trained
    from tune_cifar.verify.test_set import check_testable

    given = {"--no-retrain": no_retrain, "--again": again, "--tracking-uri": tracking_uri}
    for option, value in given.items():
        if value and not test:
            raise typer.BadParameter(f"{option} belongs to --test.")
    state, trial = options.choose_run(run, best, space, search, find_storage(storage), data)
    source = options.find_recorded_data(state, data)
    console = stderr() if as_json else stdout()
    answer: dict[str, Any] = {
        "run_id": trial.run_id,
        "search": state.header.name,
        "fingerprint": trial.fingerprint,
    }
    logged: list[TestEvaluation] = []
    if test:
        check_testable(trial)
        if not again:
            data_info = state.header.data
            logged = find_test_evaluations(state.storage, trial.fingerprint, data_info)
        if not logged:
            options.check_tracking_uri(state.storage, tracking_uri, console)
    trainer: Trainer | None = None
    if not (no_retrain and logged):
        numerics = restore_numerics(trial.numerics, device)
        loaded = load_recorded_data(state, trial, source)
        if no_retrain:
            trainer = load_trained(state, trial, loaded, numerics)
        else:
            trainer = _retrain(state, trial, loaded, numerics, answer, console)
    if test and answer.get("verdict") != "different":
        kept = None
        if logged:
            row = logged[0]
        else:
            assert trainer is not None
            how = (this_command(), tracking_uri, console, again)
            row, kept = evaluate_test(state, trial, trainer, source, *how)
        if kept is None:
            before = f"evaluated before, for {row.run_id} on {row.date}; --again does it once more"
            say_test(trial.run_id, row, before, console)
        else:
            answer["evaluation"] = kept
        answer |= {"test": asdict(row), "test_opened_before": kept is None}
    if as_json:
        print_json(answer)
    if answer.get("verdict") == "different":
        raise typer.Exit(1)


def _retrain(
    state: SearchState,
    trial: TrialState,
    data: TrainVal,
    numerics: Numerics,
    answer: dict[str, Any],
    console: Console,
) -> Trainer | None:
    """Train again and compare, epoch by epoch; the outcome goes into the answer."""
    from tune_cifar.cli.live import TrainingView
    from tune_cifar.cli.summary import describe_replicate
    from tune_cifar.verify.reproduce import reproduce_run

    about = f"{state.header.space}, {trial.origin}, {trial.status}, {len(trial.epochs)} epochs"
    about += describe_replicate(trial)
    again = f"is trained again, fingerprint {trial.fingerprint}"
    say(f"{trial.run_id} ({about}) {again}", console)
    with TrainingView(console, data.info) as view:

        def on_epoch(recorded: EpochResult, fresh: EpochResult, difference: str | None) -> None:
            view.say(fresh, f"  {'DIFFERS' if difference else 'agrees'}")

        outcome, trainer = reproduce_run(state, trial, data, numerics, on_epoch, view.watch)
    if outcome.traceback:
        paste(outcome.traceback.rstrip(), console)
    style = STYLES[outcome.verdict]
    say(f"{outcome.verdict} over {outcome.epochs} epochs", console, style)
    if outcome.detail:
        say(outcome.detail, console)
    for change in outcome.numerics:
        say(f"numerics differ: {change}", console)
    for note in outcome.unrecorded:
        say(note, console)
    answer |= {
        "verdict": outcome.verdict,
        "epochs": outcome.epochs,
        "first_different": outcome.first_different,
        "detail": outcome.detail,
        "numerics": list(outcome.numerics),
    }
    if outcome.unrecorded:
        answer["unrecorded"] = list(outcome.unrecorded)
    if trial.status == "failed":
        answer["traceback"] = outcome.traceback
    return trainer
