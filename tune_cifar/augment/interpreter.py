"""Choose a policy's interpreter: whole batches on the device, or albumentations image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple


class Interpreter(NamedTuple):
    """The two parts of a policy's application; see `batched` for their arguments."""

    apply_pixel_ops: Callable[..., Any]
    apply_normalize: Callable[..., Any]


def select_interpreter(backend: Literal["batched", "albumentations"]) -> Interpreter:
    """Return the functions of `batched` or those of `reference`.

    albumentations is imported only when it is chosen.
    """
    if backend == "albumentations":
        from tune_cifar.augment import reference

        return Interpreter(reference.apply_pixel_ops_reference, reference.apply_normalize_reference)
    from tune_cifar.augment import batched

    return Interpreter(batched.apply_pixel_ops, batched.apply_normalize)
