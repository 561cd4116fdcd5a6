"""The house's two tables: imports go down only, and every heavy dependency has its rooms."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tune_cifar"

LEVELS = {
    "errors": -1,  # everything may raise
    "schema": 0,
    "space": 1,
    "shapes": 1,
    "optim": 2,
    "models": 2,
    "augment": 2,
    "data": 2,
    "checkpoint": 2,
    "fidelity": 2,
    "numerics": 2,
    "judge": 2,
    "step": 3,
    "engine": 4,
    "events": 2,
    "record": 3,
    "train": 5,
    "sampler": 5,
    "mlstore": 3,
    "mlviews": 3,
    "mltrials": 4,
    "mlruns": 5,
    "tracking": 6,
    "results": 5,
    "plots": 5,
    "tables": 6,
    "dashboard": 6,
    "health": 6,
    "report": 8,
    "driver": 6,
    "openings": 0,
    "sealed": 6,
    "plan": 6,
    "preflight": 5,
    "forecast": 4,
    "resume": 6,
    "worker": 6,
    "search": 7,
    "reproduce": 7,
    "confirm": 7,
    "lr_range": 7,
    "export": 7,
    "cli": 9,
    "live": 9,
}
# A package's modules may import each other; the command line's may import live.
ROOMS = {
    "ray": {"search", "worker"},
    "optuna": {"space", "sampler", "tables", "dashboard"},
    "mlflow": {"mlstore", "mlruns"},
    "filelock": {"mlstore", "tracking"},
    "albumentations": {"augment/reference"},
    "cv2": {"augment/reference"},
    "scipy": {"confirm"},
    # cli/look, tracking: for type checking only
    "pandas": {"results", "tables", "health", "plots", "report", "cli/look", "tracking"},
    "matplotlib": {"plots", "report"},  # report: for type checking only
    "plotly": {"plots/interactive"},
    "jinja2": {"report"},
    "pydantic": {"schema", "space", "events"},
    "pydantic_core": {"schema", "space"},
    "ruamel": {"space"},
    "torchvision": {"data"},
    "torchinfo": {"models/summary"},
    "safetensors": {"checkpoint"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "onnxscript": {"export"},
    "cryptography": {"models/layers"},
    "typer": {"cli"},
    "rich": {"live", "cli"},
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


def test_every_module_has_a_level() -> None:
    assert {name.split("/")[0] for name, _ in list_modules()} == set(LEVELS)


def test_imports_go_down_only() -> None:
    wrong = []
    for name, tree in list_modules():
        room = name.split("/")[0]
        for imported in list_imports(tree):
            parts = imported.split(".")
            if parts[0] != "tune_cifar" or len(parts) == 1 or parts[1] == room:
                continue
            if LEVELS[parts[1]] >= LEVELS[room] and room != "cli":
                wrong.append(f"{name} imports {imported}")
    assert wrong == []


def test_every_heavy_dependency_stays_in_its_room() -> None:
    wrong = []
    for name, tree in list_modules():
        for imported in list_imports(tree):
            rooms = ROOMS.get(imported.split(".")[0])
            if rooms is not None and name not in rooms and name.split("/")[0] not in rooms:
                wrong.append(f"{name} imports {imported}")
    assert wrong == []


def test_only_one_room_can_open_the_test_set() -> None:
    openers = set()
    for name, tree in list_modules():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            if "load_test" in names:
                openers.add(name)
    assert openers == {"sealed"}


def test_only_optim_names_torchs_optimizers() -> None:
    importers = {
        name for name, tree in list_modules() if any(found.startswith("torch.optim") for found in list_imports(tree))
    }
    assert importers == {"optim"}


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


def test_files_and_functions_keep_the_houses_sizes() -> None:
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
