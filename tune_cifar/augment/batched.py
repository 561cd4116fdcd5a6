"""A policy on whole batches, on the images' device: `draw_policy` draws, the rest is pure.

On the CPU an operation computes only the images that it selects. On CUDA it computes all images and
torch.where chooses, so that the host never waits for the device. `reference` makes the same uint8
images from the same draws.

Images/s, batch 128, draws included, one thread of an AMD EPYC (family 26, 2.6 GHz), torch 2.15, two
medians of 5 passes over 10,000 images, 2026-11-20: policy of s10 166,000-204,000, s8
112,000-133,000, s7 91,000-106,000, channels_last up to a third less. albumentations' own Compose on
the same core: s10 13,400, s7 7,800; `reference` 8,400 and 3,800.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from enum import IntEnum, auto
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_cifar.augment.policies import (
    Crop,
    Cutout,
    Gray,
    HFlip,
    PixelOp,
    Policy,
    ShiftScaleRotate,
)
from tune_cifar.dataset import DataDescription

# OpenCV's RGB2GRAY on uint8: 0.299, 0.587, 0.114 in units of 2^-15, compared on all 2^24 colours
# (OpenCV 5.0). The weighted sum is below 2^24, so it is exact in float32.
GRAY_WEIGHTS = (9798.0, 19235.0, 3735.0)
GRAY_ONE = 2.0**15


class CropDraws(NamedTuple):
    """Upper left corner of the crop in the padded image, 0 to 2 pad; int64 (N,)."""

    top: Tensor
    left: Tensor


class HFlipDraws(NamedTuple):
    """selected: bool (N,)."""

    selected: Tensor


class ShiftScaleRotateDraws(NamedTuple):
    """selected: bool (N,). Others float32 (N,): angle in degrees, counter-clockwise; scale factor;
    shift_x to the right and shift_y down, as fractions of the side."""

    selected: Tensor
    angle: Tensor
    scale: Tensor
    shift_x: Tensor
    shift_y: Tensor


class CutoutDraws(NamedTuple):
    """selected: bool (N,). top, left: first row and column of the hole, int64 (N,)."""

    selected: Tensor
    top: Tensor
    left: Tensor


class GrayDraws(NamedTuple):
    """selected: bool (N,)."""

    selected: Tensor


OpDraws = CropDraws | HFlipDraws | ShiftScaleRotateDraws | CutoutDraws | GrayDraws
Draws = tuple[OpDraws, ...]
"""One entry for each operation of the policy."""

SelectingDraws = TypeVar(
    "SelectingDraws", HFlipDraws, ShiftScaleRotateDraws, CutoutDraws, GrayDraws
)
Change = Callable[[Tensor, SelectingDraws], Tensor]
"""What an operation does to selected images (uint8, N, 3, H, W); pure."""


class Stream(IntEnum):
    """Columns of an image's uniform numbers: every random decision has its own in every policy.

    So two configs with one seed differ only in what their knobs change (common random numbers):
    cutout does not change which images are flipped, and a larger rotate_limit rotates the same
    images further.
    """

    CROP_TOP = 0
    CROP_LEFT = auto()
    HFLIP = auto()
    WARP = auto()
    ANGLE = auto()
    SCALE = auto()
    SHIFT_X = auto()
    SHIFT_Y = auto()
    CUTOUT = auto()
    HOLE_TOP = auto()
    HOLE_LEFT = auto()
    GRAY = auto()


def draw_policy(
    policy: Policy,
    num_images: int,
    generator: torch.Generator,
    flipped_N: Tensor | None = None,
) -> Draws:
    """Draw the random numbers of num_images images; none for an empty policy.

    Each image takes len(Stream) uniform numbers, whatever the policy. On the CPU they follow each
    other image by image: the draws do not depend on how the images are divided into batches.

    Args:
        generator: is advanced; the draws are on its device.
        flipped_N: which images are flipped, bool (N,), in place of a draw; see `alternate_flips`.
    """
    if not policy:
        return ()
    uniform = torch.rand(num_images, len(Stream), generator=generator, device=generator.device)
    return tuple(
        HFlipDraws(flipped_N)
        if flipped_N is not None and isinstance(op, HFlip)
        else _draw_op(op, uniform.unbind(1))
        for op in policy
    )


def alternate_flips(phases_N: Tensor, p: float, epoch: int) -> Tensor:
    """Return which images are flipped in an epoch: each in a fraction p of them, evenly spaced.

    At p = 0.5 an image is flipped in every second epoch, as in Jordan, "94% on CIFAR-10 in 3.29
    Seconds on a Single GPU" (arXiv:2404.00498). In each epoch a fraction p is flipped, as without
    alternation.

    Args:
        phases_N: a uniform number in [0, 1) for each image, the same in all epochs; float64, for
            which the sums are exact at p = 0.5.
        epoch: from 0.

    Returns:
        bool (N,).
    """
    return (phases_N + epoch * p).remainder(1.0) < p


def apply_normalize(
    images_NCHW: Tensor,
    data: DataDescription,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Compute (pixel / 255 - mean) / std per channel, as float32 of the given memory format.

    Evaluation does only this; training does it after the policy. Origin: all but s6, which trained
    on inputs in [0, 1].

    Args:
        images_NCHW: uint8 (N, 3, H, W); they are not changed.
        data: what the images belong to.
        memory_format: of the result; channels_last takes one copy of the float batch.

    Raises:
        TypeError: the images are not uint8.
    """
    _check_uint8(images_NCHW)
    mean = _constant(tuple(255 * m for m in data.mean), images_NCHW.device)
    factor = _constant(tuple(1 / (255 * s) for s in data.std), images_NCHW.device)
    return images_NCHW.float().sub_(mean).mul_(factor).contiguous(memory_format=memory_format)


