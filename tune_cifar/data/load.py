"""CIFAR-10 or synthetic data as uint8 tensors: training, validation and test images.

Training never touches the test file: `load_train_val` works with `test_batch` removed, and only
`load_test` opens it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tune_cifar.data.files import (
    FILES,
    IMAGE_SHAPE,
    IMAGES_PER_FILE,
    TEST_FILE,
    TRAIN_FILES,
    DataSource,
    Ints,
    load_batch,
)
from tune_cifar.data.shapes import (
    SHAPE_NAMES,
    SHAPES_DIGEST,
    make_shapes_labels,
    make_shapes_order,
    make_shapes_test,
    make_shapes_train_val,
)
from tune_cifar.errors import DataError
from tune_cifar.schema import NUM_CLASSES, NUM_TRAIN_IMAGES, NUM_VAL_IMAGES, DataInfo

if TYPE_CHECKING:  # importing torch takes a second
    from torch import Tensor

CLASS_NAMES = {
    "cifar10": (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    "shapes": SHAPE_NAMES,
}

NUM_SPLIT_TRAIN_IMAGES = NUM_TRAIN_IMAGES - NUM_VAL_IMAGES

# Decides which 5,000 images validate; not an option. (The date of CIFAR-10's technical report.)
SPLIT_SEED = 20_090_408
# Names the published training files in records.
_MD5S = "".join(FILES[name][0] for name in TRAIN_FILES)
CIFAR10_DIGEST = hashlib.sha256(_MD5S.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels in one fixed order. A view of data that are shared: never write into it."""

    images_NCHW: Tensor
    """uint8 in [0, 255]."""
    labels_N: Tensor
    """int64 in [0, 10)."""

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True, eq=False)
class TrainVal:
    """The training and validation images of a training."""

    info: DataInfo
    train: Split
    val: Split | None
    """None when val_size is 0."""


def load_train_val(source: DataSource, train_size: int, val_size: int) -> TrainVal:
    """Load training and validation images: stratified prefixes of a split that never changes.

    Does not open test_batch. The first call of a process reads and verifies CIFAR-10's five
    training files (0.5 to 0.95 s on one core of a build machine, n = 6, November 2026); later calls
    take slices of the same memory.

    Args:
        train_size: 10 to 45,000, or 50,000 for all images (the training images, then the validation
            images).
        val_size: 0 to 5,000; 0 when train_size is 50,000.

    Raises:
        DataError: a size is out of range, or a file is missing, unreadable or not as published.
    """
    import torch

    is_full = train_size == NUM_TRAIN_IMAGES
    if not (is_full or NUM_CLASSES <= train_size <= NUM_SPLIT_TRAIN_IMAGES):
        raise DataError(f"data: train_size in 10-45,000 or 50,000 must hold, got {train_size:,}.")
    if not 0 <= val_size <= (0 if is_full else NUM_VAL_IMAGES):
        rule = "val_size in 0-5,000, and 0 with train_size 50,000, must hold"
        raise DataError(f"data: {rule}, got {val_size:,} with {train_size:,}.")
    if source.folder is None:
        images_NCHW = torch.from_numpy(make_shapes_train_val(train_size, val_size))
        labels_N = torch.from_numpy(make_shapes_labels(NUM_TRAIN_IMAGES))
        split_hash = hash_split(make_shapes_order())
        info = DataInfo(name="shapes", digest=SHAPES_DIGEST, split_hash=split_hash)
    else:
        images_NCHW, labels_N, info = _load_cifar10(source.folder)
    rows = slice(NUM_SPLIT_TRAIN_IMAGES, NUM_SPLIT_TRAIN_IMAGES + val_size)
    val = Split(images_NCHW[rows], labels_N[rows]) if val_size else None
    return TrainVal(info, Split(images_NCHW[:train_size], labels_N[:train_size]), val)


def load_test(source: DataSource) -> Split:
    """Load the 10,000 test images, for the final evaluation.

    Opens test_batch and no other file. The result is not cached.

    Raises:
        DataError: the file is missing, unreadable or not the published one.
    """
    import torch

    if source.folder is not None:
        images_NCHW, labels_N = load_batch(source.folder, TEST_FILE)
    else:
        images_NCHW = make_shapes_test()
        labels_N = make_shapes_labels(len(images_NCHW))
    return Split(torch.from_numpy(images_NCHW), torch.from_numpy(labels_N))


def make_split_order(labels_N: Ints) -> Ints:
    """Return the order in which the 50,000 training images are kept: 45,000 train, 5,000 validate.

    Each class is shuffled on its own; its first 500 images validate. Both parts take the classes in
    turn, 0 to 9, so that every prefix is stratified. The shuffle is that of numpy's legacy
    RandomState, whose random numbers numpy has frozen.

    Raises:
        DataError: the labels are not 5,000 of each class.
    """
    counts = np.bincount(labels_N, minlength=NUM_CLASSES).tolist()
    num_wanted, num_val = NUM_TRAIN_IMAGES // NUM_CLASSES, NUM_VAL_IMAGES // NUM_CLASSES
    if counts != [num_wanted] * NUM_CLASSES:
        rule = f"the training files must have {num_wanted:,} images of each class"
        raise DataError(f"data: {rule}, got {counts}.")
    generator = np.random.RandomState(SPLIT_SEED)
    rows_of_classes = [np.flatnonzero(labels_N == label) for label in range(NUM_CLASSES)]
    shuffled_KN = np.stack([generator.permutation(rows) for rows in rows_of_classes])
    val_KN, train_KN = shuffled_KN[:, :num_val], shuffled_KN[:, num_val:]
    order_N = np.concatenate([train_KN.T.reshape(-1), val_KN.T.reshape(-1)])
    # Every image exactly once: none both trains and validates.
    assert np.array_equal(np.sort(order_N), np.arange(NUM_TRAIN_IMAGES))
    return order_N


def hash_split(order_N: Ints) -> str:
    """Return a split's name: 16 hexadecimal digits of the SHA-256 of its little-endian int64s."""
    return hashlib.sha256(order_N.astype("<i8").tobytes()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _load_cifar10(folder: Path) -> tuple[Tensor, Tensor, DataInfo]:
    """Load all 50,000 training images in split order, once for all trainings of a process."""
    import torch

    images_NCHW = np.empty((NUM_TRAIN_IMAGES, *IMAGE_SHAPE), dtype=np.uint8)
    labels_N = np.empty(NUM_TRAIN_IMAGES, dtype=np.int64)
    for number, name in enumerate(TRAIN_FILES):
        rows = slice(number * IMAGES_PER_FILE, (number + 1) * IMAGES_PER_FILE)
        images_NCHW[rows], labels_N[rows] = load_batch(folder, name)
    order_N = make_split_order(labels_N)
    for channel in range(IMAGE_SHAPE[0]):  # reordered in place, by thirds: no second copy of 150 MB
        images_NCHW[:, channel] = images_NCHW[order_N, channel]
    info = DataInfo(name="cifar10", digest=CIFAR10_DIGEST, split_hash=hash_split(order_N))
    return torch.from_numpy(images_NCHW), torch.from_numpy(labels_N[order_N]), info
