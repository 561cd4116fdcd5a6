"""The five networks by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from tune_cifar.dataset import CIFAR10, DataDescription
from tune_cifar.errors import ConfigError
from tune_cifar.models.custom import build_own
from tune_cifar.models.s6 import S6Net
from tune_cifar.models.s7 import S7Net
from tune_cifar.models.s8 import S8Net
from tune_cifar.models.s10 import S10Net, S10PostactNet
from tune_cifar.schema import TrainConfig

MODELS: dict[str, Any] = {
    "s6": S6Net,
    "s7": S7Net,
    "s8": S8Net,
    "s10": S10Net,
    "s10_postact": S10PostactNet,
}


def build_model(config: TrainConfig, data: DataDescription = CIFAR10) -> nn.Module:
    """Build the config's network for these images on the CPU, in training mode.

    Initial weights come from torch's default generator, and so do dropout masks until
    `set_dropout_generator` is called.

    Raises:
        ConfigError: the images are too small for the network.
    """
    if config.is_own:
        return build_own(config, data)
    network = MODELS[config.model]
    if data.side < network.MIN_SIDE:
        smallest, got = (f"{side}x{side}" for side in (network.MIN_SIDE, data.side))
        hint = f"Import them again with a `size` of {network.MIN_SIDE} or more."
        raise ConfigError(
            f"{config.model} takes images of at least {smallest}, got {got} of {data.name}. {hint}"
        )
    model: nn.Module = network(dropout=config.dropout, num_classes=data.num_classes, side=data.side)
    return model
