"""What the nodes of a Ray cluster offer, asked of each and measured on it before a search."""

from __future__ import annotations

from typing import Any

from tune_cifar.search.cluster import Node, join, list_nodes, start_ray  # before ray

# isort: split

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_cifar.data.files import DataSource
from tune_cifar.data.load import load_train_val, pack_data
from tune_cifar.errors import ConfigError, TuneCifarError
from tune_cifar.models.custom import add_source
from tune_cifar.record.environment import digest_code
from tune_cifar.schema import Numerics, TrainConfig
from tune_cifar.search.cost import Cost, measure_cost
from tune_cifar.search.plan import Found, Offer, Resources, SearchRequest, Survey, Workers
from tune_cifar.search.worker import is_out_of_memory
from tune_cifar.space.select import SearchSpace
from tune_cifar.train.network import choose_execution
from tune_cifar.train.numerics import compare_numerics, resolve_numerics, restore_numerics

# How long nodes may take to answer: workers start there, and others' work may be in the way.
ANSWER_SECONDS = 180.0


def make_survey(request: SearchRequest, recorded: Numerics | None = None) -> Survey | None:
    """Return what surveys the cluster of a request; None without one.

    Args:
        recorded: of a resumed search, to be restored on the nodes.
    """
    if request.address is None:
        return None
    return lambda space: survey_nodes(space, request, recorded)


def survey_nodes(
    space: SearchSpace, request: SearchRequest, recorded: Numerics | None = None
) -> Found:
    """Join the cluster, and measure the baseline on every node with room for a trial.

    Raises:
        ConfigError: no node has room for a trial or answers, or they are unlike and need not be.
    """
    assert request.address is not None
    join(request.address)
    device = request.device if recorded is None else recorded.device
    nodes = list_nodes()
    gpus = request.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if device != "cpu" and any(node.num_gpus for node in nodes) else 0.0
    fitting = [node for node in nodes if node.count_slots(request.cpus_per_trial, gpus)]
    if not fitting:
        raise ConfigError(_describe_no_room(nodes, request.cpus_per_trial, gpus))
    answers, unable, notes = _ask(fitting, space, request, gpus, recorded)
    offers = [
        Offer(
            node=node.name,
            address=node.address,
            slots=node.count_slots(request.cpus_per_trial, gpus),
            numerics=Numerics(**answer["numerics"]),
            cost=Cost(*answer["cost"]),
        )
        for node, answer in answers
    ]
    return Found(_check_alike(offers, request.allow_mixed), unable, tuple(notes), gpus)


def _describe_no_room(nodes: list[Node], cpus: int, gpus: float) -> str:
    wanted = f"{cpus} core{'s' if cpus > 1 else ''}" + (f" and {gpus:g} GPU" if gpus else "")
    if not nodes:
        return f"`address`: a node must have room for a trial ({wanted}), got none with a core."
    most = nodes[0]
    has = f"{most.num_cpus} cores and {most.num_gpus} GPUs"
    rule = f"`cpus_per_trial`, `gpus_per_trial`: a node must have room for a trial ({wanted})"
    return f"{rule}, got {has} on the largest ({most.name})."


def _ask(
    nodes: list[Node],
    space: SearchSpace,
    request: SearchRequest,
    gpus: float,
    recorded: Numerics | None,
) -> tuple[list[tuple[Node, dict[str, Any]]], dict[str, str], list[str]]:
    """Return what the nodes answer, why others cannot train, and a sentence for each silent one."""
    packed = pack_data(request.source)
    data = None if packed is None else [ray.put(packed)]
    how: dict[str, Any] = {
        "config": space.baseline.model_dump(mode="json"),
        "model_source": space.model_source,
        "recorded": recorded and recorded.model_dump(),
        "numerics": (
            request.device,
            request.precision,
            request.cpus_per_trial,
            request.deterministic,
            choose_execution(space.baseline, request.execution),
        ),
    }
    pending = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        task = _make_task(request.cpus_per_trial, gpus).options(scheduling_strategy=there)
        pending[task.remote(how, data)] = node
    ready, silent = ray.wait(list(pending), num_returns=len(pending), timeout=ANSWER_SECONDS)
    answers = []
    unable = dict[str, str]()
    late = f"no answer in {ANSWER_SECONDS:.0f} s: others may use it"
    notes = [f"node {pending[reference].name}: {late}" for reference in silent]
    for reference in silent:
        ray.cancel(reference, force=True)  # else it would measure beside the trials
    for reference in ready:
        node = pending[reference]
        try:
            answer = ray.get(reference, timeout=1)
        except (RayError, GetTimeoutError) as exc:
            unable[node.name] = _shorten(exc)
            continue
        if "problem" in answer:
            unable[node.name] = str(answer["problem"])
        elif answer["code"] != digest_code():
            unable[node.name] = f"the code must be the driver's, got {answer['code']}"
        else:
            answers.append((node, answer))
    if not answers:
        problems = [f"node {name}: {why}" for name, why in unable.items()] + notes
        rule = "`address`: a node of the cluster must be able to train"
        raise ConfigError(f"{rule}, got {'; '.join(problems)}")
    return sorted(answers, key=lambda answer: nodes.index(answer[0])), unable, notes


