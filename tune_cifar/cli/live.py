"""What a search and a training look like while they run, and the words at their end. Views of the record: nothing is
decided here. Plain lines where there is no terminal."""

from __future__ import annotations

import time
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tune_cifar.record.events import EpochReported, Event, TrialEnded, TrialRetried, TrialStarted
from tune_cifar.record.journal import TIME_LIMIT, SearchState, TrialState
from tune_cifar.report.format import format_percent, format_seconds, format_value
from tune_cifar.report.trials import describe_gain
from tune_cifar.schema import DataInfo, EpochResult, Status
from tune_cifar.search.forecast import START_SECONDS, forecast_search
from tune_cifar.space.layout import Budget

if TYPE_CHECKING:
    from tune_cifar.train.lr_range import Sweep
    from tune_cifar.train.trainer import Trainer

STYLES: dict[Status, str] = {
    "running": "cyan",
    "complete": "green",
    "stopped": "dim",
    "diverged": "yellow",
    "failed": "bold red",
}
# Rows of the live table: enough to see what happens, few enough for a small window.
NUM_ROWS = 14
NUM_KNOBS = 4


def print_stand_in_banner(console: Console, data_name: str) -> None:
    """Say, so that nobody can miss it, that this is not CIFAR-10."""
    if data_name != "shapes":
        return
    words = (
        "\nGenerated shapes stand in for the images. The tool works as it will; its accuracies say nothing about "
        "CIFAR-10.\nFor the real thing: python -m tune_cifar data fetch"
    )
    text = Text.assemble(("NOT CIFAR-10", "bold"), words)
    console.print(Panel(text, title="stand-in data", border_style="bold yellow", padding=(1, 4)))


class SearchView:
    """Shows a running search; a listener of its record and a context manager.

    Args:
        budget: what the search is to do; its time limit begins now.
        num_concurrent: trials at once.
        epoch_seconds: estimate of one epoch of the baseline, until real ones are known.
    """

    def __init__(self, console: Console, budget: Budget, num_concurrent: int, epoch_seconds: float) -> None:
        self._console = console
        self._budget = budget.model_copy(update={"max_time_seconds": None})
        self._max_seconds = budget.max_time_seconds
        self._num_concurrent = num_concurrent
        self._epoch_seconds = epoch_seconds
        self._start = time.monotonic()
        self._state: SearchState | None = None
        self._forecast: tuple[SearchState | None, float] | None = None
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._render, transient=True)

    def __enter__(self) -> SearchView:
        self._start = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def hear(self, state: SearchState, event: Event) -> None:
        """Listener for the record's events."""
        # The display reads in a thread of its own: it gets a dict that never grows under its hands.
        self._state = replace(state, trials=dict(state.trials))
        if not self._console.is_terminal:
            line = self._describe(state, event)
            if line:
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Say that the search is about to end; called from a signal's handler."""
        words = "stopping: running epochs end first; Ctrl-C again stops at once, and either way --resume goes on"
        self._console.print(words, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def eta_seconds(self) -> float:
        """Expected seconds to the end, simulated from where the search stands at the mean epoch's price, never beyond
        the time limit."""
        state, elapsed = self._state, time.monotonic() - self._start
        if self._forecast is None or self._forecast[0] is not state:
            self._forecast = state, self._simulate(state)
        expected = self._forecast[1]
        return expected if self._max_seconds is None else min(expected, max(0.0, self._max_seconds - elapsed))

    def _simulate(self, state: SearchState | None) -> float:
        """Seconds to the end without a time limit. About 2 ms, since it is asked for after every event."""
        trials = list(state.trials.values()) if state else []
        seconds = [result.epoch_seconds for trial in trials for _, result in trial.paid]
        price = sum(seconds) / len(seconds) if seconds else self._epoch_seconds
        start = 0.0 if seconds else START_SECONDS
        return forecast_search(self._budget, self._num_concurrent, price, state, start, effort=400).seconds.mean

    def _describe(self, state: SearchState, event: Event) -> str:
        clock = f"[{format_seconds(time.monotonic() - self._start)}]"
        if isinstance(event, TrialStarted):
            knobs = ", ".join(f"{name} {format_value(value)}" for name, value in event.params.items())
            return f"{clock} trial {event.trial} starts ({event.origin}): {knobs}"
        if isinstance(event, EpochReported):
            trial = state.trials[event.trial]
            acc = format_percent(event.result.val_acc)
            return f"{clock} trial {event.trial} epoch {event.result.epoch}/{trial.config.epochs}: val_acc {acc}"
        if isinstance(event, TrialRetried):
            return f"{clock} trial {event.trial}: {event.fault}; it goes on from its newest checkpoint"
        if isinstance(event, TrialEnded):
            end = f"{clock} trial {event.trial} {event.status} ({event.reason})"
            best = state.best
            if best is None:
                return end
            eta = format_seconds(self.eta_seconds())
            return f"{end}; best so far {format_percent(best.score)} (trial {best.number}), about {eta} to go"
        return ""

    def _render(self) -> RenderableType:
        if self._state is None:
            return Text("waiting for the first worker ...", style="dim")
        state = self._state
        rows = sorted(state.trials.values(), key=lambda t: (t.status != "running", -t.number))[:NUM_ROWS]
        return Group(make_trial_table(state, rows), self._status_line(state))

    def _status_line(self, state: SearchState) -> Text:
        counts = ", ".join(f"{count} {status}" for status, count in state.counts.items() if count)
        line = f"{len(state.trials)}/{self._budget.trials} trials: {counts}"
        if state.best is not None:
            line += f"   best {format_percent(state.best.score)} (trial {state.best.number})"
            score, baseline = state.best.score, state.baseline_score
            if score is not None and baseline is not None and state.best.origin != "baseline":
                line += f", {100 * (score - baseline):+.2f} points over the baseline"
        is_training = any(trial.epochs_done for trial in state.trials.values())
        left = f"about {format_seconds(self.eta_seconds())} to go" if is_training else "the workers are starting"
        return Text(f"{line}\n{format_seconds(time.monotonic() - self._start)} gone, {left}")


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
            *(format_value(trial.params.get(knob, getattr(trial.config, knob, None))) for knob in knobs),
        )
    return table


