"""The two networks of ERA V1 session 10: the ResNet of cifar10-fast, by two authors.

`s10`: 6,573,130 parameters, no conv has a bias, x + ReLU(BN(...)): the ReLU is in the body.
`s10_postact`: 6,575,370 parameters, every conv has a bias, ReLU(x + BN(...)): the ReLU comes after
the addition. Both: 379.3 M MACs an image, receptive field 88, all convs 3x3 with padding 1.
Shapes (channels x side): 3x32 -> prep 64x32 -> layer1 128x16 + residual -> layer2 256x8 -> layer3
512x4 + residual -> max 512x1 -> linear -> 10 logits. A layer is conv, max pool 2, BN, ReLU.
Dropout comes after the first ReLU of each residual block and before the linear layer. The sources
have none: baseline dropout 0.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from tune_cifar.models.dropout import Dropout
from tune_cifar.models.layers import Residual, conv_bn_relu, stack


class S10Net(nn.Sequential):
    """Images (N, 3, side, side) to logits (N, num_classes).

    Args:
        dropout: an activation's drop probability.
    """

    MIN_SIDE = 8

    def __init__(
        self, dropout: float = 0.0, num_classes: int = 10, side: int = 32, postact: bool = False
    ) -> None:
        def conv3x3(num_in: int, num_out: int) -> nn.Conv2d:
            return nn.Conv2d(num_in, num_out, 3, padding=1, bias=postact)

        def layer(num_in: int, num_out: int) -> nn.Sequential:
            bn = nn.BatchNorm2d(num_out)
            return stack(
                conv=conv3x3(num_in, num_out),
                pool=nn.MaxPool2d(2),
                bn=bn,
                relu=nn.ReLU(inplace=True),
            )

        def residual(num: int) -> nn.Module:
            first = conv_bn_relu(conv3x3(num, num), dropout)
            if not postact:
                return Residual(stack(first=first, second=conv_bn_relu(conv3x3(num, num))))
            second = stack(conv=conv3x3(num, num), bn=nn.BatchNorm2d(num))
            return stack(
                sum=Residual(stack(first=first, second=second)), relu=nn.ReLU(inplace=True)
            )

        layers: dict[str, nn.Module] = {
            "prep": conv_bn_relu(conv3x3(3, 64)),
            "layer1": layer(64, 128),
            "residual1": residual(128),
            "layer2": layer(128, 256),
            "layer3": layer(256, 512),
            "residual3": residual(512),
            "pool": nn.MaxPool2d(side // 8),
            "flatten": nn.Flatten(),
            "dropout": Dropout(dropout),
            "linear": nn.Linear(512, num_classes),
        }
        super().__init__(OrderedDict(layers))


class S10PostactNet(S10Net):
    """S10Net with conv biases and the ReLU after the addition."""

    def __init__(self, dropout: float = 0.0, num_classes: int = 10, side: int = 32) -> None:
        super().__init__(dropout, num_classes, side, postact=True)
