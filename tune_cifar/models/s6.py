"""The network of EVA8 session 6: plain convs, two dilated ones, a depthwise and a strided 5x5.

197,498 parameters, 77.5 M MACs an image, receptive field 47. Every conv has a bias. The strided
conv replaces pooling.
Shapes (channels x side): 3x32 -> 8x32 -> 16x32 -> 32x32 -> 64x32 -> dilated 64x28 -> depthwise
64x24 -> squeeze 8x24 -> 16x24 -> 24x24 -> 32x24 -> dilated 64x20 -> strided 64x9 -> 10x9 ->
average 10x1 -> 10 logits.
Dropout drops channels, after the three 64-channel convs that are followed by BN and ReLU. Baseline:
dropout 0.1.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from tune_cifar.models.dropout import Dropout
from tune_cifar.models.fast_conv import Depthwise5x5
from tune_cifar.models.layers import conv_bn_relu, stack


class S6Net(nn.Sequential):
    """Images (N, 3, side, side) to logits (N, num_classes).

    Args:
        dropout: a channel's drop probability.
    """

    MIN_SIDE = 15

    def __init__(self, dropout: float = 0.0, num_classes: int = 10, side: int = 32) -> None:
        last_side = (side - 15) // 2 + 1

        def block(conv: nn.Conv2d) -> nn.Sequential:
            layers = conv_bn_relu(conv)
            layers.add_module("dropout", Dropout(dropout, whole_channels=True))
            return layers

        layers: dict[str, nn.Module] = {
            "block1": stack(
                conv1=conv_bn_relu(nn.Conv2d(3, 8, 3, padding=1)),
                conv2=conv_bn_relu(nn.Conv2d(8, 16, 3, padding=1)),
                conv3=conv_bn_relu(nn.Conv2d(16, 32, 3, padding=1)),
                conv4=block(nn.Conv2d(32, 64, 3, padding=1)),
                dilated=block(nn.Conv2d(64, 64, 3, dilation=2)),
            ),
            "block2": stack(
                depthwise=Depthwise5x5(64),
                squeeze=conv_bn_relu(nn.Conv2d(64, 8, 1)),
                conv1=conv_bn_relu(nn.Conv2d(8, 16, 3, padding=1)),
                conv2=conv_bn_relu(nn.Conv2d(16, 24, 3, padding=1)),
                conv3=conv_bn_relu(nn.Conv2d(24, 32, 3, padding=1)),
                dilated=block(nn.Conv2d(32, 64, 3, dilation=2)),
            ),
            "strided": nn.Conv2d(64, 64, 5, stride=2, padding=1),
            "classify": nn.Conv2d(64, num_classes, 1),
            "gap": nn.AvgPool2d(last_side),
            "flatten": nn.Flatten(),
        }
        super().__init__(OrderedDict(layers))
