"""A policy through albumentations, one image at a time: the reference for `batched`, and a backend.

Takes the numbers that `batched.draw_policy` drew, never albumentations' own: `Compose` gives one
generator to all its transforms, so that flips happen together. The only module that imports
albumentations (2.0.8; unmaintained since 2025).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

# When it is imported, albumentations asks the package index for updates, unless this is set before.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations as A
import albumentations.augmentations.crops.functional as crops
import albumentations.augmentations.geometric.functional as geometric
import cv2
from numpy.typing import NDArray

from tune_cifar.augment.batched import Draws
from tune_cifar.augment.policies import (
    Crop,
    Cutout,
    Gray,
    HFlip,
    PixelOp,
    Policy,
    ShiftScaleRotate,
)

# One thread per trial; OpenCV's own threads would compete for the core.
cv2.setNumThreads(0)

Image = NDArray[np.uint8]


def apply_pixel_ops_reference(policy: Policy, images_NCHW: Tensor, draws: Draws) -> Tensor:
    """Apply `batched.apply_pixel_ops` through albumentations: same arguments, draws and result.

    Equal on uint8 for crop, flip, cutout and gray, within OpenCV's fixed-point interpolation for
    the warp. Computes on the CPU; the result is on the images' device.
    """
    images: list[Image] = list(images_NCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    for op, op_draws in zip(policy, draws, strict=True):
        rows = zip(*(column.tolist() for column in op_draws), strict=True)
        for number, row in enumerate(rows):
            drawn = dict(zip(op_draws._fields, row, strict=True))
            images[number] = apply_op_reference(op, images[number], drawn)
    changed = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return changed.to(images_NCHW.device)


def apply_op_reference(op: PixelOp, image: Image, drawn: dict[str, Any]) -> Image:
    """Apply one operation to one HWC image; `drawn` has its numbers by the draws' field names."""
    if not drawn.get("selected", True):
        return image
    height, width = image.shape[:2]
    result: Image
    match op:
        case Crop(pad):
            padded = geometric.pad_with_params(image, pad, pad, pad, pad, cv2.BORDER_REFLECT_101, 0)
            top, left = drawn["top"], drawn["left"]
            result = crops.crop(padded, left, top, left + width, top + height)
        case HFlip():
            result = A.HorizontalFlip(p=1.0).apply(image)
        case ShiftScaleRotate():
            matrix = geometric.create_affine_transformation_matrix(
                translate={"x": drawn["shift_x"] * width, "y": drawn["shift_y"] * height},
                shear={"x": 0.0, "y": 0.0},
                scale={"x": drawn["scale"], "y": drawn["scale"]},
                rotate=drawn["angle"],
                shift=geometric.center(image.shape),
            )
            warp = A.Affine(interpolation=cv2.INTER_LINEAR, border_mode=cv2.BORDER_REFLECT_101)
            result = warp.apply(image, matrix=matrix, output_shape=(height, width))
        case Cutout(size, _, fill, _):
            top, left = drawn["top"], drawn["left"]
            hole = np.array([[left, top, left + size, top + size]])
            result = A.CoarseDropout(fill=fill, p=1.0).apply(image, holes=hole, seed=0)
        case Gray():
            result = A.ToGray(p=1.0).apply(image)
    return result
