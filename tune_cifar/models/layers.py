"""The few blocks that the networks share: dropout with explicit dice, named stacks, residual sums."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tune_cifar.errors import ConfigError

# A random 64-bit word is read as four 16-bit lanes; a lane among the `threshold` lowest values drops its activation.
LANE_VALUES = 2**16
LANES_PER_WORD = 4
# Activations that are dropped out at once on the CPU: with their dice, well within a core's second-level cache.
CACHED_ACTIVATIONS = 2**17


class Dropout(nn.Module):
    """Zeroes each activation (or each whole channel) with probability p while training and scales the rest to match.

    The dice are `generator` alone (None: torch's default one): its state and the shape fix the mask, which depends
    neither on precision nor on memory format nor on threads. The identity in evaluation and for p = 0.

    Deviates from nn.Dropout: p is rounded to a multiple of 2**-16 (0.01 becomes 0.010010), the kept activations are
    scaled by 1 / (1 - that p), and the rounding to bf16 happens once, so that the expectation is exact.

    Args:
        whole_channels: zero whole channels of an image together, as nn.Dropout2d does.

    Raises:
        ConfigError: p is not in [0, 1).
    """

    def __init__(self, p: float, whole_channels: bool = False) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ConfigError(f"dropout: 0 <= p < 1 must hold, got {p}. Use 0 for none.")
        self.p = p
        self.whole_channels = whole_channels
        self.generator: torch.Generator | None = None
        self.threshold = min(round(p * LANE_VALUES), LANE_VALUES - 1)
        self.scale = LANE_VALUES / (LANE_VALUES - self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.threshold == 0:
            return x
        shape = (*x.shape[:2], *(1 for _ in x.shape[2:])) if self.whole_channels else tuple(x.shape)
        keep = Dice(self.generator, x.device).draw_keep_mask(shape, self.threshold, x.dtype)
        return (x * keep).mul_(self.scale)

    def extra_repr(self) -> str:
        return f"p={self.p}, whole_channels={self.whole_channels}"


class ReluDropout(Dropout):
    """ReLU, then Dropout, in place: the same values and gradients, bit for bit, as the two modules one after the other.

    Backward needs neither mask nor ReLU's output: what is zero in the result has no gradient. On the CPU the dice are
    rolled for a few images at a time, so that dice and activations stay in the cache: a step of s7 (128 images, bf16,
    channels_last, one thread of an EPYC Zen 5 on a shared machine, medians of 160 steps, three runs in turn,
    2026-11-20) takes 105, 101 and 98 ms instead of 135, 112 and 117 ms.
    """

    def __init__(self, p: float) -> None:
        super().__init__(p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.threshold == 0:
            return x.relu_()
        result: Tensor = _ReluDropout.apply(x, self)
        return result


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: ReluDropout) -> Tensor:
        ctx.mark_dirty(x)
        ctx.scale = layer.scale
        num = len(x) if x.device.type != "cpu" else max(1, CACHED_ACTIVATIONS // x[0].numel())
        dice = Dice(layer.generator, x.device)
        for part in torch.split(x, num):
            part.relu_().mul_(dice.draw_keep_mask(tuple(part.shape), layer.threshold, part.dtype)).mul_(layer.scale)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad_outputs[0], y, 0).mul_(ctx.scale), None


class Dice:
    """One forward pass's random bits for one layer, on the device.

    On the CPU one number from `generator` seeds numpy's SFC64 (numpy promises never to change that stream), whose words
    give 16 bits to each activation.

    Measured on one thread of an EPYC Zen 5, 2026-11-20, for (128, 32, 32, 32) = 4.2 M activations in bf16, best of 15,
    in ms: bernoulli_ 18, torch's random_ in lanes 4.8, SFC64 in lanes 2.2; then the comparison 0.8 (5.7 by way
    of a bool mask) and the product with its scale 1.3, backward 1.3 (nn.Dropout: 18.5 in all, backward 5.6). The whole
    s7 step of 128 images, p 0.01, bf16 + channels_last, best of 30: nn.Dropout 129, random_ 91-95, SFC64 88, none 69.
    """

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self._generator = generator
        self._device = device
        if device.type == "cpu":
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
            self._words = np.random.SFC64(seed)

    def draw_keep_mask(self, shape: tuple[int, ...], threshold: int, dtype: torch.dtype) -> Tensor:
        """1 with probability 1 - threshold / 2**16, else 0; channels last, drawn in the order N, H, W, C."""
        channels_last = (shape[0], *shape[2:], shape[1])
        if self._device.type != "cpu":
            keep = torch.empty(channels_last, dtype=dtype, device=self._device)
            return keep.bernoulli_(1 - threshold / LANE_VALUES, generator=self._generator).movedim(-1, 1)
        num = math.prod(shape)
        words = self._words.random_raw(-(-num // LANES_PER_WORD))
        lanes = torch.from_numpy(words.view(np.int16))[:num]
        keep = torch.empty(num, dtype=dtype)
        torch.ge(lanes, threshold - LANE_VALUES // 2, out=keep)
        return keep.view(channels_last).movedim(-1, 1)


def set_dropout_generator(model: nn.Module, generator: torch.Generator | None) -> None:
    """Let every Dropout of the model draw from `generator`, in forward order; it must be on the model's device."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.generator = generator


class CpuFp32Conv2d(nn.Conv2d):
    """A conv that autocast leaves in fp32 on the CPU; elsewhere an ordinary one.

    For strided depthwise convs: oneDNN takes 53 ms for the bf16 gradient of s7's input, 1.1 ms in fp32. The whole s7
    step (128 images, dropout 0.01, bf16 + channels_last) falls from 158 to 108 ms (medians of 15, best 139 and 89; one
    thread of an EPYC Zen 5, 2026-11-20); computing every second pixel of an unstrided bf16 conv is as fast.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.to(self.weight.dtype))


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
    relu = nn.ReLU(inplace=True) if dropout is None else ReluDropout(dropout)
    return stack(conv=conv, bn=nn.BatchNorm2d(conv.out_channels), relu=relu)
