"""The documents against the program: what they name is there, what is there they name, and their commands run."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

import knobs

from tests.builders import (
    COMMANDS,
    ROOT,
    SHAPES,
    invoke,
    make_header,
    make_trial,
    run_in_a_process,
    write_record,
)
from tune_cifar.data.files import FILES, TRAIN_FILES
from tune_cifar.errors import TuneCifarError
from tune_cifar.record.journal import read_state
from tune_cifar.record.store import search_folder
from tune_cifar.report.trials import TRIAL_COLUMNS
from tune_cifar.schema import KNOBS, EpochResult, Numerics, TrainConfig
from tune_cifar.space.select import load_space
from tune_cifar.tracking.runs import EPOCH_METRICS

README, GLOSSARY, TROUBLE = (
    ROOT / "README.md",
    ROOT / "docs" / "metrics.md",
    ROOT / "docs" / "troubleshooting.md",
)
# What is told of today; the findings, notes and the changelog tell of their day.
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "search_spaces" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
ALL_PAGES = [
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "analysis" / "FINDINGS.md",
    ROOT / "benchmarks" / "NOTES.md",
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = "python -m tune_cifar "
Words = list[str]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def list_blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(text) if language in languages]


def list_spans(page: Path) -> list[str]:
    """Every `inline code` outside of blocks; one that is broken over two lines is one."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", read(page)))]


def find_command(words: Words) -> str:
    """`spaces list`, or `search`: the command at the beginning, or an empty string."""
    return next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), "")


def list_options(name: str) -> set[str]:
    return {option for parameter in COMMANDS[name].params for option in parameter.opts} | {"--help"}


def list_lines(page: Path) -> Iterator[tuple[Words, str]]:
    """The program's commands in a page's blocks, in order, each with its comment. What a comment lists after `also:`
    are commands too."""
    typed = [line for block in list_blocks(read(page), "sh") for line in block.splitlines()]
    typed += re.findall(r"^\$ (.*)$", "".join(list_blocks(read(page), "console")), re.MULTILINE)
    for line in typed:
        command, _, comment = line.partition("  #")
        _, is_ours, words = command.partition(PROGRAM)
        if is_ours:
            yield shlex.split(words), comment
            _, _, others = comment.partition("also: ")
            yield from ((shlex.split(other), "") for other in filter(None, others.split(", ")))


# What is there is named


def test_every_command_stands_in_the_readme_as_it_is_typed() -> None:
    assert {find_command(words) for words, _ in list_lines(README)} == set(COMMANDS)


def test_every_space_stands_in_the_readme() -> None:
    names = [path.stem for path in (ROOT / "search_spaces").glob("*.yaml")]
    assert names and [name for name in names if not re.search(rf"\b{name}\b", read(README))] == []


def test_the_table_of_knobs_is_what_make_docs_would_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = read(knobs.PAGE)
    assert knobs.fill(page) == page, "make docs"
    assert all(f"\n| `{name}` |" in page for name in KNOBS)


def test_knobs_are_shown_as_a_table_and_as_json() -> None:
    lines = invoke("spaces", "knobs").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:] if line[1] != " "] == list(KNOBS)
    assert '"name": "max_lr"' in invoke("spaces", "knobs", "--json").stdout


@functools.cache
def list_explained() -> list[str]:
    """The names in the glossary's tables, each as a pattern: CLASS, N and the like stand for anything."""
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", read(GLOSSARY), re.MULTILINE)
    return [
        re.sub("[A-Z]+", ".+", re.escape(name))
        for cell in cells
        for name in re.findall(r"`([^`]+)`", cell)
    ]


def find_unexplained(names: set[str]) -> list[str]:
    return sorted(
        name
        for name in names
        if not any(re.fullmatch(pattern, name) for pattern in list_explained())
    )


def test_every_column_and_every_epochs_figure_stands_in_the_glossary() -> None:
    assert (
        find_unexplained({*EpochResult.model_fields, *EPOCH_METRICS, *TRIAL_COLUMNS} - set(KNOBS))
        == []
    )


