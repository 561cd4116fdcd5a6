"""The environment of a search: versions, git commit, machine, digest of the deciding code."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tune_cifar.record.machine import count_cores, find_memory

# Set in the environment of a process that joins a Ray cluster: such a process makes no token of its
# own for Ray. Ray reads its token when it is imported, before any address is known.
JOINS = "TUNE_CIFAR_JOINS"
PACKAGE = Path(__file__).resolve().parents[1]
# The code that decides which trials run and how they are trained, scored and stopped. The other
# packages only show, store and upload.
DECIDING_PACKAGES = (
    "schema",
    "dataset",
    "space",
    "data",
    "augment",
    "models",
    "train",
    "search",
    "record",
)
# Shown beside every result. Those in train.numerics.COMPUTING_LIBRARIES may change a training's
# bits, those in search.resume.DECIDING_FACTS what is proposed.
RECORDED_LIBRARIES = (
    "tune_cifar",
    "torch",
    "torchvision",
    "ray",
    "optuna",
    "mlflow",
    "albumentations",
    "numpy",
    "scipy",
)


@functools.cache
def find_version(name: str) -> str:
    """Return the version of an installed distribution.

    A package that runs from its source tree has none: "not installed".
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def describe_environment() -> dict[str, str]:
    """Return versions, platform, usable cores and memory, code digest and commit, for the record.

    The commit ends in `+changes` when the tree has uncommitted changes.
    """
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {name: find_version(name) for name in RECORDED_LIBRARIES}
    facts["cores"] = str(count_cores())
    facts["memory_gib"] = f"{find_memory() / 2**30:.1f}"
    facts["code"] = digest_code()
    commit = _ask_git(PACKAGE.parent, "rev-parse", "HEAD")
    if commit:
        changes = _ask_git(PACKAGE.parent, "status", "--porcelain")
        facts["git_commit"] = f"{commit}+changes" if changes else commit
    return facts


def digest_code(package: Path = PACKAGE) -> str:
    """Return the SHA-256 (16 digits) of the code that decides results.

    Args:
        package: the folder of tune_cifar.
    """
    digest = hashlib.sha256()
    for name in DECIDING_PACKAGES:
        single = package / f"{name}.py"
        for path in [single] if single.exists() else sorted((package / name).rglob("*.py")):
            name_in_package = path.relative_to(package).as_posix().encode()
            digest.update(name_in_package + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _ask_git(folder: Path, *words: str) -> str:
    """Return git's output about a folder; empty without git or without a checkout."""
    if not (folder / ".git").exists():
        return ""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()
