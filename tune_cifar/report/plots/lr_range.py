"""The figure of an LR range test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from tune_cifar.report.plots.style import BLUE, GREEN, VERMILION, label_knob, save
from tune_cifar.schema import label_data

# One for each estimator.
MARK_COLOURS = (VERMILION, BLUE, GREEN)


def save_lr_range(report: Mapping[str, Any], path: Path) -> None:
    """Write the figure of an LR range test: losses and smoothed losses by seed, and the estimates.

    Args:
        report: the content of sweeps.json.
        path: of the PNG file.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    sweeps = [sweep for sweep in report["sweeps"] if sweep["losses"]]
    for sweep, shade in zip(sweeps, np.linspace(0.2, 0.6, len(sweeps)), strict=True):
        axes.plot(sweep["lrs"], sweep["losses"], ".", markersize=3, color=str(shade), alpha=0.3)
        axes.plot(sweep["lrs"], sweep["smoothed"], color=str(shade), label=f"seed {sweep['seed']}")
    for (name, found), colour in zip(report["estimators"].items(), MARK_COLOURS, strict=True):
        if found["lr"] is None:
            continue
        text = f"{name}: {found['lr']:.2e}"
        if found["factor"] is not None:
            text += f", seeds within x {found['factor']:.2g}"
        axes.axvline(found["lr"], color=colour, label=text)
    baseline = report["config"]["max_lr"]
    text = f"baseline: {baseline:.2e}"
    axes.axvline(baseline, color="black", linewidth=1, linestyle=":", label=text)
    if sweeps:  # without limits the divergence at a sweep's end would dominate the figure
        starts = [sweep["smoothed"][0] for sweep in sweeps]
        axes.set_ylim(0.9 * min(min(sweep["smoothed"]) for sweep in sweeps), 1.3 * max(starts))
    axes.set_xscale("log")
    axes.set_xlabel(label_knob("max_lr"))
    axes.set_ylabel("training loss of the step (nats per image)")
    label = label_data(report["data"]["name"])
    data = f", {label}" if label else ""
    recipe = f"{report['config']['optimizer']}, batches of {report['config']['batch_size']}"
    space = f"{report['space']} ({report['tier']})"
    axes.set_title(f"LR range test of {space}{data}: {recipe}", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.2)
    save(figure, path)
