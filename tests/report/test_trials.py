"""Tables of trials and epochs, from records that Record itself writes here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.builders import (
    CONFIG,
    SHAPES_INFO,
    STAGE_ACCS,
    TRIALS,
    make_header,
    make_result,
    make_staged_trial,
    make_start,
    make_trial,
    write_search,
)
from tune_cifar.record.events import EpochReported
from tune_cifar.record.journal import Record
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import load_searches
from tune_cifar.report.trials import best_so_far, load_curves, load_trials, split_groups
from tune_cifar.schema import KNOBS, DataInfo, EpochResult, TrainConfig, inactive_knobs


@pytest.fixture
def state(tmp_path: Path) -> SearchState:
    """An unfinished search with seven trials in every state."""
    return write_search(tmp_path, "s7-1", 1, TRIALS)


def test_load_trials_has_one_row_per_trial_in_the_order_of_the_starts(state: SearchState) -> None:
    trials = load_trials([state])
    assert list(trials["trial"]) == [0, 2, 1, 3, 4, 5, 6]
    assert list(trials["run_id"]) == [f"s7-1:{number}" for number in trials["trial"]]
    statuses = "complete stopped complete diverged failed complete running"
    assert list(trials["status"]) == statuses.split()
    assert list(trials["epochs_done"]) == [3, 1, 3, 0, 2, 3, 1]
    assert list(trials["train_seconds"]) == [6.0, 2.0, 6.0, 0.0, 4.0, 6.0, 2.0]
    assert list(trials["origin"]) == ["baseline"] + ["sampler"] * 6
    assert list(trials["val_acc"].fillna(-1)) == [0.7, 0.2, 0.8, -1, 0.9, 0.8, 0.35]
    assert list(trials["score"].fillna(-1)) == [0.7, -1, 0.8, 0.1, -1, 0.8, -1]
    assert list(trials["ended_seq"].fillna(-1)) == [6, 9, 14, 16, 20, 25, -1]
    assert list(trials["reason"].iloc[:2]) == ["it complete", "it stopped"]


def test_load_trials_says_where_each_row_comes_from(state: SearchState, tmp_path: Path) -> None:
    other = write_search(
        tmp_path, "t", 2, [make_start(0)], kind="train", tier=None, space="s10", data=SHAPES_INFO
    )
    trials = load_trials([state, other])
    row = trials.iloc[-1]
    assert list(row[["search", "kind", "space", "data"]]) == ["t", "train", "s10", "shapes"]
    assert list(row[["data_digest", "split_hash"]]) == ["d0", "h0"]
    assert row["fingerprint"] == CONFIG.fingerprint
    assert row["tier"] is pd.NA
    assert list(trials["search"].unique()) == ["s7-1", "t"]


def test_load_trials_gives_every_active_knob_back_exactly(tmp_path: Path) -> None:
    knobs = {"max_lr": 0.1 + 0.2, "milestone_fractions": (0.25, 0.5), "nesterov": True}
    config = CONFIG.model_copy(update=knobs)
    trials = load_trials([write_search(tmp_path, "s7-1", 1, [make_start(0, config)])])
    row = trials.iloc[0].to_dict()
    assert list(trials.columns[-len(KNOBS) :]) == list(KNOBS)
    expected = dict(config) | {"warm_restarts": "()"}
    inactive = inactive_knobs(config)
    active = [knob for knob in KNOBS if knob not in inactive]
    assert {knob: row[knob] for knob in active} == {knob: expected[knob] for knob in active}
    assert {knob for knob in KNOBS if pd.isna(row[knob])} == set(inactive)


def test_arguments_of_an_own_network_are_columns_of_their_own(tmp_path: Path) -> None:
    own = {"model": "net.py:Net", "model_args": {"width": 8, "deep": True}}
    config = TrainConfig(**{**CONFIG.model_dump(), **own})
    states = [
        write_search(tmp_path, "own", 1, [make_start(0, config)]),
        write_search(tmp_path, "s7-1", 2, [make_start(0, CONFIG)]),
    ]
    trials = load_trials(states).set_index("search")
    assert list(trials.columns[-2:]) == ["model_args.deep", "model_args.width"]
    assert trials.loc["own", "model_args.width"] == 8
    assert pd.isna(trials.loc["s7-1", "model_args.width"])


@pytest.mark.parametrize("schedule", ["constant", "step", "onecycle"])
def test_load_trials_leaves_out_every_kind_of_inactive_knob(tmp_path: Path, schedule: str) -> None:
    off = {"cutout_p": 0.0, "cutout_size": 0, "shift_scale_rotate_p": 0.0, "shift_limit": 0.0}
    config = TrainConfig(**{**dict(CONFIG), **off, "schedule": schedule, "optimizer": "adamw"})
    trials = load_trials([write_search(tmp_path, "s7-1", 1, [make_start(0, config)])])
    missing = {knob for knob in KNOBS if pd.isna(trials[knob][0])}
    assert missing == set(inactive_knobs(config))


def expected_dtype(annotation: Any) -> str:
    """The dtype of a column for a field of this type."""
    dtypes = {int: "int64", float: "float64", float | None: "float64", bool: "boolean"}
    return dtypes.get(annotation, "string")


@pytest.mark.parametrize("has_rows", [True, False])
def test_columns_have_the_dtypes_of_their_fields(state: SearchState, has_rows: bool) -> None:
    states = [state] if has_rows else []
    trials, curves = load_trials(states), load_curves(states)
    for knob in KNOBS:
        field = TrainConfig.model_fields[knob]
        expected = "Int64" if knob == "cutout_size" else expected_dtype(field.annotation)
        assert str(trials[knob].dtype) == expected, knob
    for name, field in EpochResult.model_fields.items():
        assert str(curves[name].dtype) == expected_dtype(field.annotation), name
    names_by_dtype = {
        "int64": ("trial", "epochs_done", "train_size", "epochs", "batch_size"),
        "Int64": ("ended_seq",),
        "float64": ("val_acc", "score", "train_seconds", "max_lr"),
        "boolean": ("nesterov",),
        "string": ("search", "tier", "status", "run_id", "fingerprint", "model"),
    }
    for dtype, names in names_by_dtype.items():
        assert {str(trials[name].dtype) for name in names} == {dtype}
    assert str(trials["milestone_fractions"].dtype) == "string"


def test_load_curves_has_one_row_per_epoch_with_exact_figures(state: SearchState) -> None:
    curves = load_curves([state])
    assert len(curves) == sum(trial.epochs_done for trial in state.trials.values())
    figures = curves[curves["trial"] == 1].drop(columns=["search", "trial", "run_id", "stage"])
    rows = figures.to_dict(orient="records")
    assert rows == [result.model_dump() for result in state.trials[1].epochs]
    assert set(curves["search"]) == {"s7-1"}
    assert list(curves["run_id"].unique()) == [f"s7-1:{number}" for number in (0, 2, 1, 4, 5, 6)]


def test_epochs_of_a_trial_with_stages_have_the_length_of_their_stage(tmp_path: Path) -> None:
    events = [
        *make_staged_trial(0, STAGE_ACCS, "complete"),
        *make_staged_trial(1, {1: [0.4]}, "diverged", cycle=2),
    ]
    events += make_trial(2, [0.3, 0.5, 0.6], "complete")
    budget = {"trials": 3, "rungs": [1, 2, 3], "fidelity": "cycles"}
    state = write_search(tmp_path, "s7-1", 1, events, budget=budget)
    curves = load_curves([state])
    columns = curves[["trial", "stage", "epoch", "val_acc"]]
    found = [tuple(row) for row in columns.itertuples(index=False)]
    complete = [(0, 1, 1, 0.5), (0, 2, 1, 0.2), (0, 2, 2, 0.6)]
    complete += [(0, 3, 1, 0.1), (0, 3, 2, 0.3), (0, 3, 3, 0.7)]
    assert found == [*complete, (1, 1, 1, 0.4), (2, 3, 1, 0.3), (2, 3, 2, 0.5), (2, 3, 3, 0.6)]
    trials = load_trials([state])
    assert list(trials["epochs_done"]) == [6, 1, 3]
    assert list(trials["train_seconds"]) == [12.0, 2.0, 6.0]
    assert list(trials["epochs"]) == [3, 3, 3], "of the longest stage: they compete in one group"
    assert list(trials["fingerprint"])[:2] == [CONFIG.fingerprint, CONFIG.shorten(2).fingerprint]
    assert list(trials["val_acc"]) == [0.7, 0.4, 0.6]
    ((group, rows),) = split_groups(trials)
    assert (group["fidelity"], len(rows)) == ("cycles", 3)


def test_an_epoch_without_validation_is_nan_in_the_curves(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"train_size": 50_000, "val_size": 0})
    state = write_search(tmp_path, "t", 1, make_trial(0, [None, None, None], "complete", config))
    assert load_curves([state])[["val_loss", "val_acc"]].isna().all(axis=None)
    assert load_trials([state])[["val_acc", "score"]].isna().all(axis=None)


def test_complete_trials_lead_their_group_by_score_and_equals_keep_the_lower_number_first(
    state: SearchState,
) -> None:
    ((group, rows),) = split_groups(load_trials([state]))
    assert list(rows["trial"]) == [1, 5, 0, 4, 6, 2, 3]
    assert list(rows.index) == list(range(7))
    assert group == {
        "data": "cifar10",
        "data_digest": "d1",
        "split_hash": "h1",
        "train_size": 500,
        "val_size": 100,
        "epochs": 3,
        "fidelity": "epochs",
    }
    assert "competes" not in rows.columns


def test_trials_of_different_data_split_length_or_size_are_in_separate_groups(
    tmp_path: Path,
) -> None:
    def write(name: str, data: DataInfo | None = None, **knobs: Any) -> SearchState:
        config = CONFIG.model_copy(update=knobs)
        accs: list[float | None] = [0.5] * config.epochs
        header = {} if data is None else {"data": data}
        return write_search(tmp_path, name, 1, make_trial(0, accs, "complete", config), **header)

    states = [
        write("synthetic", SHAPES_INFO, epochs=9),
        write("plain"),
        write("again"),
        write("long", epochs=5),
        write("small", train_size=400),
        write("less-val", val_size=50),
        write("split", DataInfo(name="cifar10", digest="d1", split_hash="h2")),
        write("digest", DataInfo(name="cifar10", digest="d2", split_hash="h1")),
    ]
    groups = split_groups(load_trials(states))
    found = [" ".join(sorted(rows["search"])) for _, rows in groups]
    assert found == ["long", "again plain", "digest", "split", "less-val", "small", "synthetic"]
    assert [group["data"] for group, _ in groups] == ["cifar10"] * 6 + ["shapes"]


def test_no_trials_make_no_groups_and_no_best_so_far() -> None:
    trials = load_trials([])
    assert split_groups(trials) == []
    assert len(best_so_far(trials)) == 0


def test_best_so_far_follows_the_order_of_the_ends(tmp_path: Path) -> None:
    first = make_trial(0, [0.3, 0.5, 0.7], "complete")
    second = make_trial(1, [0.4, 0.6, 0.8], "complete")
    diverged = make_trial(2, [], "diverged")
    overtaken = [diverged[0], first[0], *second, *first[1:], diverged[1]]
    overtaken += [*make_trial(3, [0.4, 0.6, 0.8], "complete"), make_start(4)]
    overtaken += [*make_trial(5, [0.4, 0.6, 0.9], "complete")]
    course = best_so_far(load_trials([write_search(tmp_path, "s7-1", 1, overtaken)]))
    assert list(course["trial"]) == [1, 0, 2, 3, 5]
    assert list(course["order"]) == [1, 2, 3, 4, 5]
    assert list(course["epochs_spent"]) == [3, 6, 6, 9, 12]
    assert list(course["score"].fillna(-1)) == [0.8, 0.7, -1, 0.8, 0.9]
    assert list(course["best"]) == [0.8, 0.8, 0.8, 0.8, 0.9]
    assert list(course["is_best"]) == [True, False, False, False, True]


def test_best_so_far_is_absent_before_the_first_complete_trial_and_apart_for_each_search(
    tmp_path: Path,
) -> None:
    events = [*make_trial(0, [0.9], "stopped"), *make_trial(1, [0, 0, 0.5], "complete")]
    late = write_search(tmp_path, "b", 2, events)
    early = write_search(tmp_path, "a", 1, make_trial(0, [0, 0, 0.4], "complete"))
    course = best_so_far(load_trials([late, early]))
    assert list(course["run_id"]) == ["b:0", "b:1", "a:0"]
    assert list(course["best"].fillna(-1)) == [-1, 0.5, 0.4]
    assert list(course["is_best"]) == [False, True, True]
    assert list(course["order"]) == [1, 2, 1]
    dtypes = "string int64 string string int64 int64 float64 float64 boolean"
    assert [str(dtype) for dtype in course.dtypes] == dtypes.split()


def test_a_running_search_is_read_as_far_as_it_got(tmp_path: Path) -> None:
    header = make_header("s7-1")
    with Record.create(tmp_path / "searches" / "s7-1", header) as record:
        record.append(make_start(0))
        record.append(EpochReported(trial=0, result=make_result(1, 0.5)))
        assert list(load_trials(load_searches(tmp_path))["epochs_done"]) == [1]
        record.append(EpochReported(trial=0, result=make_result(2, 0.6)))
        assert list(load_trials(load_searches(tmp_path))["val_acc"]) == [0.6]


def test_the_tables_of_two_thousand_trials_are_there_at_once(state: SearchState) -> None:
    start = time.process_time()
    trials = load_trials([state] * 300)
    split_groups(trials)
    assert len(trials) == 2100
    assert time.process_time() - start < 1.0
