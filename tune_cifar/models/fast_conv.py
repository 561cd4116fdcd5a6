"""Convolutions with faster gradients on the CPU than torch's own; each equals an ordinary conv."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad as nn_grad

GRADIENTS: Any = nn_grad
"""torch's module of convolution gradients, which has no types."""


class StridedDepthwiseConv2d(nn.Conv2d):
    """A strided depthwise 3x3 conv that computes its input's bf16 gradient on the CPU in fp32.

    oneDNN takes 53 ms for the bf16 gradient of s7's input (128, 64, 16, 16) at stride 2, 0.4 ms for
    the fp32 one (one thread of an EPYC Zen 5, best of 15, 2026-11-21). Otherwise an ordinary conv.
    """

    def __init__(self, num_channels: int, stride: int) -> None:
        super().__init__(
            num_channels, num_channels, 3, stride=stride, padding=1, groups=num_channels, bias=False
        )

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.bfloat16:
            return super().forward(input)
        result: Tensor = _StridedDepthwise.apply(input, self.weight.to(input.dtype), self.stride[0])
        return result


class SubsamplingConv2d(nn.Conv2d):
    """A 3x3 conv with dilation equal to stride, computed as an ordinary conv of fewer pixels.

    It reads only every stride-th row and column. For s8's first (128, 32, 32, 32) in bf16, forward,
    gradient by x and by weight take 1.4, 2.3 and 2.0 ms that way, and 2.6, 7.4 and 12.9 ms as a
    strided and dilated conv (one thread of an EPYC Zen 5, lower quartile of 12, 2026-11-21).

    Args:
        stride: in pixels; also the dilation and the padding.
    """

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__(
            num_in, num_out, 3, stride=stride, dilation=stride, padding=stride, bias=False
        )

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(_Subsample.apply(input, self.stride[0]), self.weight, padding=1)


class Depthwise5x5(nn.Conv2d):
    """A depthwise 5x5 conv without padding, with a fast weight gradient on the CPU."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, num_channels, 5, groups=num_channels)

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or not self.training:
            return super().forward(input)
        assert self.bias is not None
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        arguments = (tensor.to(dtype) for tensor in (input, self.weight, self.bias))
        result: Tensor = _TiledDepthwise5x5.apply(*arguments)
        return result


class _StridedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, stride=stride, padding=1, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (x, weight) = grad_outputs, ctx.saved_tensors
        # The gradient by x does not depend on the values of x, only on its shape.
        shape_of_x = torch.empty_like(x, dtype=torch.float32)
        wide_grad, wide_weight = grad.float(), weight.float()
        by_x, _, _ = _backward_depthwise(
            wide_grad, shape_of_x, wide_weight, ctx.stride, [True, False, False]
        )
        _, by_weight, _ = _backward_depthwise(grad, x, weight, ctx.stride, [False, True, False])
        return by_x.to(x.dtype), by_weight, None


def _backward_depthwise(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by x, weight and bias, those that are wanted."""
    # Stride, padding, dilation, not transposed, no output padding, groups.
    settings = ([stride, stride], [1, 1], [1, 1], False, [0, 0], len(weight))
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *settings, wanted
    )
    return grads


class _Subsample(torch.autograd.Function):
    """Every step-th row and column; unlike a slice's, its gradient keeps the memory format."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.step = step
        return x[:, :, ::step, ::step].clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,), (x,) = grad_outputs, ctx.saved_tensors
        by_x = torch.zeros_like(x)
        by_x[:, :, :: ctx.step, :: ctx.step] = grad
        return by_x, None


class _TiledDepthwise5x5(torch.autograd.Function):
    """A depthwise 5x5 conv whose weight gradient is composed of four overlapping 3x3 ones.

    oneDNN has a fast weight gradient for 3x3 kernels only. An entry of the gradient is the product
    of the output's gradient with the input shifted by that entry, so the 3x3 corner at (row,
    column) is the gradient of a 3x3 conv of the input without its first rows and columns: the same
    sums. This gradient takes 17 ms instead of 55, a step of s6 (128 images, dropout 0.1, bf16 +
    channels_last) 280-294 instead of 326-363 (medians of 15, two runs, one thread of an EPYC Zen 5,
    2026-11-20); the layer in fp32 gains 4 %.
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
                corner = GRADIENTS.conv2d_weight(window, (groups, 1, 3, 3), grad, groups=groups)
                grad_weight[:, :, row : row + 3, column : column + 3] = corner
        grad_x: Tensor = GRADIENTS.conv2d_input(x.shape, weight, grad, groups=groups)
        return grad_x, grad_weight, grad.sum((0, 2, 3))
