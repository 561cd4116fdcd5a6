"""A search and its trials as the events of a record tell them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from tune_cifar import schema
from tune_cifar.errors import RecordError
from tune_cifar.record.events import (
    KINDS,
    EndStatus,
    EpochReported,
    Event,
    Header,
    Origin,
    SearchEnded,
    SearchResumed,
    TrialEnded,
    TrialRetried,
    TrialStarted,
)
from tune_cifar.schema import EpochResult, Status, TrainConfig

INTERRUPTED = "interrupted"
"""The reason of a SearchEnded that leaves trials running, to be gone on with."""
TIME_LIMIT = "time limit"
"""The reason of a SearchEnded that stopped what was running."""


@dataclass
class TrialState:
    """One trial as its events tell it. A trial has a training, longer each time, for each of its stages: `epochs` and
    `config` are those of the stage that it is in. `ended_seq` is the sequence number of its end: it orders the ends."""

    number: int
    run_id: str
    origin: Origin
    params: dict[str, Any]
    full_config: TrainConfig
    """Of the longest training."""
    fingerprint: str
    started: str | None
    driver: Header | SearchResumed
    """The last that it ran under, with its Numerics and environment."""
    epochs: list[EpochResult] = field(default_factory=list)
    """Epoch n stands at index n - 1: none is missing."""
    finished_stages: list[tuple[int, EpochResult]] = field(default_factory=list)
    """Epochs of the stages before, each with its stage's length."""
    stage: int | None = None
    """Length in epochs of the stage that it is in; None before the first, and where the training has one stage."""
    scores: dict[int, float] = field(default_factory=dict)
    """val_acc by epoch, as trials are compared by it: of a trial in cycles, at the end of each."""
    retries: list[TrialRetried] = field(default_factory=list)
    status: Status = "running"
    score: float | None = None
    reason: str = ""
    error_file: str | None = None
    weights_file: str | None = None
    ended_seq: int | None = None
    ended: str | None = None

    @property
    def config(self) -> TrainConfig:
        return self.full_config if self.stage is None else self.full_config.shorten(self.stage)

    @property
    def trained_epochs(self) -> list[tuple[int, EpochResult]]:
        """Every epoch that was trained, in order, with its stage's length."""
        length = self.stage or self.full_config.epochs
        return [*self.finished_stages, *((length, result) for result in self.epochs)]

    @property
    def epochs_done(self) -> int:
        return len(self.finished_stages) + len(self.epochs)

    @property
    def val_acc(self) -> float | None:
        """Of the last reported epoch; None before the first and without validation images."""
        return self.trained_epochs[-1][1].val_acc if self.trained_epochs else None

    def find_score(self, status: EndStatus) -> float | None:
        """What a trial that ends so is compared by: its last val_acc, chance when it diverged, else nothing."""
        return {"complete": self.val_acc, "diverged": schema.CHANCE_ACCURACY}.get(status)

    def apply(self, event: EpochReported | TrialRetried | TrialEnded, seq: int) -> None:
        """The part of SearchState.apply that changes a trial."""
        kind = KINDS[type(event)]
        require(
            self.status == "running",
            self.run_id,
            f"a {self.status} trial must tell no more, got {kind!r}.",
        )
        if isinstance(event, TrialRetried):
            self.retries.append(event)
            return
        rule = f"a trial in cycles must name its cycle, got {kind!r} without one in that of {self.stage} epochs."
        require(event.cycle is not None or self.stage is None, self.run_id, rule)
        done, last = len(self.epochs), self.config.epochs
        if event.cycle not in (None, self.stage):
            old, longest = self.stage or 0, self.full_config.epochs
            rule = f"a cycle must be longer than the whole one before ({old}), at most {longest}, got {event.cycle}."
            require(done == old < event.cycle <= longest, self.run_id, rule)
            done, last = 0, event.cycle
        if isinstance(event, EpochReported):
            rule = f"epoch {done + 1} of {last} must come next, got epoch {event.result.epoch}."
            require(event.result.epoch == done + 1 <= last, self.run_id, rule)
            self._begin(event.cycle)
            self.epochs.append(event.result)
            if event.score is not None:
                self.scores[event.result.epoch] = event.score
            return
        rule = f"complete must mean {self.full_config.epochs} epochs, got {done} of {last}."
        require(
            done == last == self.full_config.epochs or event.status != "complete", self.run_id, rule
        )
        score = self.find_score(event.status)
        rule = f"a {event.status} trial's score must be {score}, got {event.score}."
        require(event.score == score, self.run_id, rule)
        self._begin(event.cycle)
        self.score, self.reason, self.ended_seq, self.ended = score, event.reason, seq, event.time
        self.error_file, self.weights_file, self.status = (
            event.error_file,
            event.weights_file,
            event.status,
        )

    def _begin(self, cycle: int | None) -> None:
        if cycle is not None and cycle != self.stage:
            self.finished_stages, self.epochs, self.stage = self.trained_epochs, [], cycle
            self.fingerprint = self.config.fingerprint


