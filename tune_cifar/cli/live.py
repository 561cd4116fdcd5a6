"""What a search and a training look like while they run, and the words at their end. Views of the record: nothing is
decided here. Plain lines where there is no terminal."""

from __future__ import annotations

import time
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from tune_cifar.cli.summary import make_trial_table
from tune_cifar.record.events import EpochReported, Event, TrialEnded, TrialRetried, TrialStarted
from tune_cifar.record.state import SearchState
from tune_cifar.report.format import format_percent, format_seconds, format_value
from tune_cifar.schema import DataInfo, EpochResult
from tune_cifar.search.forecast import START_SECONDS, forecast_search
from tune_cifar.space.layout import Budget

if TYPE_CHECKING:
    from tune_cifar.train.lr_range import Sweep
    from tune_cifar.train.trainer import Trainer

# Rows of the live table: enough to see what happens, few enough for a small window.
NUM_ROWS = 14


class SearchView:
    """Shows a running search; a listener of its record and a context manager.

    Args:
        budget: what the search is to do; its time limit begins now.
        num_concurrent: trials at once.
        epoch_seconds: estimate of one epoch of the baseline, until real ones are known.
    """

    def __init__(
        self, console: Console, budget: Budget, num_concurrent: int, epoch_seconds: float
    ) -> None:
        self._console = console
        self._budget = budget.model_copy(update={"max_time_seconds": None})
        self._max_seconds = budget.max_time_seconds
        self._num_concurrent = num_concurrent
        self._epoch_seconds = epoch_seconds
        self._start = time.monotonic()
        self._state: SearchState | None = None
        self._forecast: tuple[SearchState | None, float] | None = None
        self._live = Live(
            console=console, refresh_per_second=2, get_renderable=self._render, transient=True
        )

    def __enter__(self) -> SearchView:
        self._start = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def on_event(self, state: SearchState, event: Event) -> None:
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
        return (
            expected
            if self._max_seconds is None
            else min(expected, max(0.0, self._max_seconds - elapsed))
        )

    def _simulate(self, state: SearchState | None) -> float:
        """Seconds to the end without a time limit. About 2 ms, since it is asked for after every event."""
        trials = list(state.trials.values()) if state else []
        seconds = [result.epoch_seconds for trial in trials for _, result in trial.trained_epochs]
        price = sum(seconds) / len(seconds) if seconds else self._epoch_seconds
        start = 0.0 if seconds else START_SECONDS
        return forecast_search(
            self._budget, self._num_concurrent, price, state, start, effort=400
        ).seconds.mean

    def _describe(self, state: SearchState, event: Event) -> str:
        clock = f"[{format_seconds(time.monotonic() - self._start)}]"
        if isinstance(event, TrialStarted):
            knobs = ", ".join(
                f"{name} {format_value(value)}" for name, value in event.params.items()
            )
            return f"{clock} trial {event.trial} starts ({event.origin}): {knobs}"
        if isinstance(event, EpochReported):
            trial = state.trials[event.trial]
            acc = format_percent(event.result.val_acc)
            return f"{clock} trial {event.trial} epoch {event.result.epoch}/{trial.config.epochs}: val_acc {acc}"
        if isinstance(event, TrialRetried):
            return (
                f"{clock} trial {event.trial}: {event.fault}; it goes on from its newest checkpoint"
            )
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
        rows = sorted(state.trials.values(), key=lambda t: (t.status != "running", -t.number))[
            :NUM_ROWS
        ]
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
        left = (
            f"about {format_seconds(self.eta_seconds())} to go"
            if is_training
            else "the workers are starting"
        )
        return Text(f"{line}\n{format_seconds(time.monotonic() - self._start)} gone, {left}")


class TrainingView:
    """A progress bar over the steps of one training, fed by the Trainer's own counter; a line per epoch."""

    def __init__(self, console: Console, data: DataInfo) -> None:
        self._console = console
        self._data = f" ({data.name})" if data.label else ""
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
        )
        self._progress = _StepProgress(
            *columns, TimeRemainingColumn(compact=True), console=console, transient=True
        )

    def __enter__(self) -> TrainingView:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
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
        self._progress = Progress(
            *columns, TimeRemainingColumn(compact=True), console=console, transient=True
        )
        self._task = self._progress.add_task("sweep", total=self._num_left)

    def __enter__(self) -> SweepView:
        self._start = time.monotonic()
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
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
        end = (
            "to its end"
            if sweep.diverged_at is None
            else f"until it diverged at lr {sweep.diverged_at:.3g}"
        )
        self._console.print(
            f"seed {sweep.seed}: {len(sweep.losses)} losses {end}, {format_seconds(seconds)} left",
            markup=False,
            highlight=False,
            soft_wrap=not self._console.is_terminal,
        )
