"""The network of EVA8 session 6: plain convs, two dilated ones, a depthwise 5x5, a strided 5x5 instead of pooling.

197,498 parameters, 77.5 M MACs an image, receptive field 47. Every conv has a bias.
Shapes (channels x side): 3x32 -> 8x32 -> 16x32 -> 32x32 -> 64x32 -> dilated 64x28 -> depthwise 64x24 -> squeeze 8x24
-> 16x24 -> 24x24 -> 32x24 -> dilated 64x20 -> strided 64x9 -> 10x9 -> average 10x1 -> 10 logits.
Dropout takes whole channels, after the three 64-channel convs that are followed by BN and ReLU.
Baseline: dropout 0.1.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from tune_cifar.models.layers import Dropout, conv_bn_relu, stack


class Depthwise5x5(nn.Conv2d):
    """A depthwise 5x5 conv without padding whose weight gradient is fast on the CPU; elsewhere an ordinary one."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, num_channels, 5, groups=num_channels)

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or not self.training:
            return super().forward(input)
        assert self.bias is not None
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        arguments = (tensor.to(dtype) for tensor in (input, self.weight, self.bias))
        result: Tensor = TiledDepthwise5x5.apply(*arguments)
        return result


class TiledDepthwise5x5(torch.autograd.Function):
    """Depthwise 5x5 conv, its weight gradient put together from four overlapping 3x3 ones.

    oneDNN has a fast weight gradient for 3x3 kernels only. An entry of the gradient is the product of the output's
    gradient with the input shifted by that entry, so the 3x3 corner at (row, column) is the gradient of a 3x3 conv of
    the input without its first rows and columns: the same sums. This gradient takes 17 ms instead of 55, the whole s6
    step (128 images, dropout 0.1, bf16 + channels_last) 280-294 instead of 326-363 (medians of 15, two runs, one thread
    of an EPYC Zen 5, 2026-11-20); the layer in fp32 gains 4 %.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        groups, rows, columns = len(weight), grad.shape[2] + 2, grad.shape[3] + 2
        grad_weight = torch.empty_like(weight)
        for row in (0, 2):
            for column in (0, 2):
                window = x[:, :, row : row + rows, column : column + columns]
                corner = conv2d_weight(window, (groups, 1, 3, 3), grad, groups=groups)  # type: ignore[no-untyped-call]
                grad_weight[:, :, row : row + 3, column : column + 3] = corner
        grad_x: Tensor = conv2d_input(x.shape, weight, grad, groups=groups)  # type: ignore[no-untyped-call]
        return grad_x, grad_weight, grad.sum((0, 2, 3))


class S6Net(nn.Sequential):
    """Images (N, 3, 32, 32) to logits (N, 10); dropout is the probability of losing a channel."""

    def __init__(self, dropout: float = 0.0) -> None:
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
            "classify": nn.Conv2d(64, 10, 1),
            "gap": nn.AvgPool2d(9),
            "flatten": nn.Flatten(),
        }
        super().__init__(OrderedDict(layers))
