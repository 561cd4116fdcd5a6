"""What this process may use of the machine: cores and memory, within a container's limits.

A container is a control group (cgroup) of the Linux kernel. Its limits are read from files, in the
layout of version 1 (a tree for each kind of limit) or 2 (one tree). The group's parents limit it
too. Elsewhere there are no such files, and the machine's own numbers count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")


def count_cores(root: Path = ROOT) -> int:
    """Return the number of CPU cores that this process may use.

    Those that it may run on (macOS cannot tell: all), or fewer under a quota of CPU time, of which
    a fraction of a core does not count; at least 1.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    if hasattr(psutil.Process, "cpu_affinity"):
        num_cores = len(psutil.Process().cpu_affinity() or [0])
    else:
        num_cores = os.cpu_count() or 1
    quotas = [int(quota) for quota in _list_quotas(root)]
    return max(1, min([num_cores, *quotas]))


def find_memory(root: Path = ROOT) -> int:
    """Return the bytes of memory that this process may use: the machine's, or its group's limit.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    limits = []
    for folder in _list_groups(root, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limits += [int(word) for word in _read_words(folder / name) if word.isdecimal()]
    # Version 1 writes a huge number for no limit, version 2 `max`.
    return min([int(psutil.virtual_memory().total), *limits])


def _list_quotas(root: Path) -> Iterator[float]:
    """Yield the cores' worth of CPU time that the group, and each of its parents, allows."""
    for folder in _list_groups(root, "cpu"):
        words = _read_words(folder / "cpu.max")
        if not words:
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [word for name in files for word in _read_words(folder / name)]
        # `max` (version 2) and -1 (version 1) are no limit.
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
            yield int(words[0]) / int(words[1])


def _list_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups that limit `controller`, each with its parents."""
    paths = dict(_list_paths(root))
    for line in _read_lines(root / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        # A mount has id, parent, device, mounted part and folder; a file system type, source and
        # options.
        mounted, folder = (mount.split() + [""] * 5)[3:5]
        kind, _, options = (system.split() + [""] * 3)[:3]
        if kind == "cgroup2":
            path = paths.get("")
        elif kind == "cgroup" and controller in options.split(","):
            path = paths.get(controller)
        else:
            continue
        if path is None:
            continue
        top = root / folder.lstrip("/")
        # In a container the mounted part is often the container's own group.
        is_inside = PurePosixPath(path).is_relative_to(mounted)
        parts = PurePosixPath(path).relative_to(mounted).parts if is_inside else ()
        yield from (top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def _list_paths(root: Path) -> Iterator[tuple[str, str]]:
    """Yield each controller and the path of this process's group in its tree; "" is version 2."""
    for line in _read_lines(root / "proc/self/cgroup"):
        _, controllers, path = (line.split(":", 2) + [""] * 2)[:3]
        yield from ((controller, path) for controller in controllers.split(","))


def _read_lines(path: Path) -> list[str]:
    """Return a file's lines; none where it is missing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _read_words(path: Path) -> list[str]:
    return " ".join(_read_lines(path)).split()