@pytest.mark.slow
def test_every_name_that_reaches_mlflow_stands_in_the_glossary(
    tmp_path: Path, fp32: Numerics
) -> None:
    """As a real MLflow has them: of a search with every kind of trial, of both evaluations, of an LR range test."""
    import torch
    from mlflow import MlflowClient

    from tests.builders import make_events, ship
    from tune_cifar.data.load import load_train_val
    from tune_cifar.record.events import TrialRetried
    from tune_cifar.report.lr_range import make_report
    from tune_cifar.tracking.upload import upload_evaluation, upload_lr_range
    from tune_cifar.train.lr_range import Sweep, make_lrs
    from tune_cifar.train.metrics import evaluate_logits

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    start, *rest = make_events()
    assert (
        ship(tmp_path, uri, [start, TrialRetried(trial=0, fault="worker died", text="..."), *rest])
        == []
    )
    state = read_state(search_folder(tmp_path, "s7-1"))
    for part in ("validation", "test"):
        evaluation = evaluate_logits(
            torch.eye(10), torch.arange(10), [f"class{n}" for n in range(10)], part
        )
        assert (
            upload_evaluation(uri, tmp_path, state, state.trials[0], evaluation.to_dict(), [])
            is None
        )
    lrs = make_lrs(1e-3, 1.0, 30)
    losses = (*([2.3] * 10), *(2.3 - n / 10 for n in range(10)), *(1.4 + n / 2 for n in range(10)))
    info = load_train_val(SHAPES, 10, 10).info
    sweeps = [Sweep(seed, lrs, losses, None) for seed in (0, 1)]
    (tmp_path / "swept").mkdir()
    report = make_report("swept", load_space("smoke", "cpu"), info, fp32, sweeps, "a command")
    upload_lr_range(uri, tmp_path, report, tmp_path / "swept")

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = [run.data for run in client.search_runs(experiments)]
    assert len(runs) == 7
    metrics, params = (
        {name for run in runs for name in getattr(run, kind)} for kind in ("metrics", "params")
    )
    tags = {name for run in runs for name in run.tags} - {
        "mlflow.runName",
        "mlflow.user",
    }  # MLflow's own
    assert {
        "val_acc",
        "score",
        "best_val_acc",
        "val_ece",
        "test_acc_class3",
        "loss_seed_1",
        "lr_valley",
    } <= metrics
    assert {"retries", "weights", "verdict", "best_run_id"} <= tags
    assert find_unexplained(metrics | tags) == []
    assert params <= set(KNOBS)


# What is named is there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_parse(page: Path) -> None:
    lines = list(list_lines(page))
    lines += [
        (shlex.split(span.removeprefix(PROGRAM)), "")
        for span in list_spans(page)
        if span.startswith(PROGRAM)
    ]
    for words, comment in lines:
        name = find_command(words)
        assert name, words
        COMMANDS[name].make_context(
            name, words[len(name.split()) :]
        )  # raises for an unknown option
        assert set(re.findall(r"--[a-z][a-z-]+", comment)) <= list_options(name), (words, comment)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_options_in_a_pages_text_are_there(page: Path) -> None:
    known = {option for name in COMMANDS for option in list_options(name)}
    unknown = []
    for span in list_spans(page):
        words = span.removeprefix(PROGRAM).split()
        name = find_command(words)
        options = {
            word.partition("=")[0] for word in words if re.fullmatch(r"--[a-z][a-z-]+(=.*)?", word)
        }
        if name or words[0] in options:
            unknown += [span] if options - (list_options(name) if name else known) else []
    assert unknown == []


def test_the_targets_of_make_that_are_named_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    named: set[str] = set()
    for page in PAGES:
        code = [*list_spans(page), *"\n".join(list_blocks(read(page), "sh")).splitlines()]
        named |= {match[1] for text in code if (match := re.match(r"make ([a-z-]+)", text))}
    assert {"search", "test", "docs"} <= named <= targets


