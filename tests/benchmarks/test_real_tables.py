"""Searches on tables of real trainings: how rows become a table, and what a search finds in it."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tune_cifar.search.sampler import Sampler
from tune_cifar.space.select import SearchSpace, load_space

# The benchmarks are scripts, not a package.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
real_tables = importlib.import_module("real_tables")


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space("s8", "full", real_tables.SIZES)


def make_rows(space: SearchSpace, num_configs: int, noise: float) -> list[dict[str, Any]]:
    """Rows of made-up trainings: best under OneCycle near max_lr 0.1, better the longer."""
    sampler = Sampler(real_tables.choose(space, "random"), 3)
    random = np.random.default_rng(0)
    rows = []
    for number in range(num_configs):
        params, _ = sampler.ask(number)
        value = 0.5 - 0.1 * (math.log10(params["max_lr"]) + 1) ** 2
        value += 0.05 * (params["schedule"] == "onecycle") - params["dropout"]
        for seed in real_tables.SEEDS:
            for epochs in real_tables.RUNGS:
                score = float(np.clip(value + 0.02 * epochs + noise * random.normal(), 0.1, 1.0))
                rows.append(
                    {
                        "config": number,
                        "seed": seed,
                        "epochs": epochs,
                        "params": params,
                        "val_acc": score,
                        "diverged": False,
                        "seconds": 1.0,
                    }
                )
    return rows


def test_configurations_without_all_their_trainings_are_left_out(space: SearchSpace) -> None:
    rows = make_rows(space, 5, 0.0)
    table = real_tables.make_table(space, rows[:-1])
    assert table.scores.shape == (4, 2, 3) and len(table.params) == 4
    first = [row["val_acc"] for row in rows[:6]]
    assert table.scores[0].flatten().tolist() == first
    assert table.active.shape == table.places.shape == (4, len(space.distributions))
    constant = [params["schedule"] == "constant" for params in table.params]
    place = list(space.distributions).index("pct_start")
    assert table.active[:, place].tolist() == [not each for each in constant]


def test_a_search_begins_as_good_as_the_baseline_and_finds_what_the_table_has(
    space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_tables, "SHOWN", (60,))
    table = real_tables.make_table(space, make_rows(space, 60, 0.01))
    truth = table.scores[:, :, -1].mean(axis=1)
    for kind in ("random", "tpe", "gp"):
        quality = real_tables.simulate(real_tables.choose(space, kind), table, seed=1)
        assert quality[0] == truth[0] and set(quality) <= set(truth)
        assert truth[0] < quality[-1] <= truth.max()
        again = real_tables.simulate(real_tables.choose(space, kind), table, seed=1)
        assert (quality == again).all()


def test_without_noise_a_sampler_that_learns_finds_more_than_a_random_one(
    space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_tables, "SHOWN", (80,))
    table = real_tables.make_table(space, make_rows(space, 100, 0.0))
    means = {}
    for kind in ("random", "gp"):
        chosen = real_tables.choose(space, kind)
        found = [real_tables.simulate(chosen, table, seed)[80] for seed in range(4)]
        means[kind] = float(np.mean(found))
    assert means["random"] < means["gp"]


def test_a_diverged_training_is_no_complete_one(space: SearchSpace) -> None:
    rows = make_rows(space, 12, 0.0)
    for row in rows:
        if row["config"] and row["epochs"] == 8:
            row.update(diverged=True, val_acc=0.1)
    table = real_tables.make_table(space, rows)
    quality = real_tables.simulate(real_tables.choose(space, "gp"), table, seed=0)
    assert set(quality) == {table.scores[0, :, -1].mean()}
