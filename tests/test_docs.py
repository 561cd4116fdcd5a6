"""The documents and the program agree: names, commands with their output, links and imports."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import knobs

from tests.builders import (
    COMMANDS,
    ROOT,
    SHAPES,
    invoke,
    make_data_files,
    make_header,
    make_trial,
    write_record,
)
from tests.shell import Answer, Shell, open_shell
from tune_cifar.cli.terminal import name_options
from tune_cifar.data.files import TRAIN_FILES
from tune_cifar.errors import TuneCifarError
from tune_cifar.record.journal import read_state
from tune_cifar.record.store import search_folder
from tune_cifar.record.test_log import find_test_log, load_test_log
from tune_cifar.report.trials import TRIAL_COLUMNS
from tune_cifar.schema import KNOBS, EpochResult, Numerics, TrainConfig
from tune_cifar.space.select import load_space
from tune_cifar.tracking.runs import EPOCH_METRICS

README = ROOT / "README.md"
GLOSSARY = ROOT / "docs" / "metrics.md"
TROUBLE = ROOT / "docs" / "troubleshooting.md"
OWN_IMAGES = ROOT / "docs" / "own-images.md"
OWN_NETWORK = ROOT / "docs" / "own-network.md"
# The pages that describe today's program; the others of ALL_PAGES describe that of their day.
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
    """Every `inline code` outside of blocks, on one line even if the page breaks it."""
    spans = re.findall(r"`([^`]+)`", BLOCK.sub("", read(page)))
    return [" ".join(span.split()) for span in spans]


def find_command(words: Words) -> str:
    """Return the command that the words begin with, `spaces list` or `search`; "" if none."""
    candidates = (" ".join(words[:2]), *words[:1])
    return next((name for name in candidates if name in COMMANDS), "")


def list_options(name: str) -> set[str]:
    return {option for parameter in COMMANDS[name].params for option in parameter.opts} | {"--help"}


def list_lines(page: Path) -> Iterator[tuple[Words, str]]:
    """The program's commands in a page's blocks, in order, each with its comment.

    What a comment lists after `also:` are commands, too.
    """
    typed = [line for block in list_blocks(read(page), "sh") for line in block.splitlines()]
    typed += re.findall(r"^\$ (.*)$", "".join(list_blocks(read(page), "console")), re.MULTILINE)
    for line in typed:
        command, _, comment = line.partition("  #")
        command = command.partition(" > ")[0]
        _, is_ours, words = command.partition(PROGRAM)
        if is_ours:
            yield shlex.split(words), comment
            _, _, others = comment.partition("also: ")
            yield from ((shlex.split(other), "") for other in filter(None, others.split(", ")))


# --- What the program has, the documents name


def test_the_readme_shows_every_command() -> None:
    assert {find_command(words) for words, _ in list_lines(README)} == set(COMMANDS)


def test_the_readme_names_every_space() -> None:
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
    """The names in the glossary, each as a pattern: CLASS, N and the like match anything."""
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", read(GLOSSARY), re.MULTILINE)
    names = re.findall(r"`([^`]+)`", "\n".join(cells))
    return [re.sub("[A-Z]+", ".+", re.escape(name)) for name in names]


def is_explained(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in list_explained())


def find_unexplained(names: set[str]) -> list[str]:
    return sorted(name for name in names if not is_explained(name))


def test_the_glossary_has_every_column_and_every_metric_of_an_epoch() -> None:
    names = {*EpochResult.model_fields, *EPOCH_METRICS, *TRIAL_COLUMNS}
    assert find_unexplained(names - set(KNOBS)) == []


@pytest.mark.slow
def test_the_glossary_has_every_name_in_mlflow(tmp_path: Path, fp32: Numerics) -> None:
    """Those of a search with trials of every status, of both evaluations and an LR range test."""
    import torch
    from mlflow import MlflowClient

    from tests.builders import make_events, upload_events
    from tune_cifar.data.load import load_train_val
    from tune_cifar.record.events import TrialRetried
    from tune_cifar.report.lr_range import make_report
    from tune_cifar.tracking.lr_range import upload_lr_range
    from tune_cifar.tracking.upload import upload_evaluation
    from tune_cifar.train.lr_range import Sweep, make_lrs
    from tune_cifar.train.metrics import evaluate_logits

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    start, *rest = make_events()
    retry = TrialRetried(trial=0, fault="worker died", text="...")
    assert upload_events(tmp_path, uri, [start, retry, *rest]) == []
    state = read_state(search_folder(tmp_path, "s7-1"))
    classes = [f"class{n}" for n in range(10)]
    for part in ("validation", "test"):
        values = evaluate_logits(torch.eye(10), torch.arange(10), classes, part).to_dict()
        fault = upload_evaluation(uri, tmp_path, state, state.trials[0], values, [])
        assert fault is None
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
    metrics = {name for run in runs for name in run.metrics}
    params = {name for run in runs for name in run.params}
    tags = {name for run in runs for name in run.tags} - {"mlflow.runName", "mlflow.user"}
    of_searches = {"val_acc", "score", "best_val_acc"}
    assert of_searches | {"val_ece", "test_acc_class3", "loss_seed_1", "lr_valley"} <= metrics
    assert {"retries", "weights", "verdict", "best_run_id"} <= tags
    assert find_unexplained(metrics | tags) == []
    assert params <= set(KNOBS)


# --- What the documents name, the program has


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_parse(page: Path) -> None:
    lines = list(list_lines(page))
    for span in list_spans(page):
        if span.startswith(PROGRAM):
            lines.append((shlex.split(span.removeprefix(PROGRAM)), ""))
    for words, comment in lines:
        name = find_command(words)
        assert name, words
        arguments = words[len(name.split()) :]
        COMMANDS[name].make_context(name, arguments)  # raises for an unknown option
        assert set(re.findall(r"--[a-z][a-z-]+", comment)) <= list_options(name), (words, comment)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_options_in_a_pages_text_exist(page: Path) -> None:
    of_any_command = {option for name in COMMANDS for option in list_options(name)}
    unknown = []
    for span in list_spans(page):
        words = span.removeprefix(PROGRAM).split()
        name = find_command(words)
        options = {word.partition("=")[0] for word in words if re.match(r"--[a-z][a-z-]+", word)}
        known = list_options(name) if name else of_any_command
        if (name or words[0] in options) and options - known:
            unknown.append(span)
    assert unknown == []


def list_code(page: Path) -> list[str]:
    """The Python of a page's blocks or a notebook's cells."""
    if page.suffix == ".md":
        return list_blocks(read(page), "python")
    cells = [cell for cell in json.loads(read(page))["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    return ["\n".join(line for line in lines if not line.startswith("%"))]


def list_imports(code: str) -> Iterator[tuple[str, str]]:
    """The module and the name of everything that the code imports from the package."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tune_cifar"):
            yield from ((str(node.module), alias.name) for alias in node.names)


