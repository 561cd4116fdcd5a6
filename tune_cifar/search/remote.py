"""Trials on a cluster as the driver sees them: where attempts run, which nodes may run more."""

from __future__ import annotations

import json
from typing import Any

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


class RemoteTrials:
    """Follows the attempts of the trials of one search on the nodes of a cluster.

    Args:
        nonce: of the run store; see `start_run_store`.
    """

    def __init__(self, driver: SearchDriver, plan: SearchPlan, nonce: str) -> None:
        self._driver = driver
        self._plan = plan
        self._nonce = nonce
        self._live = LiveNodes()
        self._bound: dict[int, str] = {}  # the node of each trial's newest attempt
        self._tune_trials: dict[int, Any] = {}  # Tune's object for it
        self._known: dict[str, NodeChanged] = {}  # by Ray's id, also of lost ones
        self._newest: dict[str, str] = {}  # Ray's id of each name: a node may come back
        self._places: dict[int, str] = {}  # of each trial's newest attempt, once it has reported
        self._trained: set[int] = set()  # trials whose newest attempt has reported an epoch
        self._failed_on: dict[int, str] = {}
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
        running = self._driver.running
        return node.count_slots(*size) - sum(self._bound.get(n) == node.id for n in running)

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
        self._tune_trials[tune_trial.config["trial"]] = tune_trial

    def make_config(self, trial: TrialState) -> dict[str, Any]:
        """Return what a worker must know beside the trial, for the attempt that begins."""
        number = trial.number
        self._places.pop(number, None)
        self._tune_trials.pop(number, None)
        self._trained.discard(number)
        self._bound.pop(number, None)
        self._bound[number] = self._choose_node(number)
        cluster = {
            "attempt": self._driver.attempts[number],
            "nonce": self._nonce,
            "data": self._plan.data.model_dump(),
            "allow_mixed": self._plan.request.allow_mixed,
        }
        return {"cluster": cluster, "node": self._bound[number]}

    def take(self, message: dict[str, Any]) -> bool:
        """Note where a message comes from; return whether it is of the trial's newest attempt."""
        number, place = message["trial"], json.loads(message["place"])
        if message["attempt"] != self._driver.attempts[number]:
            return False
        node_id, numerics = place["id"], place["numerics"]
        if number not in self._places and message["outcome"] != "unlike":
            self._places[number] = node_id
            node = self._live.poll().get(node_id)
            if numerics is not None and node is not None:
                self._place(number, node, Numerics(**numerics))
        if message["outcome"] == "epochs":
            self._trained.add(number)
            self._live.note_success(node_id)
        return True

    def _place(self, number: int, node: Node, numerics: Numerics) -> None:
        """Record where an attempt trains; on a node that is left out an older one may still run."""
        if self._live.is_left_out(node.id) and (known := self._known.get(node.id)) is not None:
            self._driver.place(number, known)
        else:
            self._driver.place(number, self._change(node.id, node, "joined", numerics))

    def leave_out(self, message: dict[str, Any]) -> None:
        """Give a node no more trials, since its Numerics differ from the search's."""
        place = json.loads(message["place"])
        self._live.leave_out(place["id"])
        if (node := self._live.poll().get(place["id"])) is not None:
            numerics = Numerics(**place["numerics"])
            self._change(node.id, node, "left out", numerics, f"unlike: {message['text']}")
        self._driver.requeue(message["trial"])

    def retry_elsewhere(self, number: int, text: str) -> bool:
        """Queue a trial for another node if it failed on its node before its first epoch.

        A node on which two trials in a row do so is left out. A trial that does so on two nodes
        has failed by its own fault.

        Returns:
            whether it is tried again.
        """
        node_id = self._places.get(number)
        if node_id is None or number in self._trained or not self._live.has_another(node_id):
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
            tune_trial = self._tune_trials.get(number)
            is_waiting = tune_trial is not None and tune_trial.status == "PENDING"
            if is_waiting and self._bound[number] not in live:
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
