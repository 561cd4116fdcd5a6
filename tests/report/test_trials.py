"""Tables from records, and which trial a run id or `--best` means. The records here are written by Record itself."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.builders import (
    CONFIG,
    COURSES,
    FINISH,
    INTERRUPT,
    OUT_OF_MEMORY,
    SHAPES_INFO,
    TRACEBACK_MESSAGE,
    TRIALS,
    make_cycles,
    make_failed,
    make_header,
    make_result,
    make_start,
    make_trial,
    write_failures,
    write_search,
)
from tune_cifar.errors import RecordError
from tune_cifar.record.events import EpochReported, Event, TrialRetried
from tune_cifar.record.failures import Failure, group_failures, parse_failure
from tune_cifar.record.journal import Record, check_name
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import find_best, find_run, list_rows, load_searches, measure_folder
from tune_cifar.report.trials import best_so_far, load_curves, load_trials, split_groups
from tune_cifar.schema import KNOBS, DataInfo, EpochResult, TrainConfig


@pytest.fixture
def state(tmp_path: Path) -> SearchState:
    """An unfinished search with seven trials in every state."""
    return write_search(tmp_path, "s7-1", 1, TRIALS)


def test_load_trials_has_one_row_per_trial_in_the_order_of_the_starts(state: SearchState) -> None:
    trials = load_trials([state])
    assert list(trials["trial"]) == [0, 2, 1, 3, 4, 5, 6]
    assert list(trials["run_id"]) == [f"s7-1:{number}" for number in trials["trial"]]
    assert list(trials["status"]) == [
        "complete",
        "stopped",
        "complete",
        "diverged",
        "failed",
        "complete",
        "running",
    ]
    assert list(trials["epochs_done"]) == [3, 1, 3, 0, 2, 3, 1]
    assert list(trials["train_seconds"]) == [6.0, 2.0, 6.0, 0.0, 4.0, 6.0, 2.0]
    assert list(trials["origin"]) == ["baseline"] + ["sampler"] * 6
    assert list(trials["val_acc"].fillna(-1)) == [0.7, 0.2, 0.8, -1, 0.9, 0.8, 0.35]
    assert list(trials["score"].fillna(-1)) == [0.7, -1, 0.8, 0.1, -1, 0.8, -1]
    assert list(trials["ended_seq"].fillna(-1)) == [6, 9, 14, 16, 20, 25, -1]
    assert list(trials["reason"].iloc[:2]) == ["it complete", "it stopped"]


def test_load_trials_tells_where_each_row_comes_from(state: SearchState, tmp_path: Path) -> None:
    other = write_search(
        tmp_path, "t", 2, [make_start(0)], kind="train", tier=None, space="s10", data=SHAPES_INFO
    )
    trials = load_trials([state, other])
    row = trials.iloc[-1]
    assert (row["search"], row["kind"], row["space"], row["data"]) == (
        "t",
        "train",
        "s10",
        "shapes",
    )
    assert (row["data_digest"], row["split_hash"], row["fingerprint"]) == (
        "d0",
        "h0",
        CONFIG.fingerprint,
    )
    assert row["tier"] is pd.NA
    assert list(trials["search"].unique()) == ["s7-1", "t"]


def test_load_trials_gives_every_knob_back_exactly(tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={"max_lr": 0.1 + 0.2, "milestone_fractions": (0.25, 0.5), "nesterov": True}
    )
    trials = load_trials([write_search(tmp_path, "s7-1", 1, [make_start(0, config)])])
    row = trials.iloc[0].to_dict()
    assert list(trials.columns[-len(KNOBS) :]) == list(KNOBS)
    expected = dict(config) | {"milestone_fractions": "(0.25, 0.5)", "warm_restarts": "()"}
    assert {knob: row[knob] for knob in KNOBS} == expected


def expected_dtype(annotation: Any) -> str:
    """What a column of a schema's field must hold."""
    return {int: "int64", float: "float64", float | None: "float64", bool: "boolean"}.get(
        annotation, "string"
    )


