"""Searches on a cluster whose machines have nothing in common but a network, and faults on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.faults.lab import (
    RESTORED,
    Lab,
    check_complete,
    check_equal,
    count_epochs,
    interrupt,
    kill,
)
from tests.faults.netcluster import ADDRESS, FAST_CHECKS, TEMPORARY, NetCluster, find_problem
from tune_cifar.data.files import DataSource
from tune_cifar.record.events import TrialPlaced, TrialRetried
from tune_cifar.record.state import SearchState
from tune_cifar.search.trial_files import ATTEMPT_FILE, REFUSED_FILE

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

SIZES = ("--set", "train_size=200", "--set", "val_size=100", "--trials")
ON_CLUSTER = ("--address", ADDRESS)
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
SAME_TOKEN = "the cluster and this process must have the same RAY_AUTH_MODE and RAY_AUTH_TOKEN"


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


def list_remote_processes() -> dict[int, str]:
    """Return the titles of the workers and actors of searches on the cluster's nodes, by pid."""
    not_ours = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
    found = {}
    for process in psutil.process_iter():
        try:
            title = " ".join(process.cmdline())
            is_ours = title.startswith("ray::") and not title.startswith(not_ours)
            parent = process.parent() if is_ours else None
            if parent is not None and str(TEMPORARY) in " ".join(parent.cmdline()):
                found[process.pid] = title.strip()
        except psutil.Error:
            continue
    return found


def check_nothing_runs() -> None:
    """Check that no worker and no actor of a search is left on any node."""
    end = time.monotonic() + 60
    while (left := list_remote_processes()) and time.monotonic() < end:
        time.sleep(0.5)
    assert left == {}


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
    assert RESTORED.search(text)
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


@contextmanager
def count_workers() -> Iterator[set[int]]:
    """Collect the processes that train trials on the cluster's nodes, meanwhile."""
    found: set[int] = set()
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.3):
            titles = list_remote_processes()
            found.update(pid for pid, title in titles.items() if "TrialWorker" in title)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


def test_nodes_that_see_the_run_store_write_into_it_and_keep_their_workers(
    tmp_path: Path, lab: Lab, undisturbed: SearchState
) -> None:
    with NetCluster(tmp_path / "net", []) as net:
        net.add()
        net.add()
        with count_workers() as workers:
            lab.finish()
    assert len(workers) == 2, "a worker ends with its search, not with a trial"
    check_complete(lab)
    check_equal(lab.state, undisturbed)
    assert len(list(lab.record.parent.glob(f"trials/*/{ATTEMPT_FILE}"))) == 64


def test_each_complete_trial_of_a_sampler_that_learns_equals_its_own_reproduction(
    tmp_path: Path,
) -> None:
    """What TPE proposes depends on the order in which trials end, what a trial trains does not."""
    lab = Lab(tmp_path / "lab", options=(*SIZES, "24", *ON_CLUSTER))
    space = lab.folder / "search_spaces" / "faulty.yaml"
    tpe = "sampler: {kind: tpe, startup: 2}"
    space.write_text(space.read_text().replace("sampler: {kind: random}", tpe))
    with NetCluster(tmp_path / "net", [lab.folder], FAST_CHECKS) as net:
        first, _ = net.add(), net.add()
        process = lab.search()
        lab.wait_for(process, lambda state: _is_busy(state, first))
        net.kill(first)
        lab.wait_for(process, lambda state: state.nodes[first].status == "lost")
        net.add()
        text, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, text
    check_complete(lab)
    complete = [trial for trial in lab.state.trials.values() if trial.status == "complete"]
    assert len(complete) >= 2
    for trial in complete:
        assert "identical over 4 epochs" in lab.run("reproduce", trial.run_id)


