"""Whether a searched space was a good one: where its best trials lie, and a narrower proposal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from tune_cifar.errors import SpaceError
from tune_cifar.record.state import SearchState
from tune_cifar.report.tables import TOP_FRACTION
from tune_cifar.schema import TrainConfig
from tune_cifar.space.layout import Range
from tune_cifar.space.reader import describe_edit, parse_recorded, set_range
from tune_cifar.space.rules import find_value_problem
from tune_cifar.train.lr_range import round_to_two_digits

# With fewer scored trials nothing is said.
MIN_TRIALS = 12
# With fewer of the best trials in which a knob is active nothing is said of it.
MIN_PLACES = math.ceil(TOP_FRACTION * MIN_TRIALS)
# Width of a range's edge, as a fraction of the range on its own scale.
EDGE = 0.1
# Margin around the best trials in a proposal, as a fraction of the range on its own scale.
MARGIN = 0.1
# A proposal is worth making if it keeps at most this fraction of a range.
MAX_KEPT = 0.8


@dataclass(frozen=True)
class Health:
    """What a search says of its space, in sentences.

    Attributes:
        diff: a proposal of narrower ranges for the space file; empty without one.
    """

    sentences: tuple[str, ...]
    diff: str


def examine_space(state: SearchState, slices: pd.DataFrame, importances: pd.DataFrame) -> Health:
    """Evaluate a searched space by its best quarter of trials at the first rung.

    Args:
        slices: tables.make_slices.
        importances: tables.make_importances.
    """
    scored = slices[slices["rung_score"].notna()]
    num_trials = scored["trial"].nunique()
    if num_trials < MIN_TRIALS:
        rule = f"too few to evaluate the space; {MIN_TRIALS} are needed."
        return Health((f"{num_trials} scored trials are {rule}",), "")
    trials = scored.drop_duplicates("trial")
    ranked = trials.sort_values("rung_score", ascending=False, kind="stable")["trial"]
    best = scored[scored["trial"].isin(ranked.head(math.ceil(TOP_FRACTION * num_trials)))]
    file = parse_recorded(state.header.space_text, state.header.space)
    baseline = TrainConfig(**file.baseline)
    idle = _find_idle(importances)
    sentences, text = [], file.text
    for name, rows in best.groupby("knob", sort=False):
        knob = str(name)
        searched = file.search.get(knob)
        if not isinstance(searched, Range) or searched.step is not None:
            continue
        if isinstance(searched.high, int):
            continue
        # Where the knob is active.
        places = [_place(float(value), searched) for value in rows["value"].dropna()]
        if len(places) < MIN_PLACES:
            continue
        crowded = _find_crowded_ends(places)
        for end, number in crowded.items():
            sentences.append(_describe_end(knob, searched, end, f"{number} of the {len(places)}"))
        if knob in idle:
            hint = "a pinned value would leave the trials to the other knobs"
            sentences.append(f"{knob}: no effect was seen; {hint}.")
            continue
        given = [baseline.get(knob), *(point[knob] for point in file.points if knob in point)]
        fixed = [_place(float(value), searched) for value in given]
        narrowed = _narrow(searched, places, crowded, fixed)
        if narrowed is not None:
            try:
                current = parse_recorded(text, state.header.space)
                text = set_range(current, knob, narrowed)
            except SpaceError:  # a rule of today refuses the recorded text: no proposal
                continue
    fine = "The best trials lie within the ranges, and every knob had an effect."
    return Health(tuple(sentences) or (fine,), describe_edit(file, text))


def _find_crowded_ends(places: Sequence[float]) -> dict[str, int]:
    """Return the ends at whose edge at least half of the trials lie, with their number."""
    at_edge = {
        "lower": sum(place < EDGE for place in places),
        "upper": sum(place > 1 - EDGE for place in places),
    }
    return {end: number for end, number in at_edge.items() if 2 * number >= len(places)}


def _describe_end(knob: str, searched: Range, end: str, number: str) -> str:
    bound = searched.low if end == "lower" else searched.high
    outside = _value(-0.01 if end == "lower" else 1.01, searched)
    is_allowed = find_value_problem(knob, outside, knob) is None
    hint = "the best may lie beyond it" if is_allowed else "nothing lies beyond it"
    where = f"lie in the {end} tenth of its range, at {bound:g}"
    return f"{knob}: {number} best trials {where}; {hint}."


def _find_idle(importances: pd.DataFrame) -> set[str]:
    """Return the knobs whose importance is, even at its interval's upper end, below half an equal
    part."""
    return set(importances[importances["high"] < 0.5 / max(1, len(importances))]["knob"])


def _place(value: float, searched: Range) -> float:
    """Return where a value lies on the range's own scale, from 0 to 1."""
    low, high = float(searched.low), float(searched.high)
    if searched.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _value(place: float, searched: Range) -> float:
    """Return the value at a place, which may lie a little outside of the range."""
    low, high = float(searched.low), float(searched.high)
    return low * (high / low) ** place if searched.log else low + (high - low) * place


def _narrow(
    searched: Range, places: Sequence[float], crowded: dict[str, int], fixed: Sequence[float]
) -> Range | None:
    """Return the part of a range that holds its best trials with a margin, or None if it is nearly
    all of it.

    Args:
        places: of the best trials.
        crowded: the ends that must stay.
        fixed: places of the space file's own values, which stay inside.
    """
    begin = 0.0 if "lower" in crowded else max(0.0, min(places) - MARGIN)
    end = 1.0 if "upper" in crowded else min(1.0, max(places) + MARGIN)
    begin, end = min([begin, *fixed]), max([end, *fixed])
    if end - begin > MAX_KEPT:
        return None
    low, high = float(searched.low), float(searched.high)
    if begin > 0:
        low = max(low, round_to_two_digits(_value(begin, searched), math.floor))
    if end < 1:
        high = min(high, round_to_two_digits(_value(end, searched), math.ceil))
    return Range(low, high, log=searched.log)
