"""Warm starts: other searches' best trials tried first, or all their results learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, zip_longest

from tune_cifar.errors import ConfigError
from tune_cifar.record.environment import digest_code
from tune_cifar.record.events import KIND_WORDS, Learned
from tune_cifar.record.state import SearchState
from tune_cifar.schema import DataInfo
from tune_cifar.search.sampler import fit_point
from tune_cifar.space.select import SearchSpace


def try_best_first(
    space: SearchSpace, states: Sequence[SearchState], num_best: int
) -> tuple[SearchSpace, list[str]]:
    """Return the space with the best complete trials of these searches as its first points.

    They may have searched other spaces. The best of each search come first, then the second best.

    Args:
        num_best: number of trials to take over from each.

    Returns:
        the space, and a sentence for each trial that lies outside of it.

    Raises:
        ConfigError: when one of the searches has no complete trial.
    """
    for state in states:
        if not state.ranked:
            rule = "`warm_start` must be a search with a complete trial"
            raise ConfigError(f"{rule}, got {state.header.name!r}.")
    points, notes = [], []
    baseline = space.select_active(space.baseline_params)
    ranked = zip_longest(*(state.ranked[:num_best] for state in states))
    for trial in filter(None, chain.from_iterable(ranked)):
        point = fit_point(space, trial.config)
        if point is None:
            notes.append(f"{trial.run_id} is left out: a value lies outside of this space")
        elif point != baseline and point not in points:
            points.append(point)
    rest = tuple(point for point in space.points if space.select_active(point) not in points)
    return replace(space, points=(*points, *rest)), notes


def check_learner(space: SearchSpace) -> None:
    """Refuse to tell trials to a sampler that does not learn.

    Raises:
        ConfigError: the space's does not.
    """
    kind = space.budget.sampler.kind
    if kind not in ("tpe", "gp"):
        hint = "Leave `learn` out: `warm_start` alone trains the best trials again."
        raise ConfigError(f"`learn`: the space's sampler must be tpe or gp, got {kind}. {hint}")


def drop_learned(space: SearchSpace, learned: Sequence[Learned]) -> SearchSpace:
    """Return the space without the points whose results are known."""
    known = [trial.params for trial in learned]
    points = [point for point in space.points if space.select_active(point) not in known]
    return replace(space, points=tuple(points))


def learn(space: SearchSpace, state: SearchState, data: DataInfo) -> tuple[list[Learned], str]:
    """Return another search's ended trials, to tell the sampler before the first one.

    A trial of which anything is fixed otherwise in this space, or which lies outside of it, is left
    out: its score would be another training's.

    Returns:
        the trials, and a sentence on how many there are.

    Raises:
        ConfigError: when data, split, fidelity, rungs or code differ, or no trial is left.
    """
    header = state.header
    if header.kind != "search":
        kind = KIND_WORDS[header.kind]
        raise ConfigError(f"`learn` must be from a search, got {header.name}, {kind}.")
    ours = space.budget.model_dump(mode="json")
    last = state.resumes[-1] if state.resumes else header
    compared = {
        "data": (header.data.name, data.name),
        "data digest": (header.data.digest, data.digest),
        "split": (header.data.split_hash, data.split_hash),
        "fidelity": (header.fidelity, ours["fidelity"]),
        "rungs": (list(header.budget.get("rungs", ())), ours["rungs"]),
        "replicates": (header.budget.get("replicates", 1), ours["replicates"]),
        "code": (last.environment.get("code"), digest_code()),
    }
    changed = [f"{name}: {a} -> {b}" for name, (a, b) in compared.items() if a != b]
    if changed:
        rule = f"`learn`: {header.name} must have trained as this search will"
        hint = "Leave `learn` out: `warm_start` alone trains its best again."
        raise ConfigError(f"{rule}, got {'; '.join(changed)}. {hint}")
    learned = []
    ended = [t for t in state.trials.values() if t.status not in ("running", "failed")]
    for trial in ended:
        point = fit_point(space, trial.full_config)
        if point is not None and space.config(point) == trial.full_config:
            learned.append(
                Learned(run_id=trial.run_id, params=point, status=trial.status, scores=trial.scores)
            )
    if not learned:
        rule = f"`learn`: a trial of {header.name} must be one of this space"
        raise ConfigError(f"{rule}, got none of {len(ended)}.")
    left_out = len(ended) - len(learned)
    outside = f"; {left_out} are of another recipe or outside of this space" if left_out else ""
    return learned, f"learned from {len(learned)} trials of {header.name}{outside}"
