"""The Ray cluster of this process: its own, started for searches, or one that is there, joined.

Its own is kept for the next search and replaced if too small. Nobody else's cluster is used without
its address, and none is ended. One search at a time runs in a process.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

# Before ray: it sets what ray reads when it is imported.
from tune_cifar.search.worker import JOINS_CLUSTERS, OWN_TOKEN, RAY_ENVIRONMENT

# isort: split

import ray

from tune_cifar.errors import ConfigError
from tune_cifar.search.plan import Resources, SearchRequest, count_fitting
from tune_cifar.search.trial_files import ACCESS_RULE

# With these, those who start Ray jobs make Ray upload or fetch a working folder. Workers on this
# machine need none.
RUNTIME_ENV_VARIABLES = ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_RUNTIME_ENV_HOOK")
# What workers on other machines must have as the driver has it.
WORKER_VARIABLES = ("RAY_CHDIR_TO_TRIAL_DIR", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
CONNECT_SECONDS = 5.0
# How long it takes at most until a node that came or went is seen.
POLL_SECONDS = 2.0
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class _Cluster:
    """A cluster that this process has started or joined."""

    session: str
    """Ray's name of it."""
    num_cpus: int
    num_gpus: int
    thread: threading.Thread
    """Ray's processes end with the thread that started them."""
    address: str | None = None
    """Of a joined one."""

    def suits(self, num_cpus: int, num_gpus: int) -> bool:
        """Return whether it has the resources and lives as long as this thread."""
        is_lasting = self.thread in (threading.current_thread(), threading.main_thread())
        has_room = self.num_cpus >= num_cpus and self.num_gpus == num_gpus
        return self.address is None and is_lasting and has_room


_current: _Cluster | None = None
_in_use = threading.Lock()


def start_ray(resources: Resources) -> None:
    """Start a silent local Ray cluster without dashboard, unless ours is there and suits.

    Raises:
        ConfigError: when another search runs in this process, or other code has started Ray.
    """
    with use_ray(resources):
        pass


def join(address: str) -> None:
    """Become a driver of the cluster at HOST:PORT, or of this machine's (auto).

    Its workers get this very code, whatever is installed where they run.

    Raises:
        ConfigError: it cannot be reached, has another version of Ray or Python, another search
            runs in this process, or it has Ray with a token of its own.
    """
    with use_ray(address):
        pass


@contextmanager
def use_ray(place: Resources | str) -> Iterator[None]:
    """Start Ray as `start_ray` does, or `join` an address; keep this process's other searches out.

    Raises:
        ConfigError: as these do.
    """
    if not _in_use.acquire(blocking=False):
        hint = "Wait for its end, or run this one in another process."
        raise ConfigError(f"ray: one search at a time runs in a process, got a second. {hint}")
    try:
        if isinstance(place, str):
            _join(place)
        else:
            _start(place.cpus_per_trial * place.max_concurrent, place.num_gpus)
        yield
    finally:
        _in_use.release()


def _start(num_cpus: int, num_gpus: int) -> None:
    global _current
    if JOINS_CLUSTERS:
        _refuse_both("without `address`")
    if ray.is_initialized():
        _check_is_ours()
        if _current is not None and _current.suits(num_cpus, num_gpus):
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
    _current = _Cluster(_get_session(), num_cpus, num_gpus, threading.current_thread())


def _get_session() -> str:
    return str(ray.get_runtime_context().get_session_name())


def _check_is_ours() -> None:
    """Refuse a Ray that other code has started."""
    if _current is None or _get_session() != _current.session:
        rule = "a search starts Ray itself, got a process in which other code has started it"
        hint = "Call ray.shutdown() before, or run the search in another process."
        raise ConfigError(f"ray: {rule}. {hint}")


@contextmanager
def _hide_variables() -> Iterator[None]:
    """Take RUNTIME_ENV_VARIABLES out of the environment for a while."""
    hidden = {name: os.environ.pop(name, None) for name in RUNTIME_ENV_VARIABLES}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


def _join(address: str) -> None:
    global _current
    if ray.is_initialized() and _current is not None and _current.address == address:
        _check_is_ours()
        return
    _check_address(address)
    if ray.is_initialized():
        _check_is_ours()
        ray.shutdown()
    # Else a searcher like ours has one pending trial: workers would start one after another.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1000")
    variables = {name: RAY_ENVIRONMENT[name] for name in WORKER_VARIABLES}
    try:
        ray.init(
            address=address,
            namespace=f"tune_cifar-{secrets.token_hex(8)}",
            runtime_env={"py_modules": [str(PACKAGE)], "env_vars": variables},
            log_to_driver=False,
            logging_level="CRITICAL",
        )
    except Exception as exc:  # Ray raises many kinds
        raise ConfigError(_describe_refusal(address, str(exc))) from exc
    _current = _Cluster(_get_session(), 0, 0, threading.current_thread(), address)


