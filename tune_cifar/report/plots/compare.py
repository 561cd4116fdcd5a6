"""The figures of several searches beside each other: tables of tables.py in, a matplotlib Figure out. Accuracies are in
percent."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from tune_cifar.report.plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, tidy

# Searches are told apart by colour, and where the colours come round again by the line.
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
STYLES = ("-", "--", "-.", ":")
# A difference of more standard deviations than this is hardly the validation images' luck alone.
NUM_DEVIATIONS = 2


def draw_best_so_far(histories: pd.DataFrame, title: str) -> Figure:
    """The complete trials of several searches and the best so far, against the epochs that they paid and against wall
    time.

    Args:
        histories: tables.make_histories, of searches whose trials compare.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4), sharey=True, layout="constrained")
    table = histories.assign(wall_minutes=histories["wall_seconds"] / 60)
    names = {
        "epochs_spent": "epochs trained by ended trials",
        "wall_minutes": "minutes since the search began",
    }
    for axes, (column, label) in zip(panels, names.items(), strict=True):
        for place, (search, rows) in enumerate(table.groupby("search", sort=False)):
            known = rows[rows["best"].notna()]
            colour = COLOURS[place % len(COLOURS)]
            style = STYLES[place // len(COLOURS) % len(STYLES)]
            text = (
                f"{search}, best so far: {100 * known['best'].max():.2f} %"
                if len(known)
                else f"{search}, none complete"
            )
            look = {"color": colour, "linestyle": style, "linewidth": 1.8}
            axes.step(known[column], 100 * known["best"], where="post", label=text, **look)
            scored = rows[rows["score"].notna()]
            axes.plot(
                scored[column],
                100 * scored["score"],
                "o",
                color=colour,
                markersize=5,
                fillstyle="none",
            )
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        tidy(axes)
    panels[0].set_ylabel("validation accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(
        Line2D([], [], marker="o", linestyle="", color="black", fillstyle="none", markersize=5)
    )
    labels.append("a complete trial")
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_standing(comparison: pd.DataFrame, title: str) -> Figure:
    """Each search's baseline and best trial, and what the source published; a panel for each group that compares. The
    band around a baseline is as wide as the luck of the validation images alone: a best within it is no gain.

    Args:
        comparison: tables.make_comparison.
    """
    groups = list(comparison.groupby("group", sort=False))
    figure, panels = plt.subplots(
        len(groups),
        1,
        figsize=(9, 1.5 + 0.6 * len(comparison) + 0.5 * len(groups)),
        sharex=True,
        squeeze=False,
        height_ratios=[len(rows) for _, rows in groups],
        layout="constrained",
    )
    for axes, (group, rows) in zip(panels[:, 0], groups, strict=True):
        places = range(len(rows))
        axes.use_sticky_edges = False  # a band ends before the figure does
        margin = 100 * NUM_DEVIATIONS * rows["scatter"]
        axes.barh(
            places,
            2 * margin,
            left=100 * rows["baseline"] - margin,
            height=0.5,
            color=ORANGE,
            alpha=0.3,
        )
        axes.plot(
            100 * rows["baseline"], places, "|", color=ORANGE, markersize=16, markeredgewidth=2.5
        )
        axes.plot(100 * rows["best"], places, "o", color=BLUE, markersize=8)
        axes.plot(
            100 * rows["published"], places, "D", color="0.65", fillstyle="none", markersize=7
        )
        axes.set_yticks(places, [f"{row.search}\n({row.space})" for row in rows.itertuples()])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_title(group, fontsize=9, loc="left")
        tidy(axes)
    panels[-1, 0].set_xlabel("accuracy (%)")
    handles = [
        Line2D(
            [],
            [],
            marker="|",
            linestyle="",
            color=ORANGE,
            markersize=12,
            markeredgewidth=2.5,
            label="baseline",
        ),
        Rectangle(
            (0, 0),
            1,
            1,
            color=ORANGE,
            alpha=0.3,
            label="within twice the scatter of the validation images",
        ),
        Line2D([], [], marker="o", linestyle="", color=BLUE, label="best complete trial"),
        Line2D(
            [],
            [],
            marker="D",
            linestyle="",
            color="0.65",
            fillstyle="none",
            label="published: does not compare",
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
