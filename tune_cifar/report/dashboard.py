"""Recorded searches as Optuna studies, looked at in optuna-dashboard: a copy in memory, whose changes are lost."""

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
from tune_cifar.search.sampler import Outcome, find_outcome, list_distributions, make_study


def check_dashboard() -> None:
    """Refuse to look at searches with what is not there.

    Raises:
        ConfigError: with the command that installs it.
    """
    if importlib.util.find_spec("optuna_dashboard") is None:
        way_out = "Run `python -m pip install optuna-dashboard`, or look with plain `ui`."
        raise ConfigError(f"--optuna: optuna-dashboard must be installed, got none. {way_out}")


def make_studies(states: Iterable[record.SearchState]) -> BaseStorage:
    """A study for every search, in memory. Single trainings and confirmations search nothing and have none.

    Raises:
        RecordError: when none of the states is a search.
    """
    states = list(states)
    searches = [state for state in states if state.header.kind == "search"]
    if not searches:
        others = (
            ", ".join(f"{state.header.name} ({KIND_WORDS[state.header.kind]})" for state in states)
            or "none"
        )
        raise RecordError(
            f"--optuna: a search must be recorded, got {others}. Run one first, or give --storage."
        )
    storage = InMemoryStorage()
    for state in searches:
        header = state.header
        study = make_study(optuna.samplers.RandomSampler(), storage, header.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(["score"])
        about = {
            "space": header.space,
            "tier": header.tier,
            "data": header.data.name,
            "command": header.command,
        }
        for name, value in about.items():
            study.set_user_attr(name, value)
        study.add_trials(
            [freeze_trial(state, state.trials[number]) for number in sorted(state.trials)]
        )
    return storage


def freeze_trial(state: record.SearchState, trial: record.TrialState) -> FrozenTrial:
    """A recorded trial as Optuna keeps it: what the sampler was told, with all scores that trials are compared by."""
    rungs = {
        epoch: trial.scores[epoch]
        for epoch in state.header.budget.get("rungs", ())
        if epoch in trial.scores
    }
    told = Outcome(TrialState.RUNNING, None, {})
    if trial.status != "running":
        told = find_outcome(trial.status, rungs, trial.score)
    value = told.value
    if told.state == TrialState.PRUNED:  # as `Study.tell` does
        value = told.scores[max(told.scores)]
    frozen = create_trial(
        state=told.state,
        value=value,
        params=trial.params,
        distributions=list_distributions(state.header),
        intermediate_values=told.scores if trial.status == "diverged" else trial.scores,
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
    if told.state.is_finished():  # an old record tells no times
        frozen.datetime_complete = _to_local(trial.ended) if trial.ended else frozen.datetime_start
    return frozen


class DashboardServer(ThreadingMixIn, WSGIServer):
    """A thread for every request: a browser keeps connections open."""

    daemon_threads = True


class QuietHandler(WSGIRequestHandler):
    """The terminal keeps the address in sight."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of a request."""


def open_dashboard(studies: BaseStorage, port: int | None) -> WSGIServer:
    """optuna-dashboard on loopback, listening; its `serve_forever` answers until it is interrupted.

    Args:
        port: None takes a free one.

    Raises:
        ConfigError: when the port cannot be had.
    """
    from optuna_dashboard import wsgi

    try:
        return make_server("127.0.0.1", port or 0, wsgi(studies), DashboardServer, QuietHandler)
    except OSError as exc:
        raise ConfigError(
            f"--port: a free port must be given, got {port}: {exc.strerror}. Leave it out."
        ) from exc


def _to_local(time: str) -> datetime:
    """A record's time as Optuna writes times: of this machine's clock, without a zone."""
    return datetime.fromisoformat(time).astimezone().replace(tzinfo=None)
