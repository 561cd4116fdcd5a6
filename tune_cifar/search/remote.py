"""Trials on a cluster as the driver sees them: where attempts run, which nodes may run more."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tune_cifar.errors import DiskFullError
from tune_cifar.record.events import Fault, NodeChanged, NodeStatus
from tune_cifar.record.state import TrialState
from tune_cifar.schema import Numerics
from tune_cifar.search.cluster import LiveNodes, Node
from tune_cifar.search.driver import SearchDriver
from tune_cifar.search.plan import SearchPlan

NO_NODE = "none"
# Parts of Ray's messages about a lost worker.
RAY_OUT_OF_MEMORY = "low on memory"
NODE_LOST = ("its node has died", "temporarily unavailable", "node was terminated")


def classify_death(error: str) -> Fault:
    """Return the fault that Ray's message about a lost worker means."""
    if RAY_OUT_OF_MEMORY in error:
        return "out of memory"
    return "node lost" if any(words in error for words in NODE_LOST) else "worker died"


@dataclass
class _Attempt:
    """The newest attempt of a trial."""

    bound: str
    """Ray's id of the node that it is meant for."""
    tune_trial: Any = None
    """Tune's object for it."""
    place: str | None = None
    """Ray's id of the node that it runs on, once it has reported."""
    has_trained: bool = False


