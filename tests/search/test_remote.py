"""Trials on a cluster as the driver sees them, without Ray: nodes, attempts, failures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.utils.object_cache import _ObjectCache

from tests.builders import SHAPES, SHAPES_INFO, ignore_event, make_result, make_space
from tune_cifar.errors import ConfigError, DiskFullError
from tune_cifar.record.events import Stage
from tune_cifar.record.journal import Record
from tune_cifar.record.store import search_folder
from tune_cifar.schema import Numerics
from tune_cifar.search import cluster
from tune_cifar.search import remote as remote_module
from tune_cifar.search.adapters import TuneScheduler, TuneSearcher, WorkerCache
from tune_cifar.search.cluster import LiveNodes, Node, _check_address, _describe_refusal
from tune_cifar.search.driver import RETRIES, SearchDriver
from tune_cifar.search.plan import Cost, Offer, Resources, SearchPlan, SearchRequest
from tune_cifar.search.remote import RemoteTrials, classify_death
from tune_cifar.search.survey import _check_alike, _describe_no_room
from tune_cifar.search.worker import pack_epochs, request_resources
from tune_cifar.train.recorded import make_header

ONE, TWO = Node("1" * 8, "one", "10.0.0.1", 2, 0), Node("2" * 8, "two", "10.0.0.2", 2, 0)
RESOURCES = Resources(1, 0.0, 4, 0)


class Machines:
    """The nodes that are alive, as a test sets them."""

    def __init__(self, *nodes: Node) -> None:
        self.nodes = list(nodes)

    def __call__(self) -> list[Node]:
        return self.nodes


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    monkeypatch.setattr("tune_cifar.search.cluster.POLL_SECONDS", 0.0)
    return Machines(ONE, TWO)


@pytest.fixture
def remote(
    tmp_path: Path, fp32: Numerics, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RemoteTrials]:
    """A search of two nodes with two slots each."""
    monkeypatch.setattr(remote_module, "LiveNodes", lambda: LiveNodes(machines))
    with make_remote(tmp_path, fp32, [ONE, TWO], {}) as remote:
        yield remote


@contextmanager
def make_remote(
    storage: Path, fp32: Numerics, nodes: list[Node], unable: dict[str, str]
) -> Iterator[RemoteTrials]:
    """A search of these nodes with two slots each."""
    space, cost = make_space(), Cost(1.0, 1.0, 1.0)
    request = SearchRequest(SHAPES, storage, "x", address="auto")
    offers = tuple(Offer(node.name, node.address, 2, fp32, cost) for node in nodes)
    plan = SearchPlan(space, request, "x", SHAPES_INFO, fp32, RESOURCES, cost, offers, unable)
    header = make_header("search", "x", space, 0, SHAPES_INFO, fp32, "test")
    with Record.create(search_folder(storage, "x"), header) as record:
        yield RemoteTrials(SearchDriver(record, space, ignore_event), plan, "nonce")


def send(
    remote: RemoteTrials,
    config: dict[str, Any],
    node: Node,
    fp32: Numerics,
    outcome: str,
    text: str = "",
) -> str:
    """Send a worker's message of an attempt through the scheduler; return its decision."""
    place = {"id": node.id, "numerics": fp32.model_dump()}
    message = {"trial": config["trial"], "outcome": outcome, "text": text}
    message |= {"attempt": config["cluster"]["attempt"], "place": json.dumps(place)}
    scheduler = TuneScheduler(remote._driver, remote)
    return scheduler.on_trial_result(None, None, message)


def ask(remote: RemoteTrials) -> Any:
    fixed = {"source": ("shapes", None), "numerics": {}, "gpus": 0.0}
    return TuneSearcher(remote._driver, fixed, remote).suggest("t")


def epochs(number: int = 1) -> str:
    return pack_epochs([(Stage(3), make_result(number, 0.5))])


def test_a_node_that_cannot_train_gets_no_trial(
    tmp_path: Path, fp32: Numerics, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "LiveNodes", lambda: LiveNodes(machines))
    problem = "memory: the baseline must fit"
    with make_remote(tmp_path, fp32, [TWO], {"one": problem}) as remote:
        found = remote._driver.record.state.nodes["one"]
        assert (found.status, found.text) == ("left out", problem)
        assert [ask(remote)["node"] for _ in range(2)] == [TWO.id] * 2
        assert ask(remote) is None


def test_no_more_trials_run_than_the_nodes_that_are_there_have_slots(
    remote: RemoteTrials, machines: Machines
) -> None:
    assert [isinstance(ask(remote), dict) for _ in range(5)] == [True] * 4 + [False]
    machines.nodes.append(Node("3", "three", "10.0.0.3", 1, 0))
    assert isinstance(ask(remote), dict) and ask(remote) is None
    machines.nodes.clear()
    assert ask(remote) is None, "a search without a node waits"


