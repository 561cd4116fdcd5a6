"""The one figure that asks for a mouse: parallel coordinates whose axes can be brushed and moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tune_cifar.report.plots.style import is_log_knob, label_knob


def make_parallel_html(slices: pd.DataFrame) -> str:
    """A fragment of HTML that carries its own JavaScript and needs no network.

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
    colours = {
        "color": list(score),
        "colorscale": "Viridis",
        "reversescale": True,
        "showscale": True,
    }
    figure = go.Figure(go.Parcoords(line=colours, dimensions=dimensions), layout={"height": 430})
    return str(
        figure.to_html(
            full_html=False, include_plotlyjs=True, div_id="parallel", config={"displaylogo": False}
        )
    )


def _make_axis(values: pd.Series[Any], knob: str) -> dict[str, object]:
    """Numbers on the knob's own scale with its values as ticks; choices by their names."""
    if isinstance(values.iloc[0], str):
        codes, names = pd.factorize(values, sort=True)
        return {
            "label": label_knob(knob),
            "values": list(codes),
            "tickvals": list(range(len(names))),
            "ticktext": list(names),
        }
    numbers = values.astype("float64")
    if not is_log_knob(knob):
        return {"label": label_knob(knob), "values": list(numbers)}
    places = np.log10(numbers)
    ticks = np.linspace(places.min(), places.max(), 5)
    texts = [f"{10**tick:.2g}" for tick in ticks]
    return {
        "label": label_knob(knob),
        "values": list(places),
        "tickvals": list(ticks),
        "ticktext": texts,
    }
