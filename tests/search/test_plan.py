"""The plan of a search: its cost, its description, its advice."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.builders import (
    CIFAR10,
    NUMERICS,
    SHAPES,
    PastTrial,
    StoppedClock,
    make_header,
    make_space,
    make_trial,
    write_record,
)
from tune_cifar.data.load import TrainVal, load_train_val
from tune_cifar.errors import ConfigError, NameTakenError
from tune_cifar.record.store import search_folder
from tune_cifar.schema import Numerics, TrainConfig
from tune_cifar.search import run
from tune_cifar.search.cost import CONTEXT_MB, Cost, measure_cost
from tune_cifar.search.disk import DiskNeeds, check_disk
from tune_cifar.search.forecast import START_SECONDS
from tune_cifar.search.plan import (
    Found,
    Offer,
    Resources,
    SearchPlan,
    SearchRequest,
    Workers,
    check_and_measure,
    check_on_cluster,
    check_request,
    settle_search,
)
from tune_cifar.search.run import _open_record
from tune_cifar.search.sampler import Sampler
from tune_cifar.space.layout import MAX_TRIALS, SamplerBudget
from tune_cifar.space.select import load_space

GB = 1024.0
SIZES = {"train_size": 40, "val_size": 20, "batch_size": 10}


def describe(device: str, cost: Cost, resources: Resources) -> str:
    numerics = NUMERICS.model_copy(update={"device": device})
    request = SearchRequest(SHAPES, Path("runs"), "search")
    plan = SearchPlan(load_space("s10"), request, "n", CIFAR10, numerics, resources, cost)
    return plan.describe()


@pytest.mark.parametrize(
    ("memory_gb", "gpus_per_trial", "advice"),
    [
        (2.0, 1.0, ""),  # several train no faster than one after another
        (20.0, 0.05, " (`gpus_per_trial=0.16` would fit 6 at once)"),
        (20.0, 0.16, ""),
        (80.0, 1.0, ""),
        (80.0, 0.5, " (`gpus_per_trial=1` would fit 1 at once)"),
        (0.1, 0.01, ""),
    ],
)
def test_a_fraction_of_a_gpu_is_advised_by_memory_and_cores(
    memory_gb: float, gpus_per_trial: float, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.search.plan.count_cores", lambda: 16)
    resources = Resources(1, gpus_per_trial, int(1 / gpus_per_trial), 1)
    text = describe("cuda", Cost(1.0, memory_gb * GB, 140 * GB), resources)
    assert f" s; a trial holds {memory_gb:.2g} of 140 GB{advice}: about " in text


def test_fewer_trials_at_once_are_advised_where_memory_is_short() -> None:
    cost = Cost(1.0, 4 * GB, 16 * GB)
    advice = "; a trial holds 4 of 16 GB (`max_concurrent=3` would fit)"
    assert advice in describe("cpu", cost, Resources(1, 0.0, 4, 0))
    assert "would fit" not in describe("cpu", cost, Resources(1, 0.0, 3, 0))


@pytest.mark.parametrize(
    ("trials", "limit", "expected"),
    [
        # Three rounds of two, and two are cut.
        (9, START_SECONDS + 19.0, "the time is enough for about 8 trials."),
        (2, 1000.0, "the time is enough for about 2 trials."),
        (9, None, "about 9 trial-epochs in 0:00:29."),
    ],
)
def test_a_plan_says_how_much_fits_into_the_time_or_how_long_it_takes(
    trials: int, limit: float | None, expected: str
) -> None:
    assert make_plan(trials, limit).describe().endswith(f" GB: {expected}")


def test_a_plan_of_a_resumed_search_describes_the_rest(tmp_path: Path) -> None:
    events = [*make_trial(0, [0.1, 0.2, 0.3], "complete"), *make_trial(1, [], None)]
    past = write_record(tmp_path, make_header(), events)
    text = replace(make_plan(4, 1000.0), past=past).describe()
    assert text.endswith("the time is enough for about 3 more trials.")
    text = replace(make_plan(4, None), past=past).describe()
    assert text.endswith(": about 3 more trial-epochs in 0:00:14.")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_concurrent": 0}, "`max_concurrent` >= 1 must hold, got 0"),
        ({"allow_mixed": True}, "`allow_mixed` is for the nodes of a cluster"),
        ({"mirror": "nowhere"}, "`mirror` must be a URL such as"),
        ({"mirror": "nosuch://x"}, "`mirror` must be a URL such as"),
        ({"cpus_per_trial": 0}, "`cpus_per_trial` >= 1 must hold, got 0"),
    ],
)
def test_a_request_that_fits_no_machine_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_request(SearchRequest(SHAPES, tmp_path, "test", **changes))


@pytest.mark.parametrize(
    ("device", "gpus", "sentence"),
    [
        ("cpu", 0.5, "`gpus_per_trial` must be 0 on a CPU, got 0.5"),
        ("cuda", 0.0, "`gpus_per_trial` must be 0.0001 to 1 on a GPU, got 0"),
    ],
)
@pytest.mark.parametrize("is_cluster", [False, True])
def test_gpus_must_fit_what_trials_train_on_here_and_on_a_cluster(
    tmp_path: Path,
    fp32: Numerics,
    monkeypatch: pytest.MonkeyPatch,
    device: Any,
    gpus: float,
    sentence: str,
    is_cluster: bool,
) -> None:
    monkeypatch.setattr("tune_cifar.search.plan.count_gpus", lambda name: int(device == "cuda"))
    numerics = fp32.model_copy(update={"device": device})
    request = SearchRequest(SHAPES, tmp_path, "test", gpus_per_trial=gpus)
    offer = Offer("one", "10.0.0.1", 1, numerics, Cost(1.0, GB, 16 * GB))
    with pytest.raises(ConfigError, match=sentence):
        if is_cluster:
            check_on_cluster(make_space(), request, "n", Found((offer,), {}, (), gpus))
        else:
            check_and_measure(make_space(), request, "n", numerics)


def make_plan(trials: int, limit: float | None) -> SearchPlan:
    """A plan of trials of one epoch of 5 s, two at once."""
    space = load_space("smoke", "cpu", {"epochs": 1})
    budget = space.budget.model_copy(update={"trials": trials, "max_time_seconds": limit})
    request, cost = SearchRequest(SHAPES, Path("runs"), "search"), Cost(5.0, GB, 16 * GB)
    space = replace(space, budget=budget)
    return SearchPlan(space, request, "n", CIFAR10, NUMERICS, Resources(1, 0.0, 2, 0), cost)


def load_few(config: TrainConfig) -> TrainVal:
    return load_train_val(SHAPES, config.train_size, config.val_size)


def test_a_cost_is_measured_by_training(fp32: Numerics) -> None:
    config = load_space("smoke").baseline.model_copy(update=SIZES)
    cost = measure_cost(config, load_few(config), fp32, num_steps=2)
    assert 0 < cost.epoch_seconds < 60 and 100 < cost.memory_mb < cost.device_mb


@pytest.mark.gpu
def test_on_a_gpu_what_the_process_holds_there_is_measured(fp32: Numerics) -> None:
    config = load_space("smoke").baseline.model_copy(update=SIZES)
    on_cuda = fp32.model_copy(update={"device": "cuda"})
    cost = measure_cost(config, load_few(config), on_cuda, num_steps=2)
    assert CONTEXT_MB < cost.memory_mb < CONTEXT_MB + 1000 and cost.device_mb > 1000


@pytest.mark.parametrize(
    ("options", "gpus", "at_once"),
    [
        ({}, 1.0, 2),
        ({"max_concurrent": 1}, 1.0, 1),
        ({"cpus_per_trial": 16}, 1.0, 1),
        ({"gpus_per_trial": 0.5}, 0.5, 4),
        ({"gpus_per_trial": 0.1}, 0.1, 16),
    ],
)
def test_a_trial_has_a_gpu_to_itself_unless_a_part_of_one_is_asked_for(
    options: dict[str, Any],
    gpus: float,
    at_once: int,
    fp32: Numerics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two GPUs and 16 cores; a worker measures, after all have been started."""
    monkeypatch.setattr("psutil.Process.cpu_affinity", lambda self: list(range(16)))
    monkeypatch.setattr("tune_cifar.search.plan.count_gpus", lambda device: 2)
    calls: list[Resources] = []

    def measure(*words: Any) -> Cost:
        calls.append(words[-1])
        return Cost(1.0, 8 * GB, 160 * GB)

    on_gpu = fp32.model_copy(update={"device": "cuda"})
    request = SearchRequest(SHAPES, tmp_path / "runs", "search", **options)
    space = load_space("smoke", "cpu", SIZES)
    plan = check_and_measure(space, request, "n", on_gpu, Workers(calls.append, measure))
    assert (plan.resources.gpus_per_trial, plan.resources.max_concurrent) == (gpus, at_once)
    assert plan.cost.memory_mb == 8 * GB and calls == [plan.resources] * 2


