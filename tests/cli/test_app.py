"""The command line: help, JSON, a sentence for mistakes, and a training from start to end."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from typer.testing import Result

from tests.builders import (
    COMMANDS,
    CONFIG,
    EVENTS,
    NUMERICS,
    ROOT,
    SHAPES,
    TINY_SETTINGS,
    invoke,
    make_header,
    make_result,
    make_stages_driver,
    make_start,
    make_train_words,
    make_trial,
    refuse,
    run_in_a_process,
    simulate_search,
    write_record,
)
from tune_cifar.cli.app import run
from tune_cifar.cli.plan import Limits, _print_plan, choose_space
from tune_cifar.cli.summary import make_trial_table, print_search_summary
from tune_cifar.cli.terminal import name_options
from tune_cifar.data.files import FILES, DataSource
from tune_cifar.errors import (
    ConfigError,
    DataError,
    RecordError,
    SpaceError,
    TrackingError,
    TuneCifarError,
)
from tune_cifar.record.events import NodeChanged, Stage, TrialPlaced
from tune_cifar.record.journal import read_state
from tune_cifar.record.store import search_folder
from tune_cifar.schema import Numerics
from tune_cifar.search.plan import SearchRequest, settle_search
from tune_cifar.space.layout import SpaceFile
from tune_cifar.space.select import load_space, parse_setting, read_space, select_tier

EXAMPLE = re.compile(r"^Example: python -m tune_cifar (.*)$", re.MULTILINE)


def test_the_commands_are_those_of_the_readme() -> None:
    assert set(COMMANDS) >= {"search", "train", "lr-range", "confirm", "reproduce", "evaluate"}
    assert set(COMMANDS) >= {"leaderboard", "ui", "models", "preview", "plan", "report", "export"}
    assert set(COMMANDS) >= {"spaces list", "spaces show", "spaces check"}
    assert set(COMMANDS) >= {"data fetch", "data verify"}


def test_the_help_groups_the_commands_and_shows_the_most_needed_options_of_search_first() -> None:
    text = invoke("--help").stdout
    panels = ["Search", "Look", "Verify", "Spaces and data", "Maintenance"]
    places = [text.index(f"─ {panel} ─") for panel in panels]
    assert places == sorted(places) and " judge " not in text
    first = invoke("search", "--help").stdout.split("─ Hardware ─")[0]
    assert re.findall(r"│ [* ]*(--[a-z-]+)", first.split("─ Options ─")[1]) == [
        *("--space", "--tier", "--trials", "--max-time", "--set", "--name", "--resume"),
        *("--data", "--device", "--gpus-per-trial", "--help"),
    ]


def test_the_old_name_of_evaluate_still_works_and_says_so(workplace: Path) -> None:
    answer = invoke("judge", "x:0")
    assert "`judge` is called `evaluate` now" in answer.stderr
    assert isinstance(answer.exception, RecordError)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(name: str) -> None:
    answer = invoke(*name.split(), "--help")
    assert answer.exit_code == 0 and f"Example: python -m tune_cifar {name}" in " ".join(
        answer.stdout.split()
    )
    (example,) = EXAMPLE.findall(COMMANDS[name].help or "")
    words = shlex.split(example)[len(name.split()) :]
    COMMANDS[name].make_context(name, words)  # raises for an unknown option or a missing argument


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_says_what_it_is(name: str) -> None:
    silent = [
        parameter.name
        for parameter in COMMANDS[name].params
        if not getattr(parameter, "help", None)
    ]
    assert silent == []


def test_no_command_shows_the_help_and_a_wrong_one_is_wrong_usage() -> None:
    assert "search" in invoke().output and "leaderboard" in invoke().output
    assert invoke("serach").exit_code == 2
    assert invoke("train", "--space", "smoke", "--colour").exit_code == 2
    assert invoke("train").exit_code == 2


MISTAKES: list[tuple[str, type[TuneCifarError], str]] = [
    (
        "train --space smok",
        SpaceError,
        "no search space named 'smok'. Did you mean smoke?",
    ),
    (
        "search --space s77",
        SpaceError,
        "no search space named 's77'. Did you mean s7?",
    ),
    (
        "search --space s7 --max-time 8x",
        ConfigError,
        "a time such as 90s, 8m or 1h30m, got '8x'.",
    ),
    (
        "search --space s7 --trials 0",
        ConfigError,
        "`trials` must be a whole number >= 1, got '0'.",
    ),
    (
        "plan --space s77",
        SpaceError,
        "no search space named 's77'. Did you mean s7?",
    ),
    (
        "plan --space s7 --trials +5",
        ConfigError,
        "`trials` must be a whole number >= 1, got '+5'.",
    ),
    (
        "plan --space s7 --device cpu --gpus-per-trial 1",
        ConfigError,
        "`gpus_per_trial` must be 0 on a CPU, got 1.",
    ),
    ("plan --space s7 --trials 100001", ConfigError, "`trials` <= 100000 must hold, got 100001."),
    (
        "plan --space s7 --data shapes --seed -1",
        ConfigError,
        "`seed` must be 0 to 2147483647, got -1.",
    ),
    (
        "train --space s7 --set seed=99999999999",
        ConfigError,
        "`settings`: seed <= 2147483647 must hold, got 99999999999.",
    ),
    ("spaces show s11", SpaceError, "no search space named 's11'."),
    (
        "spaces check no/such.yaml",
        SpaceError,
        "no/such.yaml: no such space file.",
    ),
    (
        "train --space s7 --set maxlr=1",
        ConfigError,
        "`settings`: 'maxlr' is not a known knob. Did you mean max_lr?",
    ),
    (
        "train --space s7 --set max_lr",
        ConfigError,
        "`settings` must be NAME=VALUE, got 'max_lr'.",
    ),
    ("train --space s7 --set max_lr=-1", ConfigError, "`settings`: max_lr > 0 must hold, got -1"),
    ("train --space s7 --set epochs=many", ConfigError, "`settings`: epochs"),
    (
        "train --space s7 --tier ful",
        SpaceError,
        "`tier` must be full, cpu or night, got 'ful'. Did you mean full?",
    ),
    (
        "train --space s7 --device tpu",
        ConfigError,
        "`device` must be auto, cpu or cuda, got 'tpu'.",
    ),
    (
        "train --space s7 --precision fp8",
        ConfigError,
        "`precision` must be auto, fp32, tf32 or bf16, got 'fp8'.",
    ),
    ("train --space s7 --resume", ConfigError, "`resume=True` needs `name`, got none."),
    ("train --space s7 --name ../x", RecordError, "a search's name must have 1 to 64 of"),
    (
        "lr-range --space s7 --set max_lr=1",
        ConfigError,
        "--set: the sweep sets max_lr, got 1.0.",
    ),
    (
        "lr-range --space s7 --set schedule=step",
        ConfigError,
        "--set: the sweep sets schedule, got step.",
    ),
    (
        "lr-range --space s7 --set pct_start=0.2",
        ConfigError,
        "`settings`: pct_start has no effect here",
    ),
    ("lr-range --space s7 --low 0", ConfigError, "`low` > 0 must hold, got 0.0."),
    ("lr-range --space s7 --high 1e3", ConfigError, "`high` <= 100 must hold, got 1000.0."),
    (
        "lr-range --space s7 --low 2",
        ConfigError,
        "`low` must be at most a tenth of `high`, got 2 and 10.",
    ),
    (
        "lr-range --space s7 --steps 30",
        ConfigError,
        "`steps` must be at least 35 from 1e-06 to 10 (5 a decade), got",
    ),
    (
        "lr-range --space s7 --out /proc/x",
        ConfigError,
        "/proc/x: the test's folder must be writable, got",
    ),
    (
        "lr-range --space s7 --write --set dropout=0",
        ConfigError,
        "--write: the file's own recipe must be swept, got",
    ),
    ("models s9", ConfigError, "no model named 's9'."),
    ("preview --space s7 --out no/x.png", ConfigError, "--out: the folder must be there, got no."),
    ("preview --space s7 --out .", ConfigError, "--out: a file must be given, got the folder ."),
    (
        "preview --space s7 --out x.bmp",
        ConfigError,
        "--out: x.bmp cannot be written: Format 'bmp' is not supported (supported formats: ",
    ),
    (
        "preview --space s7 --out /proc/x.png",
        ConfigError,
        "--out: /proc/x.png cannot be written: ",
    ),
    ("leaderboard --search x", RecordError, "no search named 'x' in "),
    (
        "leaderboard --space s1O",
        RecordError,
        "`space` must name a search space, got 's1O'. Did you mean s10?",
    ),
    (
        "ui",
        TrackingError,
        "mlflow.db: there is no MLflow database. Run a search first",
    ),
]


@pytest.mark.parametrize(
    ("command", "kind", "sentence"), MISTAKES, ids=[command for command, _, _ in MISTAKES]
)
@pytest.mark.usefixtures("workplace")
def test_a_mistake_is_answered_in_one_sentence(
    command: str, kind: type[TuneCifarError], sentence: str
) -> None:
    needs_data = command.split()[0] in ("train", "search", "preview", "lr-range", "plan")
    assert sentence in refuse(kind, *command.split(), *(["--data", "shapes"] if needs_data else []))


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("lr-range --space s7 --seeds 0", "Invalid value for '--seeds'"),
        ("reproduce x:3 --search y", "Give a run id, or --best with --space or --search."),
        ("reproduce x:3 --space y", "Give a run id, or --best with --space or --search."),
        ("reproduce x:3 --tracking-uri sqlite:///x", "--tracking-uri belongs to --test."),
        ("spaces new wide.py:Wide --data shapes", "--data belongs to --measure."),
        (
            "search --space s7 --data nowhere --warm-trials 3",
            "--warm-trials belongs to --warm-start.",
        ),
        (
            "search --space s7 --data nowhere --warm-start x --learn --warm-trials 3",
            "--warm-trials is for --warm-start without --learn.",
        ),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_an_option_that_would_be_ignored_is_wrong_usage(command: str, sentence: str) -> None:
    answer = invoke(*command.split())
    assert answer.exit_code == 2
    assert sentence in " ".join(answer.stderr.replace("│", "").split())


@pytest.mark.parametrize("command", ["train", "preview", "search", "lr-range", "plan"])
def test_missing_data_are_refused_with_every_way_out(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.delenv("TUNE_CIFAR_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    sentence = refuse(DataError, command, "--space", "smoke")
    assert "data fetch" in sentence and "`data='shapes'`" in sentence
    assert "TUNE_CIFAR_DATA" in sentence


def test_main_shows_our_errors_as_one_line_and_exits_with_1(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = workplace / "[red]bad.yaml"  # brackets are no markup
    bad.write_text("space: bad\n")
    monkeypatch.setattr(sys, "argv", ["tune_cifar", "spaces", "check", str(bad)])
    with pytest.raises(SystemExit) as caught:
        run()
    out, err = capsys.readouterr()
    assert caught.value.code == 1 and out == ""
    assert err.startswith("error ") and "[red]bad.yaml" in err and err.count("\n") == 1


def test_a_mistake_in_a_process_is_one_line_on_stderr_without_a_traceback(workplace: Path) -> None:
    (workplace / "bad.yaml").write_text(
        (ROOT / "search_spaces" / "s7.yaml").read_text() + "colour: red\n"
    )
    answer = run_in_a_process("spaces", "check", "bad.yaml")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert re.fullmatch(r"error bad\.yaml:\d+: .*colour.*\n", answer.stderr)


@pytest.mark.slow
def test_completion_knows_commands_and_spaces(workplace: Path) -> None:
    script = Path(sys.executable).with_name("tune_cifar")
    if not script.exists():
        pytest.skip("the console script is not installed beside this Python")

    def complete(line: str) -> list[str]:
        """What the shell offers for the last word of the line, which may be empty."""
        words = {
            "_TUNE_CIFAR_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(line.count(" ")),
        }
        answer = subprocess.run(
            [script], capture_output=True, text=True, env=os.environ | words, timeout=60
        )
        return answer.stdout.split()

    assert set(complete("tune_cifar ")) >= {"search", "train", "reproduce", "spaces"}
    assert complete("tune_cifar search --space s1") == ["s10", "s10_postact"]
    assert "s7" in complete("tune_cifar spaces show ")


# Looking


@pytest.mark.usefixtures("workplace")
def test_spaces_are_listed_shown_and_checked() -> None:
    names = ["s6", "s7", "s8", "s10", "s10_postact", "smoke"]
    listed = json.loads(invoke("spaces", "list", "--json").stdout)
    assert [header["space"] for header in listed] == names
    lines = invoke("spaces", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:] if line[:3].strip()] == names
    shown = json.loads(invoke("spaces", "show", "s10", "--tier", "cpu", "--json").stdout)
    assert (
        shown["tier"] == "cpu"
        and shown["baseline"]["model"] == "s10"
        and "max_lr" in shown["search"]
    )
    text = invoke("spaces", "show", "s10", "--tier", "cpu").stdout
    assert "corrects: " in text and "budget: " in text and "max_lr" in text
    for name in names:
        answer = invoke("spaces", "check", name)
        assert (
            answer.exit_code == 0
            and "sound (" in answer.stdout
            and "knobs in tier cpu" in answer.stdout
        )


TINY = """
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, num_classes: int):
        super().__init__(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, num_classes))