def list_anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", read(page))):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" not in link and (
            not target.exists() or (anchor and anchor not in list_anchors(target))
        ):
            broken.append(link)
    assert broken == []


def test_the_readmes_python_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stand-in, in a training of 20 images."""
    monkeypatch.setenv("TUNE_CIFAR_DATA", "shapes")
    (code,) = list_blocks(read(README), "python")
    assert 'load_space("s7", tier="cpu")' in code
    sizes = {"train_size": 20, "val_size": 10, "batch_size": 10, "epochs": 1, "pct_start": 0.6}
    small = code.replace(
        'load_space("s7", tier="cpu")', f'load_space("s7", tier="cpu", pinned={sizes})'
    )
    found: dict[str, Any] = {}
    exec(compile(small, str(README), "exec"), found)
    assert found["result"].epoch == 1 and list(found["trials"].columns) == list(TRIAL_COLUMNS)
    assert isinstance(found["config"], TrainConfig)


# The user's walk

NAME = "walked"
# Some ten steps an epoch: a searched warm-up is a tenth of them and must be more than one.
SMALL = ["--tier=cpu", "--set=train_size=60", "--set=val_size=20", "--set=batch_size=5"]
# What a command needs beside that, to be short.
MORE = {
    "search --warm-start": ["--trials=2"],
    "lr-range": ["--steps=35", "--seeds=1"],
    "confirm": ["--top=1", "--seeds=1"],
    "searches delete": ["--yes"],
}
# Commands with tests of their own: one waits for Ctrl-C (test_cli), one trains on 50,000 images (test_confirm), one
# downloads (test_data).
LEFT_OUT = ("ui", "confirm --final", "data fetch")
WITH_RAY = ("search", "confirm")


def has(words: Words, command: str) -> bool:
    """Whether these words are of a command, named with or without options of it."""
    return find_command(words) == find_command(command.split()) and set(command.split()) <= set(
        words
    )


def make_small(words: Words, best: str) -> Words:
    """A command of the README on the stand-in: its placeholders filled, its space smoke, so small that it is short."""
    name = find_command(words)
    options = list_options(name)
    filled = {"NAME": NAME, "NAME:7": best, "FILE": str(ROOT / "search_spaces" / "smoke.yaml")}
    small = [filled.get(word, word) for word in words]
    if "--space" in small:
        place = small.index("--space")
        # The best of a space is one on CIFAR-10.
        small[place : place + 2] = ["--search", NAME] if "--best" in small else ["--space", "smoke"]
        small += [word for word in SMALL if word.split("=")[0] in options and "--best" not in small]
    if name == "search" and "--name" not in small:
        small.append("--name=warm" if "--warm-start" in small else f"--name={NAME}")
    if "--data" in options and "--data" not in small:
        small += ["--data", "shapes"]
    return small + [word for command, more in MORE.items() if has(words, command) for word in more]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_their_order(workplace: Path) -> None:
    """As a user goes through it: planning, a search, its best trained again, judged, exported, confirmed, deleted."""
    best, done = "", []
    for words, _ in list_lines(README):
        if any(has(words, command) for command in LEFT_OUT):
            continue
        small = make_small(words, best)
        if find_command(words) in WITH_RAY:  # its cluster ends with its process
            process = run_in_a_process(*small)
            status, told = process.returncode, process.stdout + process.stderr
        else:
            answer = invoke(*small)
            status, told = answer.exit_code, f"{answer.output}\n{answer.exception!r}"
        assert status == 0, f"{shlex.join(small)}\n{told}"
        done.append(find_command(words))
        if not best:
            folder = search_folder(workplace / "runs", NAME)
            state = read_state(folder) if folder.exists() else None
            best = state.best.run_id if state is not None and state.best is not None else ""
    assert set(done) == set(COMMANDS) - {"ui", "data fetch"}
    assert best and not search_folder(workplace / "runs", NAME).exists()
    assert {f"{best.replace(':', '-')}.onnx", "preview-smoke.png"} <= {
        path.name for path in workplace.iterdir()
    }


# Troubles


def write_s7(path: str, old: str, new: str) -> None:
    """The space s7 under another name, with one change."""
    text = read(ROOT / "search_spaces" / "s7.yaml").replace(
        "space: s7\n", f"space: {Path(path).stem}\n"
    )
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))


def write_zeros() -> None:
    """Files of CIFAR-10 that have the right sizes alone."""
    folder = Path("data/cifar-10-batches-py")
    folder.mkdir(parents=True)
    for name in TRAIN_FILES:
        with (folder / name).open("wb") as file:
            file.truncate(FILES[name][1])


def tear_record() -> None:
    write_record(Path("runs"), make_header("torn"), [*make_trial(0, [0.3, 0.5, 0.7], "complete")])
    path = Path("runs/searches/torn/record.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace("0.", "1.", 1)
    path.write_text("".join(lines))


def write_unfinished() -> None:
    write_record(Path("runs"), make_header("mine"), make_trial(0, [0.3], None))


# How the place looks in which a section's commands are typed: an empty one, else.
SETTINGS: dict[str, Callable[[], None]] = {
    "A file of CIFAR-10 is damaged": write_zeros,
    "A knob has no effect": lambda: write_s7(
        "mine.yaml", "\nsearch:", "  momentum: 0.9\n\nsearch:"
    ),
    "The first rung lies within the warm-up": lambda: write_s7(
        "warm.yaml", "rungs: [7, 20, 60]", "rungs: [7, 20, 60]\n    fidelity: epochs"
    ),
    "The name is taken": write_unfinished,
    "A search was cut off": write_unfinished,
    "The record is damaged": tear_record,
    "`--best` finds no search": write_unfinished,
}
SECTIONS = dict(part.split("\n", 1) for part in read(TROUBLE).split("\n## ")[1:])
TYPED = [heading for heading, text in SECTIONS.items() if list_blocks(text, "console")]


def normalise(text: str) -> str:
    """One line; a space file's lines may move."""
    return re.sub(r"\.yaml:\d+", ".yaml:N", " ".join(re.sub("[│╭╮╰╯─]", " ", text).split()))