def test_a_free_worker_is_kept_while_a_trial_waits_for_one_of_another_node() -> None:
    """Ray Tune's own cache would end it, and its node's next trial would wait for a new one."""
    stock, ours = _ObjectCache(may_keep_one=True), WorkerCache()
    for cache in (stock, ours):
        cache.increase_max("one")
    assert [cache.cache_object("two", "worker") for cache in (stock, ours)] == [False, True]
    assert ours.num_cached_objects == 1 and list(ours.flush_cached_objects()) == []
    assert not ours.has_cached_object("one") and ours.pop_cached_object("two") == "worker"
    ours.cache_object("two", "worker")
    assert list(ours.flush_cached_objects(force_all=True)) == ["worker"]
    assert ours.num_cached_objects == 0


def test_the_record_says_on_which_node_each_attempt_trains(
    remote: RemoteTrials, fp32: Numerics
) -> None:
    config = ask(remote)
    assert send(remote, config, TWO, fp32, "epochs", epochs()) == "CONTINUE"
    state = remote._driver.record.state
    assert state.trials[0].node == "two" and state.trials[0].numerics == fp32
    assert {name: node.status for name, node in state.nodes.items()} == {
        "one": "joined",
        "two": "joined",
    }


def test_messages_of_an_attempt_that_a_newer_one_has_followed_are_ignored(
    remote: RemoteTrials, fp32: Numerics
) -> None:
    first = ask(remote)
    send(remote, first, ONE, fp32, "epochs", epochs())
    remote._driver.retry(0, "node lost", "cut off")
    second = ask(remote)
    assert [each["cluster"]["attempt"] for each in (first, second)] == [1, 2]
    assert send(remote, first, ONE, fp32, "epochs", epochs(2)) == "STOP"
    assert remote._driver.record.state.trials[0].epochs_done == 1
    assert send(remote, second, TWO, fp32, "epochs", epochs(2)) == "CONTINUE"
    nodes = [node.node for node in remote._driver.record.state.trials[0].nodes]
    assert nodes == ["one", "two"]


def test_a_trial_that_fails_at_its_start_is_tried_once_more_on_another_node(
    remote: RemoteTrials, fp32: Numerics
) -> None:
    config = ask(remote)
    send(remote, config, ONE, fp32, "failed", "OSError: no room")
    again = ask(remote)
    assert again["trial"] == 0 and again["node"] == TWO.id
    send(remote, again, TWO, fp32, "failed", "OSError: no room")
    trial = remote._driver.record.state.trials[0]
    assert trial.status == "failed" and [r.fault for r in trial.retries] == ["failed at its start"]
    # It was the trial's own fault: no node pays for it.
    other = ask(remote)
    send(remote, other, ONE, fp32, "failed", "ValueError: no idea")
    assert remote._driver.record.state.nodes["one"].status == "joined"


def test_a_node_on_which_two_trials_in_a_row_fail_gets_no_more(
    remote: RemoteTrials, fp32: Numerics
) -> None:
    for _ in range(2):
        send(remote, ask(remote), ONE, fp32, "failed", "OSError: no room")
        send(remote, ask(remote), TWO, fp32, "epochs", epochs())
    left_out = remote._driver.record.state.nodes["one"]
    assert left_out.status == "left out" and "two trials in a row" in left_out.text
    assert ask(remote) is None, "the slots of the other node are taken"
    remote._driver.end(0, "stopped", "x")
    assert ask(remote)["node"] == TWO.id


def test_the_last_node_is_never_left_out(
    remote: RemoteTrials, machines: Machines, fp32: Numerics
) -> None:
    machines.nodes.remove(TWO)
    for number in range(3):
        send(remote, ask(remote), ONE, fp32, "failed", "OSError: no room")
        assert remote._driver.record.state.trials[number].status == "failed"
    assert remote._driver.record.state.nodes["one"].status == "joined"


def test_a_failure_after_an_epoch_is_the_trials_own(remote: RemoteTrials, fp32: Numerics) -> None:
    config = ask(remote)
    send(remote, config, ONE, fp32, "epochs", epochs())
    send(remote, config, ONE, fp32, "failed", "RuntimeError: of the network")
    assert remote._driver.record.state.trials[0].status == "failed"


