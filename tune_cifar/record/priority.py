"""Priority of a session of processes, where Linux divides the CPU between sessions."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

# The kernel takes one change in a tenth of a second, from all users but root together.
MAX_TRIES, TRY_SECONDS = 20, 0.1


def make_session_nice(pid: int = 0) -> None:
    """Give a process's session, as a whole, the niceness of its first process.

    With `sched_autogroup_enabled` the kernel first divides the CPU evenly between sessions; a
    process's own niceness counts only within its session. A session that was started with `nice`
    (by cron, by another program, with `setsid nice`) gives way to others after this call. One that
    was not, such as a terminal's, stays as it is, since other commands are in it too.

    Args:
        pid: of a process in the session; 0 is this process.
    """
    group = Path("/proc", str(pid or "self"), "autogroup")
    with suppress(OSError):  # no such kernel, no right to write, or the first process has ended
        first = os.getsid(pid)  # 0: it runs outside of this container
        nice = os.getpriority(os.PRIO_PROCESS, first) if first else 0
        fields = group.read_text().split()  # `/autogroup-101 nice 0`; empty where it is off
        if fields and nice > int(fields[-1]):
            _write(group, str(nice))


def _write(group: Path, nice: str) -> None:
    """Write a group's niceness, again while the kernel is busy with another change."""
    for _ in range(MAX_TRIES):
        with suppress(BlockingIOError):
            group.write_text(nice)
            return
        time.sleep(TRY_SECONDS)
