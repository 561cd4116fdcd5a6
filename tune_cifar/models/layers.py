"""The few blocks that the networks share: dropout with explicit dice, named stacks, residual sums."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from tune_cifar.models.dropout import ReluDropout, ScaledBatchNorm2d


class Add(nn.Module):
    """A sum as a module, so that a walk over the modules sees both paths meet."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.add(x, self.body(x))
        return result


def stack(**layers: nn.Module) -> nn.Sequential:
    """Layers one after another, under the names given."""
    return nn.Sequential(OrderedDict(layers))


def conv_bn_relu(conv: nn.Conv2d, dropout: float | None = None) -> nn.Sequential:
    """A conv, its batch norm and ReLU; with a probability also Dropout, even when it is 0."""
    if dropout is None:
        return stack(conv=conv, bn=nn.BatchNorm2d(conv.out_channels), relu=nn.ReLU(inplace=True))
    relu = ReluDropout(dropout)
    return stack(conv=conv, bn=ScaledBatchNorm2d(conv.out_channels, relu.share), relu=relu)
