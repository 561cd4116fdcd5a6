"""What is asked of nodes and workers before a search, with a stand-in for Ray itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import WorkerCrashedError

from tests.builders import SHAPES, make_space
from tune_cifar.data.files import DataSource
from tune_cifar.errors import ConfigError, DataError
from tune_cifar.schema import Numerics
from tune_cifar.search import survey
from tune_cifar.search.cluster import Node
from tune_cifar.search.plan import Resources, SearchRequest

RESOURCES = Resources(1, 0.0, 1, 0)


class Task:
    """A task that runs when its answer is asked for."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def options(self, **options: Any) -> Task:
        return self

    def remote(self, *words: Any) -> Any:
        return lambda: self.function(*words)


def put_in_rays_place(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    stand_in = {"remote": lambda **options: Task, "get": lambda task: task(), **functions}
    monkeypatch.setattr(survey, "ray", SimpleNamespace(**stand_in))


def test_data_that_a_worker_cannot_read_are_an_error_of_the_data(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_rays_place(monkeypatch)
    with pytest.raises(DataError):
        survey.measure_in_worker(make_space(), DataSource("cifar10", tmp_path), fp32, RESOURCES)


def test_a_worker_that_dies_while_it_measures_is_a_sentence(
    fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(task: Any) -> None:
        raise WorkerCrashedError

    put_in_rays_place(monkeypatch, get=die)
    rule = r"ray: a worker must measure the baseline before a search, got The worker died .*\w\.$"
    with pytest.raises(ConfigError, match=rule):
        survey.measure_in_worker(make_space(), SHAPES, fp32, RESOURCES)


def test_what_a_silent_node_was_asked_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would measure later, beside the trials."""
    cancelled: list[Any] = []
    put_in_rays_place(
        monkeypatch,
        wait=lambda tasks, **options: ([], tasks),
        cancel=lambda task, force: cancelled.append(task),
    )
    request = SearchRequest(SHAPES, tmp_path, "test", address="auto")
    with pytest.raises(ConfigError, match="node one: no answer in 180 s"):
        survey._ask([Node("1" * 56, "one", "10.0.0.1", 2, 0)], make_space(), request, 0.0, None)
    assert len(cancelled) == 1
