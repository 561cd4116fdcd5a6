"""The events of a search, and their encoding as lines of a record.

    {"seq": 3, "crc": "51f2c0de", "kind": "epoch", "body": {"trial": 0, "result": {...}}}

`seq` is the number of the line from 1, `crc` the CRC-32 of the canonical JSON (sorted keys, no
spaces) of body, kind and seq. Floats come back bit for bit; NaN is refused.
"""

from __future__ import annotations

import json
import zlib
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BeforeValidator, Field, ValidationError

from tune_cifar import schema
from tune_cifar.errors import RecordError, describe_validation_error
from tune_cifar.schema import DataInfo, EpochResult, Frozen, Numerics

# A search's name. Without a separator and a leading dot it stays inside the folder it is joined to.
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# UTC in ISO format: the texts sort as the times do.
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00$")]
# A path relative to the search's folder and inside it: no part is empty or starts with a dot.
PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
FileText = Annotated[str, Field(pattern=f"^{PART}(/{PART})*$")]
Kind = Literal["search", "train", "confirm"]
KIND_WORDS: dict[Kind, str] = {
    "search": "a search",
    "train": "a single training",
    "confirm": "a confirmation",
}
Origin = Literal["baseline", "point", "sampler", "train", "confirm"]
EndStatus = Literal["complete", "stopped", "diverged", "failed"]
Fault = Literal["worker died", "out of memory", "node lost", "failed at its start"]
NodeStatus = Literal["joined", "lost", "left out"]
REPAIR_HINT = "Restore the file from a copy, or keep only the lines before this one."
CANONICAL = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)


class Candidate(Frozen):
    """A recorded trial to be trained again under new seeds.

    Attributes:
        run_id: of the recorded trial.
        score: of the recorded trial.
        config: its TrainConfig as JSON, with the changes that all candidates have in common.
    """

    run_id: str
    score: float | None
    config: dict[str, Any]


class Confirmation(Frozen):
    """The trainings of a confirmation: every candidate under every seed, one seed after another.

    Attributes:
        search: name of the search that is confirmed.
        candidates: the search's baseline first.
        seeds: training seeds.
        top: how many of the best trials were asked for; None in old records.
        final: train on all images, then evaluate each training once on the test set.
        epochs: of each training, where others than the recipe's were asked for.
    """

    search: str
    candidates: Annotated[list[Candidate], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)]
    final: bool
    top: int | None = None
    epochs: int | None = None

    @property
    def num_trials(self) -> int:
        return len(self.candidates) * len(self.seeds)

    def find(self, number: int) -> tuple[Candidate, int]:
        """Return the candidate and the seed of a trial.

        The trials of a seed follow one another, so that finished ones can be compared in pairs.
        """
        index, candidate = divmod(number, len(self.candidates))
        return self.candidates[candidate], self.seeds[index]


def _read_rungs(value: Any) -> Any:
    """Read the keys of a JSON object, which are text, as numbers."""
    is_object = isinstance(value, dict)
    return {int(rung): score for rung, score in value.items()} if is_object else value


class Learned(Frozen):
    """An ended trial of another search."""

    run_id: str
    params: dict[str, Any]
    status: schema.Status
    scores: Annotated[dict[int, float], BeforeValidator(_read_rungs)]
    """By rung."""


def _read_names(value: Any) -> Any:
    """Read one name, or none, as old records have it."""
    return [value] if isinstance(value, str) else value or []


class Header(Frozen):
    """The first event: what is searched or trained, on what, and with which budget.

    Attributes:
        seed: of the sampler.
        baseline: a TrainConfig as JSON.
        distributions: Optuna's JSON of each searched knob.
        points: values that are tried right after the baseline.
        pinned: knobs fixed by the user.
        space_text: the whole space file.
        model_source: text of the file that defines a network of the user's own; empty for the five.
        is_conditional: proposals leave out the knobs that their other values make inactive; old
            records, which have no such field, hold and told the sampler all searched knobs.
        predicted_epochs: epochs of all trials together that the budget was expected to take.
        warm_start: the searches whose best trials were put first, or which were learned from.
        warm_trials: how many best trials of each were asked for; None without `warm_start`.
        learned: their ended trials, which the sampler knows from the start.
    """

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    kind: Kind
    space: str
    tier: str | None
    created: Time
    seed: int
    baseline: dict[str, Any]
    distributions: dict[str, str]
    points: list[dict[str, Any]] = Field(default_factory=list)
    budget: dict[str, Any]
    pinned: dict[str, Any]
    space_text: str
    data: DataInfo
    numerics: Numerics
    environment: dict[str, str]
    command: str
    confirmation: Confirmation | None = None
    predicted_epochs: float | None = None
    warm_start: Annotated[list[str], BeforeValidator(_read_names)] = Field(default_factory=list)
    warm_trials: int | None = None
    learned: list[Learned] = Field(default_factory=list)
    model_source: str = ""
    is_conditional: bool = False

    @property
    def fidelity(self) -> str:
        """`cycles` when trials train a schedule per rung, else `epochs`: one schedule."""
        return str(self.budget.get("fidelity", "epochs")) if self.kind == "search" else "epochs"


class Stage(NamedTuple):
    """One of a trial's trainings: over `length` epochs, under the seed of a replicate (from 0)."""

    length: int
    replicate: int = 0


