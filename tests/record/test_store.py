"""The run store: which searches are found and loaded, which trial a run id or `--best` means."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import (
    SEARCH_FINISHED,
    SEARCH_INTERRUPTED,
    SHAPES_INFO,
    TRIALS,
    StoppedClock,
    make_header,
    make_start,
    make_trial,
    write_record,
    write_search,
)
from tune_cifar.errors import RecordError
from tune_cifar.record.journal import Record
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import (
    find_best,
    find_run,
    find_storage,
    list_rows,
    list_searches,
    load_searches,
    make_name,
    measure_folder,
    repeat_storage,
    search_folder,
)


def test_the_storage_is_the_option_then_the_variable_then_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNE_CIFAR_RUNS", "from_variable")
    assert find_storage("from_option") == tmp_path.resolve() / "from_option"
    assert find_storage(Path("from_option")) == tmp_path.resolve() / "from_option"
    assert find_storage(None) == tmp_path.resolve() / "from_variable"
    monkeypatch.delenv("TUNE_CIFAR_RUNS")
    assert find_storage(None) == tmp_path.resolve() / "runs"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert find_storage("~/runs") == tmp_path.resolve() / "home" / "runs"
    assert not (tmp_path / "runs").exists()


def test_a_command_needs_the_option_for_any_run_store_but_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_CIFAR_RUNS", str(tmp_path))
    assert repeat_storage(tmp_path) == ""
    assert repeat_storage(tmp_path / "my runs") == f" --storage '{tmp_path}/my runs'"


def test_searches_are_listed_newest_first_and_damaged_ones_last(tmp_path: Path) -> None:
    times = {
        "b": "2026-01-31T12:00:00+00:00",
        "z": "2026-01-31T12:00:00.500000+00:00",
        "c": "2026-01-31T12:00:00+00:00",
        "a": "2026-02-01T00:00:00+00:00",
        "damaged": "2027-01-01T00:00:00+00:00",
        "empty": "2027-01-01T00:00:00+00:00",
    }
    for name, created in times.items():
        write_record(tmp_path, make_header(name, created=created), [make_start(0)])
    (tmp_path / "searches" / "empty" / "record.jsonl").write_bytes(b"")
    path = tmp_path / "searches" / "damaged" / "record.jsonl"
    path.write_bytes(path.read_bytes().replace(b"damaged", b"DAMAGED"))
    (tmp_path / "searches" / "no_search").mkdir()
    (tmp_path / "searches" / "file").write_text("")
    names = [folder.name for folder in list_searches(tmp_path)]
    assert names == ["a", "z", "c", "b", "empty", "damaged"]
    assert list_searches(tmp_path / "nowhere") == []


def test_find_best_takes_the_newest_finished_search_on_cifar10(tmp_path: Path) -> None:
    trial = make_trial(0, [0.3, 0.5, 0.7], "complete")
    better = make_trial(0, [0.9, 0.9, 0.9], "complete")
    states = [
        write_search(tmp_path, "old", 1, [*better, SEARCH_FINISHED]),
        write_search(tmp_path, "newest", 2, [*trial, SEARCH_FINISHED]),
        write_search(tmp_path, "unfinished", 3, trial),
        write_search(tmp_path, "interrupted", 7, [*trial, SEARCH_INTERRUPTED]),
        write_search(tmp_path, "synthetic", 4, [*trial, SEARCH_FINISHED], data=SHAPES_INFO),
        write_search(tmp_path, "single", 5, [*trial, SEARCH_FINISHED], kind="train"),
        write_search(tmp_path, "other", 6, [*trial, SEARCH_FINISHED], space="s10"),
    ]
    for order in (states, states[::-1]):
        state, found = find_best(order, space="s7")
        assert (state.header.name, found.run_id) == ("newest", "newest:0")
        assert find_best(order)[0].header.name == "other"
        assert find_best(order, data="shapes")[0].header.name == "synthetic"


def test_a_named_search_need_not_be_finished_or_on_cifar10(tmp_path: Path) -> None:
    states = [write_search(tmp_path, name, 1, TRIALS, data=SHAPES_INFO) for name in ("a", "b")]
    state, trial = find_best(states, search="b")
    assert state.header.name == "b"
    assert (trial.number, trial.score) == (1, 0.8)
    assert find_best(states, space="s7", search="b") == (state, trial)


def test_find_best_says_what_there_is_instead(tmp_path: Path) -> None:
    trial = make_trial(0, [0.3, 0.5, 0.7], "complete")
    synthetic = write_search(tmp_path, "smoke-1", 1, [*trial, SEARCH_FINISHED], data=SHAPES_INFO)
    running = write_search(tmp_path, "s7-2", 2, trial)
    interrupted = write_search(tmp_path, "s7-5", 7, [*trial, SEARCH_INTERRUPTED])
    single = write_search(tmp_path, "single", 3, [*trial, SEARCH_FINISHED], kind="train")
    failed = write_search(tmp_path, "s7-3", 4, [*make_trial(0, [0.3], "failed"), SEARCH_FINISHED])
    empty = write_search(tmp_path, "s7-4", 5, [SEARCH_FINISHED])
    other = write_search(tmp_path, "wide", 6, [*trial, SEARCH_FINISHED], space="s7b")
    problem = "no finished search on CIFAR-10 of space s7"
    on_synthetic = f"{problem}, only on synthetic data: smoke-1"
    hint = "Name one with `search` to use it."
    incomplete, another = "has no complete trial", "Name another search with `search`."
    for states, answer in (
        ([synthetic], f"{on_synthetic}. {hint}"),
        ([synthetic, running], f"{on_synthetic}; unfinished: s7-2. {hint}"),
        ([running], f"{problem}, only unfinished: s7-2. {hint}"),
        ([interrupted], f"{problem}, only unfinished: s7-5. {hint}"),
        ([single], f"{problem}."),
        ([other], f"{problem}. Did you mean s7b?"),
        ([], f"{problem}."),
        ([failed], f"search s7-3 {incomplete} (trials: 1 failed). {another}"),
        ([empty], f"search s7-4 {incomplete} (trials: none). {another}"),
    ):
        with pytest.raises(RecordError) as error:
            find_best(states, space="s7")
        assert str(error.value) == answer
    with pytest.raises(RecordError, match=r"^no finished search on CIFAR-10\.$"):
        find_best([])


def test_find_best_refuses_an_unknown_search_and_a_wrong_space(state: SearchState) -> None:
    unknown = r"`search` must name a recorded search, got 's7-2'\. Did you mean s7-1\?"
    with pytest.raises(RecordError, match=unknown):
        find_best([state], search="s7-2")
    with pytest.raises(RecordError, match=r"search s7-1 must be of space s10, got one of s7\."):
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
    with pytest.raises(RecordError, match="a run id must be NAME:TRIAL such as s10-cpu-1:7, got"):
        find_run(tmp_path, run_id)


def test_find_run_refuses_unknown_searches_and_trials(state: SearchState, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no search named 's7-11' in .*\. Did you mean s7-1\?"):
        find_run(tmp_path, "s7-11:0")
    with pytest.raises(RecordError, match=r"no trial 7 in search s7-1 \(trials: 7\)\."):
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
        with pytest.raises(RecordError, match=f"no search named '{name}' in "):
            load_searches(tmp_path, search=name)
    with pytest.raises(RecordError, match=r"search s7-1 must be of space s10, got one of s7\."):
        load_searches(tmp_path, space="s10", search="s7-1")


def test_a_damaged_record_is_logged_and_hides_no_other(
    state: SearchState, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = write_search(tmp_path, "s7-2", 2, TRIALS)
    path = damaged.folder / "record.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.35", b"0.36").replace(b"0.9", b"0.8"))
    with caplog.at_level(logging.WARNING):
        assert load_searches(tmp_path) == [state]
    assert "left out: " in caplog.text
    assert "s7-2/record.jsonl:" in caplog.text
    with pytest.raises(RecordError, match=r"s7-2/record.jsonl:\d+: damaged line, not JSON"):
        load_searches(tmp_path, search="s7-2")


def test_every_search_is_summarized_in_a_row(tmp_path: Path) -> None:
    trial = make_trial(0, [0.3, 0.5, 0.7], "complete")
    write_search(tmp_path, "whole", 1, [*trial, *make_trial(1, [0.2], "stopped"), SEARCH_FINISHED])
    write_search(tmp_path, "stopped", 2, [*trial, SEARCH_INTERRUPTED], data=SHAPES_INFO)
    write_search(tmp_path, "killed", 3, make_trial(0, [0.3], None), kind="train", tier=None)
    header = make_header("live", created="2026-01-04T12:00:00+00:00")
    with Record.create(tmp_path / "searches" / "live", header):
        rows = list_rows(tmp_path)
    names = [(row.name, row.stage, row.end) for row in rows]
    assert names == [
        ("live", "running", None),
        ("killed", "driver died", None),
        ("stopped", "interrupted", "interrupted"),
        ("whole", "finished", "all trials"),
    ]
    done, killed = rows[3], rows[1]
    assert (done.kind, done.space, done.tier) == ("search", "s7", "full")
    assert done.data == "cifar10"
    assert done.created == "2026-01-01T12:00:00+00:00"
    assert (done.best, done.best_val_acc) == ("whole:0", 0.7)
    none = dict.fromkeys(("running", "diverged", "failed"), 0)
    assert done.counts == none | {"complete": 1, "stopped": 1}
    assert (killed.kind, killed.tier) == ("train", None)
    assert (killed.best, killed.best_val_acc) == (None, None)
    assert done.size_bytes == measure_folder(tmp_path / "searches" / "whole") > 1000


def test_a_damaged_record_is_a_row_with_its_sentence(state: SearchState, tmp_path: Path) -> None:
    """In the middle (its date can be read) and in the header (it comes last)."""
    for day, name, old in ((2, "s7-2", b'"val_acc": 0.9'), (3, "s7-3", b"abc")):
        path = write_search(tmp_path, name, day, TRIALS).folder / "record.jsonl"
        path.write_bytes(path.read_bytes().replace(old, old.upper()))
    middle, sound, header = list_rows(tmp_path)
    assert (sound.name, sound.error) == ("s7-1", None)
    for row, name in ((middle, "s7-2"), (header, "s7-3")):
        assert (row.name, row.stage, row.kind, row.counts) == (name, "damaged", None, None)
        assert row.error is not None and "damaged line, not JSON that fits its CRC" in row.error
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


def test_finding_runs_and_failures_imports_nothing_heavy(
    state: SearchState, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tune_cifar.record.failures import group_failures\n"
        "from tune_cifar.record.store import find_best, find_run, list_rows, load_searches\n"
        "storage = Path(sys.argv[1])\n"
        "find_run(storage, 's7-1:0'), find_best(load_searches(storage), search='s7-1')\n"
        "list_rows(storage), group_failures(load_searches(storage)[0])\n"
        "heavy = {'torch', 'ray', 'mlflow', 'optuna', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr


def test_a_renamed_or_copied_folder_is_no_damaged_one(
    state: SearchState, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(state.folder, state.folder.with_name("copy"))
    write_search(tmp_path, "s7-2", 2, TRIALS).folder.rename(state.folder.with_name("better"))
    rows = {row.name: (row.stage, row.error) for row in list_rows(tmp_path)}
    assert rows["s7-1"] == ("driver died", None)
    assert rows["copy"][0] == rows["better"][0] == "renamed"
    assert "a copy of search s7-1" in str(rows["copy"][1])
    assert str(rows["better"][1]).endswith("Rename the folder back to s7-2.")
    assert [found.header.name for found in load_searches(tmp_path)] == ["s7-1"]
    assert caplog.text.count("left out: ") == 2 and "damaged" not in caplog.text
    with pytest.raises(RecordError, match="Rename the folder back to s7-2"):
        find_run(tmp_path, "better:0")


def test_a_name_that_nobody_chose_is_free_and_fit_for_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.record.store.datetime", StoppedClock)
    for name in ("s7-cpu-20260102-030405", "s7-cpu-20260102-030405-2"):
        assert make_name(tmp_path, "s7-cpu") == name
        search_folder(tmp_path, name).mkdir(parents=True)
    long = make_name(tmp_path, "x" * 64)
    assert long == f"{'x' * 44}-20260102-030405"
    search_folder(tmp_path, long).mkdir()
    assert make_name(tmp_path, "x" * 64) == f"{long}-2"
