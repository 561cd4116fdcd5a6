"""Whether a search's best trials keep what they promised: trained again under new seeds, each beside the baseline under
the same seeds; and, once, the confirmed recipe on all 50,000 images for the sealed test set.

The best of many scores was chosen partly by luck (the winner's curse). A mean over seeds that took no part in the
choice was not; and a gain is a difference in pairs, since a seed's luck falls on both.

torch, Optuna and scipy are imported where they are needed: the leaderboard, which only compares, needs neither of the
first two.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record.events import KIND_WORDS, Candidate, Confirmation
from tune_cifar.record.state import SearchState
from tune_cifar.record.test_log import TestEvaluation
from tune_cifar.schema import NUM_TRAIN_IMAGES, TrainConfig
from tune_cifar.space.layout import Budget, SamplerBudget
from tune_cifar.space.select import SearchSpace

ALL_IMAGES = {"train_size": NUM_TRAIN_IMAGES, "val_size": 0}
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Gain:
    """A mean difference in pairs of equal seeds, as a fraction, with its 95 % interval by Student's t; the interval is
    None with fewer than two pairs."""

    mean: float
    interval: tuple[float, float] | None
    num_pairs: int

    def describe(self) -> str:
        """In points, for people."""
        if self.interval is None:
            return f"{100 * self.mean:+.2f} points in {self.num_pairs} pair: no interval"
        low, high = (100 * end for end in self.interval)
        return f"{100 * self.mean:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f} ({self.num_pairs} pairs)"


@dataclass(frozen=True)
class Confirmed:
    """A candidate under its new seeds.

    Attributes:
        search_score: as its search had it.
        scores: accuracy by seed, of the trainings that ended so far; a diverged one counts as chance.
        sd: standard deviation over the seeds, None with fewer than two.
        gain: over the baseline, None of the baseline itself and without a pair.
        same_recipe: trained and judged as in the search, so that both scores may be compared.
    """

    run_id: str
    search_score: float | None
    scores: dict[int, float]
    gain: Gain | None
    same_recipe: bool

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores.values()) if self.scores else None

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else None

    def describe_curse(self) -> str:
        """The search's score against the confirmed one, in a sentence."""
        if self.search_score is None or self.mean is None:
            return f"{self.run_id}: nothing to compare yet."
        said = f"{self.run_id}: the search said {100 * self.search_score:.2f} %"
        if not self.same_recipe:
            return f"{said}, of another training (--set): not to be compared with these."
        over = 100 * (self.search_score - self.mean)
        found = f"{said}, {len(self.scores)} new seeds say {100 * self.mean:.2f} %"
        if over <= 0:
            return f"{found}: it promised nothing that it does not keep."
        return f"{found}: {over:.2f} points of it were luck that the choice had picked (the winner's curse)."

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        gain = self.gain
        return {
            "run_id": self.run_id,
            "search_score": self.search_score,
            "scores": {str(seed): score for seed, score in self.scores.items()},
            "mean": self.mean,
            "sd": self.sd,
            "gain": None
            if gain is None
            else {"mean": gain.mean, "interval": gain.interval, "pairs": gain.num_pairs},
        }


def make_confirmation(
    state: SearchState, num_top: int, num_seeds: int, changes: Mapping[str, Any]
) -> tuple[SearchSpace, Confirmation]:
    """What confirms a search: its baseline and its best complete trials, each under seeds that the search did not use.

    Args:
        changes: knobs that all candidates have otherwise than in the search, such as epochs and train_size.

    Raises:
        ConfigError: when no trial is complete, or a change breaks a rule of the schema or takes the seed or the
            validation images.
    """
    header = state.header
    if header.kind != "search":
        raise ConfigError(
            f"--search: a search must be named, got {header.name}, {KIND_WORDS[header.kind]}."
        )
    if "seed" in changes:
        raise ConfigError(
            "--set: seed must not be pinned, since the seeds are what is varied. Use --seeds."
        )
    if changes.get("val_size") == 0:
        raise ConfigError(
            "--set: val_size >= 1 must hold, got 0. Candidates are compared on it; --final needs none."
        )
    if not state.ranked:
        raise ConfigError(
            f"--search: a search with a complete trial must be named, got {header.name!r}."
        )
    first = next((trial for trial in state.trials.values() if trial.origin == "baseline"), None)
    baseline = Candidate(
        run_id=first.run_id if first else f"{header.name}:baseline",
        score=first.score if first else None,
        config=_change(header.baseline, changes),
    )
    candidates = [baseline]
    for trial in state.ranked:
        config = _change(trial.config.model_dump(mode="json"), changes)
        if (
            config not in [candidate.config for candidate in candidates]
            and len(candidates) <= num_top
        ):
            candidates.append(Candidate(run_id=trial.run_id, score=trial.score, config=config))
    return _settle(state, candidates, num_seeds, changes, is_final=False)


def make_final(
    state: SearchState, confirmation: SearchState, num_seeds: int
) -> tuple[SearchSpace, Confirmation]:
    """What is trained on all images for the test set: the baseline, and the candidate of the highest confirmed mean.

    Args:
        state: the search.
        confirmation: of it, as `check_confirmed` wants it.
    """
    confirmed = [found for found in summarise(confirmation) if found.mean is not None]
    best = max(confirmed, key=lambda found: found.mean or 0.0)
    settled = confirmation.header.confirmation
    assert settled is not None
    chosen = [c for i, c in enumerate(settled.candidates) if i == 0 or c.run_id == best.run_id]
    candidates = [c.model_copy(update={"config": _change(c.config, ALL_IMAGES)}) for c in chosen]
    return _settle(
        state, candidates, num_seeds, {**confirmation.header.pinned, **ALL_IMAGES}, is_final=True
    )