def test_a_node_with_other_numerics_is_left_out_and_the_trial_goes_elsewhere(
    remote: RemoteTrials, fp32: Numerics
) -> None:
    other = fp32.model_copy(update={"capability": "AVX512"})
    send(remote, ask(remote), ONE, other, "unlike", "capability: AVX2 -> AVX512")
    node = remote._driver.record.state.nodes["one"]
    assert (node.status, node.text) == ("left out", "unlike: capability: AVX2 -> AVX512")
    again = ask(remote)
    assert again["trial"] == 0 and again["node"] == TWO.id
    assert remote._driver.record.state.trials[0].retries == []


def test_a_node_whose_disk_is_full_is_left_out_and_the_last_one_ends_the_search(
    remote: RemoteTrials, fp32: Numerics
) -> None:
    problem = "/tmp/x/weights.safetensors: cannot write the file: No space left. Make room."
    config = ask(remote)
    send(remote, config, ONE, fp32, "epochs", epochs())
    send(remote, config, ONE, fp32, "no room", problem)
    driver = remote._driver
    node = driver.record.state.nodes["one"]
    assert (node.status, node.text) == ("left out", f"no room: {problem}")
    again = ask(remote)
    assert (again["trial"], again["node"], driver.fault) == (0, TWO.id, None)
    send(remote, again, TWO, fp32, "no room", problem)
    assert isinstance(driver.fault, DiskFullError)
    assert str(driver.fault) == f"node two: {problem} Then give `resume=True`."
    assert driver.record.state.trials[0].status == "running"


def test_an_attempt_that_believes_another_has_followed_is_tried_again(
    remote: RemoteTrials, fp32: Numerics
) -> None:
    """None has: it could not read the file that says so, or read an old one."""
    send(remote, ask(remote), ONE, fp32, "superseded", "Stale file handle")
    trial = remote._driver.record.state.trials[0]
    assert trial.status == "running" and "Stale file handle" in trial.retries[0].text
    assert ask(remote)["trial"] == 0


def test_attempts_on_unlike_nodes_are_not_taken_for_one_training(
    remote: RemoteTrials, fp32: Numerics
) -> None:
    other = fp32.model_copy(update={"capability": "AVX512"})
    send(remote, ask(remote), ONE, fp32, "epochs", epochs())
    remote._driver.retry(0, "node lost", "gone")
    send(remote, ask(remote), TWO, other, "epochs", epochs(2))
    trial = remote._driver.record.state.trials[0]
    assert (trial.numerics, trial.other_numerics) == (other, [fp32])


def test_a_node_that_is_gone_is_recorded_as_lost_and_may_come_back(
    remote: RemoteTrials, machines: Machines, fp32: Numerics
) -> None:
    machines.nodes.remove(ONE)
    remote.watch()
    remote.watch()
    state = remote._driver.record.state
    assert state.nodes["one"].status == "lost" and state.num_events == 4
    machines.nodes.append(Node("9" * 8, "one", "10.0.0.1", 2, 0))
    config = ask(remote)
    send(remote, config, machines.nodes[-1], fp32, "epochs", epochs())
    remote.watch()
    assert state.nodes["one"].status == "joined"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("The actor died because its node has died. Node Id: d37", "node lost"),
        ("The actor a5e is unavailable: The actor is temporarily unavailable", "node lost"),
        ("The actor died because its worker process has died.", "worker died"),
        ("Task was killed due to the node running low on memory.", "out of memory"),
    ],
)
def test_rays_words_for_a_death_are_told_apart(words: str, fault: str) -> None:
    assert classify_death(words) == fault


def test_lost_nodes_have_a_limit_of_their_own() -> None:
    assert RETRIES["node lost"] > 3 * RETRIES["worker died"]


@pytest.mark.parametrize(
    ("cpus", "gpus", "slots"), [(1, 0.0, 8), (3, 0.0, 2), (1, 0.25, 8), (1, 1.0, 2), (9, 0.0, 0)]
)
def test_slots_are_counted_on_each_node_for_itself(cpus: int, gpus: float, slots: int) -> None:
    assert Node("x", "x", "x", 8, 2).count_slots(cpus, gpus) == slots


def test_a_trial_is_bound_to_a_node_so_that_no_other_nodes_worker_takes_it() -> None:
    first, second = (request_resources(1, 0.0, {"node": name}) for name in ("a", "b"))
    assert first == request_resources(1, 0.0, {"node": "a"}) != second
    assert first._kwargs == {"bundle_label_selector": [{"ray.io/node-id": "a"}]}


def test_trials_are_spread_over_the_nodes_by_their_free_slots(remote: RemoteTrials) -> None:
    nodes = [ask(remote)["node"] for _ in range(4)]
    assert sorted(nodes) == [ONE.id, ONE.id, TWO.id, TWO.id] and nodes[0] != nodes[1]


