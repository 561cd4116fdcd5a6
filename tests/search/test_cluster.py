"""Ray's processes: who starts them, who may use them, and what Ray must not do by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.builders import ROOT
from tune_cifar.errors import ConfigError
from tune_cifar.search.cluster import _Cluster, _in_use, start_ray
from tune_cifar.search.plan import Resources

pytestmark = pytest.mark.slow
ONE_CORE = Resources(cpus_per_trial=1, gpus_per_trial=0, max_concurrent=1, num_gpus=0)


def run_script(script: str, folder: Path, **more: str) -> str:
    """Run a Python script in a folder, with more environment variables; return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | more
    command = [sys.executable, "-c", script]
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr[-3000:]
    return answer.stdout


CLUSTERS = """
import threading
from tune_cifar.search.cluster import ray, start_ray
from tune_cifar.search.plan import Resources

def start(cpus):
    start_ray(Resources(cpus, 0, 1, 0))
    one = ray.remote(num_cpus=cpus)(lambda: 1)
    assert ray.get(one.remote(), timeout=300) == 1
    return ray.get_runtime_context().get_session_name()

small, large = start(1), start(2)
print(small != large, start(1) == start(2) == large)
"""


def test_a_search_that_needs_more_gets_more_and_one_that_needs_less_starts_at_once(
    tmp_path: Path,
) -> None:
    """Before, the second search waited for cores that the first one's cluster did not have."""
    assert run_script(CLUSTERS, tmp_path) == "True True\n"


def test_a_cluster_is_used_as_long_as_the_thread_that_started_it_lives() -> None:
    other = threading.Thread(target=lambda: None)
    assert _Cluster("s", 2, 0, threading.main_thread()).suits(1, 0)
    assert not _Cluster("s", 2, 0, threading.main_thread()).suits(3, 0)
    assert not _Cluster("s", 2, 0, threading.main_thread()).suits(2, 1)
    assert not _Cluster("s", 2, 0, other).suits(1, 0)


OWNED_BY_THE_USER = """
import tune_cifar.search.worker
import ray
from tune_cifar.errors import ConfigError
from tune_cifar.search.cluster import start_ray
from tune_cifar.search.plan import Resources
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
try:
    start_ray(Resources(1, 0, 1, 0))
except ConfigError as exc:
    print(exc)
print(ray.get(ray.remote(lambda: 1).remote()))
ray.shutdown()
start_ray(Resources(1, 0, 1, 0))
print(ray.get(ray.remote(lambda: 2).remote()))
"""


def test_a_cluster_that_other_code_started_is_neither_used_nor_ended(tmp_path: Path) -> None:
    rule = "a search starts Ray itself, got a process in which other code has started it."
    hint = "Call ray.shutdown() before, or run the search in another process."
    assert run_script(OWNED_BY_THE_USER, tmp_path) == f"ray: {rule} {hint}\n1\n2\n"


def test_a_second_search_in_one_process_is_refused_while_one_runs() -> None:
    with _in_use, pytest.raises(ConfigError, match="one search at a time runs in a process"):
        start_ray(ONE_CORE)


# Started in a process whose parent looks like `uv run`, which is all that Ray's hook asks for.
UNDER_UV = """
from tune_cifar.search.cluster import ray, start_ray
from tune_cifar.search.plan import Resources
from ray._private.runtime_env.uv_runtime_env_hook import _get_uv_run_cmdline
print((_get_uv_run_cmdline() or [])[:2])
start_ray(Resources(1, 0, 1, 0))
print(ray.get_runtime_context().runtime_env)
print(ray.get(ray.remote(lambda: 1).remote(), timeout=300))
"""


@pytest.mark.parametrize("asked_for", ["", pytest.param("1", marks=pytest.mark.faults)])
def test_under_uv_run_workers_start_and_no_folder_is_uploaded(
    tmp_path: Path, asked_for: str
) -> None:
    """Ray's hook fails in a folder below the project's, and in the project's it uploads it."""
    (tmp_path / "pyproject.toml").write_text("")
    folder = tmp_path / "below"
    folder.mkdir()
    # A shell that is called `uv` and runs the file `run`; `exit` keeps it from becoming Python.
    (folder / "run").write_text('"$1" -c "$2"; exit $?\n')
    more = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": asked_for} if asked_for else {}
    script = (
        "import os, subprocess, sys\n"
        f"os.environ.update({more!r})\n"
        f"words = ['uv', 'run', sys.executable, {UNDER_UV!r}]\n"
        "sys.exit(subprocess.run(words, executable='/bin/sh').returncode)\n"
    )
    assert run_script(script, folder) == "['uv', 'run']\n{}\n1\n"


def test_a_job_of_another_ray_cluster_can_run_a_search(tmp_path: Path) -> None:
    """Ray's job server and platforms on it set these, for a working folder that they uploaded."""
    job = '{"runtime_env": {"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"}, "metadata": {}}'
    script = UNDER_UV + "import os\nprint('RAY_JOB_CONFIG_JSON_ENV_VAR' in os.environ)\n"
    more = {"RAY_JOB_CONFIG_JSON_ENV_VAR": job, "RAY_RUNTIME_ENV_HOOK": "no.such.hook"}
    assert run_script(script, tmp_path, **more) == "[]\n{}\n1\nTrue\n"
