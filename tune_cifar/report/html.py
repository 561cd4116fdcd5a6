"""The report of one search: an HTML file with tables, figures and commands, readable offline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from tune_cifar.augment.preview import make_preview
from tune_cifar.errors import ConfigError, TuneCifarError
from tune_cifar.record.events import KIND_WORDS, NodeChanged
from tune_cifar.record.failures import group_failures
from tune_cifar.record.state import SearchState
from tune_cifar.record.test_log import TestEvaluation, find_test_evaluations
from tune_cifar.report import tables
from tune_cifar.report.format import format_percent, format_value
from tune_cifar.report.health import examine_space
from tune_cifar.report.plots import evaluation
from tune_cifar.report.plots import search as figures
from tune_cifar.report.plots.interactive import make_parallel_html
from tune_cifar.report.plots.style import make_svg
from tune_cifar.report.trials import describe_gain, find_accuracies, load_trials
from tune_cifar.train.recorded import evaluate_trained, find_recorded_data, load_recorded_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Rows of the table of trials. `leaderboard --csv` lists all of them.
NUM_BEST = 15
# Training images whose augmentation is shown.
NUM_PREVIEWED = 5
NO_WEIGHTS = "With `keep_weights` a search keeps those of its best trials."
CAPTIONS = {
    "confusion": ("Confusion", "What each class's images were taken for."),
    "per_class": ("Classes", "The share of each class's images that were answered correctly."),
    "reliability": (
        "Calibration",
        "Whether answers are correct as often as their confidence says.",
    ),
    "mistakes": ("Most confident mistakes", "Some may be wrong labels."),
}


@dataclass(frozen=True)
class Picture:
    """A figure in the report, with a caption that can be understood without it."""

    name: str
    caption: str
    svg: Markup


def write_report(state: SearchState, path: Path, data: str | None) -> str | None:
    """Write the report of a recorded search; a file that is there is replaced.

    Args:
        data: a folder or a name as `find_data` takes it, None for where the recorded data are
            found; the best trial's kept weights are evaluated on its validation images.

    Returns:
        Why the figures of images are missing, in a sentence, or None.

    Raises:
        ConfigError: the record is not a search, no trial has reached a rung, or the file cannot be
            written.
    """
    name = state.header.name
    if not state.header.distributions:
        kind = KIND_WORDS[state.header.kind]
        raise ConfigError(f"{name}: only a search with ranges has a report, this is {kind}.")
    if not any(trial.scores for trial in state.trials.values()):
        way_out = f"Wait, or continue it: `search --name {name} --resume`."
        raise ConfigError(f"{name}: no trial has reached a rung yet. {way_out}")
    missing, evaluated = None, []
    try:
        evaluated = list(_draw_best(state, data))
    except TuneCifarError as exc:
        missing = str(exc)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make_report(state, evaluated, missing), encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{path}: the report cannot be written: {exc.strerror}.") from exc
    return missing


def make_report(
    state: SearchState, evaluated: Sequence[Picture] = (), missing: str | None = None
) -> str:
    """Return the report's HTML.

    Args:
        evaluated: the figures of the best trial's answers.
        missing: why there are none.
    """
    environment = Environment(
        loader=PackageLoader("tune_cifar.report"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": format_percent, "number": format_value}
    slices, importances = tables.make_slices(state), tables.make_importances(state)
    numerics = state.header.numerics
    settings = numerics.model_dump(exclude={"versions", "settings"}) | (numerics.settings or {})
    return environment.get_template("report.html").render(
        state=state,
        header=state.header,
        best=state.best,
        gain=describe_gain(state, state.best) if state.best is not None else "",
        test=_find_test(state),
        counts={status: count for status, count in state.counts.items() if count},
        rungs=tables.list_rungs(state),
        knobs=tables.make_knobs(state).to_dict("records"),
        trials=_list_best(state),
        pictures=list(_draw(state, slices, importances)),
        evaluated=evaluated,
        missing=missing,
        parallel=Markup(make_parallel_html(slices)),
        health=examine_space(state, slices, importances),
        failures=group_failures(state),
        nodes=_count_trials_of_nodes(state),
        environment=settings | numerics.versions | state.header.environment,
    )


def _find_test(state: SearchState) -> TestEvaluation | None:
    """Return the first evaluation of the best trial on the test set, or None."""
    if state.best is None:
        return None
    logged = find_test_evaluations(state.storage, state.best.fingerprint, state.header.data)
    return next(iter(logged), None)


def _list_best(state: SearchState) -> list[dict[str, Any]]:
    """Return the best complete trials, then those that were trained longest."""
    trials = load_trials([state])
    trials["is_complete"] = trials["status"] == "complete"
    trials["accuracy"] = find_accuracies(trials)
    order = ["is_complete", "epochs_done", "accuracy"]
    rows = trials.sort_values(order, ascending=False, kind="stable").head(NUM_BEST)
    return [
        {str(name): None if value is pd.NA else value for name, value in row.items()}
        for row in rows.to_dict("records")
    ]


def _count_trials_of_nodes(state: SearchState) -> list[tuple[NodeChanged, int]]:
    """Return the nodes of a cluster, each with the trials whose last attempt trained on it."""
    trials = state.trials.values()
    return [(node, sum(t.node == name for t in trials)) for name, node in state.nodes.items()]


def _make_title(state: SearchState, name: str) -> str:
    label = state.header.data.label
    return f"{name}, {label}" if label else name


def _draw(state: SearchState, slices: pd.DataFrame, importances: pd.DataFrame) -> Iterator[Picture]:
    """Yield the figures of a search that need no images."""
    title = _make_title(state, state.header.name)
    yield _make_picture(
        "Optimisation history",
        "Validation accuracy of every complete trial and the best so far, against trials, epochs "
        "and wall time.",
        figures.draw_history(tables.make_history(state), state.baseline_score, title),
    )
    rungs = tables.make_rungs(state)
    yield _make_picture(
        "Early stopping",
        "The trials that reached each rung, the cut-off at the time, and which were promoted. The "
        "rank correlation is that of the complete trials, the better ones: a low one need not "
        "mean a bad rung.",
        figures.draw_asha(tables.make_rung_scores(state), rungs, title),
    )
    yield _make_picture(
        "Learning curves",
        "Validation accuracy by epoch: a panel for each stage, a colour for each status.",
        figures.draw_curves(tables.make_curves(state), title),
    )
    yield _make_picture(
        "Slices",
        "Each knob's value against the accuracy at the first rung, which every trial reaches. "
        "Later trials are darker.",
        figures.draw_slices(slices, title),
    )
    known = not importances["importance"].isna().any()
    if known:
        yield _make_picture(
            "Importances",
            "How far each knob's values in the best quarter of the trials differ from those in all "
            "(PED-ANOVA), with the 5th to 95th percentile over resampled trials. With wide "
            "intervals another search may give another order.",
            figures.draw_importances(importances, title),
        )
    pair = _find_pair(slices, importances)
    if known and pair is not None:
        yield _make_picture(
            "The two most important knobs",
            "Accuracy at the first rung, interpolated between the trials.",
            figures.draw_pair(slices, pair, title),
        )
    configs = {"baseline": state.trials[0].full_config}
    if state.best is not None and state.best.number != 0:
        configs[f"best (trial {state.best.number})"] = state.best.full_config
    yield _make_picture(
        "Schedules",
        "Learning rate and momentum of the longest training, step by step.",
        figures.draw_schedules(tables.make_schedules(configs), title),
    )
    yield _make_picture(
        "Where the time went",
        "Epochs and minutes of training by the length of the stage and by the status of the trial.",
        figures.draw_costs(tables.make_costs([state]), title),
    )


def _draw_best(state: SearchState, data: str | None) -> Iterator[Picture]:
    """Yield the figures of the best trial: its answers on validation images, its augmentation."""
    trial = state.best
    if trial is None:
        raise ConfigError(f"{state.header.name}: no trial is complete.")
    loaded = load_recorded_data(state, trial, find_recorded_data(state, data))
    found, val = evaluate_trained(state, trial, loaded, NO_WEIGHTS)
    title = _make_title(state, f"{trial.run_id}: {found.num_images:,} validation images")
    pictures = val.images_NCHW.permute(0, 2, 3, 1).numpy()
    for kind, figure in evaluation.draw_evaluation(found, pictures, title).items():
        yield _make_picture(*CAPTIONS[kind], figure)
    images = loaded.train.images_NCHW[:NUM_PREVIEWED]
    previewed = make_preview(trial.config, images, data=loaded.about).numpy()
    yield _make_picture(
        "Augmentation",
        "Training images as they are, and as this trial's network was trained on them.",
        evaluation.draw_preview(previewed, _make_title(state, trial.run_id)),
    )


def _find_pair(slices: pd.DataFrame, importances: pd.DataFrame) -> tuple[str, str] | None:
    """Return the two most important knobs whose values are no text, active in the same trials."""
    is_text = slices["value"].map(lambda value: isinstance(value, str))
    choices = set(slices[is_text]["knob"])
    numeric = [str(knob) for knob in importances["knob"] if knob not in choices]
    scored = slices[slices["value"].notna() & slices["rung_score"].notna()]
    trials = {knob: set(scored[scored["knob"] == knob]["trial"]) for knob in numeric}
    for one, other in itertools.combinations(numeric, 2):
        if len(trials[one] & trials[other]) >= tables.MIN_TRIALS_FOR_IMPORTANCES:
            return one, other
    return None


def _make_picture(name: str, caption: str, figure: Figure) -> Picture:
    return Picture(name, caption, Markup(make_svg(figure, name)))
