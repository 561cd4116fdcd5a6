"""The network of EVA6 session 7: strides, two depthwise-separable convs, two dilated convs.

86,816 parameters, 19.2 M MACs an image, receptive field 83. Only the two pointwise convs have a
bias. No pooling but the average at the end.
Shapes (channels x side): 3x32 -> 32x32 -> 32x32 -> strided 32x16 -> 64x16 -> depthwise strided +
pointwise 64x8 -> depthwise + pointwise 128x8 -> 32x8 -> dilated 32x6 -> dilated 32x4 -> 32x4 ->
10x4 -> average 10x1 -> 10 logits.
Dropout comes after every conv-BN-ReLU; nothing is between depthwise and pointwise. Baseline:
dropout 0.01.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from tune_cifar.models.fast_conv import StridedDepthwiseConv2d
from tune_cifar.models.layers import conv_bn_relu, halve, stack


class S7Net(nn.Sequential):
    """Images (N, 3, side, side) to logits (N, num_classes).

    Args:
        dropout: an activation's drop probability.
    """

    MIN_SIDE = 17

    def __init__(self, dropout: float = 0.0, num_classes: int = 10, side: int = 32) -> None:
        last_side = halve(halve(side)) - 4

        def conv3x3(num_in: int, num_out: int, **options: Any) -> nn.Conv2d:
            return nn.Conv2d(num_in, num_out, 3, padding=1, bias=False, **options)

        def block(conv: nn.Conv2d) -> nn.Sequential:
            return conv_bn_relu(conv, dropout)

        layers: dict[str, nn.Module] = {
            "convblock1": stack(conv1=block(conv3x3(3, 32)), conv2=block(conv3x3(32, 32))),
            "transblock1": block(conv3x3(32, 32, stride=2)),
            "convblock2": block(conv3x3(32, 64)),
            "transblock2": stack(
                depthwise=StridedDepthwiseConv2d(64, stride=2),
                pointwise=block(nn.Conv2d(64, 64, 1)),
            ),
            "convblock3": stack(
                depthwise=conv3x3(64, 64, groups=64),
                pointwise=block(nn.Conv2d(64, 128, 1)),
                squeeze=block(nn.Conv2d(128, 32, 1, bias=False)),
            ),
            # Padding 1 under dilation 2: each of the two takes two pixels off the side.
            "transblock3": stack(
                conv1=conv3x3(32, 32, dilation=2), conv2=block(conv3x3(32, 32, dilation=2))
            ),
            "convblock4": stack(
                conv1=conv3x3(32, 32), relu=nn.ReLU(inplace=True), conv2=conv3x3(32, num_classes)
            ),
            "gap": nn.AvgPool2d(last_side),
            "flatten": nn.Flatten(),
        }
        super().__init__(OrderedDict(layers))
