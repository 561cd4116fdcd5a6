"""`reproduce`: a recorded run, trained again and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, stdout, this_command
from tune_cifar.errors import ConfigError

if TYPE_CHECKING:
    from tune_cifar.record import SearchState, TrialState
    from tune_cifar.reproduce import TestOpening


def reproduce(
    run: Annotated[str | None, typer.Argument(help="A run id such as NAME:7, from `leaderboard`.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The best trial of --space or --search.")] = False,
    space: Annotated[
        str | None, typer.Option("--space", help="Its newest finished search on CIFAR-10 is meant.")
    ] = None,
    search: Annotated[str | None, typer.Option("--search", help="A search by name.")] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Open the sealed test set, once, and write the opening down.")
    ] = False,
    no_retrain: Annotated[
        bool, typer.Option("--no-retrain", help="With --test: judge the kept weights without training.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="With --test: open it although this training has been tested.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", metavar="cpu|cuda", help="Instead of the recorded device.")
    ] = None,
    data: options.Data = None,
    storage: options.Storage = None,
    as_json: options.Json = False,
) -> None:
    """Train a recorded run again and say whether it agrees: identical, within tolerance, or different (exit 1).

    Example: python -m tune_cifar reproduce --best --space s10
    """
    from tune_cifar.data import find_data
    from tune_cifar.record import find_storage
    from tune_cifar.results import find_best, find_run, load_searches

    if (run is None) == (not best) or (best and space is None and search is None):
        raise typer.BadParameter("Give a run id, or --best with --space or --search.")
    if no_retrain and not test:
        raise ConfigError("--no-retrain: needs --test, got it alone. Add --test.")
    folder = find_storage(storage)
    if run is not None:
        state, trial = find_run(folder, run)
    else:
        state, trial = find_best(load_searches(folder), space, search)
    if data is None and state.header.data.name == "shapes":
        raise ConfigError(f"{trial.run_id}: it was trained on the generated stand-in. Add --data shapes to train it again.")
    answer = _reproduce(state, trial, find_data(data), device, test, no_retrain, again, as_json)
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
    quiet: bool,
) -> dict[str, Any]:
    """Retrain and compare (unless only the test is asked for), then open the test set (if asked for)."""
    from tune_cifar.reproduce import (
        find_openings_file,
        load_openings,
        load_recorded_data,
        load_trained,
        open_test,
        restore_numerics,
    )

    console = stdout()
    console.quiet = quiet
    storage = state.folder.parent.parent
    openings_file = find_openings_file(storage, source.name)
    answer: dict[str, Any] = {"run_id": trial.run_id, "search": state.header.name, "fingerprint": trial.fingerprint}
    if test and not again:
        earlier = load_openings(openings_file, trial.fingerprint)
        if earlier:
            _say_opening(earlier[-1], f"opened before, on {earlier[-1].date}; --again opens it once more")
            return answer | {"test": earlier[-1].__dict__}
    numerics = restore_numerics(state.header.numerics, device)
    loaded = load_recorded_data(state, trial, source)
    if no_retrain:
        trainer = load_trained(state, trial, loaded, numerics)
    else:
        trainer = _retrain(state, trial, loaded, numerics, answer)
    if test and answer.get("verdict") != "different":
        if trainer.epoch not in (0, trial.config.epochs):
            raise ConfigError(f"{trial.run_id}: a test needs a complete training, got {trainer.epoch} epochs.")
        opening = open_test(trainer, trial, source, openings_file, this_command())
        _say_opening(opening, f"written into {openings_file}")
        answer["test"] = opening.__dict__
    return answer


def _retrain(state: SearchState, trial: TrialState, loaded: Any, numerics: Any, answer: dict[str, Any]) -> Any:
    from tune_cifar.live import TrainingView
    from tune_cifar.reproduce import reproduce_run

    console = stdout()
    console.print(
        f"{trial.run_id} ({state.header.space}, {trial.origin}, {trial.status}, {trial.epochs_done} epochs) is trained "
        f"again, fingerprint {trial.fingerprint}",
        highlight=False,
        soft_wrap=True,
    )
    with TrainingView(console, loaded.info) as view:
        outcome, trainer = reproduce_run(
            state,
            trial,
            loaded,
            numerics,
            on_epoch=lambda recorded, fresh, difference: view.say(fresh, f"  {'DIFFERS' if difference else 'agrees'}"),
            on_trainer=view.watch,
        )
    style = {"identical": "bold green", "within tolerance": "green", "different": "bold red"}[outcome.verdict]
    console.print(f"[{style}]{outcome.verdict}[/] over {outcome.epochs} epochs", highlight=False)
    if outcome.detail:
        console.print(outcome.detail, highlight=False, soft_wrap=True)
    for change in outcome.numerics:
        console.print(f"numerics differ: {change}", highlight=False, soft_wrap=True)
    answer |= {
        "verdict": outcome.verdict,
        "epochs": outcome.epochs,
        "first_different": outcome.first_different,
        "detail": outcome.detail,
        "numerics": list(outcome.numerics),
    }
    return trainer


def _say_opening(opening: TestOpening, where: str) -> None:
    stdout().print(
        f"test accuracy {100 * opening.test_acc:.2f} % on {opening.images} images, loss {opening.test_loss:.4f} ({where})",
        highlight=False,
        soft_wrap=True,
    )
