"""The state of a search and of its trials, as the events of its record give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from tune_cifar import schema
from tune_cifar.errors import RecordError
from tune_cifar.record.events import (
    KINDS,
    EndStatus,
    EpochReported,
    Event,
    Header,
    NodeChanged,
    Origin,
    SearchEnded,
    SearchResumed,
    TrialEnded,
    TrialPlaced,
    TrialRetried,
    TrialStarted,
)
from tune_cifar.record.files import trial_folder
from tune_cifar.schema import EpochResult, Numerics, Status, TrainConfig

INTERRUPTED = "interrupted"
"""The reason of a SearchEnded that leaves trials running, to be resumed."""
TIME_LIMIT = "time limit"
"""The reason of a SearchEnded that stopped the running trials."""


@dataclass
class TrialState:
    """The state of a trial.

    A trial has a stage for each rung, a training from scratch each, longer each time, the last one
    perhaps repeated under other seeds (replicates); or one stage, when its training is a single
    schedule.
    """

    number: int
    run_id: str
    origin: Origin
    params: dict[str, Any]
    full_config: TrainConfig
    """Of the longest stage's first replicate."""
    fingerprint: str
    """Of the current stage's config."""
    started: str | None
    driver: Header | SearchResumed
    """The last driver that it ran under, with its environment."""
    chance: float
    """Accuracy of guessing on its data."""
    num_replicates: int = 1
    """Of the longest stage."""
    epochs: list[EpochResult] = field(default_factory=list)
    """Of the current stage: epoch n at index n - 1."""
    finished_stages: list[tuple[int, EpochResult]] = field(default_factory=list)
    """The epochs of all stages before the current one, each with its stage's length."""
    stage: int | None = None
    """Length in epochs of the current stage; None before the first, and without stages."""
    replicate: int = 0
    """Of the current stage; its weights are kept."""
    scores: dict[int, float] = field(default_factory=dict)
    """val_acc by epoch, where trials can be compared by it: with stages, at the end of each, the
    mean of its replicates."""
    retries: list[TrialRetried] = field(default_factory=list)
    nodes: list[NodeChanged] = field(default_factory=list)
    """On a cluster, of each attempt, in order."""
    num_nodes_before: int = 0
    """Of attempts under earlier drivers than the last."""
    status: Status = "running"
    score: float | None = None
    reason: str = ""
    error_file: str | None = None
    weights_file: str | None = None
    ended_seq: int | None = None
    """Sequence number of its TrialEnded: it orders the ends of trials."""
    ended: str | None = None

    @property
    def config(self) -> TrainConfig:
        """Of the current stage."""
        if self.stage is None:
            return self.full_config
        return self.full_config.shorten(self.stage, self.replicate)

    def find_value(self, knob: str) -> Any:
        """Return a knob's value; None where it is inactive."""
        is_inactive = knob in schema.inactive_knobs(self.full_config)
        return None if is_inactive else self.full_config.get(knob)

    @property
    def numerics(self) -> Numerics:
        """Of its last attempt."""
        is_placed = len(self.nodes) > self.num_nodes_before
        placed = self.nodes[-1].numerics if is_placed else None
        return placed or self.driver.numerics

    @property
    def node(self) -> str | None:
        """Name of the node of its last attempt; None on one machine."""
        return self.nodes[-1].node if self.nodes else None

    @property
    def other_numerics(self) -> list[Numerics]:
        """Those of earlier attempts that differ from the last one's."""
        found = [node.numerics for node in self.nodes]
        return [each for each in found if each not in (None, self.numerics)]

    @property
    def trained_epochs(self) -> list[tuple[int, EpochResult]]:
        """Every epoch trained so far, in order, with its stage's length."""
        length = self.stage or self.full_config.epochs
        return [*self.finished_stages, *((length, result) for result in self.epochs)]

    @property
    def epochs_done(self) -> int:
        """Number of epochs trained so far, of all stages."""
        return len(self.finished_stages) + len(self.epochs)

    @property
    def val_acc(self) -> float | None:
        """Of the last reported epoch; None before the first and without validation images."""
        return self.trained_epochs[-1][1].val_acc if self.trained_epochs else None

    @property
    def accuracy(self) -> float | None:
        """What tables show: the score of a complete trial, else its last val_acc."""
        return self.score if self.status == "complete" else self.val_acc

    def find_score(self, status: EndStatus) -> float | None:
        """Return the score of the trial if it ended now with this status.

        The last val_acc when complete, the mean of its replicates; chance when diverged, else None.
        """
        last = self.scores.get(self.full_config.epochs)
        return {"complete": last, "diverged": self.chance}.get(status)

    def apply(self, event: EpochReported | TrialRetried | TrialEnded, seq: int) -> None:
        """Apply an event of this trial; `seq` is its sequence number. See SearchState.apply."""
        rule = f"the trial has ended ({self.status}): no {KINDS[type(event)]!r} may follow."
        require(self.status == "running", self.run_id, rule)
        if isinstance(event, TrialRetried):
            self.retries.append(event)
            return
        done, length = self._check_stage(event)
        if isinstance(event, EpochReported):
            epoch = event.result.epoch
            rule = f"epoch {done + 1} of {length} must come next, got epoch {epoch}."
            require(epoch == done + 1 <= length, self.run_id, rule)
            self._enter_stage(event)
            self.epochs.append(event.result)
            if event.score is not None:
                before = [
                    result.val_acc
                    for length, result in self.finished_stages
                    if length == result.epoch == epoch and result.val_acc is not None
                ]
                self.scores[epoch] = fmean([*before, event.score])
            return
        longest = self.full_config.epochs
        rule = f"a complete trial must have trained {longest} epochs, got {done} of {length}."
        require(event.status != "complete" or done == length == longest, self.run_id, rule)
        num_trained = event.replicate + 1
        rule = f"a complete trial must have {self.num_replicates} replicates, got {num_trained}."
        is_whole = num_trained == self.num_replicates
        require(event.status != "complete" or is_whole, self.run_id, rule)
        score = self.find_score(event.status)
        rule = f"a {event.status} trial's score must be {score}, got {event.score}."
        require(event.score == score, self.run_id, rule)
        self._enter_stage(event)
        self.status, self.score, self.reason = event.status, score, event.reason
        self.error_file, self.weights_file = event.error_file, event.weights_file
        self.ended_seq, self.ended = seq, event.time

    def _check_stage(self, event: EpochReported | TrialEnded) -> tuple[int, int]:
        """Return the epochs done in the event's stage and the stage's length in epochs.

        The event's stage is the current one, or after all its epochs a longer one or the longest
        one's next replicate.
        """
        kind = KINDS[type(event)]
        rule = f"{kind!r} must name its `cycle`: the trial is in a stage of {self.stage} epochs."
        require(event.cycle is not None or self.stage is None, self.run_id, rule)
        done = len(self.epochs)
        current = (self.stage, self.replicate)
        if event.cycle is None or (event.cycle, event.replicate) == current:
            return done, self.config.epochs
        last, longest = self.stage or 0, self.full_config.epochs
        if event.cycle == last == longest:
            rule = (
                f"replicate {self.replicate + 1} of {self.num_replicates} must come next, after "
                f"all {last} epochs of the last one, got {event.replicate} after {done}."
            )
            is_next = event.replicate == self.replicate + 1 < self.num_replicates
            require(done == last and is_next, self.run_id, rule)
            return 0, event.cycle
        rule = (
            f"a new stage must come after all {last} epochs of the last one and have more, "
            f"at most {longest}, got one of {event.cycle} after {done}."
        )
        is_longer = done == last < event.cycle <= longest and event.replicate == 0
        require(is_longer, self.run_id, rule)
        return 0, event.cycle

    def _enter_stage(self, event: EpochReported | TrialEnded) -> None:
        stage = (event.cycle, event.replicate)
        if event.cycle is not None and stage != (self.stage, self.replicate):
            self.finished_stages, self.epochs = self.trained_epochs, []
            self.stage, self.replicate = stage
            self.fingerprint = self.config.fingerprint


