"""Whether a space was a good one to search: where its best trials lie, which knobs did nothing, a narrower proposal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tune_cifar.errors import SpaceError
from tune_cifar.record.state import SearchState
from tune_cifar.space.edit import describe_edit, edit_range
from tune_cifar.space.layout import Range
from tune_cifar.space.reader import parse_space
from tune_cifar.space.rules import find_value_problem
from tune_cifar.train.lr_range import round_to_two_digits

# With fewer trials that were scored, nothing is said.
MIN_TRIALS = 12
# The better trials, whose places are looked at.
TOP_SHARE = 0.25
# A range's edge, and the margin around the better trials in a proposal, in parts of the range on its own scale.
EDGE, MARGIN = 0.1, 0.1
# A proposal that leaves more than this of a range is not worth a change.
WORTH = 0.8


@dataclass(frozen=True)
class Health:
    """What a finished search says of its space, a sentence each; `diff` proposes narrower ranges, or is empty."""

    sentences: tuple[str, ...]
    diff: str


def examine_space(state: SearchState, slices: pd.DataFrame, importances: pd.DataFrame) -> Health:
    """Judge a searched space by its best quarter of trials at the first rung.

    Args:
        slices: tables.make_slices.
        importances: tables.make_importances.
    """
    scored = slices[slices["rung_score"].notna()]
    num_trials = scored["trial"].nunique()
    if num_trials < MIN_TRIALS:
        return Health(
            (
                f"{num_trials} scored trials are too few to judge the space; {MIN_TRIALS} are needed.",
            ),
            "",
        )
    ranks = scored.drop_duplicates("trial").sort_values(
        "rung_score", ascending=False, kind="stable"
    )
    top = set(ranks["trial"].head(math.ceil(TOP_SHARE * num_trials)))
    file = parse_space(
        state.header.space_text, Path(f"{state.header.space}.yaml"), is_recorded=True
    )
    sentences, text = [], file.text
    idle = _find_idle(importances)
    for knob, rows in scored[scored["trial"].isin(top)].groupby("knob", sort=False):
        searched = file.search.get(str(knob))
        if (
            not isinstance(searched, Range)
            or searched.step is not None
            or not isinstance(searched.high, float)
        ):
            continue
        places = [_place(float(value), searched) for value in rows["value"]]
        edges = [sum(place < EDGE for place in places), sum(place > 1 - EDGE for place in places)]
        for number, end, bound in zip(
            edges, ("lower", "upper"), (searched.low, searched.high), strict=True
        ):
            if 2 * number >= len(places):
                way_out = (
                    "nothing lies beyond it"
                    if _is_last(str(knob), searched, end)
                    else "the best may lie beyond it"
                )
                sentences.append(
                    f"{knob}: {number} of the {len(places)} best trials lie in the {end} tenth of its range, "
                    f"at {bound:g}; {way_out}."
                )
        if str(knob) in idle:
            sentences.append(
                f"{knob}: no effect was seen; a pinned value would leave the trials to the other knobs."
            )
            continue
        kept = [
            values[str(knob)] for values in (file.baseline, *file.points) if str(knob) in values
        ]
        wanted = _narrow(
            searched, places, edges, [_place(float(value), searched) for value in kept]
        )
        if wanted is not None:
            try:
                text = edit_range(parse_space(text, file.path, is_recorded=True), str(knob), wanted)
            except SpaceError:  # not on one line, say: the sentences stand without it
                continue
    fine = "The best trials lie within the ranges, and every knob had an effect."
    return Health(tuple(sentences) or (fine,), describe_edit(file, text))


def _is_last(knob: str, searched: Range, end: str) -> bool:
    """Whether the schema allows nothing beyond the range's end."""
    beyond = _value(-0.01 if end == "lower" else 1.01, searched)
    return find_value_problem(knob, beyond, knob) is not None


def _find_idle(importances: pd.DataFrame) -> set[str]:
    """Knobs whose importance stays below half an equal share even at the upper end of its interval."""
    return set(importances[importances["high"] < 0.5 / max(1, len(importances))]["knob"])


def _place(value: float, searched: Range) -> float:
    """Where a value lies on the range's own scale, from 0 to 1."""
    low, high = float(searched.low), float(searched.high)
    if searched.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _value(place: float, searched: Range) -> float:
    """What lies at a place, also a little outside."""
    low, high = float(searched.low), float(searched.high)
    return low * (high / low) ** place if searched.log else low + (high - low) * place


def _narrow(
    searched: Range, places: list[float], edges: list[int], kept: list[float]
) -> Range | None:
    """The better trials with a margin, and what the file itself trains; a side at whose edge they lie stays."""
    begin = 0.0 if 2 * edges[0] >= len(places) else max(0.0, min(places) - MARGIN)
    end = 1.0 if 2 * edges[1] >= len(places) else min(1.0, max(places) + MARGIN)
    begin, end = min([begin, *kept]), max([end, *kept])
    if end - begin > WORTH:
        return None
    low, high = float(searched.low), float(searched.high)
    return Range(
        low if begin == 0 else max(low, round_to_two_digits(_value(begin, searched), math.floor)),
        high if end == 1 else min(high, round_to_two_digits(_value(end, searched), math.ceil)),
        log=searched.log,
    )
