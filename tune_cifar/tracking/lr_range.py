"""The MLflow run of an LR range test, which has no record."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tune_cifar.tracking.runs import METRICS_PER_BATCH, to_ms
from tune_cifar.tracking.store import (
    create_experiment,
    find_experiment,
    make_client,
    place_experiment,
    translate_errors,
)
from tune_cifar.tracking.views import MAX_TAG_CHARACTERS


def upload_lr_range(
    tracking_uri: str, storage: Path, report: Mapping[str, Any], folder: Path
) -> None:
    """Log an LR range test as a run of its own, with its folder as artifacts.

    When a call fails, it is closed as FAILED.

    Args:
        report: what its sweeps.json holds.

    Raises:
        TrackingError: when MLflow cannot be reached or refuses.
    """
    with translate_errors(f"{report['name']}: uploading the run to MLflow"):
        storage.mkdir(parents=True, exist_ok=True)
        _log_lr_range(tracking_uri, storage, report, folder)


def _log_lr_range(
    tracking_uri: str, storage: Path, report: Mapping[str, Any], folder: Path
) -> None:
    from mlflow.entities import Metric, Param

    client, now = make_client(tracking_uri), to_ms(report["created"])
    data_name = report["data"]["name"]
    name, artifacts = place_experiment(tracking_uri, storage, report["space"], data_name)
    found = find_experiment(client, name)
    experiment_id = found[0] if found else create_experiment(client, name, artifacts, {})
    metrics = []
    for key, estimate in report["estimators"].items():
        if estimate["lr"] is not None:
            metrics.append(Metric(f"lr_{key.replace('/', '_over_')}", estimate["lr"], now, 0))
    for sweep in report["sweeps"]:
        for step, loss in enumerate(sweep["losses"], start=1):
            if loss is not None:
                metrics.append(Metric(f"loss_seed_{sweep['seed']}", loss, now, step))
    params = [Param(knob, str(report["config"][knob])) for knob in report["living_knobs"]]
    tags = {
        "kind": "lr_range",
        "tier": report["tier"],
        "data": data_name,
        "verdict": report["verdict"],
        "mlflow.note.content": f"`{report['command']}`"[:MAX_TAG_CHARACTERS],
    }
    run_id = client.create_run(experiment_id, now, tags, report["name"]).info.run_id
    try:
        client.log_batch(run_id, params=params)
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            client.log_batch(run_id, metrics[start : start + METRICS_PER_BATCH])
        client.log_artifacts(run_id, str(folder))
    except BaseException:
        with suppress(Exception):  # the first fault is raised
            client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