def _make_task(num_cpus: int, num_gpus: float) -> Any:
    """Return `measure_node` as a task, whose process ends with it: it would hold GPU memory."""
    options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": 0, "max_calls": 1}
    return ray.remote(**options)(measure_node)


def measure_in_worker(
    space: SearchSpace, source: DataSource, numerics: Numerics, resources: Resources
) -> Cost:
    """Measure the baseline in a worker of this machine's Ray, as a trial is trained.

    Raises:
        ConfigError, DataError: what the training meets, or what ended the worker.
    """
    how = {
        "config": space.baseline.model_dump(mode="json"),
        "model_source": space.model_source,
        "recorded": numerics.model_dump(),
        "source": source,
    }
    task = _make_task(resources.cpus_per_trial, resources.gpus_per_trial)
    try:
        answer = ray.get(task.remote(how, None))
    except RayTaskError:  # a bug keeps its traceback
        raise
    except RayError as exc:
        rule = "a worker must measure the baseline before a search"
        raise ConfigError(f"ray: {rule}, got {_shorten(exc).rstrip('.')}.") from exc
    if "problem" in answer:
        raise answer["problem"]
    return Cost(*answer["cost"])


THIS_MACHINE = Workers(start_ray, measure_in_worker)


def _shorten(exc: Exception) -> str:
    """Return the last line of an exception, which says what went wrong on a node."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return (lines[-1] if lines else type(exc).__name__)[:300]


def measure_node(how: dict[str, Any], data: list[Any] | None) -> dict[str, Any]:
    """Return this node's Numerics, the digest of its code, and the cost of the baseline here.

    Or, as `problem`, the exception that keeps it from training.
    """
    if how["model_source"]:
        add_source(how["model_source"])
    try:
        recorded = how["recorded"]
        numerics = (
            resolve_numerics(*how["numerics"])
            if recorded is None
            else restore_numerics(Numerics(**recorded))
        )
        config = TrainConfig(**how["config"])
        sizes = config.train_size, config.val_size
        if data is None:
            images = load_train_val(how.get("source") or DataSource("shapes", None), *sizes)
        else:
            images = ray.get(data[0]).select(*sizes)
        cost = measure_cost(config, images, numerics)
    except TuneCifarError as exc:
        return {"problem": exc}
    except Exception as exc:
        if not is_out_of_memory(exc):
            raise
        reason = str(exc).splitlines()[0]
        problem = f"memory: the baseline must fit, got {reason} Lower batch_size."
        return {"problem": ConfigError(problem)}
    return {"numerics": numerics.model_dump(), "code": digest_code(), "cost": tuple(cost)}


def _check_alike(offers: list[Offer], allow_mixed: bool) -> tuple[Offer, ...]:
    """Order offers by how many slots have their Numerics; refuse unlike ones."""

    def count_alike(offer: Offer) -> int:
        return sum(other.slots for other in offers if other.numerics == offer.numerics)

    ordered = sorted(offers, key=lambda offer: -count_alike(offer))
    first = ordered[0]
    for other in ordered:
        changes = compare_numerics(first.numerics, other.numerics)
        if changes and not allow_mixed:
            rule = "`address`: the nodes of a search must be alike"
            hint = "Leave one kind out of the cluster, or give `allow_mixed=True`."
            differs = f"{first.node} -> {other.node}: {'; '.join(changes)}"
            raise ConfigError(f"{rule}, got {differs}. {hint}")
    return tuple(ordered)
