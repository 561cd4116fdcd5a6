"""The few blocks that the networks share: dropout with explicit dice, named stacks, residual sums."""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn

from tune_cifar.errors import ConfigError

# A random 64-bit word is read as four 16-bit lanes; a lane among the `threshold` lowest values drops its activation.
LANE_VALUES = 2**16
LANES_PER_WORD = 4


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
        return (x * draw_keep_mask(shape, self.threshold, x, self.generator)).mul_(self.scale)

    def extra_repr(self) -> str:
        return f"p={self.p}, whole_channels={self.whole_channels}"


def draw_keep_mask(shape: tuple[int, ...], threshold: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """1 with probability 1 - threshold / 2**16, else 0, in the dtype and on the device of `like`; channels last.

    On the CPU one number from `generator` seeds numpy's SFC64 (numpy promises never to change that stream), whose words
    give 16 bits to each activation; drawn in the order N, H, W, C whatever the layout of `like`.

    Measured on one thread of an EPYC Zen 5, 2026-11-20, for (128, 32, 32, 32) = 4.2 M activations in bf16, best of 15,
    in ms: bernoulli_ 18, torch's random_ in lanes 4.8, SFC64 in lanes 2.2; then the comparison 0.8 (5.7 by way
    of a bool mask) and the product with its scale 1.3, backward 1.3 (nn.Dropout: 18.5 in all, backward 5.6). The whole
    s7 step of 128 images, p 0.01, bf16 + channels_last, best of 30: nn.Dropout 129, random_ 91-95, SFC64 88, none 69.
    """
    channels_last = (shape[0], *shape[2:], shape[1])
    if like.device.type != "cpu":
        keep = torch.empty(channels_last, dtype=like.dtype, device=like.device)
        return keep.bernoulli_(1 - threshold / LANE_VALUES, generator=generator).movedim(-1, 1)
    num = math.prod(shape)
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    words = np.random.SFC64(seed).random_raw(-(-num // LANES_PER_WORD))
    lanes = torch.from_numpy(words.view(np.int16))[:num]
    keep = torch.empty(num, dtype=like.dtype)
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


def conv_bn_relu(conv: nn.Conv2d, dropout: Dropout | None = None) -> nn.Sequential:
    layers = stack(conv=conv, bn=nn.BatchNorm2d(conv.out_channels), relu=nn.ReLU(inplace=True))
    if dropout is not None:
        layers.add_module("dropout", dropout)
    return layers