@pytest.mark.parametrize("has_rows", [True, False])
def test_columns_have_the_dtypes_of_their_fields(state: SearchState, has_rows: bool) -> None:
    states = [state] if has_rows else []
    trials, curves = load_trials(states), load_curves(states)
    for knob, field in TrainConfig.model_fields.items():
        assert str(trials[knob].dtype) == expected_dtype(field.annotation), knob
    for name, field in EpochResult.model_fields.items():
        assert str(curves[name].dtype) == expected_dtype(field.annotation), name
    dtypes = {name: str(dtype) for name, dtype in trials.dtypes.items()}
    assert {
        dtypes[name] for name in ("trial", "epochs_done", "train_size", "epochs", "batch_size")
    } == {"int64"}
    assert {dtypes[name] for name in ("val_acc", "score", "train_seconds", "max_lr")} == {"float64"}
    assert {
        dtypes[name] for name in ("search", "tier", "status", "run_id", "fingerprint", "model")
    } == {"string"}
    assert (dtypes["ended_seq"], dtypes["nesterov"], dtypes["milestone_fractions"]) == (
        "Int64",
        "boolean",
        "string",
    )


def test_load_curves_has_one_row_per_epoch_with_exact_figures(state: SearchState) -> None:
    curves = load_curves([state])
    assert len(curves) == sum(trial.epochs_done for trial in state.trials.values())
    rows = (
        curves[curves["trial"] == 1]
        .drop(columns=["search", "trial", "run_id", "cycle"])
        .to_dict(orient="records")
    )
    assert rows == [result.model_dump() for result in state.trials[1].epochs]
    assert set(curves["search"]) == {"s7-1"}
    assert list(curves["run_id"].unique()) == [f"s7-1:{number}" for number in (0, 2, 1, 4, 5, 6)]


def test_epochs_of_a_trial_in_cycles_stand_with_the_length_of_their_cycle(tmp_path: Path) -> None:
    events = [
        *make_cycles(0, COURSES, "complete"),
        *make_cycles(1, {1: [0.4]}, "diverged", cycle=2),
    ]
    events += make_trial(2, [0.3, 0.5, 0.6], "complete")
    budget = {"trials": 3, "rungs": [1, 2, 3], "fidelity": "cycles"}
    state = write_search(tmp_path, "s7-1", 1, events, budget=budget)
    curves = load_curves([state])
    found = [
        tuple(row) for row in curves[["trial", "cycle", "epoch", "val_acc"]].itertuples(index=False)
    ]
    whole = [
        (0, cycle, epoch, acc)
        for cycle, accs in COURSES.items()
        for epoch, acc in enumerate(accs, 1)
    ]
    assert found == [*whole, (1, 1, 1, 0.4), (2, 3, 1, 0.3), (2, 3, 2, 0.5), (2, 3, 3, 0.6)]
    trials = load_trials([state])
    assert list(trials["epochs_done"]) == [6, 1, 3]
    assert list(trials["train_seconds"]) == [12.0, 2.0, 6.0]
    assert list(trials["epochs"]) == [3, 3, 3], "the whole training's: they compete in one group"
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


def test_trials_of_different_data_split_length_or_size_stand_in_groups_apart(
    tmp_path: Path,
) -> None:
    def write(name: str, data: DataInfo | None = None, **knobs: Any) -> SearchState:
        config = CONFIG.model_copy(update=knobs)
        accs: list[float | None] = [0.5] * config.epochs
        header = {} if data is None else {"data": data}
        return write_search(tmp_path, name, 1, make_trial(0, accs, "complete", config), **header)

    states = [
        write("stand-in", SHAPES_INFO, epochs=9),
        write("plain"),
        write("again"),
        write("long", epochs=5),
        write("small", train_size=400),
        write("less-val", val_size=50),
        write("split", DataInfo(name="cifar10", digest="d1", split_hash="h2")),
        write("digest", DataInfo(name="cifar10", digest="d2", split_hash="h1")),
    ]
    groups = split_groups(load_trials(states))
    found = [sorted(rows["search"]) for _, rows in groups]
    assert found == [
        ["long"],
        ["again", "plain"],
        ["digest"],
        ["split"],
        ["less-val"],
        ["small"],
        ["stand-in"],
    ]
    assert [group["data"] for group, _ in groups] == ["cifar10"] * 6 + ["shapes"]


def test_no_trials_make_no_groups_and_no_course() -> None:
    trials = load_trials([])
    assert split_groups(trials) == []
    assert len(best_so_far(trials)) == 0


