"""`make rows`: the plan, the commands, and the table, all from records and the test log."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import rows
import rows_steps
from rows_steps import (
    TOP,
    Queue,
    Step,
    estimate_hours,
    find_commands,
    find_config,
    find_settings,
    find_stage,
)
from rows_table import BEGIN, COLUMNS, END, describe_cell, load_table, render_table, write_page

from tests.builders import CIFAR10, CONFIG, NUMERICS, ROOT, SHAPES_INFO, make_trial, write_record
from tune_cifar import dataset
from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record.events import Confirmation, Event, SearchEnded
from tune_cifar.record.state import INTERRUPTED, SearchState
from tune_cifar.record.test_log import TEST_LOG_COLUMNS, TEST_LOG_FILE, load_test_log
from tune_cifar.schema import TrainConfig
from tune_cifar.space.select import SearchSpace, load_space, parse_setting, read_space
from tune_cifar.train.recorded import make_header
from tune_cifar.verify.confirm import make_confirmation, make_final

read_once = functools.cache(read_space)
PINS = {"epochs": 2}  # for short records; on CIFAR-10 only the command line refuses them
BASELINE = Step("s8", "baseline", 1)
BEST = Step("s8", "best", 1)
SEARCH = Step("s8", "search")
CONFIRM = Step("s8", "confirm")
ONECYCLE = {
    "schedule": "onecycle",
    "max_lr": 0.0123,
    "dropout": 1e-05,
    "cutout_p": 0.0,
    "crop_pad": 4,
}
ENDED = SearchEnded(reason="trained", wall_seconds=1.0)


@pytest.fixture
def queue(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """A queue with two seeds in an empty folder with a page for the table, as if with a GPU."""
    monkeypatch.setattr(rows_steps, "count_gpus", lambda device: 1)
    monkeypatch.delenv("TUNE_CIFAR_DATA", raising=False)
    monkeypatch.setattr("tune_cifar.space.select.read_space", read_once)
    (workplace / "analysis").mkdir()
    page = workplace / "method.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    monkeypatch.setattr(rows, "PAGE", page)
    return Queue(workplace / "runs", seeds=2, pins=PINS)


def write(
    queue: Queue,
    step: Step,
    space: SearchSpace,
    events: list[Event],
    confirmation: Confirmation | None = None,
    name: str | None = None,
) -> SearchState:
    """Write a step's record with these events."""
    kind: Any = "train" if step.seed is not None else step.part
    data = SHAPES_INFO if queue.is_synthetic else CIFAR10
    header = make_header(kind, name or queue.name(step), space, 0, data, NUMERICS, "a test")
    header = header.model_copy(update={"confirmation": confirmation})
    return write_record(queue.storage, header, events)


def train(
    queue: Queue, step: Step, status: str | None = "complete", name: str | None = None
) -> TrainConfig:
    """Write a training's record: two epochs and this status, or one epoch and an interruption."""
    config = find_config(queue, step)
    assert config is not None
    space = load_space(step.space, "full", find_settings(queue, step))
    events = make_trial(0, [None, None] if status else [None], status, config)
    end = SearchEnded(reason="trained" if status else INTERRUPTED, wall_seconds=1.0)
    write(queue, step, space, [*events, end], name=name)
    return config


def log_test(queue: Queue, config: TrainConfig, test_acc: float, run_id: str) -> None:
    """Append a test evaluation to the log."""
    data = queue.data_info
    is_new = not queue.test_log.exists()
    queue.test_log.parent.mkdir(exist_ok=True)
    with queue.test_log.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(TEST_LOG_COLUMNS)
        identity = ("2026-11-22T01:02:03Z", "abc", config.fingerprint, config.seed, run_id)
        writer.writerow([*identity, data.name, 10000, test_acc, 0.5, "a test", data.digest])


def search_and_confirm(
    queue: Queue,
    accs: dict[str, float],
    name: str = "s8",
    tier: str = "full",
    epochs: int | None = None,
) -> tuple[SearchState, SearchState]:
    """Write a finished search of two trials and its confirmation with these last accuracies.

    The trials are the baseline and one with OneCycle, `found`.
    """
    space = load_space(name, tier, queue.pins)
    found = TrainConfig(**{**space.baseline.model_dump(), **ONECYCLE})
    before = [0.2] * (space.baseline.epochs - 1)
    baseline_trial = make_trial(0, [*before, 0.5], "complete", space.baseline)
    found_trial = make_trial(1, [*before, 0.5], "complete", found)
    search = write(queue, Step(name, "search"), space, [*baseline_trial, *found_trial, ENDED])
    confirmed, settled = make_confirmation(search, TOP, queue.seeds, {}, epochs)
    before = [0.2] * (settled.candidates[0].config["epochs"] - 1)
    events: list[Event] = []
    for number in range(settled.num_trials):
        candidate, seed = settled.find(number)
        acc = accs["baseline" if candidate is settled.candidates[0] else "found"]
        config = TrainConfig(**{**candidate.config, "seed": seed})
        events += make_trial(number, [*before, acc], "complete", config)
    return search, write(queue, Step(name, "confirm"), confirmed, [*events, ENDED], settled)


