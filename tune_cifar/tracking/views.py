"""How MLflow's page opens on the searches of a space: tags of the experiment, as MLflow 3.17's own page writes them.

A saved view stands in the tag `mlflow.sharedViewState.ID`: a name, and the page's state as JSON in the JSON. A tag that
is there is left alone: somebody may have changed the view on the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from tune_cifar.record.events import Header

# MLflow refuses longer ones; a view of more than some thirty knobs would be.
MAX_TAG_CHARACTERS = 5000
VIEW_TAG = "mlflow.sharedViewState."
OUR_VIEWS = f"{VIEW_TAG}tune_cifar_"
NOTE = """\
The space {space} on {data}. **Views** (top right): *Searches* nests the trials of each search in its run; *Trials, best
first* compares them in a table, or in charts.

Knobs are parameters, the figures of every epoch metrics. `score` is the val_acc of a complete trial's last epoch;
trials compare only where data, split, sizes and epochs agree.
"""
# What a trial's figures are drawn of, one chart each.
CURVES = ("val_acc", "val_loss", "train_acc", "train_loss", "lr")


def make_experiment_tags(header: Header) -> dict[str, str]:
    """The tags that the experiment of this record should have. A search brings the views; the trials' has its tier's
    knobs for columns."""
    data = header.data.label or header.data.name
    tags = {
        # Without a kind, MLflow takes an experiment for one of language models and hides the runs.
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": NOTE.format(space=header.space, data=data),
    }
    if not header.distributions:
        return tags
    figures = [
        "metrics.`best_val_acc`",
        "metrics.`gain_over_baseline`",
        "metrics.`val_acc`",
        "tags.`status`",
    ]
    nested = _make_state("attributes.start_time", figures)
    tags[f"{OUR_VIEWS}searches"] = _make_view("Searches", header, nested)
    knobs = list(header.distributions)
    figures = ["metrics.`score`", "metrics.`val_acc`", "tags.`status`", "tags.`epochs_done`"]
    trials = _make_state("metrics.`score`", [*figures, *(f"params.`{knob}`" for knob in knobs)])
    tier = header.tier or "full"
    tags[f"{OUR_VIEWS}trials_{tier}"] = _make_view(
        f"Trials, best first ({tier})", header, trials | _make_charts(knobs)
    )
    return {name: text for name, text in tags.items() if len(text) <= MAX_TAG_CHARACTERS}


def list_view_links(experiment_id: str, tags: Mapping[str, str]) -> dict[str, str]:
    """Where our views of an experiment are, behind the server's address, by their names."""
    page = f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey="
    links = {}
    for key, value in sorted(tags.items()):
        if key.startswith(OUR_VIEWS):
            with suppress(ValueError, KeyError, TypeError):  # else MLflow's page passes over it too
                links[str(json.loads(value)["name"])] = page + key.removeprefix(VIEW_TAG)
    return links


def _make_view(name: str, header: Header, state: dict[str, Any]) -> str:
    created = round(1000 * datetime.fromisoformat(header.created).timestamp())
    return json.dumps({"name": name, "createdAt": created, "state": json.dumps(state)})


def _make_state(order: str, columns: list[str]) -> dict[str, Any]:
    """All runs in descending order, with these columns. Sorted by anything but their start, runs are not nested."""
    return {
        "searchFilter": "",
        "orderByKey": order,
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {"metrics.`gain_over_baseline`": 150},  # as wide as its name
        "runsHiddenMode": "SHOW_ALL",
    }


def _make_charts(knobs: list[str]) -> dict[str, Any]:
    """The charts beside the table: the knobs in parallel coordinates, coloured by val_acc; then the curves."""
    parallel = {
        "type": "PARALLEL",
        "selectedParams": knobs,
        "selectedMetrics": ["val_acc"],
        "showAllRuns": False,
    }
    curve = {
        "type": "LINE",
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "lineSmoothness": 0,
    }
    curves = [{**curve, "metricKey": name, "selectedMetricKeys": [name]} for name in CURVES]
    charts = [(parallel, "knobs"), *((found, "curves") for found in curves)]
    ours = {"deleted": False, "isGenerated": False}
    return {
        "isAccordionReordered": True,  # else by name
        "compareRunCharts": [
            {"uuid": f"{section}-{number}", "metricSectionId": section, "runsCountToCompare": 100}
            | chart
            | ours
            for number, (chart, section) in enumerate(charts)
        ],
        "compareRunSections": [
            {"uuid": uuid, "name": name, "columns": columns, "display": True, "isReordered": False}
            | ours
            for uuid, name, columns in (
                ("knobs", "Knobs and val_acc", 1),
                ("curves", "Epoch by epoch", 3),
            )
        ],
    }