def test_two_nameless_searches_planned_in_one_second_get_two_records(tmp_path: Path) -> None:
    """Another process can take the name between the plan and the record."""
    request = SearchRequest(SHAPES, tmp_path, "search")
    plan = replace(make_plan(9, None), request=request)
    names = []
    for _ in range(2):
        with _open_record(plan) as record:
            names.append(record.state.header.name)
    assert names == ["n", "n-2"]
    with pytest.raises(NameTakenError, match="n: a search of this name exists already"):
        _open_record(replace(plan, request=replace(request, name="n")))


@pytest.mark.parametrize("step", ["__init__", "finish"])
def test_a_driver_that_cannot_write_leaves_no_upload_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Its lock would keep `sync` out as long as the process lives."""

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "use_ray", lambda *_: nullcontext())
    monkeypatch.setattr(run, "_run_tune", lambda *_: None)
    monkeypatch.setattr(run.SearchDriver, step, fail)
    plan = replace(make_plan(9, None), request=SearchRequest(SHAPES, tmp_path, "search"))
    with pytest.raises(OSError, match="No space left"):
        run.run_search(plan)
    assert "mlflow-uploader" not in [thread.name for thread in threading.enumerate()]


def test_a_nameless_search_is_planned_under_a_free_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.record.store.datetime", StoppedClock)
    space = load_space("smoke", "cpu", {**SIZES, "pct_start": 0.9})
    name = "smoke-cpu-20260102-030405"
    search_folder(tmp_path, name).mkdir(parents=True)
    plan = settle_search(space, SearchRequest(SHAPES, tmp_path, "search", device="cpu"))
    assert plan.name == f"{name}-2"
    with pytest.raises(NameTakenError):
        settle_search(space, SearchRequest(SHAPES, tmp_path, "search", name=name, device="cpu"))


def test_a_run_store_without_locks_is_refused_before_the_workers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    sentence = "the file system must have locks .*'No locks available'.* elsewhere as `storage`"
    with pytest.raises(ConfigError, match=sentence):
        check_disk(tmp_path / "runs", DiskNeeds(0, 0, 0))


LARGEST_SEED = 2**31 - 1


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1, 99_999_999_999, 10**400])
def test_a_seed_that_the_sampler_would_not_take_is_refused_before_anything_is_made(
    tmp_path: Path, seed: int
) -> None:
    """It adds the trial's number, and numpy's seeds have 32 bits."""
    request = SearchRequest(SHAPES, tmp_path / "runs", "test", seed=seed)
    with pytest.raises(ConfigError, match=f"^`seed` must be 0 to {LARGEST_SEED}, got {seed}\\.$"):
        settle_search(load_space("smoke", "cpu"), request)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [0, -1, 100_001, 10**400])
def test_a_senseless_number_of_weights_is_refused_before_anything_is_made(
    tmp_path: Path, number: int
) -> None:
    request = SearchRequest(SHAPES, tmp_path / "runs", "test", keep_weights=number)
    with pytest.raises(ConfigError, match=f"^`keep_weights` must be 1 to 100000, got {number}"):
        settle_search(load_space("smoke", "cpu"), request)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["tpe", "gp", "random"])
def test_the_largest_seed_serves_the_last_trial_of_the_longest_search(kind: Any) -> None:
    """A point of a quasi-random sequence has the search's seed."""
    startup = 0 if kind == "random" else 1
    space = make_space(trials=MAX_TRIALS, sampler=SamplerBudget(kind=kind, startup=startup))
    sampler, last = Sampler(space, LARGEST_SEED), MAX_TRIALS - 1
    assert sampler.ask(0)[1] == "baseline"
    ended = [
        PastTrial(
            0, space.baseline_params, "complete", scores=dict.fromkeys(space.budget.rungs, 0.5)
        )
    ]
    assert set(sampler.ask(last, ended)[0]) == set(space.distributions)
