"""Resuming a recorded search without Ray: its space, changes, what is restored; and warm starts."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.builders import SHAPES, make_result, make_space, make_stages_driver
from tune_cifar.errors import ConfigError, SpaceError
from tune_cifar.record.environment import (
    DECIDING_PACKAGES,
    PACKAGE,
    describe_environment,
    digest_code,
)
from tune_cifar.record.events import Header, Stage
from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import DataInfo, Numerics
from tune_cifar.search.driver import SearchDriver
from tune_cifar.search.plan import SearchRequest, count_trials
from tune_cifar.search.resume import (
    check_accepted,
    check_resumable,
    describe_restored,
    find_changes,
    restore_space,
)
from tune_cifar.search.run import prepare_resume
from tune_cifar.space.reader import parse_recorded, parse_space
from tune_cifar.space.select import SearchSpace, load_space, select_tier
from tune_cifar.train.checkpoint import CheckpointFolder
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
                if not driver.report(number, Stage(3), make_result(epoch, acc)):
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


def test_a_variable_that_changes_bits_must_be_accepted(tmp_path: Path, fp32: Numerics) -> None:
    before, now = ({"settings": {"MKL_CBWR": value}} for value in ("AVX2", "AVX"))
    state = run_driver(tmp_path, fp32.model_copy(update=before), [])
    changes = find_changes(state, DATA, fp32.model_copy(update=now), describe_environment())
    assert changes.deciding == ("MKL_CBWR: AVX2 -> AVX",)


def test_a_search_recorded_without_variables_asks_for_none(tmp_path: Path, fp32: Numerics) -> None:
    state = run_driver(tmp_path, fp32.model_copy(update={"settings": None}), [])
    now = fp32.model_copy(update={"settings": {"MKL_CBWR": "AVX2"}})
    assert find_changes(state, DATA, now, describe_environment()).deciding == ()


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
        "data: shapes (files d, split s) -> shapes (files d, split t)",
        f"code: {digest_code()} -> 0123",
    )
    assert [change.split(":")[0] for change in changes.harmless] == ["ray"]
    rule = "`resume`: what decides results must be as recorded, got threads: 1 -> 2; .*"
    with pytest.raises(ConfigError, match=rule):
        check_accepted(changes, accept_changes=False)
    check_accepted(changes, accept_changes=True)


@pytest.mark.parametrize("name", ["optuna", "numpy", "scipy"])
def test_a_library_of_the_sampler_must_be_accepted_unless_it_was_not_recorded(
    tmp_path: Path, fp32: Numerics, name: str
) -> None:
    """On a cluster the Numerics are a node's, and numpy's version there is another."""
    state, now = run_driver(tmp_path, fp32, []), describe_environment()
    changes = find_changes(state, DATA, fp32, now | {name: "9.9"})
    assert changes.deciding == (f"{name}: {now[name]} -> 9.9",)
    old = {fact: value for fact, value in now.items() if fact != name}
    state.header = state.header.model_copy(update={"environment": old})
    changes = find_changes(state, DATA, fp32, now)
    assert (changes.deciding, changes.harmless) == ((), (f"{name}: absent -> {now[name]}",))


@pytest.mark.parametrize("name", DECIDING_PACKAGES)
def test_a_changed_file_of_each_deciding_package_must_be_accepted(
    tmp_path: Path, fp32: Numerics, name: str
) -> None:
    copy = tmp_path / "tune_cifar"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert digest_code(copy) == digest_code()
    path = copy / f"{name}.py"
    changed = path if path.exists() else max((copy / name).rglob("*.py"))
    changed.write_text(changed.read_text(encoding="utf-8") + "\nX = 1\n", encoding="utf-8")
    state = run_driver(tmp_path, fp32, [])
    changes = find_changes(state, DATA, fp32, describe_environment() | {"code": digest_code(copy)})
    assert [change.split(":")[0] for change in changes.deciding] == ["code"]
    with pytest.raises(ConfigError, match="accept_changes=True"):
        check_accepted(changes, accept_changes=False)


def test_a_changed_file_of_another_package_is_no_change(tmp_path: Path) -> None:
    copy = tmp_path / "tune_cifar"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("report", "tracking", "verify", "cli"):
        changed = copy / name / "__init__.py"
        changed.write_text(changed.read_text(encoding="utf-8") + "\nX = 1\n", encoding="utf-8")
    assert digest_code(copy) == digest_code()


def test_a_changed_space_file_is_listed_and_changes_nothing(
    tmp_path: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = run_driver(tmp_path, fp32, [])
    file = tmp_path / "search_spaces" / "smoke.yaml"
    file.parent.mkdir()
    file.write_text(state.header.space_text + "\n# another text\n")
    monkeypatch.chdir(tmp_path)
    changes = find_changes(state, DATA, fp32, describe_environment())
    change = "space: the file of smoke -> another text; the recorded one is searched"
    assert changes.deciding == () and changes.harmless == (change,)
    assert restore_space(state.header).text == state.header.space_text


def test_the_description_of_what_is_restored_names_the_epochs_of_checkpoints(
    tmp_path: Path, fp32: Numerics
) -> None:
    state = run_driver(tmp_path, fp32, [[0.5, 0.6, 0.7], [0.6], [0.1], [0.7, 0.8], []])
    folder = CheckpointFolder(state.trial_folder(1) / "checkpoints")
    for number, epoch in ((1, 1), (3, 1), (3, 2)):
        CheckpointFolder(state.trial_folder(number) / "checkpoints").save({"epoch": epoch})
    (sentence,) = describe_restored(state, (1, 3))
    assert sentence == (
        "5 trials; 2 rungs with 5 scores; 2 resumed from epochs 1, 2; "
        "1 restarted without a checkpoint"
    )
    newest = state.trial_folder(3) / "checkpoints" / "checkpoint-0002.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    sentence, damaged = describe_restored(state, (1, 3))
    assert "2 resumed from epochs 1, 1;" in sentence and "checkpoint-0002.pt" in damaged
    assert folder.find_newest() == (1, [])


def test_a_trial_at_the_end_of_a_stage_starts_the_next(tmp_path: Path, fp32: Numerics) -> None:
    driver = make_stages_driver(tmp_path, fp32)
    for number, reported in enumerate([[(1, 1)], [(1, 1), (2, 1)], []]):
        driver.ask()
        for stage, epoch in reported:
            driver.report(number, Stage(stage), make_result(epoch, 0.5))
        if reported:
            checkpoints = driver.record.state.trial_folder(number) / "checkpoints"
            CheckpointFolder(checkpoints).save({"epoch": reported[-1][1]})
    driver.record.close()
    (sentence,) = describe_restored(driver.record.state, (1, 2, 3))
    assert sentence == (
        "3 trials; 1 rung with 2 scores; 1 resumed from epoch 1; 1 at the start of the next stage; "
        "1 restarted without a checkpoint"
    )


OLD_TEXT = """
space: old
source: a test
published: {accuracy: 0.5, measured: nowhere}
corrects: []
baseline:
  {model: s7, optimizer: sgd, schedule: onecycle, max_lr: 0.1,
   batch_size: 100, epochs: 4, train_size: 400}
