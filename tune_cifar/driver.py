"""The decisions of a search, without Ray: what to try next, what a result means, when a trial ends.

Everything decided here is in the record before anyone hears of it. `search.py` hands Tune's calls to this class.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tune_cifar.checkpoint import CheckpointFolder
from tune_cifar.fidelity import keep
from tune_cifar.record import EndStatus, EpochReported, Event, Record, SearchEnded, TrialEnded, TrialStarted, TrialState
from tune_cifar.sampler import Sampler
from tune_cifar.schema import CHANCE_ACCURACY, EpochResult
from tune_cifar.space import SearchSpace
from tune_cifar.train import CHECKPOINTS, WEIGHTS, Listener, relative, write_error


class SearchDriver:
    """Proposes, judges and records the trials of one search. Every decision follows the record's order, never a clock;
    the clock only ends the whole search, and what still runs then is cut and recorded as stopped.

    Args:
        record: a fresh record whose header describes the space.
        listener: called after every recorded event.
    """

    def __init__(self, record: Record, space: SearchSpace, listener: Listener) -> None:
        self.record = record
        self._space = space
        self._listener = listener
        self._sampler = Sampler(space, record.state.header.seed)
        self._start = time.monotonic()
        limit = space.budget.max_time_seconds
        self._deadline = None if limit is None else self._start + limit
        self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher and scheduler for a restore of its own, which is never used."""
        return {}

    @property
    def is_over_time(self) -> bool:
        """True once the search's time is used up."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def ask(self) -> TrialState | None:
        """Record and return the next trial, or None when no further one is wanted."""
        if self._next >= self._space.budget.trials or self.is_over_time:
            return None
        params, origin = self._sampler.ask(self._next)
        config = self._space.config(params)
        self._append(
            TrialStarted(
                trial=self._next,
                origin=origin,
                params=params,
                config=config.model_dump(mode="json"),
                fingerprint=config.fingerprint,
            )
        )
        self._next += 1
        return self.record.state.trials[self._next - 1]

    def report(self, number: int, result: EpochResult) -> bool:
        """Record an epoch; True when the trial goes on. The baseline is never stopped at a rung: every gain is
        measured against it."""
        trial = self.record.state.trials[number]
        if result.epoch <= trial.epochs_done:  # a resumed trial tells again what its checkpoint knew
            return True
        self._append(EpochReported(trial=number, result=result))
        if result.epoch == trial.config.epochs:
            self._keep_best_weights(trial, result)
            return False
        budget = self._space.budget
        if result.epoch not in budget.rungs or result.val_acc is None or trial.origin == "baseline":
            return True
        scores = list(self.record.state.rung_scores([result.epoch])[result.epoch].values())
        if keep(result.val_acc, scores, budget.reduction_factor):
            return True
        better = sum(score > result.val_acc for score in scores)
        reason = f"rung {result.epoch}: {better} of {len(scores)} scores were better"
        self.end(number, "stopped", reason)
        return False

    def end(self, number: int, status: EndStatus, reason: str, error_file: Path | None = None) -> None:
        """Record a trial's end, tell the sampler, and delete the checkpoints that no one will go on from."""
        trial = self.record.state.trials[number]
        folder = self.record.state.trial_folder(number)
        score = {"complete": trial.epochs[-1].val_acc if trial.epochs else None, "diverged": CHANCE_ACCURACY}.get(
            status
        )
        weights = folder / WEIGHTS if status == "complete" else None
        self._append(
            TrialEnded(
                trial=number,
                status=status,
                score=score,
                reason=reason,
                error_file=relative(self.record, error_file) if error_file else None,
                weights_file=relative(self.record, weights) if weights and weights.exists() else None,
            )
        )
        rungs = {
            r.epoch: r.val_acc for r in trial.epochs if r.epoch in self._space.budget.rungs and r.val_acc is not None
        }
        self._sampler.tell(number, status, rungs, score)
        CheckpointFolder(folder / CHECKPOINTS).delete()

    def fail(self, number: int, text: str) -> None:
        """Record a failed trial and keep its traceback in its folder."""
        path = write_error(self.record.state.trial_folder(number), text)
        self.end(number, "failed", text.strip().splitlines()[-1][:500], path)

    def finish(self) -> None:
        """Record the end of the search and why; trials that still ran are cut and recorded as stopped. Tune returns
        early without a word on Ctrl-C, so what is neither done nor out of time was interrupted."""
        statuses = [trial.status for trial in self.record.state.trials.values()]
        if "running" not in statuses and len(statuses) == self._space.budget.trials:
            reason = "all trials"
        else:
            reason = "time limit" if self.is_over_time else "interrupted"
        for number, trial in self.record.state.trials.items():
            if trial.status == "running":
                self.end(number, "stopped", f"cut after epoch {trial.epochs_done}: {reason}")
        self._append(SearchEnded(reason=reason, wall_seconds=time.monotonic() - self._start))

    def _keep_best_weights(self, trial: TrialState, result: EpochResult) -> None:
        """End a trial that ran to its end; of all weights only the best trial's stay on disk."""
        best = self.record.state.best
        self.end(trial.number, "complete", "all epochs")
        if best is None:
            return
        new_best = self.record.state.best
        loser = trial if new_best is best else best
        (self.record.state.trial_folder(loser.number) / WEIGHTS).unlink(missing_ok=True)

    def _append(self, event: Event) -> None:
        self.record.append(event)
        self._listener(self.record.state, event)
