"""The saved views that MLflow's page opens a space's searches with, as tags of the experiment.

The tags have the format of MLflow 3.17's own page. A view is in the tag
`mlflow.sharedViewState.ID`: a name, and the page's state as JSON inside the JSON. An existing tag
is left alone, since someone may have changed the view on the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from tune_cifar.record.events import Header

# MLflow refuses longer tags; a view of more than about thirty knobs is too long.
MAX_TAG_CHARACTERS = 5000
VIEW_TAG = "mlflow.sharedViewState."
OUR_VIEWS = f"{VIEW_TAG}tune_cifar_"
NOTE = """\
The space {space} on {data}. **Views** (top right): *Searches* nests the trials of each search in
its run; *Trials, best first* compares them in a table, or in charts.

Knobs are parameters, the figures of every epoch metrics. `score` is the val_acc of a complete
trial's last epoch; trials compare only where data, split, sizes and epochs agree.
"""
# The metrics of the charts of curves, one chart each.
CURVES = ("val_acc", "val_loss", "train_acc", "train_loss", "lr")
# Marks charts and sections that the page has not made itself.
OURS = {"deleted": False, "isGenerated": False}


def make_experiment_tags(header: Header) -> dict[str, str]:
    """Return the tags that the experiment of this record should have.

    A search has the views. The view of trials has the knobs of the search's tier as columns.
    """
    data = header.data.label or header.data.name
    tags = {
        # Without a kind, MLflow hides the runs, as in an experiment with language models.
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
    """Return the links to our views of an experiment, relative to the server's address, by name."""
    page = f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey="
    links = {}
    for key, value in sorted(tags.items()):
        if key.startswith(OUR_VIEWS):
            with suppress(ValueError, KeyError, TypeError):  # MLflow's page ignores it too
                links[str(json.loads(value)["name"])] = page + key.removeprefix(VIEW_TAG)
    return links


def _make_view(name: str, header: Header, state: dict[str, Any]) -> str:
    created = round(1000 * datetime.fromisoformat(header.created).timestamp())
    return json.dumps({"name": name, "createdAt": created, "state": json.dumps(state)})


def _make_state(order: str, columns: list[str]) -> dict[str, Any]:
    """Return a page with all runs in descending order and these columns.

    Only runs sorted by their start are nested.
    """
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
        "columnWidths": {"metrics.`gain_over_baseline`": 150},  # the width of its name
        "runsHiddenMode": "SHOW_ALL",
    }


def _make_charts(knobs: list[str]) -> dict[str, Any]:
    """Return the page's charts: the knobs in parallel coordinates with val_acc; then the curves."""
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
    charts = [_make_chart("knobs", 0, parallel)]
    charts += [_make_chart("curves", number, chart) for number, chart in enumerate(curves, start=1)]
    return {
        "isAccordionReordered": True,  # keep our order; else sections are sorted by name
        "compareRunCharts": charts,
        "compareRunSections": [
            _make_section("knobs", "Knobs and val_acc", 1),
            _make_section("curves", "Epoch by epoch", 3),
        ],
    }


def _make_chart(section: str, number: int, chart: dict[str, Any]) -> dict[str, Any]:
    place = {"uuid": f"{section}-{number}", "metricSectionId": section, "runsCountToCompare": 100}
    return place | chart | OURS


def _make_section(uuid: str, name: str, columns: int) -> dict[str, Any]:
    section = {"uuid": uuid, "name": name, "columns": columns}
    return section | {"display": True, "isReordered": False} | OURS
