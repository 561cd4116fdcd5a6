"""Resuming a recorded search: its space, changes since, what is restored."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from tune_cifar.errors import ConfigError, SpaceError
from tune_cifar.models.custom import add_source
from tune_cifar.record.events import Header
from tune_cifar.record.files import CHECKPOINTS
from tune_cifar.record.state import SearchState
from tune_cifar.schema import DataInfo, Numerics, TrainConfig
from tune_cifar.search.sampler import MAX_SAMPLER_SEED
from tune_cifar.space.layout import Budget
from tune_cifar.space.reader import parse_recorded
from tune_cifar.space.select import SearchSpace, read_space, select_tier
from tune_cifar.train.checkpoint import CheckpointFolder
from tune_cifar.train.numerics import compare_numerics
from tune_cifar.train.recorded import describe_images

# Facts of the environment that change proposals or trainings. Numerics has the others.
DECIDING_FACTS = ("code", "optuna", "numpy", "scipy")


@dataclass(frozen=True)
class Changes:
    """Differences from when the search last ran, as `name: recorded -> now`.

    Attributes:
        deciding: may change results and must be accepted.
        harmless: are only printed.
    """

    deciding: tuple[str, ...]
    harmless: tuple[str, ...]


def restore_space(header: Header) -> SearchSpace:
    """Return the space of a recorded search: text, tier, pins, points and budget from its record.

    Whether it can be searched was checked when it was recorded.

    Raises:
        SpaceError, ConfigError: when this version of tune_cifar refuses the recorded text or pins.
    """
    file = parse_recorded(header.space_text, header.space)
    pinned = dict(header.pinned)
    for name, value in pinned.items():
        if isinstance(value, list):  # JSON has no tuples
            pinned[name] = tuple(value)
    space = select_tier(file, header.tier or "full", {} if header.confirmation else pinned, None)
    if header.confirmation:  # no knob is searched
        space = replace(space, baseline=TrainConfig(**header.baseline), pinned=pinned)
        space = replace(space, distributions={}, dropped={})
    # Old records lack the fidelity, which was `epochs`, and the window, which was all scores.
    old: dict[str, Any] = {"fidelity": "epochs", "window": None}
    budget = Budget.model_validate_json(json.dumps(old | header.budget))
    if header.model_source:
        digest = add_source(header.model_source)
        baseline = space.baseline.model_copy(update={"model_digest": digest})
        space = replace(space, baseline=baseline, model_source=header.model_source)
    return replace(space, budget=budget, points=tuple(header.points), obstacle=None)


def restore_limits(space: SearchSpace, state: SearchState) -> SearchSpace:
    """Return the space with the last driver's time limit and goals; an ended search has no goal."""
    last = state.resumes[-1].model_dump() if state.resumes else state.header.budget
    kept = {} if state.is_finished else last
    limits = {name: kept.get(name) for name in ("target", "patience")}
    if (seconds := last.get("max_time_seconds")) is not None:
        limits["max_time_seconds"] = seconds
    return replace(space, budget=space.budget.model_copy(update=limits))


def check_resumable(header: Header, num_trials: int) -> None:
    """Refuse to resume a search whose seed leads beyond the seeds that the sampler takes.

    Searches were recorded before a new one's seed had bounds (`check_request`).

    Raises:
        ConfigError: with the way out.
    """
    largest = MAX_SAMPLER_SEED + 1 - num_trials
    if header.kind == "search" and not 0 <= header.seed <= largest:
        rule = f"its seed must be 0 to {largest} (with {num_trials} trials)"
        hint = "Start a new search with another `seed`; `warm_start` takes over the best trials."
        raise ConfigError(f"{header.name}: {rule}, got {header.seed}. {hint}")


def find_changes(
    state: SearchState, data: DataInfo, numerics: Numerics, environment: dict[str, str]
) -> Changes:
    """Compare this machine with the one that the search last ran on."""
    header = state.header
    last = state.resumes[-1] if state.resumes else header
    deciding = compare_numerics(last.numerics, numerics)
    if data != header.data:
        deciding.append(f"data: {describe_images(header.data)} -> {describe_images(data)}")
    harmless: list[str] = []
    for name in dict.fromkeys([*last.environment, *environment]):
        before, now = last.environment.get(name, "absent"), environment.get(name, "absent")
        is_listed = any(change.startswith(f"{name}: ") for change in deciding)
        if before != now and not is_listed:
            # A record from before a fact was recorded does not say what it was.
            is_deciding = name in DECIDING_FACTS and name in last.environment
            changes = deciding if is_deciding else harmless
            changes.append(f"{name}: {before} -> {now}")
    if _has_changed(header):
        file = f"the file of {header.space}"
        harmless.append(f"space: {file} -> another text; the recorded one is searched")
    return Changes(tuple(deciding), tuple(harmless))


def _has_changed(header: Header) -> bool:
    """Return whether the named space's file, if there is one, has another text now."""
    try:
        return read_space(header.space).text != header.space_text
    except SpaceError:
        return False


def check_accepted(changes: Changes, accept_changes: bool) -> None:
    """Refuse to resume under changes that may alter results, unless they are accepted.

    Raises:
        ConfigError: with all of them.
    """
    if changes.deciding and not accept_changes:
        rule = "`resume`: what decides results must be as recorded"
        hint = "Restore it, or give `accept_changes=True`."
        raise ConfigError(f"{rule}, got {'; '.join(changes.deciding)}. {hint}")


def describe_restored(state: SearchState, rungs: Collection[int]) -> list[str]:
    """Return a sentence on what is restored of a search, and one more for everything damaged.

    A running trial is resumed from its newest intact checkpoint, or restarted without one. One that
    had finished a stage starts the next.
    """
    num_scores = [len(state.arrivals.get(rung, {})) for rung in rungs]
    num_reached = sum(count > 0 for count in num_scores)
    parts = [
        _count(len(state.trials), "trial"),
        f"{_count(num_reached, 'rung')} with {_count(sum(num_scores), 'score')}",
    ]
    damaged: list[str] = []
    epochs: list[int | None] = []
    num_next = 0
    for trial in state.trials.values():
        if trial.status == "running":
            checkpoints = CheckpointFolder(state.trial_folder(trial.number) / CHECKPOINTS)
            epoch, found = checkpoints.find_newest()
            damaged += found
            if trial.stage is not None and len(trial.epochs) == trial.stage:
                num_next += 1
            else:
                epochs.append(epoch)
    if resumed := sorted(epoch for epoch in epochs if epoch is not None):
        noun = "epoch" if len(resumed) == 1 else "epochs"
        parts.append(f"{len(resumed)} resumed from {noun} {', '.join(map(str, resumed))}")
    if num_next:
        parts.append(f"{num_next} at the start of the next stage")
    if restarted := epochs.count(None):
        parts.append(f"{restarted} restarted without a checkpoint")
    return ["; ".join(parts), *([state.repaired] if state.repaired else []), *damaged]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
