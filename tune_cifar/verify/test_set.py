"""Evaluation on the test set, and the log of it. No other module opens the test file.

3 % of CIFAR-10's test images have a near duplicate among its training images. The accuracy on the
others is measured beside the usual one. Source of the list (near_duplicates.csv): Barz and Denzler
2020, "Do We Train on Test Data? Purging CIFAR of Near-Duplicates", the 286 pairs of ciFAIR.
"""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from tune_cifar.data.files import DataSource, describe_data
from tune_cifar.data.load import Split, load_test
from tune_cifar.errors import RecordError
from tune_cifar.record.environment import describe_environment
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.record.test_log import (
    TestEvaluation,
    find_test_evaluations,
    load_test_log,
    lock_test_log,
    write_test_log,
)
from tune_cifar.train.metrics import Evaluation, evaluate_logits
from tune_cifar.train.trainer import Trainer

NEAR_DUPLICATES_FILE = Path(__file__).with_name("near_duplicates.csv")


def check_testable(trial: TrialState) -> None:
    """Refuse to evaluate an unfinished training on the test set.

    Raises:
        RecordError: when the training did not run to its last epoch.
    """
    if trial.status != "complete":
        rule = "only a complete training can be evaluated on the test set"
        raise RecordError(f"{trial.run_id}: {rule}, this one is {trial.status}.")


def list_near_duplicates(data: str) -> list[int]:
    """Return the test images with near duplicates among the training images, by their index.

    None is known of another data set than CIFAR-10.
    """
    if data != "cifar10":
        return []
    with NEAR_DUPLICATES_FILE.open(encoding="utf-8", newline="") as file:
        return [int(row["test_image"]) for row in csv.DictReader(file)]


def measure_unique(logits_NK: Tensor, labels_N: Tensor, data: str) -> float | None:
    """Return the accuracy without near duplicates; None where no list of them is known.

    Args:
        logits_NK: float (N, classes), of all test images in the order of the data set's files.
        labels_N: int64 (N,).
    """
    duplicates = list_near_duplicates(data)
    if not duplicates or max(duplicates) >= len(labels_N):  # a test's few images in their files
        return None
    is_correct_N = logits_NK.argmax(dim=1).cpu() == labels_N.cpu()
    is_unique_N = torch.ones(len(labels_N), dtype=torch.bool)
    is_unique_N[duplicates] = False
    return is_correct_N[is_unique_N].double().mean().item()


def evaluate_test_set(
    trainer: Trainer,
    state: SearchState,
    trial: TrialState,
    source: DataSource,
    command: str,
    again: bool = False,
) -> tuple[TestEvaluation, tuple[Evaluation, Split] | None]:
    """Evaluate the trainer's weights on the test set, unless its training was, and log the result.

    Nothing of the result is known to anybody before its row is on the disk. A process that is
    killed before that leaves the log as it was.

    Args:
        command: of the user, for the log.
        again: evaluate although this training was evaluated before.

    Returns:
        The row of the log. With the evaluation, and the test images for its figures; None when the
        row is that of the first evaluation, before this one.

    Raises:
        DataError: when the test file is missing or its checksum is wrong.
        RecordError: when the log cannot be read or written; the test file is not opened then.
    """
    data = state.header.data
    with lock_test_log(state.storage) as test_log:
        logged = find_test_evaluations(state.storage, trial.fingerprint, data)
        if logged and not again:
            return logged[0], None
        split = load_test(source)
        names = describe_data(source).class_names
        logits_NK = trainer.predict(split)
        evaluation = evaluate_logits(logits_NK, split.labels_N, names, "test")
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
            data_digest=data.digest,
            test_acc_unique=measure_unique(logits_NK, split.labels_N, source.name),
        )
        write_test_log(test_log, [*load_test_log(test_log), row])
    return row, (evaluation, split)
