"""Evaluation on the test set, and the log of it. No other module opens the test file."""

from __future__ import annotations

from datetime import UTC, datetime

from tune_cifar.data.files import DataSource
from tune_cifar.data.load import CLASS_NAMES, Split, load_test
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


def check_testable(trial: TrialState) -> None:
    """Refuse to evaluate an unfinished training on the test set.

    Raises:
        RecordError: when the training did not run to its last epoch.
    """
    if trial.status != "complete":
        rule = "only a complete training can be evaluated on the test set"
        raise RecordError(f"{trial.run_id}: {rule}, this one is {trial.status}.")


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
            data_digest=data.digest,
        )
        write_test_log(test_log, [*load_test_log(test_log), row])
    return row, (evaluation, split)