def test_the_imports_in_pages_and_notebooks_exist() -> None:
    notebooks = sorted((ROOT / "analysis").glob("*.ipynb"))
    codes = [code for page in [*PAGES, *notebooks] for code in list_code(page)]
    imports = {found for code in codes for found in list_imports(code)}
    assert len(imports) > 20
    for module, name in sorted(imports):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


class ParsedError(Exception):
    """A script's words are read, and nothing else is to happen."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_benchmarks_that_a_page_names_take_its_words(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser) -> None:
        parse_args(parser)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    typed = "\n".join(list_blocks(read(page), "sh", "console")).splitlines()
    for text in [*list_spans(page), *typed]:
        if match := re.match(r"(?:\$ )?python (benchmarks/\w+\.py.*)", text):
            script, *words = shlex.split(match[1])
            monkeypatch.setattr(sys, "argv", [script, *words])
            with pytest.raises(ParsedError):
                runpy.run_path(str(ROOT / script), run_name="__main__")


def test_the_targets_of_make_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    named: set[str] = set()
    for page in PAGES:
        code = [*list_spans(page), *"\n".join(list_blocks(read(page), "sh")).splitlines()]
        named |= {match[1] for text in code if (match := re.match(r"make ([a-z-]+)", text))}
    assert {"search", "test", "docs"} <= named <= targets


def list_anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", read(page))):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in list_anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_readmes_python_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On synthetic data, in a training of 20 images."""
    monkeypatch.setenv("TUNE_CIFAR_DATA", "shapes")
    (code,) = list_blocks(read(README), "python")
    load = 'load_space("s7", tier="cpu"'
    assert f"{load})" in code
    sizes = {"train_size": 20, "val_size": 10, "batch_size": 10, "epochs": 1, "pct_start": 0.6}
    small = code.replace(f"{load})", f"{load}, pinned={sizes})")
    found: dict[str, Any] = {}
    exec(compile(small, str(README), "exec"), found)
    assert found["result"].epoch == 1 and list(found["trials"].columns) == list(TRIAL_COLUMNS)
    assert isinstance(found["config"], TrainConfig)


