"""A recorded run, trained again, and the word that compares the two: identical, within tolerance or different.

Under equal Numerics every recorded figure must come back bit for bit. Under others (another processor, another
version of torch) the accuracies must lie within three standard deviations of that space's seed noise, and what
differed is named. A failed run must fail again.
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
from tune_cifar.schema import REPRODUCIBLE_FIELDS, EpochResult, Numerics
from tune_cifar.train.numerics import compare_numerics
from tune_cifar.train.trainer import Trainer

Verdict = Literal["identical", "within tolerance", "different"]

# Accuracies under other Numerics may differ by this many standard deviations of the space's seed noise.
TOLERANCE_SDS = 3
SEED_NOISE_FILE = Path(__file__).with_name("seed_noise.json")


@dataclass(frozen=True)
class Reproduction:
    """What came out of training a run again.

    Attributes:
        verdict: in one word.
        epochs: how many were compared.
        first_different: the first epoch that differs, from 1, or None.
        detail: in words: which figure, recorded and now.
        numerics: what differs in the Numerics, as `name: recorded -> current`.
        traceback: of the exception that ended this training, empty without one.
    """

    verdict: Verdict
    epochs: int
    first_different: int | None
    detail: str
    numerics: tuple[str, ...]
    traceback: str = ""


def load_seed_noise(space: str) -> float | None:
    """Standard deviation of val_acc over seeds, as measured for the space by benchmarks/seed_noise.py, or None."""
    table = json.loads(SEED_NOISE_FILE.read_text(encoding="utf-8"))
    return float(table["spaces"][space]["sd_val_acc"]) if space in table["spaces"] else None


def compare_epoch(recorded: EpochResult, fresh: EpochResult, tolerance: float | None) -> str | None:
    """What differs between two results of one epoch, or None.

    Args:
        tolerance: None asks for equal bits in every reproducible field; a number is the largest allowed difference of
            the validation accuracy (of the training accuracy where there is no validation).
    """
    if tolerance is None:
        for name in REPRODUCIBLE_FIELDS:
            before, now = getattr(recorded, name), getattr(fresh, name)
            if before != now:
                return f"epoch {recorded.epoch}: {name} recorded {before!r}, now {now!r}"
        return None
    name = "train_acc" if recorded.val_acc is None else "val_acc"
    before, now = getattr(recorded, name), getattr(fresh, name)
    if abs(before - now) <= tolerance:
        return None
    return f"epoch {recorded.epoch}: {name} recorded {before:.4f}, now {now:.4f}, more than {tolerance:.4f} apart"


def reproduce_run(
    state: SearchState,
    trial: TrialState,
    data: TrainVal,
    numerics: Numerics,
    on_epoch: Callable[[EpochResult, EpochResult, str | None], None],
    on_trainer: Callable[[Trainer], None] | None = None,
) -> tuple[Reproduction, Trainer]:
    """Train a recorded run again, epoch by epoch, until all its epochs are compared or one differs. A diverged run must
    diverge again, under equal Numerics at the same step.

    Args:
        numerics: of this training, from `restore_numerics`; equal to the recorded ones or not decides the rule.
        on_epoch: hears of each pair of results and what differs.

    Returns:
        the comparison, and the Trainer as it stands at the end (its model may be judged on the test set).

    Raises:
        RecordError: when the run has nothing to compare: no epoch, and it did not diverge.
        ConfigError: when Numerics differ and the space's seed noise has not been measured.
    """
    if not trial.epochs and trial.status != "diverged":
        raise RecordError(
            f"{trial.run_id}: at least one recorded epoch must be there to compare, got none."
        )
    changed = tuple(compare_numerics(trial.driver.numerics, numerics))
    tolerance = _find_tolerance(state, trial, changed)
    trainer = Trainer(trial.config, data, numerics)
    if on_trainer is not None:
        on_trainer(trainer)
    epochs = iter(trainer)
    for recorded in trial.epochs:
        try:
            fresh = next(epochs)
        except Diverged as exc:
            difference: str | None = f"epoch {recorded.epoch}: recorded as finite, now {exc}"
        else:
            difference = compare_epoch(recorded, fresh, tolerance)
            on_epoch(recorded, fresh, difference)
        if difference is not None:
            return Reproduction(
                "different", recorded.epoch, recorded.epoch, difference, changed
            ), trainer
    num_epochs = len(trial.epochs)
    difference = _compare_divergence(trial, epochs, changed) if trial.status == "diverged" else None
    if difference is not None:
        return Reproduction(
            "different", num_epochs + 1, num_epochs + 1, difference, changed
        ), trainer
    return Reproduction(
        "within tolerance" if changed else "identical", num_epochs, None, "", changed
    ), trainer


def _find_tolerance(
    state: SearchState, trial: TrialState, changed: tuple[str, ...]
) -> float | None:
    """What `compare_epoch` allows when these Numerics have changed; a ConfigError when it has not been measured."""
    if not changed:
        return None
    sd = load_seed_noise(state.header.space)
    if sd is None:
        raise ConfigError(
            f"{trial.run_id}: the Numerics differ ({'; '.join(changed)}) and the seed noise of space "
            f"{state.header.space} is not in {SEED_NOISE_FILE.name}. Measure it: python benchmarks/seed_noise.py."
        )
    return TOLERANCE_SDS * sd


def replay_failure(
    state: SearchState,
    trial: TrialState,
    data: TrainVal,
    numerics: Numerics,
    on_epoch: Callable[[EpochResult, EpochResult, str | None], None],
    on_trainer: Callable[[Trainer], None] | None = None,
) -> Reproduction:
    """Train a failed run again, through the epoch in which it failed. It must fail there again with the same type of
    exception, after epochs that agree as those of any other run; the arguments are those of `reproduce_run`.

    Raises:
        ConfigError: when epochs must be compared, Numerics differ and the space's seed noise has not been measured.
    """
    failure = parse_failure(read_error(state, trial))
    changed = tuple(compare_numerics(trial.driver.numerics, numerics))
    tolerance = _find_tolerance(state, trial, changed) if trial.epochs else None
    num_epochs, last = len(trial.epochs), len(trial.epochs) + 1

    def train() -> Iterator[EpochResult]:
        trainer = Trainer(trial.config, data, numerics)
        if on_trainer is not None:
            on_trainer(trainer)
        yield from trainer

    epochs = train()
    for epoch, recorded in enumerate((*trial.epochs, None), start=1):
        try:
            fresh = next(epochs, None)
        except Exception as exc:  # what is looked for: all of it is shown
            text = "".join(traceback.format_exception(exc))
            now = parse_failure(text)
            if recorded is None and now.kind == failure.kind:
                verdict: Verdict = "within tolerance" if changed else "identical"
                return Reproduction(
                    verdict, num_epochs, None, f"It fails again: {now.what}", changed, text
                )
            before = f"failed with {failure.what}" if recorded is None else "finished"
            detail = f"epoch {epoch}: recorded as {before}, now {now.what}"
            return Reproduction("different", epoch, epoch, detail, changed, text)
        if recorded is None or fresh is None:
            break
        difference = compare_epoch(recorded, fresh, tolerance)
        on_epoch(recorded, fresh, difference)
        if difference is not None:
            return Reproduction("different", epoch, epoch, difference, changed)
    when = "after the last epoch" if num_epochs == trial.config.epochs else f"in epoch {last}"
    detail = (
        f"It failed {when} ({failure.what}) and does not fail now: the fault was not the configuration's, but the "
        "machine's (memory, disk, a killed process)."
    )
    return Reproduction("different", last, last, detail, changed)


def _compare_divergence(
    trial: TrialState, epochs: Iterator[EpochResult], changed: tuple[str, ...]
) -> str | None:
    """What differs in the epoch in which the recorded run diverged, or None."""
    try:
        next(epochs)
    except Diverged as exc:
        if changed or str(exc) == trial.reason:
            return None
        return f"recorded: {trial.reason} Now: {exc}"
    return f"epoch {len(trial.epochs) + 1}: recorded {trial.reason} Now the loss stayed finite."