def test_unlike_nodes_are_refused_or_recorded(tmp_path: Path) -> None:
    """One node's torch does without vector instructions, as on an older processor."""
    lab = Lab(tmp_path / "lab", options=(*SIZES, "6", *ON_CLUSTER))
    with NetCluster(tmp_path / "net", [lab.folder]) as net:
        net.add()
        other = net.add(variables={"ATEN_CPU_CAPABILITY": "default"})
        words = ("search", "--space", "faulty", "--name", "y", "--data", "shapes", *lab.options)
        text = lab.run(*words, status=1)
        assert "the nodes of a search must be alike, got tc" in text
        assert "ATEN_CPU_CAPABILITY: " in text and "--allow-mixed" in text
        lab.options += ("--allow-mixed",)
        lab.finish()
    state = lab.state
    check_complete(lab)
    settings = {trial.node: trial.numerics.settings for trial in state.trials.values()}
    assert settings[other] == {"ATEN_CPU_CAPABILITY": "default"} and len(settings) == 2
    on_other = next(trial for trial in state.trials.values() if trial.node == other)
    lab.run("confirm", "--search", "x", "--top", "1", "--seeds", "2", "--data", "shapes")
    text = lab.run("reproduce", on_other.run_id)
    assert "numerics differ: ATEN_CPU_CAPABILITY: default -> not set" in text


def test_a_node_that_fails_every_trial_is_left_out_and_named(tmp_path: Path) -> None:
    """Its temporary folder cannot be written: no trial's files find a place."""
    lab = Lab(tmp_path / "lab", options=(*SIZES, "8", *ON_CLUSTER))
    with NetCluster(tmp_path / "net", [lab.folder]) as net:
        net.add()
        broken = net.add(variables=plant_in_workers(tmp_path, NO_FOLDER))
        text = lab.finish()
    check_complete(lab)
    assert lab.state.counts["failed"] == 0
    assert lab.state.nodes[broken].status == "left out"
    assert f"node {broken}: 0 running, " in text
    assert "left out: two trials in a row failed on it before their first epoch" in text


NO_FOLDER = """
    import tempfile
    def mkdtemp(*args, **options):
        raise OSError(30, "Read-only file system")
    tempfile.mkdtemp = mkdtemp
"""
# Weights of the space's network have 350 kB. EFBIG instead of ENOSPC.
NO_ROOM = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
"""


def plant_in_workers(folder: Path, lines: str) -> dict[str, str]:
    """Let every worker of a node begin with these lines."""
    condition = "import sys\nif any('default_worker' in word for word in sys.orig_argv):"
    (folder / "sitecustomize.py").write_text(condition + lines)
    return {"PYTHONPATH": str(folder)}


def test_a_node_whose_own_disk_is_full_is_left_out_and_its_trial_goes_elsewhere(
    tmp_path: Path,
) -> None:
    """Its checkpoints and weights find no room; the first node gets the baseline."""
    lab = Lab(tmp_path / "lab", options=(*SIZES, "8", *ON_CLUSTER))
    with NetCluster(tmp_path / "net", [lab.folder]) as net:
        full = net.add(variables=plant_in_workers(tmp_path, NO_ROOM))
        net.add()
        text = lab.finish()
    check_complete(lab)
    assert lab.state.counts["failed"] == 0
    assert lab.state.nodes[full].status == "left out"
    assert "left out: no room: " in text
    assert lab.state.trials[0].status == "complete" and lab.state.trials[0].node != full


def test_without_a_node_the_search_waits_and_goes_on_with_the_next_one(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab", options=(*SIZES, "6", *ON_CLUSTER))
    with NetCluster(tmp_path / "net", [lab.folder], FAST_CHECKS) as net:
        only = net.add()
        process = lab.search()
        lab.wait_for(process, lambda state: _is_busy(state, only))
        net.kill(only)
        lab.wait_for(process, lambda state: state.nodes[only].status == "lost")
        net.add()
        text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text
    assert "no node is left: waiting for one" in text
    check_complete(lab)


def refuse(lab: Lab, *options: str) -> str:
    """Return what a search that may not begin prints, on one line."""
    words = ("search", "--space", "faulty", "--data", "shapes", *lab.options, *options)
    return " ".join(lab.run(*words, status=1).split())


def test_a_cluster_that_cannot_answer_is_refused(tmp_path: Path) -> None:
    """It has no token, and the search one: also if Ray finds one in the home folder."""
    lab = Lab(tmp_path / "lab", TOKEN, (*SIZES, "2", *ON_CLUSTER))
    with NetCluster(tmp_path / "net", [lab.folder]) as net:
        net.add()
        assert f"{SAME_TOKEN}, got a cluster where what this process starts" in refuse(lab)


def test_a_confirmation_and_a_plan_run_on_a_cluster_too(tmp_path: Path) -> None:
    """It has a token, as docs/cluster.md wants it."""
    lab = Lab(tmp_path / "lab", TOKEN, (*SIZES, "4", *ON_CLUSTER))
    with NetCluster(tmp_path / "net", [lab.folder], TOKEN) as net:
        name = net.add()
        plan = ("plan", "--space", "faulty", "--data", "shapes", *lab.options)
        assert f" {name} " in lab.run(*plan)
        begin = ("search", "--space", "faulty", "--name", "x", "--data", "shapes", *lab.options)
        lab.run(*begin, "--continue")
        assert "all trials" in lab.run(*begin, "--continue"), "it has ended: nothing is done"
        words = ("--search", "x", "--top", "1", "--seeds", "2", "--data", "shapes")
        text = lab.run("confirm", *words, *ON_CLUSTER)
        assert "gain over the baseline" in text
        assert "cannot be reached" in refuse(lab, "--address", "10.77.0.1:9")
        for access in (TOKEN | {"RAY_AUTH_TOKEN": "a" * 64}, {"RAY_AUTH_MODE": "disabled"}):
            stranger = Lab(tmp_path / "lab", access, lab.options)
            problem = f"got none or another: {ADDRESS} does not let this process in."
            assert f"error --address: {SAME_TOKEN}, {problem}" in refuse(stranger)


OWN_NETWORK = """
from torch import nn

