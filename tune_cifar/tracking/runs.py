"""The MLflow runs of one record, and of an LR range test: every MLflow call and every key name.

What stands where: one experiment per space; one parent run per search (or per single training's record); one child run
per trial, with the living knobs as params, the epochs' figures as metrics and the config, Numerics and environment as
artifacts. A trial that was judged has its figures under `judge/validation` or `judge/test`.

A run is found again by its tags: `search` and `search_created` name the record, `trial` the trial. What is written
twice is written equally, for all times come from the record; so a call that failed, or of which nobody knows whether it
arrived, is made again. MLflow passes over a metric or param that is there already. Metrics are written before the tags
that tell of them, the status last: a run that has both needs nothing more.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tune_cifar.errors import TrackingError
from tune_cifar.record.events import Header, Origin, SearchResumed
from tune_cifar.record.state import INTERRUPTED, SearchState, TrialState
from tune_cifar.schema import CHANCE_ACCURACY, Status, TrainConfig, inactive_knobs
from tune_cifar.tracking.store import (
    create_experiment,
    find_experiment,
    make_client,
    place_experiment,
    search_runs,
)
from tune_cifar.tracking.views import MAX_TAG_CHARACTERS, make_experiment_tags

# Metrics of a child run, one point per epoch; the metric's step counts the epochs of all cycles. A complete trial has
# its `score` too.
EPOCH_METRICS = ("val_acc", "val_loss", "train_acc", "train_loss", "lr", "images_per_second")
# How the names of an evaluation's metrics begin.
PART_PREFIX: dict[str, str] = {"validation": "val", "test": "test"}
# MLflow's own word for each of our states. KILLED is also what still ran when its driver stopped.
RUN_STATUS: dict[Status, str] = {
    "complete": "FINISHED",
    "stopped": "KILLED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "running": "RUNNING",
}
# A trial's note, before the command that trains it again.
ORIGIN_WORDS: dict[Origin, str] = {
    "baseline": "The baseline of the space, the yardstick of every gain. Train it again:",
    "point": "A point of the space file. Train it again:",
    "sampler": "Proposed by the sampler. Train it again:",
    "train": "A single training. Train it again:",
    "confirm": "A candidate under a new seed. Train it again:",
}
# MLflow takes 1,000 metrics, params and tags in a batch; there are some 60 params and tags.
METRICS_PER_BATCH = 900


@dataclass
class Run:
    """What MLflow holds of a run, kept up to date by those who change it. `is_new`: created by this process."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: frozenset[str] = frozenset()
    is_new: bool = False

    @property
    def epochs_done(self) -> int:
        """So many epochs' metrics are there."""
        return int(self.tags.get("epochs_done", 0))


