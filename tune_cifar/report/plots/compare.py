"""Figures of several searches side by side, drawn from tables.py; accuracies in percent."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tune_cifar.report.format import format_percent
from tune_cifar.report.plots.style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    add_title_and_legend,
    make_key,
    tidy,
)
from tune_cifar.search.goals import NUM_DEVIATIONS

# Searches differ by colour, and where the colours repeat by line style.
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
STYLES = ("-", "--", "-.", ":")


def draw_best_so_far(histories: pd.DataFrame, title: str) -> Figure:
    """Draw several searches' complete trials and the best so far, against epochs and wall time.

    Args:
        histories: tables.make_histories, of searches whose trials compare.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4), sharey=True, layout="constrained")
    table = histories.assign(wall_minutes=histories["wall_seconds"] / 60)
    names = {
        "epochs_spent": "epochs trained by ended trials",
        "wall_minutes": "minutes since the search started",
    }
    for axes, (column, label) in zip(panels, names.items(), strict=True):
        for place, (search, rows) in enumerate(table.groupby("search", sort=False)):
            known, scored = rows[rows["best"].notna()], rows[rows["score"].notna()]
            best = f"best so far: {format_percent(known['best'].max())}"
            look: dict[str, Any] = {
                "color": COLOURS[place % len(COLOURS)],
                "linestyle": STYLES[place // len(COLOURS) % len(STYLES)],
                "label": f"{search}, {best if len(known) else 'none complete'}",
            }
            axes.step(known[column], 100 * known["best"], where="post", linewidth=1.8, **look)
            x, y = scored[column], 100 * scored["score"]
            axes.plot(x, y, "o", color=look["color"], markersize=5, fillstyle="none")
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        tidy(axes)
    panels[0].set_ylabel("validation accuracy (%)")
    lines, _ = panels[0].get_legend_handles_labels()
    dot = make_key("o", "black", "a complete trial", fillstyle="none", markersize=5)
    add_title_and_legend(figure, title, [*lines, dot], num_columns=3)
    return figure


def draw_standing(comparison: pd.DataFrame, title: str) -> Figure:
    """Draw each search's baseline, best trial and published accuracy; a panel for each group.

    The band around a baseline is twice the scatter from the validation images alone: a best trial
    within it is no gain.

    Args:
        comparison: tables.make_comparison.
    """
    groups = list(comparison.groupby("group", sort=False))
    heights = [len(rows) for _, rows in groups]
    figure, panels = plt.subplots(
        len(groups),
        1,
        figsize=(9, 1.5 + 0.6 * len(comparison) + 0.5 * len(groups)),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    band: dict[str, Any] = {"color": ORANGE, "alpha": 0.3}
    tick: dict[str, Any] = {"color": ORANGE, "markeredgewidth": 2.5}
    for axes, (group, rows) in zip(panels[:, 0], groups, strict=True):
        places = range(len(rows))
        axes.use_sticky_edges = False  # leaves a margin at the ends of the bands
        margin = 100 * NUM_DEVIATIONS * rows["scatter"]
        start = 100 * rows["baseline"] - margin
        axes.barh(places, 2 * margin, left=start, height=0.5, **band)
        axes.plot(100 * rows["baseline"], places, "|", markersize=16, **tick)
        axes.plot(100 * rows["best"], places, "o", color=BLUE, markersize=8)
        published = 100 * rows["published"]
        axes.plot(published, places, "D", color="0.65", fillstyle="none", markersize=7)
        axes.set_yticks(places, [f"{row.search}\n({row.space})" for row in rows.itertuples()])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_title(group, fontsize=9, loc="left")
        tidy(axes)
    panels[-1, 0].set_xlabel("accuracy (%)")
    text = "within twice the scatter of the validation images"
    handles = [
        make_key("|", ORANGE, "baseline", markersize=12, markeredgewidth=2.5),
        Rectangle((0, 0), 1, 1, label=text, **band),
        make_key("o", BLUE, "best complete trial"),
        make_key("D", "0.65", "published: not comparable", fillstyle="none"),
    ]
    add_title_and_legend(figure, title, handles, num_columns=2)
    return figure
