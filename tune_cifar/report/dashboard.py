"""Recorded searches as Optuna studies for optuna-dashboard: copies in memory that are not kept."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from datetime import datetime
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record import state as record
from tune_cifar.record.events import KIND_WORDS
from tune_cifar.search.sampler import list_distributions, make_study


def check_dashboard() -> None:
    """Refuse to continue without optuna-dashboard.

    Raises:
        ConfigError: with the command that installs it.
    """
    if importlib.util.find_spec("optuna_dashboard") is None:
        hint = "Run `python -m pip install optuna-dashboard`, or leave out `optuna`."
        raise ConfigError(f"optuna-dashboard is not installed. {hint}")


def make_studies(states: Iterable[record.SearchState]) -> BaseStorage:
    """Return a study in memory for every search; single trainings and confirmations have none.

    Raises:
        RecordError: when none of the states is a search.
    """
    states = list(states)
    searches = [state for state in states if state.header.kind == "search"]
    if not searches:
        names = [f"{state.header.name} ({KIND_WORDS[state.header.kind]})" for state in states]
        found = (
            f"no search is recorded, only {', '.join(names)}" if names else "nothing is recorded"
        )
        raise RecordError(f"`optuna`: {found}. Run a search first, or give another `storage`.")
    storage = InMemoryStorage()
    for state in searches:
        header = state.header
        study = make_study(optuna.samplers.RandomSampler(), storage, header.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(["score"])
        study.set_user_attr("space", header.space)
        study.set_user_attr("tier", header.tier)
        study.set_user_attr("data", header.data.name)
        study.set_user_attr("command", header.command)
        for number in sorted(state.trials):
            study.add_trial(freeze_trial(state, state.trials[number]))
    return storage


def freeze_trial(state: record.SearchState, trial: record.TrialState) -> FrozenTrial:
    """Return a recorded trial as Optuna stores it.

    A stopped trial is a pruned one of its last score at a rung; before its first rung it is a
    failed one. A diverged trial is pruned at epoch 0 with the accuracy of chance: as a complete one
    it would rank before all pruned ones.
    """
    rungs = [rung for rung in state.header.budget.get("rungs", ()) if rung in trial.scores]
    scores, value = trial.scores, None
    match trial.status:
        case "running":
            found = TrialState.RUNNING
        case "complete":
            found, value = TrialState.COMPLETE, trial.score
        case "diverged":
            found, value, scores = TrialState.PRUNED, trial.chance, {0: trial.chance}
        case "stopped" if rungs:
            found, value = TrialState.PRUNED, trial.scores[rungs[-1]]
        case _:
            found = TrialState.FAIL
    distributions = list_distributions(state.header)
    frozen = create_trial(
        state=found,
        value=value,
        params=trial.params,
        distributions={name: distributions[name] for name in trial.params},
        intermediate_values=scores,
        user_attrs={
            "run_id": trial.run_id,
            "status": trial.status,
            "reason": trial.reason,
            "origin": trial.origin,
            "epochs_done": trial.epochs_done,
            "fingerprint": trial.fingerprint,
        },
    )
    frozen.datetime_start = _to_local(trial.started or state.header.created)
    if found.is_finished():  # an old record has no times
        frozen.datetime_complete = _to_local(trial.ended) if trial.ended else frozen.datetime_start
    return frozen


class DashboardServer(ThreadingMixIn, WSGIServer):
    """A server with a thread for every request, since a browser keeps connections open."""

    daemon_threads = True


class QuietHandler(WSGIRequestHandler):
    """A handler that does not log, so that the address stays visible on the terminal."""

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing."""


def open_dashboard(studies: BaseStorage, port: int | None) -> WSGIServer:
    """Start optuna-dashboard on loopback; `serve_forever` answers requests until interrupted.

    Args:
        port: None takes a free one.

    Raises:
        ConfigError: when the port is not available.
    """
    from optuna_dashboard import wsgi

    app = wsgi(studies)
    try:
        return make_server("127.0.0.1", port or 0, app, DashboardServer, QuietHandler)
    except OSError as exc:
        reason = f"got {port}: {exc.strerror}"
        raise ConfigError(f"`port` must be a free port, {reason}. Leave it out.") from exc


def _to_local(time: str) -> datetime:
    """Return a record's time as Optuna writes it: local, without a zone."""
    return datetime.fromisoformat(time).astimezone().replace(tzinfo=None)
