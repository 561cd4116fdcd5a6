"""A Ray cluster of several machines on one: each node has namespaces of its own.

A node has its own network address, host name, processes, shared memory and temporary folder, and
does not see the folders that are hidden from it. The head has no core for trials and runs in this
machine's own namespaces. Needs root with CAP_SYS_ADMIN and CAP_NET_ADMIN.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BRIDGE, SUBNET, PORT = "tcbr0", "10.77.0", 6399
HEAD = f"{SUBNET}.1"
ADDRESS = f"{HEAD}:{PORT}"
RAY = Path(sys.executable).parent / "ray"
# Short, since a socket's path has 107 bytes; not /tmp, in which tests keep their own files.
TEMPORARY = Path("/tmp/tc-net")
STORE_BYTES = 200 * 2**20
PATIENCE_SECONDS = 300.0
# A node that is cut off is noticed after about 6 s instead of 60.
FAST_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}

COUNT = f"""
import time
from ray._raylet import GcsClient

def count():
    try:
        client = GcsClient(address="{ADDRESS}")
        return sum(node.state == 0 for node in client.get_all_node_info().values())
    except Exception:  # not yet listening
        return 0

"""


def find_problem() -> str | None:
    """Return why no such cluster can be made here; None when it can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "ip and unshare are not installed"
    tries = ("ip netns add tctry", "ip netns del tctry", "unshare --mount --pid --fork true")
    for command in (*tries, "ip link add tctry0 type bridge", "ip link del tctry0"):
        done = subprocess.run(command.split(), capture_output=True, text=True)
        if done.returncode:
            return f"{command}: {done.stderr.strip()}"
    return None


@dataclass(frozen=True)
class NetNode:
    """A machine of the cluster."""

    name: str
    address: str
    process: subprocess.Popen[bytes]

    @property
    def inside(self) -> int:
        """The process id, seen from here, of the first process inside its namespaces."""
        return int(psutil.Process(self.process.pid).children()[0].pid)


class NetCluster:
    """The cluster; a context manager that leaves nothing behind.

    Args:
        hidden: folders that nodes do not see, unless one is added with others.
        variables: of the head and of every node, such as FAST_CHECKS.
    """

    def __init__(
        self, folder: Path, hidden: Sequence[Path], variables: dict[str, str] | None = None
    ) -> None:
        self._logs = folder
        self._hidden = hidden
        left_out = ("RAY_", "TUNE_", "PYTHONPATH")
        kept = {name: text for name, text in os.environ.items() if not name.startswith(left_out)}
        access = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        self._environment = kept | access | (variables or {})
        self.nodes: dict[str, NetNode] = {}
        self._head: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> NetCluster:
        self._clean()
        self._logs.mkdir(parents=True, exist_ok=True)
        _run(f"ip link add {BRIDGE} type bridge")
        _run(f"ip addr add {HEAD}/24 dev {BRIDGE}")
        _run(f"ip link set {BRIDGE} up")
        words = ["--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--num-cpus=0"]
        words += ["--num-gpus=0", "--include-dashboard=false", f"--temp-dir={TEMPORARY}"]
        self._head = self._start([str(RAY), "start", *words, *self._common], "head")
        self.wait_for(1)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for node in self.nodes.values():
            _kill_tree(node.process)
        if self._head is not None:
            _kill_tree(self._head)
        self._clean()

    @property
    def _common(self) -> list[str]:
        return [f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats", "--block"]

    def _start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        with (self._logs / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                env=self._environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )

    def add(
        self,
        cpus: int = 1,
        hidden: Sequence[Path] | None = None,
        variables: dict[str, str] | None = None,
    ) -> str:
        """Start a further node; return its name once it has joined."""
        number = 1 + len(self.nodes)
        name, address = f"tc{number}", f"{SUBNET}.{10 + number}"
        _run(f"ip netns add {name}")
        _run(f"ip link add v{name} type veth peer name eth0 netns {name}")
        _run(f"ip link set v{name} master {BRIDGE} up")
        _run(f"ip -n {name} addr add {address}/24 dev eth0")
        _run(f"ip -n {name} link set eth0 up")
        _run(f"ip -n {name} link set lo up")
        script = ["mount --make-rprivate /", "mount -t tmpfs -o size=2g none /dev/shm"]
        script += [f"mkdir -p {TEMPORARY}", f"mount -t tmpfs -o size=1g none {TEMPORARY}"]
        for folder in self._hidden if hidden is None else hidden:
            script += [f"mkdir -p {folder}", f"mount -t tmpfs -o size=1g none {folder}"]
        exports = " ".join(f"{key}={text}" for key, text in (variables or {}).items())
        words = [f"--address={ADDRESS}", f"--node-ip-address={address}", f"--num-cpus={cpus}"]
        ray = f"exec env {exports} {RAY} start {' '.join([*words, '--num-gpus=0', *self._common])}"
        script += [f"hostname {name}", "cd /", ray]
        namespaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child"]
        command = ["ip", "netns", "exec", name, *namespaces, "--mount-proc"]
        process = self._start([*command, "bash", "-c", "; ".join(script)], name)
        before = self.count_alive()
        self.nodes[name] = NetNode(name, address, process)
        self.wait_for(before + 1)
        return name

    def kill(self, name: str) -> None:
        """Kill -9 everything on a node, like a power cut."""
        _kill_tree(self.nodes[name].process)

    def cut(self, name: str) -> None:
        """Pull a node's cable."""
        _run(f"ip link set v{name} down")

    def heal(self, name: str) -> None:
        """Plug it in again."""
        _run(f"ip link set v{name} up")

    def enter(self, name: str) -> list[str]:
        """Return the words that run a command on a node."""
        kinds = ["--mount", "--uts", "--net", "--pid"]
        return ["nsenter", f"--target={self.nodes[name].inside}", *kinds, "--"]

    def count_alive(self) -> int:
        """Return the nodes that the head has for alive, itself included; nothing joins."""
        return int(self._ask("print(count())"))

    def wait_for(self, number: int) -> None:
        """Wait until so many nodes are alive."""
        self._ask(f"while count() != {number}: time.sleep(0.2)")

    def _ask(self, question: str) -> str:
        """Run a few words in a process that has the cluster's token; return what it prints."""
        command = [sys.executable, "-c", COUNT + question]
        done = subprocess.run(
            command,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode == 0, f"{done.stderr[-2000:]}; see {self._logs}"
        return done.stdout

    def _clean(self) -> None:
        """Remove what this cluster, or one that was killed, has left."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if any(word.startswith(f"--node-ip-address={SUBNET}.") for word in words):
                _kill_below(process)
        names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        for line in names.splitlines():
            if (name := line.split()[0]).startswith("tc"):
                _run(f"ip netns del {name}", check=False)
                _run(f"ip link del v{name}", check=False)
        _run(f"ip link del {BRIDGE}", check=False)
        shutil.rmtree(TEMPORARY, ignore_errors=True)


def _run(command: str, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, capture_output=True)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all below it, and wait for its end."""
    with suppress(psutil.NoSuchProcess):
        _kill_below(psutil.Process(process.pid))
    process.kill()
    process.wait()


def _kill_below(process: psutil.Process) -> None:
    """Kill a process and all below it."""
    for each in (*process.children(recursive=True), process):
        with suppress(psutil.NoSuchProcess):
            each.kill()
