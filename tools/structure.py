"""Measure the shape of the package: `python tools/structure.py [FOLDER OF A CHECKOUT]`.

Prints modules, packages, arrows between them, line lengths, function lengths and comment shares, as
analysis/FINDINGS.md quotes them. Lines are all lines of all .py files, blank ones included.
"""

from __future__ import annotations

import ast
import statistics
import sys
import tokenize
from pathlib import Path


def list_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def list_arrows(package: Path, files: list[Path]) -> set[tuple[str, str]]:
    """Return (module or package, what it imports) below the package, each pair once."""

    def find_box(parts: tuple[str, ...]) -> str:
        return parts[0].removesuffix(".py")

    arrows = set()
    for path in files:
        box = find_box(path.relative_to(package).parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == package.name:
                names = [f"{package.name}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                parts = name.split(".")
                if parts[0] == package.name and len(parts) > 1 and parts[1] != box:
                    arrows.add((box, parts[1]))
    return {(box, other) for box, other in arrows if box != "__init__"}


def measure(root: Path) -> dict[str, object]:
    package = root / "tune_cifar"
    files = list_files(package)
    texts = [path.read_text(encoding="utf-8") for path in files]
    lines = [line for text in texts for line in text.splitlines()]
    lengths = []
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append((node.end_lineno or node.lineno) - node.lineno + 1)
    num_comments = 0
    for path in files:
        with path.open("rb") as file:
            tokens = tokenize.tokenize(file.readline)
            num_comments += sum(token.type == tokenize.COMMENT for token in tokens)
    in_root = [path.stem for path in package.glob("*.py") if not path.stem.startswith("__")]
    num_filled = sum(bool(line.strip()) for line in lines)
    return {
        "modules in the root": len(in_root),
        "modules": sum(not path.stem.startswith("__") for path in files),
        "packages": sum((path / "__init__.py").exists() for path in package.iterdir()),
        "arrows between boxes of the root": len(list_arrows(package, files)),
        "lines": len(lines),
        "lines that are not blank": num_filled,
        "lines over 100 columns": f"{sum(len(line) > 100 for line in lines) / len(lines):.1%}",
        "comments per line that is not blank": f"{num_comments / num_filled:.1%}",
        "median function": statistics.median(lengths),
        "longest function": max(lengths),
        "lines of tests": sum(
            len(path.read_text(encoding="utf-8").splitlines())
            for path in list_files(root / "tests")
        ),
        "words of README.md": len((root / "README.md").read_text(encoding="utf-8").split()),
    }


if __name__ == "__main__":
    for what, value in measure(Path(sys.argv[1] if len(sys.argv) > 1 else ".")).items():
        print(f"{what}: {value}")
