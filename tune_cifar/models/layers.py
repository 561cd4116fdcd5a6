"""The blocks that several networks use: named stacks, conv-BN-ReLU, residual sums."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from tune_cifar.models.dropout import ReluDropout, ScaledBatchNorm2d


class Add(nn.Module):
    """A sum as a module, so that `ReceptiveFieldWalk` sees where two paths meet."""

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


def halve(side: int) -> int:
    """Return the side of the maps after a padded conv of stride 2."""
    return (side + 1) // 2


def stack(**layers: nn.Module) -> nn.Sequential:
    """Return the layers one after another, under the names given."""
    return nn.Sequential(OrderedDict(layers))


def conv_bn_relu(conv: nn.Conv2d, dropout: float | None = None) -> nn.Sequential:
    """Return a conv, its batch norm and ReLU; with a drop probability, even 0, also Dropout."""
    if dropout is None:
        return stack(conv=conv, bn=nn.BatchNorm2d(conv.out_channels), relu=nn.ReLU(inplace=True))
    relu = ReluDropout(dropout)
    return stack(conv=conv, bn=ScaledBatchNorm2d(conv.out_channels, relu.drop_p), relu=relu)
