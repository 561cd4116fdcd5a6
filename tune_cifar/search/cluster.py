"""The Ray cluster of this process: started for a search, kept for the next, replaced if too small.

Nobody else's cluster is used or ended. One search at a time runs in a process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Before ray: it sets what ray reads when it is imported.
import tune_cifar.search.worker  # noqa: F401

# isort: split

import ray

from tune_cifar.errors import ConfigError
from tune_cifar.search.plan import Resources

# With these, those who start Ray jobs make Ray upload or fetch a working folder. Workers on this
# machine need none.
RUNTIME_ENV_VARIABLES = ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_RUNTIME_ENV_HOOK")


@dataclass(frozen=True)
class _Cluster:
    """A cluster that this process has started."""

    session: str
    """Ray's name of it."""
    num_cpus: int
    num_gpus: int
    thread: threading.Thread
    """Ray's processes end with the thread that started them."""

    def suits(self, num_cpus: int, num_gpus: int) -> bool:
        """Return whether it has the resources and lives as long as this thread."""
        is_lasting = self.thread in (threading.current_thread(), threading.main_thread())
        return is_lasting and self.num_cpus >= num_cpus and self.num_gpus == num_gpus


_started: _Cluster | None = None
_in_use = threading.Lock()


def start_ray(resources: Resources) -> None:
    """Start a silent local Ray cluster without dashboard, unless ours is there and suits.

    Raises:
        ConfigError: when another search runs in this process, or other code has started Ray.
    """
    with use_ray(resources):
        pass


@contextmanager
def use_ray(resources: Resources) -> Iterator[None]:
    """Start Ray as `start_ray` does, and keep other searches of this process out."""
    if not _in_use.acquire(blocking=False):
        hint = "Wait for its end, or run this one in another process."
        raise ConfigError(f"ray: one search at a time runs in a process, got a second. {hint}")
    try:
        _start(resources.cpus_per_trial * resources.max_concurrent, resources.num_gpus)
        yield
    finally:
        _in_use.release()


def _start(num_cpus: int, num_gpus: int) -> None:
    global _started
    if ray.is_initialized():
        is_ours = (
            _started is not None
            and ray.get_runtime_context().get_session_name() == _started.session
        )
        if not is_ours:
            rule = "a search starts Ray itself, got a process in which other code has started it"
            hint = "Call ray.shutdown() before, or run the search in another process."
            raise ConfigError(f"ray: {rule}. {hint}")
        if _started is not None and _started.suits(num_cpus, num_gpus):
            return
        ray.shutdown()
    with _hide_variables():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="CRITICAL",
        )
    session = ray.get_runtime_context().get_session_name()
    _started = _Cluster(session, num_cpus, num_gpus, threading.current_thread())


@contextmanager
def _hide_variables() -> Iterator[None]:
    """Take RUNTIME_ENV_VARIABLES out of the environment for a while."""
    hidden = {name: os.environ.pop(name, None) for name in RUNTIME_ENV_VARIABLES}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})