def _find_length(state: SearchState, trial: TrialState) -> int:
    """Epochs of the training that a trial is in; before the first one's first epoch the record does not say it."""
    budget = state.header.budget
    if trial.status == "running" and trial.cycle is None and budget.get("fidelity") == "cycles":
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
    counts = ", ".join(f"{count} {status}" for status, count in state.counts.items() if count) or "none"
    took = format_seconds(state.finished.wall_seconds)

    def say(text: str, style: str | None = None) -> None:
        """Brackets are taken literally (paths and MLflow's messages hold some); only a terminal breaks lines."""
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=not console.is_terminal)

    say(f"\n{header.name} ended after {took} ({state.finished.reason}): {len(state.trials)} trials, {counts}", "bold")
    if header.data.name == "shapes":
        say("NOT CIFAR-10: these accuracies were measured on the generated stand-in.", "bold yellow")
    if prediction := _describe_prediction(state):
        say(prediction)
    if header.pinned:
        say("pinned for all trials: " + ", ".join(f"{k} = {format_value(v)}" for k, v in header.pinned.items()))
    if dropped:
        say("not searched, since the pins leave them without effect: " + ", ".join(dropped))
    best = state.best
    if best is None:
        advice = " Give it more --max-time." if state.finished.reason == TIME_LIMIT else ""
        say(f"No trial reached its last epoch: there is no score to compare.{advice}")
    else:
        say(f"best: trial {best.number}, val_acc {format_percent(best.score)} after {best.config.epochs} epochs")
        console.print(_knob_table(state, best))
        say(describe_gain(state, best))
    failed = [str(state.folder / trial.error_file) for trial in state.trials.values() if trial.error_file]
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
        if (state.num_trials, header.budget.get("max_time_seconds")) != wanted or state.finished.reason != "all trials":
            return ""
    return f"trial-epochs: {paid} paid, {predicted:.0f} predicted (error {100 * (predicted / paid - 1):+.0f} %)"


def _knob_table(state: SearchState, best: TrialState) -> Table:
    table = Table("knob", "baseline", "best", box=None, header_style="bold", padding=(0, 2))
    for knob in state.header.distributions:
        table.add_row(knob, format_value(state.header.baseline[knob]), format_value(getattr(best.config, knob)))
    return table


