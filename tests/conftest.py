"""Fixtures of all tests: small trainings on synthetic data, and the real CIFAR-10 if present."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import typer.testing

# No deadline for an example: a slow machine is no fault.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests press Ctrl-C. A shell starts background jobs with it ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Otherwise typer builds all commands again each time a test runs one.
testing: Any = typer.testing
testing._get_command = functools.cache(testing._get_command)

# Before search/worker, which would give this process a token of its own for Ray. Tests that need no
# Ray run where there is none.
with suppress(ImportError):
    import ray  # noqa: F401

from tests.builders import FEW_IMAGES, SHAPES, train_small
from tune_cifar.data.files import DataSource, find_data
from tune_cifar.data.load import TrainVal, load_train_val
from tune_cifar.errors import DataError
from tune_cifar.record import environment
from tune_cifar.record.state import SearchState
from tune_cifar.schema import Numerics
from tune_cifar.space import reader
from tune_cifar.train.numerics import resolve_numerics

# A space file takes 20 ms to parse, git 10 ms to answer, and tests ask the same hundreds of times.
for module, name in ((reader, "read_document"), (environment, "_ask_git")):
    setattr(module, name, functools.lru_cache(256)(getattr(module, name)))

# They come first, so that no process is left with one of them at the end.
LONGEST = (
    "test_the_commands_of_the_readme_run_in_their_order",
    "test_the_commands_for_an_own_network_run_in_their_order",
    "test_the_commands_for_own_images_run_in_their_order",
    "test_the_notebook_of_an_own_network_searches_and_confirms",
    "test_a_script_searches_twice_and_reproduces",
    "test_the_wheel_runs_a_smoke_search_in_a_fresh_environment",
    "test_a_search_is_found_sorted_compared_and_looked_into_in_mlflows_page",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests: LONGEST, then as they stand in the files."""
    items.sort(key=lambda item: item.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Keep what is imported by now, a million objects, from every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def fp32() -> Numerics:
    """CPU, fp32, one thread: the same arithmetic on every processor of one kind."""
    return resolve_numerics("cpu", "fp32", threads=1)


@pytest.fixture(scope="session")
def shapes() -> TrainVal:
    """The synthetic images that make_config trains on."""
    return load_train_val(SHAPES, 60, 50)


@pytest.fixture(scope="session")
def few() -> TrainVal:
    """The synthetic images of `make_config(**FEW_IMAGES)`."""
    return load_train_val(SHAPES, FEW_IMAGES["train_size"], FEW_IMAGES["val_size"])


@pytest.fixture(scope="session")
def cifar10() -> DataSource:
    """The real CIFAR-10; skips if TUNE_CIFAR_DATA does not name its folder."""
    if "TUNE_CIFAR_DATA" not in os.environ:
        pytest.skip("TUNE_CIFAR_DATA is not set: no real CIFAR-10 here")
    try:
        return find_data(os.environ["TUNE_CIFAR_DATA"])
    except DataError as exc:
        pytest.skip(f"no real CIFAR-10: {exc}")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a run store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNE_CIFAR_RUNS", str(tmp_path / "runs"))
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, fp32: Numerics) -> SearchState:
    """The finished run "small:0" of train_small; no test may change its files."""
    return train_small(tmp_path_factory.mktemp("runs"), fp32)


@pytest.fixture
def storage(workplace: Path, trained: SearchState) -> Path:
    """A run store with a copy of `trained` and nothing else."""
    shutil.copytree(trained.folder, workplace / "runs" / "searches" / "small")
    return workplace / "runs"
