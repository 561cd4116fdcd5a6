"""Tables and pictures in, figures out. Nothing is computed here."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

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
