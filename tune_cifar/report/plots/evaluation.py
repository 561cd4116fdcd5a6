"""Figures of an evaluation, and augmentation previews."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tune_cifar.errors import ConfigError
from tune_cifar.report.format import format_percent
from tune_cifar.report.plots.style import BLUE, ORANGE, save
from tune_cifar.train.metrics import EVALUATION_FILE, NUM_BINS, NUM_MISTAKES, Evaluation

REFERENCE_LINE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2}


def draw_preview(pictures: NDArray[np.uint8], title: str) -> Figure:
    """Draw a grid with a row per image: the original in the first column, then its variants.

    Args:
        pictures: (rows, columns, height, width, 3).
    """
    num_rows, num_columns = pictures.shape[:2]
    size = (num_columns, num_rows + 0.5)
    figure, panels = plt.subplots(
        num_rows, num_columns, figsize=size, squeeze=False, layout="constrained"
    )
    for (row, column), axes in np.ndenumerate(panels):
        axes.imshow(pictures[row, column], interpolation="nearest")
        axes.set_axis_off()
    panels[0, 0].set_title("original", fontsize=8)
    panels[0, 1].set_title("augmented", fontsize=8, loc="left")
    figure.suptitle(title, fontsize=9)
    return figure


def save_evaluation(
    evaluation: Evaluation, pictures: NDArray[np.uint8], title: str, folder: Path
) -> list[Path]:
    """Write an evaluation's four figures as PNGs and its data as JSON; returns the files.

    Args:
        pictures: (images, height, width, 3), all evaluated images in their order.
        title: of every figure: which run, which images.
        folder: created if it does not exist; files of the same names are replaced.

    Raises:
        ConfigError: when the folder cannot be written.
    """
    figures = draw_evaluation(evaluation, pictures, title)
    text = json.dumps({"title": title, **evaluation.to_dict()}, indent=2)
    data = folder / EVALUATION_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data.write_text(text + "\n", encoding="utf-8")
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")
    except OSError as exc:
        raise ConfigError(f"{folder}: the figures cannot be written: {exc.strerror}.") from exc
    return [data, *(folder / f"{name}.png" for name in figures)]


def draw_evaluation(
    evaluation: Evaluation, pictures: NDArray[np.uint8], title: str
) -> dict[str, Figure]:
    """Return an evaluation's four figures by name; the arguments are those of `save_evaluation`."""
    return {
        "confusion": draw_confusion(evaluation, title),
        "per_class": draw_per_class(evaluation, title),
        "reliability": draw_reliability(evaluation, title),
        "mistakes": draw_mistakes(evaluation, pictures, title),
    }


def draw_confusion(evaluation: Evaluation, title: str) -> Figure:
    """Draw the confusion matrix, each row in percent of the true class's images."""
    names, shares = evaluation.class_names, evaluation.confusion_shares.numpy()
    places = range(len(names))
    figure, axes = plt.subplots(figsize=(8.6, 7.6), layout="constrained")
    # Not linear: most shares off the diagonal lie below a tenth, and they matter most.
    image = axes.imshow(100 * shares, cmap="Blues", norm=PowerNorm(0.4, 0, 100))
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9}
    for (row, column), share in np.ndenumerate(shares):
        if evaluation.confusion[row, column]:
            colour = "white" if share > 0.3 else "black"
            axes.text(column, row, f"{100 * share:.1f}", color=colour, **look)
    rows = [f"{figures.name} ({figures.num_images:,})" for figures in evaluation.classes]
    axes.set_xticks(places, names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, rows)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class (images)")
    ticks = [0, 1, 5, 10, 25, 50, 100]
    figure.colorbar(image, shrink=0.7, ticks=ticks, label="% of the true class's images")
    accuracy = format_percent(evaluation.accuracy)
    axes.set_title(f"{title}\naccuracy {accuracy}; an empty field is no image", fontsize=10)
    return figure