def _check_address(address: str) -> None:
    """Refuse an address that is none, or where nobody listens: Ray would wait for minutes."""
    if address.startswith("ray://"):
        rule = "`address` must be HOST:PORT of the cluster, as `ray start` has it, or auto"
        hint = "Run the search on a node of the cluster, or as a job (`ray job submit`)."
        raise ConfigError(f"{rule}, got {address} (Ray Client). {hint}")
    if OWN_TOKEN is not None and os.environ.get("RAY_AUTH_TOKEN") == OWN_TOKEN:
        _refuse_both("with `address`")
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"`address` must be HOST:PORT or auto, got {address!r}.")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        hint = "`ray status` on a node of the cluster shows whether it is there."
        raise ConfigError(f"`address`: {address} cannot be reached ({reason}). {hint}") from exc


def _refuse_both(second: str) -> NoReturn:
    """Refuse to use a cluster's token for processes of this machine, or the other way round."""
    rule = "a process must search on one machine or on a cluster, got both"
    raise ConfigError(f"ray: {rule}. Run the one {second} in another process.")


def _describe_refusal(address: str, words: str) -> str:
    """Return why a cluster could not be joined: the first line that says something of Ray's."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    if "Version mismatch" in words:
        found = "; ".join(line for line in lines if line.startswith(("Ray:", "Python:")))
        rule = "the cluster must have this Ray and Python"
        return f"`address`: {rule}, got (cluster, then here) {found or lines[0]}."
    if "Could not find any running Ray instance" in words:
        return "`address`: no Ray runs on this machine. Give HOST:PORT, or `ray start` it here."
    if "Failed to connect to Ray cluster" in words:  # though something listens there
        problem = f"got none or another: {address} does not let this process in"
        return f"`address`: {ACCESS_RULE}, {problem}."
    reason = lines[0][:300].rstrip(".") if lines else "no reason given"
    hint = "A search joins from a machine on which `ray start --address` has been typed."
    return f"`address`: {address} cannot be joined ({reason}). {hint}"


# Nodes


@dataclass(frozen=True)
class Node:
    """A machine of a joined cluster."""

    id: str
    """Ray's."""
    name: str
    """Of the host; with the address where two have the same."""
    address: str
    num_cpus: int
    num_gpus: int

    def count_slots(self, cpus: int, gpus: float) -> int:
        """Return the trials that fit at once; none trains on two nodes."""
        return count_fitting(self.num_cpus, self.num_gpus, cpus, gpus)


def list_nodes() -> list[Node]:
    """Return the nodes that are alive and have a CPU for tasks, the largest first."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    hosts = [node["NodeManagerHostname"] for node in alive]
    found = []
    for node, host in zip(alive, hosts, strict=True):
        address, total = node["NodeManagerAddress"], node["Resources"]
        name = host if hosts.count(host) == 1 else f"{host}-{address}"
        sizes = int(total.get("CPU", 0)), int(total.get("GPU", 0))
        found.append(Node(node["NodeID"], name, address, *sizes))
    usable = [node for node in found if node.num_cpus]
    return sorted(usable, key=lambda node: (-node.num_gpus, -node.num_cpus, node.name))


def find_tier(request: SearchRequest) -> str:
    """Return the tier of a search on a cluster: full where a node has a GPU that may be used."""
    assert request.address is not None
    join(request.address)
    has_gpu = request.device != "cpu" and any(node.num_gpus for node in list_nodes())
    return "full" if has_gpu else "cpu"


class LiveNodes:
    """The nodes that may run trials now: they come and go, and some fail whatever they are given.

    Args:
        list_nodes: returns the nodes that are alive.
    """

    def __init__(self, list_nodes: Callable[[], list[Node]] = list_nodes) -> None:
        self._list_nodes = list_nodes
        self._next_poll = 0.0
        self._nodes: dict[str, Node] = {}
        self._left_out: set[str] = set()
        # Of each node the trials that failed on it in a row, before their first epoch.
        self._failures: dict[str, list[int]] = {}

    def poll(self) -> Mapping[str, Node]:
        """Return the nodes by id, asked for again after POLL_SECONDS."""
        if time.monotonic() >= self._next_poll:
            self._nodes = {node.id: node for node in self._list_nodes()}
            self._next_poll = time.monotonic() + POLL_SECONDS
        return self._nodes

    @property
    def usable(self) -> list[Node]:
        """The nodes that are not left out."""
        return [node for node in self.poll().values() if node.id not in self._left_out]

    def has_another(self, node_id: str) -> bool:
        """Return whether trials may run on another node than this."""
        return any(node.id != node_id for node in self.usable)

    def is_left_out(self, node_id: str) -> bool:
        """Return whether a node gets no more trials."""
        return node_id in self._left_out

    def leave_out(self, node_id: str) -> None:
        """Give a node no more trials."""
        self._left_out.add(node_id)

    def note_failure(self, node_id: str, trial: int) -> bool:
        """Note that a trial failed on a node before its first epoch.

        After two such trials in a row the node is left out, if another remains.

        Returns:
            whether it is left out from now on.
        """
        failed = self._failures.setdefault(node_id, [])
        failed.append(trial)
        if len(set(failed)) < 2 or node_id in self._left_out or not self.has_another(node_id):
            return False
        self._left_out.add(node_id)
        return True

    def note_success(self, node_id: str) -> None:
        """Note that a trial trained an epoch on a node."""
        self._failures.pop(node_id, None)

    def absolve(self, trial: int) -> None:
        """Take back the failures of a trial that fails everywhere: it was the trial's own."""
        for failed in self._failures.values():
            failed[:] = [number for number in failed if number != trial]
