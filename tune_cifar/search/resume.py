"""Going on with a recorded search: the space it searches, what has changed since, what of it is there; and the best
trials of one search as the first of another.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from tune_cifar.errors import ConfigError, SpaceError
from tune_cifar.record.events import Header
from tune_cifar.record.state import SearchState
from tune_cifar.schema import DataInfo, Numerics, TrainConfig
from tune_cifar.search.sampler import fit_point
from tune_cifar.space.layout import Budget
from tune_cifar.space.reader import parse_space
from tune_cifar.space.select import SearchSpace, read_space, select_tier
from tune_cifar.train.checkpoint import CheckpointFolder
from tune_cifar.train.numerics import compare_numerics
from tune_cifar.train.trial import CHECKPOINTS

# Facts of the environment that decide what a search proposes or what a training computes. Numerics has the others.
DECIDING_FACTS = ("code", "optuna")


@dataclass(frozen=True)
class Changes:
    """What is not as it was when the search last ran, as `name: recorded -> now`.

    Attributes:
        deciding: may change results; going on with them must be accepted.
        harmless: only told.
    """

    deciding: tuple[str, ...]
    harmless: tuple[str, ...]


def restore_space(header: Header) -> SearchSpace:
    """The space that a recorded search searches, from the record alone: text, tier, pins, points and budget. That it
    can be searched was settled when it was recorded.

    Raises:
        SpaceError, ConfigError: when this version of tune_cifar refuses the recorded text or pins.
    """
    file = parse_space(header.space_text, Path(f"{header.space}.yaml"), is_recorded=True)
    pinned = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in header.pinned.items()
    }
    space = select_tier(file, header.tier or "full", {} if header.confirmation else pinned)
    if header.confirmation:  # nothing is searched
        space = replace(space, baseline=TrainConfig(**header.baseline), pinned=pinned)
        space = replace(space, distributions={}, dropped={})
    # A record from before there were cycles does not say its fidelity.
    budget = Budget.model_validate_json(json.dumps({"fidelity": "epochs"} | header.budget))
    return replace(space, budget=budget, points=tuple(header.points), obstacle=None)


def find_changes(
    state: SearchState, data: DataInfo, numerics: Numerics, environment: dict[str, str]
) -> Changes:
    """Compare this machine with the one that the search last ran on."""
    header = state.header
    last = state.resumes[-1] if state.resumes else header
    deciding = compare_numerics(last.numerics, numerics)
    if data != header.data:
        deciding.append(
            f"data: {header.data.name}, split {header.data.split_hash} -> {data.name}, {data.split_hash}"
        )
    harmless: list[str] = []
    for name in dict.fromkeys([*last.environment, *environment]):
        before, now = (facts.get(name, "absent") for facts in (last.environment, environment))
        if before != now and not any(change.startswith(f"{name}: ") for change in deciding):
            (deciding if name in DECIDING_FACTS else harmless).append(f"{name}: {before} -> {now}")
    if _has_changed(header):
        harmless.append(
            f"space: the file of {header.space} -> another text; the recorded one is searched"
        )
    return Changes(tuple(deciding), tuple(harmless))


def _has_changed(header: Header) -> bool:
    """Whether the named space's file, if there is one, holds another text now."""
    try:
        return read_space(header.space).text != header.space_text
    except SpaceError:
        return False


def check_accepted(changes: Changes, accepts: bool) -> None:
    """Refuse to go on under changes that may alter results unless the user accepts them.

    Raises:
        ConfigError: with all of them.
    """
    if changes.deciding and not accepts:
        found = "; ".join(changes.deciding)
        raise ConfigError(
            f"--resume: what decides results must be as recorded, got {found}. Or give --accept-changes."
        )


def describe_restored(state: SearchState, rungs: Collection[int]) -> list[str]:
    """What is there of a search, in a sentence, and one more for everything damaged.

    A trial that runs goes on from its newest whole checkpoint, without one from its start; neither is lost. One that
    has come to the end of a cycle begins the next.
    """
    scores = [len(state.arrivals.get(rung, {})) for rung in rungs]
    counted = {"trial": len(state.trials), "rung": sum(map(bool, scores)), "score": sum(scores)}
    trials, reached, told = (
        f"{count} {name}{'' if count == 1 else 's'}" for name, count in counted.items()
    )
    parts = [f"{trials}, {reached} with {told}"]
    notes, epochs, num_next = [], [], 0
    for trial in state.trials.values():
        if trial.status == "running":
            epoch, damaged = CheckpointFolder(
                state.trial_folder(trial.number) / CHECKPOINTS
            ).find_newest()
            notes += damaged
            if trial.stage is not None and len(trial.epochs) == trial.stage:
                num_next += 1
            else:
                epochs.append(epoch)
    if going := sorted(epoch for epoch in epochs if epoch is not None):
        verb, where = ("goes", "epoch") if len(going) == 1 else ("go", "epochs")
        parts.append(f"{len(going)} {verb} on from {where} {', '.join(map(str, going))}")
    if num_next:
        parts.append(f"{num_next} {'begins its' if num_next == 1 else 'begin their'} next cycle")
    if afresh := epochs.count(None):
        parts.append(
            f"{afresh} without a checkpoint yet {'begins' if afresh == 1 else 'begin'} again"
        )
    sentence = ", ".join([*parts, "0 lost"])
    return [sentence, *([state.repaired] if state.repaired else []), *notes]


def warm_start(
    space: SearchSpace, state: SearchState, num_best: int
) -> tuple[SearchSpace, list[str]]:
    """The space with the best complete trials of a search as its first points, and a sentence for each left out.

    Args:
        num_best: how many of the best are taken.

    Raises:
        ConfigError: when the search has no complete trial.
    """
    ranked = state.ranked[:num_best]
    if not ranked:
        raise ConfigError(
            f"--warm-start: a search with a complete trial must be named, got {state.header.name!r}."
        )
    points, notes = [], []
    for trial in ranked:
        point = fit_point(space, trial.config.model_dump())
        if point is None:
            notes.append(f"{trial.run_id} is not taken over: a knob lies outside of this space")
        elif point != space.baseline_params and point not in points:
            points.append(point)
    rest = tuple(point for point in space.points if point not in points)
    return replace(space, points=(*points, *rest)), notes