def draw_per_class(evaluation: Evaluation, title: str) -> Figure:
    """Draw a bar per class, its accuracy, and a line for the accuracy on all images."""
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    for row, figures in enumerate(evaluation.classes):
        percent, text = 0.0, "no image"
        if figures.accuracy is not None:
            percent = 100 * figures.accuracy
            text = f"{percent:.1f} % of {figures.num_images:,}"
        axes.barh(row, percent, color=BLUE, height=0.7)
        axes.text(101, row, text, va="center", fontsize=9)
    text = f"all images: {format_percent(evaluation.accuracy)}"
    axes.axvline(100 * evaluation.accuracy, label=text, **REFERENCE_LINE)
    axes.set_yticks(range(len(evaluation.classes)), evaluation.class_names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, % of the class's images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower right", frameon=False, fontsize=9)
    return figure


def draw_reliability(evaluation: Evaluation, title: str) -> Figure:
    """Draw the reliability diagram: each bin's accuracy by its mean confidence, and its images."""
    filled = [found for found in evaluation.bins if found.num_images]
    lows = [100 * found.low for found in filled]
    widths = [100 * (found.high - found.low) for found in filled]
    accuracies = [100 * (found.accuracy or 0.0) for found in filled]
    confidences = [100 * (found.confidence or 0.0) for found in filled]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(6.4, 7.2), sharex=True, height_ratios=(4, 1.3), layout="constrained"
    )
    bar = {"align": "edge", "edgecolor": "white"}
    above.bar(lows, accuracies, widths, color=BLUE, alpha=0.35, **bar)
    above.plot([0, 100], [0, 100], label="as accurate as confident", **REFERENCE_LINE)
    text = "a bin: accuracy at its mean confidence"
    above.plot(confidences, accuracies, "o", color=BLUE, label=text)
    above.vlines(confidences, confidences, accuracies, color=ORANGE, linewidth=2, label="gap")
    above.legend(loc="upper left", frameon=False, fontsize=9)
    above.set_ylabel("accuracy, %")
    above.set_ylim(0, 100)
    error = f"expected calibration error {format_percent(evaluation.ece)}"
    above.set_title(f"{title}\n{error} ({NUM_BINS} bins)", fontsize=10)
    bars = below.bar(lows, [found.num_images for found in filled], widths, color="0.6", **bar)
    below.bar_label(bars, fmt="{:,.0f}", fontsize=7)
    below.margins(y=0.25)
    below.set_xlim(0, 100)
    below.set_ylabel("images")
    below.set_xlabel("confidence: the probability given to the answer, %")
    return figure


def draw_mistakes(evaluation: Evaluation, pictures: NDArray[np.uint8], title: str) -> Figure:
    """Draw the most confident mistakes, each with its label, the answer and its confidence.

    Args:
        pictures: (images, height, width, 3), all evaluated images in their order.
    """
    figure, grid = plt.subplots(2, NUM_MISTAKES // 2, figsize=(10.5, 5.6), layout="constrained")
    names, mistakes = evaluation.class_names, evaluation.mistakes
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, mistake in zip(grid.flat, mistakes, strict=False):
        axes.imshow(pictures[mistake.index], interpolation="nearest")
        # "labelled", not "is": some labels are wrong.
        label = f"labelled {names[mistake.true]} (no. {mistake.index})"
        answer = f"taken for {names[mistake.predicted]}, {_format_confidence(mistake.confidence)}"
        axes.set_title(f"{answer}\n{label}", fontsize=9)
    count = f"the {len(mistakes)} most confident mistakes" if mistakes else "no mistake"
    figure.suptitle(f"{title}\n{count}", fontsize=10)
    return figure


def _format_confidence(confidence: float) -> str:
    """Return a confidence in percent; nothing is rounded up to certainty."""
    return format_percent(confidence) if confidence < 0.99995 else "> 99.99 %"