def _change(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    changed = TrainConfig(**{**config, "warm_restarts": (), **changes})
    restarts = changes.get("warm_restarts", config.get("warm_restarts", ()))
    changed = changed.model_copy(
        update={"warm_restarts": tuple(epoch for epoch in restarts if epoch < changed.epochs)}
    )
    return changed.model_dump(mode="json")


def _settle(
    state: SearchState,
    candidates: list[Candidate],
    num_seeds: int,
    changes: Mapping[str, Any],
    is_final: bool,
) -> tuple[SearchSpace, Confirmation]:
    used = state.header.baseline["seed"]
    seeds = [seed for seed in range(num_seeds + 1) if seed != used][:num_seeds]
    confirmation = Confirmation(
        search=state.header.name, candidates=candidates, seeds=seeds, final=is_final
    )
    baseline = TrainConfig(**candidates[0].config)
    budget = Budget(
        trials=confirmation.num_trials,
        fidelity="epochs",
        rungs=(baseline.epochs,),
        reduction_factor=2,
        sampler=SamplerBudget(kind="random"),
        seed=state.header.seed,
    )
    from tune_cifar.search.resume import restore_space

    space = restore_space(state.header)
    space = replace(space, baseline=baseline, budget=budget, pinned=dict(changes), points=())
    return replace(space, distributions={}, dropped={}), confirmation


def find_confirmation(
    states: Sequence[SearchState], search: str, is_final: bool
) -> SearchState | None:
    """The newest confirmation of a search among these, or the newest with test openings; None without one."""
    found = [
        state
        for state in states
        if (settled := state.header.confirmation) is not None
        and (settled.search, settled.final) == (search, is_final)
    ]
    return (
        max(found, key=lambda state: (state.header.created, state.header.name)) if found else None
    )


def check_confirmed(state: SearchState | None, search: str) -> SearchState:
    """A finished confirmation, which chooses what the test set judges.

    Raises:
        RecordError: when there is none, it has not come to its end, or none of its trainings has a score.
    """
    if state is None:
        way_out = f"First: python -m tune_cifar confirm --search {search}"
        raise RecordError(
            f"--final: search {search} must be confirmed, got no confirmation of it. {way_out}"
        )
    if not state.is_finished:
        way_out = f"First: python -m tune_cifar confirm --search {search} --resume"
        raise RecordError(
            f"--final: {state.header.name} must have come to its end, got an unfinished one. {way_out}"
        )
    if all(found.mean is None for found in summarise(state)):
        way_out = f"See: python -m tune_cifar failures --search {state.header.name}"
        raise RecordError(
            f"--final: a training of {state.header.name} must have a score, got none. {way_out}"
        )
    return state


def summarise(state: SearchState) -> list[Confirmed]:
    """The candidates of a confirmation by validation accuracy, the baseline first."""
    scores = {
        trial.number: trial.score for trial in state.trials.values() if trial.score is not None
    }
    return _compare(state, scores)


def summarise_tests(state: SearchState, openings: Sequence[TestEvaluation]) -> list[Confirmed]:
    """The candidates of a final confirmation by test accuracy, as far as the test set was opened for them: for the same
    training under any name, since it is opened for none twice. A diverged one counts as chance."""
    data = state.header.data.name
    known = {opening.fingerprint: opening.test_acc for opening in openings if opening.data == data}
    found = {
        trial.number: trial.score if trial.status == "diverged" else known.get(trial.fingerprint)
        for trial in state.trials.values()
    }
    return _compare(state, {number: acc for number, acc in found.items() if acc is not None})


def _compare(state: SearchState, scores: Mapping[int, float]) -> list[Confirmed]:
    settled = state.header.confirmation
    assert settled is not None, "a confirmation is wanted"
    by_candidate: list[dict[int, float]] = [{} for _ in settled.candidates]
    for number, score in sorted(scores.items()):
        seed_index, index = divmod(number, len(settled.candidates))
        by_candidate[index][settled.seeds[seed_index]] = score
    baseline = by_candidate[0]
    return [
        Confirmed(
            run_id=candidate.run_id,
            search_score=candidate.score,
            scores=found,
            gain=None
            if i == 0
            else compare_pairs([(found[s], baseline[s]) for s in found if s in baseline]),
            same_recipe=not state.header.pinned,
        )
        for i, (candidate, found) in enumerate(zip(settled.candidates, by_candidate, strict=True))
    ]


def compare_pairs(pairs: Sequence[tuple[float, float]]) -> Gain | None:
    """The mean of first minus second with its interval; None without a pair."""
    from scipy.special import (
        stdtrit,
    )  # Student's t by degrees of freedom and probability; scipy.stats takes longer

    if not pairs:
        return None
    differences = [first - second for first, second in pairs]
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return Gain(mean, None, n)
    half = (
        float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * statistics.stdev(differences) / math.sqrt(n)
    )
    return Gain(mean, (mean - half, mean + half), n)
