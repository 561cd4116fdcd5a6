"""The interactive figure: parallel coordinates whose axes can be brushed and moved."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tune_cifar.report.plots.style import is_log_knob, label_knob


def make_parallel_html(slices: pd.DataFrame) -> str:
    """Return an HTML fragment with its own JavaScript, which needs no network.

    Args:
        slices: tables.make_slices.
    """
    knobs = list(slices["knob"].unique())
    wide = slices.pivot(index="trial", columns="knob", values="value")[knobs]
    score = 100 * slices.drop_duplicates("trial").set_index("trial")["rung_score"]
    wide, score = wide[score.notna()], score[score.notna()]
    dimensions = [_make_axis(wide[knob], knob) for knob in knobs]
    dimensions += [{"label": "trial", "values": list(wide.index)}]
    dimensions += [{"label": "accuracy at the first rung (%)", "values": list(score.round(2))}]
    line = {"color": list(score), "colorscale": "Viridis", "reversescale": True, "showscale": True}
    figure = go.Figure(go.Parcoords(line=line, dimensions=dimensions), layout={"height": 430})
    config = {"displaylogo": False}
    html = figure.to_html(full_html=False, include_plotlyjs=True, div_id="parallel", config=config)
    return str(html)


def _make_axis(values: pd.Series[Any], knob: str) -> dict[str, object]:
    """Return an axis: numbers on the knob's own scale with its values as ticks, choices by name.

    Trials in which the knob is inactive stand below all others.
    """
    axis: dict[str, object] = {"label": label_knob(knob)}
    if values.map(lambda value: isinstance(value, str)).any():
        codes, names = pd.factorize(values, sort=True)
        ticks, texts = list(range(len(names))), list(names)
        if values.isna().any():  # which have the code -1
            ticks, texts = [-1, *ticks], ["inactive", *texts]
        return axis | {"values": list(codes), "tickvals": ticks, "ticktext": texts}
    numbers = values.astype("float64")
    is_log, has_inactive = is_log_knob(knob, numbers), bool(numbers.isna().any())
    if not is_log and not has_inactive:
        return axis | {"values": list(numbers)}
    places = numbers.map(math.log10, na_action="ignore") if is_log else numbers
    marks: list[float] = []
    if places.notna().any():
        marks = list(np.linspace(places.min(), places.max(), 5))
    texts = [f"{10**mark if is_log else mark:.2g}" for mark in marks]
    if has_inactive:
        below = marks[0] - ((marks[-1] - marks[0]) or 1) / 8 if marks else 0.0
        places, marks, texts = places.fillna(below), [below, *marks], ["inactive", *texts]
    return axis | {"values": list(places), "tickvals": marks, "ticktext": texts}
