"""The nodes of a cluster in a record: who takes part, on which one each attempt trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.builders import (
    NUMERICS,
    make_end,
    make_header,
    make_resume,
    make_start,
    make_trial,
    write_record,
)
from tune_cifar.errors import RecordError
from tune_cifar.record.events import Event, NodeChanged, TrialPlaced
from tune_cifar.record.state import SearchState

OTHER = NUMERICS.model_copy(update={"capability": "AVX512"})


def join(name: str, **changes: Any) -> NodeChanged:
    values = {"node": name, "status": "joined", "address": "10.0.0.1", "numerics": NUMERICS}
    return NodeChanged(**{**values, **changes})


def place(trial: int, node: str, attempt: int = 1) -> TrialPlaced:
    return TrialPlaced(trial=trial, node=node, attempt=attempt)


def replay(folder: Path, *events: Event) -> SearchState:
    return write_record(folder, make_header(), list(events))


def test_a_trial_has_the_node_and_the_numerics_of_its_last_attempt(tmp_path: Path) -> None:
    events = [join("a"), join("b", numerics=OTHER), make_start(0), place(0, "a")]
    state = replay(tmp_path, *events, place(0, "b", 2))
    trial = state.trials[0]
    assert (trial.node, trial.numerics, trial.other_numerics) == ("b", OTHER, [NUMERICS])


def test_on_one_machine_a_trial_has_no_node(tmp_path: Path) -> None:
    trial = replay(tmp_path, make_start(0)).trials[0]
    assert (trial.node, trial.numerics, trial.other_numerics) == (None, NUMERICS, [])


def test_where_a_nodes_numerics_are_unknown_the_drivers_count(tmp_path: Path) -> None:
    state = replay(tmp_path, join("a", numerics=None), make_start(0), place(0, "a"))
    assert (state.trials[0].numerics, state.trials[0].other_numerics) == (NUMERICS, [])


def test_a_trial_that_is_resumed_on_one_machine_has_that_ones_numerics_and_the_old_ones(
    tmp_path: Path,
) -> None:
    events = [join("a", numerics=OTHER), make_start(0), place(0, "a"), make_resume()]
    state = replay(tmp_path, *events)
    assert state.nodes == {}, "nodes take part in one launch"
    assert (state.trials[0].numerics, state.trials[0].other_numerics) == (NUMERICS, [OTHER])


def test_the_last_change_of_a_node_counts(tmp_path: Path) -> None:
    lost = join("a", status="lost", text="gone")
    assert replay(tmp_path, join("a"), join("b"), lost).nodes == {"a": lost, "b": join("b")}


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([join("a"), place(0, "a")], "trial 0 must start first"),
        ([make_start(0), place(0, "a")], "node 'a' must have joined"),
        ([join("a"), *make_trial(0, [0.5], "stopped"), place(0, "a")], "the trial has ended"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(
    tmp_path: Path, events: list[Event], problem: str
) -> None:
    with pytest.raises(RecordError, match=problem):
        replay(tmp_path, *events)


def test_an_ended_trial_keeps_its_node(tmp_path: Path) -> None:
    events = [join("a"), make_start(0), place(0, "a"), make_end(0, "failed", [])]
    state = replay(tmp_path, *events, make_resume())
    assert state.trials[0].node == "a" and state.trials[0].num_nodes_before == 0
