"""The training loop of the source systems, as a baseline for the benchmarks.

It is what a user would write: a Dataset with albumentations image by image, a DataLoader, fp32,
NCHW, nn.Dropout.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tune_cifar.augment.policies import mean_color
from tune_cifar.data.load import Split
from tune_cifar.dataset import CIFAR10
from tune_cifar.models.build import build_model
from tune_cifar.models.dropout import Dropout, ReluDropout, ScaledBatchNorm2d
from tune_cifar.schema import TrainConfig


def compose(config: TrainConfig | None) -> Any:
    """Build a config's augmentation as an albumentations pipeline for uint8 HWC images.

    Without a config it only normalizes.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)
    ops: list[Any] = []
    if config is not None:
        border = {"border_mode": cv2.BORDER_REFLECT_101}
        if config.crop_pad:
            side = 32 + 2 * config.crop_pad
            ops += [A.PadIfNeeded(side, side, **border), A.RandomCrop(32, 32)]
        if config.hflip_p:
            ops.append(A.HorizontalFlip(p=config.hflip_p))
        if config.shift_scale_rotate_p:
            s, t, r = config.scale_limit, config.shift_limit, config.rotate_limit
            ranges = {"scale": (1 - s, 1 + s), "translate_percent": (-t, t), "rotate": (-r, r)}
            ops.append(A.Affine(**ranges, keep_ratio=True, **border, p=config.shift_scale_rotate_p))
        if config.cutout_p:
            size = (config.cutout_size, config.cutout_size)
            hole = {"num_holes_range": (1, 1), "hole_height_range": size, "hole_width_range": size}
            ops.append(A.CoarseDropout(**hole, fill=mean_color(CIFAR10), p=config.cutout_p))
        if config.gray_p:
            ops.append(A.ToGray(p=config.gray_p))
    return A.Compose([*ops, A.Normalize(mean=CIFAR10.mean, std=CIFAR10.std)])


class AugmentedImages:
    """A map-style dataset that augments image by image; without a config it only normalizes."""

    def __init__(self, split: Split, config: TrainConfig | None) -> None:
        self._compose = compose(config)
        self._images = split.images_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = split.labels_N.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._compose(image=self._images[index])["image"]
        return torch.from_numpy(image).permute(2, 0, 1), self._labels[index]


def make_loader(split: Split, config: TrainConfig) -> DataLoader[tuple[Tensor, Tensor]]:
    """Make a loader of augmented and shuffled batches, which works in this process."""
    images: Any = AugmentedImages(split, config)
    return DataLoader(images, batch_size=config.batch_size, shuffle=True)


def build_source_model(config: TrainConfig) -> nn.Module:
    """Build the config's network with torch's own layers."""
    model = build_model(config)
    for name, layer in [*model.named_modules()]:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, ReluDropout):
            dropout = nn.Dropout(float(layer.drop_p))
            plain: nn.Module = nn.Sequential(nn.ReLU(inplace=True), dropout)
        elif isinstance(layer, Dropout):
            plain = (nn.Dropout2d if layer.whole_channels else nn.Dropout)(float(layer.drop_p))
        elif isinstance(layer, ScaledBatchNorm2d):
            plain = nn.BatchNorm2d(layer.num_features)
        else:
            continue
        setattr(parent, name.rpartition(".")[2], plain)
    return model


def train_batch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    smoothing: float,
) -> None:
    """Take one optimizer step, as tutorials write it."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels, label_smoothing=smoothing)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
