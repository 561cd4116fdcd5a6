"""What the network sees, and what it answered: augmentation previews and the figures of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tune_cifar.errors import ConfigError
from tune_cifar.report.plots.style import BLUE, ORANGE, save
from tune_cifar.train.metrics import EVALUATION_FILE, NUM_BINS, NUM_MISTAKES, Evaluation


def draw_preview(pictures: NDArray[np.uint8], title: str) -> Figure:
    """A grid: a row per image, the original in the first column, its variants in the others.

    Args:
        pictures: (rows, columns, height, width, 3).
    """
    num_rows, num_columns = pictures.shape[:2]
    size = (num_columns, num_rows + 0.5)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=size, squeeze=False, layout="constrained"
    )
    for row in range(num_rows):
        for column in range(num_columns):
            axes[row, column].imshow(pictures[row, column], interpolation="nearest")
            axes[row, column].set_axis_off()
    axes[0, 0].set_title("original", fontsize=8)
    axes[0, 1].set_title("augmented", fontsize=8, loc="left")
    figure.suptitle(title, fontsize=9)
    return figure


def save_evaluation(
    evaluation: Evaluation, pictures: NDArray[np.uint8], title: str, folder: Path
) -> list[Path]:
    """Write an evaluation's four figures as PNGs and all its data as JSON; returns the files.

    Args:
        pictures: (images, height, width, 3), all that were judged, in their order.
        title: of every figure: which run, which images.
        folder: created if need be; files of the same names are replaced.

    Raises:
        ConfigError: when the folder cannot be written.
    """
    figures = draw_evaluation(evaluation, pictures, title)
    data = folder / EVALUATION_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data.write_text(
            json.dumps({"title": title, **evaluation.to_dict()}, indent=2) + "\n", encoding="utf-8"
        )
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")
    except OSError as exc:
        raise ConfigError(
            f"{folder}: figures must be writable there, got {exc.strerror!r}."
        ) from exc
    return [data, *(folder / f"{name}.png" for name in figures)]


def draw_evaluation(
    evaluation: Evaluation, pictures: NDArray[np.uint8], title: str
) -> dict[str, Figure]:
    """An evaluation's four figures by their names; the arguments are `save_evaluation`'s."""
    return {
        "confusion": draw_confusion(evaluation, title),
        "per_class": draw_per_class(evaluation, title),
        "reliability": draw_reliability(evaluation, title),
        "mistakes": draw_mistakes(evaluation, pictures, title),
    }


def draw_confusion(evaluation: Evaluation, title: str) -> Figure:
    """The confusion matrix: in each row what became of one class's images, in percent of them."""
    names, shares = evaluation.class_names, evaluation.confusion_shares.numpy()
    figure, axes = plt.subplots(figsize=(8.6, 7.6), layout="constrained")
    # Not linear: most shares off the diagonal lie below a tenth, and they are what is looked for.
    image = axes.imshow(100 * shares, cmap="Blues", norm=PowerNorm(0.4, 0, 100))
    for (row, column), share in np.ndenumerate(shares):
        if evaluation.confusion[row, column]:
            colour = "white" if share > 0.3 else "black"
            axes.text(
                column,
                row,
                f"{100 * share:.1f}",
                ha="center",
                va="center",
                fontsize=9,
                color=colour,
            )
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(
        range(len(names)),
        [f"{figures.name} ({figures.num_images:,})" for figures in evaluation.classes],
    )
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class (images)")
    figure.colorbar(
        image, shrink=0.7, ticks=[0, 1, 5, 10, 25, 50, 100], label="% of the true class's images"
    )
    axes.set_title(
        f"{title}\naccuracy {100 * evaluation.accuracy:.2f} %; an empty field is no image",
        fontsize=10,
    )
    return figure


