"""Imports go down the tiers only, and every heavy dependency has its modules."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tune_cifar"

# From the bottom up. Packages of one tier do not import each other.
TIERS = (
    ("schema", "dataset", "errors"),
    ("record", "space", "data", "models", "augment"),
    ("train", "tracking"),
    ("search",),
    ("report", "verify"),
    ("cli",),
)
TIER = {name: tier for tier, names in enumerate(TIERS) for name in names}
# Everything may raise the exceptions of errors.py and use the records of schema.py.
FREE = {"errors", "schema"}
# The packages and modules that may import a heavy or replaceable dependency.
DEPENDENCIES = {
    "ray": {
        *("search/run", "search/adapters", "search/worker", "search/cluster"),
        *("search/survey", "search/trial_files"),
    },
    "optuna": {
        "space",
        "search/sampler",
        "search/gaussian_process",
        "report/tables",
        "report/dashboard",
    },
    "mlflow": {"tracking"},
    "filelock": {"tracking"},
    "fsspec": {"record/mirror"},
    "sqlalchemy": {"tracking"},
    "albumentations": {"augment/reference"},
    "cv2": {"augment/reference"},
    "scipy": {"search/gaussian_process", "verify/confirm"},
    # Both modules of cli: for type checking only.
    "pandas": {"report", "cli/leaderboard", "cli/notebook"},
    "matplotlib": {"report"},
    "plotly": {"report/plots/interactive"},
    "jinja2": {"report/html"},
    "pydantic": {"schema", "dataset", "errors", "space", "record/events", "data/imported"},
    "pydantic_core": {"errors", "space"},
    "ruamel": {"space"},
    "torchvision": {"data"},
    "torchinfo": {"models/summary"},
    "safetensors": {"train/checkpoint", "data/imported", "data/importing"},
    "PIL": {"data/importing", "data/sources"},
    "pyarrow": {"data/sources"},
    "onnx": {"verify/export"},
    "onnxruntime": {"verify/export"},
    "onnxscript": {"verify/export"},
    "cryptography": {"models/dropout"},
    "IPython": {"cli/notebook"},
    "typer": {"cli"},
    "rich": {"cli"},
}


@functools.cache
def list_modules() -> list[tuple[str, ast.Module]]:
    """Return (`augment/batched`, its tree) for every module but `__init__` and `__main__`."""
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")
        if name not in ("__init__", "__main__"):
            modules.append((name, ast.parse(path.read_text(encoding="utf-8"))))
    return modules


def list_imports(tree: ast.Module) -> list[str]:
    """Return the dotted names of all modules that are imported anywhere in a tree."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "tune_cifar":
            names += [f"tune_cifar.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def test_the_package_is_what_the_drawing_shows() -> None:
    assert {name.split("/")[0] for name, _ in list_modules()} == set(TIER)
    assert sum((PACKAGE / name).is_dir() for name in TIER) == 11


def list_documented_modules() -> list[str]:
    """Return the modules that CONTRIBUTING.md lists: a package in bold, then a bullet per module.

    A bullet's names stand before its colon; those of `plots/`, a folder, after it.
    """
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("\n**Tier 0**\n")
    listed, _, _ = rest.partition("\n## ")
    modules, package = [], ""
    for entry in re.split(r"\n(?=- |\*\*)", listed):
        if heading := re.match(r"\*\*`(\w+/)`\*\*", entry):
            package = heading[1]
            continue
        names, _, description = entry.partition(": ")
        folder = re.match(r"- `(\w+/)`", names)
        prefix = package + (folder[1] if folder else "")
        found = re.findall(r"`(\w+)\.py`", description if folder else names)
        modules += [prefix + name for name in found]
    return modules


def test_contributing_lists_every_module_once() -> None:
    modules = [name for name, _ in list_modules() if not (PACKAGE / name).is_dir()]
    assert sorted(list_documented_modules()) == sorted(modules)


def test_imports_go_down_only() -> None:
    wrong = []
    for name, tree in list_modules():
        package = name.split("/")[0]
        for imported in list_imports(tree):
            parts = imported.split(".")
            if parts[0] != "tune_cifar" or len(parts) == 1 or parts[1] in {package, *FREE}:
                continue
            if TIER[parts[1]] >= TIER[package]:
                wrong.append(f"{name} imports {imported}")
    assert wrong == []


def test_no_two_modules_import_each_other() -> None:
    arrows = set()
    for name, tree in list_modules():
        for imported in list_imports(tree):
            arrows.add((name, imported.removeprefix("tune_cifar.").replace(".", "/")))
    assert [(a, b) for a, b in arrows if a < b and (b, a) in arrows] == []


def test_packages_hold_nothing_but_their_modules() -> None:
    for path in PACKAGE.rglob("*/__init__.py"):
        (docstring,) = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr), path


def test_every_heavy_dependency_stays_in_its_module() -> None:
    wrong = []
    for name, tree in list_modules():
        places = {name, name.split("/")[0]}
        for imported in list_imports(tree):
            allowed = DEPENDENCIES.get(imported.split(".")[0])
            if allowed is not None and not allowed & places:
                wrong.append(f"{name} imports {imported}")
    assert wrong == []


def test_only_one_module_can_open_the_test_set() -> None:
    openers = set()
    for name, tree in list_modules():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            if "load_test" in names:
                openers.add(name)
    assert openers == {"verify/test_set"}


def test_only_optim_names_torchs_optimizers() -> None:
    importers = set()
    for name, tree in list_modules():
        if any(imported.startswith("torch.optim") for imported in list_imports(tree)):
            importers.add(name)
    assert importers == {"train/optim"}


def test_only_the_command_line_prints_or_exits() -> None:
    wrong = []
    for name, tree in list_modules():
        if name.startswith("cli/"):
            continue
        for node in ast.walk(tree):
            called = node.func if isinstance(node, ast.Call) else None
            is_print = isinstance(called, ast.Name) and called.id in ("print", "exit")
            is_exit = isinstance(called, ast.Attribute) and ast.unparse(called) == "sys.exit"
            if is_print or is_exit:
                wrong.append(f"{name}:{getattr(node, 'lineno', 0)}")
    assert wrong == []


LIGHT_COMMANDS = (
    *("--help", "search --help", "lr-range --help", "export --help", "leaderboard --help"),
    *("spaces list", "spaces knobs"),
)
RUN_COMMAND = """
import sys
from tune_cifar.cli.app import app
try:
    app(sys.argv[1:], prog_name="tune_cifar")
except SystemExit as exc:
    assert not exc.code
heavy = {"ray", "torch", "mlflow", "optuna", "pandas", "albumentations", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


@pytest.mark.parametrize("command", LIGHT_COMMANDS)
def test_light_commands_import_nothing_heavy(command: str, workplace: Path) -> None:
    words = [sys.executable, "-c", RUN_COMMAND, *command.split()]
    answer = subprocess.run(words, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]


def test_files_and_functions_keep_their_sizes() -> None:
    long = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 450:
            long.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > 80:
                    long.append(f"{path.name}:{node.name}: {size} lines")
    assert long == []
