"""The decisions of a search, without Ray: what to try next, what a result means, when a trial ends.

Everything decided here is in the record before anyone hears of it, and everything a driver knows it has from the
record: a new driver on the record of one that died decides what that one would have. `search.py` hands Tune's calls to
this class.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from tune_cifar.record.events import (
    EndStatus,
    EpochReported,
    Event,
    Fault,
    SearchEnded,
    TrialEnded,
    TrialRetried,
    TrialStarted,
    utc_now,
)
from tune_cifar.record.journal import Record
from tune_cifar.record.state import INTERRUPTED, TIME_LIMIT, SearchState, TrialState
from tune_cifar.schema import EpochResult
from tune_cifar.search.rungs import keep, list_stages
from tune_cifar.search.sampler import Confirmer, Proposer, Sampler
from tune_cifar.space.select import SearchSpace
from tune_cifar.train.checkpoint import CheckpointFolder
from tune_cifar.train.recorded import Listener, relative, write_error
from tune_cifar.train.trial import CHECKPOINTS, WEIGHTS, stop_file

# How often a trial is taken up again after a fault that may not be its own, before it counts as failed.
RETRIES: dict[Fault, int] = {"worker died": 2, "out of memory": 1}
# After the first Ctrl-C running trials may finish and checkpoint their epoch for so long.
GRACE_SECONDS = 30.0


class SearchDriver:
    """Proposes, judges and records the trials of one search. Every decision follows the record's order, never a clock;
    the clock only ends the whole search, and what still runs then is cut and recorded as stopped.

    Args:
        record: of a new search, or of one to go on with: its unfinished trials are asked for again first.
        listener: called after every recorded event.
        keep_weights: of so many best complete trials the weights stay on disk.
    """

    def __init__(
        self, record: Record, space: SearchSpace, listener: Listener, keep_weights: int = 1
    ) -> None:
        self.record = record
        self.is_interrupted = False
        self.fault: Exception | None = None
        self._space = space
        self._listener = listener
        self._keep_weights = keep_weights
        self._cycles = list_stages(space.budget)
        self._proposer = _make_proposer(space, record.state)
        self._start = time.monotonic()
        limit = space.budget.max_time_seconds
        self._deadline = None if limit is None else self._start + limit
        self._live: set[int] = set()
        self._best: list[tuple[float, int]] = []
        for trial in record.state.trials.values():
            self._keep_weights_if_best(trial)
        stop_file(record.state.folder).unlink(missing_ok=True)
        unfinished = [trial for trial in record.state.trials.values() if trial.status == "running"]
        # The driver before may have died between a trial's last result and what followed from it.
        self._waiting = deque(trial.number for trial in unfinished if self._judge(trial))

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher and scheduler for a restore of its own, which is never used."""
        return {}

    @property
    def rungs(self) -> tuple[int, ...]:
        """The epochs after which a trial is judged, the last one among them."""
        return self._space.budget.rungs

    @property
    def is_over_time(self) -> bool:
        """True once the search's time is used up."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    @property
    def is_exhausted(self) -> bool:
        """True when no trial runs and none will be asked for."""
        return not self._live and (self._is_ending or (not self._waiting and not self._wants_more))

    @property
    def is_cut(self) -> bool:
        """True when everything must stop at once, in the middle of an epoch if need be."""
        if self.fault is not None:
            return True
        if self.is_interrupted:
            return not self._live or time.monotonic() >= self._grace_end
        return self.is_over_time

    @property
    def _is_ending(self) -> bool:
        return self.is_interrupted or self.is_over_time or self.fault is not None

    @property
    def _wants_more(self) -> bool:
        return len(self.record.state.trials) < self._space.budget.trials

    def interrupt(self) -> None:
        """No further trial; those that run checkpoint at the end of their epoch and stay unfinished. Safe to call from
        a signal's handler: the record is not touched."""
        self.is_interrupted = True
        self._grace_end = time.monotonic() + GRACE_SECONDS
        with suppress(
            OSError
        ):  # a full disk: then nothing can be saved either, and the time runs out
            stop_file(self.record.state.folder).touch()

    def ask(self) -> TrialState | None:
        """The next trial to run: one to go on with, else a new one, recorded. None when there is none now:
        `is_exhausted` says whether to ask again."""
        trials = self.record.state.trials
        if self._is_ending or any(_must_be_alone(trials[number]) for number in self._live):
            return None
        if self._waiting:
            number = next(
                (n for n in self._waiting if not _must_be_alone(trials[n])), self._waiting[0]
            )
            if _must_be_alone(trials[number]) and self._live:
                return None
            self._waiting.remove(number)
        elif self._wants_more:
            number = self._start_trial()
        else:
            return None
        self._live.add(number)
        return trials[number]

    def _start_trial(self) -> int:
        number = len(self.record.state.trials)
        params, origin, config = self._proposer.propose(number)
        self._append(
            TrialStarted(
                trial=number,
                origin=origin,
                params=params,
                config=config.model_dump(mode="json"),
                fingerprint=config.fingerprint,
                time=utc_now(),
            )
        )
        return number

    def list_remaining_stages(self, trial: TrialState) -> tuple[int, ...]:
        """Lengths of the trainings that the trial has before it, that which it is in first."""
        done = len(trial.epochs)
        return tuple(
            c
            for c in self._cycles
            if trial.stage is None or c > trial.stage or c == trial.stage > done
        )

    def report(self, number: int, cycle: int, result: EpochResult) -> bool:
        """Record an epoch of a training of so many (`cycle`); True when the trial goes on."""
        trial = self.record.state.trials[number]
        known = (trial.stage or self._cycles[0], len(trial.epochs))
        if (cycle, result.epoch) <= known:  # a resumed trial tells again what its checkpoint knew
            return True
        self._append(
            EpochReported(
                trial=number, result=result, cycle=cycle if len(self._cycles) > 1 else None
            )
        )
        return self._judge(trial)

    def pause(self, number: int) -> None:
        """The trial has a checkpoint and runs no more, because the search is stopping. It stays unfinished."""
        self._live.discard(number)

    def _judge(self, trial: TrialState) -> bool:
        """Whether a trial goes on after its last reported epoch; if not, its end is recorded.

        Only the scores that had arrived by then count, so that asking again later gives the same answer. The baseline
        is never stopped at a rung: every gain is measured against it.
        """
        if not trial.epochs:
            return True
        last, budget = trial.epochs[-1], self._space.budget
        if last.epoch == trial.full_config.epochs:
            self.end(trial.number, "complete", "all epochs")
            self._keep_weights_if_best(trial)
            return False
        is_rung = last.epoch in self.rungs and trial.stage in (None, last.epoch)
        if not is_rung or last.val_acc is None or trial.origin == "baseline":
            return True
        arrivals = self.record.state.arrivals[last.epoch]
        scores = list(arrivals.values())[: list(arrivals).index(trial.number) + 1]
        if keep(last.val_acc, scores, budget.reduction_factor):
            return True
        better = sum(score > last.val_acc for score in scores)
        self.end(
            trial.number,
            "stopped",
            f"rung {last.epoch}: {better} of {len(scores)} scores were better",
        )
        return False

    def end(
        self, number: int, status: EndStatus, reason: str, error_file: Path | None = None
    ) -> None:
        """Record a trial's end, tell the sampler, and delete the checkpoints that no one will go on from."""
        trial = self.record.state.trials[number]
        folder = self.record.state.trial_folder(number)
        score = trial.find_score(status)
        weights = folder / WEIGHTS if status == "complete" else None
        if status != "complete":
            with suppress(OSError):  # a shorter cycle's; left behind, they are read by nobody
                (folder / WEIGHTS).unlink()
        broke = status in ("diverged", "failed") and len(self._cycles) > 1
        self._live.discard(number)
        self._append(
            TrialEnded(
                trial=number,
                status=status,
                cycle=next(iter(self.list_remaining_stages(trial)), trial.stage)
                if broke
                else trial.stage,
                score=score,
                reason=reason,
                error_file=relative(self.record, error_file) if error_file else None,
                weights_file=relative(self.record, weights)
                if weights and weights.exists()
                else None,
                time=utc_now(),
            )
        )
        rungs = {epoch: value for epoch, value in trial.scores.items() if epoch in self.rungs}
        self._proposer.tell(number, status, rungs, score)
        CheckpointFolder(folder / CHECKPOINTS).delete()

    def fail(self, number: int, text: str) -> None:
        """Record a failed trial and keep its traceback in its folder."""
        path = write_error(self.record.state.trial_folder(number), text)
        self.end(number, "failed", text.strip().splitlines()[-1][:500], path)

    def retry(self, number: int, fault: Fault, text: str) -> None:
        """Take a trial up again from its newest checkpoint after a fault that may not be its own; too many of one kind,
        and it failed. One that ran out of memory has the machine for itself."""
        trial = self.record.state.trials[number]
        self._live.discard(number)
        if sum(retry.fault == fault for retry in trial.retries) >= RETRIES[fault]:
            self.fail(number, f"{text}\n{fault}, {RETRIES[fault] + 1} times")
        else:
            checkpoints = CheckpointFolder(self.record.state.trial_folder(number) / CHECKPOINTS)
            _, damaged = checkpoints.find_newest()
            self._append(TrialRetried(trial=number, fault=fault, text="\n".join([text, *damaged])))
            self._waiting.append(number)

    def finish(self) -> None:
        """Record the end of this driver and why. Out of time, trials that still ran are cut and recorded as stopped;
        interrupted, they stay unfinished. Nothing to do when the record could not be written."""
        if self.record.file.closed:
            return
        running = [
            trial for trial in self.record.state.trials.values() if trial.status == "running"
        ]
        if not running and not self._wants_more:
            reason = "all trials"
        elif self.is_over_time and not self.is_interrupted and self.fault is None:
            reason = TIME_LIMIT
            for trial in running:
                cycle = "" if trial.stage is None else f" of a cycle of {trial.stage}"
                self.end(
                    trial.number, "stopped", f"cut after epoch {len(trial.epochs)}{cycle}: {reason}"
                )
        else:
            reason = INTERRUPTED
        self._append(SearchEnded(reason=reason, wall_seconds=time.monotonic() - self._start))
        stop_file(self.record.state.folder).unlink(missing_ok=True)

    def _keep_weights_if_best(self, trial: TrialState) -> None:
        """Of the trials seen so far only the best complete ones' weights stay; of equal ones, the earlier's."""
        if trial.status != "complete" or trial.score is None:
            return
        heapq.heappush(self._best, (trial.score, -trial.number))
        if len(self._best) > self._keep_weights:
            _, number = heapq.heappop(self._best)
            (self.record.state.trial_folder(-number) / WEIGHTS).unlink(missing_ok=True)

    def _append(self, event: Event) -> None:
        self.record.append(event)
        self._listener(self.record.state, event)


def _make_proposer(space: SearchSpace, state: SearchState) -> Proposer:
    """As the header says: settled trials, or a sampler with the recorded past told to it."""
    header = state.header
    if header.confirmation is not None:
        return Confirmer(header.confirmation)
    return Sampler(space, header.seed, state.trials.values())


def _must_be_alone(trial: TrialState) -> bool:
    """Its last attempt ran out of memory beside others."""
    return bool(trial.retries) and trial.retries[-1].fault == "out of memory"
