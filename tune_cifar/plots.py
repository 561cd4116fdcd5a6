"""Tables and pictures in, figures out. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from tune_cifar.schema import TrainConfig

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def save_preview(pictures: NDArray[np.uint8], title: str, path: Path) -> None:
    """Write a PNG grid: a row per image, the original in the first column, its variants in the others.

    Args:
        pictures: (rows, columns, height, width, 3).
    """
    num_rows, num_columns = pictures.shape[:2]
    size = (num_columns, num_rows + 0.5)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
    for row in range(num_rows):
        for column in range(num_columns):
            axes[row, column].imshow(pictures[row, column], interpolation="nearest")
            axes[row, column].set_axis_off()
    axes[0, 0].set_title("original", fontsize=8)
    axes[0, 1].set_title("augmented", fontsize=8, loc="left")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# Colours that colour-blind readers tell apart (Okabe and Ito), one for each estimator of an LR range test.
MARK_COLOURS = ("#D55E00", "#0072B2", "#009E73")


def save_lr_range(report: Mapping[str, Any], path: Path) -> None:
    """Write the PNG of an LR range test: losses as points and smoothed, a line for each seed, and the estimators.

    Args:
        report: what sweeps.json holds.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    sweeps = [sweep for sweep in report["sweeps"] if sweep["losses"]]
    for sweep, shade in zip(sweeps, np.linspace(0.2, 0.6, len(sweeps)), strict=True):
        axes.plot(sweep["lrs"], sweep["losses"], ".", markersize=3, color=str(shade), alpha=0.3)
        axes.plot(sweep["lrs"], sweep["smoothed"], color=str(shade), label=f"seed {sweep['seed']}")
    for (name, found), colour in zip(report["estimators"].items(), MARK_COLOURS, strict=True):
        if found["lr"] is not None:
            spread = f", seeds within x {found['factor']:.2g}" if found["factor"] is not None else ""
            axes.axvline(found["lr"], color=colour, label=f"{name}: {found['lr']:.2e}{spread}")
    baseline = report["config"]["max_lr"]
    axes.axvline(baseline, color="black", linewidth=1, linestyle=":", label=f"baseline: {baseline:.2e}")
    if sweeps:  # the blow-up at a sweep's end would press the fall flat
        starts = [sweep["smoothed"][0] for sweep in sweeps]
        axes.set_ylim(0.9 * min(min(sweep["smoothed"]) for sweep in sweeps), 1.3 * max(starts))
    axes.set_xscale("log")
    axes.set_xlabel(_label_knob("max_lr"))
    axes.set_ylabel("training loss of the step (nats per image)")
    data = "" if report["data"]["name"] == "cifar10" else f", NOT CIFAR-10 ({report['data']['name']})"
    recipe = f"{report['config']['optimizer']}, batches of {report['config']['batch_size']}"
    axes.set_title(f"LR range test of {report['space']} ({report['tier']}){data}: {recipe}", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label_knob(name: str) -> str:
    """A knob's label and unit, from the schema."""
    extra = TrainConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return f"{extra['label']} ({extra['unit']})" if extra["unit"] else str(extra["label"])
