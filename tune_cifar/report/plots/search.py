"""The figures of a search: tables of tables.py in, a matplotlib Figure out. Accuracies are in percent."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tune_cifar.report.plots.style import (
    BLUE,
    ORANGE,
    STATUS_COLOURS,
    STATUS_MARKERS,
    is_log_knob,
    label_knob,
    tidy,
)

# Dark is good; readable in grey and by the colour-blind.
SCORE_COLOURS = "viridis_r"
MAX_COLUMNS = 3


def draw_history(history: pd.DataFrame, baseline: float | None, title: str) -> Figure:
    """Every ended trial's score and the best so far, against trials, epochs and wall time.

    Args:
        history: tables.make_history.
        baseline: the baseline's score, a fraction, drawn as a line.
    """
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
    minutes = history.assign(wall_minutes=history["wall_seconds"] / 60)
    names = {
        "order": "trials ended",
        "epochs_spent": "epochs trained by them",
        "wall_minutes": "minutes since the start",
    }
    for axes, (column, label) in zip(panels, names.items(), strict=True):
        known = minutes[minutes["best"].notna()]
        axes.step(
            known[column],
            100 * known["best"],
            where="post",
            color=BLUE,
            linewidth=1.8,
            label="best so far",
        )
        scored = minutes[minutes["score"].notna()]
        axes.plot(
            scored[column],
            100 * scored["score"],
            "o",
            color="black",
            markersize=4,
            label="a complete trial",
        )
        if baseline is not None:
            axes.axhline(
                100 * baseline,
                color=ORANGE,
                linestyle="--",
                label=f"baseline: {100 * baseline:.2f} %",
            )
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        tidy(axes)
    panels[0].set_ylabel("validation accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_curves(curves: pd.DataFrame, title: str) -> Figure:
    """Validation accuracy by epoch, a panel for each length of training, a line for each trial in its status's colour.

    Args:
        curves: tables.make_curves.
    """
    cycles = sorted(curves["cycle"].unique())
    figure, panels = plt.subplots(
        1,
        len(cycles),
        figsize=(3.2 + 2.8 * len(cycles), 4.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, cycle in zip(panels[0], cycles, strict=True):
        for _, rows in curves[curves["cycle"] == cycle].groupby("trial"):
            first = rows.iloc[0]
            is_baseline = first["origin"] == "baseline"
            axes.plot(
                rows["epoch"],
                100 * rows["val_acc"],
                color=STATUS_COLOURS[first["status"]],
                linestyle="--" if is_baseline else "-",
                linewidth=2.2 if is_baseline else 1.2,
                marker=STATUS_MARKERS[first["status"]],
                markersize=4,
                alpha=0.9,
            )
        axes.set_xlabel("epoch")
        axes.set_xlim(0.5, cycle + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_title(f"trainings of {cycle} epoch{'s' if cycle > 1 else ''}", fontsize=9)
        tidy(axes)
    panels[0][0].set_ylabel("validation accuracy (%)")
    handles = [
        *_list_fates(curves["status"].unique()),
        Line2D([], [], color="black", linestyle="--", label="baseline"),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=10)
    return figure


def draw_fit(curves: pd.DataFrame, title: str) -> Figure:
    """Loss and accuracy of one trial over the epochs that it paid, on the training and on the validation images; a
    line where it began a longer training.

    Args:
        curves: tables.make_curves, the rows of one trial.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    parts = (
        ("train", "training images, augmented, dropout on", "--", ORANGE),
        ("val", "validation images", "-", BLUE),
    )
    begins = curves[curves["cycle"] != curves["cycle"].shift()]
    for axes, (what, scale, label) in zip(
        panels, (("loss", 1, "loss"), ("acc", 100, "accuracy (%)")), strict=True
    ):
        for part, text, style, colour in parts:
            look = {"linestyle": style, "color": colour, "marker": "o", "markersize": 4}
            for place, (_, rows) in enumerate(curves.groupby("cycle", sort=False)):
                axes.plot(
                    rows["epochs_paid"],
                    scale * rows[f"{part}_{what}"],
                    label="" if place else text,
                    **look,
                )
        for begin, cycle in zip(begins["epochs_paid"], begins["cycle"], strict=True):
            axes.axvline(begin - 0.5, color="0.6", linewidth=0.8)
            spot = (begin - 0.4, 1.0)
            axes.annotate(
                str(cycle), spot, xycoords=("data", "axes fraction"), fontsize=8, va="bottom"
            )
        axes.set_xlim(0.5, len(curves) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epochs paid; above: the length of the training")
        axes.set_ylabel(label)
        tidy(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_asha(rung_scores: pd.DataFrame, rungs: pd.DataFrame, title: str) -> Figure:
    """The rungs side by side: who arrived, the cut-off as it moved, who went on, and what a rung foretold.

    Args:
        rung_scores: tables.make_rung_scores.
        rungs: tables.make_rungs.
    """
    figure, axes = plt.subplots(figsize=(2.6 + 2.6 * len(rungs), 5.2), layout="constrained")
    places = {rung: place for place, rung in enumerate(rungs["rung"])}
    dots = rung_scores.assign(x=0.0)
    for rung, rows in rung_scores.groupby("rung"):
        spread = np.linspace(-0.3, 0.3, len(rows)) if len(rows) > 1 else np.zeros(1)
        dots.loc[rows.index, "x"] = places[rung] + spread
    for _, rows in dots.groupby("trial"):
        axes.plot(rows["x"], 100 * rows["score"], color="0.75", linewidth=0.8, zorder=1)
    for rung, rows in dots.groupby("rung"):
        is_last = places[rung] == len(places) - 1
        went = rows["goes_on"] | is_last
        if not is_last:
            axes.step(
                rows["x"], 100 * rows["cutoff"], where="mid", color=ORANGE, linewidth=1.6, zorder=2
            )
        axes.plot(
            rows["x"][went], 100 * rows["score"][went], "o", color=BLUE, markersize=6, zorder=3
        )
        axes.plot(
            rows["x"][~went],
            100 * rows["score"][~went],
            "o",
            color=BLUE,
            fillstyle="none",
            markersize=6,
            zorder=3,
        )
    axes.set_xticks(
        range(len(rungs)), [_describe_rung(row) for row in rungs.itertuples()], fontsize=8.5
    )
    axes.set_xlim(-0.5, len(rungs) - 0.5)
    axes.set_ylabel("validation accuracy at the rung (%)")
    axes.set_xlabel("rung; within it in the order of arrival")
    handles = [
        Line2D(
            [], [], marker="o", linestyle="", color=BLUE, label="goes on, or trained to the end"
        ),
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            color=BLUE,
            fillstyle="none",
            label="below the cut-off",
        ),
        Line2D([], [], color=ORANGE, label="cut-off when it arrived"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    axes.set_title(title, fontsize=10)
    tidy(axes)
    return figure


def _describe_rung(row: Any) -> str:
    text = f"{row.rung} epoch{'s' if row.rung > 1 else ''}\n{row.num_arrived} arrived"
    if row.num_went_on:
        text += f", {row.num_went_on} went on"
        rank = "unknown" if math.isnan(row.rank_correlation) else f"{row.rank_correlation:+.2f}"
        text += f"\nrank correlation with the final\nscore: {rank} ({row.num_pairs} trials)"
    return text


def draw_slices(slices: pd.DataFrame, title: str) -> Figure:
    """A panel for each searched knob: its value against the accuracy at the first rung, later trials darker.

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
    for axes, knob in zip(panels.flat, knobs, strict=False):
        rows = slices[(slices["knob"] == knob) & slices["rung_score"].notna()]
        axes.scatter(
            rows["value"],
            100 * rows["rung_score"],
            c=rows["trial"],
            cmap=SCORE_COLOURS,
            norm=shades,
            s=26,
        )
        base = rows[rows["origin"] == "baseline"]
        axes.plot(
            base["value"],
            100 * base["rung_score"],
            "*",
            color=ORANGE,
            markeredgecolor="black",
            markersize=13,
        )
        _scale(axes, knob)
        if rows["value"].map(lambda value: isinstance(value, str)).any():
            axes.margins(x=0.25)  # names stand at the ends
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
    """Two knobs against each other: trials as dots, the accuracy at the first rung as colour and, between at least ten
    trials, as filled contours (linear between neighbours; nothing is extrapolated).

    Args:
        slices: tables.make_slices.
        pair: two searched numeric knobs.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    wide = slices[slices["knob"].isin(pair)].pivot(index="trial", columns="knob", values="value")
    wide = (
        wide.join(slices.drop_duplicates("trial").set_index("trial")["rung_score"])
        .dropna()
        .astype("float64")
    )
    x, y = (np.log10(wide[knob]) if is_log_knob(knob) else wide[knob] for knob in pair)
    shades = _shade(100 * wide["rung_score"])
    colours: dict[str, Any] = {"cmap": SCORE_COLOURS, "norm": shades}
    if len(wide) >= 10 and x.nunique() > 2 and y.nunique() > 2:
        levels = np.linspace(float(shades.vmin or 0), float(shades.vmax or 1), 11)
        axes.tricontourf(
            x, y, 100 * wide["rung_score"], levels=levels, extend="min", alpha=0.55, **colours
        )
    dots = axes.scatter(x, y, c=100 * wide["rung_score"], edgecolors="black", s=40, **colours)
    names = [
        f"log10 of {label_knob(knob)}" if is_log_knob(knob) else label_knob(knob) for knob in pair
    ]
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    figure.colorbar(dots, label="accuracy at the first rung (%)", extend="min")
    axes.set_title(title, fontsize=10)
    tidy(axes)
    return figure


def draw_parallel(slices: pd.DataFrame, title: str) -> Figure:
    """A line for each trial through all its knobs to its accuracy at the first rung, each axis from its least to its
    greatest value; the better, the darker.

    Args:
        slices: tables.make_slices.
    """
    knobs = list(slices["knob"].unique())
    wide = slices.pivot(index="trial", columns="knob", values="value")[knobs]
    wide["accuracy"] = 100 * slices.drop_duplicates("trial").set_index("trial")["rung_score"]
    wide = wide[wide["accuracy"].notna()]
    columns = [*knobs, "accuracy"]
    figure, axes = plt.subplots(figsize=(1.7 * len(columns) + 1, 4.6), layout="constrained")
    heights = np.empty((len(wide), len(columns)))
    for place, column in enumerate(columns):
        values = (
            wide[column].to_numpy() if column == "accuracy" else _place_values(wide[column], column)
        )
        low, high = values.min(), values.max()
        heights[:, place] = (values - low) / (high - low) if high > low else 0.5
        for text, height in _mark_axis(wide[column]):
            axes.annotate(
                text, (place, height), (4, 0), textcoords="offset points", fontsize=8, va="center"
            )
    shades = _shade(wide["accuracy"])
    colours = plt.get_cmap(SCORE_COLOURS)
    for row in np.argsort(wide["accuracy"].to_numpy()):
        axes.plot(
            heights[row],
            color=colours(shades(wide["accuracy"].iloc[row])),
            linewidth=1.3,
            alpha=0.85,
        )
    for place in range(len(columns)):
        axes.axvline(place, color="0.4", linewidth=0.8)
    labels = [label_knob(knob) for knob in knobs]
    axes.set_xticks(range(len(columns)), [*labels, "accuracy at the\nfirst rung (%)"], fontsize=8.5)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10)
    return figure


def draw_importances(importances: pd.DataFrame, title: str) -> Figure:
    """A bar for each knob with its bootstrap interval, from the 5th to the 95th percentile.

    Args:
        importances: tables.make_importances.
    """
    figure, axes = plt.subplots(figsize=(6.6, 1.4 + 0.42 * len(importances)), layout="constrained")
    rows = importances[::-1]
    ends = np.clip([rows["importance"] - rows["low"], rows["high"] - rows["importance"]], 0, None)
    axes.barh(
        [label_knob(knob) for knob in rows["knob"]],
        rows["importance"],
        color=BLUE,
        xerr=ends,
        capsize=4,
    )
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of what sets the best quarter of the trials apart")
    axes.set_title(title, fontsize=10)
    tidy(axes)
    return figure


def draw_schedules(schedules: pd.DataFrame, title: str) -> Figure:
    """Learning rate and momentum over the epochs of named configurations.

    Args:
        schedules: tables.make_schedules.
    """
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.4, 5.4), sharex=True, layout="constrained"
    )
    styles = ["-", "--", "-.", ":"]
    for i, (name, rows) in enumerate(schedules.groupby("name", sort=False)):
        look = {
            "linestyle": styles[i % len(styles)],
            "color": list(STATUS_COLOURS.values())[i % len(STATUS_COLOURS)],
        }
        above.plot(rows["epoch"], rows["lr"], label=str(name), **look)
        below.plot(rows["epoch"], rows["momentum"], **look)
    above.set_yscale("log")
    above.set_ylabel("learning rate")
    below.set_ylabel("momentum (Adam: beta1)")
    below.set_xlabel("epoch")
    for axes in (above, below):
        tidy(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_costs(costs: pd.DataFrame, title: str) -> Figure:
    """Where a search's epochs and seconds went: a bar for each length of training, stacked by the trials' statuses.

    Args:
        costs: tables.make_costs, of one search.
    """
    figure, panels = plt.subplots(
        1, 2, figsize=(9, 1.8 + 0.5 * costs["cycle"].nunique()), sharey=True, layout="constrained"
    )
    cycles = sorted(costs["cycle"].unique())
    statuses = [status for status in STATUS_COLOURS if status in set(costs["status"])]
    for axes, (column, scale, label) in zip(
        panels, (("epochs", 1, "epochs"), ("seconds", 60, "minutes")), strict=True
    ):
        begin = np.zeros(len(cycles))
        for status in statuses:
            rows = (
                costs[costs["status"] == status]
                .set_index("cycle")[column]
                .reindex(cycles, fill_value=0)
                / scale
            )
            axes.barh(
                range(len(cycles)),
                rows,
                left=begin,
                color=STATUS_COLOURS[status],
                edgecolor="white",
                height=0.7,
            )
            begin += rows.to_numpy()
        axes.set_xlabel(f"{label} of training, {begin.sum():.3g} in all")
        tidy(axes)
    names = [f"{cycle} epoch{'s' if cycle > 1 else ''}" for cycle in cycles]
    panels[0].set_yticks(range(len(cycles)), names)
    panels[0].set_ylabel("trainings of")
    handles = [
        Rectangle((0, 0), 1, 1, color=STATUS_COLOURS[status], label=f"{status} trials")
        for status in statuses
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(statuses), frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=10)
    return figure


def _place_values(values: pd.Series[Any], knob: str) -> NDArray[np.float64]:
    """Numbers on a knob's own scale; choices by their order."""
    if isinstance(values.iloc[0], str):
        return pd.factorize(values, sort=True)[0].astype(np.float64)
    numbers = values.to_numpy(np.float64)
    return np.log(numbers) if is_log_knob(knob) else numbers


def _mark_axis(values: pd.Series[Any]) -> list[tuple[str, float]]:
    """What is written on a parallel axis, and how high: the ends of numbers, every choice."""
    if not isinstance(values.iloc[0], str):
        return [(f"{values.min():.3g}", 0.0), (f"{values.max():.3g}", 1.0)]
    names = sorted(values.unique())
    return [
        (name, place / (len(names) - 1) if len(names) > 1 else 0.5)
        for place, name in enumerate(names)
    ]


def _shade(scores: pd.Series[float]) -> Normalize:
    """Colours for all but the worst tenth, which would leave none for what sets the others apart."""
    low, high = float(scores.quantile(0.1)), float(scores.max())
    return Normalize(low if low < high else high - 1, high)


def _scale(axes: Axes, knob: str) -> None:
    if is_log_knob(knob):
        axes.set_xscale("log")


def _list_fates(statuses: Any) -> list[Line2D]:
    return [
        Line2D([], [], color=colour, marker=STATUS_MARKERS[status], label=status)
        for status, colour in STATUS_COLOURS.items()
        if status in set(statuses)
    ]