def test_the_queue_takes_the_spaces_in_order_and_trains_the_baseline_before_it_searches() -> None:
    steps = Queue(Path("runs"), seeds=2).list_steps(rows.SPACES)
    assert [step.space for step in steps[::6]] == ["s8", "s7", "s6", "s10", "s10_postact"]
    baselines, bests = [BASELINE, Step("s8", "baseline", 2)], [BEST, Step("s8", "best", 2)]
    assert steps[:6] == [*baselines, SEARCH, CONFIRM, *bests]
    assert len(steps) == 30


def test_stages_follow_from_the_test_log_and_the_records(queue: Queue) -> None:
    assert find_stage(queue, BASELINE) == "not begun"
    config = train(queue, BASELINE)
    assert config.train_size == 50_000 and config.val_size == 0 and config.seed == 1
    assert find_stage(queue, BASELINE) == "unfinished"  # trained, but not tested
    log_test(queue, config, 0.8, "rows-s8-baseline-1:0")
    assert find_stage(queue, BASELINE) == "done"
    for seed, status in enumerate(("diverged", "failed"), 2):
        step = Step("s8", "baseline", seed)
        train(queue, step, status)
        assert find_stage(queue, step) == status
    assert [find_stage(queue, step) for step in (SEARCH, CONFIRM, BEST)] == ["not begun"] * 3


