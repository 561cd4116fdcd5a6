"""The MLflow runs of a record: which exist and what they hold; every MLflow call on them.

There is one experiment per space; in it one parent run per search (or single training), and one
child run per trial, with the active knobs as params, the epochs' figures as metrics, and config,
Numerics and environment as artifacts. An evaluation's figures are artifacts of its trial's run,
under `judge/validation` or `judge/test`.

A run is found again by its tags: `search` and `search_created` identify the record, `trial` the
trial. Writing twice gives the same, since all times come from the record. So a call that failed,
or of which it is unknown whether it arrived, is simply repeated; MLflow ignores a metric or param
that it has. Metrics are written before the tags that count them, the status last: a run that has
both needs nothing more.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tune_cifar.record.events import Header, Origin, SearchResumed
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.schema import Status, inactive_knobs
from tune_cifar.tracking.store import (
    create_experiment,
    find_experiment,
    make_client,
    place_experiment,
    search_runs,
)
from tune_cifar.tracking.views import MAX_TAG_CHARACTERS, make_experiment_tags

# Metrics of a child run, one point per epoch. The metric's step counts the epochs of all stages. A
# complete trial has its `score` too.
EPOCH_METRICS = ("val_acc", "val_loss", "train_acc", "train_loss", "lr", "images_per_second")
# Prefix of the names of an evaluation's metrics.
PART_PREFIX: dict[str, str] = {"validation": "val", "test": "test"}
# MLflow's status for each of ours: early stopping is a success. A run whose driver stopped before
# its trial ended is KILLED.
RUN_STATUS: dict[Status, str] = {
    "complete": "FINISHED",
    "stopped": "FINISHED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "running": "RUNNING",
}
# The start of a trial's note, before the command that trains it again.
ORIGIN_WORDS: dict[Origin, str] = {
    "baseline": "The baseline of the space, the reference of every gain. Train it again:",
    "point": "A point of the space file. Train it again:",
    "sampler": "Proposed by the sampler. Train it again:",
    "train": "A single training. Train it again:",
    "confirm": "A candidate under a new seed. Train it again:",
}
# MLflow takes 1,000 metrics, params and tags in a batch; about 60 are params and tags.
METRICS_PER_BATCH = 900


@dataclass
class Run:
    """What MLflow holds of a run.

    Attributes:
        is_new: created by this process.
    """

    run_id: str
    status: str
    tags: dict[str, str]
    params: frozenset[str] = frozenset()
    is_new: bool = False

    @property
    def epochs_done(self) -> int:
        """Number of epochs whose metrics MLflow has."""
        return int(self.tags.get("epochs_done", 0))


class SearchRuns:
    """The runs of one record: finds them all with one query, creates, fills and closes them.

    MLflow's own exceptions pass through. After one it is unknown what MLflow holds: make a new
    object. Only one process at a time may change the runs of a search.

    Args:
        is_running: the search has a driver; else the runs that MLflow shows as running are to be
            closed.

    Raises:
        TrackingError: when the store is a SQLite file that cannot be written, or the experiment is
            deleted.
    """

    def __init__(
        self, tracking_uri: str, storage: Path, state: SearchState, is_running: bool
    ) -> None:
        self._client = make_client(tracking_uri)
        self._header, self._folder = state.header, state.folder
        self._is_running = is_running
        header = state.header
        self._experiment, self._artifacts = place_experiment(
            tracking_uri, storage, header.space, header.data.name
        )
        self._experiment_id: str | None = None
        self._experiment_tags: dict[str, str] = {}
        if (found := find_experiment(self._client, self._experiment)) is not None:
            self._experiment_id, self._experiment_tags = found
        self.parent: Run | None = None
        self.children: dict[int, Run] = {}
        self._duplicates: list[Run] = []
        self._find_runs()

    def open(self, resumes: Sequence[SearchResumed]) -> None:
        """Create or update the parent run; it is RUNNING if the search has a driver now."""
        while self._duplicates:
            self._client.delete_run(self._duplicates.pop().run_id)
        header = self._header
        self._open_experiment()
        if self.parent is None:
            start = to_ms(header.created)
            self.parent = self._create_run(header.name, start, {"kind": header.kind})
        elif self._is_running:
            self._reopen_run(self.parent)
        tags = {
            "tier": header.tier or "",
            "data_digest": header.data.digest,
            "seed": str(header.seed),
            "git_commit": header.environment.get("git_commit", ""),
            "mlflow.note.content": f"`{header.command}`",
            "resumes": str(len(resumes)),
        }
        if self._is_running:
            tags["end"] = ""
        if self._find_missing(self.parent, tags):
            files = {
                "space.yaml": header.space_text,
                "numerics.json": header.numerics.model_dump_json(indent=2),
                "header.json": header.model_dump_json(indent=2),
            }
            for number, event in enumerate(resumes, start=1):
                files[f"resume-{number}.json"] = event.model_dump_json(indent=2)
            self._log_artifacts(self.parent, files)
            self._log(self.parent, tags)

    def upload_trial(self, trial: TrialState) -> bool:
        """Create or update a trial's run; return False when it was up to date."""
        if self.is_complete(trial):
            return False
        if trial.number not in self.children:
            self.children[trial.number] = self._create_trial_run(trial)
        run = self.children[trial.number]
        ended = trial.status != "running"
        if ended:
            self._log_artifacts(run, self._make_trial_files(trial))
        elif self._is_running:
            self._reopen_run(run)
        config = trial.full_config
        knobs = config.model_dump(mode="json", exclude={"model_args"}) | config.arguments
        omitted = {*inactive_knobs(config), *run.params}
        params = {knob: str(value) for knob, value in knobs.items() if knob not in omitted}
        tags = self._make_parent_tags() | {
            "status": trial.status,
            "epochs_done": str(trial.epochs_done),
            "fingerprint": trial.fingerprint,
            "git_commit": trial.driver.environment.get("git_commit", ""),
        }
        if ended:
            tags["reason"] = trial.reason
        if trial.nodes:
            tags["node"] = ", ".join(dict.fromkeys(node.node for node in reversed(trial.nodes)))
        if trial.retries:
            tags["retries"] = str(len(trial.retries))
            tags["faults"] = ", ".join(retry.fault for retry in trial.retries)
        metrics = _make_epoch_metrics(trial, self._header, run.epochs_done)
        self._log(run, tags, metrics, params)
        if ended:
            self._close_run(run, RUN_STATUS[trial.status], _find_end(trial, self._header))
        return True

    def log_evaluation(
        self, trial: TrialState, evaluation: Mapping[str, Any], files: Sequence[Path]
    ) -> bool:
        """Log an evaluation's files and figures on its trial's run; return False without a run.

        It creates no run, so another process may be uploading the search at the same time.
        """
        run = self.children.get(trial.number)
        if run is None:
            return False
        self._log_artifacts(run, {file.name: file for file in files}, f"judge/{evaluation['part']}")
        prefix, end = PART_PREFIX[evaluation["part"]], _find_end(trial, self._header)
        values = {f"{prefix}_acc_{c['name']}": c["accuracy"] for c in evaluation["classes"]}
        values[f"{prefix}_ece"] = evaluation["ece"]
        self._log(run, {}, _make_metrics(values, end, trial.epochs_done))
        return True

    def is_complete(self, trial: TrialState) -> bool:
        """Return whether a trial's run has everything that the record has."""
        run = self.children.get(trial.number)
        tags = self._make_parent_tags() | {"status": trial.status}
        if run is None or self._find_missing(run, tags) or run.epochs_done != trial.epochs_done:
            return False
        may_be_closed = trial.status == "running" and not self._is_running
        return may_be_closed or run.status == RUN_STATUS[trial.status]

    def close(self, state: SearchState) -> int:
        """Close every run that is RUNNING, since the search has no driver any more.

        The parent gets best score, gain and reason, the best trial's run its weights.

        Returns:
            Number of runs that MLflow showed as RUNNING, without those created by this process.
        """
        assert self.parent is not None, "open comes first"
        runs = [self.parent, *self.children.values()]
        num_closed = sum(run.status == "RUNNING" and not run.is_new for run in runs)
        for number, run in self.children.items():
            if run.status == "RUNNING":
                trial = state.trials.get(number)
                end = _find_end(trial, self._header) if trial else to_ms(self._header.created)
                self._close_run(run, "KILLED", end)
        end = _find_search_end(state)
        finished = state.finished
        reason = "driver died" if finished is None else finished.reason
        tags = {"end": reason, "events": str(state.num_events)}
        values: dict[str, float | None] = {}
        best = state.best
        if best is not None and best.score is not None:
            self._upload_weights(best)
            tags["best_run_id"] = best.run_id
            values["best_val_acc"] = best.score
            if state.baseline_score is not None:
                gain = best.score - state.baseline_score
                values["gain_over_baseline"] = round(gain, 9)  # no 0.09700000000000003
        status = "FINISHED" if state.is_finished else "KILLED"
        if self.parent.status != status or self._find_missing(self.parent, tags):
            self._log(self.parent, tags, _make_metrics(values, end, len(state.resumes)))
            self._close_run(self.parent, status, end)
        return num_closed

    def delete(self) -> int:
        """Delete every run of the record, and return how many there were.

        MLflow keeps deleted runs until `mlflow gc`.
        """
        runs = [*self.children.values(), *self._duplicates]
        if self.parent is not None:
            runs.append(self.parent)
        for run in runs:
            self._client.delete_run(run.run_id)
        return len(runs)

    def _find_runs(self) -> None:
        """Find parent and children, and duplicates: a server that answers too late makes some."""
        groups: dict[int | None, list[Run]] = {}  # by trial; None is the parent
        experiments = [] if self._experiment_id is None else [self._experiment_id]
        for found in search_runs(self._client, experiments, self._make_identity()):
            tags = dict(found.data.tags)
            run = Run(found.info.run_id, found.info.status, tags, frozenset(found.data.params))
            number = int(tags["trial"]) if "trial" in tags else None
            groups.setdefault(number, []).append(run)
        for number, runs in groups.items():
            # The most complete one is kept.
            runs.sort(key=lambda run: (run.status == "RUNNING", -run.epochs_done, run.run_id))
            first, *others = runs
            self._duplicates += others
            if number is None:
                self.parent = first
            else:
                self.children[number] = first

    def _open_experiment(self) -> None:
        """Create the experiment, or add the tags that it lacks; existing tags stay as they are."""
        tags = make_experiment_tags(self._header)
        if self._experiment_id is None:
            self._experiment_id = create_experiment(
                self._client, self._experiment, self._artifacts, tags
            )
        else:
            for name in tags.keys() - self._experiment_tags.keys():
                self._client.set_experiment_tag(self._experiment_id, name, tags[name])
        self._experiment_tags |= tags

    def _make_identity(self) -> dict[str, str]:
        """Return the tags that identify the record."""
        # Not `created`: in MLflow's filters that is the run's start.
        return {"search": self._header.name, "search_created": self._header.created}

    def _make_parent_tags(self) -> dict[str, str]:
        return {"mlflow.parentRunId": self.parent.run_id} if self.parent else {}

    def _create_run(self, name: str, start: int, tags: dict[str, str]) -> Run:
        info = self._header.data
        tags = self._make_identity() | {"data": info.name, "split_hash": info.split_hash} | tags
        run_id: str = self._client.create_run(self._experiment_id, start, tags, name).info.run_id
        return Run(run_id, "RUNNING", tags, is_new=True)

    def _create_trial_run(self, trial: TrialState) -> Run:
        command = f"python -m tune_cifar reproduce {trial.run_id}"
        tags = self._make_parent_tags() | {
            "trial": str(trial.number),
            "run_id": trial.run_id,
            "origin": trial.origin,
            "mlflow.note.content": f"{ORIGIN_WORDS[trial.origin]} `{command}`",
        }
        name = f"{trial.number:03d} {self._header.name}"  # MLflow's page cuts off the end
        return self._create_run(name, _find_start(trial, self._header), tags)

    def _reopen_run(self, run: Run) -> None:
        if run.status != "RUNNING":
            self._client.update_run(run.run_id, "RUNNING")
            run.status = "RUNNING"

    def _make_trial_files(self, trial: TrialState) -> dict[str, str | Path]:
        environment = trial.driver.environment | {"split_hash": self._header.data.split_hash}
        files: dict[str, str | Path] = {
            "config.json": trial.config.model_dump_json(indent=2),
            "numerics.json": trial.numerics.model_dump_json(indent=2),
            "environment.json": json.dumps(environment, indent=2),
        }
        if trial.error_file is not None and (error := self._folder / trial.error_file).exists():
            files[error.name] = error
        return files

    def _upload_weights(self, best: TrialState) -> None:
        run = self.children.get(best.number)
        if run is None or best.weights_file is None:
            return
        weights, tags = self._folder / best.weights_file, {"weights": best.weights_file}
        if weights.exists() and self._find_missing(run, tags):
            self._client.log_artifact(run.run_id, str(weights))
            self._log(run, tags)

    def _log(
        self,
        run: Run,
        tags: dict[str, str],
        metrics: Sequence[Any] = (),
        params: Mapping[str, str] | None = None,
    ) -> None:
        """Log in one call, or several when there are many metrics.

        The tags are in the last one, since they say what else MLflow has.
        """
        from mlflow.entities import Param, RunTag

        missing, params = self._find_missing(run, tags), params or {}
        while len(metrics) > METRICS_PER_BATCH:
            self._client.log_batch(run.run_id, metrics[:METRICS_PER_BATCH])
            metrics = metrics[METRICS_PER_BATCH:]
        param_list = [Param(name, value) for name, value in params.items()]
        tag_list = [RunTag(name, value) for name, value in missing.items()]
        self._client.log_batch(run.run_id, metrics, param_list, tag_list)
        run.params |= frozenset(params)
        run.tags |= missing

    def _find_missing(self, run: Run, tags: dict[str, str]) -> dict[str, str]:
        """Return the tags that the run does not have, as long as MLflow allows."""
        short = {name: value[:MAX_TAG_CHARACTERS] for name, value in tags.items()}
        return {name: value for name, value in short.items() if run.tags.get(name) != value}

    def _close_run(self, run: Run, status: str, end: int) -> None:
        self._client.set_terminated(run.run_id, status, end)
        run.status = status

    def _log_artifacts(
        self, run: Run, files: Mapping[str, str | Path], path: str | None = None
    ) -> None:
        """Log texts and copies of files in one call, into one folder of the run's artifacts."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                data = content.read_bytes() if isinstance(content, Path) else content.encode()
                Path(folder, name).write_bytes(data)
            self._client.log_artifacts(run.run_id, folder, path)


def _make_epoch_metrics(trial: TrialState, header: Header, since: int) -> list[Any]:
    """Return the metrics of all epochs after the first `since`, and a complete trial's score.

    An epoch's time is the trial's start plus the seconds of its epochs up to it.
    """
    metrics, now = [], float(_find_start(trial, header))
    for number, (_, result) in enumerate(trial.trained_epochs, start=1):
        now += 1000 * result.epoch_seconds
        if number > since:
            values = {name: getattr(result, name) for name in EPOCH_METRICS}
            metrics += _make_metrics(values, round(now), number)
    if trial.status == "complete":
        metrics += _make_metrics({"score": trial.score}, round(now), trial.epochs_done)
    return metrics


def _make_metrics(values: Mapping[str, float | None], ms: int, step: int) -> list[Any]:
    """Return MLflow's metrics of these values, but for those that are None."""
    from mlflow.entities import Metric

    return [Metric(name, v, ms, step) for name, v in values.items() if v is not None]


def to_ms(time: str) -> int:
    """Convert a record's time to milliseconds since 1970."""
    return round(1000 * datetime.fromisoformat(time).timestamp())


def _find_start(trial: TrialState, header: Header) -> int:
    return to_ms(trial.started or header.created)


def _find_end(trial: TrialState, header: Header) -> int:
    """Return the recorded end, but at least the end of the last epoch: a clock can be set back."""
    trained = sum(1000 * result.epoch_seconds for _, result in trial.trained_epochs)
    last = round(_find_start(trial, header) + trained)
    return max(last, to_ms(trial.ended)) if trial.ended else last


def _find_search_end(state: SearchState) -> int:
    """Return when the last driver ended; of one that died, the end of the last epoch."""
    start = to_ms(state.resumes[-1].time if state.resumes else state.header.created)
    if state.finished is not None:
        return start + round(1000 * state.finished.wall_seconds)
    return max([start, *(_find_end(trial, state.header) for trial in state.trials.values())])
