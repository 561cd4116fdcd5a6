"""Training images and several augmented variants of each, as the network sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from tune_cifar.augment.batched import draw_policy
from tune_cifar.augment.interpreter import select_interpreter
from tune_cifar.augment.policies import CIFAR_MEAN, CIFAR_STD, make_policy
from tune_cifar.schema import TrainConfig


def make_preview(config: TrainConfig, images_NCHW: Tensor, num_variants: int = 9) -> Tensor:
    """Return each image, then `num_variants` augmented ones by the config's policy and backend.

    Args:
        images_NCHW: (N, 3, 32, 32) uint8.

    Returns:
        (N, 1 + num_variants, 32, 32, 3) uint8, with Normalize undone.
    """
    policy = make_policy(config)
    generator = torch.Generator().manual_seed(config.seed)
    interpret = select_interpreter(config.augment_backend)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    columns = [images_NCHW]
    for _ in range(num_variants):
        batch = interpret(policy, images_NCHW, draw_policy(policy, len(images_NCHW), generator))
        columns.append(((batch * std + mean) * 255).round().clamp(0, 255).to(torch.uint8))
    return torch.stack(columns, dim=1).permute(0, 1, 3, 4, 2).contiguous()