@pytest.mark.parametrize("heading", TYPED)
def test_the_commands_of_a_trouble_answer_as_it_says(
    heading: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / ".cache"))
    monkeypatch.setenv("TUNE_CIFAR_DATA", "" if "CIFAR-10 is" in heading else "shapes")
    SETTINGS.get(heading, lambda: None)()
    for block in list_blocks(SECTIONS[heading], "console"):
        for typed in filter(None, block.split("$ ")):
            line, expected = typed.split("\n", 1)
            settings, _, words = line.partition(PROGRAM)
            for name, _, value in (setting.partition("=") for setting in settings.split()):
                monkeypatch.setenv(name, value)
            answer = invoke(*shlex.split(words))
            is_ours = isinstance(answer.exception, TuneCifarError)
            told = f"error {answer.exception}" if is_ours else answer.output
            assert normalise(expected) in normalise(told.replace(str(workplace), "/home/you")), line


@functools.cache
def list_texts() -> list[list[str]]:
    """The texts in the package's code, each as the parts between its values; short ones left out."""
    trees = (
        ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tune_cifar").rglob("*.py")
    )
    texts = []
    for node in (node for tree in trees for node in ast.walk(tree)):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        words = [
            part.value
            for part in parts
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ]
        if len("".join(words)) >= 12:
            texts.append([word.strip() for word in words])
    return texts


def follow_one_another(parts: list[str], line: str) -> bool:
    place = 0
    for part in parts:
        place = line.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_a_troubles_sentences_are_the_programs() -> None:
    lines = "".join(list_blocks(read(TROUBLE), "text")).splitlines()
    assert len(lines) > 15
    assert [
        line for line in lines if not any(follow_one_another(parts, line) for parts in list_texts())
    ] == []
