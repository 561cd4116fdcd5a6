"""Evaluation on the test set, and the log of it. No other module opens the test file."""

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
from tune_cifar.record.test_log import TEST_LOG_COLUMNS, TestEvaluation
from tune_cifar.train.metrics import Evaluation, evaluate_logits
from tune_cifar.train.trainer import Trainer


def check_testable(trial: TrialState) -> None:
    """Refuse to evaluate an unfinished training on the test set.

    Raises:
        RecordError: when the training did not run to its last epoch.
    """
    if trial.status != "complete":
        rule = "only a complete training can be evaluated on the test set"
        raise RecordError(f"{trial.run_id}: {rule}, this one is {trial.status}.")


def evaluate_test_set(
    trainer: Trainer, trial: TrialState, source: DataSource, test_log: Path, command: str
) -> tuple[TestEvaluation, Evaluation, Split]:
    """Evaluate the trainer's weights on the test set, and append the result to the test log.

    Args:
        command: of the user, for the log.

    Returns:
        The row of the log, the evaluation, and the test images for its figures.

    Raises:
        DataError: when the test file is missing or its checksum is wrong.
        RecordError: when the log cannot be written; nothing is evaluated then.
    """
    split = load_test(source)
    try:
        file = test_log.open("a", newline="", encoding="utf-8")
    except OSError as exc:
        raise RecordError(f"{test_log}: the test log cannot be written: {exc.strerror}.") from exc
    with file:
        names = CLASS_NAMES[source.name]
        evaluation = evaluate_logits(trainer.predict(split), split.labels_N, names, "test")
        row = TestEvaluation(
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
            writer.writerow(TEST_LOG_COLUMNS)
        writer.writerow(astuple(row))
        file.flush()
        os.fsync(file.fileno())
    return row, evaluation, split
