"""Cores and memory that a container, a quota or an affinity leave to this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.builders import ROOT
from tune_cifar.record.environment import describe_environment
from tune_cifar.record.machine import count_cores, find_memory

GIB = 2**30
TOTAL = int(psutil.virtual_memory().total)
MEMORY_V1, CPU_V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup"
NO_LIMIT_V1 = 2**63 - 4096
# Mounts as the kernel lists them: those of version 1, each a tree, and that of version 2.
MOUNTS_V1 = """\
29 23 0:26 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755
33 29 0:30 {mounted} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct
38 29 0:35 {mounted} /sys/fs/cgroup/memory rw,nosuid shared:20 - cgroup cgroup rw,memory
41 29 0:38 {mounted} /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw
"""
MOUNTS_V2 = """\
22 1 252:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 23 0:26 {mounted} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
"""


@pytest.fixture(autouse=True)
def _many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 cores, all of which this process may run on."""
    monkeypatch.setattr("psutil.Process.cpu_affinity", lambda self: list(range(16)))


def lay_out(root: Path, version: int, path: str, mounted: str, files: dict[str, object]) -> None:
    """Write /proc and /sys as the kernel does for a process in the group `path`."""
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    groups = f"5:cpu,cpuacct:{path}\n4:memory:{path}\n1:name=systemd:/\n0::/\n"
    (proc / "cgroup").write_text(groups if version == 1 else f"0::{path}\n")
    mounts = MOUNTS_V1 if version == 1 else MOUNTS_V2
    (proc / "mountinfo").write_text(mounts.format(mounted=mounted))
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")


def quota_v1(folder: str, quota: int) -> dict[str, object]:
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": 100_000}


@pytest.mark.parametrize(
    ("quota", "cores"), [(400_000, 4), (250_000, 2), (100_000, 1), (50_000, 1), (-1, 16)]
)
def test_a_quota_of_version_1_counts_in_whole_cores(tmp_path: Path, quota: int, cores: int) -> None:
    lay_out(tmp_path, 1, "/jobs", "/", quota_v1(f"{CPU_V1}/jobs", quota))
    assert count_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("400000 100000", 4), ("150000 100000", 1), ("5000 10000", 1), ("max 100000", 16)],
)
def test_a_quota_of_version_2_counts_in_whole_cores(tmp_path: Path, quota: str, cores: int) -> None:
    lay_out(tmp_path, 2, "/jobs", "/", {f"{V2}/jobs/cpu.max": quota})
    assert count_cores(tmp_path) == cores


def test_a_quota_above_the_cores_changes_nothing(tmp_path: Path) -> None:
    lay_out(tmp_path, 2, "/jobs", "/", {f"{V2}/jobs/cpu.max": "6400000 100000"})
    assert count_cores(tmp_path) == 16


def test_the_lowest_quota_of_a_group_and_its_parents_counts_in_version_1(tmp_path: Path) -> None:
    files = quota_v1(CPU_V1, -1)
    files |= quota_v1(f"{CPU_V1}/team", 300_000) | quota_v1(f"{CPU_V1}/team/me", 800_000)
    lay_out(tmp_path, 1, "/team/me", "/", files)
    assert count_cores(tmp_path) == 3


def test_the_lowest_quota_of_a_group_and_its_parents_counts_in_version_2(tmp_path: Path) -> None:
    files: dict[str, object] = {
        f"{V2}/user.slice/cpu.max": "200000 100000",
        f"{V2}/user.slice/user-1000.slice/cpu.max": "max 100000",
        f"{V2}/user.slice/user-1000.slice/session/cpu.max": "900000 100000",
    }
    lay_out(tmp_path, 2, "/user.slice/user-1000.slice/session", "/", files)
    assert count_cores(tmp_path) == 2


