"""Confirmation: a search's best trials trained again under new seeds, beside the baseline.

The best of many scores was chosen partly by luck (the winner's curse). A mean over seeds that were
not part of the choice is unbiased. A gain is a mean over pairs of equal seeds, since a seed affects
both trainings of a pair. A final confirmation trains the confirmed recipe on all 50,000 images for
the test set.

torch, Optuna and scipy are imported where they are needed: the leaderboard needs neither torch nor
Optuna.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tune_cifar.dataset import CIFAR10, DataDescription
from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record.events import KIND_WORDS, Candidate, Confirmation
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import load_searches
from tune_cifar.record.test_log import TestEvaluation
from tune_cifar.schema import MAX_SEED, TrainConfig
from tune_cifar.space.layout import MAX_TRIALS, Budget, SamplerBudget
from tune_cifar.space.select import SearchSpace

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Gain:
    """A mean difference over pairs of equal seeds, a fraction.

    Attributes:
        interval: 95 % interval of the mean by Student's t; None with fewer than two pairs.
    """

    mean: float
    interval: tuple[float, float] | None
    num_pairs: int


@dataclass(frozen=True)
class Confirmed:
    """A candidate under its new seeds.

    Attributes:
        search_score: its score in the search.
        scores: accuracy by seed, of the ended trainings; a diverged one counts as chance.
        sd: standard deviation over the seeds, None with fewer than two.
        gain: over the baseline; None of the baseline itself and without a pair.
        same_recipe: whether it is trained as in the search; otherwise the scores do not compare.
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

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        gain = None
        if self.gain is not None:
            interval, num_pairs = self.gain.interval, self.gain.num_pairs
            gain = {"mean": self.gain.mean, "interval": interval, "pairs": num_pairs}
        return {
            "run_id": self.run_id,
            "search_score": self.search_score,
            "scores": {str(seed): score for seed, score in self.scores.items()},
            "mean": self.mean,
            "sd": self.sd,
            "gain": gain,
        }


def make_confirmation(
    state: SearchState,
    num_top: int,
    num_seeds: int,
    changes: Mapping[str, Any],
    epochs: int | None = None,
) -> tuple[SearchSpace, Confirmation]:
    """Return what confirms a search: its baseline and best complete trials, each under new seeds.

    Args:
        num_top: of the best trials; those that `changes` makes equal count once.
        num_seeds: for each; the search's own seeds are left out.
        changes: values of knobs for all candidates, such as train_size.
        epochs: of each training, of this confirmation alone: a final one has the recipe's. None is
            the recipe's.

    Raises:
        ConfigError: when the record is not a search, no trial is complete, or a change breaks a
            rule of the schema, changes the seed or leaves no validation images.
    """
    header = state.header
    if header.kind != "search":
        kind = KIND_WORDS[header.kind]
        raise ConfigError(f"`search` must be the name of a search, got {header.name}, {kind}.")
    if "seed" in changes:
        rule = "must not change seed, since every candidate is trained under several"
        raise ConfigError(f"`settings` {rule}. Use `seeds`.")
    if changes.get("val_size") == 0:
        hint = "Candidates are compared on the validation images; `final=True` needs none."
        raise ConfigError(f"`settings`: val_size >= 1 must hold, got 0. {hint}")
    if epochs is not None:
        if "epochs" in changes:
            raise ConfigError("`settings` must not have epochs beside `epochs`. Give one of them.")
        changes = {**changes, "epochs": epochs}
    if not state.ranked:
        raise ConfigError(f"{header.name}: no trial is complete, so there is none to confirm.")
    first = next((trial for trial in state.trials.values() if trial.origin == "baseline"), None)
    baseline = Candidate(
        run_id=first.run_id if first else f"{header.name}:baseline",
        score=first.score if first else None,
        config=_change(header.baseline, changes),
    )
    candidates = [baseline]
    for trial in state.ranked:
        config = _change(trial.full_config.model_dump(mode="json"), changes)
        is_new = config not in [candidate.config for candidate in candidates]
        if is_new and len(candidates) <= num_top:
            candidates.append(Candidate(run_id=trial.run_id, score=trial.score, config=config))
    space, made = _make_space(state, candidates, num_seeds, changes, is_final=False)
    return space, made.model_copy(update={"top": num_top, "epochs": epochs})


def settle_final(
    state: SearchState, num_seeds: int, data: DataDescription
) -> tuple[SearchSpace, Confirmation]:
    """Return what the search's newest confirmation lets train for the test set: see `make_final`.

    Raises:
        RecordError: as `check_confirmed`.
    """
    name = state.header.name
    found = find_confirmation(load_searches(state.storage), name, is_final=False)
    return make_final(state, check_confirmed(found, name), num_seeds, data)


def make_final(
    state: SearchState,
    confirmation: SearchState,
    num_seeds: int,
    data: DataDescription = CIFAR10,
) -> tuple[SearchSpace, Confirmation]:
    """Return what is trained on all images for the test set: the baseline and the confirmed best.

    Args:
        state: of the search.
        confirmation: its confirmation, checked by `check_confirmed`.
        data: what the search was on.
    """
    confirmed = [found for found in summarise(confirmation) if found.mean is not None]
    best = max(confirmed, key=lambda found: found.mean or 0.0)
    settled = confirmation.header.confirmation
    assert settled is not None
    chosen = [c for i, c in enumerate(settled.candidates) if i == 0 or c.run_id == best.run_id]
    changes = {**confirmation.header.pinned, **data.all_images}
    if settled.epochs is not None:
        del changes["epochs"]
    recipes = {trial.run_id: trial.full_config.model_dump(mode="json") for trial in state.ranked}
    recipes[chosen[0].run_id] = state.header.baseline
    candidates = [
        found.model_copy(update={"config": _change(recipes[found.run_id], changes)})
        for found in chosen
    ]
    return _make_space(state, candidates, num_seeds, changes, is_final=True)