def test_best_so_far_follows_the_order_of_the_ends(tmp_path: Path) -> None:
    first, second = (
        make_trial(0, [0.3, 0.5, 0.7], "complete"),
        make_trial(1, [0.4, 0.6, 0.8], "complete"),
    )
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
    late = write_search(
        tmp_path,
        "b",
        2,
        [*make_trial(0, [0.9], "stopped"), *make_trial(1, [0, 0, 0.5], "complete")],
    )
    early = write_search(tmp_path, "a", 1, make_trial(0, [0, 0, 0.4], "complete"))
    course = best_so_far(load_trials([late, early]))
    assert list(course["run_id"]) == ["b:0", "b:1", "a:0"]
    assert list(course["best"].fillna(-1)) == [-1, 0.5, 0.4]
    assert list(course["is_best"]) == [False, True, True]
    assert list(course["order"]) == [1, 2, 1]
    dtypes = [
        "string",
        "int64",
        "string",
        "string",
        "int64",
        "int64",
        "float64",
        "float64",
        "boolean",
    ]
    assert [str(dtype) for dtype in course.dtypes] == dtypes


def test_find_best_takes_the_newest_finished_search_on_cifar10(tmp_path: Path) -> None:
    trial = make_trial(0, [0.3, 0.5, 0.7], "complete")
    states = [
        write_search(tmp_path, "old", 1, [*make_trial(0, [0.9, 0.9, 0.9], "complete"), FINISH]),
        write_search(tmp_path, "newest", 2, [*trial, FINISH]),
        write_search(tmp_path, "unfinished", 3, trial),
        write_search(tmp_path, "interrupted", 7, [*trial, INTERRUPT]),
        write_search(tmp_path, "stand-in", 4, [*trial, FINISH], data=SHAPES_INFO),
        write_search(tmp_path, "single", 5, [*trial, FINISH], kind="train"),
        write_search(tmp_path, "other", 6, [*trial, FINISH], space="s10"),
    ]
    for order in (states, states[::-1]):
        state, found = find_best(order, space="s7")
        assert (state.header.name, found.run_id) == ("newest", "newest:0")
        assert find_best(order)[0].header.name == "other"


def test_find_best_of_a_named_search_asks_neither_for_its_end_nor_for_cifar10(
    tmp_path: Path,
) -> None:
    states = [write_search(tmp_path, name, 1, TRIALS, data=SHAPES_INFO) for name in ("a", "b")]
    state, trial = find_best(states, search="b")
    assert state.header.name == "b"
    assert (trial.number, trial.score) == (1, 0.8)
    assert find_best(states, space="s7", search="b") == (state, trial)


def test_find_best_says_what_there_is_instead(tmp_path: Path) -> None:
    trial = make_trial(0, [0.3, 0.5, 0.7], "complete")
    stand_in = write_search(tmp_path, "smoke-1", 1, [*trial, FINISH], data=SHAPES_INFO)
    running = write_search(tmp_path, "s7-2", 2, trial)
    interrupted = write_search(tmp_path, "s7-5", 7, [*trial, INTERRUPT])
    single = write_search(tmp_path, "single", 3, [*trial, FINISH], kind="train")
    failed = write_search(tmp_path, "s7-3", 4, [*make_trial(0, [0.3], "failed"), FINISH])
    empty = write_search(tmp_path, "s7-4", 5, [FINISH])
    other = write_search(tmp_path, "wide", 6, [*trial, FINISH], space="s7b")
    rule = "space s7: a finished search on CIFAR-10 must be recorded, got"
    take = "Name one with --search to take it all the same."
    for states, answer in (
        ([stand_in], f"{rule} only on the stand-in (shapes): smoke-1. {take}"),
        (
            [stand_in, running],
            f"{rule} only on the stand-in (shapes): smoke-1; unfinished: s7-2. {take}",
        ),
        ([running], f"{rule} unfinished: s7-2. {take}"),
        ([interrupted], f"{rule} unfinished: s7-5. {take}"),
        ([single], f"{rule} none."),
        ([other], f"{rule} none. Did you mean s7b?"),
        ([], f"{rule} none."),
        (
            [failed],
            "search s7-3: a complete trial must be there, got 1 failed. Name another search with --search.",
        ),
        (
            [empty],
            "search s7-4: a complete trial must be there, got no trial. Name another search with --search.",
        ),
    ):
        with pytest.raises(RecordError) as error:
            find_best(states, space="s7")
        assert str(error.value) == answer
    with pytest.raises(
        RecordError, match=r"^searches: a finished search on CIFAR-10 must be recorded, got none\.$"
    ):
        find_best([])