@pytest.mark.parametrize("path", ["/docker/abc", "/", "/docker/other"])
def test_a_containers_own_group_is_found_where_it_is_mounted(tmp_path: Path, path: str) -> None:
    """With the host's paths or its own, or entered from another group."""
    mounted = "/" if path == "/" else "/docker/abc"
    files = quota_v1(CPU_V1, 200_000) | {f"{MEMORY_V1}/memory.limit_in_bytes": GIB}
    lay_out(tmp_path, 1, path, mounted, files)
    assert (count_cores(tmp_path), find_memory(tmp_path)) == (2, GIB)


@pytest.mark.parametrize(
    ("version", "name", "limit", "expected"),
    [
        (1, f"{MEMORY_V1}/jobs/memory.limit_in_bytes", GIB, GIB),
        (1, f"{MEMORY_V1}/jobs/memory.limit_in_bytes", NO_LIMIT_V1, TOTAL),
        (1, f"{MEMORY_V1}/memory.limit_in_bytes", GIB, GIB),
        (2, f"{V2}/jobs/memory.max", GIB, GIB),
        (2, f"{V2}/jobs/memory.high", GIB, GIB),
        (2, f"{V2}/jobs/memory.max", "max", TOTAL),
        (2, f"{V2}/memory.max", GIB, GIB),
    ],
)
def test_a_memory_limit_counts(
    tmp_path: Path, version: int, name: str, limit: object, expected: int
) -> None:
    lay_out(tmp_path, version, "/jobs", "/", {name: limit})
    assert find_memory(tmp_path) == expected


def test_without_groups_the_machine_counts(tmp_path: Path) -> None:
    """As on macOS, or where /proc is not mounted."""
    assert (count_cores(tmp_path), find_memory(tmp_path)) == (16, TOTAL)


def test_files_that_say_nothing_limit_nothing(tmp_path: Path) -> None:
    files: dict[str, object] = {f"{V2}/jobs/cpu.max": "", f"{V2}/jobs/memory.max": "much"}
    lay_out(tmp_path, 2, "/jobs", "/", files)
    with (tmp_path / "proc/self/mountinfo").open("a") as file:
        file.write("a line of another kernel\n\n")
    assert (count_cores(tmp_path), find_memory(tmp_path)) == (16, TOTAL)


def test_a_system_that_does_not_know_affinity_counts_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psutil has no `cpu_affinity` on macOS."""
    monkeypatch.delattr("psutil.Process.cpu_affinity")
    assert count_cores(tmp_path) == (os.cpu_count() or 1)


def test_the_record_has_the_cores_and_the_memory_that_count() -> None:
    facts = describe_environment()
    assert facts["cores"] == str(count_cores())
    assert facts["memory_gib"] == f"{find_memory() / GIB:.1f}"


@pytest.fixture
def groups() -> Iterator[list[Path]]:
    """New groups of this machine with one core and 3 GiB; no group is left behind."""
    made: list[Path] = []
    name = f"tune_cifar-test-{os.getpid()}"
    top = Path("/sys/fs/cgroup")
    limits = {
        top / "cpu" / name / "cpu.cfs_quota_us": "100000",
        top / "memory" / name / "memory.limit_in_bytes": str(3 * GIB),
    }
    if (top / "cgroup.controllers").exists():  # version 2
        folder = top / name
        limits = {folder / "cpu.max": "100000 100000", folder / "memory.max": str(3 * GIB)}
    try:
        for file, limit in limits.items():
            if file.parent not in made:
                file.parent.mkdir()
                made.append(file.parent)
            file.write_text(limit)
    except OSError as exc:
        for folder in made:
            folder.rmdir()
        pytest.skip(f"only root can make a cgroup, outside of most containers: {exc}")
    yield made
    for folder in made:
        folder.rmdir()


def test_limits_of_a_real_group_count(groups: list[Path]) -> None:
    code = (
        "import json, os, sys; from pathlib import Path\n"
        "for folder in sys.argv[1:]: Path(folder, 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from tune_cifar.record.machine import count_cores, find_memory\n"
        "print(json.dumps([count_cores(), find_memory()]))"
    )
    words = [sys.executable, "-c", code, *map(str, groups)]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == [1, min(TOTAL, 3 * GIB)]
