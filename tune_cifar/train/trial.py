"""One training with checkpoints, as search, train and confirm run it.

`train_trial` is the generator behind every trial: it resumes from the newest checkpoint in the
trial's folder, saves at most once a minute, and writes weights after the last stage's last epoch.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tune_cifar.data.load import TrainVal
from tune_cifar.errors import CheckpointError
from tune_cifar.record.files import CHECKPOINTS, WEIGHTS, stop_file
from tune_cifar.schema import MAX_EPOCHS, EpochResult, Numerics, TrainConfig
from tune_cifar.train.checkpoint import CHECKPOINT_SECONDS, CheckpointFolder, save_weights
from tune_cifar.train.trainer import Trainer

logger = logging.getLogger(__name__)


def train_trial(
    config: TrainConfig,
    data: TrainVal,
    numerics: Numerics,
    folder: Path,
    on_trainer: Callable[[Trainer], None] | None = None,
    every_seconds: float = CHECKPOINT_SECONDS,
    is_final: bool = True,
    replicate: int = 0,
) -> Iterator[EpochResult]:
    """Train with checkpoints in `folder/checkpoints`; write `folder/weights.safetensors` last.

    The checkpoint after the last epoch holds the results alone: nobody trains on from it. When the
    last result is yielded, weights and results are on disk.

    When the search is stopping (`stop_file`), the training ends after an epoch, with a checkpoint.

    A resumed training first yields the results stored in its checkpoint again, so a consumer that
    was killed between a checkpoint and its own record of the result loses nothing. Checkpoints of
    the same recipe over another number of epochs or under an earlier replicate's seed (an earlier
    stage) are deleted: this training starts from scratch.

    Args:
        folder: the trial's folder, in the folder `trials` of its search.
        on_trainer: called once with the Trainer before the first epoch; a display may read its
            `step`.
        every_seconds: shortest time between two checkpoints.
        is_final: False for a stage that another follows: its weights serve nobody.
        replicate: which one of this recipe it is, each with the seed after the one before.

    Yields:
        the EpochResults of all epochs, those before a resumption included.
    """
    trainer = Trainer(config, data, numerics)
    checkpoints = CheckpointFolder(folder / CHECKPOINTS, every_seconds)
    state, _ = checkpoints.load_newest()
    if state is not None and _is_of_another_stage(state, config, replicate):
        checkpoints.delete()
    elif state is not None:
        trainer.load_state_dict(state)
    if on_trainer is not None:
        on_trainer(trainer)
    yield from trainer.results
    for result in trainer:
        is_last = result.epoch == config.epochs
        if is_last and is_final:  # before the checkpoint, which says that they are there
            save_weights(folder / WEIGHTS, trainer.model.state_dict())
        is_saved = is_last or checkpoints.is_due()
        if is_saved:
            _save(checkpoints, trainer)
        yield result
        if stop_file(folder.parents[1]).exists():
            if not is_saved:
                _save(checkpoints, trainer)
            return


def _is_of_another_stage(state: dict[str, Any], config: TrainConfig, replicate: int) -> bool:
    """Return whether a checkpoint is of another length or of a replicate before this one."""
    found = state["fingerprint"]
    if found == config.fingerprint:
        return False
    lengths, seeds = range(state["epoch"], MAX_EPOCHS + 1), range(-replicate, 1)
    stages = itertools.product(lengths, seeds)
    return any(found == config.shorten(*stage).fingerprint for stage in stages)


def _save(checkpoints: CheckpointFolder, trainer: Trainer) -> None:
    """Save a checkpoint; a full disk does not end the training, the previous one stays."""
    is_over = trainer.epoch == trainer.config.epochs
    try:
        checkpoints.save(trainer.progress_dict() if is_over else trainer.state_dict())
    except CheckpointError as exc:
        logger.warning("%s", exc)