"""


@pytest.mark.slow
def test_a_new_space_takes_its_max_lr_from_an_lr_range_test(workplace: Path) -> None:
    Path("tiny.py").write_text(TINY)
    answer = invoke("spaces", "new", "tiny.py:Tiny", "--measure", "--data", "shapes")
    assert answer.exit_code == 0, answer.output
    Path("tiny.yaml").write_text(answer.stdout)
    max_lr = select_tier(read_space(Path("tiny.yaml")), "full").baseline.max_lr
    assert max_lr != 0.1 and 1e-3 < max_lr < 1
    assert f"suggestion: max_lr {max_lr:.2e}" in answer.stderr
    assert invoke("spaces", "check", "tiny.yaml").exit_code == 0


def test_models_as_json_has_exactly_the_promised_keys() -> None:
    summary = json.loads(invoke("models", "s7", "--json").stdout)
    assert set(summary) == {"name", "params", "macs", "receptive_field", "layers"}
    assert (summary["name"], summary["params"], summary["receptive_field"]) == ("s7", 86_816, 83)
    assert summary["layers"][-1]["output_shape"] == [10]


def test_models_prints_a_row_per_layer_and_the_sums() -> None:
    lines = invoke("models", "s7").stdout.splitlines()
    layers = json.loads(invoke("models", "s7", "--json").stdout)["layers"]
    assert [line.split()[0] for line in lines[1:] if line.strip()] == [
        *(row["name"] for row in layers),
        "s7",
    ]
    assert "86,816" in lines[-1] and lines[-1].split()[-1] == "83"


@pytest.mark.slow
def test_preview_writes_a_png_and_says_where(workplace: Path) -> None:
    answer = invoke("preview", "--space", "smoke", "--data", "shapes")
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == "preview-smoke.png\n"
    content = (workplace / "preview-smoke.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 20_000
    answer = invoke("preview", "--space", "smoke", "--data", "shapes", "--out", "pictures")
    assert answer.stdout == "pictures.png\n" and Path("pictures.png").exists()


def test_leaderboard_of_an_empty_store_says_how_to_begin(workplace: Path) -> None:
    answer = invoke("leaderboard")
    assert (
        answer.stdout
        == "No trial is recorded yet. Start with: python -m tune_cifar search --space smoke\n"
    )
    assert json.loads(invoke("leaderboard", "--json").stdout) == []


def test_leaderboard_shows_the_best_first_as_table_json_and_csv(workplace: Path) -> None:
    write_record(workplace / "runs", make_header(), EVENTS)
    text = invoke("leaderboard", "--search", "s7-1", "--top", "2").stdout
    assert (
        "3 epochs of 500 images, 100 to validate" in text
        and "... and 4 more (--top, --csv)" in text
    )
    rows = [line.split()[0] for line in text.splitlines() if line.startswith(" s7-1:")]
    assert rows == ["s7-1:4", "s7-1:0"]
    trials = json.loads(invoke("leaderboard", "--json").stdout)
    assert {row["run_id"]: row["status"] for row in trials}["s7-1:2"] == "diverged" and len(
        trials
    ) == 6
    wanted = {
        "search",
        "trial",
        "run_id",
        "status",
        "epochs_done",
        "val_acc",
        "fingerprint",
        "max_lr",
        "dropout",
    }
    assert wanted <= set(trials[0])
    assert (
        invoke("leaderboard", "--csv").stdout.splitlines()[0].split(",")[:2] == list(trials[0])[:2]
    )


def test_leaderboard_as_json_is_exact_and_has_null_for_what_is_missing(workplace: Path) -> None:
    config = CONFIG.model_copy(update={"max_lr": 2.345678901234567e-4, "cutout_size": 7})
    events = [*make_trial(0, [0.1, 1 / 3], None, config), make_start(1)]
    write_record(workplace / "runs", make_header(), events)
    first, second = json.loads(invoke("leaderboard", "--json").stdout)
    assert (first["max_lr"], first["val_acc"]) == (2.345678901234567e-4, 1 / 3)
    whole = (first["epochs_done"], first["train_size"], first["nesterov"])
    assert [(type(value), value) for value in whole] == [(int, 2), (int, 500), (bool, False)]
    assert first["score"] is first["node"] is first["cutout_size"] is second["val_acc"] is None


def test_leaderboard_stands_beside_a_search_of_an_own_network_without_a_trial(
    workplace: Path,
) -> None:
    write_record(workplace / "runs", make_header(), EVENTS)
    own = make_header("own", distributions={"model_args.width": "{}"})
    write_record(workplace / "runs", own, [])
    answer = invoke("leaderboard")
    assert answer.exit_code == 0 and "s7-1:4" in answer.stdout, answer.exception


def test_leaderboard_leaves_the_node_empty_where_a_trial_has_none(workplace: Path) -> None:
    node = NodeChanged(node="first", status="joined", address="10.0.0.1", numerics=NUMERICS)
    placed = TrialPlaced(trial=0, node="first", attempt=1)
    start, *rest = make_trial(0, [0.3, 0.5, 0.7], "complete")
    events = [node, start, placed, *rest, make_start(1)]
    write_record(workplace / "runs", make_header(), events)
    rows = [line.split() for line in invoke("leaderboard").stdout.splitlines()]
    assert ["s7-1:0", "complete", "first", "3", "70.00", "%"] in rows
    assert ["s7-1:1", "running", "0", "-"] in rows


def test_inactive_knobs_are_empty_in_leaderboard_and_summary(workplace: Path) -> None:
    state = simulate_search(workplace / "runs", 30, name="s8")
    trials = {row["run_id"]: row for row in json.loads(invoke("leaderboard", "--json").stdout)}
    rows = [line.split() for line in invoke("leaderboard", "--top", "30").stdout.splitlines()]
    header = next(row for row in rows if row[:1] == ["run"])
    assert header[-6:] == list(state.header.distributions)
    for trial in state.trials.values():
        row = next(row for row in rows if row[:1] == [trial.run_id])
        is_constant = trial.full_config.schedule == "constant"
        assert len(row) == (8 if is_constant else 11), "val_acc has a blank before its sign"
        assert (trials[trial.run_id]["pct_start"] is None) == is_constant
    best = state.best
    assert best is not None
    buffer = io.StringIO()
    console = Console(file=buffer, width=100)
    print_search_summary(console, state, [], [])
    lines = [line.split() for line in buffer.getvalue().splitlines()]
    (row,) = (line for line in lines if line[:1] == ["pct_start"])
    assert len(row) == (1 if best.config.schedule == "constant" else 2), "not the baseline's"
    table = make_trial_table(state, list(state.trials.values()))
    cells = list(table.columns[-1].cells)
    assert table.columns[-1].header == "pct_start" and cells[0] == ""
    assert [cell == "" for cell in cells] == [
        trial.full_config.schedule == "constant" for trial in state.trials.values()
    ]


def test_tables_show_the_mean_of_replicates(workplace: Path, fp32: Numerics) -> None:
    driver = make_stages_driver(workplace / "runs", fp32, replicates=2)
    driver.ask()
    for stage in ((1, 0), (2, 0), (3, 0), (3, 1)):
        for epoch in range(1, stage[0] + 1):
            driver.report(0, Stage(*stage), make_result(epoch, 0.5 + stage[1] / 5))
    driver.ask()
    driver.finish()
    driver.record.close()
    state = driver.record.state
    assert "60.00%" in invoke("leaderboard").stdout.replace(" %", "%")
    table = make_trial_table(state, list(state.trials.values()))
    assert next(iter(table.columns[2].cells)) == "3/3, seed 2 of 2"
    assert next(iter(table.columns[3].cells)) == "60.00 %"
    buffer = io.StringIO()
    print_search_summary(Console(file=buffer, width=200), state, [], [])
    assert "val_acc 60.00 % after 3 epochs, mean of 2 seeds" in buffer.getvalue()


def test_leaderboard_keeps_the_stand_in_apart_and_names_it(workplace: Path) -> None:
    write_record(workplace / "runs", make_header(), EVENTS)
    info = make_header().data.model_copy(update={"name": "shapes"})
    write_record(workplace / "runs", make_header("s7-2", data=info), EVENTS)
    titles = [line for line in invoke("leaderboard").stdout.splitlines() if "to validate" in line]
    assert len(titles) == 2 and titles[1].startswith(
        "NOT CIFAR-10 (shapes), 3 epochs of 500 images"
    )


@pytest.mark.slow
@pytest.mark.real_data
def test_data_verify_proves_every_file(cifar10: DataSource) -> None:
    answer = invoke("data", "verify", "--data", str(cifar10.folder), "--json")
    checks = json.loads(answer.stdout)
    assert answer.exit_code == 0 and [check["name"] for check in checks] == list(FILES)
    assert all(
        check["problem"] is None and check["found_md5"] == check["expected_md5"] for check in checks
    )


def test_data_verify_exits_with_1_for_a_wrong_file_and_shows_brackets_as_they_are(
    workplace: Path,
) -> None:
    folder = workplace / "[/data]" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(b"no")
    answer = invoke("data", "verify", "--data", str(folder.parent))
    assert answer.exit_code == 1 and answer.stdout.count("the file must have") == len(FILES)


@pytest.mark.usefixtures("workplace")
def test_data_verify_of_the_stand_in_says_that_it_has_no_files() -> None:
    answer = invoke("data", "verify", "--data", "shapes")
    assert answer.exit_code == 0
    assert answer.stdout == "Synthetic data are generated: they have no files.\n"
    assert json.loads(invoke("data", "verify", "--data", "shapes", "--json").stdout) == []


# Planning


PLAN = [
    "plan",
    "--space",
    "smoke",
    "--tier",
    "cpu",
    "--data",
    "shapes",
    "--device",
    "cpu",
    *TINY_SETTINGS,
    "--set=pct_start=0.9",
]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imports Ray now gets an ImportError."""
    monkeypatch.delitem(sys.modules, "tune_cifar.search.run", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.usefixtures("without_ray")
def test_plan_tells_rungs_epochs_time_disk_and_the_search_and_leaves_nothing_behind(
    workplace: Path,
) -> None:
    answer = invoke(*PLAN, "--trials", "9", "--max-concurrent", "1")
    assert answer.exit_code == 0, answer.output
    assert "NOT CIFAR-10" in answer.stdout and not list(workplace.iterdir())
    lines = [line.strip() for line in answer.stdout.splitlines()]
    (title,) = [
        line for line in lines if line.startswith("smoke (cpu): 9 trials, rungs at 1, 3 epochs")
    ]
    assert "reduction factor 2" in title and "at most 10 min" in title
    assert [
        line.split()[:2] for line in lines if re.match(r"\d epochs? +\d+\.\d of 9\.0", line)
    ] == [
        ["1", "epoch"],
        ["3", "epochs"],
    ]
    (cost,) = [line for line in lines if "An epoch of the baseline takes about" in line]
    assert cost.startswith("1 at once on ") and "; a trial holds " in cost
    epochs = re.search(r"trial-epochs +(\d+) +(\d+) to (\d+)", answer.stdout)
    assert epochs is not None
    mean, low, high = map(int, epochs.groups())
    assert 12 <= low <= mean <= high <= 9 * 4
    assert re.search(r"wall time +\d:\d\d:\d\d +\d:\d\d:\d\d to \d:\d\d:\d\d", answer.stdout)
    assert re.search(r"disk: at most \d+ MB \(checkpoints \d+ MB, weights ", answer.stdout)
    words = shlex.split(lines[-1])
    assert words[:4] == ["python", "-m", "tune_cifar", "search"] and words[4:-4] == PLAN[1:]
    assert words[-4:] == ["--trials", "9", "--max-concurrent", "1"]
    COMMANDS["search"].make_context("search", words[4:])  # raises for an unknown option


@pytest.mark.usefixtures("without_ray", "workplace")
def test_plan_as_json_has_exactly_the_promised_keys() -> None:
    answer = invoke(*PLAN, "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert set(found) == {
        *(
            "space",
            "tier",
            "data",
            "device",
            "precision",
            "cpus_per_trial",
            "gpus_per_trial",
            "max_concurrent",
        ),
        *(
            "budget",
            "epoch_seconds",
            "memory_mb",
            "rungs",
            "trials",
            "trial_epochs",
            "wall_seconds",
            "nodes",
            "disk_bytes",
        ),
        "command",
    }
    assert [rung["epochs"] for rung in found["rungs"]] == [1, 3] and found["rungs"][0][
        "trials"
    ] == 4.0
    assert set(found["trial_epochs"]) == set(found["wall_seconds"]) == {"mean", "low", "high"}
    assert found["trials"]["complete"] == found["rungs"][1]["trials"]
    assert found["disk_bytes"]["total"] == sum(
        found["disk_bytes"][part] for part in ("checkpoints", "weights", "records")
    )
    assert (found["data"], found["gpus_per_trial"]) == ("shapes", 0.0) and "--json" not in found[
        "command"
    ]


def test_the_space_of_a_named_tier_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def read(name: str) -> SpaceFile:
        names.append(name)
        return read_space(name)

    monkeypatch.setattr("tune_cifar.space.select.read_space", read)
    choose_space(SearchRequest(SHAPES, tmp_path, "test"), "smoke", "cpu", [], Limits("3", None))
    assert names == ["smoke"]


def test_the_command_that_plan_shows_is_never_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, whose lines are short."""
    space = load_space("smoke", "cpu", dict(parse_setting(word[6:]) for word in PLAN[-5:]))
    command = "python -m tune_cifar " + shlex.join(PLAN)
    settled = settle_search(space, SearchRequest(SHAPES, Path("runs"), command, device="cpu"))
    console = Console(file=io.StringIO(), width=40, force_terminal=True, no_color=True)
    for module in ("terminal", "plan"):
        monkeypatch.setattr(f"tune_cifar.cli.{module}.stdout", lambda: console)
    _print_plan(settled)
    assert console.file.getvalue().endswith(f"start it with:\n  {command}\n")  # type: ignore[attr-defined]


# Training


def paste(line: str) -> Result:
    """Run a command that another one printed."""
    words = shlex.split(line.strip().removeprefix("next: "))
    assert words[:3] == ["python", "-m", "tune_cifar"]
    return invoke(*words[3:])


def test_train_tells_its_epochs_survives_a_dead_tracking_store_and_names_a_next_command_that_works(
    workplace: Path,
) -> None:
    storage = workplace / "my runs"
    answer = invoke(*make_train_words(workplace, "t", "--storage", str(storage)))
    assert answer.exit_code == 0, answer.output
    state = read_state(search_folder(storage, "t"))
    assert state.trials[0].status == "complete" and state.header.command.startswith(
        "python -m tune_cifar train --space"
    )
    lines = answer.stdout.splitlines()
    assert "NOT CIFAR-10" in answer.stdout
    assert f"run t:0, fingerprint {state.trials[0].fingerprint}" in lines
    assert (
        len([line for line in lines if re.match(r"epoch \d: train_loss .* \(shapes\)$", line)]) == 3
    )
    (fault,) = [
        line
        for line in lines
        if line.startswith("MLflow upload incomplete, 2 left over: TrackingError: ")
    ]
    assert ": unable to open database file. The record is complete. Upload the rest: " in fault
    assert lines[-2] == f"t:0: complete, val_acc {100 * (state.trials[0].val_acc or 0):.2f} %"
    again = paste(lines[-1])
    assert again.exit_code == 0 and "identical over 3 epochs" in again.stdout


def test_train_of_a_diverging_configuration_says_so(workplace: Path) -> None:
    explode = [
        f"--set={setting}"
        for setting in ("schedule=constant", "max_lr=2.0", "weight_decay=1.0", "epochs=30")
    ]
    answer = invoke(*make_train_words(workplace, "t", "--set=train_size=60", *explode))
    assert answer.exit_code == 0, answer.output
    assert re.search(
        r"t:0: diverged, .* \(training: the loss must be finite, got nan or inf at epoch 2, ",
        answer.stdout,
    )


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_the_printed_command_goes_on_to_the_same_curve(
    workplace: Path,
) -> None:
    """A real SIGINT, sent when the second epoch is recorded."""
    folder = search_folder(workplace / "runs", "t")
    over = threading.Event()

    def press_ctrl_c() -> None:
        while not over.wait(0.005):
            if folder.exists() and b'"epoch": 2' in (folder / "record.jsonl").read_bytes():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    try:
        answer = invoke(*make_train_words(workplace, "t", "--set=epochs=20"))
    finally:
        over.set()
        thread.join()
    assert answer.exit_code == 130, answer.output
    lines = answer.stdout.splitlines()
    assert lines[-2] == "interrupted; continue it with:"
    assert lines[-1].startswith("  python -m tune_cifar search --name t --resume --data shapes")
    assert f" --tracking-uri sqlite:///{workplace}/no/such/folder/mlflow.db" in lines[-1]
    assert 2 <= read_state(folder).trials[0].epochs_done < 20
    assert paste(lines[-1]).exit_code == 0
    resumed = read_state(folder).trials[0]
    assert (resumed.status, resumed.epochs_done) == ("complete", 20)
    assert paste("python -m tune_cifar reproduce t:0").exit_code == 0


@pytest.mark.usefixtures("storage")
def test_search_resume_tells_of_a_finished_training_what_it_found() -> None:
    answer = invoke("search", "--name", "small", "--resume")
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.startswith("small:0: complete, val_acc ")
    answer = invoke("search", "--name", "small", "--resume", "--trials", "5")
    assert answer.exit_code == 2 and "--trials" in answer.stderr


@pytest.mark.slow
def test_ui_answers_on_loopback_and_ends_with_ctrl_c(workplace: Path) -> None:
    """The whole command in a process of its own, with the store that a training left."""
    from urllib.request import urlopen

    words = make_train_words(workplace, "t")[:-2]  # with the default store
    answer = run_in_a_process(*words)
    assert answer.returncode == 0 and "MLflow upload" not in answer.stdout, (
        answer.stdout + answer.stderr
    )
    command = [sys.executable, "-m", "tune_cifar", "ui"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"MLflow UI: (http://127\.0\.0\.1:\d+)  \(Ctrl-C ends it\)\n", line)
        assert found is not None, line
        with urlopen(found[1], timeout=120) as page:
            assert page.status == 200 and b"<title>MLflow" in page.read()
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 1
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(120) == 0
        assert psutil.wait_procs(started, timeout=60)[1] == []
        with pytest.raises(OSError, match="refused"):
            urlopen(found[1], timeout=5)
    finally:
        process.terminate()  # ends the UI too
        process.communicate(timeout=120)


@pytest.mark.parametrize(
    "sentence, shown",
    [
        ("`max_concurrent` >= 1 must hold, got 0.", "--max-concurrent >= 1 must hold, got 0."),
        ("No GPU here. Use `device='cpu'`.", "No GPU here. Use --device cpu."),
        ("Or give `accept_changes=True`.", "Or give --accept-changes."),
        ("`settings`: no value", "--set: no value"),
        (
            "`val_acc` is no option, `leaderboard` neither",
            "`val_acc` is no option, `leaderboard` neither",
        ),
    ],
)
def test_the_command_line_names_the_option_of_a_parameter(sentence: str, shown: str) -> None:
    assert name_options(sentence) == shown
