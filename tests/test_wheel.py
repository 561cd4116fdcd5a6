"""The wheel is whole: built, installed in a fresh environment elsewhere, it lists its spaces and runs a search."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_runs_a_smoke_search_in_a_fresh_environment(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=600)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "tune_cifar/search_spaces/s10.yaml" in archive.namelist()
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")],
        check=True,
        timeout=600,
    )
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # The dependencies (6 GB) are borrowed from this environment; the package itself comes from the wheel.
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=600)
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TUNE_CIFAR"))
    }
    environment |= {"TUNE_CIFAR_RUNS": str(tmp_path / "runs")}

    def run(*words: str) -> str:
        command = [str(python), "-m", "tune_cifar", *words]
        answer = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    code = "import tune_cifar; print(tune_cifar.__file__)"
    where = subprocess.run(
        [str(python), "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert str(site) in where.stdout
    listed = run("spaces", "list")
    assert all(name in listed for name in ("smoke", "s6", "s7", "s8", "s10", "s10_postact"))
    text = run(
        "search",
        "--space",
        "smoke",
        "--tier",
        "cpu",
        "--data",
        "shapes",
        "--trials",
        "2",
        "--name",
        "wheel",
    )
    assert "wheel ended after" in text and "all trials" in text
