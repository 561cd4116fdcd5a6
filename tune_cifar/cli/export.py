"""`export`: a run's network as one file for use elsewhere, checked before it is there."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, say, stderr, stdout
from tune_cifar.errors import ConfigError


class Format(StrEnum):
    """What --format takes."""

    ONNX = "onnx"
    SAFETENSORS = "safetensors"


def export(
    file_format: Annotated[
        Format,
        typer.Option(
            "--format", help="onnx runs anywhere; safetensors holds weights, for PyTorch."
        ),
    ],
    run: options.RunId = None,
    best: options.Best = False,
    space: options.BestSpace = None,
    search: options.BestSearch = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Replaced if it is there. Default: ./RUN.FORMAT."
        ),
    ] = None,
    data: options.Data = None,
    storage: options.Storage = None,
    as_json: options.Json = False,
) -> None:
    """Write a run's network, with its kept weights, as one file that takes raw images in [0, 1] and gives logits.

    The file is written only after it has answered 1,000 validation images as the network itself does (else exit 1).

    Example: python -m tune_cifar export --best --space s10 --format onnx
    """
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.data.files import find_data
    from tune_cifar.record.store import find_storage
    from tune_cifar.train.recorded import load_recorded_data
    from tune_cifar.verify.export import export_run

    state, trial = options.choose_run(run, best, space, search, find_storage(storage), data)
    path = out or Path(f"{trial.run_id.replace(':', '-')}.{file_format}")
    if not path.parent.is_dir():
        raise ConfigError(f"--out: the folder must be there, got {path.parent}.")
    if path.is_dir():
        raise ConfigError(f"--out: a file must be given, got the folder {path}.")
    console = stderr() if as_json else stdout()
    print_synthetic_banner(console, state.header.data.name)
    agreement = export_run(
        state, trial, load_recorded_data(state, trial, find_data(data)), file_format.value, path
    )
    num_bytes = path.stat().st_size
    say(
        f"{trial.run_id} ({trial.config.model}) as {file_format}: {path}, {num_bytes:,} bytes",
        console,
    )
    say(
        f"checked on {agreement.num_images:,} {agreement.part} images: {agreement.num_same:,} of "
        f"{agreement.num_images:,} predictions are the network's, logits differ by {agreement.largest_difference:.1e} "
        f"at most (tolerance {agreement.tolerance:.1e})",
        console,
    )
    if as_json:
        file = {"format": file_format, "file": str(path), "bytes": num_bytes}
        print_json({"run_id": trial.run_id, **file, **asdict(agreement)})