def apply_pixel_ops(policy: Policy, images_NCHW: Tensor, draws: Draws) -> Tensor:
    """Augment a batch: uint8 to uint8. Pure: nothing is drawn, and the images are not changed.

    Args:
        images_NCHW: uint8 (N, 3, H, W), square.
        draws: `draw_policy`'s for this policy and N, on the images' device.

    Raises:
        TypeError: the images are not uint8, or the draws belong to another policy.
    """
    _check_uint8(images_NCHW)
    images = images_NCHW.contiguous()
    for op, drawn in zip(policy, draws, strict=True):
        match op, drawn:
            case Crop(), CropDraws():
                images = apply_crop(op, images, drawn)
            case HFlip(), HFlipDraws():
                images = _change_selected(images, drawn, flip)
            case ShiftScaleRotate(), ShiftScaleRotateDraws():
                images = _change_selected(images, drawn, warp)
            case Cutout(), CutoutDraws():
                images = _change_selected(images, drawn, functools.partial(cut_hole, op))
            case Gray(), GrayDraws():
                images = _change_selected(images, drawn, drop_color)
            case _:
                got = f"{type(drawn).__name__} for {op}"
                raise TypeError(f"augmentation: the draws must be this policy's, got {got}.")
    return images


def apply_crop(op: Crop, images: Tensor, draws: CropDraws) -> Tensor:
    """Crop every image out of its reflect-101 padding, row by row.

    Rows are padded on the left and right only; a row above or below the image is read at its
    mirrored place. The windows of a padded row overlap in memory, so a cropped row is one copy of
    contiguous bytes, 32 of CIFAR-10's.
    """
    num_images, channels, height, width = images.shape
    pad, mirrored = op.pad, images.flip(-1)
    left_margin, right_margin = mirrored[..., -1 - pad : -1], mirrored[..., 1 : 1 + pad]
    padded = torch.cat((left_margin, images, right_margin), dim=-1)
    padded_width = width + 2 * pad
    windows = padded.view(-1).as_strided((padded.numel() - width + 1, width), (1, 1))

    device = images.device
    row = draws.top[:, None] - pad + torch.arange(height, device=device)
    row = (height - 1) - ((height - 1) - row.abs()).abs()
    plane = torch.arange(num_images * channels, device=device).view(num_images, channels, 1)
    starts = (plane * height + row[:, None, :]) * padded_width + draws.left[:, None, None]
    return windows.index_select(0, starts.flatten()).view(images.shape)


def change_all_and_choose(
    images: Tensor, draws: SelectingDraws, change: Change[SelectingDraws]
) -> Tensor:
    """Change all images, then choose: on a GPU the host need not know how many are selected."""
    return torch.where(draws.selected[:, None, None, None], change(images, draws), images)


def change_some(images: Tensor, draws: SelectingDraws, change: Change[SelectingDraws]) -> Tensor:
    """Change only the selected images: for the CPU.

    They are put back by an index_select over old and new images together, which copies whole images
    and takes a fifth of the time of index_copy_ or an assignment by index (26 against 137 us for 58
    of 128 images, median of 200, as at the top).
    """
    index = draws.selected.nonzero().squeeze(1)
    if not len(index):
        return images
    chosen = type(draws)(*(column.index_select(0, index) for column in draws))
    changed = change(images.index_select(0, index), chosen)
    source = torch.arange(len(images), device=images.device)
    source[index] = torch.arange(len(images), len(images) + len(index), device=images.device)
    return torch.cat((images, changed)).index_select(0, source)


