"""Tables and figures of several searches and of their sources."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from tests.builders import (
    evaluate_answers,
    make_header,
    make_resume,
    make_start,
    make_trial,
    score_by_lr,
    simulate_search,
    write_record,
)
from tune_cifar.errors import SpaceError
from tune_cifar.record.events import SearchEnded
from tune_cifar.record.state import SearchState
from tune_cifar.report.plots.compare import draw_best_so_far, draw_standing
from tune_cifar.report.plots.search import draw_fit
from tune_cifar.report.tables import (
    list_distributions,
    make_comparison,
    make_confusions,
    make_curves,
    make_facts,
    make_histories,
    make_history,
    make_knobs,
    make_mistakes,
    make_sources,
)
from tune_cifar.search.goals import estimate_scatter
from tune_cifar.space.select import describe_distribution, load_space


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> SearchState:
    return simulate_search(tmp_path_factory.mktemp("runs"), 12)


@pytest.fixture(scope="module")
def states(searched: SearchState, tmp_path_factory: pytest.TempPathFactory) -> list[SearchState]:
    """Two searches whose trials compare, the better one last, and a longer one between them."""
    folder = tmp_path_factory.mktemp("runs")
    better = simulate_search(folder, 8, lambda trial, stage: score_by_lr(trial, stage) + 0.1)
    better.header = better.header.model_copy(update={"name": "y"})
    header = make_header("z", space_text=searched.header.space_text, space="smoke")
    trials = [*make_trial(0, [0.3, 0.5, 0.7], "complete"), *make_trial(1, [0.2], "stopped")]
    longer = write_record(tmp_path_factory.mktemp("runs"), header, trials)
    return [searched, longer, better]


def test_facts_say_what_was_done_in_words(searched: SearchState) -> None:
    facts = make_facts(searched).set_index("fact")["value"]
    assert facts["space"] == "smoke (cpu)" and facts["data"] == "cifar10"
    assert facts["rungs"] == "1, 3 epochs, fidelity cycles" and facts["trials"].startswith("12: ")
    assert facts["ended"].startswith("all trials, after ") and facts["command"] == "test"


def test_facts_of_an_unfinished_single_training_have_no_end(tmp_path: Path) -> None:
    header = make_header("t", kind="train", distributions={}, budget={})
    state = write_record(tmp_path, header, make_trial(0, [0.3], None))
    facts = make_facts(state).set_index("fact")["value"]
    assert (facts["ended"], facts["sampler"]) == ("not ended", "none, seed 1")
    assert facts["epochs trained"] == "1"


def test_the_length_of_a_resumed_search_is_called_that_of_its_last_launch(tmp_path: Path) -> None:
    ended = SearchEnded(reason="interrupted", wall_seconds=90)
    state = write_record(tmp_path, make_header(), [make_start(0), ended])
    state.apply(make_resume())
    state.apply(ended)
    facts = make_facts(state).set_index("fact")["value"]
    assert facts["ended"] == "interrupted, after 1.5 minutes of its last launch"


def test_knobs_stand_with_range_baseline_and_best(searched: SearchState) -> None:
    table = make_knobs(searched)
    best = searched.best
    assert best is not None and list(table["knob"]) == list(searched.header.distributions)
    distributions = list_distributions(searched.header)
    for row in table.to_dict("records"):
        knob = row["knob"]
        assert row["baseline"] == searched.header.baseline[knob]
        assert row["best"] == best.params[knob]
        assert row["searched"] == describe_distribution(distributions[knob])


def test_histories_follow_one_another(states: list[SearchState]) -> None:
    table = make_histories(states)
    assert list(table["search"].unique()) == ["x", "z", "y"]
    pd.testing.assert_frame_equal(table.head(12), make_history(states[0]))


def test_searches_that_compare_stand_together_the_better_one_first(
    states: list[SearchState],
) -> None:
    table = make_comparison(states)
    assert list(table["search"]) == ["y", "x", "z"]
    groups = table.set_index("search")["group"]
    assert groups["x"] == groups["y"] != groups["z"]
    assert groups["z"] == "3 epochs of 500 images, 100 to validate, fidelity epochs"
    row = table.set_index("search").loc["x"]
    best, baseline = states[0].best, states[0].baseline_score
    assert best is not None and best.score is not None and baseline is not None
    assert (row["best"], row["baseline"]) == (best.score, baseline)
    assert row["gain"] == best.score - baseline
    assert row["scatter"] == pytest.approx(estimate_scatter(best.score, best.config.val_size))
    assert (row["trials"], row["complete"]) == (12, states[0].counts["complete"])
    published = load_space("smoke", "cpu").header.published
    assert (row["published"], row["measured"]) == (published.accuracy, published.measured)


def test_groups_that_differ_in_data_or_split_alone_are_told_apart(
    searched: SearchState, tmp_path: Path
) -> None:
    found = []
    texts = {"space_text": searched.header.space_text, "space": "smoke"}
    for name, digest, split in (
        ("a", "abcdefgh", "01234567"),
        ("b", "abcdefgh", "76543210"),
        ("c", "hgfedcba", "01234567"),
    ):
        data = make_header().data.model_copy(update={"digest": digest, "split_hash": split})
        header = make_header(name, data=data, **texts)
        found.append(write_record(tmp_path, header, make_trial(0, [0.3, 0.5, 0.7], "complete")))
    groups = make_comparison(found).set_index("search")["group"]
    same = "3 epochs of 500 images, 100 to validate, fidelity epochs"
    assert groups.to_dict() == {
        "a": f"{same}, data abcdef, split 012345",
        "b": f"{same}, data abcdef, split 765432",
        "c": f"{same}, data hgfedc, split 012345",
    }
    assert list(make_comparison(found[:1])["group"]) == [same]


def test_a_search_on_synthetic_data_says_so_and_one_without_a_complete_trial_has_no_gain(
    searched: SearchState, tmp_path: Path
) -> None:
    data = make_header().data.model_copy(update={"name": "shapes"})
    header = make_header("s", data=data, space_text=searched.header.space_text, space="smoke")
    events = [*make_trial(0, [0.3], "stopped"), SearchEnded(reason="x", wall_seconds=1)]
    state = write_record(tmp_path, header, events)
    (row,) = make_comparison([state]).to_dict("records")
    assert row["group"].startswith("NOT CIFAR-10 (shapes), 3 epochs of 500 images")
    assert all(math.isnan(row[name]) for name in ("baseline", "best", "gain", "scatter"))


def test_the_scatter_of_a_difference_is_root_two_of_one_accuracys() -> None:
    assert estimate_scatter(0.5, 1000) == pytest.approx(math.sqrt(2) * math.sqrt(0.25 / 1000))


def test_sources_stand_beside_the_means_of_their_tested_trainings() -> None:
    rows = [("s8", "baseline", 0.80), ("s8", "baseline", 0.82), ("s8", "best", 0.9)]
    rows.append(("s7", "baseline", 0.5))
    tested = pd.DataFrame(rows, columns=["space", "part", "test_acc"])
    table = make_sources(["s7", "s8", "s10"], tested).set_index("space")
    assert list(table.index) == ["s7", "s8", "s10"]
    assert table.loc["s8", "baseline_test"] == pytest.approx(0.81)
    assert table.loc["s8", "best_test"] == pytest.approx(0.9)
    assert math.isnan(table.loc["s7", "best_test"])
    assert list(table["baseline_seeds"]) == [1, 2, 0] and table.loc["s10", "published"] == 0.9307
    assert "black" in table.loc["s7", "corrects"] and "by mistake" in table.loc["s7", "measured"]
    with pytest.raises(SpaceError):
        make_sources(["s77"], tested)


def test_confusions_come_by_their_frequency_and_mistakes_by_their_confidence() -> None:
    predicted, labels = [0, 2, 2, 5, 5, 1], [0, 0, 0, 3, 5, 1]
    evaluation = evaluate_answers(predicted, labels, [0.9, 0.6, 0.7, 0.8, 0.9, 0.9])
    pairs = [tuple(row) for row in make_confusions(evaluation).itertuples(index=False)]
    assert pairs == [("airplane", "bird", 2, pytest.approx(2 / 3)), ("cat", "dog", 1, 1.0)]
    mistakes = make_mistakes(evaluation)
    assert list(mistakes["image"]) == [3, 2, 1]
    assert list(mistakes["taken_for"]) == ["dog", "bird", "bird"]
    assert list(mistakes["confidence"]) == pytest.approx([0.8, 0.7, 0.6], abs=1e-6)


def test_perfect_answers_have_no_confusion_and_no_mistake() -> None:
    evaluation = evaluate_answers([0, 1], [0, 1])
    assert make_confusions(evaluation).empty and make_mistakes(evaluation).empty


def list_texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_the_figure_of_several_searches_has_a_line_for_each(states: list[SearchState]) -> None:
    figure = draw_best_so_far(make_histories(states), "title")
    names = [text.split(",")[0] for text in list_texts(figure)]
    assert names == ["x", "z", "y", "a complete trial"]
    by_epochs = figure.axes[0]
    best = make_history(states[0])["best"].dropna()
    assert list(by_epochs.lines[0].get_ydata()) == pytest.approx(list(100 * best))
    plt.close(figure)


def test_the_standing_has_a_panel_for_each_group_and_calls_the_published_figure_incomparable(
    states: list[SearchState],
) -> None:
    comparison = make_comparison(states)
    figure = draw_standing(comparison, "title")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == list(comparison["group"].unique())
    places = sum(len(axes.lines[1].get_xdata()) for axes in figure.axes)
    assert places == 3 and "published: not comparable" in list_texts(figure)
    plt.close(figure)


def test_the_fit_has_a_piece_for_each_stage_of_the_trial(searched: SearchState) -> None:
    curves, best = make_curves(searched), searched.best
    assert best is not None
    rows = curves[curves["trial"] == best.number]
    figure = draw_fit(rows, "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "3"]
    solid = [line for line in figure.axes[1].lines if line.get_linestyle() == "-"]
    drawn = [value for line in solid for value in line.get_ydata() if value not in (0, 1)]
    assert drawn == pytest.approx(list(100 * rows["val_acc"]))
    plt.close(figure)
