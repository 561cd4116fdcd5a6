"""Searches from Python, in a script or a notebook: `run_search("s7", max_time="8m")`.

The names and defaults are the command line's. In Jupyter a table is updated in place; elsewhere the
command's display appears on stderr.
"""

from __future__ import annotations

import html
import inspect
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tune_cifar.cli import live
from tune_cifar.cli.live import SearchView, only_shows
from tune_cifar.cli.options import count_kept_weights, keep_ray_access
from tune_cifar.cli.plan import find_tier
from tune_cifar.cli.terminal import say, stderr
from tune_cifar.errors import ConfigError, RecordError, hide_credentials
from tune_cifar.record.events import Event
from tune_cifar.record.state import SearchState, TrialState, describe_counts
from tune_cifar.record.store import find_storage
from tune_cifar.report.format import format_percent, format_seconds, format_value
from tune_cifar.report.trials import describe_gain
from tune_cifar.search.plan import SearchPlan, SearchRequest, count_trials

if TYPE_CHECKING:
    import pandas as pd

    from tune_cifar.space.select import SearchSpace
    from tune_cifar.train.metrics import Evaluation
    from tune_cifar.train.recorded import Listener
    from tune_cifar.verify.confirm import Confirmed
    from tune_cifar.verify.reproduce import Reproduction

NUM_SHOWN = 5
"""Trials in the table: the best ones, after those that run."""
Show = Callable[[str, list[list[str]]], None]
"""Called with a headline and a table's rows, the first its header."""


