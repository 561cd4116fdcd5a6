"""A recorded run, trained again, and the word that compares the two: identical, within tolerance or different.

Under equal Numerics every recorded figure must come back bit for bit. Under others (another processor, another
version of torch) the accuracies must lie within three standard deviations of that space's seed noise, and what
differed is named. A failed run must fail again. The test set is opened here and in confirm only, and every opening is
written down.
"""

from __future__ import annotations

import csv
import json
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from tune_cifar.checkpoint import load_weights
from tune_cifar.data import CLASS_NAMES, DataSource, Split, TrainVal, load_test, load_train_val
from tune_cifar.engine import Trainer
from tune_cifar.errors import ConfigError, DataError, Diverged, RecordError
from tune_cifar.judge import Judgement, judge_logits
from tune_cifar.numerics import compare_numerics, describe_environment
from tune_cifar.record import SearchState, TrialState
from tune_cifar.results import parse_failure, read_error
from tune_cifar.schema import REPRODUCIBLE_FIELDS, EpochResult, Numerics

Verdict = Literal["identical", "within tolerance", "different"]

# Accuracies under other Numerics may differ by this many standard deviations of the space's seed noise.
TOLERANCE_SDS = 3
SEED_NOISE_FILE = Path(__file__).with_name("seed_noise.json")
OPENINGS_FILE = "TEST_OPENINGS.csv"


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


def load_recorded_data(state: SearchState, trial: TrialState, source: DataSource) -> TrainVal:
    """The run's images, checked to be the recorded ones.

    Raises:
        DataError: when the data or the split are not those of the record.
    """
    data = load_train_val(source, trial.config.train_size, trial.config.val_size)
    if data.info != state.header.data:
        raise DataError(
            f"{trial.run_id}: the data must be the recorded {state.header.data.name} with split "
            f"{state.header.data.split_hash}, got {data.info.name} with {data.info.split_hash}. "
            + ("Give --data shapes." if state.header.data.name == "shapes" else "Point --data at CIFAR-10.")
        )
    return data


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
        raise RecordError(f"{trial.run_id}: at least one recorded epoch must be there to compare, got none.")
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
            return Reproduction("different", recorded.epoch, recorded.epoch, difference, changed), trainer
    num_epochs = len(trial.epochs)
    difference = _compare_divergence(trial, epochs, changed) if trial.status == "diverged" else None
    if difference is not None:
        return Reproduction("different", num_epochs + 1, num_epochs + 1, difference, changed), trainer
    return Reproduction("within tolerance" if changed else "identical", num_epochs, None, "", changed), trainer


def _find_tolerance(state: SearchState, trial: TrialState, changed: tuple[str, ...]) -> float | None:
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
                return Reproduction(verdict, num_epochs, None, f"It fails again: {now.what}", changed, text)
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


def _compare_divergence(trial: TrialState, epochs: Iterator[EpochResult], changed: tuple[str, ...]) -> str | None:
    """What differs in the epoch in which the recorded run diverged, or None."""
    try:
        next(epochs)
    except Diverged as exc:
        if changed or str(exc) == trial.reason:
            return None
        return f"recorded: {trial.reason} Now: {exc}"
    return f"epoch {len(trial.epochs) + 1}: recorded {trial.reason} Now the loss stayed finite."


def load_trained(
    state: SearchState,
    trial: TrialState,
    data: TrainVal,
    numerics: Numerics,
    way_out: str = "Leave out --no-retrain to train it again.",
) -> Trainer:
    """A Trainer that carries the run's kept weights.

    Args:
        way_out: what the user can do when there are none.

    Raises:
        RecordError: when the run's weights were not kept.
    """
    path = state.folder / (trial.weights_file or "")
    if trial.weights_file is None or not path.exists():
        raise RecordError(
            f"{trial.run_id}: weights must have been kept, got none (only a search's best trials keep them). {way_out}"
        )
    trainer = Trainer(trial.config, data, numerics)
    trainer.model.load_state_dict(load_weights(path))
    return trainer


@dataclass(frozen=True)
class TestOpening:
    """One look at the test set, as it stands in TEST_OPENINGS.csv."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    date: str
    commit: str
    fingerprint: str
    seed: int
    run_id: str
    data: str
    images: int
    test_acc: float
    test_loss: float
    command: str


OPENINGS_COLUMNS = tuple(column.name for column in fields(TestOpening))


def find_openings_file(storage: Path, data_name: str) -> Path:
    """./analysis/TEST_OPENINGS.csv where a checkout is worked in, else in the run store; the stand-in's openings are
    never mixed with CIFAR-10's."""
    folder = Path("analysis").resolve()
    return folder / OPENINGS_FILE if folder.is_dir() and data_name == "cifar10" else storage / OPENINGS_FILE


def load_openings(path: Path, fingerprint: str, data_name: str) -> list[TestOpening]:
    """Earlier openings for a training on these data, oldest first.

    Raises:
        RecordError: when the file is not what `open_test` writes.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    try:
        if tuple(header) != OPENINGS_COLUMNS:
            raise ValueError(f"the columns {', '.join(header) or 'none'}")
        openings = [_read_opening(row) for row in rows]
    except (ValueError, TypeError) as exc:
        columns = ", ".join(OPENINGS_COLUMNS)
        raise RecordError(f"{path}: rows of {columns} must stand there, got {exc}. Mend it or move it away.") from exc
    return [opening for opening in openings if (opening.fingerprint, opening.data) == (fingerprint, data_name)]


def _read_opening(row: list[str]) -> TestOpening:
    numbers = {"seed": int, "images": int, "test_acc": float, "test_loss": float}
    cells = dict(zip(OPENINGS_COLUMNS, row, strict=True))
    return TestOpening(**{name: numbers.get(name, str)(cell) for name, cell in cells.items()})


def check_testable(trial: TrialState) -> None:
    """Refuse a test of a training that has no end to be judged.

    Raises:
        RecordError: when the training did not run to its last epoch.
    """
    if trial.status != "complete":
        raise RecordError(f"{trial.run_id}: only a complete training may be tested, got a {trial.status} one.")


def open_test(
    trainer: Trainer, trial: TrialState, source: DataSource, openings_file: Path, command: str
) -> tuple[TestOpening, Judgement, Split]:
    """Judge the trainer's weights on the test set, in one evaluation, and append the opening to the file.

    Returns:
        the opening, the judgement of the same answers, and the images that were opened, for its figures.

    Raises:
        DataError: when the test file is missing or not genuine.
        RecordError: when the opening could not be written down; nothing is judged then.
    """
    split = load_test(source)
    try:
        file = openings_file.open("a", newline="", encoding="utf-8")
    except OSError as exc:
        raise RecordError(f"{openings_file}: every opening must be written down, got {exc.strerror!r}.") from exc
    with file:
        judgement = judge_logits(trainer.predict(split), split.labels_N, CLASS_NAMES[source.name], "test")
        opening = TestOpening(
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            commit=describe_environment().get("git_commit", ""),
            fingerprint=trial.fingerprint,
            seed=trial.config.seed,
            run_id=trial.run_id,
            data=source.name,
            images=len(split),
            test_acc=judgement.accuracy,
            test_loss=judgement.loss,
            command=command,
        )
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(OPENINGS_COLUMNS)
        writer.writerow(astuple(opening))
        file.flush()
        os.fsync(file.fileno())
    return opening, judgement, split
