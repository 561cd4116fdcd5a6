"""A single training with a record of its own, and the trained network of a recorded run."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tune_cifar.data.files import DataSource, find_data
from tune_cifar.data.load import Split, TrainVal, load_train_val
from tune_cifar.errors import ConfigError, DataError, DiskFullError, Diverged, RecordError
from tune_cifar.models.custom import add_source
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
from tune_cifar.record.files import ERROR, WEIGHTS
from tune_cifar.record.journal import Record
from tune_cifar.record.state import INTERRUPTED, SearchState, TrialState
from tune_cifar.record.store import make_name, search_folder
from tune_cifar.schema import DataInfo, Numerics, TrainConfig
from tune_cifar.space.select import SearchSpace
from tune_cifar.train.checkpoint import load_weights
from tune_cifar.train.metrics import Evaluation, evaluate_logits
from tune_cifar.train.numerics import compare_numerics, restore_numerics
from tune_cifar.train.trainer import Trainer
from tune_cifar.train.trial import train_trial

logger = logging.getLogger(__name__)
# Called with the state after each recorded event.
Listener = Callable[[SearchState, Event], None]


class Shown:
    """A listener that only shows: after its first fault it is not called again, and nothing ends.

    The record has the event already.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener: Listener | None = listener

    def __call__(self, state: SearchState, event: Event) -> None:
        if self._listener is None:
            return
        try:
            self._listener(state, event)
        except Exception as exc:
            self._listener = None
            fault = f"{type(exc).__name__}: {exc}"
            logger.warning("%s", f"{state.folder.name}: its display failed and is off ({fault})")


def make_header(
    kind: Kind,
    name: str,
    space: SearchSpace,
    seed: int,
    data: DataInfo,
    numerics: Numerics,
    command: str,
) -> Header:
    """Make the first line of a record: everything that is fixed before the first trial."""
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
        is_conditional=kind == "search",
        pinned=dict(space.pinned),
        space_text=space.text,
        model_source=space.model_source,
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
    """Open the record of a single training, a new one or one to resume, and load its images.

    Args:
        name: of the record; without one a new training is named after the space and the time.
        command: the command line, for the record.

    Raises:
        ConfigError: `resume` without a name, of a finished training, or with another config, other
            data or other Numerics than recorded.
        RecordError: the name is taken, or with `resume` unknown.
    """
    config = space.baseline
    data = load_train_val(source, config.train_size, config.val_size)
    if not resume:
        create = Record.create
        if name is None:
            name, create = make_name(storage, f"train-{space.name}"), Record.create_numbered
        header = make_header("train", name, space, config.seed, data.info, numerics, command)
        return create(search_folder(storage, name), header), data
    if name is None:
        hint = "`python -m tune_cifar leaderboard` shows the names."
        raise ConfigError(f"`resume=True` needs `name`, got none. {hint}")
    record = Record.open(search_folder(storage, name))
    changes = _find_changes(record.state.header, config, numerics, data.info)
    if changes or record.state.is_finished:
        record.close()
        rule = f"`resume=True`: {name} must be unfinished and its settings as recorded"
        raise ConfigError(f"{rule}, got {'; '.join(changes) or 'a finished training'}.")
    resumed = SearchResumed(
        time=utc_now(),
        trials=1,
        changes=[],
        numerics=numerics,
        environment=describe_environment(),
        command=command,
    )
    record.append(resumed)
    return record, data


def _find_changes(
    header: Header, config: TrainConfig, numerics: Numerics, data: DataInfo
) -> list[str]:
    """Return what differs from the record of a training, as `name: recorded -> now`."""
    changes = compare_numerics(header.numerics, numerics)
    recorded = TrainConfig(**header.baseline)
    for knob, value in config:
        before = getattr(recorded, knob)
        if before != value:
            changes.append(f"{knob}: {before} -> {value}")
    if header.data != data:
        changes.append(f"data: {describe_images(header.data)} -> {describe_images(data)}")
    if header.kind != "train":
        changes.append(KIND_WORDS[header.kind])
    return changes


