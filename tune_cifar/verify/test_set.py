"""The sealed test set: the one room that opens it, and writes every opening down (openings.py)."""

from __future__ import annotations

import csv
import os
from dataclasses import astuple
from datetime import UTC, datetime
from pathlib import Path

from tune_cifar.data.files import DataSource
from tune_cifar.data.load import CLASS_NAMES, Split, load_test
from tune_cifar.errors import RecordError
from tune_cifar.record.environment import describe_environment
from tune_cifar.record.state import TrialState
from tune_cifar.record.test_log import OPENINGS_COLUMNS, TestEvaluation
from tune_cifar.train.metrics import Evaluation, evaluate_logits
from tune_cifar.train.trainer import Trainer


def check_testable(trial: TrialState) -> None:
    """Refuse a test of a training that has no end to be judged.

    Raises:
        RecordError: when the training did not run to its last epoch.
    """
    if trial.status != "complete":
        raise RecordError(
            f"{trial.run_id}: only a complete training may be tested, got a {trial.status} one."
        )


def open_test(
    trainer: Trainer, trial: TrialState, source: DataSource, test_log: Path, command: str
) -> tuple[TestEvaluation, Evaluation, Split]:
    """Judge the trainer's weights on the test set, in one evaluation, and append the opening to the file.

    Returns:
        the opening, the evaluation of the same answers, and the images that were opened, for its figures.

    Raises:
        DataError: when the test file is missing or not genuine.
        RecordError: when the opening could not be written down; nothing is judged then.
    """
    split = load_test(source)
    try:
        file = test_log.open("a", newline="", encoding="utf-8")
    except OSError as exc:
        raise RecordError(
            f"{test_log}: every opening must be written down, got {exc.strerror!r}."
        ) from exc
    with file:
        evaluation = evaluate_logits(
            trainer.predict(split), split.labels_N, CLASS_NAMES[source.name], "test"
        )
        opening = TestEvaluation(
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            commit=describe_environment().get("git_commit", ""),
            fingerprint=trial.fingerprint,
            seed=trial.config.seed,
            run_id=trial.run_id,
            data=source.name,
            images=len(split),
            test_acc=evaluation.accuracy,
            test_loss=evaluation.loss,
            command=command,
        )
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(OPENINGS_COLUMNS)
        writer.writerow(astuple(opening))
        file.flush()
        os.fsync(file.fileno())
    return opening, evaluation, split