# --- The commands of README, in order

NAME = "walked"
# About ten steps an epoch: a searched warm-up may be a tenth of all steps and needs more than one.
SMALL = ["--tier=cpu", "--set=train_size=60", "--set=val_size=20", "--set=batch_size=5"]
# More options that make a command short.
MORE = {
    "search": ["--max-concurrent=1"],
    "search --warm-start": ["--trials=2"],
    "lr-range": ["--steps=35", "--seeds=1"],
    "confirm": ["--top=1", "--seeds=1", "--max-concurrent=1"],
    "searches delete": ["--yes"],
}
# Commands with tests of their own: one waits for Ctrl-C (cli/test_app.py), one trains on 50,000
# images (verify/test_confirm.py), one downloads (data/test_load.py).
LEFT_OUT = ("ui", "confirm --final", "data fetch", "data import", "spaces new")


def has(words: Words, command: str) -> bool:
    """Return whether the words are this command, with all options that it is given with."""
    wanted = command.split()
    return find_command(words) == find_command(wanted) and set(wanted) <= set(words)


def make_small(words: Words, best: str) -> Words:
    """Fill in a command's placeholders and make it short: space smoke, few synthetic images."""
    name = find_command(words)
    options = list_options(name)
    filled = {"NAME": NAME, "NAME:7": best, "FILE": str(ROOT / "search_spaces" / "smoke.yaml")}
    filled["URL"] = (Path.cwd() / "mirror").as_uri()
    small = [filled.get(word, word) for word in words]
    if "--space" in small:
        place = small.index("--space")
        # `--best --space` looks at trials on CIFAR-10 alone.
        small[place : place + 2] = ["--search", NAME] if "--best" in small else ["--space", "smoke"]
        small += [word for word in SMALL if word.split("=")[0] in options and "--best" not in small]
    if name == "search" and "--name" not in small:
        small.append("--name=warm" if "--warm-start" in small else f"--name={NAME}")
    if "--data" in options and "--data" not in small:
        small += ["--data", "shapes"]
    return small + [word for command, more in MORE.items() if has(words, command) for word in more]


# One process of pytest-xdist runs the walks, in one shell.
ONE_SHELL = pytest.mark.xdist_group("walks")


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    with open_shell() as shell:
        yield shell


def run_whole(shell: Shell, *words: str) -> Answer:
    """Run a command that must end well."""
    answer = shell.run(*words)
    assert answer.status == 0, f"{shlex.join(words)}\n{answer}"
    return answer


@pytest.mark.slow
@ONE_SHELL
def test_the_commands_of_the_readme_run_in_their_order(workplace: Path, shell: Shell) -> None:
    """Plan, search, and reproduce, evaluate, export, confirm, delete what was found."""
    best, done = "", []
    for words, _ in list_lines(README):
        if any(has(words, command) for command in LEFT_OUT):
            continue
        run_whole(shell, *make_small(words, best))
        done.append(find_command(words))
        if not best:
            folder = search_folder(workplace / "runs", NAME)
            state = read_state(folder) if folder.exists() else None
            best = state.best.run_id if state is not None and state.best is not None else ""
    assert set(done) == set(COMMANDS) - {"ui", "data fetch", "data import", "spaces new"}
    assert best and not search_folder(workplace / "runs", NAME).exists()
    files = {path.name for path in workplace.iterdir()}
    assert {f"{best.replace(':', '-')}.onnx", "preview-smoke.png"} <= files


