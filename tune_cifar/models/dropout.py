"""Dropout whose mask depends on an explicit random generator and the shape alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor, nn

from tune_cifar.errors import ConfigError

# Each activation has a random 16-bit lane; one among the lowest values drops it.
LANE_VALUES = 2**16
# The share of activations that is dropped: a multiple of 1 / LANE_VALUES, or a tensor () with one in device memory,
# which a captured step reads anew each time.
Share = float | Tensor
# Activations that are dropped out at once on the CPU: with their dice, well within a core's second-level cache.
CACHED_ACTIVATIONS = 2**18
# What is encrypted for random bits, a piece at a time.
ZEROS = memoryview(bytes(2**16))
AES_BLOCK = 16


def round_probability(p: float) -> float:
    """The multiple of 1 / LANE_VALUES below 1 that is nearest to a probability."""
    return min(round(p * LANE_VALUES), LANE_VALUES - 1) / LANE_VALUES


def is_zero(share: Share) -> bool:
    """False of a tensor, whose value the host must not wait for."""
    return not isinstance(share, Tensor) and share == 0


def find_scale(share: Share) -> Share:
    """What the kept activations are multiplied by."""
    return 1 / (1 - share)


class Dropout(nn.Module):
    """Zeroes each activation (or each whole channel) with probability p while training and scales the rest to match.

    The dice are `generator` alone (None: torch's default one): its state and the shape fix the mask, which depends
    neither on precision nor on memory format nor on threads. The identity in evaluation and for p = 0.

    Deviates from nn.Dropout: p is rounded to a multiple of 2**-16 (0.01 becomes 0.010010), the kept activations are
    scaled by 1 / (1 - that p), and the rounding to bf16 happens once, so that the expectation is exact.

    Attributes:
        share: that p.

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
        self.share: Share = round_probability(p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or is_zero(self.share):
            return x
        shape = (*x.shape[:2], *(1 for _ in x.shape[2:])) if self.whole_channels else tuple(x.shape)
        keep = MaskSampler(self.generator, x.device, self.share).draw_keep_mask(shape, x.dtype)
        return (x * keep).mul_(find_scale(self.share))

    def extra_repr(self) -> str:
        return f"p={self.p}, whole_channels={self.whole_channels}"


class ReluDropout(Dropout):
    """ReLU and Dropout in one, in place, of activations that arrive scaled already (see ScaledBatchNorm2d).

    Backward needs no mask: what is zero in the result has no gradient. It too is in place, so the result must go to one
    layer that makes its gradient anew, as a conv does; a sum hands one gradient to all that it adds up. On the CPU the
    dice are rolled for a few images at a time, so that dice and activations stay in the cache.
    """

    def __init__(self, p: float) -> None:
        super().__init__(p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or is_zero(self.share):
            return x.relu_()
        result: Tensor = _ReluDropout.apply(x, self)
        return result


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: ReluDropout) -> Tensor:
        ctx.mark_dirty(x)
        is_cpu = x.device.type == "cpu"
        num = max(1, CACHED_ACTIVATIONS // x[0].numel()) if is_cpu else len(x)
        # To multiply bf16 by 0 or 1, its bits will do as whole numbers: a fifth of the time.
        dtype = torch.int16 if is_cpu and x.dtype == torch.bfloat16 else x.dtype
        dice = MaskSampler(layer.generator, x.device, layer.share)
        for part in torch.split(x, num):
            part.relu_().view(dtype).mul_(dice.draw_keep_mask(tuple(part.shape), dtype))
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,), (y,) = grad_outputs, ctx.saved_tensors
        return torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad), None


class ScaledBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose output while training is scaled as a Dropout of this share wants it, so that the Dropout needs
    no pass of its own for it.

    scale x ReLU(y) is ReLU(scale x y), and the batch norm multiplies by its weight anyway.
    """

    def __init__(self, num_features: int, share: Share) -> None:
        super().__init__(num_features)
        self.share = share

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or is_zero(self.share):
            return super().forward(input)
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        scale = find_scale(self.share)
        weight, bias = self.weight * scale, self.bias * scale
        return F.batch_norm(
            input, self.running_mean, self.running_var, weight, bias, True, self.momentum, self.eps
        )


class MaskSampler:
    """One forward pass's random bits for one layer that drops this share, on the device.

    On a GPU, and for a share in device memory, every activation has a uniform number. Otherwise one number from
    `generator` is the key under which AES in counter mode gives 16 bits to each activation: a stream that nobody will
    ever change, at 10 GB/s.

    Measured on one thread of an EPYC Zen 5 for 131,072 activations, best of 45, in us, 2026-11-21: AES-CTR 25, ChaCha20
    39, numpy's SFC64 64; the comparison of lanes in place 10 (into bf16 20), the product in whole numbers 4 (in bf16
    20). For (128, 32, 32, 32) = 4.2 M activations, in ms, 2026-11-20: bernoulli_ 18, torch's random_ in lanes 4.8;
    nn.Dropout 18.5 in all, its backward 5.6.
    """

    def __init__(
        self, generator: torch.Generator | None, device: torch.device, share: Share
    ) -> None:
        self._generator = generator
        self._device = device
        self._share = share
        self._has_lanes = device.type == "cpu" and not isinstance(share, Tensor)
        if self._has_lanes:
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
            key = algorithms.AES(seed.to_bytes(16, "little"))
            self._stream = Cipher(key, modes.CTR(bytes(16))).encryptor()

    def draw_keep_mask(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """0 with the share's probability (> 0), else 1; channels last, drawn in the order N, H, W, C."""
        channels_last = (shape[0], *shape[2:], shape[1])
        if not self._has_lanes:
            uniform = torch.rand(channels_last, generator=self._generator, device=self._device)
            return (uniform >= self._share).to(dtype).movedim(-1, 1)
        # Lanes below the threshold become the value before it, the others it; then 0 and 1.
        last_dropped = round(float(self._share) * LANE_VALUES) - 1 - LANE_VALUES // 2
        keep = (
            self._draw_lanes(math.prod(shape))
            .clamp_(last_dropped, last_dropped + 1)
            .sub_(last_dropped)
        )
        return keep.to(dtype).view(channels_last).movedim(-1, 1)

    def _draw_lanes(self, num: int) -> Tensor:
        """(num,) random int16."""
        words = np.empty(2 * num + AES_BLOCK - 1, np.uint8)
        place = words.data
        for start in range(0, 2 * num, len(ZEROS)):
            self._stream.update_into(ZEROS[: 2 * num - start], place[start:])
        return torch.from_numpy(words[: 2 * num].view(np.int16))


def set_drop_probability(model: nn.Module, share: Tensor) -> None:
    """Let every Dropout of the model read what it drops, > 0, from device memory."""
    for module in model.modules():
        if isinstance(module, Dropout | ScaledBatchNorm2d):
            module.share = share


def set_dropout_generator(model: nn.Module, generator: torch.Generator | None) -> None:
    """Let every Dropout of the model draw from `generator`, in forward order; it must be on the model's device."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.generator = generator
