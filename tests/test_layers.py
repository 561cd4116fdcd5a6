"""Two tables: imports go down the tiers only, and every heavy dependency has its modules."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tune_cifar"

# From the bottom up. Packages of one tier do not import each other.
TIERS = (
    ("schema", "errors"),
    ("record", "space", "data", "models", "augment"),
    ("train", "tracking"),
    ("search",),
    ("report", "verify"),
    ("cli",),
)
TIER = {name: tier for tier, names in enumerate(TIERS) for name in names}
# Everything may raise the exceptions of errors.py.
FREE = {"errors"}
# Packages, or modules of them, that may import what is heavy or replaceable.
DEPENDENCIES = {
    "ray": {"search/run", "search/worker"},
    "optuna": {"space", "search/sampler", "report/tables", "report/dashboard"},
    "mlflow": {"tracking"},
    "filelock": {"tracking"},
    "albumentations": {"augment/reference"},
    "cv2": {"augment/reference"},
    "scipy": {"verify/confirm"},
    "pandas": {"report", "cli/leaderboard"},  # cli/leaderboard: for type checking only
    "matplotlib": {"report"},
    "plotly": {"report/plots/interactive"},
    "jinja2": {"report/html"},
    "pydantic": {"schema", "space", "record/events"},
    "pydantic_core": {"schema", "space"},
    "ruamel": {"space"},
    "torchvision": {"data"},
    "torchinfo": {"models/summary"},
    "safetensors": {"train/checkpoint"},
    "onnx": {"verify/export"},
    "onnxruntime": {"verify/export"},
    "onnxscript": {"verify/export"},
    "cryptography": {"models/dropout"},
    "typer": {"cli"},
    "rich": {"cli"},
}


@functools.cache
def list_modules() -> list[tuple[str, ast.Module]]:
    """(`augment/batched`, its tree) for every module of the package but the two entry files."""
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")
        if name not in ("__init__", "__main__"):
            modules.append((name, ast.parse(path.read_text(encoding="utf-8"))))
    return modules


def list_imports(tree: ast.Module) -> list[str]:
    """Dotted names of all modules imported anywhere in a tree."""
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
    trees = dict(list_modules())
    arrows = {
        name: {imported[len("tune_cifar.") :].replace(".", "/") for imported in list_imports(tree)}
        & trees.keys()
        for name, tree in trees.items()
    }
    assert [(a, b) for a in arrows for b in arrows[a] if a < b and a in arrows[b]] == []


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
    importers = {
        name
        for name, tree in list_modules()
        if any(found.startswith("torch.optim") for found in list_imports(tree))
    }
    assert importers == {"train/optim"}


def test_only_the_command_line_prints_or_exits() -> None:
    wrong = []
    for name, tree in list_modules():
        if name.split("/")[0] in ("cli",):
            continue
        for node in ast.walk(tree):
            called = node.func if isinstance(node, ast.Call) else None
            is_print = isinstance(called, ast.Name) and called.id in ("print", "exit")
            is_exit = isinstance(called, ast.Attribute) and ast.unparse(called) == "sys.exit"
            if is_print or is_exit:
                wrong.append(f"{name}:{getattr(node, 'lineno', 0)}")
    assert wrong == []


LIGHT_COMMANDS = (
    *(["--help"], ["search", "--help"], ["lr-range", "--help"], ["export", "--help"]),
    *(["spaces", "list"], ["spaces", "knobs"], ["leaderboard", "--help"]),
)


@pytest.mark.parametrize("command", LIGHT_COMMANDS, ids=" ".join)
def test_light_commands_import_nothing_heavy(command: list[str], workplace: Path) -> None:
    code = (
        "import sys\n"
        "from tune_cifar.cli.app import app\n"
        f"try: app({command!r}, prog_name='tune_cifar')\n"
        "except SystemExit as exc: assert not exc.code\n"
        "heavy = {'ray', 'torch', 'mlflow', 'optuna', 'pandas', 'albumentations', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
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
