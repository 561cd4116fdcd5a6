"""A search's trials read back from MLflow, for whoever has no record of it: the counterpart of `mlruns`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tune_cifar.errors import TrackingError
from tune_cifar.record.events import Header
from tune_cifar.schema import CHANCE_ACCURACY, TrainConfig
from tune_cifar.tracking.store import make_client, search_runs


def read_trials(tracking_uri: str, search: str) -> list[dict[str, Any]]:
    """What MLflow holds of a search's trials, a dict each by number, named as the columns of `load_trials`. Of several
    searches of one name it is the newest.

    Not there: the seconds of training, and the knobs that are dead in a trial. `ended_seq` counts the ends from 1.

    Raises:
        TrackingError: when MLflow has no such search.
    """
    client = make_client(tracking_uri)
    experiments = [str(found.experiment_id) for found in client.search_experiments()]
    runs = list(search_runs(client, experiments, {"search": search}))
    created = max((run.data.tags["search_created"] for run in runs), default="")
    runs = [run for run in runs if run.data.tags["search_created"] == created]
    parent = next((run for run in runs if "trial" not in run.data.tags), None)
    if parent is None:
        rule = f"MLflow: a search of the name must be there, got {search!r}."
        raise TrackingError(f"{rule} Ship it: python -m tune_cifar sync --search {search}")
    path = client.download_artifacts(parent.info.run_id, "header.json")
    header = Header.model_validate_json(Path(path).read_text(encoding="utf-8"))
    # Of two copies, as a server makes them that answers too late, the fuller one.
    runs.sort(key=lambda run: (run.info.status != "RUNNING", int(run.data.tags.get("epochs_done", 0))))
    trials = {int(run.data.tags["trial"]): run for run in runs if "trial" in run.data.tags}
    ended = {number: run for number, run in trials.items() if run.data.tags.get("status", "running") != "running"}
    ends = sorted((run.info.end_time or 0, number) for number, run in ended.items())
    ranks = {number: rank for rank, (_, number) in enumerate(ends, start=1)}
    return [_read_trial(trials[number], header) | {"ended_seq": ranks.get(number)} for number in sorted(trials)]


def _read_trial(run: Any, header: Header) -> dict[str, Any]:
    tags, metrics = run.data.tags, run.data.metrics
    status = tags.get("status", "running")
    return {knob: _read_param(knob, text) for knob, text in run.data.params.items()} | {
        "search": header.name,
        "space": header.space,
        "kind": header.kind,
        "tier": header.tier,
        "fidelity": header.fidelity,
        "trial": int(tags["trial"]),
        "run_id": tags["run_id"],
        "status": status,
        "origin": tags["origin"],
        "epochs_done": int(tags.get("epochs_done", 0)),
        "val_acc": metrics.get("val_acc"),
        "score": CHANCE_ACCURACY if status == "diverged" else metrics.get("score"),
        "fingerprint": tags.get("fingerprint"),
        "data": header.data.name,
        "data_digest": header.data.digest,
        "split_hash": header.data.split_hash,
        "reason": tags.get("reason", ""),
    }


def _read_param(knob: str, text: str) -> Any:
    """A param as `load_trials` has the knob: a number, true or false, else text."""
    kind = TrainConfig.model_fields[knob].annotation
    if kind is bool:
        return text == "True"
    if kind in (int, float):
        return kind(text)
    return str(tuple(json.loads(text))) if text.startswith("[") else text
