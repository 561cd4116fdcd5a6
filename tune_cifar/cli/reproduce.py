"""`reproduce`: a recorded run, trained again and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli import options
from tune_cifar.cli.evaluate import keep_evaluation, say_kept
from tune_cifar.cli.terminal import print_json, say, stderr, stdout, this_command
from tune_cifar.errors import ConfigError
from tune_cifar.schema import label_data

if TYPE_CHECKING:
    from rich.console import Console

    from tune_cifar.record.state import SearchState, TrialState
    from tune_cifar.record.test_log import TestEvaluation
    from tune_cifar.schema import EpochResult


def reproduce(
    run: options.RunId = None,
    best: options.Best = False,
    space: options.BestSpace = None,
    search: options.BestSearch = None,
    test: Annotated[
        bool,
        typer.Option("--test", help="Open the sealed test set, once, and write the opening down."),
    ] = False,
    no_retrain: Annotated[
        bool,
        typer.Option("--no-retrain", help="With --test: judge the kept weights without training."),
    ] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="With --test: open it although this training has been tested."
        ),
    ] = False,
    device: options.RecordedDevice = None,
    data: options.Data = None,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
    as_json: options.Json = False,
) -> None:
    """Train a recorded run again and say whether it agrees: identical, within tolerance, or different (exit 1).

    A failed run must fail again, and does so here, with its whole traceback: `failures` names the runs.

    Example: python -m tune_cifar reproduce --best --space s10
    """
    from tune_cifar.data.files import find_data
    from tune_cifar.record.store import find_storage

    for option, is_given in {"--no-retrain": no_retrain, "--again": again}.items():
        if is_given and not test:
            raise typer.BadParameter(f"{option} belongs to --test.")
    state, trial = options.choose_run(run, best, space, search, find_storage(storage), data)
    console = stderr() if as_json else stdout()
    answer = _reproduce(
        state, trial, find_data(data), device, test, no_retrain, again, tracking_uri, console
    )
    if as_json:
        print_json(answer)
    if answer.get("verdict") == "different":
        raise typer.Exit(1)


def _reproduce(
    state: SearchState,
    trial: TrialState,
    source: Any,
    device: str | None,
    test: bool,
    no_retrain: bool,
    again: bool,
    tracking_uri: str | None,
    console: Console,
) -> dict[str, Any]:
    """Retrain and compare (unless only the test is asked for), then open the test set (if asked for)."""
    from tune_cifar.record.test_log import find_openings, find_test_log
    from tune_cifar.train.numerics import restore_numerics
    from tune_cifar.train.recorded import load_recorded_data, load_trained
    from tune_cifar.verify.test_set import check_testable, open_test

    test_log = find_test_log(state.storage, source.name)
    answer: dict[str, Any] = {
        "run_id": trial.run_id,
        "search": state.header.name,
        "fingerprint": trial.fingerprint,
    }
    earlier = []
    if test:
        check_testable(trial)
        earlier = (
            [] if again else find_openings(test_log, trial.fingerprint, state.header.data.name)
        )
    if not (no_retrain and earlier):
        numerics = restore_numerics(trial.driver.numerics, device)
        loaded = load_recorded_data(state, trial, source)
        if no_retrain:
            trainer = load_trained(state, trial, loaded, numerics)
        else:
            trainer = _retrain(state, trial, loaded, numerics, answer, console)
    if not test or answer.get("verdict") == "different":
        return answer
    if earlier:
        opening = earlier[-1]
        _say_opening(
            opening,
            f"opened before, for {opening.run_id} on {opening.date}; --again opens it again",
            console,
        )
    else:
        opening, evaluation, split = open_test(trainer, trial, source, test_log, this_command())
        _say_opening(opening, f"written into {test_log}", console)
        answer["evaluation"] = evaluation.to_dict()
        try:
            answer["evaluation"] = keep_evaluation(
                state, trial, evaluation, split, None, tracking_uri
            )
            say_kept(answer["evaluation"], console)
        except (
            ConfigError
        ) as exc:  # the test set is open, and that is written down: this must not look undone
            say(str(exc), console, "yellow")
    return answer | {"test": opening.__dict__, "test_opened_before": bool(earlier)}


def _retrain(
    state: SearchState,
    trial: TrialState,
    loaded: Any,
    numerics: Any,
    answer: dict[str, Any],
    console: Console,
) -> Any:
    """Train and compare, saying so; the answer gets the outcome. Returns the Trainer, None of a failed run."""
    from tune_cifar.cli.live import TrainingView
    from tune_cifar.verify.reproduce import replay_failure, reproduce_run

    say(
        f"{trial.run_id} ({state.header.space}, {trial.origin}, {trial.status}, {len(trial.epochs)} epochs) is trained "
        f"again, fingerprint {trial.fingerprint}",
        console,
    )
    trainer = None
    with TrainingView(console, loaded.info) as view:

        def on_event(recorded: EpochResult, fresh: EpochResult, difference: str | None) -> None:
            view.say(fresh, f"  {'DIFFERS' if difference else 'agrees'}")

        if trial.status == "failed":
            outcome = replay_failure(state, trial, loaded, numerics, on_event, view.watch)
        else:
            outcome, trainer = reproduce_run(state, trial, loaded, numerics, on_event, view.watch)
    if outcome.traceback:
        console.print(outcome.traceback.rstrip(), soft_wrap=True)
    style = {"identical": "bold green", "within tolerance": "green", "different": "bold red"}[
        outcome.verdict
    ]
    say(f"{outcome.verdict} over {outcome.epochs} epochs", console, style)
    if outcome.detail:
        say(outcome.detail, console)
    for change in outcome.numerics:
        say(f"numerics differ: {change}", console)
    answer |= {
        "verdict": outcome.verdict,
        "epochs": outcome.epochs,
        "first_different": outcome.first_different,
        "detail": outcome.detail,
        "numerics": list(outcome.numerics),
    }
    if trial.status == "failed":
        answer["traceback"] = outcome.traceback
    return trainer


def _say_opening(opening: TestEvaluation, where: str, console: Console) -> None:
    label = label_data(opening.data)
    data = f", {label}" if label else ""
    say(
        f"test accuracy {100 * opening.test_acc:.2f} % on {opening.images} images{data}, "
        f"loss {opening.test_loss:.4f} ({where})",
        console,
    )
