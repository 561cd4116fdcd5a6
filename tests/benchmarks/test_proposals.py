"""Simulated searches on a table of trainings: which configuration answers, and the arithmetic."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import PastTrial
from tune_cifar.search.sampler import Sampler
from tune_cifar.space.layout import SamplerBudget
from tune_cifar.space.select import SearchSpace

# The benchmarks are scripts, not a package.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
proposals = importlib.import_module("proposals")

BASELINE = {
    "schedule": "constant",
    "max_lr": 0.01,
    "dropout": 0.0,
    "pct_start": 0.3,
    "div_factor": 25.0,
    "final_div_factor": 1e4,
}


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """TPE begins after 12 results."""
    space: SearchSpace = proposals.load_searched("s8", {})
    sampler = SamplerBudget(kind="tpe", startup=12)
    return replace(space, budget=space.budget.model_copy(update={"sampler": sampler}))


def measure(params: dict[str, Any]) -> float:
    """A smooth accuracy of at most 50 %, best under OneCycle."""
    loss: float = 0.1 * (math.log10(params["max_lr"]) + 1) ** 2
    loss += 2 * (params["dropout"] - 0.05) ** 2
    if params["schedule"] == "constant":
        return 0.45 - loss
    loss += (params["pct_start"] - 0.25) ** 2 + 0.02 * (math.log10(params["div_factor"]) - 1) ** 2
    return 0.5 - loss


def make_random_table(space: SearchSpace, num_configs: int) -> Any:
    sampler = Sampler(proposals.choose_sampler(space, "random"), 99)
    params = [sampler.ask(number)[0] for number in range(num_configs)]
    return proposals.make_table(space, params, [measure(each) for each in params])


def find_distances(
    space: SearchSpace, ask: dict[str, Any], *configs: dict[str, Any]
) -> list[float]:
    """Return the distances from an ask to configurations, given as changes of the baseline."""
    params = [{**BASELINE, **config} for config in configs]
    table = proposals.make_table(space, params, [0.0] * len(configs))
    point = proposals.locate(space, {**BASELINE, **ask})
    distances: list[float] = table.measure_distances(*point).tolist()
    return distances


def test_distance_is_the_fraction_of_the_range_in_logarithms_where_the_scale_is(
    space: SearchSpace,
) -> None:
    lr, dropout = {"max_lr": 0.1}, {"dropout": 0.1}
    found = find_distances(space, {}, lr, dropout, lr | dropout, {})
    assert found == pytest.approx([1 / 3, 1 / 2, math.hypot(1 / 3, 1 / 2), 0])


def test_another_schedule_counts_one(space: SearchSpace) -> None:
    other = {"schedule": "onecycle"}
    found = find_distances(space, {}, other, {**other, "dropout": 0.1})
    assert found == pytest.approx([1, math.hypot(1, 1 / 2)])


def test_knobs_of_onecycle_count_only_between_two_onecycles(space: SearchSpace) -> None:
    shape = {"pct_start": 0.05, "final_div_factor": 1.0}
    assert find_distances(space, {}, shape) == [0]
    assert find_distances(space, {}, {"schedule": "onecycle", **shape}) == [1]
    assert find_distances(space, {"schedule": "onecycle"}, shape) == [1]
    both = find_distances(space, {"schedule": "onecycle"}, {"schedule": "onecycle", **shape})
    assert both == pytest.approx([math.hypot(0.25 / 0.45, 4 / 5)])


@pytest.mark.parametrize("name", ["tpe/4", "random"])
def test_search_begins_with_the_baseline_and_never_gets_an_answer_twice(
    space: SearchSpace, name: str
) -> None:
    table = make_random_table(space, 12)
    taken, gaps = proposals.Simulator(space, [name], 12).search(name, table, 0)
    assert taken[0] == 0
    assert sorted(taken) == list(range(12))
    assert gaps[0] == 0 < min(gaps[1:])


@pytest.mark.parametrize("name", ["tpe/4", "tpe/4+all", "random"])
def test_answer_is_nearest_of_what_is_left_to_what_a_sampler_with_this_history_asks(
    space: SearchSpace, name: str
) -> None:
    table = make_random_table(space, 30)
    taken, gaps = proposals.Simulator(space, [name], 12).search(name, table, 5)
    history: list[PastTrial] = []
    for number in range(1, 12):
        last = taken[number - 1]
        score = float(table.scores[last])
        params, is_conditional = table.params[last], not name.endswith("+all")
        told = space.select_active(params) if is_conditional else params
        history.append(PastTrial(number - 1, told, "complete", scores={3: score}))
        chosen = proposals.choose_sampler(space, name)
        ask, _ = Sampler(chosen, 5, is_conditional).ask(number, history)
        distances = table.measure_distances(*proposals.locate(space, ask))
        left = [config for config in range(30) if config not in taken[:number]]
        assert gaps[number] == distances[taken[number]] == min(distances[left])


def test_tpe_is_paired_with_random_search_until_it_has_its_startup(space: SearchSpace) -> None:
    table = make_random_table(space, 40)
    simulator = proposals.Simulator(space, ["tpe", "random"], 20)
    tpe, random = (simulator.search(name, table, 3)[0] for name in ("tpe", "random"))
    assert tpe[:12] == random[:12]
    assert tpe[12:] != random[12:20]


def test_inactive_knobs_told_or_left_out_are_compared_in_pairs(
    space: SearchSpace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both have the same startup; then only `tpe+all` learns from what had no effect."""
    table = make_random_table(space, 40)
    simulator = proposals.Simulator(space, ["tpe", "tpe+all", "random"], 30)
    outcome = simulator.run(table, 2)
    found = proposals.compute_figures(outcome, [12, 30])
    left_out, told = (simulator.search(name, table, 3)[0] for name in ("tpe", "tpe+all"))
    assert left_out[:12] == told[:12] and left_out[12:] != told[12:]
    assert found["minus tpe+all", "tpe", 12] == found["minus tpe+all", "tpe+all", 30] == 0
    difference = found["best", "tpe", 30] - found["best", "tpe+all", 30]
    assert found["minus tpe+all", "tpe", 30] == pytest.approx(difference)
    variance = dict.fromkeys(found, 0.0)
    proposals.show_best(proposals.estimate(outcome, [12, 30], variance), 3, "tpe+all")
    header, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert "| minus tpe+all, points |" in header
    (row,) = (line for line in lines if line.startswith("| 30 | 90 | tpe |"))
    assert f"| {difference:+.2f} |" in row


