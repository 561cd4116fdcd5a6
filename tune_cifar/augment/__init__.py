"""Augmentation: a policy is plain data (`policies`), and two interpreters turn it and drawn numbers into pictures.

`batched` works on whole batches on the device, `reference` on one image at a time through albumentations. The same
draws give the same uint8 picture in both (the warp within a stated tolerance), so each is a test of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal


def select_interpreter(backend: Literal["batched", "albumentations"]) -> Callable[..., Any]:
    """`batched.apply_policy` or `reference.apply_policy_reference`; albumentations is imported only when chosen."""
    if backend == "albumentations":
        from tune_cifar.augment.reference import apply_policy_reference

        return apply_policy_reference
    from tune_cifar.augment.batched import apply_policy

    return apply_policy