def test_the_plan_shows_the_stages_of_a_row(
    queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    train(queue, BASELINE, None)
    write(queue, SEARCH, load_space("s8", "full", PINS), [])
    rows.say_plan(queue, queue.list_steps(["s8", "s7"]))
    assert capsys.readouterr().out.splitlines() == [
        "the plan:",
        "  s8: baseline 1 unfinished, 1 not begun; search unfinished; "
        "confirm not begun; best 2 not begun",
        "  s7: baseline 2 not begun; search not begun; confirm not begun; best 2 not begun",
    ]


def test_a_record_of_another_recipe_is_not_taken_for_the_step(queue: Queue) -> None:
    train(queue, BASELINE, None)
    rule = r"^rows-s8-baseline-1: the recipe must be that of s8 now, .*, got .*delete"
    with pytest.raises(RecordError, match=rule):
        find_stage(dataclasses.replace(queue, pins={"epochs": 3}), BASELINE)


def test_a_failed_training_ends_the_queue_with_the_way_out(queue: Queue) -> None:
    train(queue, BASELINE, "failed")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    message = r"the training has failed\. See `failures --search rows-s8-baseline-1`"
    try:
        with pytest.raises(RecordError, match=message):
            rows.run(queue, [BASELINE], 1.0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_commands_of_a_new_row_are_the_public_ones(queue: Queue) -> None:
    (words,) = find_commands(queue, SEARCH)
    new = ["--space", "s8", "--tier", "full", "--set", "epochs=2"]
    assert words == ["search", "--name", "rows-s8", *new]
    (words,) = find_commands(queue, CONFIRM)
    assert words == ["confirm", "--search", "rows-s8", "--top", "3", "--seeds", "2"]
    commands = find_commands(queue, BASELINE)
    words = next(commands)
    settings = []
    for setting in ("train_size=50000", "val_size=0", "seed=1", "epochs=2"):
        settings += ["--set", setting]
    assert words[:-1] == [
        *("train", "--space", "s8", "--tier", "full", *settings),
        *("--name", "rows-s8-baseline-1", "--cpus-per-trial"),
    ]
    train(queue, BASELINE)  # as the command would
    assert list(commands) == [["reproduce", "rows-s8-baseline-1:0", "--test", "--no-retrain"]]


def test_without_a_gpu_a_night_searches_and_the_final_trainings_keep_their_length(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials have a third of s8's 40 epochs, the confirmation a quarter, the best all."""
    monkeypatch.setattr(rows_steps, "count_gpus", lambda device: 0)
    queue = dataclasses.replace(queue, pins={})
    (words,) = find_commands(queue, SEARCH)
    assert words == ["search", "--name", "rows-s8", "--space", "s8", "--tier", "night"]
    (words,) = find_commands(queue, CONFIRM)
    assert words[-4:] == ["--seeds", "2", "--epochs", "10"]
    search, confirmation = search_and_confirm(
        queue, {"baseline": 0.5, "found": 0.6}, tier="night", epochs=10
    )
    assert search.header.baseline["epochs"] == 13
    assert confirmation.header.baseline["epochs"] == 10
    config = find_config(queue, BEST)
    assert config is not None
    assert (config.epochs, config.train_size, config.schedule) == (40, 50_000, "onecycle")
    night = load_space("s8", "night").baseline.model_dump()
    wanted = TrainConfig(
        **{**night, **ONECYCLE, **dataset.CIFAR10.all_images, "epochs": 40, "seed": 1}
    )
    assert config.fingerprint == wanted.fingerprint


def test_an_unfinished_step_is_resumed(queue: Queue) -> None:
    train(queue, BASELINE, None)
    write(queue, SEARCH, load_space("s8", "full", PINS), [])
    words = next(find_commands(queue, BASELINE))
    assert words[-3:] == ["--cpus-per-trial", "1", "--resume"]  # the recorded threads
    queue = dataclasses.replace(queue, data="/cifar", accept_changes=True)
    (words,) = find_commands(queue, SEARCH)
    resume = ["--resume", "--accept-changes", "--data", "/cifar"]
    assert words == ["search", "--name", "rows-s8", *resume]


def test_a_diverged_training_is_not_tested(queue: Queue) -> None:
    train(queue, BASELINE, "diverged")
    assert list(find_commands(queue, BASELINE)) == []


def test_the_best_is_trained_as_the_final_confirmation_would(queue: Queue) -> None:
    assert find_config(queue, BEST) is None
    search, confirmation = search_and_confirm(queue, {"baseline": 0.5, "found": 0.6})
    _, final = make_final(search, confirmation, queue.seeds)
    wanted = TrainConfig(**{**final.candidates[1].config, "seed": 1})
    assert (wanted.train_size, wanted.schedule) == (50_000, "onecycle")
    words = next(find_commands(queue, BEST))
    pairs = itertools.pairwise(words)
    settings = dict(parse_setting(setting) for option, setting in pairs if option == "--set")
    assert load_space("s8", "full", settings).baseline.fingerprint == wanted.fingerprint
    assert "rows-s8-best-1" in words
    assert settings["schedule"] == "onecycle" and "cutout_size" not in settings


def test_a_baseline_that_nothing_beat_is_not_trained_again(queue: Queue) -> None:
    search_and_confirm(queue, {"baseline": 0.6, "found": 0.5})
    log_test(queue, train(queue, BASELINE), 0.8, "rows-s8-baseline-1:0")
    assert find_stage(queue, BEST) == "done"
    rows.collect_rows(queue, queue.list_steps(["s8"]))
    table = load_table(queue.table)
    assert [row["part"] for row in table] == ["baseline", "best"]
    assert {row["run_id"] for row in table} == {"rows-s8-baseline-1:0"}
    assert "| the baseline: none that was found was better |" in render_table(table)


def test_a_test_evaluation_is_added_to_the_table_and_the_page_once(queue: Queue) -> None:
    steps = queue.list_steps(["s8"])
    rows.collect_rows(queue, steps)
    assert not queue.table.exists()
    config = train(queue, Step("s8", "baseline", 2))
    log_test(queue, config, 0.8125, "rows-s8-baseline-2:0")
    train(queue, BASELINE, name="by-hand")  # the same training under another name
    log_test(queue, find_config(queue, BASELINE), 0.8, "by-hand:0")  # type: ignore[arg-type]
    rows.collect_rows(queue, steps[1:])
    rows.collect_rows(queue, steps)
    first, second = load_table(queue.table)
    numbers = ("2", "0.8125", "2", "50000", "128", "0.1")
    origin = ("a processor", "fp32", "2026-11-22T01:02:03Z", "rows-s8-baseline-2:0")
    assert tuple(first) == COLUMNS
    assert tuple(first.values()) == ("s8", "baseline", *numbers, *origin, config.fingerprint)
    assert (second["seed"], second["run_id"]) == ("1", "by-hand:0")
    written, text = rows.PAGE.read_text(), queue.table.read_text()
    assert written == f"before\n{BEGIN}\n{render_table([first, second])}\n{END}\nafter\n"
    rows.collect_rows(queue, steps)
    assert (rows.PAGE.read_text(), queue.table.read_text()) == (written, text)


def test_the_committed_test_log_gets_what_the_run_stores_log_has_on_cifar10(queue: Queue) -> None:
    committed = Path("analysis", TEST_LOG_FILE)
    log_test(queue, train(queue, BASELINE), 0.8, "rows-s8-baseline-1:0")
    log_test(dataclasses.replace(queue, data="shapes"), CONFIG, 0.9, "small:0")
    log_test(queue, CONFIG, 0.7, "by-hand:0")
    rows.collect_rows(queue, [BASELINE])
    tested = [(found.run_id, found.test_acc) for found in load_test_log(committed)]
    assert tested == [("rows-s8-baseline-1:0", 0.8), ("by-hand:0", 0.7)]
    before = committed.stat()
    rows.collect_rows(queue, [BASELINE])
    assert committed.stat().st_ino == before.st_ino, "nothing was new"


def test_a_fresh_clone_trains_nothing_that_was_tested_before(queue: Queue) -> None:
    """The committed log alone has it, in the columns of before."""
    config = find_config(queue, BASELINE)
    assert config is not None
    log_test(queue, config, 0.8, "rows-s8-baseline-1:0")
    lines = [line.rsplit(",", 1)[0] for line in queue.test_log.read_text().splitlines()]
    Path("analysis", TEST_LOG_FILE).write_text("\n".join(lines))
    queue.test_log.unlink()
    assert find_stage(queue, BASELINE) == "done"
    assert find_stage(dataclasses.replace(queue, data="shapes"), BASELINE) == "not begun"


def test_the_committed_test_evaluations_are_of_the_trainings_that_the_queue_would_do(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log names trainings by their fingerprints: with others they would be trained again."""
    monkeypatch.delenv("TUNE_CIFAR_DATA", raising=False)
    table = [row for row in load_table(ROOT / "analysis" / "ROWS.csv") if row["part"] == "baseline"]
    assert table
    for row in table:
        config = find_config(Queue(workplace), Step(row["space"], "baseline", int(row["seed"])))
        assert config is not None and config.fingerprint == row["fingerprint"]
    logged = {found.run_id: found for found in load_test_log(ROOT / "analysis" / TEST_LOG_FILE)}
    s10 = load_space("s10", "full").baseline
    assert logged["s10-baseline-24:0"].fingerprint == s10.fingerprint


def test_a_fresh_clone_goes_on_after_the_searches_that_ended_before(queue: Queue) -> None:
    steps = queue.list_steps(["s8"])
    rows.collect_rows(queue, steps)
    assert not Path("analysis", "rows").exists()
    search_and_confirm(queue, {"baseline": 0.5, "found": 0.6})
    settings = find_settings(queue, BEST)
    rows.collect_rows(queue, steps)
    committed = sorted(path.name for path in Path("analysis", "rows").iterdir())
    assert committed == ["rows-s8-confirm.jsonl", "rows-s8.jsonl"]
    shutil.rmtree(queue.storage)
    assert find_stage(queue, SEARCH) == "not begun" and find_settings(queue, BEST) is None
    rows.collect_rows(queue, steps)
    assert find_stage(queue, SEARCH) == find_stage(queue, CONFIRM) == "done"
    assert find_settings(queue, BEST) == settings is not None


def test_a_search_that_goes_on_is_not_committed(queue: Queue) -> None:
    space = load_space("s8", "full", queue.pins)
    write(queue, SEARCH, space, make_trial(0, [0.2], None, space.baseline))
    rows.collect_rows(queue, queue.list_steps(["s8"]))
    assert find_stage(queue, SEARCH) == "unfinished"
    assert not Path("analysis", "rows").exists()


def make_row(test_acc: str, **changes: str) -> dict[str, str]:
    row = {"test_acc": test_acc, "epochs": "40", "minutes": "103.4", "date": "2026-11-21T08:43:59Z"}
    return row | {"hardware": "AMD EPYC", "precision": "bf16"} | changes


def test_a_cell_has_n_and_the_conditions_of_its_measurement() -> None:
    assert describe_cell([]) == "not yet measured"
    measured = [make_row("0.87"), make_row("0.873", minutes="102")]
    conditions = "40 epochs; AMD EPYC, bf16; 103 min each; 2026-11-21"
    assert describe_cell(measured[:1]) == f"87.00 % (n = 1; {conditions})"
    assert describe_cell(measured) == f"87.15 ± 0.21 % (n = 2; {conditions})"
    other = {"hardware": "NVIDIA H200", "minutes": "2", "date": "2026-12-01T01:02:03Z"}
    mixed = describe_cell([*measured, make_row("0.87", **other)])
    machines = "AMD EPYC, bf16 and NVIDIA H200, bf16"
    dates = "2026-11-21 to 2026-12-01"
    assert f"n = 3; 40 epochs; {machines}; 69 min each; {dates}" in mixed


@pytest.mark.parametrize("text", ["", f"{BEGIN}", f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_its_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "method.md"
    path.write_text(text)
    with pytest.raises(ConfigError, match="must be in it, each once"):
        write_page(path, [])
    assert path.read_text() == text


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ROWS.csv").write_text("space,seed\ns8,1\n")
    with pytest.raises(RecordError, match="the columns must be space, part, seed, test_acc"):
        load_table(tmp_path / "ROWS.csv")


def test_the_page_has_what_the_committed_table_says() -> None:
    table = render_table(load_table(ROOT / "analysis" / "ROWS.csv"))
    assert f"{BEGIN}\n{table}\n{END}" in rows.PAGE.read_text(encoding="utf-8")


def test_synthetic_data_has_its_own_names_test_log_and_table(queue: Queue) -> None:
    before = rows.PAGE.read_text()
    synthetic = dataclasses.replace(queue, data="shapes")
    log_test(synthetic, train(synthetic, BASELINE), 0.8, "shapes-rows-s8-baseline-1:0")
    rows.collect_rows(synthetic, [BASELINE])
    assert synthetic.table == queue.storage / "ROWS.csv" and len(load_table(synthetic.table)) == 1
    assert find_stage(queue, BASELINE) == "not begun"
    assert rows.PAGE.read_text() == before and not queue.table.exists()


@pytest.mark.parametrize(
    "given", [{"set": ["epochs=1"]}, {"tier": "cpu"}, {"space": ["smoke"]}, {"seeds": 0}]
)
def test_what_would_make_another_row_is_refused_on_cifar10(
    queue: Queue, given: dict[str, Any]
) -> None:
    usual = {"data": None, "space": [], "seeds": 5, "tier": "full", "set": []}
    usual["accept_changes"] = False
    with pytest.raises(ConfigError, match=r"spaces must be|seeds >= 1 must hold"):
        rows.make_queue(argparse.Namespace(**{**usual, **given}))
    assert rows.make_queue(argparse.Namespace(**{**usual, "space": ["s8"]})).seeds == 5


def test_what_is_left_is_estimated_from_the_trainings_so_far(queue: Queue) -> None:
    steps = queue.list_steps(["s8"])
    assert estimate_hours(queue, steps) is None
    train(queue, BASELINE, None)  # one epoch of two, in 2 s
    per_search = 100 * 2  # trials x epochs: --set leaves a single rung
    expected = 2 * (1 + 2 + per_search + 4 * 2 * 2 + 2 * 2) / 3600
    assert estimate_hours(queue, steps) == pytest.approx(expected)


@pytest.mark.faults  # for it takes minutes
@pytest.mark.slow
def test_a_stopped_queue_is_resumed_and_trains_nothing_twice(workplace: Path) -> None:
    """In its own process, on synthetic data, without Ray.

    The records of search and confirmation exist already; the baseline is the best.
    """
    pins = {"epochs": 3, "train_size": 400, "val_size": 100}
    queue = Queue(workplace / "runs", seeds=1, data="shapes", pins=pins)
    search_and_confirm(queue, {"baseline": 0.6, "found": 0.5}, "smoke")
    words = ["--data", "shapes", "--space", "smoke", "--seeds", "1"]
    words += [f"--set={name}={value}" for name, value in pins.items()]
    command = [sys.executable, str(ROOT / "benchmarks" / "rows.py"), "run", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def launch(last_line: str = "never said") -> tuple[int, str]:
        """Run the queue, with Ctrl-C after this line; returns its exit status and its output."""
        said = []
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            process_group=0,
        )
        with process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    said.append(line)
                    if line.startswith(last_line):
                        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
                return process.wait(), "".join(said)
            finally:
                process.terminate()

    status, answer = launch("run shapes-rows-smoke-baseline-1")
    assert status == 130, answer
    assert "interrupted; resume with:\n  make rows ARGS='--data shapes --space smoke" in answer
    assert find_stage(queue, Step("smoke", "baseline", 1)) == "unfinished"
    assert not queue.table.exists()
    status, answer = launch()
    assert status == 0 and "nothing is left to do" in answer, answer
    commands = [line.split()[4] for line in answer.splitlines() if line.startswith("$ ")]
    assert commands == ["train", "reproduce"]
    tested = [(row["part"], row["run_id"]) for row in load_table(queue.table)]
    assert tested == [(part, "shapes-rows-smoke-baseline-1:0") for part in ("baseline", "best")]
    assert {find_stage(queue, step) for step in queue.list_steps(["smoke"])} == {"done"}