search:
  max_lr: {low: 0.01, high: 1.0, log: true}
  pct_start: {low: 0.1, high: 0.5}
budget:
  full: {trials: 4, rungs: [1, 4], reduction_factor: 2, sampler: {kind: random}, seed: 0}
  cpu: {trials: 4, rungs: [1, 4], reduction_factor: 2, sampler: {kind: random}, seed: 0}
"""


def test_a_record_without_a_fidelity_is_resumed_as_one_schedule(
    tmp_path: Path, fp32: Numerics
) -> None:
    """Its text and pins are refused today: the first stage's shortest warm-up has 0.4 steps."""
    rule = r"pct_start x steps of the shortest cycle > 1 must hold, got 0\.1 x 4"
    with pytest.raises(SpaceError, match=rule):
        parse_space(OLD_TEXT, Path("old.yaml"))
    space = select_tier(parse_recorded(OLD_TEXT, "old"), "cpu", {"val_size": 50})
    assert space.obstacle is not None
    header = make_header("search", "x", space, 0, DATA, fp32, "test")
    budget, baseline = dict(header.budget), dict(header.baseline)
    del budget["fidelity"], baseline["warm_restarts"]
    header = header.model_copy(update={"budget": budget, "baseline": baseline})
    with Record.create(search_folder(tmp_path, "x"), header) as record:
        restored = restore_space(record.state.header).limit(4)
        assert (restored.budget.fidelity, restored.baseline) == ("epochs", space.baseline)
        driver = SearchDriver(record, restored, lambda state, event: None)
        driver.ask()
        for epoch in (1, 2, 3, 4):
            driver.report(0, Stage(4), make_result(epoch, 0.5))
    trial = read_state(record.state.folder).trials[0]
    scores = dict.fromkeys((1, 2, 3, 4), 0.5)
    assert (trial.status, trial.stage, trial.scores) == ("complete", None, scores)


