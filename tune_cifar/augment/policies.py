"""Augmentation policies: the operations on a training image with their strengths, as data.

Operations work on uint8 pixels of square RGB images, in pixels, degrees and probabilities; an
interpreter (`batched`, `reference`) applies them. All five source systems use a subsequence of one
order, kept by `make_policy`: crop, hflip, shift_scale_rotate, cutout, gray. Borders are mirrored
without repeating the edge pixel (reflect-101: d c b | a b c d | c b a), as in all sources.
"""

from __future__ import annotations

from dataclasses import dataclass

from tune_cifar.dataset import CIFAR10, DataDescription
from tune_cifar.schema import TrainConfig


def mean_color(data: DataDescription) -> tuple[int, int, int]:
    """Return a data set's mean colour in uint8 pixel units, rounded to the nearest integer.

    albumentations would cut a fraction off (of CIFAR-10 122.96 -> 122).
    """
    red, green, blue = (round(255 * value) for value in data.mean)
    return red, green, blue


@dataclass(frozen=True)
class Crop:
    """Pad every side by reflection, then crop the original size at a uniformly drawn place.

    Origin: `s10`, `s10_postact`. Deviates from s10: 4 px, as its assignment asked; its code padded
    by 2.
    """

    pad: int
    """Pixels on each side, at least 1."""


@dataclass(frozen=True)
class HFlip:
    """Swap left and right.

    Origin: all five; s6 swapped top and bottom by mistake, because its arrays were CHW.
    """

    p: float
    """Probability that an image is flipped."""


@dataclass(frozen=True)
class ShiftScaleRotate:
    """Rotate and scale about the centre, then shift; bilinear, rounded to uint8.

    The centre is ((W - 1) / 2, (H - 1) / 2). Both axes have the same scale; each has its own shift,
    a real number of pixels. Origin: `s6`, `s7`, `s8`, through albumentations 1.x. Deviates from
    albumentations 2.0.8, which truncates the shift to whole pixels (0 twice as likely).
    """

    shift_limit: float
    """The shift of an axis is uniform in +- this fraction of the side."""
    scale_limit: float
    """The scale is uniform in 1 +- this."""
    rotate_limit: float
    """The angle is uniform in +- this many degrees; positive is counter-clockwise."""
    p: float
    """Probability that an image is warped."""


@dataclass(frozen=True)
class Cutout:
    """Fill one square hole, inside the image, at a uniformly drawn place.

    Origin: all five, as CoarseDropout. Deviates from s7 and s10: they gave the fill in the units of
    normalized pixels (s7's holes were black); here it is the mean colour in pixel units, hence 0
    after `batched.apply_normalize` (to 0.01).
    """

    size: int
    """Side of the hole in pixels, at least 1."""
    p: float
    """Probability that an image gets a hole."""
    fill: tuple[int, int, int] = mean_color(CIFAR10)
    """Red, green and blue of the hole, uint8."""
    image_side: int = CIFAR10.side
    """Height and width of the images; the hole lies within."""


@dataclass(frozen=True)
class Gray:
    """Set all channels to 0.299 R + 0.587 G + 0.114 B, rounded to uint8. Origin: `s7` (ToGray)."""

    p: float
    """Probability that an image becomes gray."""


PixelOp = Crop | HFlip | ShiftScaleRotate | Cutout | Gray
Policy = tuple[PixelOp, ...]


def make_policy(config: TrainConfig, data: DataDescription = CIFAR10) -> Policy:
    """Return the operations whose strength is not 0 in this config, in the one order."""
    ops: list[PixelOp] = []
    if config.crop_pad:
        ops.append(Crop(config.crop_pad))
    if config.hflip_p:
        ops.append(HFlip(config.hflip_p))
    limits = (config.shift_limit, config.scale_limit, config.rotate_limit)
    if config.shift_scale_rotate_p and any(limits):
        ops.append(ShiftScaleRotate(*limits, config.shift_scale_rotate_p))
    if config.cutout_p and config.cutout_size:
        ops.append(Cutout(config.cutout_size, config.cutout_p, mean_color(data), data.side))
    if config.gray_p:
        ops.append(Gray(config.gray_p))
    return tuple(ops)
