"""One search as one HTML file that is read offline and printed: tables, figures, commands. A view of the record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from tune_cifar.augment.preview import make_preview
from tune_cifar.data.files import find_data
from tune_cifar.data.load import CLASS_NAMES
from tune_cifar.errors import ConfigError, TuneCifarError
from tune_cifar.record.failures import group_failures
from tune_cifar.record.state import SearchState
from tune_cifar.report import tables
from tune_cifar.report.health import examine_space
from tune_cifar.report.plots import evaluation
from tune_cifar.report.plots import search as figures
from tune_cifar.report.plots.interactive import make_parallel_html
from tune_cifar.report.plots.style import make_svg
from tune_cifar.report.trials import describe_gain, load_trials
from tune_cifar.search.sampler import list_distributions
from tune_cifar.space.select import describe_distribution
from tune_cifar.train.metrics import evaluate_logits
from tune_cifar.train.numerics import restore_numerics
from tune_cifar.train.recorded import load_recorded_data, load_trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In the report, trials of so many ranks; all are in `leaderboard --csv`.
NUM_BEST = 15
# Training images whose augmentation is shown.
NUM_PREVIEWED = 5
NO_WEIGHTS = "A search keeps them with --keep-weights."


@dataclass(frozen=True)
class Picture:
    """A figure in the report: what it shows, in words that stand without it."""

    name: str
    caption: str
    svg: Markup


def write_report(state: SearchState, path: Path, data: str | None) -> str | None:
    """Write the report of a recorded search, in the place of one that is there.

    Args:
        data: a folder or a name as `find_data` takes it; the best trial's kept weights are judged on its images.

    Returns:
        Why the figures of images are missing in it, in a sentence, or None.

    Raises:
        ConfigError: nothing was searched, no trial has ended yet, or the file cannot be written.
    """
    if not state.header.distributions:
        raise ConfigError(
            f"{state.header.name}: a search must be reported on, got a {state.header.kind} without ranges."
        )
    if not any(trial.scores for trial in state.trials.values()):
        raise ConfigError(
            f"{state.header.name}: a trial must have reached a rung, got none. Wait, or --resume it."
        )
    missing, judged = None, []
    try:
        judged = list(_draw_best(state, data))
    except TuneCifarError as exc:
        missing = str(exc)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make_report(state, judged, missing), encoding="utf-8")
    except OSError as exc:
        raise ConfigError(
            f"{path}: the report must be writable there, got {exc.strerror!r}."
        ) from exc
    return missing


def make_report(
    state: SearchState, judged: Sequence[Picture] = (), missing: str | None = None
) -> str:
    """The report's HTML: `write_report` without the file.

    Args:
        judged: what the best trial makes of images.
        missing: why there are no such pictures.
    """
    environment = Environment(
        loader=PackageLoader("tune_cifar.report"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _format_percent, "number": _format_number}
    slices, importances, numerics = (
        tables.make_slices(state),
        tables.make_importances(state),
        state.header.numerics,
    )
    return environment.get_template("report.html").render(
        state=state,
        header=state.header,
        best=state.best,
        gain=describe_gain(state, state.best) if state.best is not None else "",
        counts={status: count for status, count in state.counts.items() if count},
        rungs=tables.list_rungs(state),
        ranges={
            knob: describe_distribution(found)
            for knob, found in list_distributions(state.header).items()
        },
        trials=_list_best(state),
        pictures=list(_draw(state, slices, importances)),
        judged=judged,
        missing=missing,
        parallel=Markup(make_parallel_html(slices)),
        health=examine_space(state, slices, importances),
        faults=group_failures(state),
        environment=numerics.model_dump(exclude={"versions"})
        | numerics.versions
        | state.header.environment,
    )


def _format_percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.2f} %"


def _format_number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _list_best(state: SearchState) -> list[dict[str, Any]]:
    """The best complete trials, then those that came furthest."""
    trials = load_trials([state])
    trials["is_complete"] = trials["status"] == "complete"
    order = ["is_complete", "epochs_done", "val_acc"]
    rows = trials.sort_values(order, ascending=False, kind="stable").head(NUM_BEST)
    return [
        {str(name): None if value is pd.NA else value for name, value in row.items()}
        for row in rows.to_dict("records")
    ]


def _make_title(state: SearchState, name: str) -> str:
    label = state.header.data.label
    return f"{name}, {label}" if label else name


def _draw(state: SearchState, slices: pd.DataFrame, importances: pd.DataFrame) -> Iterator[Picture]:
    title = _make_title(state, state.header.name)
    yield _make_picture(
        "Optimisation history",
        "Every complete trial's validation accuracy and the best so far, against trials, epochs and wall time.",
        figures.draw_history(tables.make_history(state), state.baseline_score, title),
    )
    rungs = tables.make_rungs(state)
    yield _make_picture(
        "Early stopping",
        "Who arrived at each rung, the cut-off as it moved, and who went on. The rank correlation is that of the "
        "survivors, the better part of the trials: a low one need not mean a bad rung.",
        figures.draw_asha(tables.make_rung_scores(state), rungs, title),
    )
    yield _make_picture(
        "Learning curves",
        "Validation accuracy by epoch, a panel for each length of training, coloured by what became of the trial.",
        figures.draw_curves(tables.make_curves(state), title),
    )
    yield _make_picture(
        "Slices",
        "Each knob's value against the accuracy at the first rung, which every trial reaches; later trials are darker.",
        figures.draw_slices(slices, title),
    )
    known = not importances["importance"].isna().any()
    if known:
        yield _make_picture(
            "Importances",
            "How far each knob's values in the best quarter of the trials differ from those in all (PED-ANOVA), with "
            "the 5th to 95th percentile over resampled trials. Wide intervals: another search may say something else.",
            figures.draw_importances(importances, title),
        )
    pair = _find_pair(slices, importances)
    if known and pair is not None:
        yield _make_picture(
            "The two strongest knobs",
            "Accuracy at the first rung between the trials; outside of them nothing is known.",
            figures.draw_pair(slices, pair, title),
        )
    configs = {"baseline": state.trials[0].full_config}
    if state.best is not None and state.best.number != 0:
        configs[f"best (trial {state.best.number})"] = state.best.full_config
    yield _make_picture(
        "Schedules",
        "Learning rate and momentum of the whole training, step by step.",
        figures.draw_schedules(tables.make_schedules(configs), title),
    )
    yield _make_picture(
        "Where the time went",
        "Epochs and minutes of training by the length of the training and by what became of the trial.",
        figures.draw_costs(tables.make_costs([state]), title),
    )


def _draw_best(state: SearchState, data: str | None) -> Iterator[Picture]:
    """What the best trial sees, and what its kept weights make of the validation images."""
    trial = state.best
    if trial is None:
        raise ConfigError(f"{state.header.name}: a trial must be complete, got none.")
    loaded = load_recorded_data(state, trial, find_data(data))
    val = loaded.val
    assert val is not None, "a search has validation images"
    trainer = load_trained(
        state, trial, loaded, restore_numerics(trial.driver.numerics, None), NO_WEIGHTS
    )
    found = evaluate_logits(
        trainer.predict(val), val.labels_N, CLASS_NAMES[loaded.info.name], "validation"
    )
    title = _make_title(state, f"{trial.run_id}: {found.num_images:,} validation images")
    pictures = val.images_NCHW.permute(0, 2, 3, 1).numpy()
    captions = {
        "confusion": ("Confusion", "What became of each class's images."),
        "per_class": ("Classes", "The share of each class's images that were answered right."),
        "reliability": ("Calibration", "Whether the network is as often right as it is sure."),
        "mistakes": (
            "Most confident mistakes",
            "Look here for wrong labels, and for what the network goes by.",
        ),
    }
    for kind, figure in evaluation.draw_evaluation(found, pictures, title).items():
        yield _make_picture(*captions[kind], figure)
    previewed = make_preview(trial.config, loaded.train.images_NCHW[:NUM_PREVIEWED]).numpy()
    yield _make_picture(
        "Augmentation",
        "Training images as they are and as this trial's network saw them.",
        evaluation.draw_preview(previewed, _make_title(state, trial.run_id)),
    )


def _find_pair(slices: pd.DataFrame, importances: pd.DataFrame) -> tuple[str, str] | None:
    """The two most important knobs that are numbers."""
    choices = set(slices[slices["value"].map(lambda value: isinstance(value, str))]["knob"])
    numeric = [str(knob) for knob in importances["knob"] if knob not in choices]
    return (numeric[0], numeric[1]) if len(numeric) > 1 else None


def _make_picture(name: str, caption: str, figure: Figure) -> Picture:
    return Picture(name, caption, Markup(make_svg(figure, name)))
