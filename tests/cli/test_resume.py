"""The same command again with --resume: equal options are accepted, one that differs is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from tests import builders
from tests.builders import (
    COMMANDS,
    NUMERICS,
    SEARCH_FINISHED,
    SEARCH_INTERRUPTED,
    SHAPES,
    SHAPES_INFO,
    interrupt_small,
    invoke,
    make_space,
    make_trial,
    refuse,
    run_in_a_process,
    write_record,
)
from tune_cifar.cli.confirm import _finish
from tune_cifar.cli.search import choose_keep_weights
from tune_cifar.data.load import load_train_val
from tune_cifar.errors import ConfigError, SpaceError
from tune_cifar.record.environment import JOINS
from tune_cifar.record.files import WEIGHTS
from tune_cifar.record.journal import read_state
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.schema import Numerics
from tune_cifar.space.select import load_space
from tune_cifar.train.recorded import make_header
from tune_cifar.verify.confirm import make_confirmation

SMOKE = Path(__file__).parents[2] / "search_spaces" / "smoke.yaml"
SEARCH = "search --space smoke --tier cpu --trials 2 --set epochs=2 --set crop_pad=2"
OPTIONS = "--seed 3 --device cpu --precision fp32 --execution eager --cpus-per-trial 1"
WARM = "--warm-start other --warm-trials 4"


@pytest.fixture
def store(workplace: Path) -> Path:
    """A run store with a finished search x on synthetic data."""
    space = load_space("smoke", "cpu", {"epochs": 2, "crop_pad": 2})
    made = make_header("search", "x", space, 3, SHAPES_INFO, NUMERICS, "test")
    warm = {"warm_start": ["other"], "warm_trials": 4, "budget": made.budget | {"trials": 2}}
    events: list[Any] = []
    for number in range(2):
        events += make_trial(number, [0.1, 0.5], "complete", space.baseline)
    write_record(workplace / "runs", made.model_copy(update=warm), [*events, SEARCH_FINISHED])
    return workplace / "runs"


def usage(*words: str) -> str:
    """Run a command that is wrong usage; returns its sentence."""
    answer = invoke(*words)
    assert answer.exit_code == 2, (answer.exception, answer.output)
    return " ".join(answer.stderr.replace("│", "").split())


@pytest.mark.parametrize(
    "words",
    [
        f"{SEARCH} {OPTIONS} {WARM} --max-time 1h --keep-weights 5",
        f"search --space {SMOKE} --precision auto --device auto",
        "search --set crop_pad=2",
    ],
)
@pytest.mark.usefixtures("store")
def test_the_command_of_a_search_with_resume_appended_is_accepted(words: str) -> None:
    answer = invoke(*words.split(), "--data", "shapes", "--name", "x", "--resume")
    assert answer.exit_code == 0, answer.output
    assert "x ended after" in answer.stdout and "2 complete" in answer.stdout


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        ("--space s7", "--space smoke, got s7"),
        ("--tier full", "--tier cpu, got full"),
        ("--seed 4", "--seed 3, got 4"),
        ("--set epochs=3", "--set epochs=2, got 3"),
        ("--set max_lr=0.1", "--set max_lr unset, got 0.1"),
        ("--warm-start y", "--warm-start other, got y"),
        ("--warm-start other --warm-start y", "--warm-start other, got other, y"),
        ("--warm-trials 5", "--warm-trials 4, got 5"),
        ("--learn", "--learn off, got on"),
        ("--device cuda", "--device cpu, got cuda"),
        ("--precision bf16", "--precision fp32, got bf16"),
        ("--execution captured", "--execution eager, got captured"),
        ("--cpus-per-trial 2", "--cpus-per-trial 1, got 2"),
        ("--deterministic", "--deterministic off, got on"),
        ("--seed 4 --tier full", "--tier cpu, got full; --seed 3, got 4"),
    ],
)
@pytest.mark.usefixtures("store")
def test_an_option_that_differs_from_the_search_is_named_with_both_values(
    words: str, difference: str
) -> None:
    sentence = usage("search", *words.split(), "--name", "x", "--resume")
    way_out = "Leave out what differs: search --name x --resume."
    assert f"x is recorded with {difference}. {way_out}" in sentence


def test_a_space_file_that_has_changed_is_another_space(store: Path) -> None:
    file = store.parent / "smoke.yaml"
    file.write_text(SMOKE.read_text() + "# mine\n")
    words = ("search", "--name", "x", "--resume", "--space")
    sentence = usage(*words, str(file))
    assert "x is recorded with --space smoke of another text, got" in sentence
    assert "no such space file" in refuse(SpaceError, *words, "gone.yaml")


def test_a_space_whose_file_is_gone_is_known_by_its_name(store: Path) -> None:
    record = store / "searches" / "x"
    space = store.parent / "mine.yaml"
    space.write_text(SMOKE.read_text().replace("space: smoke", "space: mine"))
    found = load_space(space, "cpu", {"epochs": 2})
    made = make_header("search", "y", found, 3, SHAPES_INFO, NUMERICS, "test")
    trial = make_trial(0, [0.1, 0.5], "complete", found.baseline)
    write_record(store, made, [*trial, SEARCH_FINISHED])
    space.unlink()
    answer = invoke("search", "--space", "mine", "--name", "y", "--resume")
    assert answer.exit_code == 0 and record.exists(), answer.output


@pytest.mark.usefixtures("store")
def test_resume_still_needs_a_name_and_a_new_search_a_space() -> None:
    assert "--resume needs --name." in usage(*SEARCH.split(), "--resume")
    assert "Give --space for a new search" in usage("search", "--name", "z")
    assert "`trials` >= 2" in refuse(
        ConfigError, "search", "--trials", "1", "--name", "x", "--resume"
    )


TRAIN = "train --space smoke --set train_size=20 --set val_size=20 --set epochs=3"
TRAIN_WORDS = (*TRAIN.split(), "--set=batch_size=10", "--data", "shapes", "--name", "small")


def test_the_command_of_a_training_with_resume_appended_continues_it_and_shows_its_end(
    workplace: Path, fp32: Numerics
) -> None:
    interrupt_small(workplace / "runs", fp32, epoch=1)
    words = (*TRAIN_WORDS, "--precision", "fp32", "--resume")
    unreachable = f"sqlite:///{workplace}/no/such/folder/mlflow.db"
    answer = invoke(*words, "--tracking-uri", unreachable)
    assert answer.exit_code == 0, answer.output
    state = read_state(search_folder(workplace / "runs", "small"))
    assert len(state.resumes) == 1 and state.trials[0].status == "complete"
    again = invoke(*words)
    assert again.exit_code == 0 and again.stdout.startswith("small:0: complete, val_acc ")


@pytest.mark.usefixtures("storage")
def test_an_option_that_differs_from_the_training_is_named_with_both_values() -> None:
    sentence = usage(*TRAIN_WORDS, "--set", "max_lr=0.2", "--tier", "cpu", "--resume")
    assert "small is recorded with --tier full, got cpu; --set max_lr unset, got 0.2." in sentence
    answer = invoke("search", "--space", "smoke", "--name", "small", "--resume")
    assert answer.exit_code == 0 and answer.stdout.startswith("small:0: complete")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--seed 1", "is a search's."),
        ("--learn", "is a search's."),
        ("--max-concurrent 1", "is of no use to a single training."),
        ("--gpus-per-trial 1", "is of no use to a single training."),
        ("--address auto", "is of no use to a single training."),
        ("--allow-mixed", "is of no use to a single training."),
        ("--mirror file:///x", "is of no use to a single training."),
        ("--accept-changes", "is of no use to a single training."),
    ],
)
@pytest.mark.usefixtures("storage", "without_joining")
def test_an_option_that_a_training_cannot_obey_is_refused(words: str, why: str) -> None:
    sentence = usage("search", *words.split(), "--name", "small", "--resume")
    assert f"{words.split()[0]} {why}" in sentence


@pytest.fixture
def without_joining(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --address sets in the environment does not stay."""
    monkeypatch.setenv(JOINS, "")


