"""The tables behind a search's figures, and that the figures show them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from tests.builders import make_result, make_stages_driver, simulate_search
from tune_cifar.record.events import Stage
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.report.plots import search as figures
from tune_cifar.report.plots.interactive import make_parallel_html
from tune_cifar.report.plots.style import STATUS_COLOURS, label_knob, save
from tune_cifar.report.tables import (
    list_rungs,
    make_costs,
    make_curves,
    make_history,
    make_importances,
    make_knobs,
    make_rung_scores,
    make_rungs,
    make_schedules,
    make_slices,
)
from tune_cifar.schema import Numerics


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> SearchState:
    """30 trials, the twentieth of which diverged."""
    return simulate_search(tmp_path_factory.mktemp("runs"), 30, diverging=20)


def test_the_history_follows_the_ends_and_its_best_is_the_highest_score_so_far(
    searched: SearchState,
) -> None:
    history = make_history(searched)
    assert list(history["trial"]) == list(range(30))
    assert list(history["order"]) == list(range(1, 31))
    assert history["wall_seconds"].is_monotonic_increasing and (history["wall_seconds"] >= 0).all()
    complete = [trial.score for trial in searched.trials.values() if trial.status == "complete"]
    assert history["best"].iloc[-1] == max(score for score in complete if score is not None)
    assert (history["score"].notna() == (history["status"] == "complete")).all()


def test_the_curves_count_the_epochs_over_all_stages_of_a_trial(searched: SearchState) -> None:
    curves = make_curves(searched)
    for number, rows in curves.groupby("trial"):
        trial = searched.trials[int(str(number))]
        assert list(rows["epochs_trained"]) == list(range(1, trial.epochs_done + 1))
    best = searched.best
    assert best is not None
    assert list(curves[curves["trial"] == best.number]["stage"]) == [1, 3, 3, 3]
    assert set(curves["status"]) == {"complete", "stopped"}  # the diverged trial reported nothing


def test_the_curves_tell_replicates_apart(tmp_path: Path, fp32: Numerics) -> None:
    driver = make_stages_driver(tmp_path, fp32, replicates=2)
    driver.ask()
    for stage in ((1, 0), (2, 0), (3, 0), (3, 1)):
        for epoch in range(1, stage[0] + 1):
            driver.report(0, Stage(*stage), make_result(epoch, 0.5))
    driver.record.close()
    curves = make_curves(driver.record.state)
    assert list(curves["replicate"]) == [0] * 6 + [1] * 3
    (_, _, panel) = figures.draw_curves(curves, "x").axes
    assert [list(line.get_xdata()) for line in panel.lines] == [[1, 2, 3], [1, 2, 3]]
    loss, _ = figures.draw_fit(curves, "x").axes
    assert (
        sum(line.get_linestyle() == "-" and len(line.get_xdata()) == 3 for line in loss.lines) == 2
    )


def test_a_rungs_table_has_the_promotions_of_the_driver(searched: SearchState) -> None:
    scores = make_rung_scores(searched)
    first = scores[scores["rung"] == 1].set_index("trial")
    for number, promoted in first["is_promoted"].items():
        trial = searched.trials[int(str(number))]
        assert promoted == (trial.status == "complete") or trial.origin == "baseline"
    assert (first["is_promoted"] == (first["score"] >= first["cutoff"])).all()
    assert list(first["order"]) == list(range(1, 30))
    assert not scores[scores["rung"] == 3]["is_promoted"].any()
    rungs = make_rungs(searched)[["rung", "num_arrived", "num_promoted"]]
    num_complete = searched.counts["complete"]
    assert rungs.to_numpy().tolist() == [[1, 29, num_complete], [3, num_complete, 0]]
    assert list_rungs(searched) == (1, 3)


@pytest.mark.parametrize(("sign", "expected"), [(1, 1.0), (-1, -1.0)])
def test_a_rungs_rank_correlation_is_that_of_the_complete_trials(
    sign: int, expected: float, tmp_path: Path
) -> None:
    signs = {1: 1, 3: sign}
    state = simulate_search(
        tmp_path, 12, lambda trial, stage: 0.5 + signs[stage] * trial.number / 100
    )
    rungs = make_rungs(state).set_index("rung")
    assert rungs.loc[1, "rank_correlation"] == pytest.approx(expected)
    assert rungs.loc[1, "num_pairs"] == 12
    assert rungs.loc[3, "rank_correlation"] == pytest.approx(1.0)


def test_fewer_than_three_complete_trials_have_no_rank_correlation(tmp_path: Path) -> None:
    state = simulate_search(tmp_path, 2)
    assert make_rungs(state)["rank_correlation"].isna().all()


def test_slices_have_a_row_for_every_trial_and_knob_and_chance_for_a_diverged_one(
    searched: SearchState,
) -> None:
    slices = make_slices(searched)
    knobs = list(searched.header.distributions)
    assert len(slices) == 30 * len(knobs) and list(slices["knob"].unique()) == knobs
    rates = slices[slices["knob"] == "max_lr"].set_index("trial")
    assert rates.loc[20, "rung_score"] == 0.1 and math.isnan(rates.loc[20, "score"])
    for number, trial in searched.trials.items():
        assert rates.loc[number, "value"] == trial.full_config.max_lr
        if number != 20:
            assert rates.loc[number, "rung_score"] == trial.scores[1]


def test_the_one_knob_that_matters_is_the_most_important_beyond_its_interval(
    searched: SearchState,
) -> None:
    table = make_importances(searched)
    assert table["knob"][0] == "max_lr" and table["importance"].sum() == pytest.approx(1.0)
    assert table["low"][0] > table["high"][1:].median() and (table["low"] <= table["high"]).all()
    pd.testing.assert_frame_equal(table, make_importances(searched))
    assert set(table["knob"]) == set(searched.header.distributions)


def test_too_few_or_equal_trials_have_no_importances(tmp_path: Path) -> None:
    few = make_importances(simulate_search(tmp_path / "few", 9))
    equal = make_importances(simulate_search(tmp_path / "equal", 12, lambda trial, stage: 0.5))
    for table in (few, equal):
        assert len(table) == 5 and table[["importance", "low", "high"]].isna().all(axis=None)


def test_schedules_rise_to_max_lr_and_fall_step_by_step(searched: SearchState) -> None:
    config = searched.trials[0].full_config
    table = make_schedules({"baseline": config})
    assert len(table) == config.epochs * config.num_steps_per_epoch
    assert table["lr"].max() == pytest.approx(config.max_lr)
    assert table["epoch"].iloc[-1] == pytest.approx(config.epochs - 1 / config.num_steps_per_epoch)
    peak = table["lr"].idxmax()
    assert table["momentum"][peak] == table["momentum"].min() == config.base_momentum
    assert list(table["step"]) == list(range(1, len(table) + 1))


def test_costs_add_up_to_everything_that_was_trained(searched: SearchState) -> None:
    costs = make_costs([searched])
    num_epochs = sum(trial.epochs_done for trial in searched.trials.values())
    assert costs["epochs"].sum() == num_epochs
    assert costs["seconds"].sum() == pytest.approx(2.0 * num_epochs)
    ones = costs[costs["stage"] == 1].set_index("status")
    assert ones.loc["stopped", "trials"] == searched.counts["stopped"]


def draw_all(state: SearchState) -> dict[str, Figure]:
    slices, best = make_slices(state), state.best
    assert best is not None
    configs = {"baseline": state.trials[0].full_config, "best": best.full_config}
    return {
        "history": figures.draw_history(make_history(state), state.baseline_score, "x"),
        "curves": figures.draw_curves(make_curves(state), "x"),
        "asha": figures.draw_asha(make_rung_scores(state), make_rungs(state), "x"),
        "slices": figures.draw_slices(slices, "x"),
        "pair": figures.draw_pair(slices, ("max_lr", "dropout"), "x"),
        "parallel": figures.draw_parallel(slices, "x"),
        "importances": figures.draw_importances(make_importances(state, num_resamples=10), "x"),
        "schedules": figures.draw_schedules(make_schedules(configs), "x"),
        "costs": figures.draw_costs(make_costs([state]), "x"),
    }


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> SearchState:
    """40 trials of s8, whose baseline and some trials have a constant schedule."""
    return simulate_search(tmp_path_factory.mktemp("runs"), 40, name="s8")


ONECYCLE = ["pct_start", "div_factor", "final_div_factor"]


def test_inactive_knobs_are_empty_in_the_tables(conditional: SearchState) -> None:
    slices = make_slices(conditional)
    knobs = list(conditional.header.distributions)
    assert list(slices["knob"].unique()) == knobs and len(slices) == 40 * len(knobs)
    constant = [n for n, t in conditional.trials.items() if t.full_config.schedule == "constant"]
    assert 3 < len(constant) < 37
    is_idle = slices["trial"].isin(constant) & slices["knob"].isin(ONECYCLE)
    assert slices["value"].isna().equals(is_idle)
    table = make_knobs(conditional).set_index("knob")
    assert table.loc[ONECYCLE, "baseline"].isna().all() and table.loc["max_lr", "baseline"] == 0.01
    best = conditional.best
    assert best is not None
    assert table["best"].isna().any() == (best.config.schedule == "constant")


def test_a_knob_counts_for_importances_where_it_is_active(tmp_path: Path) -> None:
    """OneCycle is no better by itself: under it everything depends on pct_start."""

    def score(trial: TrialState, stage: int) -> float:
        config = trial.full_config
        return 0.5 if config.schedule == "constant" else 0.3 + config.pct_start

    state = simulate_search(tmp_path, 60, score, name="s8")
    table = make_importances(state, num_resamples=10).set_index("knob")
    assert set(table.index) == set(state.header.distributions)
    assert not table.isna().any(axis=None)
    assert table["importance"].drop("schedule").idxmax() == "pct_start"


def test_a_knob_that_one_trial_has_active_is_not_important(tmp_path: Path) -> None:
    state = simulate_search(tmp_path, 20, name="s8")
    first = next(n for n, t in state.trials.items() if t.full_config.schedule == "onecycle")
    for number, trial in state.trials.items():
        if number != first:
            trial.full_config = trial.full_config.model_copy(update={"schedule": "constant"})
            trial.params = {**trial.params, "schedule": "constant"}
    table = make_importances(state, num_resamples=20).set_index("knob")
    assert table.loc[ONECYCLE, "importance"].sum() < 0.05 < table.loc["max_lr", "importance"]


def test_a_search_recorded_with_inactive_knobs_has_the_same_tables(tmp_path: Path) -> None:
    state = simulate_search(tmp_path, 20, name="s8")
    slices, importances = make_slices(state), make_importances(state, num_resamples=5)
    for trial in state.trials.values():
        trial.params = {
            knob: getattr(trial.full_config, knob) for knob in state.header.distributions
        }
    pd.testing.assert_frame_equal(slices, make_slices(state))
    pd.testing.assert_frame_equal(importances, make_importances(state, num_resamples=5))


@pytest.mark.slow
def test_figures_have_no_dot_and_a_place_of_their_own_for_inactive_knobs(
    conditional: SearchState, tmp_path: Path
) -> None:
    drawn = draw_all(conditional)
    slices = make_slices(conditional)
    knobs = list(conditional.header.distributions)
    for axes, knob in zip(drawn["slices"].axes, knobs, strict=False):
        assert axes.get_xlabel() == label_knob(knob)
        number = slices[slices["knob"] == knob]["value"].notna().sum()
        assert len(axes.collections[0].get_offsets()) == number
    below = [text.xy for text in drawn["parallel"].axes[0].texts if text.get_text() == "inactive"]
    assert below == [(knobs.index(knob), figures.BELOW) for knob in ONECYCLE]
    lines = [
        line.get_ydata() for line in drawn["parallel"].axes[0].lines if len(line.get_xdata()) > 2
    ]
    places = np.array(lines)[:, [knobs.index(knob) for knob in ONECYCLE]]
    num_idle = slices[slices["knob"] == "pct_start"]["value"].isna().sum()
    assert (places == figures.BELOW).all(axis=1).sum() == num_idle
    assert ((places == figures.BELOW).sum(axis=1) % 3 == 0).all() and not np.isnan(places).any()
    for name, figure in drawn.items():
        save(figure, tmp_path / f"{name}.png")


@pytest.mark.slow
def test_figures_of_a_knob_that_no_trial_had_active_can_be_drawn(tmp_path: Path) -> None:
    state = simulate_search(tmp_path, 1, name="s8")
    slices = make_slices(state)
    for figure in (figures.draw_slices(slices, "x"), figures.draw_parallel(slices, "x")):
        save(figure, tmp_path / "x.png")
    assert "inactive" in make_parallel_html(slices)


@pytest.mark.slow
def test_every_figure_shows_its_table_and_can_be_saved_as_svg(
    searched: SearchState, tmp_path: Path
) -> None:
    drawn = draw_all(searched)
    history = make_history(searched)
    best, baseline = drawn["history"].axes[0].lines[0], drawn["history"].axes[0].lines[2]
    assert list(best.get_ydata()) == pytest.approx(list(100 * history["best"].dropna()))
    assert baseline.get_ydata()[0] == pytest.approx(100 * (searched.baseline_score or 0))
    titles = [axes.get_title() for axes in drawn["curves"].axes]
    assert titles == ["stage of 1 epoch", "stage of 3 epochs"]
    lines = drawn["curves"].axes[1].lines
    assert len(lines) == searched.counts["complete"]
    colours = {to_hex(line.get_color()).upper() for line in lines}
    assert colours == {STATUS_COLOURS["complete"].upper()}
    dots = [line for line in drawn["asha"].axes[0].lines if line.get_marker() == "o"]
    assert sum(len(line.get_xdata()) for line in dots) == len(make_rung_scores(searched))
    panels = drawn["slices"].axes
    labels = [axes.get_xlabel() for axes in panels if axes.get_xlabel()]
    assert labels == [label_knob(knob) for knob in searched.header.distributions]
    assert [axes.get_xscale() for axes in panels[:2]] == ["log", "linear"]
    rows = [line for line in drawn["parallel"].axes[0].lines if len(line.get_xdata()) == 6]
    assert len(rows) == 30 and all(np.nanmax(line.get_ydata()) <= 1 for line in rows)
    widths = [bar.get_width() for bar in drawn["importances"].axes[0].patches]
    importances = make_importances(searched, num_resamples=10)["importance"]
    assert widths == pytest.approx(list(importances)[::-1])
    assert drawn["schedules"].axes[0].get_yscale() == "log"
    costs = make_costs([searched])
    bars = sum(bar.get_width() for bar in drawn["costs"].axes[0].patches)
    assert bars == pytest.approx(costs["epochs"].sum())
    for name, figure in drawn.items():
        save(figure, tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
        assert not plt.fignum_exists(figure.number)


def test_choices_are_named_on_their_axis_and_keep_off_the_panels_edges() -> None:
    names = ["step", "cosine", "onecycle"]
    rows: list[Any] = [("schedule", names[i], i, "sampler", 0.2 + i / 10) for i in range(3)]
    rows += [("dropout", 0.1 * i, i, "sampler", 0.2 + i / 10) for i in range(3)]
    slices = pd.DataFrame(rows, columns=["knob", "value", "trial", "origin", "rung_score"])
    slices = slices.astype({"value": "object"})
    parallel, sliced = figures.draw_parallel(slices, "x"), figures.draw_slices(slices, "x")
    places = {text.get_text(): text.xy for text in parallel.axes[0].texts}
    places = {text: place for text, place in places.items() if text in names}
    assert places == {"cosine": (0, 0.0), "onecycle": (0, 0.5), "step": (0, 1.0)}
    low, high = sliced.axes[0].get_xlim()
    assert low < -0.4 and high > 2.4
    plt.close("all")


@pytest.mark.slow
def test_figures_of_a_search_with_a_single_trial_can_be_drawn(tmp_path: Path) -> None:
    state = simulate_search(tmp_path, 1)
    for name, figure in draw_all(state).items():
        save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_a_knob_with_a_value_of_zero_stands_on_a_linear_scale() -> None:
    """A weight decay of 0, which has no logarithm."""
    rows = [
        (knob, value, number, "complete", "sampler", 0.5 + 0.01 * number, 0.6)
        for knob in ("weight_decay", "max_lr")
        for number, value in enumerate((0.0, 1e-3) if knob == "weight_decay" else (0.1, 0.2))
    ]
    columns = ["knob", "value", "trial", "status", "origin", "rung_score", "score"]
    slices = pd.DataFrame(rows, columns=columns).astype({"value": "object"})
    sliced = figures.draw_slices(slices, "x")
    assert [axes.get_xscale() for axes in sliced.axes[:2]] == ["linear", "log"]
    pair = figures.draw_pair(slices, ("weight_decay", "max_lr"), "x")
    assert pair.axes[0].get_xlabel().startswith("weight decay")
    assert pair.axes[0].get_ylabel().startswith("log10 of ")
    figures.draw_parallel(slices, "x")
    assert "weight decay" in make_parallel_html(slices)