class Small(nn.Module):
    "A network that no node has."
    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        conv, linear = nn.Conv2d(3, width, 3, stride=4), nn.Linear(64 * width, num_classes)
        self.layers = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear)

    def forward(self, images):
        return self.layers(images)
"""


def test_a_network_of_ones_own_is_trained_on_nodes_that_do_not_have_it(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab", options=("--trials", "4", *ON_CLUSTER))
    (lab.folder / "small.py").write_text(OWN_NETWORK)
    space = lab.run("spaces", "new", "small.py:Small", "--data", "shapes")
    (lab.folder / "small.yaml").write_text(space)
    sizes = ("train_size=240", "val_size=100", "batch_size=10")
    settings = [word for size in sizes for word in ("--set", size)]
    with NetCluster(tmp_path / "net", [lab.folder]) as net:
        names = {net.add(), net.add()}
        words = ("search", "--space", "small.yaml", "--tier", "cpu", "--name", "x")
        lab.run(*words, "--data", "shapes", *settings, *lab.options)
    check_complete(lab)
    assert {trial.node for trial in lab.state.trials.values()} == names
    assert "identical over" in lab.run("reproduce", "--best", "--search", "x")


@pytest.mark.real_data
def test_large_checkpoints_of_cifar10_survive_an_interrupt(
    tmp_path: Path, cifar10: DataSource
) -> None:
    """s10 on nodes that see neither run store nor data; a checkpoint with Adam has 79 MB."""
    lab = Lab(tmp_path / "lab")
    sizes = ("--set", "train_size=1500", "--set", "val_size=500", "--set", "batch_size=64")
    options = (*sizes, "--trials", "4", "--tier", "cpu", *ON_CLUSTER)
    assert cifar10.folder is not None
    with NetCluster(tmp_path / "net", [lab.folder, cifar10.folder]) as net:
        net.add()
        net.add()
        begin = ("search", "--space", "s10", "--name", "x", "--data", str(cifar10.folder))
        process = lab.start(*begin, *options)
        lab.wait_for(process, lambda state: count_epochs(state) >= 3)
        interrupt(process)
        text, _ = process.communicate(timeout=900)
        assert process.returncode == 130, text
        before = {number: t.epochs_done for number, t in lab.state.trials.items()}
        saved = list(lab.record.parent.glob("trials/*/checkpoints/*.pt"))
        assert saved and max(path.stat().st_size for path in saved) > 20e6
        resume = ("search", "--name", "x", "--resume", "--data", str(cifar10.folder))
        text = lab.run(*resume, *ON_CLUSTER)
        assert RESTORED.search(text) and "resumed from epoch" in text
    check_complete(lab)
    assert all(lab.state.trials[number].epochs_done >= done for number, done in before.items())