@dataclass(frozen=True)
class Run:
    """A recorded search or confirmation.

    Attributes:
        state: as it is recorded.
        faults: a sentence for each upload to MLflow that failed.
        data: as given to `run_search`.
    """

    state: SearchState
    faults: tuple[str, ...] = ()
    data: str | None = None
    tracking_uri: str | None = None

    @property
    def name(self) -> str:
        return self.state.header.name

    @property
    def best(self) -> TrialState | None:
        """The complete trial of the highest score; None without one."""
        return self.state.best

    @cached_property
    def trials(self) -> pd.DataFrame:
        """A row for each trial with all hyperparameters; see docs/metrics.md."""
        from tune_cifar.report.trials import load_trials

        return load_trials([self.state])

    @property
    def candidates(self) -> list[Confirmed]:
        """Of a confirmation: each recipe under its seeds, the baseline first.

        Of a final one by test accuracy.

        Raises:
            ConfigError: this is no confirmation.
        """
        from tune_cifar.record.test_log import load_test_logs
        from tune_cifar.verify.confirm import summarise, summarise_tests

        settled = self.state.header.confirmation
        if settled is None:
            raise ConfigError(f"{self.name} is no confirmation. Use `confirm()`.")
        if settled.final:
            return summarise_tests(self.state, load_test_logs(self.state.storage))
        return summarise(self.state)

    def confirm(
        self,
        seeds: int = 5,
        top: int = 5,
        epochs: int | None = None,
        final: bool = False,
        name: str | None = None,
        max_concurrent: int | None = None,
        accept_changes: bool = False,
    ) -> Run:
        """Train the best trials again under new seeds, beside the baseline.

        One that is recorded already is continued if it was interrupted, else returned.

        Args:
            seeds: trainings of each recipe.
            top: how many of the best trials.
            epochs: of each training; None is the recipe's.
            final: train what was confirmed on all images and evaluate it on the test set, once.
            max_concurrent: trainings at once; None is as many as the machine has room for.
            accept_changes: continue although code, data or numerics have changed.

        Raises:
            ConfigError, RecordError: as `tune_cifar confirm`.
        """
        command = _describe_call("run.confirm", _list_given(self.confirm, locals()))
        from tune_cifar.cli.confirm import choose_name, count_weights, evaluate_tests, find_same
        from tune_cifar.cli.options import find_recorded_data
        from tune_cifar.data.files import describe_data
        from tune_cifar.search.run import prepare_resume, prepare_search
        from tune_cifar.verify.confirm import make_confirmation, settle_final

        storage, numerics = self.state.storage, self.state.header.numerics
        source = find_recorded_data(self.state, self.data)
        if final:
            space, settled = settle_final(self.state, seeds, describe_data(source))
        else:
            space, settled = make_confirmation(self.state, top, seeds, {}, epochs)
        request = SearchRequest(
            source=source,
            storage=storage,
            command=command,
            name=name,
            device=numerics.device,
            precision=numerics.precision,
            deterministic=numerics.deterministic,
            execution=numerics.execution,
            cpus_per_trial=numerics.threads,
            max_concurrent=max_concurrent,
            tracking_uri=self.tracking_uri,
            keep_weights=count_weights(settled),
        )
        same = find_same(storage, settled, name)
        if same is None:
            way_out = "Its trials, seeds or epochs are others: give `name` for another."
            name = name or choose_name(storage, self.name, final, way_out)
            plan = prepare_search(space, replace(request, name=name), settled)
            done = _run(plan, self.data)
        elif same.is_finished:
            done = Run(same, (), self.data, self.tracking_uri)
        else:
            request = replace(request, name=same.header.name)
            done = _run(prepare_resume(request, None, None, accept_changes), self.data)
        if final and done.state.is_finished:
            evaluate_tests(done.state, self.data, command, self.tracking_uri, stderr())
        return done

    def reproduce(self, trial: int | None = None) -> Reproduction:
        """Train a trial again, the best one by default, and compare it epoch by epoch."""
        from tune_cifar.cli.options import find_recorded_data
        from tune_cifar.train.numerics import restore_numerics
        from tune_cifar.train.recorded import load_recorded_data
        from tune_cifar.verify.reproduce import reproduce_run

        chosen = self._choose(trial)
        source = find_recorded_data(self.state, self.data)
        loaded = load_recorded_data(self.state, chosen, source)
        numerics = restore_numerics(chosen.numerics)
        show = _make_notebook_show() if _is_in_notebook() else _show_line

        def on_epoch(recorded: Any, fresh: Any, difference: str | None) -> None:
            words = "differs" if difference else "agrees"
            show(f"{chosen.run_id}, epoch {fresh.epoch} of {len(chosen.epochs)}: {words}", [])

        outcome, _ = reproduce_run(self.state, chosen, loaded, numerics, on_epoch)
        return outcome

    def evaluate(self, trial: int | None = None) -> Evaluation:
        """Evaluate a trial's kept weights on its validation images: classes, calibration, mistakes.

        Figures and the evaluation are kept in the run store and logged to MLflow.
        """
        from tune_cifar.cli.evaluate import keep_evaluation, say_kept
        from tune_cifar.cli.options import find_recorded_data
        from tune_cifar.train.recorded import evaluate_trained, load_recorded_data

        chosen = self._choose(trial)
        source = find_recorded_data(self.state, self.data)
        loaded = load_recorded_data(self.state, chosen, source)
        found, val = evaluate_trained(self.state, chosen, loaded, "Keep more: `keep_weights`.")
        say_kept(keep_evaluation(self.state, chosen, found, val, None, self.tracking_uri), stderr())
        return found

    def report(self, out: Path | None = None) -> Path:
        """Write the search as one HTML file; return its path."""
        from tune_cifar.cli.report import find_report
        from tune_cifar.report.html import write_report

        path = out or find_report(self.state.storage, self.name)
        if missing := write_report(self.state, path, self.data):
            print(f"Without the figures of images. {missing}", file=sys.stderr)
        return path

    def _choose(self, trial: int | None) -> TrialState:
        if trial is None:
            if self.state.best is None:
                raise RecordError(f"{self.name} has no complete trial. Name one with `trial`.")
            return self.state.best
        if trial not in self.state.trials:
            got = f"got {trial} (trials: {len(self.state.trials)})"
            raise RecordError(f"{self.name}: `trial` must be the number of a trial, {got}.")
        return self.state.trials[trial]

    def __repr__(self) -> str:
        return f"<Run {self.name}: {_describe(self.state)}>"

    def _repr_html_(self) -> str:
        return _make_html(f"{self.name}: {_describe(self.state)}", _list_rows(self.state))


