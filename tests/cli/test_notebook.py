"""`run_search` from Python: what it takes, shows and returns."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tune_cifar
from tests.builders import ROOT, make_events, write_search
from tune_cifar.cli import notebook
from tune_cifar.cli.notebook import Run, run_search
from tune_cifar.cli.search import search as search_command
from tune_cifar.errors import ConfigError, RecordError, SpaceError
from tune_cifar.record.state import SearchState


@pytest.fixture
def state(tmp_path: Path) -> SearchState:
    return write_search(tmp_path, "s7-1", 1, make_events())


def test_the_parameters_are_the_options_of_the_command_with_their_defaults() -> None:
    ours = inspect.signature(run_search).parameters
    theirs = inspect.signature(search_command).parameters
    left_out = {"context", "resume", "continue_", "accept_changes"}
    for name, option in theirs.items():
        if name not in left_out:
            is_same = ours[name].default == option.default or name in ("space", "warm_start")
            assert is_same, name
    assert set(ours) - set(theirs) == {"listener", "on_interrupt"}


def test_a_run_is_a_line_and_a_table(state: SearchState) -> None:
    run = Run(state)
    assert repr(run).startswith("<Run s7-1: 2 complete, 1 stopped, 1 diverged, 1 failed; best 80")
    assert run._repr_html_().count("<tr>") == 3
    assert len(run.trials) == len(state.trials) and run.best is state.best
    with pytest.raises(ConfigError, match="is no confirmation"):
        _ = run.candidates
    with pytest.raises(RecordError, match=r"`trial` must be the number of a trial, got 99"):
        run.reproduce(trial=99)


def test_text_of_a_table_cannot_be_markup() -> None:
    assert notebook._make_html("<b>", [["<i>"]]) == (
        "<p>&lt;b&gt;</p><table><tr><th>&lt;i&gt;</th></tr></table>"
    )


SCRIPT = """
import tune_cifar
sizes = {"train_size": 120, "val_size": 50, "batch_size": 10}
more = dict(tier="cpu", data="shapes", settings=sizes, trials=2, max_concurrent=1)
run = tune_cifar.run_search("smoke", name="one", **more)
assert run.state.is_finished
assert run.reproduce().verdict == "identical"
space = tune_cifar.load_space("smoke", "cpu", sizes).limit(1)
request = tune_cifar.SearchRequest(tune_cifar.find_data("shapes"), run.state.storage, "x", "plan")
state, faults = tune_cifar.run_search(tune_cifar.prepare_search(space, request))
assert state.header.name == "plan" and faults == [] and len(state.trials) == 1
assert state.trials[0].accuracy == run.state.trials[0].accuracy
print("done")
"""


@pytest.mark.slow
def test_a_script_searches_twice_and_reproduces(workplace: Path) -> None:
    """The notebook of an own network does the rest."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        cwd=workplace,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stdout + done.stderr
    assert "trial 0 complete (all epochs); best so far" in done.stderr
    assert "epoch 1 of " in done.stderr and ": agrees" in done.stderr


def test_the_public_names_are_there_and_no_submodule_hides_one() -> None:
    for found in pkgutil.walk_packages(tune_cifar.__path__, "tune_cifar."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    names: Any = tune_cifar.__all__
    assert not [name for name in names if inspect.ismodule(getattr(tune_cifar, name))]
    with pytest.raises(SpaceError, match="no-such-space"):
        tune_cifar.run_search("no-such-space")
