"""The decisions of a search, without Ray: which trial runs next, whether it goes on, when it ends.

Every decision is written to the record before the listener is called, and the driver's state is
read from the record. So a new driver on the record of one that died takes the decisions which that
one would have taken. `run.py` passes Ray Tune's calls on to this class.
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
    NodeChanged,
    SearchEnded,
    Stage,
    TrialEnded,
    TrialPlaced,
    TrialRetried,
    TrialStarted,
    utc_now,
)
from tune_cifar.record.files import CHECKPOINTS, WEIGHTS, stop_file
from tune_cifar.record.journal import Record
from tune_cifar.record.state import INTERRUPTED, TIME_LIMIT, SearchState, TrialState
from tune_cifar.schema import EpochResult
from tune_cifar.search.goals import find_reached_goal
from tune_cifar.search.rungs import is_promoted, list_compared, list_stages
from tune_cifar.search.sampler import Confirmer, Sampler
from tune_cifar.space.select import SearchSpace
from tune_cifar.train.checkpoint import CheckpointFolder
from tune_cifar.train.recorded import Listener, relative, write_error

# Times that a trial is retried after a fault that may not be its own, before it counts as failed.
RETRIES: dict[Fault, int] = {
    "worker died": 2,
    "out of memory": 1,
    "failed at its start": 1,
    "node lost": 20,  # preemptible machines come and go
}
# After the first Ctrl-C, running trials have this long to finish and checkpoint their epoch.
GRACE_SECONDS = 30.0


class SearchDriver:
    """Proposes, compares and records the trials of one search.

    Decisions follow the order of the record, never a clock. The time limit only ends the whole
    search: trials that still run are recorded as stopped.

    Args:
        record: of a new search, or of one to resume, whose unfinished trials run first.
        listener: called after every recorded event.
        keep_weights: number of best complete trials whose weights stay on disk.
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
        self._stages = list_stages(space.budget)
        self._proposer = _make_proposer(space, record.state)
        self._start = time.monotonic()
        limit = space.budget.max_time_seconds
        self._deadline = None if limit is None else self._start + limit
        self._running: set[int] = set()
        self.attempts = {n: len(trial.nodes) for n, trial in record.state.trials.items()}
        self._best: list[tuple[float, int]] = []
        for trial in record.state.trials.values():
            self._keep_weights_if_best(trial)
        stop_file(record.state.folder).unlink(missing_ok=True)
        unfinished = self._list_unfinished()
        # The driver before may have died between a trial's last result and the decision on it.
        self._waiting = deque(trial.number for trial in unfinished if self._decide(trial))

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its searcher and scheduler, but never reads them."""
        return {}

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which trials are compared; the last one ends a trial."""
        return self._space.budget.rungs

    @property
    def running(self) -> frozenset[int]:
        """The trials that were asked for and have neither ended nor stopped."""
        return frozenset(self._running)

    @property
    def is_over_time(self) -> bool:
        """True once the search's time is used up."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    @property
    def is_exhausted(self) -> bool:
        """True when no trial runs and no more will start."""
        has_more = bool(self._waiting) or self._wants_more
        return not self._running and (self._is_ending or not has_more)

    @property
    def is_cut(self) -> bool:
        """True when everything must stop at once, in the middle of an epoch if need be."""
        if self.fault is not None:
            return True
        if self.is_interrupted:
            return not self._running or time.monotonic() >= self._grace_end
        return self.is_over_time

    @property
    def _is_ending(self) -> bool:
        return self.is_interrupted or self.is_over_time or self.fault is not None

    @property
    def _reached_goal(self) -> str | None:
        return find_reached_goal(self.record.state.trials.values(), self._space.budget)

    @property
    def _wants_more(self) -> bool:
        is_short = len(self.record.state.trials) < self._space.budget.trials
        return is_short and self._reached_goal is None

    def interrupt(self) -> None:
        """Start no further trial; stop running ones with a checkpoint after their epoch.

        They stay unfinished. Safe in a signal handler: the record is not touched.
        """
        self.is_interrupted = True
        self._grace_end = time.monotonic() + GRACE_SECONDS
        with suppress(OSError):  # on a full disk no checkpoint fits either: GRACE_SECONDS end it
            stop_file(self.record.state.folder).touch()

    def ask(self) -> TrialState | None:
        """Return the next trial to run: an unfinished one, else a new one, which is recorded.

        None when there is none now; `is_exhausted` says whether to ask again.
        """
        trials = self.record.state.trials
        if self._is_ending or any(must_run_alone(trials[number]) for number in self._running):
            return None
        if self._waiting:
            shared = [number for number in self._waiting if not must_run_alone(trials[number])]
            if not shared and self._running:
                return None
            number = shared[0] if shared else self._waiting[0]
            self._waiting.remove(number)
        elif self._wants_more:
            number = self._start_trial()
        else:
            return None
        self._running.add(number)
        self.attempts[number] = self.attempts.get(number, 0) + 1
        return trials[number]

    def _start_trial(self) -> int:
        """Record a new trial and return its number."""
        trials = self.record.state.trials
        number = len(trials)
        params, origin, config = self._proposer.propose(number, trials.values())
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

    def list_remaining_stages(self, trial: TrialState) -> tuple[Stage, ...]:
        """Return the trial's unfinished stages, the one that it is in first."""
        if trial.stage is None:
            return self._stages
        current = Stage(trial.stage, trial.replicate)
        is_over = len(trial.epochs) == trial.stage
        return tuple(s for s in self._stages if s > current or (s == current and not is_over))

    def report(self, number: int, stage: Stage, result: EpochResult) -> bool:
        """Record an epoch of a stage; return whether the trial goes on."""
        trial = self.record.state.trials[number]
        current = Stage(trial.stage or self._stages[0].length, trial.replicate)
        recorded = (current, len(trial.epochs))
        if (stage, result.epoch) <= recorded:  # a resumed trial repeats its checkpoint's epochs
            return True
        where = self._name_stage(stage)
        self._append(EpochReported(trial=number, result=result, **where))
        return self._decide(trial)

    def _name_stage(self, stage: Stage) -> dict[str, int]:
        """Return an event's fields for a stage; none where trials have a single one."""
        if len(self._stages) == 1:
            return {}
        return {"cycle": stage.length, "replicate": stage.replicate}

    def change_node(self, node: NodeChanged) -> None:
        """Record that a node of the cluster takes part, is lost or is left out."""
        if self.record.state.nodes.get(node.node) != node:
            self._append(node)

    def place(self, number: int, node: NodeChanged) -> None:
        """Record that the trial's newest attempt trains on a node."""
        self.change_node(node)
        self._append(TrialPlaced(trial=number, node=node.node, attempt=self.attempts[number]))

    def requeue(self, number: int) -> None:
        """Queue a trial again whose attempt ended by no fault of its own, or never began."""
        self._running.discard(number)
        if number not in self._waiting:
            self._waiting.append(number)

    def pause(self, number: int) -> None:
        """Note that a trial has stopped with a checkpoint; it stays unfinished."""
        self._running.discard(number)

    def _decide(self, trial: TrialState) -> bool:
        """Return whether a trial goes on after its last epoch; record its end if it does not.

        Only the scores that had arrived by then count, so that a later call gives the same answer.
        The baseline is never stopped at a rung: every gain is measured against it.
        """
        if not trial.epochs:
            return True
        last, budget = trial.epochs[-1], self._space.budget
        if last.epoch == trial.full_config.epochs:
            if trial.replicate + 1 < trial.num_replicates:
                return True
            self.end(trial.number, "complete", "all epochs")
            self._keep_weights_if_best(trial)
            return False
        is_rung = last.epoch in self.rungs and trial.stage in (None, last.epoch)
        if not is_rung or last.val_acc is None or trial.origin == "baseline":
            return True
        arrivals = self.record.state.arrivals[last.epoch]
        arrived = list(arrivals.values())[: list(arrivals).index(trial.number) + 1]
        scores = list_compared(arrived, budget.window)
        if is_promoted(last.val_acc, scores, budget.reduction_factor):
            return True
        better = sum(score > last.val_acc for score in scores)
        of = f"{len(scores)}" if len(scores) == len(arrived) else f"the last {len(scores)}"
        reason = f"rung {last.epoch}: {better} of {of} scores were better"
        self.end(trial.number, "stopped", reason)
        return False

    def end(
        self, number: int, status: EndStatus, reason: str, error_file: Path | None = None
    ) -> None:
        """Record a trial's end; delete its checkpoints and, unless it is complete, its weights."""
        trial = self.record.state.trials[number]
        folder = self.record.state.trial_folder(number)
        score = trial.find_score(status)
        if status != "complete":
            with suppress(OSError):  # of a shorter stage; if they stay, nothing reads them
                (folder / WEIGHTS).unlink()
        stage = None if trial.stage is None else Stage(trial.stage, trial.replicate)
        remaining = self.list_remaining_stages(trial)
        if status in ("diverged", "failed") and remaining:
            stage = remaining[0]  # the one in which it ended, even before its first epoch
        has_weights = status == "complete" and (folder / WEIGHTS).exists()
        self._running.discard(number)
        self._append(
            TrialEnded(
                trial=number,
                status=status,
                score=score,
                reason=reason,
                error_file=relative(self.record, error_file) if error_file else None,
                weights_file=relative(self.record, folder / WEIGHTS) if has_weights else None,
                time=utc_now(),
                **(self._name_stage(stage) if stage else {}),
            )
        )
        CheckpointFolder(folder / CHECKPOINTS).delete()

    def fail(self, number: int, text: str) -> None:
        """Record a failed trial and write its traceback to its folder."""
        path = write_error(self.record.state.trial_folder(number), text)
        self.end(number, "failed", text.strip().splitlines()[-1][:500], path)

    def retry(self, number: int, fault: Fault, text: str) -> None:
        """Queue a trial again, from its newest checkpoint, after a fault that may not be its own.

        After too many faults of one kind the trial has failed. One that ran out of memory
        runs alone.
        """
        trial = self.record.state.trials[number]
        self._running.discard(number)
        if sum(retry.fault == fault for retry in trial.retries) >= RETRIES[fault]:
            self.fail(number, f"{text}\n{fault}, {RETRIES[fault] + 1} times")
        else:
            checkpoints = CheckpointFolder(self.record.state.trial_folder(number) / CHECKPOINTS)
            _, damaged = checkpoints.find_newest()
            self._append(TrialRetried(trial=number, fault=fault, text="\n".join([text, *damaged])))
            self._waiting.append(number)

    def finish(self) -> None:
        """Record the end of this driver and its reason.

        At the time limit running trials are recorded as stopped; after an interrupt they stay
        unfinished. Does nothing when the record could not be written.
        """
        if self.record.file.closed:
            return
        unfinished = self._list_unfinished()
        if not unfinished and not self._wants_more:
            reason = self._reached_goal or "all trials"
        elif self.is_over_time and not self.is_interrupted and self.fault is None:
            reason = TIME_LIMIT
            for trial in unfinished:
                stage = "" if trial.stage is None else f" of the stage of {trial.stage} epochs"
                cut = f"cut after epoch {len(trial.epochs)}{stage}: {reason}"
                self.end(trial.number, "stopped", cut)
        else:
            reason = INTERRUPTED
        self._append(SearchEnded(reason=reason, wall_seconds=time.monotonic() - self._start))
        stop_file(self.record.state.folder).unlink(missing_ok=True)

    def _keep_weights_if_best(self, trial: TrialState) -> None:
        """Delete the weights of all but the best complete trials, of equal ones the first."""
        if trial.status != "complete" or trial.score is None:
            return
        heapq.heappush(self._best, (trial.score, -trial.number))
        if len(self._best) > self._keep_weights:
            _, number = heapq.heappop(self._best)
            (self.record.state.trial_folder(-number) / WEIGHTS).unlink(missing_ok=True)

    def _list_unfinished(self) -> list[TrialState]:
        return [trial for trial in self.record.state.trials.values() if trial.status == "running"]

    def _append(self, event: Event) -> None:
        self.record.append(event)
        self._listener(self.record.state, event)


def _make_proposer(space: SearchSpace, state: SearchState) -> Sampler | Confirmer:
    """Return the proposer that the header asks for; a sampler learns from the recorded trials."""
    header = state.header
    if header.confirmation is not None:
        return Confirmer(header.confirmation)
    how = (header.is_conditional, header.learned, header.data.chance)
    return Sampler(space, header.seed, *how)


def must_run_alone(trial: TrialState) -> bool:
    """Return whether the trial's last attempt ran out of memory."""
    return bool(trial.retries) and trial.retries[-1].fault == "out of memory"
