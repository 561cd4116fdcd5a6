"""Resuming a recorded search without Ray: its space, changes, what is restored; and warm starts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tests.builders import SHAPES, make_result, make_space
from tune_cifar.errors import ConfigError
from tune_cifar.record.environment import (
    describe_environment,
    digest_code,
)
from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import DataInfo, Numerics
from tune_cifar.search.driver import SearchDriver
from tune_cifar.search.plan import SearchRequest, count_trials
from tune_cifar.search.resume import (
    check_accepted,
    check_resumable,
    find_changes,
    restore_space,
)
from tune_cifar.space.select import SearchSpace, load_space
from tune_cifar.train.recorded import make_header

DATA = DataInfo(name="shapes", digest="d", split_hash="s")


def run_driver(
    storage: Path, numerics: Numerics, accs: list[list[float]], space: SearchSpace | None = None
) -> SearchState:
    """Record a search whose trials report these accuracies; a trial with too few is unfinished."""
    space = space or make_space()
    header = make_header("search", "x", space, 0, DATA, numerics, "test")
    with Record.create(search_folder(storage, "x"), header) as record:
        driver = SearchDriver(record, space, lambda state, event: None)
        for _ in accs:
            driver.ask()
        for number, curve in enumerate(accs):
            for epoch, acc in enumerate(curve, 1):
                if not driver.report(number, 3, make_result(epoch, acc)):
                    break
        return record.state


def test_the_recorded_space_is_the_searched_one(tmp_path: Path, fp32: Numerics) -> None:
    point = {**make_space().baseline_params, "max_lr": 0.3}
    space = dataclasses.replace(make_space(5), points=(point,))
    state = run_driver(tmp_path, fp32, [[0.5]], space)
    restored = restore_space(read_state(state.folder).header)
    for name in ("name", "tier", "text", "baseline", "distributions", "points", "budget", "pinned"):
        assert getattr(restored, name) == getattr(space, name), name


def test_a_pinned_list_of_numbers_comes_back_as_it_was(tmp_path: Path, fp32: Numerics) -> None:
    pins: dict[str, Any] = {"schedule": "step", "milestone_fractions": (0.25, 0.75)}
    space = load_space("s8", "cpu", pins)
    state = run_driver(tmp_path, fp32, [], space)
    assert restore_space(state.header).baseline == space.baseline


def test_an_unchanged_machine_has_no_changes(tmp_path: Path, fp32: Numerics) -> None:
    state = run_driver(tmp_path, fp32, [])
    changes = find_changes(state, DATA, fp32, describe_environment())
    assert changes.deciding == () and changes.harmless == ()
    check_accepted(changes, accept_changes=False)


def test_what_decides_results_must_be_accepted_and_the_rest_is_listed(
    tmp_path: Path, fp32: Numerics
) -> None:
    state = run_driver(tmp_path, fp32, [])
    other = fp32.model_copy(update={"threads": 2, "versions": {**fp32.versions, "torch": "9.9"}})
    environment = describe_environment() | {"code": "0123", "ray": "9.0", "torch": "9.9"}
    changes = find_changes(state, DATA.model_copy(update={"split_hash": "t"}), other, environment)
    assert changes.deciding == (
        "threads: 1 -> 2",
        f"torch: {fp32.versions['torch']} -> 9.9",
        "data: shapes, split s -> shapes, split t",
        f"code: {digest_code()} -> 0123",
    )
    assert [change.split(":")[0] for change in changes.harmless] == ["ray"]
    rule = f"x: its seed must be 0 to {2**32 - 9} (with 9 trials), got {seed}"
    hint = "Start a new search with another `seed`; `warm_start` takes over the best trials."
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{rule}. {hint}')}$"):
        prepare_resume(SearchRequest(SHAPES, tmp_path, "test", name="x"), None, None, True)
    assert (search_folder(tmp_path, "x") / "record.jsonl").read_bytes() == before


def test_an_old_search_whose_seed_the_sampler_takes_is_resumed(fp32: Numerics) -> None:
    header = make_header("search", "x", make_space(), 2**32 - 9, DATA, fp32, "test")
    check_resumable(header, 9)
    check_resumable(header.model_copy(update={"kind": "confirm", "seed": -1}), 9)


def test_more_trials_than_a_search_may_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`trials` <= 100000 must hold, got 100001\."):
        make_space().limit(count_trials("+1", 100_000))
    assert make_space().limit(count_trials("100000")).budget.trials == 100_000
