"""Reading the trials of an uploaded search back from MLflow."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tune_cifar.errors import TrackingError
from tune_cifar.record.events import Header
from tune_cifar.schema import TrainConfig
from tune_cifar.tracking.store import make_client, search_runs


def read_trials(tracking_uri: str, search: str) -> list[dict[str, Any]]:
    """Read a search's trials from MLflow, by number, a dict each, named as `load_trials`' columns.

    Of several searches of the name the newest is read. MLflow has neither the seconds of training
    nor a trial's inactive knobs. `ended_seq` counts the ends from 1.

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
        hint = f"Upload it: python -m tune_cifar sync --search {search}"
        raise TrackingError(f"no search named {search!r} in MLflow. {hint}")
    path = client.download_artifacts(parent.info.run_id, "header.json")
    header = Header.model_validate_json(Path(path).read_text(encoding="utf-8"))
    # Of duplicates the most complete one, which comes last.
    runs.sort(key=lambda run: (run.info.status != "RUNNING", _read_epochs_done(run)))
    trials = {int(run.data.tags["trial"]): run for run in runs if "trial" in run.data.tags}
    rows = [_read_trial(trials[number], header) for number in sorted(trials)]
    ended = [row["trial"] for row in rows if row["status"] != "running"]
    ended.sort(key=lambda number: trials[number].info.end_time or 0)
    ranks = {number: rank for rank, number in enumerate(ended, start=1)}
    for row in rows:
        row["ended_seq"] = ranks.get(row["trial"])
    return rows


def _read_epochs_done(run: Any) -> int:
    return int(run.data.tags.get("epochs_done", 0))


def _read_trial(run: Any, header: Header) -> dict[str, Any]:
    tags, metrics = run.data.tags, run.data.metrics
    status = tags.get("status", "running")
    knobs = {knob: _read_param(knob, text) for knob, text in run.data.params.items()}
    return knobs | {
        "search": header.name,
        "space": header.space,
        "kind": header.kind,
        "tier": header.tier,
        "fidelity": header.fidelity,
        "trial": int(tags["trial"]),
        "run_id": tags["run_id"],
        "status": status,
        "origin": tags["origin"],
        "epochs_done": _read_epochs_done(run),
        "val_acc": metrics.get("val_acc"),
        "score": header.data.chance if status == "diverged" else metrics.get("score"),
        "fingerprint": tags.get("fingerprint"),
        "data": header.data.name,
        "data_digest": header.data.digest,
        "split_hash": header.data.split_hash,
        "reason": tags.get("reason", ""),
        "node": tags["node"].split(", ")[0] if "node" in tags else None,
    }


TRUTH_WORDS = {"True": True, "False": False}


def _read_number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _read_param(knob: str, text: str) -> Any:
    """Convert a param to what `load_trials` has for the knob: a number, a truth value, or text."""
    field = TrainConfig.model_fields.get(knob)
    if field is None:  # an argument of a network of the user's own
        return TRUTH_WORDS.get(text, _read_number(text))
    kind = field.annotation
    if kind is bool:
        return text == "True"
    if kind in (int, float):
        return kind(text)
    return str(tuple(json.loads(text))) if text.startswith("[") else text
