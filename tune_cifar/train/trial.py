"""One training with checkpoints, as search, train and confirm run it; and a single training with a record of its own.

`train_trial` is the one generator behind every trial: it goes on from the newest checkpoint in the trial's folder,
saves at most once a minute, and leaves the weights when the last epoch is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tune_cifar.data.load import TrainVal
from tune_cifar.errors import CheckpointError
from tune_cifar.schema import MAX_EPOCHS, EpochResult, Numerics, TrainConfig
from tune_cifar.train.checkpoint import CHECKPOINT_SECONDS, CheckpointFolder, save_weights
from tune_cifar.train.trainer import Trainer

logger = logging.getLogger(__name__)


CHECKPOINTS = "checkpoints"
WEIGHTS = "weights.safetensors"
ERROR = "error.txt"


def stop_file(search_folder: Path) -> Path:
    """While it exists, every training of the search ends after its epoch, with a checkpoint."""
    return search_folder / "stopping"


def train_trial(
    config: TrainConfig,
    data: TrainVal,
    numerics: Numerics,
    folder: Path,
    on_trainer: Callable[[Trainer], None] | None = None,
    every_seconds: float = CHECKPOINT_SECONDS,
) -> Iterator[EpochResult]:
    """Train, checkpointing into `folder/checkpoints`, and leave `folder/weights.safetensors` at the end. `folder` lies
    in its search's `trials`. When the search is stopping (`stop_file`) it ends after an epoch, with a checkpoint of it.

    A resumed training first yields the results stored in its checkpoint again, so that a consumer which died between
    a checkpoint and its own note of the result loses nothing. What the same recipe over another number of epochs (the
    cycle before) left there is deleted: this training begins from scratch.

    Args:
        on_trainer: called once with the Trainer before the first epoch; a display may read its `step`.
        every_seconds: shortest time between two checkpoints.
    """
    trainer = Trainer(config, data, numerics)
    checkpoints = CheckpointFolder(folder / CHECKPOINTS, every_seconds)
    state, _ = checkpoints.load_newest()
    if state is not None and _is_of_another_cycle(state, config):
        checkpoints.delete()
    elif state is not None:
        trainer.load_state_dict(state)
    if on_trainer is not None:
        on_trainer(trainer)
    yield from trainer.results
    for result in trainer:
        is_last = result.epoch == config.epochs
        if is_last:
            save_weights(folder / WEIGHTS, trainer.model.state_dict())
        is_saved = is_last or checkpoints.is_due()
        if is_saved:
            _save(checkpoints, trainer)
        yield result
        if stop_file(folder.parents[1]).exists():
            if not is_saved:
                _save(checkpoints, trainer)
            return


def _is_of_another_cycle(state: dict[str, Any], config: TrainConfig) -> bool:
    """Whether a checkpoint, of the end or from the middle, is the same recipe's over another number of epochs."""
    found, lengths = state["fingerprint"], range(state["epoch"], MAX_EPOCHS + 1)
    return found != config.fingerprint and any(
        found == config.shorten(length).fingerprint for length in lengths
    )


def _save(checkpoints: CheckpointFolder, trainer: Trainer) -> None:
    """A full disk ends no training: the checkpoint before stays."""
    try:
        checkpoints.save(trainer.state_dict())
    except CheckpointError as exc:
        logger.warning("%s", exc)
