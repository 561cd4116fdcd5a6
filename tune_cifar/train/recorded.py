"""A single training with a record of its own; and the network that a recorded run trained."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from tune_cifar.data.files import DataSource
from tune_cifar.data.load import TrainVal, load_train_val
from tune_cifar.errors import ConfigError, DataError, DiskFullError, Diverged, RecordError
from tune_cifar.record.environment import describe_environment
from tune_cifar.record.events import (
    KIND_WORDS,
    EndStatus,
    EpochReported,
    Event,
    Header,
    Kind,
    SearchEnded,
    SearchResumed,
    TrialEnded,
    TrialStarted,
    utc_now,
)
from tune_cifar.record.journal import Record
from tune_cifar.record.state import INTERRUPTED, SearchState, TrialState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import DataInfo, Numerics, TrainConfig
from tune_cifar.space.select import SearchSpace
from tune_cifar.train.checkpoint import load_weights
from tune_cifar.train.numerics import compare_numerics
from tune_cifar.train.trainer import Trainer
from tune_cifar.train.trial import ERROR, WEIGHTS, train_trial

Listener = Callable[[SearchState, Event], None]


def run_training(
    record: Record,
    data: TrainVal,
    numerics: Numerics,
    listener: Listener,
    on_trainer: Callable[[Trainer], None] | None = None,
) -> None:
    """Train the baseline of a record of kind `train` as its trial 0, or go on with it where it was interrupted.

    Every epoch is in the record before the listener hears of it. A diverged training ends as a result; Ctrl-C leaves it
    to be gone on with; any other exception is written to the trial's folder, recorded as failed and raised again.
    """
    start = time.monotonic()
    config = TrainConfig(**record.state.header.baseline)

    def append(event: Event) -> None:
        record.append(event)
        listener(record.state, event)

    def end(status: EndStatus, reason: str, **files: Any) -> None:
        score = trial.find_score(status)
        append(
            TrialEnded(trial=0, status=status, reason=reason, score=score, time=utc_now(), **files)
        )

    if 0 not in record.state.trials:
        dump = config.model_dump(mode="json")
        started = TrialStarted(
            trial=0,
            origin="train",
            params={},
            config=dump,
            fingerprint=config.fingerprint,
            time=utc_now(),
        )
        append(started)
    trial = record.state.trials[0]
    folder = record.state.trial_folder(0)
    folder.mkdir(parents=True, exist_ok=True)
    reported = trial.epochs_done
    try:
        if trial.status == "running":
            for result in train_trial(config, data, numerics, folder, on_trainer):
                if result.epoch > reported:
                    append(EpochReported(trial=0, result=result))
            weights = {"weights_file": relative(record, folder / WEIGHTS)}
            end("complete", "all epochs", **weights)
    except Diverged as exc:
        end("diverged", str(exc))
    except (
        RecordError,
        DiskFullError,
    ):  # there is no place to tell: it can be gone on with when there is room
        raise
    except KeyboardInterrupt:
        if not record.file.closed:
            append(SearchEnded(reason=INTERRUPTED, wall_seconds=time.monotonic() - start))
        raise
    except Exception as exc:
        error_file = relative(record, write_error(folder, traceback.format_exc()))
        end("failed", repr(exc), error_file=error_file)
        append(SearchEnded(reason="failed", wall_seconds=time.monotonic() - start))
        raise
    append(SearchEnded(reason="trained", wall_seconds=time.monotonic() - start))


def write_error(folder: Path, text: str) -> Path:
    """Keep a trial's traceback where the summary says it lies."""
    path = folder / ERROR
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def relative(record: Record, path: Path) -> str:
    """A path below a search's folder as the record stores it."""
    return str(path.relative_to(record.state.folder))


def make_header(
    kind: Kind,
    name: str,
    space: SearchSpace,
    seed: int,
    data: DataInfo,
    numerics: Numerics,
    command: str,
) -> Header:
    """The first line of a record: everything that was settled before the first trial."""
    return Header(
        name=name,
        kind=kind,
        space=space.name,
        tier=space.tier,
        created=utc_now(),
        seed=seed,
        baseline=space.baseline.model_dump(mode="json"),
        points=list(space.points),
        distributions=space.describe_distributions(),
        budget=space.budget.model_dump(mode="json"),
        pinned=dict(space.pinned),
        space_text=space.text,
        data=data,
        numerics=numerics,
        environment=describe_environment(),
        command=command,
    )


def open_training(
    space: SearchSpace,
    source: DataSource,
    numerics: Numerics,
    storage: Path,
    name: str | None,
    command: str,
    resume: bool,
) -> tuple[Record, TrainVal]:
    """The record of a single training, new or to be gone on with, and its images.

    Raises:
        ConfigError: when --resume finds another configuration or other Numerics than the recorded ones.
        RecordError: when the name is taken (or, with resume, unknown).
    """
    config = space.baseline
    data = load_train_val(source, config.train_size, config.val_size)
    if not resume:
        name = name or f"train-{space.name}-{datetime.now():%Y%m%d-%H%M%S}"
        header = make_header("train", name, space, config.seed, data.info, numerics, command)
        return Record.create(search_folder(storage, name), header), data
    if name is None:
        raise ConfigError("--resume: needs --name, got none. Names stand in `leaderboard`.")
    record = Record.open(search_folder(storage, name))
    header = record.state.header
    changes = compare_numerics(header.numerics, numerics)
    recorded = TrainConfig(**header.baseline)
    if recorded != config:
        changes += [
            f"{k}: {getattr(recorded, k)} -> {v}" for k, v in config if getattr(recorded, k) != v
        ]
    if header.data != data.info:
        changes.append(f"data: {header.data.name} -> {data.info.name}")
    if header.kind != "train":
        changes.append(KIND_WORDS[header.kind])
    if changes or record.state.is_finished:
        record.close()
        reason = "; ".join(changes) or "a finished training"
        raise ConfigError(
            f"--resume: {name} must be unfinished and as it was recorded, got {reason}."
        )
    now, facts = utc_now(), describe_environment()
    record.append(
        SearchResumed(
            time=now, trials=1, changes=[], numerics=numerics, environment=facts, command=command
        )
    )
    return record, data


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
            + (
                "Give --data shapes."
                if state.header.data.name == "shapes"
                else "Point --data at CIFAR-10."
            )
        )
    return data


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