def test_find_best_refuses_an_unknown_search_and_a_wrong_space(state: SearchState) -> None:
    with pytest.raises(
        RecordError,
        match=r"--search: a recorded search must be named, got 's7-2'. Did you mean s7-1\?",
    ):
        find_best([state], search="s7-2")
    with pytest.raises(RecordError, match=r"search s7-1: its space must be s10, got s7\."):
        find_best([state], space="s10", search="s7-1")


@pytest.mark.parametrize("run_id", ["s7-1:4", "s7-1:004"])
def test_find_run_finds_search_and_trial(state: SearchState, tmp_path: Path, run_id: str) -> None:
    found, trial = find_run(tmp_path, run_id)
    assert found == state
    assert trial == state.trials[4]


@pytest.mark.parametrize(
    "run_id", ["", "s7-1", "s7-1:", ":4", "s7-1:x", "s7-1:-1", "../s7-1:4", "s7-1:4\n", "s7-1:1:2"]
)
def test_find_run_refuses_what_is_no_run_id(
    state: SearchState, tmp_path: Path, run_id: str
) -> None:
    with pytest.raises(
        RecordError, match=r"run id: NAME:TRIAL such as s10-cpu-1:7 must be given, got"
    ):
        find_run(tmp_path, run_id)


def test_find_run_refuses_unknown_searches_and_trials(state: SearchState, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"must be recorded, got 's7-11'\. Did you mean s7-1\?"):
        find_run(tmp_path, "s7-11:0")
    with pytest.raises(
        RecordError, match=r"s7-1: a trial of the search must be named, got 7 of 7\."
    ):
        find_run(tmp_path, "s7-1:7")


def test_load_searches_gives_the_newest_first_of_a_space_or_a_name(tmp_path: Path) -> None:
    for name, day, space in (("a", 1, "s7"), ("b", 3, "s10"), ("c", 2, "s7")):
        write_search(tmp_path, name, day, [], space=space)

    def list_names(**choice: str) -> list[str]:
        return [state.header.name for state in load_searches(tmp_path, **choice)]

    assert list_names() == ["b", "c", "a"]
    assert list_names(space="s7") == ["c", "a"]
    assert list_names(search="a") == ["a"]
    assert list_names(search="a", space="s7") == ["a"]
    assert list_names(space="s8") == []
    assert load_searches(tmp_path / "nowhere") == []


def test_load_searches_refuses_an_unknown_name_and_a_wrong_space(
    state: SearchState, tmp_path: Path
) -> None:
    for name in ("s7-2", "../s7-1", ""):
        with pytest.raises(RecordError, match="a search of the name must be recorded, got"):
            load_searches(tmp_path, search=name)
    with pytest.raises(RecordError, match=r"search s7-1: its space must be s10, got s7\."):
        load_searches(tmp_path, space="s10", search="s7-1")


def test_a_damaged_record_is_told_and_hides_no_other(
    state: SearchState, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = write_search(tmp_path, "s7-2", 2, TRIALS)
    path = damaged.folder / "record.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.35", b"0.36").replace(b"0.9", b"0.8"))
    with caplog.at_level(logging.WARNING):
        assert load_searches(tmp_path) == [state]
    assert "left out: " in caplog.text
    assert "s7-2/record.jsonl:" in caplog.text
    with pytest.raises(
        RecordError, match=r"s7-2/record.jsonl:\d+: a line must be JSON that fits its CRC"
    ):
        load_searches(tmp_path, search="s7-2")


def test_every_search_is_a_row_that_tells_how_it_stands(tmp_path: Path) -> None:
    trial = make_trial(0, [0.3, 0.5, 0.7], "complete")
    write_search(tmp_path, "whole", 1, [*trial, *make_trial(1, [0.2], "stopped"), FINISH])
    write_search(tmp_path, "stopped", 2, [*trial, INTERRUPT], data=SHAPES_INFO)
    write_search(tmp_path, "killed", 3, make_trial(0, [0.3], None), kind="train", tier=None)
    record = Record.create(
        tmp_path / "searches" / "live", make_header("live", created="2026-01-04T12:00:00+00:00")
    )
    with record:
        rows = list_rows(tmp_path)
    names = [(row.name, row.stage, row.end) for row in rows]
    assert names == [
        ("live", "running", None),
        ("killed", "driver died", None),
        ("stopped", "interrupted", "interrupted"),
        ("whole", "finished", "all trials"),
    ]
    whole, killed = rows[3], rows[1]
    assert (whole.kind, whole.space, whole.tier, whole.data) == ("search", "s7", "full", "cifar10")
    assert (whole.created, whole.best, whole.best_val_acc) == (
        "2026-01-01T12:00:00+00:00",
        "whole:0",
        0.7,
    )
    assert whole.counts == {"running": 0, "complete": 1, "stopped": 1, "diverged": 0, "failed": 0}
    assert (killed.kind, killed.tier, killed.best, killed.best_val_acc) == (
        "train",
        None,
        None,
        None,
    )
    assert whole.size_bytes == measure_folder(tmp_path / "searches" / "whole") > 1000


