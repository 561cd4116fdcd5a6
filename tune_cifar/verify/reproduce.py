"""A recorded run trained again and compared: identical, within tolerance or different.

Under equal Numerics every recorded result must be equal bit for bit. Under other Numerics (another
processor, another version of torch), and on a GPU whose kernels were free to add up in any order,
the accuracies must lie within three standard deviations of the seed noise. A diverged run must
diverge again, a failed run must fail again.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tune_cifar.data.load import TrainVal
from tune_cifar.errors import ConfigError, Diverged, RecordError
from tune_cifar.record.failures import parse_failure, read_error
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.record.store import load_searches
from tune_cifar.schema import REPRODUCIBLE_FIELDS, EpochResult, Numerics
from tune_cifar.train.numerics import compare_numerics, describe_unrecorded, repeats_bits
from tune_cifar.train.trainer import Trainer
from tune_cifar.verify.confirm import summarise

Verdict = Literal["identical", "within tolerance", "different"]

# Accuracies may differ by this many standard deviations of the seed noise where bits may differ.
TOLERANCE_SDS = 3
FREE_ORDER = "on a GPU bits repeat with `deterministic` alone"
SEED_NOISE_FILE = Path(__file__).with_name("seed_noise.json")
# Data on which the file's spaces have that noise; shapes are for tests.
MEASURED_DATA = ("cifar10", "shapes")


@dataclass(frozen=True)
class Reproduction:
    """The result of training a run again.

    Attributes:
        epochs: number of compared epochs.
        first_different: the first epoch that differs, from 1, or None.
        detail: which figure differs, recorded and now (within the tolerance, only where Numerics
            are equal); how a failed run ended.
        numerics: differences of the Numerics, as `name: recorded -> current`.
        traceback: of the exception that ended the training of a failed run; empty without one.
        unrecorded: what matters of the Numerics and was not recorded, a sentence each.
    """

    verdict: Verdict
    epochs: int
    first_different: int | None
    detail: str
    numerics: tuple[str, ...]
    traceback: str = ""
    unrecorded: tuple[str, ...] = ()


def load_seed_noise(space: str) -> float | None:
    """Return the standard deviation of val_acc over seeds, or None if it has not been measured.

    benchmarks/seed_noise.py measures it.
    """
    table = json.loads(SEED_NOISE_FILE.read_text(encoding="utf-8"))["spaces"]
    return float(table[space]["sd_val_acc"]) if space in table else None


def find_seed_noise(state: SearchState) -> float | None:
    """Return the standard deviation of val_acc over seeds of a search's recipes.

    That of its space on CIFAR-10, where it was measured; else the largest of a candidate in the
    search's confirmations; None without one of at least two seeds.
    """
    header = state.header
    if header.data.name in MEASURED_DATA:
        sd = load_seed_noise(header.space)
        if sd is not None:
            return sd
    settled = header.confirmation
    search = header.name if settled is None else settled.search
    found = []
    for other in load_searches(state.storage):
        settled = other.header.confirmation
        if settled is not None and settled.search == search and not settled.final:
            found += [each.sd for each in summarise(other) if each.sd is not None]
    return max(found, default=None)


def compare_epoch(recorded: EpochResult, fresh: EpochResult, tolerance: float | None) -> str | None:
    """Return what differs between two results of one epoch, or None.

    Args:
        tolerance: the largest allowed difference of the validation accuracy (without validation, of
            the training accuracy); None compares every reproducible field bit for bit.
    """
    where = f"epoch {recorded.epoch}"
    if tolerance is None:
        for name in REPRODUCIBLE_FIELDS:
            before, now = getattr(recorded, name), getattr(fresh, name)
            if before != now:
                return f"{where}: {name} recorded {before!r}, now {now!r}"
        return None
    name = "train_acc" if recorded.val_acc is None else "val_acc"
    before, now = getattr(recorded, name), getattr(fresh, name)
    if abs(before - now) <= tolerance:
        return None
    values = f"{name} recorded {before:.4f}, now {now:.4f}"
    return f"{where}: {values}, more than {tolerance:.4f} apart"


def reproduce_run(
    state: SearchState,
    trial: TrialState,
    data: TrainVal,
    numerics: Numerics,
    on_epoch: Callable[[EpochResult, EpochResult, str | None], None],
    on_trainer: Callable[[Trainer], None] | None = None,
) -> tuple[Reproduction, Trainer | None]:
    """Train a recorded run again, epoch by epoch, until all its epochs are compared or one differs.

    A diverged run must diverge again, where bits repeat at the same step. A failed run must fail
    again in the same epoch, with the same type of exception.

    Args:
        numerics: of this training; the rule depends on whether they are equal to the recorded ones
            of all attempts, and repeat their bits.
        on_epoch: called with the recorded result, the fresh one and their difference.
        on_trainer: called with the Trainer before the first epoch.

    Returns:
        The comparison, and the Trainer at its end; None when it could not be made again.

    Raises:
        RecordError, ConfigError: nothing is recorded; bits may differ and no seed noise is known.
    """
    if not trial.epochs and trial.status not in ("diverged", "failed"):
        raise RecordError(f"{trial.run_id}: the run has no recorded epoch to compare.")
    changed = _compare_attempts(trial, numerics)
    is_exact = not changed and repeats_bits(numerics)
    tolerance = None if is_exact or not trial.epochs else _find_tolerance(state, trial, changed)
    other_bits: str | None = None
    expected: type[Exception] = Exception if trial.status == "failed" else Diverged
    trainer: Trainer | None = None

    def train() -> Iterator[EpochResult]:
        nonlocal trainer
        trainer = Trainer(trial.config, data, numerics)
        if on_trainer is not None:
            on_trainer(trainer)
        yield from trainer

    def conclude(
        first_different: int | None, detail: str, error: Exception | None = None
    ) -> tuple[Reproduction, Trainer | None]:
        verdict: Verdict = "within tolerance" if changed or other_bits else "identical"
        verdict = verdict if first_different is None else "different"
        if verdict == "within tolerance" and not changed:
            detail = f"{other_bits}: {FREE_ORDER}. {detail}".rstrip()
        epochs = first_different or len(trial.epochs)
        text = _format_error(error) if error is not None and trial.status == "failed" else ""
        notes = describe_unrecorded(trial.numerics, numerics, verdict == "identical")
        found = verdict, epochs, first_different, detail, changed, text, tuple(notes)
        return Reproduction(*found), trainer

    fresh_epochs = train()
    for recorded in trial.epochs:
        try:
            fresh = next(fresh_epochs)
        except expected as exc:
            detail = f"epoch {recorded.epoch}: recorded as finished, now {_describe_error(exc)}"
            return conclude(recorded.epoch, detail, exc)
        difference = compare_epoch(recorded, fresh, None)
        other_bits = other_bits or difference
        if difference is not None and tolerance is not None:
            difference = compare_epoch(recorded, fresh, tolerance)
        on_epoch(recorded, fresh, difference)
        if difference is not None:
            return conclude(recorded.epoch, difference)
    if trial.status not in ("diverged", "failed"):
        return conclude(None, "")
    epoch = len(trial.epochs) + 1
    try:
        next(fresh_epochs, None)
    except expected as exc:
        difference = _compare_errors(state, trial, exc, is_exact=is_exact)
        if difference is not None:
            return conclude(epoch, difference, exc)
        is_failure = trial.status == "failed"
        return conclude(None, f"It fails again: {_describe_error(exc)}" if is_failure else "", exc)
    return conclude(epoch, _describe_missing_error(state, trial))


def _compare_attempts(trial: TrialState, numerics: Numerics) -> tuple[str, ...]:
    """Return how these Numerics differ from those of any attempt of a trial."""
    before = (trial.numerics, *trial.other_numerics)
    changes = (change for each in before for change in compare_numerics(each, numerics))
    return tuple(dict.fromkeys(changes))


def _find_tolerance(state: SearchState, trial: TrialState, changed: tuple[str, ...]) -> float:
    """Return what `compare_epoch` allows where bits may differ."""
    sd = find_seed_noise(state)
    if sd is None:
        header = state.header
        missing = f"the seed noise of space {header.space} on {header.data.name} is not known"
        way = f"python -m tune_cifar confirm --search {header.name}"
        if header.kind != "search":
            way = "python benchmarks/seed_noise.py"
        why = f"the Numerics differ ({'; '.join(changed)})" if changed else FREE_ORDER
        raise ConfigError(f"{trial.run_id}: {why} and {missing}. Measure it: {way}.")
    return TOLERANCE_SDS * sd


def _compare_errors(
    state: SearchState, trial: TrialState, error: Exception, is_exact: bool
) -> str | None:
    """Return what differs between the exceptions that ended the run, recorded and now, or None.

    Args:
        is_exact: whether a divergence must happen at the same step.
    """
    if trial.status == "diverged":
        is_equal = not is_exact or str(error) == trial.reason
        return None if is_equal else f"recorded: {trial.reason} Now: {error}"
    before, now = parse_failure(read_error(state, trial)), parse_failure(_format_error(error))
    if before.kind == now.kind:
        return None
    where = f"epoch {len(trial.epochs) + 1}"
    return f"{where}: recorded as failed with {before.what}, now {now.what}"


def _describe_missing_error(state: SearchState, trial: TrialState) -> str:
    """Return in words that the run ended with an exception, and now does not."""
    epoch = len(trial.epochs) + 1
    if trial.status == "diverged":
        return f"epoch {epoch}: recorded {trial.reason} Now the loss is finite."
    is_end = epoch > trial.config.epochs
    when = "after the last epoch" if is_end else f"in epoch {epoch}"
    before = parse_failure(read_error(state, trial)).what
    cause = "the machine (memory, disk, a killed process), not the configuration"
    return f"It failed {when} ({before}) and does not fail now: the cause was {cause}."


def _describe_error(error: Exception) -> str:
    """Return an exception's type and message; of a divergence the message alone."""
    return str(error) if isinstance(error, Diverged) else parse_failure(_format_error(error)).what


def _format_error(error: Exception) -> str:
    return "".join(traceback.format_exception(error))