def draw_per_class(evaluation: Evaluation, title: str) -> Figure:
    """A bar per class: the share of its images that were answered right, beside that of all images."""
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    for row, figures in enumerate(evaluation.classes):
        percent = 0.0 if figures.accuracy is None else 100 * figures.accuracy
        axes.barh(row, percent, color=BLUE, height=0.7)
        text = (
            "no image" if figures.accuracy is None else f"{percent:.1f} % of {figures.num_images:,}"
        )
        axes.text(101, row, text, va="center", fontsize=9)
    all_percent = 100 * evaluation.accuracy
    axes.axvline(
        all_percent,
        color="black",
        linestyle="--",
        linewidth=1.2,
        label=f"all images: {all_percent:.2f} %",
    )
    axes.set_yticks(range(len(evaluation.classes)), evaluation.class_names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, % of the class's images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower right", frameon=False, fontsize=9)
    return figure


def draw_reliability(evaluation: Evaluation, title: str) -> Figure:
    """The reliability diagram: each bin's accuracy over its mean confidence, and how many images it holds."""
    filled = [found for found in evaluation.bins if found.num_images]
    lows, widths = (
        [100 * found.low for found in filled],
        [100 * (found.high - found.low) for found in filled],
    )
    accuracies = [100 * (found.accuracy or 0.0) for found in filled]
    confidences = [100 * (found.confidence or 0.0) for found in filled]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(6.4, 7.2), sharex=True, height_ratios=(4, 1.3), layout="constrained"
    )
    above.bar(lows, accuracies, widths, align="edge", color=BLUE, alpha=0.35, edgecolor="white")
    above.plot(
        [0, 100],
        [0, 100],
        color="black",
        linestyle="--",
        linewidth=1.2,
        label="as accurate as confident",
    )
    above.plot(
        confidences, accuracies, "o", color=BLUE, label="a bin: accuracy at its mean confidence"
    )
    above.vlines(confidences, confidences, accuracies, color=ORANGE, linewidth=2, label="gap")
    above.legend(loc="upper left", frameon=False, fontsize=9)
    above.set_ylabel("accuracy, %")
    above.set_ylim(0, 100)
    above.set_title(
        f"{title}\nexpected calibration error {100 * evaluation.ece:.2f} % ({NUM_BINS} bins)",
        fontsize=10,
    )
    bars = below.bar(
        lows,
        [found.num_images for found in filled],
        widths,
        align="edge",
        color="0.6",
        edgecolor="white",
    )
    below.bar_label(bars, fmt="{:,.0f}", fontsize=7)
    below.margins(y=0.25)
    below.set_xlim(0, 100)
    below.set_ylabel("images")
    below.set_xlabel("confidence: the probability given to the answer, %")
    return figure


def draw_mistakes(evaluation: Evaluation, pictures: NDArray[np.uint8], title: str) -> Figure:
    """The most confident mistakes as pictures, each with what it is, what it was taken for and how surely.

    Args:
        pictures: (images, height, width, 3), all that were judged, in their order.
    """
    figure, grid = plt.subplots(2, NUM_MISTAKES // 2, figsize=(10.5, 5.6), layout="constrained")
    names = evaluation.class_names
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, mistake in zip(grid.flat, evaluation.mistakes, strict=False):
        axes.imshow(pictures[mistake.index], interpolation="nearest")
        # "labelled", for now and then the label is what is wrong.
        answer = f"taken for {names[mistake.predicted]}, {_format_sure(mistake.confidence)}"
        axes.set_title(
            f"{answer}\nlabelled {names[mistake.true]} (no. {mistake.index})", fontsize=9
        )
    count = (
        f"the {len(evaluation.mistakes)} most confident mistakes"
        if evaluation.mistakes
        else "no mistake"
    )
    figure.suptitle(f"{title}\n{count}", fontsize=10)
    return figure


def _format_sure(confidence: float) -> str:
    """In percent; nothing is rounded up to certainty."""
    return f"{100 * confidence:.2f} %" if confidence < 0.99995 else "> 99.99 %"
