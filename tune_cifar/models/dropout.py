"""Dropout whose mask depends only on an explicit random generator and the shape of its input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor, nn

from tune_cifar.errors import ConfigError

# Each activation has a random 16-bit lane; the lowest of LANE_VALUES values drop it.
LANE_VALUES = 2**16
# A multiple of 1 / LANE_VALUES, or a tensor () with one in device memory, which a captured step
# reads in each replay.
DropProbability = float | Tensor
# The activations that ReluDropout handles at a time on the CPU. They and their lanes fit into a
# core's second-level cache.
CACHED_ACTIVATIONS = 2**18
# The plaintext of the random bits, encrypted piece by piece.
ZEROS = memoryview(bytes(2**16))
AES_BLOCK = 16


class Dropout(nn.Module):
    """Dropout with an explicit random generator.

    While training, zeroes each activation (or each channel of an image) with probability p and
    scales the others to keep the expectation. The mask depends only on the state of `generator`
    (None: torch's default generator) and the shape: not on precision, memory format or threads. The
    identity in evaluation and for p = 0.

    Deviates from nn.Dropout: p is rounded to a multiple of 2**-16 (0.01 becomes 0.010010), the
    scale is 1 / (1 - that p), and the result is rounded to bf16 only once, so that the expectation
    is exact.

    Attributes:
        drop_p: that rounded p.

    Args:
        whole_channels: zero all activations of a channel together, as nn.Dropout2d does.

    Raises:
        ConfigError: p is not in [0, 1).
    """

    def __init__(self, p: float, whole_channels: bool = False) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ConfigError(f"dropout: 0 <= p < 1 must hold, got {p}. Use 0 for none.")
        self.whole_channels = whole_channels
        self.generator: torch.Generator | None = None
        self.drop_p: DropProbability = round_probability(p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or is_zero(self.drop_p):
            return x
        shape = (*x.shape[:2], *(1 for _ in x.shape[2:])) if self.whole_channels else tuple(x.shape)
        mask = MaskSampler(self.generator, x.device, self.drop_p).draw_mask(shape, x.dtype)
        scale = compute_scale(self.drop_p)
        if isinstance(scale, Tensor):  # in bf16 a factor from device memory would be rounded, too
            return (x * mask).float().mul_(scale).to(x.dtype)
        return (x * mask).mul_(scale)

    def extra_repr(self) -> str:
        return f"drop_p={self.drop_p}, whole_channels={self.whole_channels}"


class ReluDropout(Dropout):
    """ReLU and Dropout in one, in place, of activations that are already scaled.

    ScaledBatchNorm2d scales them. Backward needs no mask: a zero in the result has no gradient. It
    works in place too, so the result must go to a single layer that makes a new tensor of its
    input's gradient, as a conv does; a sum passes one gradient to all its terms. On the CPU the
    mask is drawn for a few images at a time, so that lanes and activations stay in the cache.
    """

    def __init__(self, p: float) -> None:
        super().__init__(p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or is_zero(self.drop_p):
            return x.relu_()
        result: Tensor = _ReluDropout.apply(x, self)
        return result


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: ReluDropout) -> Tensor:
        ctx.mark_dirty(x)
        is_cpu = x.device.type == "cpu"
        num_images = max(1, CACHED_ACTIVATIONS // x[0].numel()) if is_cpu else len(x)
        # bf16 times 0 or 1 may be computed on the bits as int16: a fifth of the time.
        dtype = torch.int16 if is_cpu and x.dtype == torch.bfloat16 else x.dtype
        sampler = MaskSampler(layer.generator, x.device, layer.drop_p)
        for part in torch.split(x, num_images):
            part.relu_().view(dtype).mul_(sampler.draw_mask(tuple(part.shape), dtype))
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,), (y,) = grad_outputs, ctx.saved_tensors
        return torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad), None


class ScaledBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that, while training, also scales its output as the ReluDropout after it needs.

    The scale costs no pass of its own: scale x ReLU(y) is ReLU(scale x y), and the batch norm
    multiplies by its weight anyway.
    """

    def __init__(self, num_features: int, drop_p: DropProbability) -> None:
        super().__init__(num_features)
        self.drop_p = drop_p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or is_zero(self.drop_p):
            return super().forward(input)
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        scale = compute_scale(self.drop_p)
        weight, bias = self.weight * scale, self.bias * scale
        return F.batch_norm(
            input, self.running_mean, self.running_var, weight, bias, True, self.momentum, self.eps
        )


def set_dropout_generator(model: nn.Module, generator: torch.Generator | None) -> None:
    """Let every Dropout of the model draw from `generator`, in forward order.

    It must be on the model's device.
    """
    for module in model.modules():
        if isinstance(module, Dropout):
            module.generator = generator


def set_drop_probability(model: nn.Module, drop_p: DropProbability) -> None:
    """Set the drop probability of every Dropout of the model, rounded as `round_probability` does.

    Args:
        drop_p: as a tensor it must be > 0.
    """
    for module in model.modules():
        if isinstance(module, Dropout | ScaledBatchNorm2d):
            module.drop_p = drop_p


def round_probability(p: float) -> float:
    """Return the multiple of 1 / LANE_VALUES below 1 that is nearest to a probability."""
    return min(round(p * LANE_VALUES), LANE_VALUES - 1) / LANE_VALUES


def is_zero(drop_p: DropProbability) -> bool:
    """Return whether the probability is 0; False for a tensor, since the host must not wait."""
    return not isinstance(drop_p, Tensor) and drop_p == 0


def compute_scale(drop_p: DropProbability) -> DropProbability:
    """Return the factor of the activations that are not dropped."""
    return 1 / (1 - drop_p)


class MaskSampler:
    """Draws the dropout masks of one layer in one forward pass, on the device.

    On a GPU, and for a drop probability in device memory, torch draws the mask in one kernel.
    Otherwise one number from `generator` is the key with which AES in counter mode gives a 16-bit
    lane to each activation: a stream that never changes, at 10 GB/s.

    Measured on one thread of an EPYC Zen 5 for 131,072 activations, best of 45, in us, 2026-11-21:
    AES-CTR 25, ChaCha20 39, numpy's SFC64 64; the comparison of lanes in place 10 (into bf16 20),
    the product in integers 4 (in bf16 20). For (128, 32, 32, 32) = 4.2 M activations, in ms,
    2026-11-20: bernoulli_ 18, torch's random_ in lanes 4.8; nn.Dropout 18.5 in all, its backward
    5.6.
    """

    def __init__(
        self, generator: torch.Generator | None, device: torch.device, drop_p: DropProbability
    ) -> None:
        self._generator = generator
        self._device = device
        self._drop_p = drop_p
        self._has_lanes = device.type == "cpu" and not isinstance(drop_p, Tensor)
        if self._has_lanes:
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
            key = algorithms.AES(seed.to_bytes(16, "little"))
            self._stream = Cipher(key, modes.CTR(bytes(16))).encryptor()

    def draw_mask(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Draw 0 with the drop probability (> 0), else 1: channels last, in order N, H, W, C."""
        channels_last = (shape[0], *shape[2:], shape[1])
        if not self._has_lanes:
            mask = torch.empty(channels_last, dtype=dtype, device=self._device)
            return mask.bernoulli_(1 - self._drop_p, generator=self._generator).movedim(-1, 1)
        # Clamped to two neighbouring values: the last lane value that drops, and the next one.
        last_dropped = round(float(self._drop_p) * LANE_VALUES) - 1 - LANE_VALUES // 2
        lanes = self._draw_lanes(math.prod(shape))
        mask = lanes.clamp_(last_dropped, last_dropped + 1).sub_(last_dropped)
        return mask.to(dtype).view(channels_last).movedim(-1, 1)

    def _draw_lanes(self, num: int) -> Tensor:
        """Draw (num,) int16."""
        words = np.empty(2 * num + AES_BLOCK - 1, np.uint8)
        for start in range(0, 2 * num, len(ZEROS)):
            self._stream.update_into(ZEROS[: 2 * num - start], words.data[start:])
        return torch.from_numpy(words[: 2 * num].view(np.int16))