class TrialStarted(Frozen):
    """A trial was created.

    Attributes:
        params: the searched knobs that are active (see Header.is_conditional); in a confirmation
            the candidate and the seed.
        config: its full TrainConfig as JSON.
    """

    trial: Annotated[int, Field(ge=0)]
    origin: Origin
    params: dict[str, Any]
    config: dict[str, Any]
    fingerprint: str
    time: Time | None = None


class EpochReported(Frozen):
    """A trial finished an epoch.

    Attributes:
        cycle: length in epochs of the stage that the epoch belongs to, where trials train in
            stages (budget.fidelity: cycles); None where the training is one stage.
        replicate: of the stage.
    """

    trial: int
    result: EpochResult
    cycle: Annotated[int, Field(ge=1)] | None = None
    replicate: Annotated[int, Field(ge=0)] = 0

    @property
    def score(self) -> float | None:
        """val_acc where trials can be compared by it: at a stage's end; without stages always."""
        return self.result.val_acc if self.cycle in (None, self.result.epoch) else None


class TrialRetried(Frozen):
    """A trial met a fault that is not its own and continues from its newest checkpoint.

    Attributes:
        text: the fault's traceback or message.
    """

    trial: int
    fault: Fault
    text: str


class NodeChanged(Frozen):
    """A node of a Ray cluster began to take part in the search, was lost, or gets no more trials.

    Attributes:
        node: its name: that of the host, with the address where another has the same.
        numerics: of trainings on it; None when none could begin.
        text: why it is left out.
    """

    node: str
    status: NodeStatus
    address: str
    numerics: Numerics | None
    text: str = ""


class TrialPlaced(Frozen):
    """An attempt of a trial began to train on a node of a Ray cluster; `attempt` counts from 1."""

    trial: int
    node: str
    attempt: Annotated[int, Field(ge=1)]


class TrialEnded(Frozen):
    """A trial ended.

    Attributes:
        cycle, replicate: of the stage in which it ended, as in EpochReported.
        score: the last val_acc if complete (the mean of its replicates), that of chance if
            diverged, else None.
    """

    trial: int
    status: EndStatus
    cycle: Annotated[int, Field(ge=1)] | None = None
    replicate: Annotated[int, Field(ge=0)] = 0
    score: float | None = None
    reason: str
    error_file: FileText | None = None
    weights_file: FileText | None = None
    time: Time | None = None


class SearchEnded(Frozen):
    """The driver stopped, `wall_seconds` after it started. Only a SearchResumed may follow."""

    reason: str
    wall_seconds: float


class SearchResumed(Frozen):
    """Another driver resumed the search.

    Attributes:
        trials: number of trials that the search is to have in all.
        changes: changes of code or environment that the user accepted.
        target, patience, max_time_seconds: those of the budget from here on; old records have no
            time limit here, and the header's counts.
    """

    time: Time
    trials: Annotated[int, Field(ge=1)]
    target: float | None = None
    patience: int | None = None
    max_time_seconds: float | None = None
    changes: list[str]
    numerics: Numerics
    environment: dict[str, str]
    command: str


Event = (
    Header
    | TrialStarted
    | EpochReported
    | TrialEnded
    | SearchEnded
    | TrialRetried
    | SearchResumed
    | NodeChanged
    | TrialPlaced
)
NAMES = ("header", "trial", "epoch", "end", "finish", "retry", "resume", "node", "place")
KINDS: dict[type[Event], str] = dict(zip(get_args(Event), NAMES, strict=True))
EVENTS = {kind: event for event, kind in KINDS.items()}


def utc_now() -> str:
    """Return the time for a record. No decision depends on it."""
    return datetime.now(UTC).isoformat()


def encode_event(seq: int, event: Event) -> tuple[bytes, Event]:
    """Return the event's line, and the event as that line will be read back.

    The two events can differ: a tuple comes back as a list.

    Raises:
        RecordError: when the event is not JSON of finite numbers.
    """
    kind = KINDS[type(event)]
    try:
        body = json.loads(json.dumps(event.model_dump(), allow_nan=False))
        fields = {"seq": seq, "crc": _compute_crc(seq, kind, body), "kind": kind, "body": body}
        line = json.dumps(fields, ensure_ascii=False).encode() + b"\n"
        return line, EVENTS[kind].model_validate(body)
    except (TypeError, ValueError) as exc:
        raise RecordError(f"event {kind!r} must be JSON of finite numbers: {exc}.") from exc


def decode_event(number: int, line: bytes) -> Event | None:
    """Return the event of line `number` (from 1); None when the line is damaged.

    Raises:
        RecordError: when the line is undamaged and breaks a rule.
    """
    try:
        fields = json.loads(line.decode())
        seq, kind, body = fields["seq"], fields["kind"], fields["body"]
        if fields["crc"] != _compute_crc(seq, kind, body):
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    newer = "A newer tune_cifar may have written it: upgrade."
    if seq != number:
        raise RecordError(f"event: seq must be {number}, got {seq}. {REPAIR_HINT}")
    if kind not in EVENTS:
        raise RecordError(f"event: kind must be one of {', '.join(EVENTS)}, got {kind!r}. {newer}")
    try:
        return EVENTS[kind].model_validate(body)
    except ValidationError as exc:
        problem = describe_validation_error(exc, EVENTS[kind])
        raise RecordError(f"event {kind!r}: {problem} {newer}") from exc


def _compute_crc(seq: int, kind: str, body: Any) -> str:
    text = CANONICAL.encode({"body": body, "kind": kind, "seq": seq})
    return f"{zlib.crc32(text.encode()):08x}"