def test_a_damaged_record_is_a_row_with_its_sentence(state: SearchState, tmp_path: Path) -> None:
    """In the middle (its date can be read) and in the header (it comes last)."""
    for day, name, old in ((2, "s7-2", b'"val_acc": 0.9'), (3, "s7-3", b"abc")):
        path = write_search(tmp_path, name, day, TRIALS).folder / "record.jsonl"
        path.write_bytes(path.read_bytes().replace(old, old.upper()))
    middle, sound, header = list_rows(tmp_path)
    assert (sound.name, sound.error) == ("s7-1", None)
    for row, name in ((middle, "s7-2"), (header, "s7-3")):
        assert (row.name, row.stage, row.kind, row.counts) == (name, "damaged", None, None)
        assert row.error is not None and "a line must be JSON that fits its CRC" in row.error
        assert row.size_bytes > 1000


def test_the_size_of_a_folder_counts_its_files_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "big").write_bytes(bytes(10_000))
    folder = tmp_path / "search"
    (folder / "trials" / "0000").mkdir(parents=True)
    (folder / "record").write_bytes(bytes(300))
    (folder / "trials" / "0000" / "weights").write_bytes(bytes(4000))
    assert measure_folder(folder) == 4300
    (folder / "trials" / "0001").symlink_to(tmp_path / "away")
    (folder / "linked").symlink_to(tmp_path / "away" / "big")
    assert 4300 <= measure_folder(folder) < 5000
    assert measure_folder(tmp_path / "nowhere") == 0


def catch(action: Any) -> str:
    """The traceback of an action that fails."""
    try:
        action()
    except Exception:
        return traceback.format_exc()
    raise AssertionError("it did not fail")


def misname_in_a_handler() -> None:
    try:
        int("x")
    except ValueError:
        check_name("../x")


def test_a_traceback_tells_type_message_and_the_last_place_in_the_package() -> None:
    failure = parse_failure(catch(lambda: check_name("../x")))
    assert failure.kind == "RecordError"
    assert failure.what.startswith(
        "tune_cifar.errors.RecordError: a search's name: it must be 1 to 64 of "
    )
    file, line, *function = failure.where.replace(":", " ").split()
    assert (file, function) == ("record/state.py", ["in", "require"]) and int(line) > 1
    outside = parse_failure(catch(lambda: int("x")))
    assert outside == Failure(
        "ValueError", "ValueError: invalid literal for int() with base 10: 'x'", ""
    )


def test_of_exceptions_that_led_to_one_another_the_last_is_told() -> None:
    assert parse_failure(catch(misname_in_a_handler)).kind == "RecordError"


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        (
            OUT_OF_MEMORY,
            Failure(
                "OutOfMemoryError",
                "torch.OutOfMemoryError: " + TRACEBACK_MESSAGE.partition("\n")[0],
                "train/trainer.py:131 in _train_step",
            ),
        ),
        (
            "worker process died\nActorDiedError(7)\nworker died, 3 times",
            Failure("", "worker process died", ""),
        ),
        ("OSError(28, 'No space left')", Failure("OSError", "OSError(28, 'No space left')", "")),
        ("KeyError: 'x'", Failure("KeyError", "KeyError: 'x'", "")),
        ("", Failure("", "no word of what happened", "")),
    ],
)
def test_words_about_a_fault_are_read(text: str, failure: Failure) -> None:
    assert parse_failure(text) == failure


