"""Faults of a search's trials, read from their tracebacks and grouped."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

from tune_cifar.record.state import SearchState, TrialState


@dataclass(frozen=True)
class Failure:
    """What a traceback, or words about a worker's death, tells.

    Attributes:
        kind: the exception's type without its module; empty where the text names none.
        what: type and message, the first line of it.
        where: the last frame in this package, as `engine.py:131 in _train_step`; empty without one.
    """

    kind: str
    what: str
    where: str


@dataclass(frozen=True)
class FailureGroup:
    """Faults of one kind at one place.

    Attributes:
        what: type and message; numbers stand as # where they differ within the group.
        where: see Failure.
        count: of faults; a trial that was retried may have met several.
        failed: numbers of the trials that ended by it.
        retried: numbers of the trials that went on after it.
        run_id: of the first trial to replay, one that failed if any did.
        traceback: of that trial.
    """

    what: str
    where: str
    count: int
    failed: tuple[int, ...]
    retried: tuple[int, ...]
    run_id: str
    traceback: str


FRAME = re.compile(r'^ +File "(?:.*/)?tune_cifar/([\w/]+\.py)", line (\d+), in (.+)$', re.MULTILINE)
EXCEPTION = re.compile(r"(?:\w+\.)*([A-Z]\w*)(?=[:(]|$)")
# Addresses, ids of Ray, counts, sizes; not the digits of a name such as conv1 or float32.
NUMBERS = re.compile(
    r"0x[0-9a-f]+|\b[0-9a-f]{16,}\b|(?<!\w)\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE
)


def parse_failure(text: str) -> Failure:
    """Read a traceback (of exceptions that led to one another, the last) or any other words about a fault."""
    last = text.rpartition("Traceback (most recent call last):\n")[2]
    lines = [line for line in last.splitlines() if line.strip()]
    what = next(
        (line.strip() for line in lines if not line.startswith(" ")), "no word of what happened"
    )
    kind = EXCEPTION.match(what)
    frames = FRAME.findall(last)
    where = "{}:{} in {}".format(*frames[-1]) if frames else ""
    return Failure(kind[1] if kind else "", what, where)


def read_error(state: SearchState, trial: TrialState) -> str:
    """A failed trial's traceback; the recorded reason when the file is gone."""
    if trial.error_file is not None:
        with suppress(OSError):
            return (state.folder / trial.error_file).read_text(encoding="utf-8", errors="replace")
    return trial.reason


def group_failures(state: SearchState) -> list[FailureGroup]:
    """What went wrong in a search: faults of failed trials, and those that trials were retried after, by what failed
    and where. The most frequent first, of equals the one met by the lower trial number."""
    faults: dict[tuple[str, str], list[tuple[TrialState, bool, str]]] = {}
    for trial in state.trials.values():
        found = [(trial, False, retry.text) for retry in trial.retries]
        found += [(trial, True, read_error(state, trial))] if trial.status == "failed" else []
        for fault in found:
            failure = parse_failure(fault[2])
            faults.setdefault((NUMBERS.sub("#", failure.what), failure.where), []).append(fault)
    groups = [_make_failure_group(*key, found) for key, found in faults.items()]
    return sorted(groups, key=lambda group: (-group.count, min(group.failed + group.retried)))


def _make_failure_group(
    what: str, where: str, faults: list[tuple[TrialState, bool, str]]
) -> FailureGroup:
    failed = sorted({trial.number for trial, has_ended, _ in faults if has_ended})
    retried = sorted(
        {trial.number for trial, has_ended, _ in faults if not has_ended} - set(failed)
    )
    first, _, text = min(faults, key=lambda fault: (not fault[1], fault[0].number))
    words = {parse_failure(text).what for _, _, text in faults}
    what = words.pop() if len(words) == 1 else what
    return FailureGroup(what, where, len(faults), tuple(failed), tuple(retried), first.run_id, text)
