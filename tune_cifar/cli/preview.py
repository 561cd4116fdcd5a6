"""`preview`: pictures of what the network sees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import say
from tune_cifar.errors import ConfigError

# One image of each class, as far as there are so few.
NUM_PREVIEW_ROWS = 10


def preview(
    space: options.Space,
    settings: options.Settings = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="PNG file. Default: preview-SPACE.png."),
    ] = None,
    data: options.Data = None,
) -> None:
    """Write a grid of training images: each row one image as it is, then augmented.

    Example: python -m tune_cifar preview --space s7
    """
    from tune_cifar.augment.preview import make_preview
    from tune_cifar.data.files import describe_data, find_data
    from tune_cifar.data.load import load_train_val
    from tune_cifar.report.plots.evaluation import draw_preview
    from tune_cifar.report.plots.style import save
    from tune_cifar.space.select import load_space, parse_setting

    source = find_data(data)
    about = describe_data(source)
    pins = dict(parse_setting(setting) for setting in settings or [])
    found = load_space(space, "full", pins, about)
    path = out or Path(f"preview-{found.name}.png")
    options.check_out_file(path)
    path = path if path.suffix else path.with_suffix(".png")
    loaded = load_train_val(source, about.num_classes, 1)
    images = loaded.train.images_NCHW[:NUM_PREVIEW_ROWS]
    pictures = make_preview(found.baseline, images, data=about).numpy()
    figure = draw_preview(pictures, f"{found.name} on {source.name}: what the network sees")
    try:
        save(figure, path)
    except OSError as exc:
        raise ConfigError(f"--out: {path} cannot be written: {exc.strerror}.") from exc
    except ValueError as exc:  # of an ending that is no format of matplotlib's
        raise ConfigError(f"--out: {path} cannot be written: {exc}.") from exc
    say(str(path))