def run_training(
    record: Record,
    data: TrainVal,
    numerics: Numerics,
    on_event: Listener,
    on_trainer: Callable[[Trainer], None] | None = None,
) -> None:
    """Train the baseline of a record of kind `train` as its trial 0, or resume it.

    A diverged training ends as a result. An interrupted one (Ctrl-C) can be resumed. Any other
    exception is written to the trial's folder, recorded as failed and raised again.

    Args:
        on_event: called with every event once it is on disk; its faults end nothing.
        on_trainer: called once with the Trainer before the first epoch.
    """
    start, show = time.monotonic(), Shown(on_event)
    config = TrainConfig(**record.state.header.baseline)

    def append(event: Event) -> None:
        record.append(event)
        show(record.state, event)

    def end_trial(status: EndStatus, reason: str, **files: Any) -> None:
        score, now = trial.find_score(status), utc_now()
        append(TrialEnded(trial=0, status=status, reason=reason, score=score, time=now, **files))

    def end_search(reason: str) -> None:
        append(SearchEnded(reason=reason, wall_seconds=time.monotonic() - start))

    if 0 not in record.state.trials:
        started = TrialStarted(
            trial=0,
            origin="train",
            params={},
            config=config.model_dump(mode="json"),
            fingerprint=config.fingerprint,
            time=utc_now(),
        )
        append(started)
    trial = record.state.trials[0]
    folder = record.state.trial_folder(0)
    folder.mkdir(parents=True, exist_ok=True)
    num_recorded = trial.epochs_done
    try:
        if trial.status == "running":
            for result in train_trial(config, data, numerics, folder, on_trainer):
                if result.epoch > num_recorded:
                    append(EpochReported(trial=0, result=result))
            end_trial("complete", "all epochs", weights_file=relative(record, folder / WEIGHTS))
    except Diverged as exc:
        end_trial("diverged", str(exc))
    except (RecordError, DiskFullError):
        raise  # Nothing more can be recorded: the training can be resumed when there is room.
    except KeyboardInterrupt:
        if not record.file.closed:
            end_search(INTERRUPTED)
        raise
    except Exception as exc:
        error_file = relative(record, write_error(folder, traceback.format_exc()))
        end_trial("failed", repr(exc), error_file=error_file)
        end_search("failed")
        raise
    end_search("trained")


def write_error(folder: Path, text: str) -> Path:
    """Write a trial's traceback to its folder; return the path."""
    path = folder / ERROR
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def relative(record: Record, path: Path) -> str:
    """Return a path in a search's folder as the record stores it."""
    return str(path.relative_to(record.state.folder))


def find_recorded_data(state: SearchState, data: str | None) -> DataSource:
    """Find the data of a record: the record says which they are, `data` only where they lie.

    Raises:
        ConfigError: when other data are found.
        DataError: when none are.
    """
    wanted = state.header.data.name
    # Other data than CIFAR-10 are found by their name, or where TUNE_CIFAR_DATA points.
    is_there = data is None and wanted not in ("cifar10", "shapes") and _is_at_hand(wanted)
    named = None if wanted == "cifar10" or is_there else wanted
    source = find_data(data or named)
    if source.name != wanted:
        way_out = "Give its data as `data`."
        raise ConfigError(
            f"{state.header.name} was trained on {wanted}, got {source.name}. {way_out}"
        )
    return source


def _is_at_hand(name: str) -> bool:
    """Return whether the default places have the data of this name."""
    try:
        return find_data(None).name == name
    except DataError:
        return False


def load_recorded_data(state: SearchState, trial: TrialState, source: DataSource) -> TrainVal:
    """Load the run's images and check that they are the recorded ones.

    Raises:
        DataError: the data or the split differ from the record.
    """
    if state.header.model_source:
        add_source(state.header.model_source)
    data = load_train_val(source, trial.config.train_size, trial.config.val_size)
    recorded = state.header.data
    if data.info != recorded:
        is_synthetic = recorded.name == "shapes"
        name = "CIFAR-10" if recorded.name == "cifar10" else recorded.name
        hint = "Use `data='shapes'`." if is_synthetic else f"Point `data` at {name}."
        raise DataError(
            f"{trial.run_id}: data must be the recorded {describe_images(recorded)}, "
            f"got {describe_images(data.info)}. {hint}"
        )
    return data


def describe_images(info: DataInfo) -> str:
    """Return a name with the first digits of both hashes: any of the three may have changed."""
    return f"{info.name} (files {info.digest[:8]}, split {info.split_hash[:8]})"


def load_trained(
    state: SearchState,
    trial: TrialState,
    data: TrainVal,
    numerics: Numerics,
    hint: str = "Leave out `no_retrain=True` to train it again.",
) -> Trainer:
    """Return a Trainer with the weights that the run left.

    Args:
        hint: the end of the error's message: what the user can do.

    Raises:
        RecordError: the run's weights were not kept.
    """
    path = state.folder / (trial.weights_file or "")
    if trial.weights_file is None or not path.exists():
        problem = "its weights were not kept (only a search's best trials keep them)"
        raise RecordError(f"{trial.run_id}: {problem}. {hint}")
    # No graph is captured: nothing will be trained.
    trainer = Trainer(trial.config, data, numerics.model_copy(update={"execution": "eager"}))
    trainer.model.load_state_dict(load_weights(path))
    return trainer


def evaluate_trained(
    state: SearchState,
    trial: TrialState,
    data: TrainVal,
    hint: str,
    device: str | None = None,
) -> tuple[Evaluation, Split]:
    """Evaluate the weights that the run left on its validation images; return these, too.

    Args:
        hint: see `load_trained`.
        device: instead of the recorded one.

    Raises:
        RecordError: the run has no validation images, or its weights were not kept.
    """
    if data.val is None:
        raise RecordError(f"{trial.run_id} was trained without validation images.")
    numerics = restore_numerics(trial.numerics, device)
    logits_NK = load_trained(state, trial, data, numerics, hint).predict(data.val)
    names = data.about.class_names
    return evaluate_logits(logits_NK, data.val.labels_N, names, "validation"), data.val
