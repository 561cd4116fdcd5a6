"""`run_search` from Python: what it takes, shows and returns."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tune_cifar
from tests.builders import (
    NUMERICS,
    ROOT,
    SEARCH_FINISHED,
    SEARCH_INTERRUPTED,
    SHAPES,
    SMALL_KNOBS,
    load_smoke,
    make_events,
    make_resume,
    make_trial,
    write_record,
    write_search,
)
from tune_cifar.cli import notebook
from tune_cifar.cli.notebook import Run, run_search
from tune_cifar.cli.search import search as search_command
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import ConfigError, NameTakenError, RecordError, SpaceError
from tune_cifar.record.events import Event
from tune_cifar.record.files import WEIGHTS
from tune_cifar.record.journal import read_state
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import Numerics
from tune_cifar.search.plan import SearchPlan, SearchRequest
from tune_cifar.train.recorded import make_header
from tune_cifar.verify.confirm import make_confirmation


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


def write_confirmed(
    storage: Path, numerics: Numerics, is_finished: bool
) -> tuple[SearchState, SearchState]:
    """A search of two trials on synthetic data and its confirmation under one seed."""
    space = load_smoke({**SMALL_KNOBS, "pct_start": 0.9}, rungs=(3,), fidelity="epochs")
    info = load_train_val(SHAPES, 20, 20).info
    header = make_header("search", "x", space, 0, info, numerics, "test")
    better = space.baseline.model_copy(update={"max_lr": 0.02})
    first = make_trial(0, [0.1, 0.2, 0.3], "complete", space.baseline)
    trials = [*first, *make_trial(1, [0.1, 0.2, 0.4], "complete", better)]
    state = write_record(storage, header, [*trials, SEARCH_FINISHED])
    space, settled = make_confirmation(state, 1, 1, {})
    header = make_header("confirm", "x-confirm", space, 0, info, numerics, "test")
    header = header.model_copy(update={"confirmation": settled})
    events = [*trials, SEARCH_FINISHED] if is_finished else [SEARCH_INTERRUPTED]
    return state, write_record(storage, header, events)


def test_a_cell_that_confirms_again_shows_what_is_recorded_and_refuses_other_trainings(
    tmp_path: Path,
) -> None:
    state, confirmation = write_confirmed(tmp_path, NUMERICS, is_finished=True)
    run = Run(state, data="shapes")
    for name in (None, "x-confirm"):
        found = run.confirm(seeds=1, top=1, name=name)
        assert found.state == confirmation and len(found.candidates) == 2
    way_out = "Its trials, seeds or epochs are others: give `name` for another."
    rule = f"x-confirm: a confirmation of this search exists already. {way_out}"
    with pytest.raises(NameTakenError, match=f"^{re.escape(rule)}$"):
        run.confirm(seeds=2, top=1)


def test_a_confirmation_trains_as_its_search_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"deterministic": True, "execution": "compiled", "precision": "tf32", "threads": 2}
    numerics = NUMERICS.model_copy(update=more)
    state, _ = write_confirmed(tmp_path, numerics, is_finished=False)
    run_module = importlib.import_module("tune_cifar.search.run")
    monkeypatch.setattr(run_module, "prepare_search", lambda space, request, settled: request)
    monkeypatch.setattr(notebook, "_run", lambda request, data: Run(request))
    asked: Any = Run(state, data="shapes").confirm(seeds=2, top=1, name="other").state
    assert asked.command == "run.confirm(seeds=2, top=1, name='other')"
    found = (asked.device, asked.precision, asked.cpus_per_trial, asked.deterministic)
    assert (*found, asked.execution) == ("cpu", "tf32", 2, True, "compiled")


def test_a_search_records_the_call_that_made_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_module = importlib.import_module("tune_cifar.search.run")
    monkeypatch.setattr(run_module, "prepare_search", lambda space, request: request)
    monkeypatch.setattr(notebook, "_run", lambda request, data: request)
    words: dict[str, Any] = {"tier": "cpu", "trials": 2, "settings": {"epochs": 2}}
    uri = "http://me:secret@host:5000"
    asked = run_search("smoke", **words, data="shapes", learn=False, tracking_uri=uri, seed=3)
    call = "space='smoke', tier='cpu', trials=2, settings={'epochs': 2}, data='shapes', seed=3"
    assert asked.command == f"run_search({call}, tracking_uri='http://***@host:5000')"
    assert (asked.seed, asked.tracking_uri, asked.storage) == (3, uri, workplace / "runs")


def test_a_plan_and_the_options_of_a_search_do_not_mix() -> None:
    made: Any = SearchPlan
    with pytest.raises(ConfigError, match=r"^`tier` must be left out beside a SearchPlan"):
        run_search(made(*[None] * 7), tier="cpu")
    with pytest.raises(ConfigError, match=r"^`listener` needs a SearchPlan, got 's7'\. Make one"):
        run_search("s7", lambda state, event: None)


def test_an_evaluation_says_what_it_left_and_what_mlflow_lacks(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Run(read_state(search_folder(storage, "small"))).evaluate()
    said = capsys.readouterr().err
    assert found.num_images == 20 and f"figures: {storage / 'judge' / 'small-0'} (" in said
    assert "evaluation of small:0 not uploaded to MLflow: " in said


CONFIRM = """
import sys
from pathlib import Path
from tune_cifar import Run, load_searches
(state,) = load_searches(Path(sys.argv[1]), search="x")
run = Run(state, data="shapes")
done = run.confirm(seeds=1, top=1, max_concurrent=1)
assert done.name == "x-confirm" and done.state.is_finished, done
assert done.state.counts["complete"] == 2 and len(done.state.resumes) == 1
again = run.confirm(seeds=1, top=1)
assert again.state.num_events == done.state.num_events
"""


@pytest.mark.slow
def test_a_cell_that_was_interrupted_continues_its_confirmation(
    workplace: Path, fp32: Numerics
) -> None:
    write_confirmed(workplace / "runs", fp32, is_finished=False)
    done = subprocess.run(
        [sys.executable, "-c", CONFIRM, str(workplace / "runs")],
        capture_output=True,
        text=True,
        cwd=workplace,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_plan_to_resume_keeps_the_weights_that_its_search_has(state: SearchState) -> None:
    more: list[Event] = []
    for number in range(5, 8):
        more += make_trial(number, [0.1, 0.2, 0.3], "complete")
    for event in (make_resume(), *more):
        state.apply(event)
    for trial in state.trials.values():
        state.trial_folder(trial.number).mkdir(parents=True)
        (state.trial_folder(trial.number) / WEIGHTS).write_bytes(b"weights")
    request = SearchRequest(SHAPES, state.storage, "test", name="s7-1")
    made: Any = SearchPlan
    plan = made(*[None] * 9)
    for past, given, number in ((state, 3, 5), (state, 2, 2), (None, 3, 3)):
        asked = replace(request, keep_weights=given)
        kept = notebook._keep_weights(replace(plan, request=asked, past=past))
        assert kept.request == replace(asked, keep_weights=number)


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
    assert "search one: 2 trials" in done.stderr
    assert "epoch 1 of " in done.stderr and ": agrees" in done.stderr


def test_the_public_names_are_there_and_no_submodule_hides_one() -> None:
    for found in pkgutil.walk_packages(tune_cifar.__path__, "tune_cifar."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    names: Any = tune_cifar.__all__
    assert not [name for name in names if inspect.ismodule(getattr(tune_cifar, name))]
    with pytest.raises(SpaceError, match="no-such-space"):
        tune_cifar.run_search("no-such-space", data="shapes")
