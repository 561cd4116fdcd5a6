"""Searches on a cluster whose machines have nothing in common but a network, and faults on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.lab import Lab, check_complete, check_equal, count_epochs, kill
from tests.faults.netcluster import ADDRESS, FAST_CHECKS, TEMPORARY, NetCluster, find_problem
from tune_cifar.record.events import TrialPlaced, TrialRetried
from tune_cifar.record.state import SearchState
from tune_cifar.search.run_store import ATTEMPT_FILE, REFUSED_FILE

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

SIZES = ("--set", "train_size=200", "--set", "val_size=100", "--trials")
ON_CLUSTER = ("--address", ADDRESS)


@pytest.fixture(autouse=True)
def _skip_without_namespaces() -> None:
    if problem := find_problem():
        pytest.skip(f"no network namespaces here: {problem}")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "lab", options=(*SIZES, "64", *ON_CLUSTER))


@pytest.fixture
def net(tmp_path: Path, lab: Lab) -> Iterator[NetCluster]:
    """The head of a cluster whose nodes see neither run store nor anything else of the lab."""
    with NetCluster(tmp_path / "net", [lab.folder], FAST_CHECKS) as net:
        yield net


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> SearchState:
    """The search on this machine alone."""
    lab = Lab(tmp_path_factory.mktemp("undisturbed"), options=(*SIZES, "64"))
    lab.finish()
    return lab.state


def list_placed(lab: Lab, node: str) -> list[int]:
    """Return the trials of which an attempt trained on a node."""
    events = [event for event in lab.list_events() if isinstance(event, TrialPlaced)]
    return [event.trial for event in events if event.node == node]


def list_remote_processes() -> list[str]:
    """Return the titles of the workers and actors of searches on the cluster's nodes."""
    found = []
    for process in psutil.process_iter():
        try:
            title = " ".join(process.cmdline())
            is_ours = title.startswith("ray::") and not title.startswith("ray::IDLE")
            parent = process.parent() if is_ours else None
            if parent is not None and str(TEMPORARY) in " ".join(parent.cmdline()):
                found.append(title.strip())
        except psutil.Error:
            continue
    return found


def check_nothing_runs() -> None:
    """Check that no worker and no actor of a search is left on any node."""
    end = time.monotonic() + 60
    while (left := list_remote_processes()) and time.monotonic() < end:
        time.sleep(0.5)
    assert left == []


def test_nodes_may_die_come_and_be_cut_off_and_the_driver_may_move(
    lab: Lab, net: NetCluster, undisturbed: SearchState
) -> None:
    """Every trial is there once, as the undisturbed search has it, bit for bit."""
    first, second, *_ = [net.add() for _ in range(4)]
    elsewhere = net.add(cpus=0, hidden=())
    process = lab.search()
    lab.wait_for(process, lambda state: count_epochs(state) >= 12)
    net.kill(first)
    lab.wait_for(process, lambda state: state.nodes[first].status == "lost")
    added = net.add()
    lab.wait_for(process, lambda state: added in state.nodes and bool(list_placed(lab, added)))
    lab.wait_for(process, lambda state: _is_busy(state, second))
    net.cut(second)
    begin = time.monotonic()
    lab.wait_for(process, lambda state: state.nodes[second].status == "lost")
    noticed = time.monotonic() - begin
    time.sleep(max(0.0, 20 - noticed))
    net.heal(second)
    before = count_epochs(lab.state)
    lab.wait_for(process, lambda state: count_epochs(state) >= before + 10)
    kill(process)
    lab.prefix = tuple(net.enter(elsewhere))
    text = lab.finish()
    assert "0 lost" in text
    check_nothing_runs()
    check_complete(lab)
    check_equal(lab.state, undisturbed)
    faults = [event.fault for event in lab.list_events() if isinstance(event, TrialRetried)]
    assert faults.count("node lost") >= 2 and "worker died" not in faults, faults
    assert not list(lab.record.parent.glob(f"trials/*/{ATTEMPT_FILE}")), "written directly"
    assert noticed < 15
    refused = lab.record.parent / REFUSED_FILE
    print(f"noticed after {noticed:.1f} s; refused:", refused.exists() and refused.read_text())


def _is_busy(state: SearchState, node: str) -> bool:
    """Return whether a running trial has trained an epoch on a node."""
    trials = [trial for trial in state.trials.values() if trial.status == "running"]
    return any(trial.nodes and trial.nodes[-1].node == node and trial.epochs for trial in trials)


def test_a_node_that_sees_the_run_store_writes_into_it(
    tmp_path: Path, lab: Lab, undisturbed: SearchState
) -> None:
    with NetCluster(tmp_path / "net", []) as net:
        net.add()
        net.add()
        lab.finish()
    check_complete(lab)
    check_equal(lab.state, undisturbed)
    assert len(list(lab.record.parent.glob(f"trials/*/{ATTEMPT_FILE}"))) == 64
