"""The report of an LR range test: sweeps.json and curve.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tune_cifar.errors import ConfigError
from tune_cifar.record.environment import describe_environment
from tune_cifar.record.events import utc_now
from tune_cifar.record.files import make_folder
from tune_cifar.report.plots.lr_range import save_lr_range
from tune_cifar.schema import KNOBS, DataInfo, Numerics, inactive_knobs
from tune_cifar.space.select import SearchSpace
from tune_cifar.train.lr_range import (
    DIVERGENCE_FACTOR,
    ESTIMATORS,
    SMOOTHING_DECADES,
    Sweep,
    fit_curve,
    summarise,
)


def make_report(
    name: str,
    space: SearchSpace,
    data: DataInfo,
    numerics: Numerics,
    sweeps: Sequence[Sweep],
    command: str,
) -> dict[str, Any]:
    """Return a test's results and settings as JSON values: the content of sweeps.json."""
    config, curves = space.baseline, [fit_curve(sweep) for sweep in sweeps]
    summary = summarise(curves)
    inactive = {*inactive_knobs(config), "max_lr"}  # max_lr is swept
    return {
        "name": name,
        "space": space.name,
        "tier": space.tier,
        "created": utc_now(),
        "command": command,
        "config": config.model_dump(mode="json"),
        "fingerprint": config.fingerprint,
        "living_knobs": [knob for knob in KNOBS if knob not in inactive],
        "numerics": numerics.model_dump(mode="json"),
        "data": data.model_dump(mode="json"),
        "environment": describe_environment(),
        "smoothing_decades": SMOOTHING_DECADES,
        "divergence_factor": DIVERGENCE_FACTOR,
        "sweeps": [
            asdict(sweep)
            | {"smoothed": curve.smoothed.tolist()}
            | {"estimates": {key: asdict(find(curve)) for key, find in ESTIMATORS.items()}}
            for sweep, curve in zip(sweeps, curves, strict=True)
        ],
        **asdict(summary),
        "verdict": summary.verdict,
    }


def make_report_folder(folder: Path) -> Path:
    """Make the folder of a test that nobody named; a number is added where it is taken.

    Raises:
        ConfigError: when it cannot be made.
    """
    try:
        return make_folder(folder)
    except OSError as exc:
        raise ConfigError(f"{folder}: the test's folder cannot be made: {exc.strerror}.") from exc


def save_report(report: dict[str, Any], folder: Path) -> None:
    """Write sweeps.json and curve.png into a folder, which is created.

    Raises:
        ConfigError: when they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1, allow_nan=False)
        (folder / "sweeps.json").write_text(text + "\n", encoding="utf-8")
        save_lr_range(report, folder / "curve.png")
    except OSError as exc:
        raise ConfigError(f"{folder}: the test's files cannot be written: {exc.strerror}.") from exc