class SearchRuns:
    """Finds, creates, fills and closes the runs of one record; one query finds them all.

    After an exception of any kind (MLflow's own pass through) nobody knows what MLflow holds: throw the object away and
    make another. No two processes may change the runs of one search at once.

    Args:
        is_running: the search has a driver; else what MLflow shows as running will be closed.

    Raises:
        TrackingError: when the store is a SQLite file that cannot be there, or the experiment is deleted.
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
        self._doubles: list[Run] = []
        self._find_runs()

    def open(self, resumes: Sequence[SearchResumed]) -> None:
        """Have one parent run that tells of every driver, RUNNING if there is a driver now."""
        while self._doubles:
            self._client.delete_run(self._doubles.pop().run_id)
        header = self._header
        self._open_experiment()
        if self.parent is None:
            self.parent = self._create_run(
                header.name, to_ms(header.created), {"kind": header.kind}
            )
        elif self._is_running and self.parent.status != "RUNNING":
            self._client.update_run(self.parent.run_id, "RUNNING")
            self.parent.status = "RUNNING"
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
        if self._find_news(self.parent, tags):
            dump = {
                f"resume-{number}.json": event.model_dump_json(indent=2)
                for number, event in enumerate(resumes, 1)
            }
            dump["space.yaml"] = header.space_text
            dump["numerics.json"] = header.numerics.model_dump_json(indent=2)
            dump["header.json"] = header.model_dump_json(indent=2)
            self._log_artifacts(self.parent, dump)
            self._log(self.parent, tags)

    def upload_trial(self, trial: TrialState) -> bool:
        """Bring a trial's run up to date, creating it if need be; False when it was."""
        if self.is_whole(trial):
            return False
        if trial.number not in self.children:
            self.children[trial.number] = self._create_trial_run(trial)
        run = self.children[trial.number]
        ended = trial.status != "running"
        if ended:
            self._log_artifacts(run, self._dump_trial(trial))
        elif self._is_running and run.status != "RUNNING":
            self._client.update_run(run.run_id, "RUNNING")
            run.status = "RUNNING"
        dead = inactive_knobs(trial.full_config)
        knobs = trial.full_config.model_dump(mode="json").items()
        params = {
            knob: str(value) for knob, value in knobs if knob not in dead and knob not in run.params
        }
        tags = self._make_parent_tags() | {
            "status": trial.status,
            "epochs_done": str(trial.epochs_done),
            "fingerprint": trial.fingerprint,
            "git_commit": trial.driver.environment.get("git_commit", ""),
        }
        if ended:
            tags["reason"] = trial.reason
        if trial.retries:
            tags |= {
                "retries": str(len(trial.retries)),
                "faults": ", ".join(retry.fault for retry in trial.retries),
            }
        self._log(run, tags, _make_metrics(trial, self._header, run.epochs_done), params)
        if ended:
            self._close_run(run, RUN_STATUS[trial.status], _find_end(trial, self._header))
        return True

    def log_evaluation(
        self, trial: TrialState, evaluation: Mapping[str, Any], files: Sequence[Path]
    ) -> bool:
        """Put an evaluation's files and figures on its trial's run; False when the run is not there. Creates none, so
        another process may be shipping the search."""
        from mlflow.entities import Metric

        run = self.children.get(trial.number)
        if run is None:
            return False
        self._log_artifacts(run, {file.name: file for file in files}, f"judge/{evaluation['part']}")
        prefix, now = PART_PREFIX[evaluation["part"]], _find_end(trial, self._header)
        values = {
            f"{prefix}_acc_{found['name']}": found["accuracy"] for found in evaluation["classes"]
        }
        values[f"{prefix}_ece"] = evaluation["ece"]
        self._log(
            run,
            {},
            [
                Metric(name, v, now, trial.epochs_done)
                for name, v in values.items()
                if v is not None
            ],
        )
        return True

    def is_whole(self, trial: TrialState) -> bool:
        """Whether a trial's run is there and says as much as the record."""
        run = self.children.get(trial.number)
        if run is None or self._find_news(run, self._make_parent_tags() | {"status": trial.status}):
            return False
        is_in_state = run.status == RUN_STATUS[trial.status] or (
            trial.status == "running" and not self._is_running
        )
        return is_in_state and run.epochs_done == trial.epochs_done

    def close(self, state: SearchState) -> int:
        """End whatever is RUNNING: no driver is there any more. The parent gets best score, gain and reason, the best
        trial's run its weights.

        Returns:
            how many runs MLflow showed as RUNNING, those created by this process not counted.
        """
        assert self.parent is not None, "open comes first"
        left = [run for run in (self.parent, *self.children.values()) if run.status == "RUNNING"]
        for number, run in self.children.items():
            if run.status == "RUNNING":
                trial = state.trials.get(number)
                end = _find_end(trial, self._header) if trial else to_ms(self._header.created)
                self._close_run(run, "KILLED", end)
        end = _find_search_end(state)
        finished = state.finished
        tags = {
            "end": finished.reason if finished else "driver died",
            "events": str(state.num_events),
        }
        metrics, best = {}, state.best
        if best is not None and best.score is not None:
            self._upload_weights(best)
            tags["best_run_id"] = best.run_id
            metrics["best_val_acc"] = best.score
            if state.baseline_score is not None:
                metrics["gain_over_baseline"] = round(
                    best.score - state.baseline_score, 9
                )  # no 0.09700000000000003
        status = "KILLED" if finished is None or finished.reason == INTERRUPTED else "FINISHED"
        if self.parent.status != status or self._find_news(self.parent, tags):
            from mlflow.entities import Metric

            points = [
                Metric(name, value, end, len(state.resumes)) for name, value in metrics.items()
            ]
            self._log(self.parent, tags, points)
            self._close_run(self.parent, status, end)
        return sum(not run.is_new for run in left)

    def delete(self) -> int:
        """Delete every run of the record; returns how many there were. MLflow keeps them for `mlflow gc`."""
        runs = [*self.children.values(), *self._doubles, *([self.parent] if self.parent else [])]
        for run in runs:
            self._client.delete_run(run.run_id)
        return len(runs)

    def _find_runs(self) -> None:
        """Fill parent, children and doubles: second runs, as a server creates that answers too late."""
        groups: dict[int | None, list[Run]] = {}
        experiments = [] if self._experiment_id is None else [self._experiment_id]
        for found in search_runs(self._client, experiments, self._make_identity()):
            tags = dict(found.data.tags)
            run = Run(found.info.run_id, found.info.status, tags, frozenset(found.data.params))
            groups.setdefault(int(tags["trial"]) if "trial" in tags else None, []).append(run)
        for number, runs in groups.items():
            first, *others = sorted(
                runs, key=lambda run: (run.status == "RUNNING", -run.epochs_done, run.run_id)
            )
            self._doubles += others
            if number is None:
                self.parent = first
            else:
                self.children[number] = first

    def _open_experiment(self) -> None:
        """Have the experiment, and what its page opens on. Tags that are there stay as they are."""
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
        """In MLflow's filters a tag `created` would be the run's start."""
        return {"search": self._header.name, "search_created": self._header.created}

    def _make_parent_tags(self) -> dict[str, str]:
        return {"mlflow.parentRunId": self.parent.run_id} if self.parent else {}

    def _create_run(self, name: str, start: int, tags: dict[str, str]) -> Run:
        info = self._header.data
        tags = self._make_identity() | {"data": info.name, "split_hash": info.split_hash} | tags
        run_id: str = self._client.create_run(self._experiment_id, start, tags, name).info.run_id
        return Run(run_id, "RUNNING", tags, is_new=True)

    def _create_trial_run(self, trial: TrialState) -> Run:
        tags = self._make_parent_tags() | {
            "trial": str(trial.number),
            "run_id": trial.run_id,
            "origin": trial.origin,
            "mlflow.note.content": f"{ORIGIN_WORDS[trial.origin]} `python -m tune_cifar reproduce {trial.run_id}`",
        }
        # The number first: MLflow's page cuts long names off.
        return self._create_run(
            f"{trial.number:03d} {self._header.name}", _find_start(trial, self._header), tags
        )

    def _dump_trial(self, trial: TrialState) -> dict[str, str | Path]:
        environment = trial.driver.environment | {"split_hash": self._header.data.split_hash}
        dump: dict[str, str | Path] = {
            "config.json": trial.config.model_dump_json(indent=2),
            "numerics.json": trial.driver.numerics.model_dump_json(indent=2),
            "environment.json": json.dumps(environment, indent=2),
        }
        if trial.error_file is not None and (error := self._folder / trial.error_file).exists():
            dump[error.name] = error
        return dump

    def _upload_weights(self, best: TrialState) -> None:
        run, weights = self.children.get(best.number), self._folder / (best.weights_file or "")
        if run is None or best.weights_file is None or not weights.exists():
            return
        tags = {"weights": best.weights_file}
        if self._find_news(run, tags):
            self._client.log_artifact(run.run_id, str(weights))
            self._log(run, tags)

    def _log(
        self,
        run: Run,
        tags: dict[str, str],
        metrics: Sequence[Any] = (),
        params: Mapping[str, str] | None = None,
    ) -> None:
        """One call as a rule. The tags come last: they tell what else is there."""
        from mlflow.entities import Param, RunTag

        news = self._find_news(run, tags)
        while len(metrics) > METRICS_PER_BATCH:
            self._client.log_batch(run.run_id, metrics[:METRICS_PER_BATCH])
            metrics = metrics[METRICS_PER_BATCH:]
        made = [Param(name, value) for name, value in (params or {}).items()]
        self._client.log_batch(
            run.run_id, metrics, made, [RunTag(name, value) for name, value in news.items()]
        )
        run.params |= frozenset(params or {})
        run.tags |= news

    def _find_news(self, run: Run, tags: dict[str, str]) -> dict[str, str]:
        """The tags that the run does not have."""
        short = {name: value[:MAX_TAG_CHARACTERS] for name, value in tags.items()}
        return {name: value for name, value in short.items() if run.tags.get(name) != value}

    def _close_run(self, run: Run, status: str, end: int) -> None:
        self._client.set_terminated(run.run_id, status, end)
        run.status = status

    def _log_artifacts(
        self, run: Run, files: Mapping[str, str | Path], path: str | None = None
    ) -> None:
        """All in one call, into one folder of the artifacts: texts, and copies of files."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                data = content.read_bytes() if isinstance(content, Path) else content.encode()
                Path(folder, name).write_bytes(data)
            self._client.log_artifacts(run.run_id, folder, path)


def _make_metrics(trial: TrialState, header: Header, since: int) -> list[Any]:
    """The metrics of all epochs after `since`; an epoch's time is the trial's start plus all seconds of its epochs."""
    from mlflow.entities import Metric

    metrics, now = [], float(_find_start(trial, header))
    for number, (_, result) in enumerate(trial.trained_epochs, start=1):
        now += 1000 * result.epoch_seconds
        if number > since:
            values = {name: getattr(result, name) for name in EPOCH_METRICS}
            metrics += [
                Metric(name, v, round(now), number) for name, v in values.items() if v is not None
            ]
    if trial.score is not None and trial.status == "complete":
        metrics.append(Metric("score", trial.score, round(now), trial.epochs_done))
    return metrics


def to_ms(time: str) -> int:
    """Milliseconds since 1970 of a record's time."""
    return round(1000 * datetime.fromisoformat(time).timestamp())


