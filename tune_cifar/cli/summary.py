"""Tables of trials, and what a search says at its end."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tune_cifar.record.state import TIME_LIMIT, SearchState, TrialState
from tune_cifar.report.format import format_percent, format_seconds, format_value
from tune_cifar.report.trials import describe_gain
from tune_cifar.schema import Status, label_data

STYLES: dict[Status, str] = {
    "running": "cyan",
    "complete": "green",
    "stopped": "dim",
    "diverged": "yellow",
    "failed": "bold red",
}
NUM_KNOBS = 4


def print_synthetic_banner(console: Console, data_name: str) -> None:
    """Say, so that nobody can miss it, that this is not CIFAR-10."""
    label = label_data(data_name)
    if not label:
        return
    words = (
        "\nThese images are generated shapes. The tool works as it will; its accuracies say nothing about "
        "CIFAR-10.\nFor the real images: python -m tune_cifar data fetch"
    )
    text = Text.assemble((label, "bold"), words)
    console.print(Panel(text, title="synthetic data", border_style="bold yellow", padding=(1, 4)))


def make_trial_table(state: SearchState, trials: list[TrialState]) -> Table:
    """Rows of trials: number, status, epoch, val_acc and the first searched knobs."""
    knobs = list(state.header.distributions or (trials[0].params if trials else ()))[:NUM_KNOBS]
    table = Table("trial", "status", "epoch", "val_acc", *knobs, box=None, header_style="bold")
    for trial in trials:
        table.add_row(
            str(trial.number) + (" (baseline)" if trial.origin == "baseline" else ""),
            Text(trial.status, style=STYLES[trial.status]),
            f"{len(trial.epochs)}/{_find_length(state, trial)}",
            format_percent(trial.val_acc),
            *(
                format_value(trial.params.get(knob, getattr(trial.config, knob, None)))
                for knob in knobs
            ),
        )
    return table


def _find_length(state: SearchState, trial: TrialState) -> int:
    """Epochs of the training that a trial is in; before the first one's first epoch the record does not say it."""
    budget = state.header.budget
    if trial.status == "running" and trial.stage is None and budget.get("fidelity") == "cycles":
        return int(budget["rungs"][0])
    return trial.config.epochs


def print_search_summary(
    console: Console,
    state: SearchState,
    tracking_faults: list[str],
    dropped: list[str],
    data_option: str = "",
    storage_option: str = "",
) -> None:
    """What a finished search found, what it must be read against, what went wrong, and what to do next.

    Args:
        tracking_faults: what MLflow did not take, a sentence each.
        dropped: searched knobs that the pins left without effect.
        data_option, storage_option: as the next commands must repeat them, with a space before each; may be empty.
    """
    assert state.finished is not None
    header = state.header
    counts = (
        ", ".join(f"{count} {status}" for status, count in state.counts.items() if count) or "none"
    )
    took = format_seconds(state.finished.wall_seconds)

    def say(text: str, style: str | None = None) -> None:
        """Brackets are taken literally (paths and MLflow's messages hold some); only a terminal breaks lines."""
        console.print(
            text, style=style, markup=False, highlight=False, soft_wrap=not console.is_terminal
        )

    say(
        f"\n{header.name} ended after {took} ({state.finished.reason}): {len(state.trials)} trials, {counts}",
        "bold",
    )
    if label := header.data.label:
        say(f"{label}: these accuracies say nothing about CIFAR-10.", "bold yellow")
    if prediction := _describe_prediction(state):
        say(prediction)
    if header.pinned:
        say(
            "pinned for all trials: "
            + ", ".join(f"{k} = {format_value(v)}" for k, v in header.pinned.items())
        )
    if dropped:
        say("not searched, since the pins leave them without effect: " + ", ".join(dropped))
    best = state.best
    if best is None:
        advice = " Give it more --max-time." if state.finished.reason == TIME_LIMIT else ""
        say(f"No trial reached its last epoch: there is no score to compare.{advice}")
    else:
        say(
            f"best: trial {best.number}, val_acc {format_percent(best.score)} after {best.config.epochs} epochs"
        )
        console.print(_knob_table(state, best))
        say(describe_gain(state, best))
    failed = [
        str(state.folder / trial.error_file) for trial in state.trials.values() if trial.error_file
    ]
    if failed:
        say("\n  ".join([f"{len(failed)} failed; tracebacks:", *failed]), "red")
    for fault in dict.fromkeys(tracking_faults):
        say(fault, "yellow")
    _print_next(console, state, data_option, storage_option)


def _describe_prediction(state: SearchState) -> str:
    """What was paid beside what was predicted; nothing where another search than the predicted one was run."""
    header, predicted = state.header, state.header.predicted_epochs
    paid = sum(trial.epochs_done for trial in state.trials.values())
    if predicted is None or not paid or not state.is_finished:
        return ""
    if state.resumes:  # each launch has a time limit of its own
        wanted = header.budget["trials"], None
        assert state.finished is not None
        if (
            state.num_trials,
            header.budget.get("max_time_seconds"),
        ) != wanted or state.finished.reason != "all trials":
            return ""
    return f"trial-epochs: {paid} paid, {predicted:.0f} predicted (error {100 * (predicted / paid - 1):+.0f} %)"


def _knob_table(state: SearchState, best: TrialState) -> Table:
    table = Table("knob", "baseline", "best", box=None, header_style="bold", padding=(0, 2))
    for knob in state.header.distributions:
        table.add_row(
            knob,
            format_value(state.header.baseline[knob]),
            format_value(getattr(best.config, knob)),
        )
    return table


def _print_next(
    console: Console, state: SearchState, data_option: str, storage_option: str
) -> None:
    """Commands to paste: never broken into lines."""
    name = state.header.name
    if (
        not data_option and state.header.data.name == "shapes"
    ):  # a resume knows it from the record, `reproduce` asks
        data_option = " --data shapes"
    if not state.is_finished:
        resume = f"search --name {name} --resume{data_option}{storage_option}"
        console.print(
            f"\ngo on with:\n  python -m tune_cifar {resume}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    commands = (
        [f"reproduce --best --search {name}{data_option}{storage_option}"]
        if state.best is not None
        else []
    )
    if any(trial.status == "failed" or trial.retries for trial in state.trials.values()):
        commands.append(f"failures --search {name}{storage_option}")
    commands += [f"leaderboard --search {name}{storage_option}", f"ui{storage_option}"]
    lines = "\n".join(f"  python -m tune_cifar {command}" for command in commands)
    console.print(f"\nnext:\n{lines}", markup=False, highlight=False, soft_wrap=True)
