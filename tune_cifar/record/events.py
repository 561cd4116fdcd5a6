"""What a record is made of: the events of a search, and each as one line of text.

    {"seq": 3, "crc": "51f2c0de", "kind": "epoch", "body": {"trial": 0, "result": {...}}}

`seq` is the number of the line, `crc` the CRC-32 of the canonical JSON (sorted keys, no spaces) of body, kind and seq.
Floats come back bit for bit; NaN is refused.
"""

from __future__ import annotations

import json
import zlib
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from tune_cifar import schema
from tune_cifar.errors import RecordError
from tune_cifar.schema import DataInfo, EpochResult, Frozen, Numerics

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # no separator, no leading dot: joined to a folder, it stays inside
# UTC by isoformat: such texts sort as times do.
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00$")]
# Relative to the search's folder and inside it: no segment is empty or starts with a dot.
FileText = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$")
]
Kind = Literal["search", "train", "confirm"]
KIND_WORDS: dict[Kind, str] = {
    "search": "a search",
    "train": "a single training",
    "confirm": "a confirmation",
}
Origin = Literal["baseline", "point", "sampler", "train", "confirm"]
EndStatus = Literal["complete", "stopped", "diverged", "failed"]
Fault = Literal["worker died", "out of memory"]
WAY_OUT = "Restore the file from a copy, or keep only the lines before this one."
CANONICAL = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)


class Candidate(Frozen):
    """A recorded trial that is trained again under new seeds: its run id, its search's score, its TrainConfig as JSON
    with the changes that all candidates have alike."""

    run_id: str
    score: float | None
    config: dict[str, Any]


class Confirmation(Frozen):
    """What a confirmation trains: every candidate (the search's baseline is the first) under every seed, seed after
    seed. `final` are trainings on all images, each to be judged once on the test set."""

    search: str
    candidates: Annotated[list[Candidate], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)]
    final: bool

    @property
    def num_trials(self) -> int:
        return len(self.candidates) * len(self.seeds)

    def find(self, number: int) -> tuple[Candidate, int]:
        """The candidate and the seed of a trial. A seed's trials follow one another: what is done at any moment can be
        compared in pairs."""
        index, candidate = divmod(number, len(self.candidates))
        return self.candidates[candidate], self.seeds[index]


class Header(Frozen):
    """The first event. `baseline` is a TrainConfig as JSON, `distributions` Optuna's JSON per searched knob, `points`
    the values tried right after the baseline, `pinned` the knobs fixed on the command line, `seed` the sampler's,
    `space_text` the whole space file, `predicted_epochs` the trial-epochs that were expected of the budget."""

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

    @property
    def fidelity(self) -> str:
        """What a trial trains up to a rung; a training without rungs is one schedule."""
        return str(self.budget.get("fidelity", "epochs")) if self.kind == "search" else "epochs"


class TrialStarted(Frozen):
    """A trial got its number: `params` are the searched knobs only (of a confirmation candidate and seed), `config` is
    its whole TrainConfig as JSON."""

    trial: Annotated[int, Field(ge=0)]
    origin: Origin
    params: dict[str, Any]
    config: dict[str, Any]
    fingerprint: str
    time: Time | None = None


class EpochReported(Frozen):
    """A trial finished an epoch. `cycle` is the length of the training that it belongs to, where a trial trains several
    (budget.fidelity: cycles); None is the whole training."""

    trial: int
    result: EpochResult
    cycle: Annotated[int, Field(ge=1)] | None = None

    @property
    def score(self) -> float | None:
        """val_acc, where trials may be compared by it: anywhere in the whole training, at the end of a cycle."""
        return self.result.val_acc if self.cycle in (None, self.result.epoch) else None


class TrialRetried(Frozen):
    """A trial met a fault that is not its own and goes on from its newest checkpoint. `text` tells of the fault."""

    trial: int
    fault: Fault
    text: str


class TrialEnded(Frozen):
    """A trial will report no more. `score` is the last val_acc if complete, chance (0.1) if diverged, else None;
    `cycle` as in EpochReported, of the training that it ended in."""

    trial: int
    status: EndStatus
    cycle: Annotated[int, Field(ge=1)] | None = None
    score: float | None = None
    reason: str
    error_file: FileText | None = None
    weights_file: FileText | None = None
    time: Time | None = None


class SearchEnded(Frozen):
    """The driver stopped, `wall_seconds` after it started. Only a SearchResumed follows."""

    reason: str
    wall_seconds: float


class SearchResumed(Frozen):
    """Another driver goes on, for `trials` in all. `changes` are those that the user accepted."""

    time: Time
    trials: Annotated[int, Field(ge=1)]
    changes: list[str]
    numerics: Numerics
    environment: dict[str, str]
    command: str


Event = (
    Header | TrialStarted | EpochReported | TrialEnded | SearchEnded | TrialRetried | SearchResumed
)
NAMES = ("header", "trial", "epoch", "end", "finish", "retry", "resume")
KINDS: dict[type[Event], str] = dict(zip(get_args(Event), NAMES, strict=True))
EVENTS = {kind: event for event, kind in KINDS.items()}


def utc_now() -> str:
    """The time for a record; nothing is ever decided by it."""
    return datetime.now(UTC).isoformat()


def encode_event(seq: int, event: Event) -> tuple[bytes, Event]:
    """The event's line, and the event as that line will be read back (a tuple in it comes back as a list).

    Raises:
        RecordError: when it is not JSON of finite numbers.
    """
    kind = KINDS[type(event)]
    try:
        body = json.loads(json.dumps(event.model_dump(), allow_nan=False))
        line = {"seq": seq, "crc": _compute_crc(seq, kind, body), "kind": kind, "body": body}
        return json.dumps(line, ensure_ascii=False).encode() + b"\n", EVENTS[kind].model_validate(
            body
        )
    except (TypeError, ValueError) as exc:
        raise RecordError(
            f"event {kind!r}: it must be JSON of finite numbers, got one that is not ({exc})."
        ) from exc


def decode_event(number: int, line: bytes) -> Event | None:
    """The event of line `number`; None when the line is damaged.

    Raises:
        RecordError: when the line is whole and breaks a rule.
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
        raise RecordError(f"event: seq must be {number}, got {seq}. {WAY_OUT}")
    if kind not in EVENTS:
        raise RecordError(f"event: kind must be one of {', '.join(EVENTS)}, got {kind!r}. {newer}")
    try:
        return EVENTS[kind].model_validate(body)
    except ValidationError as exc:
        raise RecordError(
            f"event {kind!r}: {schema.describe_validation_error(exc, EVENTS[kind])} {newer}"
        ) from exc


def _compute_crc(seq: int, kind: str, body: Any) -> str:
    return f"{zlib.crc32(CANONICAL.encode({'body': body, 'kind': kind, 'seq': seq}).encode()):08x}"
