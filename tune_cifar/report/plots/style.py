"""What all figures share: a backend without a screen, colours, labels from the schema, the way to a file."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tune_cifar.schema import TrainConfig

# Okabe and Ito's palette: told apart in every common kind of colour blindness, and mostly in grey.
BLUE, ORANGE, VERMILION, GREEN, PURPLE, SKY = (
    "#0072B2",
    "#E69F00",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
)
# What became of a trial; the markers tell them apart without any colour.
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
    """A knob's label and unit, from the schema."""
    extra = TrainConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return f"{extra['label']} ({extra['unit']})" if extra["unit"] else str(extra["label"])


def is_log_knob(name: str) -> bool:
    """Whether the schema draws the knob on a logarithmic scale."""
    extra = TrainConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return bool(extra["log"])


def tidy(axes: Axes) -> None:
    """Two spines and a pale grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write the file that the path's ending names, PNG or SVG, and forget the figure."""
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def make_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element to embed, and forget it: the same figure gives the same text, no id is there
    twice, and figures of other names in one document share none with it."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    prefix = re.sub(r"\W", "", name.lower())
    # The id of an image is a hash of its pixels, which may be there twice; nothing refers to it.
    svg = re.sub(r'(<image [^>]*) id="[^"]*"', r"\1", buffer.getvalue())
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg[svg.index("<svg") :])
