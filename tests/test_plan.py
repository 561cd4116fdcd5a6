"""What is settled and said before a search starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SHAPES
from tests.test_confirm import CIFAR10
from tests.test_record import NUMERICS
from tune_cifar.plan import CONTEXT_MB, Cost, Resources, SearchPlan, SearchRequest, measure_cost
from tune_cifar.schema import Numerics
from tune_cifar.space import load_space

GB = 1024.0


def describe(device: str, cost: Cost, resources: Resources) -> str:
    numerics = NUMERICS.model_copy(update={"device": device})
    request = SearchRequest(SHAPES, Path("runs"), "search")
    return SearchPlan(load_space("s10"), request, "n", CIFAR10, numerics, resources, cost, 2.0).describe()


@pytest.mark.parametrize(
    ("memory_gb", "gpus_per_trial", "advice"),
    [
        (2.0, 1.0, " (--gpus-per-trial 0.06 has room for 16 at once)"),  # the cores allow no more
        (20.0, 1.0, " (--gpus-per-trial 0.16 has room for 6 at once)"),  # nor the memory
        (20.0, 0.05, " (--gpus-per-trial 0.16 has room for 6 at once)"),
        (20.0, 0.16, ""),
        (80.0, 1.0, ""),
        (80.0, 0.5, " (--gpus-per-trial 1 has room for 1 at once)"),
        (0.1, 0.01, ""),
    ],
)
def test_a_gpus_share_is_advised_by_memory_and_cores(
    memory_gb: float, gpus_per_trial: float, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.plan.count_cores", lambda: 16)
    at_once = int(1 / gpus_per_trial)
    text = describe("cuda", Cost(1.0, memory_gb * GB, 140 * GB), Resources(1, gpus_per_trial, at_once, 1))
    assert f" s; a trial holds {memory_gb:.2g} of 140 GB{advice}." in text


def test_too_many_trainings_for_the_machines_memory_are_told_of() -> None:
    assert "; a trial holds 4 of 16 GB (--max-concurrent 3 has room)" in describe(
        "cpu", Cost(1.0, 4 * GB, 16 * GB), Resources(1, 0.0, 4, 0)
    )
    assert "room" not in describe("cpu", Cost(1.0, 4 * GB, 16 * GB), Resources(1, 0.0, 3, 0))


def test_a_cost_is_measured_by_training(fp32: Numerics) -> None:
    config = load_space("smoke").baseline.model_copy(update={"train_size": 40, "val_size": 20, "batch_size": 10})
    cost = measure_cost(config, SHAPES, fp32, num_steps=2)
    assert 0 < cost.epoch_seconds < 60 and 100 < cost.memory_mb < cost.device_mb


@pytest.mark.gpu
def test_on_a_gpu_what_the_process_holds_there_is_measured(fp32: Numerics) -> None:
    config = load_space("smoke").baseline.model_copy(update={"train_size": 40, "val_size": 20, "batch_size": 10})
    cost = measure_cost(config, SHAPES, fp32.model_copy(update={"device": "cuda"}), num_steps=2)
    assert CONTEXT_MB < cost.memory_mb < CONTEXT_MB + 1000 and cost.device_mb > 1000
