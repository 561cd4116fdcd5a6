"""The display of a running search, training or LR range test; plain lines without a terminal.

A display's fault ends nothing: it is said once, and the run goes on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Self, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tune_cifar.cli.summary import describe_nodes, describe_replicate, make_trial_table
from tune_cifar.cli.terminal import say, stderr
from tune_cifar.record.events import (
    EpochReported,
    Event,
    NodeChanged,
    TrialEnded,
    TrialPlaced,
    TrialRetried,
    TrialStarted,
)
from tune_cifar.record.state import SearchState, describe_counts
from tune_cifar.report.format import format_percent, format_seconds, format_value
from tune_cifar.schema import DataInfo, EpochResult
from tune_cifar.search.forecast import START_SECONDS, forecast_search
from tune_cifar.space.layout import Budget

if TYPE_CHECKING:
    from tune_cifar.search.plan import SearchPlan
    from tune_cifar.train.lr_range import Sweep
    from tune_cifar.train.trainer import Trainer

# Rows of the live table: enough to see what happens, few enough for a small window.
NUM_ROWS = 14
P = ParamSpec("P")
T = TypeVar("T")
V = TypeVar("V", bound="_View")


def only_shows(
    method: Callable[Concatenate[V, P], T],
) -> Callable[Concatenate[V, P], T | None]:
    """Make a view's method return None instead of raising; the first fault is said on stderr."""

    @functools.wraps(method)
    def show(view: V, /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return method(view, *args, **kwargs)
        except Exception as exc:
            if not view.has_failed:
                view.has_failed = True
                fault = f"{type(exc).__name__}: {exc}"
                say(f"The display failed, and the command goes on ({fault}).", stderr())
            return None

    return show


class _View:
    """A context manager that shows something that moves, on a terminal alone."""

    has_failed = False
    _is_on = False

    def __init__(self, console: Console, moving: Live | Progress) -> None:
        self._console = console
        self._moving = moving
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._turn_on()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._turn_off()

    @only_shows
    def _turn_on(self) -> None:
        if self._console.is_terminal:
            self._moving.start()
            self._is_on = True

    @only_shows
    def _turn_off(self) -> None:
        # Not asked of the console again: a terminal that has gone is none any more.
        if self._is_on:
            self._moving.stop()


class SearchView(_View):
    """The display of a running search: a listener of its record and a context manager.

    Args:
        budget: of the search; its time limit begins now.
        num_concurrent: parallel trials.
        epoch_seconds: estimate of one epoch of the baseline, until real ones are known.
    """

    def __init__(
        self, console: Console, budget: Budget, num_concurrent: int, epoch_seconds: float
    ) -> None:
        self._budget = budget.model_copy(update={"max_time_seconds": None})
        self._max_seconds = budget.max_time_seconds
        self._num_concurrent = num_concurrent
        self._epoch_seconds = epoch_seconds
        self._state: SearchState | None = None
        self._forecast: tuple[SearchState | None, float] | None = None
        live = Live(
            console=console,
            refresh_per_second=2,
            get_renderable=lambda: self._render() or Text(),
            transient=True,
        )
        super().__init__(console, live)

    @only_shows
    def on_event(self, state: SearchState, event: Event) -> None:
        """Show an event of the record."""
        # The display reads in a thread of its own, so it gets dicts that no event changes.
        self._state = replace(state, trials=dict(state.trials), nodes=dict(state.nodes))
        if not self._console.is_terminal and (line := self._describe(state, event)):
            say(line, self._console)

    @only_shows
    def stop(self) -> None:
        """Say that the search is about to end; called from a signal's handler."""
        words = "stopping after the running epochs; Ctrl-C again stops at once; --resume continues"
        say(words, self._console, "yellow")

    def eta_seconds(self) -> float:
        """Expected seconds to the end, simulated from the record, never beyond the time limit."""
        state, elapsed = self._state, time.monotonic() - self._start
        if self._forecast is None or self._forecast[0] is not state:
            self._forecast = state, self._simulate(state)
        expected = self._forecast[1]
        if self._max_seconds is None:
            return expected
        return min(expected, max(0.0, self._max_seconds - elapsed))

    def _simulate(self, state: SearchState | None) -> float:
        """Seconds to the end without a time limit; takes about 2 ms and runs after every event."""
        trials = list(state.trials.values()) if state else []
        seconds = [result.epoch_seconds for trial in trials for _, result in trial.trained_epochs]
        mean = sum(seconds) / len(seconds) if seconds else self._epoch_seconds
        start = 0.0 if seconds else START_SECONDS
        concurrent = self._num_concurrent
        return forecast_search(
            self._budget, concurrent, mean, state, start, effort=400
        ).seconds.mean

    def _describe(self, state: SearchState, event: Event) -> str:
        begin = f"[{format_seconds(time.monotonic() - self._start)}]"
        if isinstance(event, NodeChanged):
            why = f": {event.text}" if event.text else ""
            return f"{begin} node {event.node} {event.status}{why}{_describe_waiting(state)}"
        if isinstance(event, TrialPlaced):
            return f"{begin} trial {event.trial} trains on {event.node}, attempt {event.attempt}"
        if not isinstance(event, TrialStarted | EpochReported | TrialRetried | TrialEnded):
            return ""
        line = f"{begin} trial {event.trial}"
        if isinstance(event, TrialStarted):
            knobs = [f"{name} {format_value(value)}" for name, value in event.params.items()]
            return f"{line} starts ({event.origin}): {', '.join(knobs)}"
        if isinstance(event, EpochReported):
            trial, acc = state.trials[event.trial], format_percent(event.result.val_acc)
            done = f"{event.result.epoch}/{trial.config.epochs}{describe_replicate(trial)}"
            return f"{line} epoch {done}: val_acc {acc}"
        if isinstance(event, TrialRetried):
            return f"{line}: {event.fault}; it continues from its newest checkpoint"
        line += f" {event.status} ({event.reason})"
        if (best := state.best) is not None:
            acc, eta = format_percent(best.score), format_seconds(self.eta_seconds())
            line += f"; best so far {acc} (trial {best.number}), about {eta} to go"
        return line

    @only_shows
    def _render(self) -> RenderableType:
        if self._state is None:
            return Text("waiting for the first worker ...", style="dim")
        state = self._state
        rows = sorted(state.trials.values(), key=lambda t: (t.status != "running", -t.number))
        nodes = [Text(line) for line in describe_nodes(state)[:NUM_ROWS]]
        return Group(make_trial_table(state, rows[:NUM_ROWS]), *nodes, self._status_line(state))

    def _status_line(self, state: SearchState) -> Text:
        line = f"{len(state.trials)}/{self._budget.trials} trials: {describe_counts(state.counts)}"
        if state.best is not None:
            line += f"   best {format_percent(state.best.score)} (trial {state.best.number})"
            score, baseline = state.best.score, state.baseline_score
            if score is not None and baseline is not None and state.best.origin != "baseline":
                line += f", {100 * (score - baseline):+.2f} points over the baseline"
        is_training = any(trial.epochs_done for trial in state.trials.values())
        left = "the workers are starting"
        if is_training:
            left = f"about {format_seconds(self.eta_seconds())} to go"
        gone = format_seconds(time.monotonic() - self._start)
        return Text(f"{line}\n{gone} gone, {left}{_describe_waiting(state)}")


def _describe_waiting(state: SearchState) -> str:
    """Return that the search waits if every node of its cluster is gone; else nothing."""
    is_alone = bool(state.nodes) and all(n.status != "joined" for n in state.nodes.values())
    return "; no node is left: waiting for one" if is_alone else ""


class TrainingView(_View):
    """A progress bar over the steps of one training, and a line per epoch."""

    def __init__(self, console: Console, data: DataInfo) -> None:
        self._data = f" ({data.name})" if data.label else ""
        columns = _make_columns("epoch {task.fields[epoch]}")
        self._progress = _StepProgress(*columns, console=console, transient=True)
        super().__init__(console, self._progress)

    @only_shows
    def watch(self, trainer: Trainer) -> None:
        """Show this Trainer's steps."""
        self._progress.trainer = trainer
        self._progress.add_task("train", total=trainer.total_steps, epoch="")

    @only_shows
    def say(self, result: EpochResult, note: str = "") -> None:
        """Print one line for a finished epoch, with the time that is left at its pace."""
        trainer = self._progress.trainer
        left = (trainer.config.epochs - result.epoch) * result.epoch_seconds if trainer else 0.0
        train_acc, val_acc = format_percent(result.train_acc), format_percent(result.val_acc)
        say(
            f"epoch {result.epoch}: train_loss {result.train_loss:.4f}, "
            f"train_acc {train_acc}, val_acc {val_acc}, lr {result.lr:.3g}, "
            f"{result.images_per_second:.0f} images/s, {format_seconds(left)} left"
            f"{self._data}{note}",
            self._console,
        )


def _make_columns(text: str) -> tuple[ProgressColumn, ...]:
    """The columns of a progress bar over steps."""
    steps = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    return (TextColumn(text), *steps, TimeRemainingColumn(compact=True))


class _StepProgress(Progress):
    """A progress bar that reads the Trainer's step whenever it draws itself."""

    trainer: Trainer | None = None

    def get_renderables(self) -> list[RenderableType]:
        if self.trainer is not None:
            total = self.trainer.config.epochs
            epoch = min(self.trainer.epoch + 1, total)
            for task_id in self.task_ids:
                self.update(task_id, completed=self.trainer.step, epoch=f"{epoch}/{total}")
        return list(super().get_renderables())


class SweepView(_View):
    """A progress bar over all steps of an LR range test's sweeps; a line per sweep."""

    def __init__(self, console: Console, num_seeds: int, num_steps: int) -> None:
        self._num_steps = num_steps
        self._num_left = num_seeds * num_steps
        self._num_done = 0
        self._progress = Progress(*_make_columns("sweeping"), console=console, transient=True)
        self._task = self._progress.add_task("sweep", total=self._num_left)
        super().__init__(console, self._progress)

    @only_shows
    def step(self) -> None:
        """Count one training step."""
        self._num_done += 1
        self._num_left -= 1
        self._progress.advance(self._task)

    @only_shows
    def say(self, sweep: Sweep) -> None:
        """Print one line for a finished sweep; one that diverged has left steps out."""
        self._num_left -= self._num_left % self._num_steps
        self._progress.update(self._task, total=self._num_done + self._num_left)
        seconds = (time.monotonic() - self._start) / max(1, self._num_done) * self._num_left
        end = "to its end"
        if sweep.diverged_at is not None:
            end = f"until it diverged at lr {sweep.diverged_at:.3g}"
        line = f"seed {sweep.seed}: {len(sweep.losses)} losses {end}"
        say(f"{line}, {format_seconds(seconds)} left", self._console)


def run_plan(plan: SearchPlan, console: Console) -> tuple[SearchState, list[str]]:
    """Say what is settled, run it and show it live.

    Returns:
        the record as it ends, and what MLflow did not take.
    """
    from tune_cifar.search.run import run_search

    for note in (*plan.notes, plan.describe()):
        say(note, console)
    budget, num_concurrent = plan.space.budget, plan.resources.max_concurrent
    with SearchView(console, budget, num_concurrent, plan.cost.epoch_seconds) as view:
        return run_search(plan, view.on_event, view.stop)