def _find_start(trial: TrialState, header: Header) -> int:
    return to_ms(trial.started or header.created)


def _find_end(trial: TrialState, header: Header) -> int:
    """As recorded, but not before its last epoch: clocks are set back."""
    last = round(
        _find_start(trial, header)
        + sum(1000 * result.epoch_seconds for _, result in trial.trained_epochs)
    )
    return max(last, to_ms(trial.ended)) if trial.ended else last


def _find_search_end(state: SearchState) -> int:
    """The last driver's start and its seconds; the last sign of life of a driver that died."""
    start = to_ms(state.resumes[-1].time if state.resumes else state.header.created)
    if state.finished is not None:
        return start + round(1000 * state.finished.wall_seconds)
    return max([start, *(_find_end(trial, state.header) for trial in state.trials.values())])


def read_trials(tracking_uri: str, search: str) -> list[dict[str, Any]]:
    """What MLflow holds of a search's trials, a dict each by number, named as the columns of `load_trials`. Of several
    searches of one name it is the newest.

    Not there: the seconds of training, and the knobs that are dead in a trial. `ended_seq` counts the ends from 1.

    Raises:
        TrackingError: when MLflow has no such search.
    """
    client = make_client(tracking_uri)
    experiments = [str(found.experiment_id) for found in client.search_experiments()]
    runs = list(search_runs(client, experiments, {"search": search}))
    created = max((run.data.tags["search_created"] for run in runs), default="")
    runs = [run for run in runs if run.data.tags["search_created"] == created]
    parent = next((run for run in runs if "trial" not in run.data.tags), None)
    if parent is None:
        rule = f"MLflow: a search of the name must be there, got {search!r}."
        raise TrackingError(f"{rule} Ship it: python -m tune_cifar sync --search {search}")
    path = client.download_artifacts(parent.info.run_id, "header.json")
    header = Header.model_validate_json(Path(path).read_text(encoding="utf-8"))
    # Of two copies, as a server makes them that answers too late, the fuller one.
    runs.sort(
        key=lambda run: (run.info.status != "RUNNING", int(run.data.tags.get("epochs_done", 0)))
    )
    trials = {int(run.data.tags["trial"]): run for run in runs if "trial" in run.data.tags}
    ended = {
        number: run
        for number, run in trials.items()
        if run.data.tags.get("status", "running") != "running"
    }
    ends = sorted((run.info.end_time or 0, number) for number, run in ended.items())
    ranks = {number: rank for rank, (_, number) in enumerate(ends, start=1)}
    return [
        _read_trial(trials[number], header) | {"ended_seq": ranks.get(number)}
        for number in sorted(trials)
    ]


def _read_trial(run: Any, header: Header) -> dict[str, Any]:
    tags, metrics = run.data.tags, run.data.metrics
    status = tags.get("status", "running")
    return {knob: _read_param(knob, text) for knob, text in run.data.params.items()} | {
        "search": header.name,
        "space": header.space,
        "kind": header.kind,
        "tier": header.tier,
        "fidelity": header.fidelity,
        "trial": int(tags["trial"]),
        "run_id": tags["run_id"],
        "status": status,
        "origin": tags["origin"],
        "epochs_done": int(tags.get("epochs_done", 0)),
        "val_acc": metrics.get("val_acc"),
        "score": CHANCE_ACCURACY if status == "diverged" else metrics.get("score"),
        "fingerprint": tags.get("fingerprint"),
        "data": header.data.name,
        "data_digest": header.data.digest,
        "split_hash": header.data.split_hash,
        "reason": tags.get("reason", ""),
    }


def _read_param(knob: str, text: str) -> Any:
    """A param as `load_trials` has the knob: a number, true or false, else text."""
    kind = TrainConfig.model_fields[knob].annotation
    if kind is bool:
        return text == "True"
    if kind in (int, float):
        return kind(text)
    return str(tuple(json.loads(text))) if text.startswith("[") else text
