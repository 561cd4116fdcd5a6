"""What a search ran on: versions, commit, machine, digest of the code that decides results."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGE = Path(__file__).resolve().parents[1]
# What decides what is tried, how it is trained, scored and stopped. The other packages only show, store and upload.
DECIDING_PACKAGES = ("schema", "space", "data", "augment", "models", "train", "search", "record")
# Shown beside every result; only train.numerics.COMPUTING_LIBRARIES may change bits.
RECORDED_LIBRARIES = (
    "tune_cifar",
    "torch",
    "torchvision",
    "ray",
    "optuna",
    "mlflow",
    "albumentations",
    "numpy",
)


def find_version(name: str) -> str:
    """Of an installed distribution; a package run from its source tree has none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def describe_environment() -> dict[str, str]:
    """Versions, digest of the code, git commit (with `+changes` for an uncommitted tree), platform, cores and memory,
    for the record."""
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {name: find_version(name) for name in RECORDED_LIBRARIES}
    facts |= {
        "cores": str(os.cpu_count()),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
    }
    facts["code"] = digest_code()
    commit = _ask_git(PACKAGE.parent, "rev-parse", "HEAD")
    if commit:
        facts["git_commit"] = commit + (
            "+changes" if _ask_git(PACKAGE.parent, "status", "--porcelain") else ""
        )
    return facts


def digest_code(package: Path = PACKAGE) -> str:
    """SHA-256 (16 digits) of the code that decides results: equal digests, equal decisions.

    Args:
        package: the folder of tune_cifar.
    """
    digest = hashlib.sha256()
    for name in DECIDING_PACKAGES:
        single = package / f"{name}.py"
        for path in [single] if single.exists() else sorted((package / name).rglob("*.py")):
            digest.update(
                path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
            )
    return digest.hexdigest()[:16]


def _ask_git(folder: Path, *words: str) -> str:
    """git's answer about a folder, or an empty string where there is no git or no checkout."""
    if not (folder / ".git").exists():
        return ""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()