@pytest.mark.parametrize(("status", "is_queued"), [("PENDING", True), ("RUNNING", False)])
def test_a_trial_that_waits_for_a_worker_of_a_lost_node_is_queued_again(
    remote: RemoteTrials, machines: Machines, status: str, is_queued: bool
) -> None:
    """One whose worker had started is left to Ray, which tells its end."""
    config = ask(remote)
    remote.add(SimpleNamespace(config=config, status=status))
    lost = ONE if config["node"] == ONE.id else TWO
    machines.nodes.remove(lost)
    remote.watch()
    again = ask(remote)
    assert (again["trial"] == 0) == is_queued and again["node"] != lost.id
    if is_queued:
        assert again["cluster"]["attempt"] == 2


def test_a_fault_that_is_seen_twice_queues_a_trial_once(
    remote: RemoteTrials, fp32: Numerics
) -> None:
    tune_trial = SimpleNamespace(config=ask(remote), error_file=None)
    scheduler = TuneScheduler(remote._driver, remote)
    remote._driver.requeue(0)
    scheduler.on_trial_error(None, tune_trial)
    assert [ask(remote)["trial"] for _ in range(2)] == [0, 1]
    scheduler.on_trial_error(None, tune_trial)  # of the older attempt
    assert remote._driver.record.state.trials[0].retries == []


def test_an_attempt_on_a_node_that_is_left_out_does_not_take_it_in_again(
    remote: RemoteTrials, fp32: Numerics
) -> None:
    configs = [ask(remote) for _ in range(4)]
    for config in configs[:2]:
        send(remote, config, ONE, fp32, "failed", "OSError: no room")
    assert remote._driver.record.state.nodes["one"].status == "left out"
    send(remote, configs[2], ONE, fp32, "epochs", epochs())
    assert remote._driver.record.state.nodes["one"].status == "left out"
    assert remote._driver.record.state.trials[2].node == "one"


def test_unlike_nodes_are_refused_with_what_differs_unless_they_may(fp32: Numerics) -> None:
    other = fp32.model_copy(update={"capability": "AVX512"})
    cost = Cost(1.0, 1.0, 1.0)
    offers = [Offer("one", "x", 1, other, cost), Offer("two", "y", 4, fp32, cost)]
    changes = re.escape(f"two -> one: capability: {fp32.capability} -> AVX512")
    with pytest.raises(ConfigError, match=rf"nodes of a search must be alike, got {changes}"):
        _check_alike(offers, allow_mixed=False)
    assert [offer.node for offer in _check_alike(offers, allow_mixed=True)] == ["two", "one"]


def test_without_room_for_one_trial_the_largest_node_is_named() -> None:
    assert "got 2 cores and 0 GPUs on the largest (one)" in _describe_no_room([ONE, TWO], 4, 0.0)
    assert "got none with a core" in _describe_no_room([], 1, 0.0)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("ray://10.0.0.1:10001", r"got ray://10\.0\.0\.1:10001 \(Ray Client\)\. Run the search on"),
        ("somewhere", r"`address` must be HOST:PORT or auto, got 'somewhere'"),
        ("127.0.0.1:9", r"127\.0\.0\.1:9 cannot be reached \(Connection refused\)"),
        ("host.invalid:1", r"host\.invalid:1 cannot be reached"),
        ("127.0.0.1:99999", r"127\.0\.0\.1:99999 cannot be reached"),
    ],
)
def test_an_address_where_no_cluster_is_is_refused(address: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        _check_address(address)


def test_a_process_that_joins_clusters_starts_no_ray_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has made no token: everybody could use what it starts."""
    monkeypatch.setattr(cluster, "JOINS_CLUSTERS", True)
    with pytest.raises(ConfigError, match=r"got both\. Run the one without `address` in another"):
        cluster.start_ray(RESOURCES)


def test_while_a_search_runs_no_other_cluster_is_joined() -> None:
    """Joining would end the running one's."""
    running = pytest.raises(ConfigError, match="one search at a time runs in a process")
    with cluster._in_use, running:
        cluster.join("127.0.0.1:9")


def test_who_is_not_let_in_is_told_about_the_token() -> None:
    sentence = _describe_refusal("h:1", "Failed to connect to Ray cluster at h:1")
    assert "must have the same RAY_AUTH_MODE and RAY_AUTH_TOKEN, got none or another" in sentence


def test_rays_words_for_another_version_are_shortened() -> None:
    words = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.55.0\n    Python: 3.11.7\n"
        "This process on node 10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )
    assert _describe_refusal("h:1", words) == (
        "`address`: the cluster must have this Ray and Python, got (cluster, then here) "
        "Ray: 2.55.0; Python: 3.11.7; Ray: 2.60.0; Python: 3.11.7."
    )
