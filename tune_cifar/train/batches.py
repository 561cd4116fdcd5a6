"""The training images of a config, shuffled and augmented on the device, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tune_cifar.augment.batched import alternate_flips, draw_policy
from tune_cifar.augment.interpreter import select_interpreter
from tune_cifar.augment.policies import make_policy
from tune_cifar.data.load import Split
from tune_cifar.dataset import CIFAR10, DataDescription
from tune_cifar.schema import TrainConfig
from tune_cifar.train.generators import derive_seed
from tune_cifar.train.step import make_generator

# A GPU augments so many images at a time, at most: 60 launches a block instead of a batch.
BLOCK_SIZE = 8192


def fit_to_side(num_images: int, side: int) -> int:
    """Return how many images have as many pixels as so many of CIFAR-10's, but not more images."""
    return max(1, min(num_images, num_images * CIFAR10.side**2 // side**2))


def choose_block_size(batch_size: int, side: int, on_cuda: bool) -> int:
    """Return how many images are augmented at a time: whole batches, on a CPU one."""
    if not on_cuda:
        return batch_size
    return max(1, fit_to_side(BLOCK_SIZE, side) // batch_size) * batch_size


class Batches:
    """Draws orders of the training images and augments them.

    Args:
        config: the recipe.
        split: the training images, on the device.

    Attributes:
        generators: the random generators by purpose: of the order, on the CPU, so that a GPU
            training sees the same batches; and of the augmentation, on the device.
    """

    def __init__(self, config: TrainConfig, split: Split, data: DataDescription = CIFAR10) -> None:
        self._config = config
        self._split = split
        self._policy = make_policy(config, data)
        self._apply_pixel_ops = select_interpreter(config.augment_backend)
        self._device = split.images_NCHW.device
        on_cuda = self._device.type == "cuda"
        self._block_size = choose_block_size(config.batch_size, data.side, on_cuda)
        places = {"order": torch.device("cpu"), "augment": self._device}
        self.generators = {
            purpose: make_generator(config.seed, purpose, place)
            for purpose, place in places.items()
        }
        self._flip_phases_N = self._draw_flip_phases()

    def draw_order(self) -> Tensor:
        """Draw an order of all images: int64 (N,) on the device."""
        order = torch.randperm(len(self._split), generator=self.generators["order"])
        return order.to(self._device)

    def make_batches(self, order_N: Tensor, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield augmented images, uint8 (batch, 3, H, W), and their labels, in this order.

        Random numbers are drawn batch by batch on a CPU, block by block on a GPU.

        Args:
            epoch: from 0; decides which images are flipped if that alternates.
        """
        flipped_N = self.choose_flips(epoch)
        for indices in torch.split(order_N, self._block_size):
            flips = None if flipped_N is None else flipped_N[indices]
            images_NCHW = self._split.images_NCHW.index_select(0, indices)
            draws = draw_policy(self._policy, len(indices), self.generators["augment"], flips)
            images_NCHW = self._apply_pixel_ops(self._policy, images_NCHW, draws)
            block = (images_NCHW, self._split.labels_N[indices])
            parts = (torch.split(whole, self._config.batch_size) for whole in block)
            yield from zip(*parts, strict=True)

    def choose_flips(self, epoch: int) -> Tensor | None:
        """Return which images are flipped in an epoch, bool (N,); None if that is drawn."""
        if self._flip_phases_N is None:
            return None
        flipped_N = alternate_flips(self._flip_phases_N, self._config.hflip_p, epoch)
        return flipped_N.to(self._device)

    def _draw_flip_phases(self) -> Tensor | None:
        if self._config.hflip_mode == "random" or not self._config.hflip_p:
            return None
        generator = torch.Generator().manual_seed(derive_seed(self._config.seed, "flip"))
        return torch.rand(len(self._split), generator=generator, dtype=torch.float64)
