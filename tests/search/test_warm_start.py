"""Warm starts: which trials of other searches are tried first, and what is learned from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution

from tests.builders import CIFAR10, SHAPES, make_space, run_in_a_process, simulate_search
from tests.search.test_resume import run_driver
from tune_cifar.errors import ConfigError
from tune_cifar.record.events import Header, decode_event, encode_event
from tune_cifar.record.journal import read_state
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import Numerics
from tune_cifar.search.plan import SearchRequest
from tune_cifar.search.run import prepare_search
from tune_cifar.search.sampler import Sampler, fit_point
from tune_cifar.search.warm_start import drop_learned, learn, try_best_first
from tune_cifar.space.layout import SamplerBudget
from tune_cifar.space.reader import parse_space
from tune_cifar.space.select import load_space, select_tier
from tune_cifar.space.template import make_space_text

OWN_NETWORK = """
from torch import nn

def Net(num_classes: int, width: int = 8):
    conv = nn.Conv2d(3, width, 3, stride=4)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, num_classes))
"""


def test_a_warm_start_tries_the_best_first_and_leaves_out_what_does_not_fit(
    tmp_path: Path, fp32: Numerics
) -> None:
    state = run_driver(tmp_path, fp32, [[0.5] * 3, [0.9] * 3, [0.1], [0.95] * 3])
    best = [state.trials[n] for n in (3, 1)]
    space, notes = try_best_first(make_space(), [state], 2)
    names = list(space.distributions)
    assert notes == []
    found = [{name: getattr(trial.config, name) for name in names} for trial in best]
    assert list(space.points[:2]) == found
    assert len({str(point) for point in space.points}) == len(space.points)
    narrow = dict(make_space().distributions)
    limit = best[0].config.max_lr * (1 + 1e-9)
    narrow["max_lr"] = FloatDistribution(limit, 1.0, log=True)
    narrowed = dataclasses.replace(make_space(), distributions=narrow)
    fewer, notes = try_best_first(narrowed, [state], 1)
    assert notes == ["x:3 is left out: a value lies outside of this space"]
    assert len(fewer.points) == len(make_space().points)


def test_a_warm_start_hands_over_no_inactive_knob(tmp_path: Path) -> None:
    """Nor is a trial left out for a value that had no effect."""
    state = simulate_search(tmp_path, 30, lambda trial, stage: trial.full_config.dropout, name="s8")
    best = next(trial for trial in state.ranked if trial.config.schedule == "constant")
    space = load_space("s8", "cpu")
    narrow = dict(space.distributions) | {"div_factor": FloatDistribution(2.0, 10.0, log=True)}
    assert best.config.div_factor > 10
    space = dataclasses.replace(space, distributions=narrow, points=())
    found, notes = try_best_first(space, [state], 1 + state.ranked.index(best))
    inactive = ("pct_start", "div_factor", "final_div_factor")
    handed = {name: getattr(best.config, name) for name in narrow if name not in inactive}
    assert handed in found.points and f"{best.run_id} is" not in "".join(notes)
    sampler = Sampler(found, seed=0)
    asked = [sampler.ask(number)[0] for number in range(1 + len(found.points))]
    assert handed in asked


def test_arguments_of_ones_own_network_are_taken_over(tmp_path: Path) -> None:
    text = make_space_text("net.py:Net", "net", True, [("width", "int", 8)])
    text = text.replace("search:\n", "search:\n  model_args.width: {low: 8, high: 32, step: 8}\n")
    space = select_tier(parse_space(text, tmp_path / "net.yaml"), "full")
    wide = {**space.baseline_params, "model_args.width": 16}
    assert fit_point(space, space.config(wide)) == space.select_active(wide)
    assert fit_point(space, space.baseline.model_copy(update={"model_args": ()})) is None
    assert fit_point(space, space.config({**wide, "model_args.width": 40})) is None


@pytest.mark.faults
def test_a_search_of_ones_own_network_learns_from_another(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(OWN_NETWORK)
    text = make_space_text("net.py:Net", "net", False, [("width", "int", 8)])
    text = text.replace("search:\n", "search:\n  model_args.width: {low: 8, high: 32, step: 8}\n")
    (tmp_path / "net.yaml").write_text(text)
    words = ("search", "--space=net.yaml", "--data=shapes", "--tier=full", "--trials=2")
    sizes = ("train_size=200", "val_size=100", "batch_size=10", "epochs=3")
    small = [f"--set={size}" for size in sizes]
    learns = ("--name=z", "--warm-start=x", "--learn")
    for more in (("--name=x",), ("--name=y", "--warm-start=x"), learns):
        answer = run_in_a_process(*words, *small, *more, folder=tmp_path)
        assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "learned from 2 trials of x" in " ".join(answer.stdout.split())
    states = [read_state(search_folder(tmp_path / "runs", name)) for name in ("x", "z")]
    first, second = ([trial.params for trial in state.trials.values()] for state in states)
    assert second[0] == first[0] and second[1] not in first


def test_a_warm_start_needs_a_complete_trial(tmp_path: Path, fp32: Numerics) -> None:
    state = run_driver(tmp_path, fp32, [[0.5]])
    rule = "`warm_start` must be a search with a complete trial, got 'x'"
    with pytest.raises(ConfigError, match=rule):
        try_best_first(make_space(), [state], 3)


def test_of_several_searches_the_best_of_each_come_first_also_of_another_space(
    tmp_path: Path,
) -> None:
    """s7 has no `schedule` to search, and a dropout of s8 may lie outside of its range."""

    def score(trial: TrialState, stage: int) -> float:
        return trial.full_config.max_lr

    names = ("s7", "s8")
    states = [simulate_search(tmp_path / name, 12, score, name=name) for name in names]
    space = load_space("s7", "cpu")
    found, notes = try_best_first(dataclasses.replace(space, points=()), states, 2)
    best = [state.ranked[place] for place in (0, 1) for state in states]
    outside = [note.split(" is left out")[0] for note in notes]
    expected = [trial for trial in best if trial.run_id not in outside]
    lrs = [point["max_lr"] for point in found.points]
    assert lrs == list(dict.fromkeys(trial.config.max_lr for trial in expected))
    assert {type(point["max_lr"]) for point in found.points} == {float}


def make_past(storage: Path) -> SearchState:
    return simulate_search(storage, 12, lambda trial, stage: trial.full_config.dropout, diverging=5)


def test_what_is_learned_is_every_ended_trial_with_its_rung_scores(tmp_path: Path) -> None:
    state = make_past(tmp_path)
    learned, note = learn(load_space("smoke", "cpu"), state, CIFAR10)
    assert [found.run_id for found in learned] == [f"x:{number}" for number in range(12)]
    assert note == "learned from 12 trials of x"
    for found, trial in zip(learned, state.trials.values(), strict=True):
        assert (found.params, found.status, found.scores) == (
            trial.params,
            trial.status,
            trial.scores,
        )
    assert {found.status for found in learned} == {"complete", "stopped", "diverged"}


def test_a_search_that_learned_proposes_as_if_the_trials_were_its_own(tmp_path: Path) -> None:
    """Also after its record was read again, as a resume does."""
    state = make_past(tmp_path)
    space = load_space("smoke", "cpu")
    learned, _ = learn(space, state, CIFAR10)
    header = state.header.model_copy(update={"learned": learned})
    line, written = encode_event(1, header)
    header = decode_event(1, line)
    assert isinstance(header, Header) and header == written and header.learned == learned
    asked = Sampler(space, 7, learned=header.learned).ask(9)
    assert asked == Sampler(space, 7).ask(9, list(state.trials.values()))
    assert asked != Sampler(space, 7).ask(9)


def test_no_learned_trial_but_the_baseline_is_trained_again(tmp_path: Path) -> None:
    """Its points had come first, and before its startup it draws as that search did."""
    state = make_past(tmp_path)
    learned, _ = learn(load_space("smoke", "cpu"), state, CIFAR10)
    known = [trial.params for trial in learned]
    startup = {"sampler": SamplerBudget(kind="tpe", startup=20)}
    space = load_space("smoke", "cpu")
    space = dataclasses.replace(space, budget=space.budget.model_copy(update=startup))
    assert [space.select_active(point) in known for point in space.points] == [True]
    space = drop_learned(space, learned)
    sampler = Sampler(space, state.header.seed, learned=learned)
    asked = [sampler.ask(number, [])[0] for number in range(12)]
    assert asked[0] in known and space.points == ()
    assert not [params for params in asked[1:] if params in known]
    assert len({str(params) for params in asked}) == 12
    assert asked[5] == Sampler(space, state.header.seed, learned=learned).ask(5, [])[0]


@pytest.mark.parametrize("kind", ["random", "qmc"])
def test_a_sampler_that_does_not_learn_is_told_nothing(tmp_path: Path, kind: Any) -> None:
    make_past(tmp_path)
    request = SearchRequest(SHAPES, tmp_path, "test", warm_start=("x",), learn=True)
    rule = f"`learn`: the space's sampler must be tpe or gp, got {kind}"
    with pytest.raises(ConfigError, match=rule):
        prepare_search(make_space(sampler=SamplerBudget(kind=kind)), request)


@pytest.mark.parametrize(
    ("changes", "pins", "difference"),
    [
        ({"data": CIFAR10.model_copy(update={"split_hash": "other"})}, {}, "split: other -> "),
        ({"data": CIFAR10.model_copy(update={"name": "shapes"})}, {}, "data: shapes -> cifar10"),
        ({"environment": {"code": "0123"}}, {}, "code: 0123 -> "),
        ({}, {"epochs": 4}, "rungs: [1, 3] -> [1, 4]"),
    ],
)
def test_a_search_that_trained_otherwise_is_not_learned_from(
    tmp_path: Path, changes: dict[str, Any], pins: dict[str, Any], difference: str
) -> None:
    state = make_past(tmp_path)
    state.header = state.header.model_copy(update=changes)
    with pytest.raises(ConfigError, match="must have trained as this search will") as caught:
        learn(load_space("smoke", "cpu", pins), state, CIFAR10)
    assert difference in str(caught.value)


def test_trials_of_another_recipe_are_left_out_and_none_left_is_refused(tmp_path: Path) -> None:
    state = make_past(tmp_path)
    dropout = state.trials[3].full_config.dropout
    space = load_space("smoke", "cpu", {"dropout": dropout})
    learned, note = learn(space, state, CIFAR10)
    assert [found.run_id for found in learned] == ["x:3"]
    assert note.endswith("; 11 are of another recipe or outside of this space")
    with pytest.raises(ConfigError, match="a trial of x must be one of this space, got none of 12"):
        learn(load_space("smoke", "cpu", {"weight_decay": 0.3}), state, CIFAR10)


def test_old_headers_name_one_search_or_none(tmp_path: Path) -> None:
    header = make_past(tmp_path).header.model_dump(mode="json")
    for written, names in (("other", ["other"]), (None, []), (["a", "b"], ["a", "b"])):
        assert Header(**{**header, "warm_start": written}).warm_start == names