def _change(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a changed configuration; warm restarts after the last epoch are dropped."""
    changed = TrainConfig(**{**config, "warm_restarts": (), **changes})
    restarts = changes.get("warm_restarts", config.get("warm_restarts", ()))
    kept = tuple(epoch for epoch in restarts if epoch < changed.epochs)
    return changed.model_copy(update={"warm_restarts": kept}).model_dump(mode="json")


def _make_space(
    state: SearchState,
    candidates: list[Candidate],
    num_seeds: int,
    changes: Mapping[str, Any],
    is_final: bool,
) -> tuple[SearchSpace, Confirmation]:
    """Return a confirmation, and the search's space without ranges and with its budget.

    Raises:
        ConfigError: when it would have no training or more than MAX_TRIALS.
    """
    from tune_cifar.search.resume import restore_space

    largest = MAX_TRIALS // len(candidates)
    if not 1 <= num_seeds <= largest:
        rule = f"`seeds` must be 1 to {largest} (with {len(candidates)} candidates)"
        raise ConfigError(f"{rule}, got {num_seeds}.")
    first, num_used = state.header.baseline["seed"], state.header.budget.get("replicates", 1)
    used = range(first, first + num_used)
    seeds = [seed for seed in range(num_seeds + num_used) if seed not in used][:num_seeds]
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
        # It draws nothing; old records may have one out of bounds.
        seed=min(max(0, state.header.seed), MAX_SEED),
    )
    space = restore_space(state.header)
    space = replace(space, baseline=baseline, budget=budget, pinned=dict(changes), points=())
    return replace(space, distributions={}, dropped={}), confirmation


def find_confirmation(
    states: Sequence[SearchState], search: str, is_final: bool
) -> SearchState | None:
    """Return the newest confirmation (or final confirmation) of a search, or None."""
    found = []
    for state in states:
        settled = state.header.confirmation
        if settled is not None and (settled.search, settled.final) == (search, is_final):
            found.append(state)
    return max(found, key=lambda state: (state.header.created, state.header.name), default=None)


def check_confirmed(state: SearchState | None, search: str) -> SearchState:
    """Return a confirmation that may choose what is evaluated on the test set.

    Raises:
        RecordError: when there is none, it is not finished, or none of its trainings has a score.
    """
    if state is None:
        hint = "Confirm it first, without `final`."
        raise RecordError(f"`final`: search {search} is not confirmed. {hint}")
    name = state.header.name
    if not state.is_finished:
        hint = "Continue it first: `resume=True`, without `final`."
        raise RecordError(f"`final`: confirmation {name} is not finished. {hint}")
    if all(found.mean is None for found in summarise(state)):
        hint = f"`failures --search {name}` says why."
        raise RecordError(f"`final`: no training of confirmation {name} has a score. {hint}")
    return state


def summarise(state: SearchState) -> list[Confirmed]:
    """Return the candidates of a confirmation by validation accuracy, the baseline first."""
    trials = state.trials.values()
    scores = {trial.number: trial.score for trial in trials if trial.score is not None}
    return _compare(state, scores)


def summarise_tests(state: SearchState, evaluations: Sequence[TestEvaluation]) -> list[Confirmed]:
    """Return the candidates of a final confirmation by test accuracy, as far as it is known.

    A test evaluation of the same training under another name counts, since no training is evaluated
    twice; of several (`--again`) the first. A diverged training counts as chance.

    Args:
        evaluations: the test logs, oldest first.
    """
    known: dict[str, float] = {}
    for found in evaluations:
        if found.is_on(state.header.data):
            known.setdefault(found.fingerprint, found.test_acc)
    scores = {}
    for trial in state.trials.values():
        is_diverged = trial.status == "diverged"
        score = trial.score if is_diverged else known.get(trial.fingerprint)
        if score is not None:
            scores[trial.number] = score
    return _compare(state, scores)


def _compare(state: SearchState, scores: Mapping[int, float]) -> list[Confirmed]:
    """Return the candidates of a confirmation from the scores by trial number."""
    settled = state.header.confirmation
    assert settled is not None, "a confirmation is wanted"
    by_candidate: list[dict[int, float]] = [{} for _ in settled.candidates]
    for number, score in sorted(scores.items()):
        seed_index, index = divmod(number, len(settled.candidates))
        by_candidate[index][settled.seeds[seed_index]] = score
    baseline, confirmed = by_candidate[0], []
    for i, (candidate, found) in enumerate(zip(settled.candidates, by_candidate, strict=True)):
        pairs = [(found[seed], baseline[seed]) for seed in found if seed in baseline]
        confirmed.append(
            Confirmed(
                run_id=candidate.run_id,
                search_score=candidate.score,
                scores=found,
                gain=compare_pairs(pairs) if i > 0 else None,
                same_recipe=not state.header.pinned,
            )
        )
    return confirmed


def compare_pairs(pairs: Sequence[tuple[float, float]]) -> Gain | None:
    """Return the mean of first minus second with its 95 % interval; None without a pair."""
    # stdtrit: Student's t by degrees of freedom and probability. Importing scipy.stats takes
    # longer.
    from scipy.special import stdtrit

    if not pairs:
        return None
    differences = [first - second for first, second in pairs]
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return Gain(mean, None, n)
    quantile = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2))
    half = quantile * statistics.stdev(differences) / math.sqrt(n)
    return Gain(mean, (mean - half, mean + half), n)