@dataclass
class SearchState:
    """Everything the events of a record say; views read it, only `apply` changes it. Trials by number, in the order of
    their starts; `arrivals` has the scores by epoch and trial, in the order they were reported; `finished` is the
    last event when a driver ended; `repaired` tells what `Record.open` cut off; `num_events` is the last event's
    sequence number."""

    folder: Path
    header: Header
    trials: dict[int, TrialState] = field(default_factory=dict)
    arrivals: dict[int, dict[int, float]] = field(default_factory=dict)
    resumes: list[SearchResumed] = field(default_factory=list)
    finished: SearchEnded | None = None
    repaired: str | None = None
    num_events: int = 1

    @property
    def storage(self) -> Path:
        """The run store that the search lies in."""
        return self.folder.parents[1]

    @property
    def is_finished(self) -> bool:
        """True when the search came to its end; an interrupted one, or one whose driver died, may be gone on with."""
        return self.finished is not None and self.finished.reason != INTERRUPTED

    @property
    def num_trials(self) -> int:
        """How many trials the search is to have, as the last driver was told."""
        return self.resumes[-1].trials if self.resumes else int(self.header.budget["trials"])

    @property
    def baseline_score(self) -> float | None:
        """Score of the baseline trial, the yardstick of every gain; None unless it is complete."""
        return next(
            (
                t.score
                for t in self.trials.values()
                if t.origin == "baseline" and t.status == "complete"
            ),
            None,
        )

    @property
    def ranked(self) -> list[TrialState]:
        """The complete trials that have a score, best first, of equals the lowest number first."""
        scored = [
            (-trial.score, trial.number)
            for trial in self.trials.values()
            if trial.status == "complete" and trial.score is not None
        ]
        return [self.trials[number] for _, number in sorted(scored)]

    @property
    def best(self) -> TrialState | None:
        """The first of `ranked`; None while there is none."""
        return next(iter(self.ranked), None)

    @property
    def counts(self) -> dict[Status, int]:
        """Number of trials of every status, zeros included."""
        return {
            status: sum(t.status == status for t in self.trials.values())
            for status in get_args(Status)
        }

    def trial_folder(self, number: int) -> Path:
        """A trial's own folder, existing or not: checkpoints, error, weights."""
        return self.folder / "trials" / f"{number:04d}"

    def apply(self, event: Event) -> None:
        """Take in the next event. Refused (RecordError, ConfigError), and nothing changed, when it may not follow."""
        name, kind = self.header.name, KINDS[type(event)]
        if isinstance(event, SearchResumed):
            self.resumes.append(event)
            self.finished = None
            for trial in self.trials.values():
                trial.driver = event if trial.status == "running" else trial.driver
            self.num_events += 1
            return
        require(
            self.finished is None,
            name,
            f"nothing but a resume may follow the end of a search, got {kind!r}.",
        )
        if isinstance(event, TrialStarted):
            run_id = f"{name}:{event.trial}"
            require(
                event.trial not in self.trials,
                run_id,
                "a trial must start once, got a second start.",
            )
            known = (
                event.origin,
                event.params,
                TrainConfig(**event.config),
                event.fingerprint,
                event.time,
            )
            driver = self.resumes[-1] if self.resumes else self.header
            self.trials[event.trial] = TrialState(event.trial, run_id, *known, driver)
        elif isinstance(event, EpochReported | TrialRetried | TrialEnded):
            require(
                event.trial in self.trials,
                name,
                f"trial {event.trial} must start first, got {kind!r}.",
            )
            self.trials[event.trial].apply(event, self.num_events + 1)
            if isinstance(event, EpochReported) and event.score is not None:
                self.arrivals.setdefault(event.result.epoch, {})[event.trial] = event.score
        elif isinstance(event, SearchEnded):
            self.finished = event
        else:
            raise RecordError(f"{name}: a header must come once, got a second one.")
        self.num_events += 1


def require(holds: bool, where: str, rule: str) -> None:
    if not holds:
        raise RecordError(f"{where}: {rule}")
