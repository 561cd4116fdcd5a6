"""The faults of a search's trials, parsed from their tracebacks and grouped."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

from tune_cifar.record.state import SearchState, TrialState


@dataclass(frozen=True)
class Failure:
    """A fault, parsed from its traceback or from a message about a worker's death.

    Attributes:
        kind: the exception's type without its module; empty where the text has none.
        what: type and message, the first line of it.
        where: the last frame in this package, as `train/trainer.py:131 in _train_step`; empty
            without one.
    """

    kind: str
    what: str
    where: str


@dataclass(frozen=True)
class FailureGroup:
    """Faults of one kind at one place.

    Attributes:
        what: type and message, with # for numbers that differ within the group.
        where: see Failure.
        count: number of faults; a retried trial may have met several.
        failed: numbers of the trials that it ended.
        retried: numbers of the trials that continued after it.
        run_id: of the trial to replay: the first that failed, else the first that was retried.
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
# Addresses, Ray's ids, counts and sizes, but not the digits of a name such as conv1 or float32.
NUMBERS = re.compile(
    r"0x[0-9a-f]+|\b[0-9a-f]{16,}\b|(?<!\w)\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE
)


def parse_failure(text: str) -> Failure:
    """Parse a traceback or any other message about a fault; of chained exceptions the last."""
    last = text.rpartition("Traceback (most recent call last):\n")[2]
    # The lines of frames are indented; the exception follows them.
    messages = [line.strip() for line in last.splitlines() if line.strip() and line[0] != " "]
    what = messages[0] if messages else "no message"
    kind = EXCEPTION.match(what)
    frames = FRAME.findall(last)
    where = "{}:{} in {}".format(*frames[-1]) if frames else ""
    return Failure(kind[1] if kind else "", what, where)


def read_error(state: SearchState, trial: TrialState) -> str:
    """Return a failed trial's traceback, or the recorded reason when the file is gone."""
    if trial.error_file is not None:
        with suppress(OSError):
            return (state.folder / trial.error_file).read_text(encoding="utf-8", errors="replace")
    return trial.reason


def group_failures(state: SearchState) -> list[FailureGroup]:
    """Group the faults of a search by what failed and where, the most frequent first.

    They are the faults that ended trials and those that trials were retried after. Of equally
    frequent groups, the one with the lower trial number comes first.
    """
    faults: dict[tuple[str, str], list[tuple[TrialState, bool, str]]] = {}
    for trial in state.trials.values():
        found = [(trial, False, retry.text) for retry in trial.retries]
        if trial.status == "failed":
            found.append((trial, True, read_error(state, trial)))
        for fault in found:
            failure = parse_failure(fault[2])
            faults.setdefault((NUMBERS.sub("#", failure.what), failure.where), []).append(fault)
    groups = [_make_failure_group(*key, found) for key, found in faults.items()]
    return sorted(groups, key=lambda group: (-group.count, min(group.failed + group.retried)))


def _make_failure_group(
    what: str, where: str, faults: list[tuple[TrialState, bool, str]]
) -> FailureGroup:
    failed = {trial.number for trial, is_end, _ in faults if is_end}
    retried = {trial.number for trial, _, _ in faults} - failed
    first, _, text = min(faults, key=lambda fault: (not fault[1], fault[0].number))
    messages = {parse_failure(text).what for _, _, text in faults}
    return FailureGroup(
        what=messages.pop() if len(messages) == 1 else what,
        where=where,
        count=len(faults),
        failed=tuple(sorted(failed)),
        retried=tuple(sorted(retried)),
        run_id=first.run_id,
        traceback=text,
    )
