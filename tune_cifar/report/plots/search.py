"""Figures of a search, drawn from tables.py; accuracies in percent."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tune_cifar.report.format import format_percent
from tune_cifar.report.plots.style import (
    BLUE,
    ORANGE,
    STATUS_COLOURS,
    STATUS_MARKERS,
    add_title_and_legend,
    is_log_knob,
    label_epochs,
    label_knob,
    make_key,
    tidy,
)

# Dark is better; readable in grey and by the colour-blind.
SCORE_COLOURS = "viridis_r"
MAX_COLUMNS = 3
# Where a parallel axis has the trials in which its knob is inactive; the axis is 1 high.
BELOW = -0.12


def draw_history(history: pd.DataFrame, baseline: float | None, title: str) -> Figure:
    """Draw every complete trial's score and the best so far, against trials, epochs and wall time.

    Args:
        history: tables.make_history.
        baseline: the baseline's score, a fraction, drawn as a line.
    """
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
    table = history.assign(wall_minutes=history["wall_seconds"] / 60)
    known, scored = table[table["best"].notna()], table[table["score"].notna()]
    names = {
        "order": "ended trials",
        "epochs_spent": "epochs trained by them",
        "wall_minutes": "minutes since the start",
    }
    line: dict[str, Any] = {"color": BLUE, "linewidth": 1.8, "label": "best so far"}
    dots: dict[str, Any] = {"color": "black", "markersize": 4, "label": "a complete trial"}
    for axes, (column, label) in zip(panels, names.items(), strict=True):
        axes.step(known[column], 100 * known["best"], where="post", **line)
        axes.plot(scored[column], 100 * scored["score"], "o", **dots)
        if baseline is not None:
            text = f"baseline: {format_percent(baseline)}"
            axes.axhline(100 * baseline, color=ORANGE, linestyle="--", label=text)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        tidy(axes)
    panels[0].set_ylabel("validation accuracy (%)")
    handles, _ = panels[0].get_legend_handles_labels()
    add_title_and_legend(figure, title, handles, num_columns=3)
    return figure


def draw_curves(curves: pd.DataFrame, title: str) -> Figure:
    """Draw validation accuracy by epoch: a panel for each length, a line for each training.

    Args:
        curves: tables.make_curves.
    """
    stages = sorted(curves["stage"].unique())
    size = (3.2 + 2.8 * len(stages), 4.2)
    figure, panels = plt.subplots(
        1, len(stages), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, stage in zip(panels[0], stages, strict=True):
        for _, rows in curves[curves["stage"] == stage].groupby(["trial", "replicate"]):
            status, origin = rows.iloc[0][["status", "origin"]]
            is_baseline = origin == "baseline"
            look: dict[str, Any] = {
                "color": STATUS_COLOURS[status],
                "marker": STATUS_MARKERS[status],
                "linestyle": "--" if is_baseline else "-",
                "linewidth": 2.2 if is_baseline else 1.2,
            }
            axes.plot(rows["epoch"], 100 * rows["val_acc"], markersize=4, alpha=0.9, **look)
        axes.set_xlabel("epoch")
        axes.set_xlim(0.5, stage + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_title(f"stage of {label_epochs(stage)}", fontsize=9)
        tidy(axes)
    panels[0][0].set_ylabel("validation accuracy (%)")
    statuses = set(curves["status"])
    handles = [
        Line2D([], [], color=colour, marker=STATUS_MARKERS[status], label=status)
        for status, colour in STATUS_COLOURS.items()
        if status in statuses
    ]
    handles.append(Line2D([], [], color="black", linestyle="--", label="baseline"))
    add_title_and_legend(figure, title, handles, num_columns=len(handles))
    return figure


def draw_fit(curves: pd.DataFrame, title: str) -> Figure:
    """Draw one trial's loss and accuracy by epoch, on training and on validation images.

    A vertical line marks the start of each stage.

    Args:
        curves: tables.make_curves, the rows of one trial.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    parts = (
        ("train", "training images, augmented, dropout on", "--", ORANGE),
        ("val", "validation images", "-", BLUE),
    )
    starts = curves[curves["epoch"] == 1]
    figures = (("loss", 1, "loss"), ("acc", 100, "accuracy (%)"))
    for axes, (what, scale, label) in zip(panels, figures, strict=True):
        for part, text, style, colour in parts:
            look = {"linestyle": style, "color": colour, "marker": "o", "markersize": 4}
            stages = curves.groupby(["stage", "replicate"], sort=False)
            for place, (_, rows) in enumerate(stages):
                values = scale * rows[f"{part}_{what}"]
                axes.plot(rows["epochs_trained"], values, label="" if place else text, **look)
        for start, stage in zip(starts["epochs_trained"], starts["stage"], strict=True):
            axes.axvline(start - 0.5, color="0.6", linewidth=0.8)
            above = axes.get_xaxis_transform()  # x in data, y from 0 to 1
            axes.text(start - 0.4, 1.0, str(stage), transform=above, fontsize=8, va="bottom")
        axes.set_xlim(0.5, len(curves) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epochs trained; above: length of the stage")
        axes.set_ylabel(label)
        tidy(axes)
    handles, _ = panels[0].get_legend_handles_labels()
    add_title_and_legend(figure, title, handles, num_columns=2)
    return figure


def draw_asha(rung_scores: pd.DataFrame, rungs: pd.DataFrame, title: str) -> Figure:
    """Draw the rungs side by side: the trials in the order of arrival, the cut-off, the promoted.

    Args:
        rung_scores: tables.make_rung_scores.
        rungs: tables.make_rungs.
    """
    figure, axes = plt.subplots(figsize=(2.6 + 2.6 * len(rungs), 5.2), layout="constrained")
    places = {rung: place for place, rung in enumerate(rungs["rung"])}
    dots = rung_scores.assign(x=0.0, percent=100 * rung_scores["score"])
    for rung, rows in rung_scores.groupby("rung"):
        spread = np.linspace(-0.3, 0.3, len(rows)) if len(rows) > 1 else np.zeros(1)
        dots.loc[rows.index, "x"] = places[rung] + spread
    for _, rows in dots.groupby("trial"):
        axes.plot(rows["x"], rows["percent"], color="0.75", linewidth=0.8, zorder=1)
    look: dict[str, Any] = {"color": BLUE, "markersize": 6, "zorder": 3}
    for rung, rows in dots.groupby("rung"):
        is_last = places[rung] == len(places) - 1
        if not is_last:
            cutoff = 100 * rows["cutoff"]
            axes.step(rows["x"], cutoff, where="mid", color=ORANGE, linewidth=1.6, zorder=2)
        is_full = rows["is_promoted"] | is_last
        full, empty = rows[is_full], rows[~is_full]
        axes.plot(full["x"], full["percent"], "o", **look)
        axes.plot(empty["x"], empty["percent"], "o", fillstyle="none", **look)
    texts = [_describe_rung(row) for row in rungs.itertuples()]
    axes.set_xticks(range(len(rungs)), texts, fontsize=8.5)
    axes.set_xlim(-0.5, len(rungs) - 0.5)
    axes.set_ylabel("validation accuracy at the rung (%)")
    axes.set_xlabel("rung; within it in the order of arrival")
    handles = [
        make_key("o", BLUE, "promoted, or at the last rung"),
        make_key("o", BLUE, "below the cut-off", fillstyle="none"),
        Line2D([], [], color=ORANGE, label="cut-off at the time"),
    ]
    add_title_and_legend(figure, title, handles, num_columns=3)
    tidy(axes)
    return figure


def _describe_rung(row: Any) -> str:
    text = f"{label_epochs(row.rung)}\n{row.num_arrived} arrived"
    if row.num_promoted:
        rank = "unknown" if math.isnan(row.rank_correlation) else f"{row.rank_correlation:+.2f}"
        text += f", {row.num_promoted} promoted\nrank correlation with the final"
        text += f"\nscore: {rank} ({row.num_pairs} trials)"
    return text


def draw_slices(slices: pd.DataFrame, title: str) -> Figure:
    """Draw a panel for each searched knob: its value against the accuracy at the first rung.

    Later trials are darker.

    Args:
        slices: tables.make_slices.
    """
    knobs = list(slices["knob"].unique())
    num_columns = min(MAX_COLUMNS, len(knobs))
    num_rows = math.ceil(len(knobs) / num_columns)
    size = (3.5 * num_columns + 0.8, 2.9 * num_rows + 0.6)
    figure, panels = plt.subplots(
        num_rows, num_columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    shades = Normalize(slices["trial"].min(), max(slices["trial"].max(), 1))
    dots: dict[str, Any] = {"cmap": SCORE_COLOURS, "norm": shades, "s": 26}
    star: dict[str, Any] = {"color": ORANGE, "markeredgecolor": "black", "markersize": 13}
    for axes, knob in zip(panels.flat, knobs, strict=False):
        rows = slices[(slices["knob"] == knob) & slices["rung_score"].notna()].dropna(
            subset="value"
        )
        axes.scatter(rows["value"], 100 * rows["rung_score"], c=rows["trial"], **dots)
        base = rows[rows["origin"] == "baseline"]
        axes.plot(base["value"], 100 * base["rung_score"], "*", **star)
        is_text = rows["value"].map(lambda value: isinstance(value, str)).any()
        if not is_text and is_log_knob(knob, rows["value"]):
            axes.set_xscale("log")
        if is_text:
            axes.margins(x=0.25)  # room for the names of choices at the ends
        axes.set_xlabel(label_knob(knob))
        tidy(axes)
    for axes in panels.flat[len(knobs) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy at the first rung (%)", fontsize=8.5)
    figure.colorbar(ScalarMappable(shades, SCORE_COLOURS), ax=panels, label="trial", shrink=0.8)
    figure.suptitle(f"{title}; the star is the baseline", fontsize=10)
    return figure


def draw_pair(slices: pd.DataFrame, pair: tuple[str, str], title: str) -> Figure:
    """Draw two knobs against each other: trials as dots, the accuracy at the first rung as colour.

    With at least ten trials, filled contours interpolate linearly between them; nothing is
    extrapolated.

    Args:
        slices: tables.make_slices.
        pair: two searched numeric knobs.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    wide = slices[slices["knob"].isin(pair)].pivot(index="trial", columns="knob", values="value")
    rung_scores = slices.drop_duplicates("trial").set_index("trial")["rung_score"]
    wide = wide.join(rung_scores).dropna().astype("float64")
    is_log = [is_log_knob(knob, wide[knob]) for knob in pair]
    x, y = (
        np.log10(wide[knob]) if log else wide[knob] for knob, log in zip(pair, is_log, strict=True)
    )
    percent = 100 * wide["rung_score"]
    shades = _shade(percent)
    look: dict[str, Any] = {"cmap": SCORE_COLOURS, "norm": shades}
    if len(wide) >= 10 and x.nunique() > 2 and y.nunique() > 2:
        levels = np.linspace(float(shades.vmin or 0), float(shades.vmax or 1), 11)
        axes.tricontourf(x, y, percent, levels=levels, extend="min", alpha=0.55, **look)
    dots = axes.scatter(x, y, c=percent, edgecolors="black", s=40, **look)
    logs = ["log10 of " if log else "" for log in is_log]
    axes.set_xlabel(logs[0] + label_knob(pair[0]))
    axes.set_ylabel(logs[1] + label_knob(pair[1]))
    figure.colorbar(dots, label="accuracy at the first rung (%)", extend="min")
    axes.set_title(title, fontsize=10)
    tidy(axes)
    return figure


def draw_parallel(slices: pd.DataFrame, title: str) -> Figure:
    """Draw a line for each trial through all its knobs to its accuracy at the first rung.

    Each axis runs from the lowest to the highest value; below it pass the trials in which the knob
    is inactive. Better trials are darker.

    Args:
        slices: tables.make_slices.
    """
    knobs = list(slices["knob"].unique())
    wide = slices.pivot(index="trial", columns="knob", values="value")[knobs]
    wide["accuracy"] = 100 * slices.drop_duplicates("trial").set_index("trial")["rung_score"]
    wide = wide[wide["accuracy"].notna()]
    accuracy = wide["accuracy"].to_numpy()
    figure, axes = plt.subplots(figsize=(1.7 * len(wide.columns) + 1, 4.6), layout="constrained")
    heights = np.empty(wide.shape)
    for place, column in enumerate(wide.columns):
        values = accuracy if column == "accuracy" else _place_values(wide[column], column)
        is_active = wide[column].notna().to_numpy()
        heights[:, place] = BELOW
        if is_active.any():
            low, high = values[is_active].min(), values[is_active].max()
            above = (values[is_active] - low) / (high - low) if high > low else 0.5
            heights[is_active, place] = above
        for text, height in _mark_axis(wide[column]):
            look: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "va": "center"}
            axes.annotate(text, (place, height), (4, 0), **look)
    shades, colours = _shade(wide["accuracy"]), plt.get_cmap(SCORE_COLOURS)
    for row in np.argsort(accuracy):
        axes.plot(heights[row], color=colours(shades(accuracy[row])), linewidth=1.3, alpha=0.85)
    for place in range(len(wide.columns)):
        axes.axvline(place, color="0.4", linewidth=0.8)
    labels = [*(label_knob(knob) for knob in knobs), "accuracy at the\nfirst rung (%)"]
    axes.set_xticks(range(len(labels)), labels, fontsize=8.5)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10)
    return figure


def draw_importances(importances: pd.DataFrame, title: str) -> Figure:
    """Draw a bar for each knob with its bootstrap interval, from the 5th to the 95th percentile.

    Args:
        importances: tables.make_importances.
    """
    figure, axes = plt.subplots(figsize=(6.6, 1.4 + 0.42 * len(importances)), layout="constrained")
    rows = importances[::-1]
    ends = np.clip([rows["importance"] - rows["low"], rows["high"] - rows["importance"]], 0, None)
    labels = [label_knob(knob) for knob in rows["knob"]]
    axes.barh(labels, rows["importance"], color=BLUE, xerr=ends, capsize=4)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of what distinguishes the best quarter of the trials")
    axes.set_title(title, fontsize=10)
    tidy(axes)
    return figure


def draw_schedules(schedules: pd.DataFrame, title: str) -> Figure:
    """Draw learning rate and momentum of named configurations by epoch.

    Args:
        schedules: tables.make_schedules.
    """
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.4, 5.4), sharex=True, layout="constrained"
    )
    styles, colours = ["-", "--", "-.", ":"], list(STATUS_COLOURS.values())
    for i, (name, rows) in enumerate(schedules.groupby("name", sort=False)):
        look = {"linestyle": styles[i % len(styles)], "color": colours[i % len(colours)]}
        above.plot(rows["epoch"], rows["lr"], label=str(name), **look)
        below.plot(rows["epoch"], rows["momentum"], **look)
    above.set_yscale("log")
    above.set_ylabel("learning rate")
    below.set_ylabel("momentum (Adam: beta1)")
    below.set_xlabel("epoch")
    for axes in (above, below):
        tidy(axes)
    handles, _ = above.get_legend_handles_labels()
    add_title_and_legend(figure, title, handles, num_columns=3)
    return figure


def draw_costs(costs: pd.DataFrame, title: str) -> Figure:
    """Draw where a search's epochs and seconds went: a bar for each stage, stacked by status.

    Args:
        costs: tables.make_costs, of one search.
    """
    stages = sorted(costs["stage"].unique())
    statuses = [status for status in STATUS_COLOURS if status in set(costs["status"])]
    size = (9, 1.8 + 0.5 * len(stages))
    figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    figures = (("epochs", 1, "epochs"), ("seconds", 60, "minutes"))
    for axes, (column, scale, label) in zip(panels, figures, strict=True):
        table = costs.pivot(index="stage", columns="status", values=column).fillna(0) / scale
        start = np.zeros(len(stages))
        for status in statuses:
            look = {"color": STATUS_COLOURS[status], "edgecolor": "white", "height": 0.7}
            axes.barh(range(len(stages)), table[status], left=start, **look)
            start += table[status].to_numpy()
        axes.set_xlabel(f"{label} of training, {start.sum():.3g} in all")
        tidy(axes)
    panels[0].set_yticks(range(len(stages)), [label_epochs(stage) for stage in stages])
    panels[0].set_ylabel("length of the stage")
    handles = [
        Rectangle((0, 0), 1, 1, color=STATUS_COLOURS[status], label=f"{status} trials")
        for status in statuses
    ]
    add_title_and_legend(figure, title, handles, num_columns=len(statuses))
    return figure


def _place_values(values: pd.Series[Any], knob: str) -> NDArray[np.float64]:
    """Return numbers on the knob's own scale; choices by their order. Missing ones mean nothing."""
    if values.map(lambda value: isinstance(value, str)).any():
        return pd.factorize(values, sort=True)[0].astype(np.float64)
    numbers = values.to_numpy(np.float64)
    return np.log(numbers) if is_log_knob(knob, numbers) else numbers


def _mark_axis(values: pd.Series[Any]) -> list[tuple[str, float]]:
    """Return a parallel axis's texts with their heights: the ends of numbers, every choice."""
    active = values.dropna()
    below = [("inactive", BELOW)] if len(active) < len(values) else []
    if active.empty:
        return below
    if not isinstance(active.iloc[0], str):
        return [*below, (f"{active.min():.3g}", 0.0), (f"{active.max():.3g}", 1.0)]
    names = sorted(active.unique())
    if len(names) == 1:
        return [*below, (names[0], 0.5)]
    return [*below, *((name, place / (len(names) - 1)) for place, name in enumerate(names))]


def _shade(scores: pd.Series[float]) -> Normalize:
    """Return a colour scale that starts at the worst tenth, so that the others stay distinct."""
    low, high = float(scores.quantile(0.1)), float(scores.max())
    return Normalize(low if low < high else high - 1, high)
