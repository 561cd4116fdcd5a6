"""The network of ERA V3 session 8: three stages that end in a strided and dilated conv.

115,360 parameters, 19.9 M MACs an image, receptive field 113. Only the depthwise conv and its
pointwise have a bias. ReLU comes before BN.
Shapes (channels x side): 3x32 -> stage 32x32, 32x32, 32x16 -> stage 32x16, 32x16, 32x8 -> stage
32x8, 32x8, 32x4 -> depthwise 32x4 -> pointwise 64x4 -> 64x4 -> average 64x1 -> 10x1 -> 10 logits.
Dropout comes after each of the nine ReLU-BN pairs of the stages. The source has none: baseline
dropout 0.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from tune_cifar.models.dropout import Dropout
from tune_cifar.models.fast_conv import SubsamplingConv2d
from tune_cifar.models.layers import halve, stack

WIDTH = 32


def conv_relu_bn(conv: nn.Conv2d) -> nn.Sequential:
    return stack(conv=conv, relu=nn.ReLU(inplace=True), bn=nn.BatchNorm2d(conv.out_channels))


def make_stage(num_in: int, dropout: float) -> nn.Sequential:
    """Return two convs, then one of stride 2 and dilation 2 that halves the side."""

    def block(conv: nn.Conv2d) -> nn.Sequential:
        layers = conv_relu_bn(conv)
        layers.add_module("dropout", Dropout(dropout))
        return layers

    return stack(
        conv1=block(nn.Conv2d(num_in, WIDTH, 3, padding=1, bias=False)),
        conv2=block(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)),
        strided=block(SubsamplingConv2d(WIDTH, WIDTH, stride=2)),
    )


class S8Net(nn.Sequential):
    """Images (N, 3, side, side) to logits (N, num_classes).

    Args:
        dropout: an activation's drop probability.
    """

    MIN_SIDE = 1

    def __init__(self, dropout: float = 0.0, num_classes: int = 10, side: int = 32) -> None:
        layers: dict[str, nn.Module] = {
            "stage1": make_stage(3, dropout),
            "stage2": make_stage(WIDTH, dropout),
            "stage3": make_stage(WIDTH, dropout),
            "depthwise": nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
            "pointwise": conv_relu_bn(nn.Conv2d(WIDTH, 64, 1)),
            "conv": conv_relu_bn(nn.Conv2d(64, 64, 3, padding=1, bias=False)),
            "gap": nn.AvgPool2d(halve(halve(halve(side)))),
            "classify": nn.Conv2d(64, num_classes, 1, bias=False),
            "flatten": nn.Flatten(),
        }
        super().__init__(OrderedDict(layers))
