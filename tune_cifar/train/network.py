"""The network of the user's own that a search space names: checked, its source taken over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tune_cifar.dataset import DataDescription
from tune_cifar.errors import ConfigError, did_you_mean
from tune_cifar.models.custom import Argument, Network, add_source, check_network
from tune_cifar.schema import ARGUMENT, TrainConfig
from tune_cifar.space.layout import Choices, Range
from tune_cifar.space.select import SearchSpace, read_distribution


def choose_execution(config: TrainConfig, asked: str) -> str:
    """Return the execution that `resolve_numerics` takes: a network of one's own runs eager.

    Raises:
        ConfigError: another was asked for: a graph would freeze what the network's code decides.
    """
    if not config.is_own:
        return asked
    if asked not in ("auto", "eager"):
        rule = "`execution` must be eager for a network of your own"
        raise ConfigError(f"{rule}, got {asked}: a graph would freeze what its code decides.")
    return "eager"


def resolve_network(space: SearchSpace, data: DataDescription) -> SearchSpace:
    """Return the space with the digest and the source of its network; the five need neither.

    Raises:
        ConfigError: the network breaks a rule, or the space does not fit its signature.
    """
    config = space.baseline
    if not config.is_own or space.model_source:
        return space
    sizes = space.distributions.get("batch_size")
    batch_sizes = _list_values(read_distribution(sizes)) if sizes else ()
    network = check_network(config, data, space.path.parent, batch_sizes=batch_sizes)
    _check_space(space, network)
    add_source(network.source)
    baseline = config.model_copy(update={"model_digest": network.digest})
    return replace(space, baseline=baseline, model_source=network.source)


def _check_space(space: SearchSpace, network: Network) -> None:
    """Compare the searched hyperparameters with the constructor's signature."""
    where = space.baseline.model
    is_searched = "dropout" in space.distributions
    if not network.takes_dropout and (is_searched or space.baseline.dropout):
        rule = "dropout must be 0 and not searched, since the constructor has no such argument"
        raise ConfigError(f"{where}: {rule}.")
    known = {argument.name: argument for argument in network.arguments}
    for name, distribution in space.distributions.items():
        if not name.startswith(ARGUMENT):
            continue
        argument = known.get(name.removeprefix(ARGUMENT))
        if argument is None:
            hint = did_you_mean(name.removeprefix(ARGUMENT), known)
            raise ConfigError(f"{where}: the constructor takes no argument {name}.{hint}")
        _check_type(where, argument, read_distribution(distribution))


def _list_values(found: Range | Choices) -> tuple[Any, ...]:
    """Return the choices, or the ends of a range."""
    return tuple(found.values) if isinstance(found, Choices) else (found.low, found.high)


def _check_type(where: str, argument: Argument, found: Range | Choices) -> None:
    kinds = {type(value).__name__ for value in _list_values(found)}
    if not kinds <= {argument.kind, *(["int"] if argument.kind == "float" else [])}:
        got = " and ".join(sorted(kinds))
        rule = f"{ARGUMENT}{argument.name} is {argument.kind} in the constructor"
        raise ConfigError(f"{where}: {rule}, and {got} under search.")
