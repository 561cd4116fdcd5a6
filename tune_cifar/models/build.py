"""The five networks by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tune_cifar.models.s6 import S6Net
from tune_cifar.models.s7 import S7Net
from tune_cifar.models.s8 import S8Net
from tune_cifar.models.s10 import S10Net, S10PostactNet
from tune_cifar.schema import TrainConfig

MODELS: dict[str, Callable[..., nn.Module]] = {
    "s6": S6Net,
    "s7": S7Net,
    "s8": S8Net,
    "s10": S10Net,
    "s10_postact": S10PostactNet,
}


def build_model(config: TrainConfig) -> nn.Module:
    """Build the config's network on the CPU, in training mode.

    Initial weights come from torch's default generator, and so do dropout masks until
    `set_dropout_generator` is called.
    """
    return MODELS[config.model](dropout=config.dropout)