def test_a_search_recorded_with_inactive_knobs_goes_on_as_it_began(
    tmp_path: Path, fp32: Numerics
) -> None:
    """Its header has no `is_conditional`: all searched knobs are drawn, recorded and told."""
    space = load_space("s8", "cpu").limit(30)
    header = make_header("search", "x", space, 0, DATA, fp32, "test")
    assert header.is_conditional
    old = Header(**header.model_dump(exclude={"is_conditional"}))
    assert not old.is_conditional

    def run(record: Record, until: int) -> list[dict[str, Any]]:
        state = record.state
        driver = SearchDriver(record, restore_space(state.header), lambda state, event: None)
        while len(state.trials) < until and (trial := driver.ask()) is not None:
            for stage, epoch in ((1, 1), (3, 1), (3, 2), (3, 3)):
                acc = 0.3 + trial.full_config.dropout
                if not driver.report(trial.number, Stage(stage), make_result(epoch, acc)):
                    break
        return [trial.params for trial in state.trials.values()]

    found = {}
    for name, first in (("whole", old), ("cut", old), ("new", header), ("new-cut", header)):
        folder = search_folder(tmp_path, name)
        first = first.model_copy(update={"name": name})
        with Record.create(folder, first) as record:
            found[name] = run(record, 15 if name.endswith("cut") else 30)
        if name.endswith("cut"):
            with Record.open(folder) as record:
                found[name] = run(record, 30)
    assert found["cut"] == found["whole"] and found["new-cut"] == found["new"]
    knobs = list(space.distributions)
    assert all(list(params) == knobs for params in found["whole"])
    constant = [params for params in found["new"] if params["schedule"] == "constant"]
    inactive = {"pct_start", "div_factor", "final_div_factor"}
    assert constant and all(set(params) == set(knobs) - inactive for params in constant)


@pytest.mark.parametrize(
    ("text", "num_started", "expected"),
    [("40", None, 40), ("40", 12, 40), ("+50", 12, 62), ("12", 12, 12)],
)
def test_trials_are_counted_in_all_or_on_top(
    text: str, num_started: int | None, expected: int
) -> None:
    assert count_trials(text, num_started) == expected


@pytest.mark.parametrize(
    ("text", "num_started", "sentence"),
    [
        ("0", None, "`trials` must be a whole number >= 1, got '0'."),
        ("+5", None, "`trials` must be a whole number >= 1, got '+5'."),
        ("1e3", 4, "`trials` must be a number such as 40 or +50 with `resume=True`, got '1e3'."),
        ("3", 4, "`trials` >= 4 (those recorded) must hold, got 3."),
    ],
)
def test_trials_that_make_no_sense_are_refused(
    text: str, num_started: int | None, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        count_trials(text, num_started)


@pytest.mark.parametrize("seed", [-1, 2**32 - 8, 99_999_999_999])
def test_an_old_search_whose_seed_the_sampler_refuses_is_told_what_to_do(
    tmp_path: Path, fp32: Numerics, seed: int
) -> None:
    header = make_header("search", "x", make_space(), seed, DATA, fp32, "test")
    Record.create(search_folder(tmp_path, "x"), header).close()
    before = (search_folder(tmp_path, "x") / "record.jsonl").read_bytes()
    rule = f"x: its seed must be 0 to {2**32 - 9} (with 9 trials), got {seed}"
    hint = "Start a new search with another `seed`; `warm_start` takes over the best trials."
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{rule}. {hint}')}$"):
        prepare_resume(SearchRequest(SHAPES, tmp_path, "test", name="x"), None, None, True)
    assert (search_folder(tmp_path, "x") / "record.jsonl").read_bytes() == before


def test_an_old_search_whose_seed_the_sampler_takes_can_be_resumed(fp32: Numerics) -> None:
    header = make_header("search", "x", make_space(), 2**32 - 9, DATA, fp32, "test")
    check_resumable(header, 9)
    check_resumable(header.model_copy(update={"kind": "confirm", "seed": -1}), 9)


def test_more_trials_than_a_search_may_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`trials` <= 100000 must hold, got 100001\."):
        make_space().limit(count_trials("+1", 100_000))
    assert make_space().limit(count_trials("100000")).budget.trials == 100_000
