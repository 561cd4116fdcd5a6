"""Training images and several augmented variants of each, as the network sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from tune_cifar.augment.batched import draw_policy
from tune_cifar.augment.interpreter import select_interpreter
from tune_cifar.augment.policies import make_policy
from tune_cifar.dataset import CIFAR10, DataDescription
from tune_cifar.schema import TrainConfig

# Augmented pictures of each image: with the image itself a row of ten.
NUM_VARIANTS = 9


def make_preview(
    config: TrainConfig, images_NCHW: Tensor, data: DataDescription = CIFAR10
) -> Tensor:
    """Return each image, then NUM_VARIANTS augmented ones by the config's policy and backend.

    Args:
        images_NCHW: (N, 3, H, W) uint8.
        data: what the images belong to.

    Returns:
        (N, 1 + NUM_VARIANTS, H, W, 3) uint8, not normalized.
    """
    policy = make_policy(config, data)
    generator = torch.Generator().manual_seed(config.seed)
    apply_pixel_ops = select_interpreter(config.augment_backend)
    columns = [images_NCHW]
    for _ in range(NUM_VARIANTS):
        draws = draw_policy(policy, len(images_NCHW), generator)
        columns.append(apply_pixel_ops(policy, images_NCHW, draws))
    return torch.stack(columns, dim=1).permute(0, 1, 3, 4, 2).contiguous()
