"""The wheel, installed in a fresh environment elsewhere, lists its spaces and runs a search."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.builders import ROOT, SEARCH_WORDS


def run_python(python: str | Path, *words: str, **options: Any) -> str:
    """Run `python -m WORDS`; returns what it prints."""
    command = [str(python), "-m", *words]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.slow
def test_the_wheel_runs_a_smoke_search_in_a_fresh_environment(tmp_path: Path) -> None:
    dist, venv = str(tmp_path / "dist"), tmp_path / "venv"
    run_python(sys.executable, "build", "--wheel", "--no-isolation", "--outdir", dist, str(ROOT))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "tune_cifar/search_spaces/s10.yaml" in archive.namelist()

    run_python(sys.executable, "venv", "--without-pip", str(venv))
    python = venv / "bin" / "python"
    (site,) = (venv / "lib").glob("python*/site-packages")
    # The dependencies (6 GB) come from this environment, the package itself from the wheel.
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    install = ("install", "--quiet", "--no-deps", str(wheel))
    run_python(sys.executable, "pip", "--python", str(python), *install)

    ours = ("PYTHON", "TUNE_CIFAR")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    environment["TUNE_CIFAR_RUNS"] = str(tmp_path / "runs")

    def run(*words: str) -> str:
        return run_python(python, *words, cwd=tmp_path, env=environment)

    assert str(site) in run("inspect", "tune_cifar", "--details")
    listed = run("tune_cifar", "spaces", "list")
    assert all(name in listed for name in ("smoke", "s6", "s7", "s8", "s10", "s10_postact"))
    search = (*SEARCH_WORDS, "--trials=2", "--set=train_size=100", "--set=val_size=40")
    text = run("tune_cifar", *search, "--set=batch_size=8", "--max-concurrent=1", "--name=wheel")
    assert "wheel ended after" in text and "all trials" in text
