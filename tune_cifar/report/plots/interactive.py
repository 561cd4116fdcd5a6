"""The interactive figure: parallel coordinates whose axes can be brushed and moved."""

from __future__ import annotations

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
    """Return an axis: numbers on the knob's own scale with its values as ticks, choices by name."""
    axis: dict[str, object] = {"label": label_knob(knob)}
    if isinstance(values.iloc[0], str):
        codes, names = pd.factorize(values, sort=True)
        places = list(range(len(names)))
        return axis | {"values": list(codes), "tickvals": places, "ticktext": list(names)}
    numbers = values.astype("float64")
    if not is_log_knob(knob):
        return axis | {"values": list(numbers)}
    logs = np.log10(numbers)
    ticks = np.linspace(logs.min(), logs.max(), 5)
    texts = [f"{10**tick:.2g}" for tick in ticks]
    return axis | {"values": list(logs), "tickvals": list(ticks), "ticktext": texts}