def run_search(
    space: str | Path | SearchPlan,
    listener: Listener | None = None,
    on_interrupt: Callable[[], None] | None = None,
    *,
    tier: str | None = None,
    trials: int | None = None,
    max_time: str | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    data: str | None = None,
    device: str = "auto",
    gpus_per_trial: float | None = None,
    max_concurrent: int | None = None,
    cpus_per_trial: int = 1,
    precision: str = "auto",
    execution: str = "auto",
    deterministic: bool = False,
    seed: int | None = None,
    target: float | None = None,
    patience: int | None = None,
    warm_start: tuple[str, ...] = (),
    warm_trials: int = 5,
    learn: bool = False,
    keep_weights: int = 3,
    tracking_uri: str | None = None,
    storage: str | Path | None = None,
    address: str | None = None,
    allow_mixed: bool = False,
    mirror: str | None = None,
) -> Any:
    """Search a space and return the `Run`; the parameters are the options of `tune_cifar search`.

    Ctrl-C, or the interrupt of a notebook's kernel, ends it in order: the run has what is done.

    Args:
        space: a name or a path. A SearchPlan (of `prepare_search`) is run as it is, and takes
            `listener` and `on_interrupt` alone; then the recorded state and the faults of the
            upload are returned.
        listener, on_interrupt: of a SearchPlan; see `tune_cifar.search.run.run_search`.
        max_time: such as "8m".
        settings: hyperparameters to fix, by name.

    Raises:
        ConfigError, SpaceError, DataError, RecordError: as the command does.
    """
    values = dict(locals())
    given = _list_given(run_search, values)
    _refuse_mixed(given)
    keep_ray_access(space.request.address if isinstance(space, SearchPlan) else address)
    from tune_cifar.search import run

    if isinstance(space, SearchPlan):
        return run.run_search(_keep_weights(space), listener, on_interrupt)
    from tune_cifar.data.files import find_data
    from tune_cifar.space.rules import parse_duration

    # The parameters that are named as its fields, and what is made of some.
    asked = {each.name: values[each.name] for each in fields(SearchRequest) if each.name in values}
    asked |= {"source": find_data(data), "storage": find_storage(storage)}
    asked |= {"command": _describe_call("run_search", given), "warm_start": tuple(warm_start)}
    request = SearchRequest(**asked)
    chosen = _choose_space(request, space, tier, settings)
    num_trials = None if trials is None else count_trials(str(trials))
    seconds = None if max_time is None else parse_duration(max_time)
    limited = chosen.limit(num_trials, seconds, target, patience)
    return _run(run.prepare_search(limited, request), data)