@pytest.mark.slow
def test_tpe_wins_on_a_dense_table_of_a_smooth_function(space: SearchSpace) -> None:
    table = make_random_table(space, 150)
    outcome = proposals.Simulator(space, ["tpe", "random"], 24).run(table, 6)
    found = proposals.compute_figures(outcome, [12, 24])
    assert found["minus random", "tpe", 12] == 0, "the startup's proposals are random search's"
    assert found["regret", "tpe", 24] < found["regret", "random", 24] / 2


def test_table_holds_the_complete_short_training_of_each_configuration(
    space: SearchSpace, tmp_path: Path
) -> None:
    onecycle = {**BASELINE, "schedule": "onecycle"}
    rows = [
        (1, "restart/3", onecycle, [0.1, 0.2, 0.3]),
        (1, "full/0", onecycle, [0.1] * 8),
        (0, "full/1", BASELINE, [0.9] * 8),
        (0, "full/0", BASELINE, [0.2, 0.3, 0.4, 0.5]),
        (3, "restart/3", onecycle, [0.3]),
        (2, "full/0", onecycle, [0.1] * 8),
        (4, "restart/3", BASELINE, [0.1, 0.2, 0.35]),
    ]
    keys = ("config", "job", "params", "val_acc")
    file = tmp_path / "table.jsonl"
    file.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    table = proposals.read_table(space, file)
    assert table.params == [BASELINE, onecycle, onecycle, BASELINE]
    # Configuration 3 diverged, 2 is not trained yet.
    assert table.scores.tolist() == [0.4, 0.3, 0.1, 0.35]


def test_figures_of_a_made_table() -> None:
    random = np.array([[0.2, 0.3, 0.3, 0.4], [0.2, 0.2, 0.4, 0.5]])
    tpe = np.array([[0.2, 0.35, 0.4, 0.5], [0.2, 0.35, 0.5, 0.5]])
    outcome = proposals.Outcome({"random": random, "tpe": tpe}, {}, 0.5)
    found = proposals.compute_figures(outcome, [2, 4])
    assert found["best", "tpe", 4] == pytest.approx(50)
    assert found["regret", "random", 2] == pytest.approx(25)
    assert found["minus random", "tpe", 2] == pytest.approx(10)
    # Random search's means are 20, 25, 35 and 45.
    assert math.exp(found["log asks of random", "tpe", 2]) == pytest.approx(3)


def test_asks_are_counted_between_two_asks_and_to_the_first_that_reaches() -> None:
    curve = np.array([0.2, 0.3, 0.3, 0.5])
    levels = (0.1, 0.2, 0.3, 0.4, 0.5)
    assert [proposals.count_asks(curve, level) for level in levels] == [1, 1, 2, 3.5, 4]


@pytest.mark.slow
def test_variance_over_tables_leaves_out_what_seeds_contribute() -> None:
    """Tables have a standard deviation of 1 point, seeds one of 4 in common and 2 per table."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 0.04, (8, 1))
    outcomes = []
    for shift in rng.normal(0, 0.01, 400):
        curve = 0.5 + shift + common + rng.normal(0, 0.02, (8, 1))
        outcomes.append(proposals.Outcome({"random": curve}, {}, 1.0))
    variances = proposals.compute_table_variance(outcomes, [1], num_resamples=40)
    # An eighth of the luck would add 1.5.
    assert variances["best", "random", 1] == pytest.approx(3, rel=0.3)