@dataclass
class SearchState:
    """The state of a search. Views read it; only `apply` changes it."""

    folder: Path
    header: Header
    trials: dict[int, TrialState] = field(default_factory=dict)
    """By number, in the order of their starts."""
    arrivals: dict[int, dict[int, float]] = field(default_factory=dict)
    """Scores by epoch and trial, in the order they were reported."""
    resumes: list[SearchResumed] = field(default_factory=list)
    finished: SearchEnded | None = None
    """The end of the last driver; None while it runs, and when it died."""
    nodes: dict[str, NodeChanged] = field(default_factory=dict)
    """The last change of each node of a cluster, by name."""
    repaired: str | None = None
    """What `Record.open` cut off the file; None when nothing."""
    num_events: int = 1
    """Also the sequence number of the last event."""

    @property
    def storage(self) -> Path:
        """The run store that holds the search."""
        return self.folder.parents[1]

    @property
    def is_finished(self) -> bool:
        """False for a search that runs or can be resumed: interrupted, or its driver died."""
        return self.finished is not None and self.finished.reason != INTERRUPTED

    @property
    def num_trials(self) -> int:
        """Number of trials that the search is to have."""
        return self.resumes[-1].trials if self.resumes else int(self.header.budget["trials"])

    @property
    def baseline_score(self) -> float | None:
        """Score of the baseline trial, the reference of every gain; None unless it is complete."""
        for trial in self.trials.values():
            if trial.origin == "baseline" and trial.status == "complete":
                return trial.score
        return None

    @property
    def ranked(self) -> list[TrialState]:
        """The complete trials that have a score, highest first; of equals the lower number."""
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
        statuses = [trial.status for trial in self.trials.values()]
        return {status: statuses.count(status) for status in get_args(Status)}

    def trial_folder(self, number: int) -> Path:
        """Return a trial's own folder for checkpoints, error and weights; it need not exist."""
        return trial_folder(self.folder, number)

    def apply(self, event: Event) -> None:
        """Apply the next event.

        Raises:
            RecordError: when the event may not come next. Nothing has changed then.
            ConfigError: when a trial's config breaks a rule. Nothing has changed then.
        """
        name, kind = self.header.name, KINDS[type(event)]
        is_open = self.finished is None or isinstance(event, SearchResumed)
        require(is_open, name, f"the search has ended: only 'resume' may follow, got {kind!r}.")
        if isinstance(event, SearchResumed):
            self.resumes.append(event)
            self.finished = None
            for trial in self.trials.values():
                if trial.status == "running":
                    trial.driver, trial.num_nodes_before = event, len(trial.nodes)
            self.nodes = {}
        elif isinstance(event, TrialStarted):
            self.trials[event.trial] = self._start_trial(event)
        elif isinstance(event, EpochReported | TrialRetried | TrialEnded):
            rule = f"trial {event.trial} must start first, got {kind!r}."
            require(event.trial in self.trials, name, rule)
            self.trials[event.trial].apply(event, self.num_events + 1)
            if isinstance(event, EpochReported) and event.score is not None:
                epoch, scores = event.result.epoch, self.trials[event.trial].scores
                self.arrivals.setdefault(epoch, {})[event.trial] = scores[epoch]
        elif isinstance(event, NodeChanged):
            self.nodes[event.node] = event
        elif isinstance(event, TrialPlaced):
            self._place_trial(event)
        elif isinstance(event, SearchEnded):
            self.finished = event
        else:
            raise RecordError(f"{name}: the record has a header already, got a second one.")
        self.num_events += 1

    def _place_trial(self, event: TrialPlaced) -> None:
        name = self.header.name
        require(event.trial in self.trials, name, f"trial {event.trial} must start first.")
        require(event.node in self.nodes, name, f"node {event.node!r} must have joined.")
        trial = self.trials[event.trial]
        require(trial.status == "running", trial.run_id, f"the trial has ended ({trial.status}).")
        trial.nodes.append(self.nodes[event.node])

    def _start_trial(self, event: TrialStarted) -> TrialState:
        run_id = f"{self.header.name}:{event.trial}"
        require(event.trial not in self.trials, run_id, "the trial has started already.")
        return TrialState(
            number=event.trial,
            run_id=run_id,
            origin=event.origin,
            params=event.params,
            full_config=TrainConfig(**event.config),
            fingerprint=event.fingerprint,
            started=event.time,
            driver=self.resumes[-1] if self.resumes else self.header,
            chance=self.header.data.chance,
            num_replicates=self.header.budget.get("replicates", 1),
        )


def describe_counts(counts: Mapping[Status, int]) -> str:
    """Return counts as `3 complete, 1 failed`; an empty text without trials."""
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def require(holds: bool, where: str, rule: str) -> None:
    """Raise a RecordError unless the condition holds."""
    if not holds:
        raise RecordError(f"{where}: {rule}")
