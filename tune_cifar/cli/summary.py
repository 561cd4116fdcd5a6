"""Tables of trials, and the summary at the end of a search."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tune_cifar.cli.terminal import paste, repeat_launch, say
from tune_cifar.record.state import TIME_LIMIT, SearchState, TrialState, describe_counts
from tune_cifar.report.format import format_percent, format_seconds, format_value
from tune_cifar.report.trials import describe_gain
from tune_cifar.schema import Status, TrainConfig, inactive_knobs, label_data

STYLES: dict[Status, str] = {
    "running": "cyan",
    "complete": "green",
    "stopped": "dim",
    "diverged": "yellow",
    "failed": "bold red",
}
NUM_KNOBS = 4


def print_synthetic_banner(console: Console, data_name: str) -> None:
    """Warn in a box when the images are generated."""
    if data_name != "shapes":
        return
    label = label_data(data_name)
    text = (
        "\nThese images are generated shapes: accuracies on them say nothing about CIFAR-10.\n"
        "For the real images: python -m tune_cifar data fetch"
    )
    words = Text.assemble((label, "bold"), text)
    console.print(Panel(words, title="synthetic data", border_style="bold yellow", padding=(1, 4)))


def make_trial_table(state: SearchState, trials: list[TrialState]) -> Table:
    """Rows of trials: number, status, epoch, val_acc and the first searched hyperparameters."""
    knobs = list(state.header.distributions or (trials[0].params if trials else ()))[:NUM_KNOBS]
    nodes = ["node"] if state.nodes else []
    columns = ("trial", "status", *nodes, "epoch", "val_acc", *knobs)
    table = Table(*columns, box=None, header_style="bold")
    for trial in trials:
        number = f"{trial.number} (baseline)" if trial.origin == "baseline" else str(trial.number)
        # A confirmation's trials have a `candidate`, which is no knob.
        settled = state.header.confirmation is not None
        values = [trial.params.get(knob) if settled else trial.find_value(knob) for knob in knobs]
        table.add_row(
            number,
            Text(trial.status, style=STYLES[trial.status]),
            *([trial.node or ""] if nodes else []),
            f"{len(trial.epochs)}/{_find_length(state, trial)}{describe_replicate(trial)}",
            format_percent(trial.accuracy),
            *map(format_value, values),
        )
    return table


def describe_replicate(trial: TrialState) -> str:
    """Return `, seed 2 of 3` where the trial is in one of several replicates, else nothing."""
    has_several = trial.num_replicates > 1 and trial.stage == trial.full_config.epochs
    return f", seed {trial.replicate + 1} of {trial.num_replicates}" if has_several else ""


def _find_length(state: SearchState, trial: TrialState) -> int:
    """Epochs of a trial's stage; the record names the first stage with its first epoch only."""
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
    """Print what a finished search found, what failed, and what to do next.

    Args:
        tracking_faults: what MLflow did not take, a sentence each.
        dropped: searched hyperparameters that --set left without effect.
        data_option, storage_option: for the next commands, each with a space before it, or empty.
    """
    header, best, end = state.header, state.best, state.finished
    counts, took = describe_counts(state.counts) or "none", ""
    if end is not None:  # a second Ctrl-C may leave none
        launch = " of its last launch" if state.resumes else ""
        took = f" after {format_seconds(end.wall_seconds)}{launch} ({end.reason})"
    line = f"\n{header.name} ended{took}: {len(state.trials)} trials, {counts}"
    say(line, console, "bold")
    if label := header.data.label:
        say(f"{label}: these accuracies say nothing about CIFAR-10.", console, "bold yellow")
    if prediction := _describe_prediction(state):
        say(prediction, console)
    if header.pinned:
        pins = [f"{name} = {format_value(value)}" for name, value in header.pinned.items()]
        say(f"fixed for all trials: {', '.join(pins)}", console)
    if dropped:
        say(f"not searched, without effect under --set: {', '.join(dropped)}", console)
    if best is None:
        is_over = end is not None and end.reason == TIME_LIMIT
        advice = " Give it more --max-time." if is_over else ""
        say(f"No trial reached its last epoch: there is no score to compare.{advice}", console)
    else:
        score, epochs = format_percent(best.score), best.config.epochs
        seeds = f", mean of {best.num_replicates} seeds" if best.num_replicates > 1 else ""
        say(f"best: trial {best.number}, val_acc {score} after {epochs} epochs{seeds}", console)
        console.print(_overview(state, best))
        say(describe_gain(state, best), console)
    for line in describe_nodes(state):
        say(line, console)
    files = [trial.error_file for trial in state.trials.values() if trial.error_file]
    if files:
        paths = [str(state.folder / file) for file in files]
        say("\n  ".join([f"{len(paths)} failed; tracebacks:", *paths]), console, "red")
    for fault in dict.fromkeys(tracking_faults):
        say(fault, console, "yellow")
    _print_next(console, state, data_option, storage_option)


def describe_nodes(state: SearchState) -> list[str]:
    """Return a line for each node of a cluster: its trials, and whether it still takes part."""
    lines = []
    for name, node in state.nodes.items():
        on_it = [trial for trial in state.trials.values() if trial.node == name]
        num_running = sum(trial.status == "running" for trial in on_it)
        line = f"node {name}: {num_running} running, {len(on_it) - num_running} ended"
        if node.status != "joined":
            line += f"; {node.status}" + (f": {node.text}" if node.text else "")
        lines.append(line)
    return lines


def _describe_prediction(state: SearchState) -> str:
    """The epochs trained beside those predicted; empty where the search run was another one."""
    header, predicted = state.header, state.header.predicted_epochs
    trained = sum(trial.epochs_done for trial in state.trials.values())
    if predicted is None or not trained or state.finished is None or not state.is_finished:
        return ""
    if state.resumes:  # each launch has a time limit of its own
        is_whole = state.num_trials == header.budget["trials"]
        has_limit = header.budget.get("max_time_seconds") is not None
        if has_limit or not is_whole or state.finished.reason != "all trials":
            return ""
    error = f"{100 * (predicted / trained - 1):+.0f} %"
    return f"trial-epochs: {trained} trained, {predicted:.0f} predicted (error {error})"


def _overview(state: SearchState, best: TrialState) -> Table:
    """The searched hyperparameters of the baseline and of the best trial."""
    table = Table("knob", "baseline", "best", box=None, header_style="bold", padding=(0, 2))
    baseline = TrainConfig(**state.header.baseline)
    inactive = inactive_knobs(baseline)
    for knob in state.header.distributions:
        values = None if knob in inactive else baseline.get(knob), best.find_value(knob)
        table.add_row(knob, *map(format_value, values))
    return table


def _print_next(
    console: Console, state: SearchState, data_option: str, storage_option: str
) -> None:
    """Print the commands that follow, to paste."""
    name, python = state.header.name, "python -m tune_cifar"
    if not state.is_finished:
        given = f"{storage_option}{repeat_launch(state)}"
        resume = f"search --name {name} --resume{given}"
        paste(f"\ncontinue it with:\n  {python} {resume}", console)
    commands = []
    if state.best is not None:
        commands.append(f"reproduce --best --search {name}{data_option}{storage_option}")
    if any(trial.status == "failed" or trial.retries for trial in state.trials.values()):
        commands.append(f"failures --search {name}{storage_option}")
    commands += [f"leaderboard --search {name}{storage_option}", f"ui{storage_option}"]
    paste("\nnext:\n" + "\n".join(f"  {python} {command}" for command in commands), console)
