"""The style of all figures: a backend without a screen, colours, labels from the schema, files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tune_cifar.schema import ARGUMENT, TrainConfig

# Okabe and Ito's palette, readable with every common kind of colour blindness.
BLUE, ORANGE, VERMILION = "#0072B2", "#E69F00", "#D55E00"
GREEN, PURPLE, SKY = "#009E73", "#CC79A7", "#56B4E9"
# Of a trial's status; the markers are readable without colour.
STATUS_COLOURS = {
    "complete": BLUE,
    "stopped": ORANGE,
    "diverged": VERMILION,
    "failed": PURPLE,
    "running": SKY,
}
STATUS_MARKERS = {"complete": "o", "stopped": "s", "diverged": "x", "failed": "v", "running": "^"}
DPI = 110


def label_knob(name: str) -> str:
    """Return a knob's label and unit from the schema; a network's own argument is its name."""
    if name.startswith(ARGUMENT):
        return name.removeprefix(ARGUMENT)
    extra = TrainConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return f"{extra['label']} ({extra['unit']})" if extra["unit"] else str(extra["label"])


def is_log_knob(name: str, values: Iterable[Any]) -> bool:
    """Return whether the schema asks for a logarithmic scale, and the values can stand on it.

    A weight decay of 0 cannot; missing values count as nothing.
    """
    if name.startswith(ARGUMENT):
        return False
    extra = TrainConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return bool(extra["log"]) and not any(value <= 0 for value in values if value is not None)


def label_epochs(number: int) -> str:
    """Return a number of epochs in words."""
    return f"{number} epoch{'s' if number > 1 else ''}"


def tidy(axes: Axes) -> None:
    """Draw two spines, and a pale grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def make_key(marker: str, colour: str, label: str, **look: Any) -> Line2D:
    """Return a legend entry that is a marker without a line."""
    return Line2D([], [], marker=marker, linestyle="", color=colour, label=label, **look)


def add_title_and_legend(
    figure: Figure, title: str, handles: Iterable[Any], num_columns: int
) -> None:
    """Write the title above the panels and the legend below them."""
    figure.suptitle(title, fontsize=10)
    look: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
    figure.legend(handles=list(handles), ncols=num_columns, **look)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, as the path's ending says, and close it."""
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def make_svg(figure: Figure, name: str) -> str:
    """Return a figure as an `<svg>` element to embed, and close it.

    The same figure gives the same text. No id occurs twice, and figures of other names in one
    document share none with it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    prefix = re.sub(r"\W", "", name.lower())
    # The id of an image is a hash of its pixels, which may occur twice; nothing refers to it.
    svg = re.sub(r'(<image [^>]*) id="[^"]*"', r"\1", buffer.getvalue())
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg[svg.index("<svg") :])
