"""`export`: a run's network as one file, checked before it is written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import print_json, say, stderr, stdout


def export(
    file_format: Annotated[
        Literal["onnx", "safetensors"],
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
    """Write a run's network with its weights as one file: images in [0, 1] to logits.

    The file is kept only if it gives the network's own logits for 1,000 validation images (else
    exit 1).

    Example: python -m tune_cifar export --best --space s10 --format onnx
    """
    from tune_cifar.cli.summary import print_synthetic_banner
    from tune_cifar.record.store import find_storage
    from tune_cifar.train.recorded import load_recorded_data
    from tune_cifar.verify.export import export_run

    state, trial = options.choose_run(run, best, space, search, find_storage(storage), data)
    path = out or Path(f"{trial.run_id.replace(':', '-')}.{file_format}")
    options.check_out_file(path)
    console = stderr() if as_json else stdout()
    print_synthetic_banner(console, state.header.data.name)
    loaded = load_recorded_data(state, trial, options.find_recorded_data(state, data))
    agreement = export_run(state, trial, loaded, file_format, path)
    num_bytes = path.stat().st_size
    network = f"{trial.run_id} ({trial.config.model})"
    say(f"{network} as {file_format}: {path}, {num_bytes:,} bytes", console)
    count, difference = f"{agreement.num_images:,}", f"{agreement.largest_difference:.1e}"
    say(
        f"checked on {count} {agreement.part} images: {agreement.num_same:,} of {count} "
        f"predictions are the network's, logits differ by {difference} at most (tolerance "
        f"{agreement.tolerance:.1e})",
        console,
    )
    if as_json:
        file = {"format": file_format, "file": str(path), "bytes": num_bytes}
        print_json({"run_id": trial.run_id, **file, **asdict(agreement)})