def flip(images: Tensor, draws: HFlipDraws) -> Tensor:
    """Swap left and right."""
    return images.flip(-1)


def warp(images: Tensor, draws: ShiftScaleRotateDraws) -> Tensor:
    """Sample each image by the inverse map: shift back, then rotate and scale about the centre.

    A point is a complex number in units of half the distance between the outer pixel centres
    (grid_sample's units with align_corners), so that rotating and scaling is one product; padding
    by "reflection" is then reflect-101. grid_sample takes 0.46 ms for 64 images, gathering four
    neighbours 1.1 ms (fastest of 200, as at the top).
    """
    side = images.shape[-1]
    line = torch.linspace(-1, 1, side, device=images.device)
    to_units = 2 * side / (side - 1)
    turn = torch.polar(1 / draws.scale, draws.angle * (math.pi / 180))[:, None]
    x = turn * (line - draws.shift_x[:, None] * to_units)
    y = turn * 1j * (line - draws.shift_y[:, None] * to_units)
    grid_NHW2 = torch.view_as_real(x[:, None, :] + y[:, :, None])
    sampled = F.grid_sample(
        images.float(), grid_NHW2, mode="bilinear", padding_mode="reflection", align_corners=True
    )
    return sampled.add_(0.5).to(torch.uint8)


def cut_hole(op: Cutout, images: Tensor, draws: CutoutDraws) -> Tensor:
    """Fill the holes by bit masks: 255 inside the hole, 0 outside."""

    def span(start: Tensor, length: int) -> Tensor:
        offset = torch.arange(length, device=images.device) - start[:, None]
        return ((offset >= 0) & (offset < op.size)).to(torch.uint8) * 255

    height, width = images.shape[-2:]
    hole = (span(draws.top, height)[:, :, None] & span(draws.left, width)[:, None, :])[:, None]
    fill = _constant(op.fill, images.device).to(torch.uint8)
    return (images & ~hole) | (fill & hole)


def drop_color(images: Tensor, draws: GrayDraws) -> Tensor:
    """Return the weighted sum of the channels in all three of them, as a view."""
    total = (images * _constant(GRAY_WEIGHTS, images.device)).sum(1, keepdim=True)
    return ((total + GRAY_ONE / 2) / GRAY_ONE).to(torch.uint8).expand_as(images)


def _draw_op(op: PixelOp, uniform: tuple[Tensor, ...]) -> OpDraws:
    """Turn the columns of uniform numbers in [0, 1) into an operation's draws."""

    def below(stream: Stream, num_values: int) -> Tensor:
        # A float32 uniform is at most 1 - 2^-24: its product with a count never rounds up to it.
        return (uniform[stream] * num_values).long()

    def within(stream: Stream, limit: float) -> Tensor:
        return uniform[stream] * (2 * limit) - limit

    match op:
        case Crop(pad):
            num_places = 2 * pad + 1
            top, left = below(Stream.CROP_TOP, num_places), below(Stream.CROP_LEFT, num_places)
            return CropDraws(top, left)
        case HFlip(p):
            return HFlipDraws(uniform[Stream.HFLIP] < p)
        case ShiftScaleRotate():
            return ShiftScaleRotateDraws(
                uniform[Stream.WARP] < op.p,
                within(Stream.ANGLE, op.rotate_limit),
                within(Stream.SCALE, op.scale_limit) + 1,
                within(Stream.SHIFT_X, op.shift_limit),
                within(Stream.SHIFT_Y, op.shift_limit),
            )
        case Cutout(size, p, _, side):
            num_places = side - size + 1
            top, left = below(Stream.HOLE_TOP, num_places), below(Stream.HOLE_LEFT, num_places)
            return CutoutDraws(uniform[Stream.CUTOUT] < p, top, left)
        case Gray(p):
            return GrayDraws(uniform[Stream.GRAY] < p)


def _change_selected(
    images: Tensor, draws: SelectingDraws, change: Change[SelectingDraws]
) -> Tensor:
    """Change the selected images, keep the others."""
    if images.device.type == "cpu":
        return change_some(images, draws, change)
    return change_all_and_choose(images, draws, change)


def _check_uint8(images: Tensor) -> None:
    if images.dtype != torch.uint8:
        rule = "augmentation: the images must be uint8"
        raise TypeError(f"{rule}, got {images.dtype}. Normalize them last.")


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a value per channel as float32 (1, C, 1, 1).

    It is copied to a device only once, because the host waits for such a copy.
    """
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