def test_failures_are_grouped_by_what_failed_and_where_and_the_most_frequent_comes_first(
    tmp_path: Path,
) -> None:
    bigger = OUT_OF_MEMORY.replace("20.00", "1024.50").replace("GPU 0", "GPU 3")
    elsewhere = OUT_OF_MEMORY.replace("in _train_step", "in evaluate")
    other = OUT_OF_MEMORY.replace("torch.OutOfMemoryError", "RuntimeError")

    def make_events() -> list[Event]:
        return [
            *make_trial(0, [0.3, 0.5, 0.7], "complete"),
            *make_failed(1, elsewhere, tmp_path),
            *make_failed(2, OUT_OF_MEMORY, tmp_path),
            *make_failed(3, other, tmp_path),
            *make_failed(4, bigger, tmp_path),
        ]

    memory, first, second = group_failures(write_failures(tmp_path, make_events))
    assert (
        memory.what
        == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate # MiB. GPU # has # MiB left."
    )
    assert (memory.where, memory.count, memory.failed) == (
        "train/trainer.py:131 in _train_step",
        2,
        (2, 4),
    )
    assert (memory.retried, memory.run_id, memory.traceback) == ((), "s7-1:2", OUT_OF_MEMORY)
    assert (first.where, first.failed) == ("train/trainer.py:131 in evaluate", (1,))
    assert "Tried to allocate 20.00 MiB" in first.what, "where the numbers agree they stand"
    assert second.what.startswith("RuntimeError: ") and second.failed == (3,)


def test_faults_that_trials_went_on_after_are_counted_with_those_that_ended_them(
    tmp_path: Path,
) -> None:
    def retry(number: int) -> TrialRetried:
        return TrialRetried(
            trial=number, fault="worker died", text=f"worker process died\nprocess {number}00"
        )

    dead = "worker process died\nprocess 7\nworker died, 3 times"

    def make_events() -> list[Event]:
        start, *rest = make_trial(0, [0.3, 0.5, 0.7], "complete")
        return [
            start,
            retry(0),
            *rest,
            *make_failed(1, dead, tmp_path, [retry(1), retry(1)]),
            *make_failed(2, None, tmp_path),
        ]

    died, other = group_failures(write_failures(tmp_path, make_events))
    assert (died.what, died.where, died.count) == ("worker process died", "", 4)
    assert (died.failed, died.retried) == ((1,), (0,))
    assert (died.run_id, died.traceback) == ("s7-1:1", dead), "one that failed is replayed"
    assert (other.what, other.traceback) == ("ValueError: 3 channels", "ValueError: 3 channels")


def test_names_keep_their_digits_and_addresses_do_not(tmp_path: Path) -> None:
    def make_events() -> list[Event]:
        texts = (
            f"ValueError: conv1 of float32 at {where} of cuda:0" for where in ("0x7f3a", "0x81bc")
        )
        return [
            event
            for number, text in enumerate(texts)
            for event in make_failed(number, text, tmp_path)
        ]

    (group,) = group_failures(write_failures(tmp_path, make_events))
    assert group.what == "ValueError: conv1 of float32 at # of cuda:#"


def test_a_search_without_a_fault_has_no_group(tmp_path: Path) -> None:
    assert (
        group_failures(write_search(tmp_path, "s7-1", 1, [*make_trial(0, [], "diverged"), FINISH]))
        == []
    )


def test_a_running_search_is_read_as_far_as_it_got(tmp_path: Path) -> None:
    header = make_header("s7-1")
    with Record.create(tmp_path / "searches" / "s7-1", header) as record:
        record.append(make_start(0))
        record.append(EpochReported(trial=0, result=make_result(1, 0.5)))
        assert list(load_trials(load_searches(tmp_path))["epochs_done"]) == [1]
        record.append(EpochReported(trial=0, result=make_result(2, 0.6)))
        assert list(load_trials(load_searches(tmp_path))["val_acc"]) == [0.6]


def test_finding_runs_and_failures_imports_nothing_heavy(
    state: SearchState, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tune_cifar.record.failures import group_failures\n"
        "from tune_cifar.record.store import find_best, find_run, list_rows, load_searches\n"
        "find_run(Path(sys.argv[1]), 's7-1:0'), find_best(load_searches(Path(sys.argv[1])), search='s7-1')\n"
        "list_rows(Path(sys.argv[1])), group_failures(load_searches(Path(sys.argv[1]))[0])\n"
        "heavy = {'torch', 'ray', 'mlflow', 'optuna', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr


def test_the_tables_of_two_thousand_trials_are_there_at_once(state: SearchState) -> None:
    start = time.process_time()
    trials = load_trials([state] * 300)
    split_groups(trials)
    assert len(trials) == 2100
    assert time.process_time() - start < 1.0