def test_a_search_begun_without_a_warm_start_is_not_resumed_with_one(store: Path) -> None:
    header = read_state(search_folder(store, "x")).header
    more = {"name": "y", "warm_start": [], "warm_trials": None}
    write_record(store, header.model_copy(update=more), [SEARCH_INTERRUPTED])
    for words, difference in {
        "--warm-trials 9": "--warm-trials unset, got 9",
        "--learn": "--learn off, got on",
    }.items():
        sentence = usage("search", *words.split(), "--name", "y", "--resume")
        assert f"y is recorded with {difference}." in sentence


@pytest.mark.usefixtures("workplace")
def test_a_command_that_begins_or_goes_on_may_accept_changes() -> None:
    """A mistake behind it is told."""
    words = ("search", "--space", "s77", "--name", "z", "--accept-changes", "--data", "shapes")
    assert "no search space named 's77'" in refuse(SpaceError, *words, "--continue")
    assert "--accept-changes belongs to --resume." in usage(*words)


@pytest.mark.usefixtures("store")
def test_train_resumes_no_search() -> None:
    sentence = refuse(ConfigError, "train", "--space", "smoke", "--name", "x", "--resume")
    assert sentence == (
        "x must be a single training, got a search. Use `search --name x --resume`."
    )


def test_an_interrupted_confirmation_names_the_command_that_continues_it(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space, settled = make_confirmation(read_state(search_folder(store, "x")), 1, 1, {})
    typed = "python -m tune_cifar confirm --search x --data shapes --gpus-per-trial 0.5"
    made = make_header("confirm", "x-confirm", space, 3, SHAPES_INFO, NUMERICS, typed)
    header = made.model_copy(update={"confirmation": settled})
    state = write_record(store, header, [SEARCH_INTERRUPTED])
    with pytest.raises(typer.Exit):
        _finish(state, "shapes", None, as_json=False)
    options = "--resume --data shapes --gpus-per-trial 0.5"
    command = f"python -m tune_cifar search --name x-confirm {options}"
    assert f"continue it with:\n  {command}\n" in capsys.readouterr().out


def write_weights(state: SearchState, num_trials: int) -> None:
    """Write files of weights for the first trials."""
    for number in range(num_trials):
        state.trial_folder(number).mkdir(parents=True)
        (state.trial_folder(number) / WEIGHTS).write_bytes(b"weights")


@pytest.mark.parametrize(
    ("words", "num_files", "number"),
    [("", 5, 4), ("", 2, 3), ("--keep-weights 3", 5, 3), ("--keep-weights 9", 5, 9)],
)
def test_a_resumed_search_keeps_the_weights_that_it_has_unless_a_number_is_typed(
    tmp_path: Path, words: str, num_files: int, number: int
) -> None:
    """Of five trials the last still runs: its file is of a shorter stage."""
    events: list[Any] = []
    for each in range(4):
        events += make_trial(each, [0.1, 0.2, 0.3], "complete")
    state = write_record(tmp_path, builders.make_header(), [*events, *make_trial(4, [0.1], None)])
    write_weights(state, num_files)
    context: Any = COMMANDS["search"].make_context("search", words.split())
    assert choose_keep_weights(context, state) == number


@pytest.mark.slow
def test_weights_that_a_search_has_kept_survive_its_resume(tmp_path: Path, fp32: Numerics) -> None:
    space = make_space(trials=6)
    data = load_train_val(SHAPES, space.baseline.train_size, space.baseline.val_size)
    header = make_header("search", "x", space, 0, data.info, fp32, "test")
    events: list[Any] = []
    for number in range(5):
        events += make_trial(number, [0.0, 0.0, 0.01 * number], "complete", space.baseline)
    events += [*make_trial(5, [], None, space.baseline), SEARCH_INTERRUPTED]
    state = write_record(tmp_path / "runs", header, events)
    write_weights(state, 5)
    answer = run_in_a_process("search", "--name=x", "--resume", "--accept-changes", folder=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert read_state(state.folder).counts["complete"] == 6
    left = [number for number in range(6) if (state.trial_folder(number) / WEIGHTS).exists()]
    assert left == [1, 2, 3, 4, 5]