@pytest.mark.slow
@ONE_SHELL
def test_the_commands_for_own_images_run_in_their_order(
    workplace: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From PNG files of scikit-learn's digits, a data set that none of us made, to its test set."""
    monkeypatch.setenv("XDG_DATA_HOME", str(workplace / "home"))
    write_digits(workplace / "photos", num_images=30)
    done, outputs = [], []
    for words, _ in list_lines(OWN_IMAGES):
        name = find_command(words)
        if name == "data fetch":
            continue
        small = [{"NAME": NAME}.get(word, word) for word in words]
        if name == "search":
            sizes = ("--set=train_size=120", "--set=val_size=20", "--set=batch_size=5")
            small = [*small, f"--name={NAME}", "--trials=2", "--tier=cpu", *sizes]
        if name == "confirm":
            small += ["--seeds=1"] if "--final" in words else ["--seeds=1", "--top=1"]
        if name in ("search", "confirm"):
            small += ["--max-concurrent=1"]  # a worker's start costs more than its trials
        done.append(name)
        outputs.append(run_whole(shell, *small).stdout)
    assert done[:3] == ["data import", "data list", "search"] and done[-1] == "export"
    assert "10 classes, 32x32 pixels" in outputs[0] and "folder photos" in outputs[1]
    assert "identical" in outputs[done.index("reproduce")]
    (tested,) = {found.data for found in load_test_log(find_test_log(workplace / "runs"))}
    assert tested == "flowers"


def make_small_for_own_network(words: Words) -> Words:
    """Make a command of the page short, on synthetic data."""
    name = find_command(words)
    small = [{"NAME": NAME}.get(word, word) for word in words]
    if name == "search":
        sizes = ("--set=train_size=120", "--set=val_size=20", "--set=batch_size=5")
        small = ["search", "--space", "vit.yaml", f"--name={NAME}", "--trials=2", *sizes]
        small += ["--tier=cpu", "--set=model_args.width=16", "--max-concurrent=1"]
    if name == "confirm":
        small += ["--top=1", "--seeds=1", "--max-concurrent=1"]
    if "--data" in list_options(name) and name != "spaces new":  # which measures nothing here
        small += ["--data", "shapes"]
    if "--best" in small and "--space" in small:
        small[small.index("--space") : small.index("--space") + 2] = ["--search", NAME]
    return small


@pytest.mark.slow
@ONE_SHELL
def test_the_commands_for_an_own_network_run_in_their_order(workplace: Path, shell: Shell) -> None:
    """With the page's own network; after the search its file has another text."""
    (network,) = list_blocks(read(OWN_NETWORK), "python")
    Path("vit.py").write_text(network)
    done, outputs = [], []
    for words, _ in list_lines(OWN_NETWORK):
        name = find_command(words)
        if "--final" in words:
            continue  # 50,000 images: see tests/verify/test_confirm.py
        answer = run_whole(shell, *make_small_for_own_network(words))
        done.append(name)
        outputs.append(answer.stdout)
        if name == "spaces new":
            Path("vit.yaml").write_text(answer.stdout)
        if name == "search":
            Path("vit.py").write_text("changed since")
        if name in ("reproduce", "confirm", "export"):
            changed = "vit.py has changed since walked: the recorded text is used."
            assert changed in answer.stderr
    assert done == [
        *("models", "spaces new", "spaces check", "search", "reproduce", "confirm", "export")
    ]
    assert "vit.py:SmallViT works" in outputs[2] and "identical" in outputs[4]
    (shown,) = list_blocks(read(OWN_NETWORK), "yaml")
    assert set(shown.splitlines()) <= set(outputs[1].splitlines()), "what `spaces new` prints"


def write_digits(root: Path, num_images: int) -> None:
    """Write the digits as a folder of class folders; 8x8 grey pixels."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        (root / str(label)).mkdir(parents=True)
        for number, row in enumerate((digits.target == label).nonzero()[0][:num_images]):
            pixels = (digits.images[row] * 15.9375).astype("uint8")
            Image.fromarray(pixels).save(root / str(label) / f"{number}.png")


# --- Troubleshooting


def write_s7(path: str, old: str, new: str) -> None:
    """Write the space s7 under another name, with one change."""
    text = read(ROOT / "search_spaces" / "s7.yaml")
    text = text.replace("space: s7\n", f"space: {Path(path).stem}\n")
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))


def write_zeros() -> None:
    """Write files of CIFAR-10 of which only the sizes are right."""
    make_data_files(Path("data"), TRAIN_FILES)


def tear_record() -> None:
    write_record(Path("runs"), make_header("torn"), make_trial(0, [0.3, 0.5, 0.7], "complete"))
    path = Path("runs/searches/torn/record.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace("0.", "1.", 1)
    path.write_text("".join(lines))


def write_unfinished() -> None:
    write_record(Path("runs"), make_header("mine"), make_trial(0, [0.3], None))


def rename_unfinished() -> None:
    write_unfinished()
    Path("runs/searches/mine").rename("runs/searches/better")


def write_s7_with_an_inactive_knob() -> None:
    write_s7("mine.yaml", "\nsearch:", "  momentum: 0.9\n\nsearch:")


def write_s7_with_an_early_rung() -> None:
    rungs = "rungs: [7, 20, 60]"
    write_s7("warm.yaml", rungs, f"{rungs}\n    fidelity: epochs")


# What prepares the working folder for a section's commands; otherwise it is empty.
PREPARATIONS: dict[str, Callable[[], None]] = {
    "A file of CIFAR-10 is damaged": write_zeros,
    "A knob has no effect": write_s7_with_an_inactive_knob,
    "The first rung lies within the warm-up": write_s7_with_an_early_rung,
    "The name is taken": write_unfinished,
    "A search was cut off": write_unfinished,
    "The record is damaged": tear_record,
    "A search's folder was renamed or copied": rename_unfinished,
    "`--best` finds no search": write_unfinished,
}
SECTIONS = dict(part.split("\n", 1) for part in read(TROUBLE).split("\n## ")[1:])
TYPED = [heading for heading, text in SECTIONS.items() if list_blocks(text, "console")]


def normalise(text: str) -> str:
    """The text on one line, without boxes and without the line numbers of space files."""
    words = re.sub("[│╭╮╰╯─]", " ", text).split()
    return re.sub(r"\.yaml:\d+", ".yaml:N", " ".join(words))


@pytest.mark.parametrize("heading", TYPED)
def test_the_commands_of_a_trouble_print_what_it_shows(
    heading: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / ".cache"))
    monkeypatch.setenv("TUNE_CIFAR_DATA", "" if "CIFAR-10 is" in heading else "shapes")
    PREPARATIONS.get(heading, lambda: None)()
    for block in list_blocks(SECTIONS[heading], "console"):
        for typed in filter(None, block.split("$ ")):
            line, expected = typed.split("\n", 1)
            settings, _, words = line.partition(PROGRAM)
            for name, _, value in (setting.partition("=") for setting in settings.split()):
                monkeypatch.setenv(name, value)
            answer = invoke(*shlex.split(words))
            is_ours = isinstance(answer.exception, TuneCifarError)
            error = name_options(str(answer.exception))
            output = f"error {error}" if is_ours else answer.output
            output = output.replace(str(workplace), "/home/you")
            assert normalise(expected) in normalise(output), line


def list_texts() -> list[list[str]]:
    """The strings in the package's code, each as the parts between its values, but short ones."""
    trees = [ast.parse(read(path)) for path in (ROOT / "tune_cifar").rglob("*.py")]
    texts = []
    for node in (node for tree in trees for node in ast.walk(tree)):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        constants = [part.value for part in parts if isinstance(part, ast.Constant)]
        words = [name_options(value) for value in constants if isinstance(value, str)]
        if len("".join(words)) >= 12:
            texts.append([word.strip() for word in words])
    return texts


def has_in_order(line: str, parts: list[str]) -> bool:
    """Return whether the line contains all parts, one after another."""
    place = 0
    for part in parts:
        place = line.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_the_program_has_the_sentences_of_the_troubles() -> None:
    lines = "".join(list_blocks(read(TROUBLE), "text")).splitlines()
    assert len(lines) > 15
    texts = list_texts()
    unknown = [line for line in lines if not any(has_in_order(line, parts) for parts in texts)]
    assert unknown == []