class RemoteTrials:
    """Follows the attempts of the trials of one search on the nodes of a cluster.

    Args:
        nonce: see `serve_files`.
    """

    def __init__(self, driver: SearchDriver, plan: SearchPlan, nonce: str) -> None:
        self._driver = driver
        self._plan = plan
        self._nonce = nonce
        self._live = LiveNodes()
        self._attempts: dict[int, _Attempt] = {}  # by trial
        self._known: dict[str, NodeChanged] = {}  # by Ray's id, also of lost ones
        self._newest: dict[str, str] = {}  # Ray's id of each name: a node may come back
        self._failed_on: dict[int, str] = {}  # the node, by trial
        offers = {offer.node: offer for offer in plan.offers}
        for node_id, node in self._live.poll().items():
            if (offer := offers.get(node.name)) is not None:
                self._change(node_id, node, "joined", offer.numerics)
            elif (why := plan.unable.get(node.name)) is not None:
                self._live.leave_out(node_id)
                self._change(node_id, node, "left out", None, why)

    @property
    def has_slot(self) -> bool:
        """Whether a node has room for one more trial."""
        limit, num_running = self._plan.request.max_concurrent, len(self._driver.running)
        return (limit is None or num_running < limit) and any(
            self._count_free(node) > 0 for node in self._live.usable
        )

    def _count_free(self, node: Node) -> int:
        """Return how many more trials fit on a node."""
        size = self._plan.resources.cpus_per_trial, self._plan.resources.gpus_per_trial
        attempts = (self._attempts.get(number) for number in self._driver.running)
        return node.count_slots(*size) - sum(a is not None and a.bound == node.id for a in attempts)

    def _choose_node(self, number: int) -> str:
        """Return the id of the node with most room, not of that on which the trial failed.

        Without room the trial waits for a worker of the node. If the last node has gone in this
        moment, `watch` queues the trial again.
        """
        usable = self._live.usable
        others = [node for node in usable if node.id != self._failed_on.get(number)]
        chosen = max(others or usable, key=self._count_free, default=None)
        return NO_NODE if chosen is None else chosen.id

    def add(self, tune_trial: Any) -> None:
        """Take Tune's object for an attempt."""
        self._attempts[tune_trial.config["trial"]].tune_trial = tune_trial

    def make_config(self, trial: TrialState) -> dict[str, Any]:
        """Return what a worker must know beside the trial, for the attempt that begins."""
        number = trial.number
        self._attempts.pop(number, None)  # the room of the one before is free
        node_id = self._choose_node(number)
        self._attempts[number] = _Attempt(node_id)
        cluster = {
            "attempt": self._driver.attempts[number],
            "nonce": self._nonce,
            "data": self._plan.data.model_dump(),
            "allow_mixed": self._plan.request.allow_mixed,
        }
        return {"cluster": cluster, "node": node_id}

    def take(self, message: dict[str, Any]) -> bool:
        """Note where a message comes from; return whether it is of the trial's newest attempt."""
        number, place = message["trial"], json.loads(message["place"])
        if message["attempt"] != self._driver.attempts[number]:
            return False
        attempt, node_id, numerics = self._attempts[number], place["id"], place["numerics"]
        if attempt.place is None and message["outcome"] != "unlike":
            attempt.place = node_id
            node = self._live.poll().get(node_id)
            if numerics is not None and node is not None:
                self._place(number, node, Numerics(**numerics))
        if message["outcome"] == "epochs":
            attempt.has_trained = True
            self._live.note_success(node_id)
        return True

    def _place(self, number: int, node: Node, numerics: Numerics) -> None:
        """Record where an attempt trains; on a node that is left out an older one may still run."""
        if self._live.is_left_out(node.id) and (known := self._known.get(node.id)) is not None:
            self._driver.place(number, known)
        else:
            self._driver.place(number, self._change(node.id, node, "joined", numerics))

    def leave_out(self, message: dict[str, Any]) -> None:
        """Give a node no more trials: its Numerics differ from the search's, or its disk is full.

        Raises:
            DiskFullError: its disk is full, and no other node is left.
        """
        place, outcome, text = json.loads(message["place"]), message["outcome"], message["text"]
        node = self._live.poll().get(place["id"])
        if node is not None and outcome == "no room" and not self._live.has_another(node.id):
            raise DiskFullError(f"node {node.name}: {text} Then give `resume=True`.")
        self._live.leave_out(place["id"])
        if node is not None:
            numerics = Numerics(**place["numerics"])
            self._change(node.id, node, "left out", numerics, f"{outcome}: {text}")
        self._driver.requeue(message["trial"])

    def retry_elsewhere(self, number: int, text: str) -> bool:
        """Queue a trial for another node if it failed on its node before its first epoch.

        A node on which two trials in a row do so is left out. A trial that does so on two nodes
        has failed by its own fault.

        Returns:
            whether it is tried again.
        """
        attempt = self._attempts[number]
        node_id = attempt.place
        if node_id is None or attempt.has_trained or not self._live.has_another(node_id):
            return False
        if number in self._failed_on:
            self._live.absolve(number)
            return False
        self._failed_on[number] = node_id
        node, known = self._live.poll().get(node_id), self._known.get(node_id)
        if self._live.note_failure(node_id, number) and node is not None:
            why = "two trials in a row failed on it before their first epoch"
            self._change(node_id, node, "left out", known.numerics if known else None, why)
        self._driver.retry(number, "failed at its start", text)
        return True

    def watch(self) -> None:
        """Record the nodes that are gone; queue trials again that wait for a worker of one.

        Of those whose worker had started Ray tells the end.
        """
        live = self._live.poll()
        for number in self._driver.running:
            attempt = self._attempts[number]
            is_waiting = attempt.tune_trial is not None and attempt.tune_trial.status == "PENDING"
            if is_waiting and attempt.bound not in live:
                self._driver.requeue(number)
        for node_id, known in self._known.items():
            if node_id not in live and self._takes_part(node_id, known.node):
                self._driver.change_node(known.model_copy(update={"status": "lost"}))

    def _takes_part(self, node_id: str, name: str) -> bool:
        """Return whether the record has the node as one that is there, and it did not come back."""
        found = self._driver.record.state.nodes.get(name)
        return self._newest[name] == node_id and found is not None and found.status != "lost"

    def _change(
        self,
        node_id: str,
        node: Node,
        status: NodeStatus,
        numerics: Numerics | None,
        text: str = "",
    ) -> NodeChanged:
        event = NodeChanged(
            node=node.name, status=status, address=node.address, numerics=numerics, text=text
        )
        self._known[node_id], self._newest[node.name] = event, node_id
        self._driver.change_node(event)
        return event