def _list_given(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call that are not their defaults."""
    defaults = {name: each.default for name, each in inspect.signature(function).parameters.items()}
    return {name: values[name] for name in defaults if values[name] != defaults[name]}


def _describe_call(name: str, given: Mapping[str, Any]) -> str:
    """Return a call as the record keeps it: without the secret of an address."""
    words = []
    for each, value in given.items():
        text = repr(str(value) if isinstance(value, Path) else value)
        words.append(f"{each}={hide_credentials(text)}")
    return f"{name}({', '.join(words)})"


def _refuse_mixed(given: Mapping[str, Any]) -> None:
    """Refuse options beside a plan, and listeners without one."""
    is_plan = isinstance(given["space"], SearchPlan)
    for name in given:
        is_listener = name in ("listener", "on_interrupt")
        if is_plan and not is_listener and name != "space":
            raise ConfigError(f"`{name}` must be left out beside a SearchPlan, which settles it.")
        if is_listener and not is_plan:
            way_out = "Make one with `prepare_search`."
            raise ConfigError(f"`{name}` needs a SearchPlan, got {given['space']!r}. {way_out}")


def _keep_weights(plan: SearchPlan) -> SearchPlan:
    """Return a plan that keeps no fewer weights than its search has, unless it says how many."""
    if plan.past is None or plan.request.keep_weights != SearchRequest.keep_weights:
        return plan
    number = max(plan.request.keep_weights, count_kept_weights(plan.past))
    return replace(plan, request=replace(plan.request, keep_weights=number))


def _choose_space(
    request: SearchRequest,
    space: str | Path,
    tier: str | None,
    settings: Mapping[str, Any] | None,
) -> SearchSpace:
    """Load the space to search, in the tier that fits the machine unless one is named."""
    from tune_cifar.data.files import describe_data
    from tune_cifar.space.select import load_space

    about = describe_data(request.source)
    return load_space(space, tier or find_tier(request), dict(settings or {}), about)


def _run(plan: SearchPlan, data: str | None) -> Run:
    """Run a plan and show it: in Jupyter a table, elsewhere what the command shows, on stderr."""
    from tune_cifar.search.run import run_search as run_plan

    if _is_in_notebook():
        print(*plan.notes, plan.describe(), sep="\n")
        view = _NotebookView(plan, _make_notebook_show())
        state, faults = run_plan(plan, view.on_event, view.stop)
        view.end(state)
    else:
        state, faults = live.run_plan(plan, stderr())
    return Run(state, tuple(faults), data, plan.request.tracking_uri)


class _NotebookView(SearchView):
    """A listener that shows a headline with the time left, and the trials."""

    def __init__(self, plan: SearchPlan, show: Show) -> None:
        nowhere, cost = Console(file=io.StringIO()), plan.cost.epoch_seconds
        super().__init__(nowhere, plan.space.budget, plan.resources.max_concurrent, cost)
        self._show = show

    @only_shows
    def on_event(self, state: SearchState, event: Event) -> None:
        self._state = replace(state, trials=dict(state.trials), nodes=dict(state.nodes))
        self._update(f"about {format_seconds(self.eta_seconds())} to go")

    @only_shows
    def stop(self) -> None:
        """Show that the search is about to end; called from a signal's handler."""
        self._update("stopping after the running epochs; interrupt again to stop at once")

    @only_shows
    def end(self, state: SearchState) -> None:
        """Show the last state."""
        self._state = state
        self._update(state.finished.reason if state.finished else "it goes on")

    def _update(self, what: str) -> None:
        if (state := self._state) is not None:
            headline = f"{state.header.name}: {_describe(state)}; {what}"
            self._show(headline, _list_rows(state))


def _describe(state: SearchState) -> str:
    """Return the counts, the best score and its gain in a line."""
    best = state.best
    if best is None:
        return describe_counts(state.counts) or "no trial yet"
    gain = "" if state.header.confirmation else f". {describe_gain(state, best)}"
    score = f"best {format_percent(best.score)} (trial {best.number})"
    return f"{describe_counts(state.counts)}; {score}{gain}".rstrip(".")


def _list_rows(state: SearchState) -> list[list[str]]:
    """Return a table of the running trials and the best ones, its header first."""
    knobs = list(state.header.distributions or ())
    running = [trial for trial in state.trials.values() if trial.status == "running"]
    nodes = ["node"] if state.nodes else []
    rows = [["trial", "status", *nodes, "epochs", "val_acc", *knobs]]
    for trial in [*running, *state.ranked[:NUM_SHOWN]]:
        values = [format_value(trial.find_value(knob)) for knob in knobs]
        acc = format_percent(trial.accuracy)
        node = [trial.node or ""] if nodes else []
        rows.append([str(trial.number), trial.status, *node, str(trial.epochs_done), acc, *values])
    return rows


def _is_in_notebook() -> bool:
    """Return whether this runs in a cell, whose output can be updated."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _make_notebook_show() -> Show:
    from IPython import display

    shown: Any = display  # IPython has no types
    handle = shown.display(shown.HTML(""), display_id=True)

    def show(headline: str, rows: list[list[str]]) -> None:
        handle.update(shown.HTML(_make_html(headline, rows)))

    return show


def _show_line(headline: str, rows: list[list[str]]) -> None:
    say(headline, stderr())


def _make_html(headline: str, rows: list[list[str]]) -> str:
    cells = [[html.escape(cell) for cell in row] for row in rows]
    lines = [f"<p>{html.escape(headline)}</p>"]
    if cells:
        header, *body = cells
        lines.append("<table><tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>")
        lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
        lines.append("</table>")
    return "".join(lines)
