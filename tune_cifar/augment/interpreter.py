"""Choose a policy's interpreter: whole batches on the device, or albumentations image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal


def select_interpreter(backend: Literal["batched", "albumentations"]) -> Callable[..., Any]:
    """Return `batched.apply_pixel_ops` or `reference.apply_pixel_ops_reference`.

    albumentations is imported only when it is chosen.
    """
    if backend == "albumentations":
        from tune_cifar.augment.reference import apply_pixel_ops_reference

        return apply_pixel_ops_reference
    from tune_cifar.augment.batched import apply_pixel_ops

    return apply_pixel_ops