def _print_next(console: Console, state: SearchState, data_option: str, storage_option: str) -> None:
    """Commands to paste: never broken into lines."""
    name = state.header.name
    if not data_option and state.header.data.name == "shapes":  # a resume knows it from the record, `reproduce` asks
        data_option = " --data shapes"
    if not state.is_finished:
        resume = f"search --name {name} --resume{data_option}{storage_option}"
        console.print(f"\ngo on with:\n  python -m tune_cifar {resume}", markup=False, highlight=False, soft_wrap=True)
    commands = [f"reproduce --best --search {name}{data_option}{storage_option}"] if state.best is not None else []
    if any(trial.status == "failed" or trial.retries for trial in state.trials.values()):
        commands.append(f"failures --search {name}{storage_option}")
    commands += [f"leaderboard --search {name}{storage_option}", f"ui{storage_option}"]
    lines = "\n".join(f"  python -m tune_cifar {command}" for command in commands)
    console.print(f"\nnext:\n{lines}", markup=False, highlight=False, soft_wrap=True)


class TrainingView:
    """A progress bar over the steps of one training, fed by the Trainer's own counter; a line per epoch."""

    def __init__(self, console: Console, data: DataInfo) -> None:
        self._console = console
        self._data = "" if data.name == "cifar10" else f" ({data.name})"
        columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
        self._progress = _StepProgress(*columns, TimeRemainingColumn(compact=True), console=console, transient=True)

    def __enter__(self) -> TrainingView:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def watch(self, trainer: Trainer) -> None:
        """Start to show this Trainer's steps."""
        self._progress.trainer = trainer
        self._progress.add_task("train", total=trainer.total_steps, epoch="")

    def say(self, result: EpochResult, note: str = "") -> None:
        """One line for a finished epoch, with the time that is left at its pace."""
        trainer = self._progress.trainer
        left = (trainer.config.epochs - result.epoch) * result.epoch_seconds if trainer else 0.0
        self._console.print(
            f"epoch {result.epoch}: train_loss {result.train_loss:.4f}, train_acc {format_percent(result.train_acc)}, "
            f"val_acc {format_percent(result.val_acc)}, lr {result.lr:.3g}, {result.images_per_second:.0f} images/s, "
            f"{format_seconds(left)} left{self._data}{note}",
            markup=False,
            highlight=False,
            soft_wrap=not self._console.is_terminal,
        )


class _StepProgress(Progress):
    """A progress bar that reads the Trainer's step whenever it draws itself."""

    trainer: Trainer | None = None

    def get_renderables(self) -> list[RenderableType]:
        if self.trainer is not None:
            epoch = f"{min(self.trainer.epoch + 1, self.trainer.config.epochs)}/{self.trainer.config.epochs}"
            for task_id in self.task_ids:
                self.update(task_id, completed=self.trainer.step, epoch=epoch)
        return list(super().get_renderables())


class SweepView:
    """A progress bar over all steps of an LR range test's sweeps; a line per sweep."""

    def __init__(self, console: Console, num_seeds: int, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._num_left = num_seeds * num_steps
        self._num_done = 0
        self._start = time.monotonic()
        columns = (TextColumn("sweeping"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
        self._progress = Progress(*columns, TimeRemainingColumn(compact=True), console=console, transient=True)
        self._task = self._progress.add_task("sweep", total=self._num_left)

    def __enter__(self) -> SweepView:
        self._start = time.monotonic()
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def step(self) -> None:
        """One training step is done."""
        self._num_done += 1
        self._num_left -= 1
        self._progress.advance(self._task)

    def say(self, sweep: Sweep) -> None:
        """One line for a finished sweep; the steps that a diverged one left out are no more to be done."""
        self._num_left -= self._num_left % self._num_steps
        self._progress.update(self._task, total=self._num_done + self._num_left)
        seconds = (time.monotonic() - self._start) / max(1, self._num_done) * self._num_left
        end = "to its end" if sweep.diverged_at is None else f"until it diverged at lr {sweep.diverged_at:.3g}"
        self._console.print(
            f"seed {sweep.seed}: {len(sweep.losses)} losses {end}, {format_seconds(seconds)} left",
            markup=False,
            highlight=False,
            soft_wrap=not self._console.is_terminal,
        )
