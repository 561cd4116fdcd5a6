"""CIFAR-10 as uint8 tensors: found, proved genuine, split once and for all; and the road to the generated stand-in.

The files are pickles of 2009, so they are trusted twice over before they become tensors: size and full MD5 must be the
published ones, and the unpickler can build numpy arrays and nothing else. Training never touches the test file:
`load_train_val` works with `test_batch` removed, and only `load_test` opens it.
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

if TYPE_CHECKING:  # looking for the data must not cost a second of importing torch
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

# Fixes for ever which 5,000 images validate: no option reaches it. (The date of CIFAR-10's technical report.)
SPLIT_SEED = 20_090_408


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels in one fixed order. A view into this process's only copy: never write into it."""

    images_NCHW: Tensor
    """uint8 in [0, 255]."""
    labels_N: Tensor
    """int64 in [0, 10)."""

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True, eq=False)
class TrainVal:
    """What a training sees."""

    info: DataInfo
    train: Split
    val: Split | None
    """None when no image is left to validate."""


def make_split_order(labels_N: Ints) -> Ints:
    """The order in which the 50,000 training images are kept: 45,000 that train, then 5,000 that validate.

    Each class is shuffled by itself; its first 500 images validate. Both parts take the classes in turn, 0 to 9, so
    that every prefix is stratified. Shuffled by numpy's legacy RandomState, the one whose draws numpy has frozen.

    Raises:
        DataError: the labels are not 5,000 of each class.
    """
    counts, num_wanted = (
        np.bincount(labels_N, minlength=NUM_CLASSES).tolist(),
        NUM_TRAIN_IMAGES // NUM_CLASSES,
    )
    if counts != [num_wanted] * NUM_CLASSES:
        raise DataError(f"data: {num_wanted:,} training images a class must hold, got {counts}.")
    dice, num_val = np.random.RandomState(SPLIT_SEED), NUM_VAL_IMAGES // NUM_CLASSES
    shuffled_KN = np.stack(
        [dice.permutation(np.flatnonzero(labels_N == label)) for label in range(NUM_CLASSES)]
    )
    order_N = np.concatenate(
        [shuffled_KN[:, num_val:].T.reshape(-1), shuffled_KN[:, :num_val].T.reshape(-1)]
    )
    # Every image exactly once: none both trains and validates.
    assert np.array_equal(np.sort(order_N), np.arange(NUM_TRAIN_IMAGES))
    return order_N


def hash_split(order_N: Ints) -> str:
    """16 hexadecimal digits that name a split: SHA-256 of its indices as little-endian 64-bit integers."""
    return hashlib.sha256(order_N.astype("<i8").tobytes()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _load_cifar10(folder: Path) -> tuple[Tensor, Tensor, DataInfo]:
    """All 50,000 training images in split order: one copy per process, of which every training sees slices."""
    import torch

    images_NCHW = np.empty((NUM_TRAIN_IMAGES, *IMAGE_SHAPE), dtype=np.uint8)
    labels_N = np.empty(NUM_TRAIN_IMAGES, dtype=np.int64)
    for number, name in enumerate(TRAIN_FILES):
        rows = slice(number * IMAGES_PER_FILE, (number + 1) * IMAGES_PER_FILE)
        images_NCHW[rows], labels_N[rows] = load_batch(folder, name)
    order_N = make_split_order(labels_N)
    for channel in range(IMAGE_SHAPE[0]):  # reordered in place, by thirds: no second copy of 150 MB
        images_NCHW[:, channel] = images_NCHW[order_N, channel]
    digest = hashlib.sha256("".join(FILES[name][0] for name in TRAIN_FILES).encode()).hexdigest()[
        :16
    ]
    info = DataInfo(name="cifar10", digest=digest, split_hash=hash_split(order_N))
    return torch.from_numpy(images_NCHW), torch.from_numpy(labels_N[order_N]), info


def load_train_val(source: DataSource, train_size: int, val_size: int) -> TrainVal:
    """Training and validation images: stratified prefixes of a split that never changes. Does not open test_batch.

    The first call of a process reads and proves CIFAR-10's five training files (0.5 to 0.95 s on one core of a build
    machine, n = 6, November 2026); later ones take slices of the same memory.

    Args:
        train_size: 10 to 45,000, or 50,000 for all images (the training ones, then the validation ones).
        val_size: 0 to 5,000; 0 when train_size is 50,000.

    Raises:
        DataError: a size out of range, or a file missing, truncated, altered or unreadable.
    """
    import torch

    is_full = train_size == NUM_TRAIN_IMAGES
    if not (is_full or NUM_CLASSES <= train_size <= NUM_SPLIT_TRAIN_IMAGES):
        raise DataError(f"data: train_size in 10-45,000 or 50,000 must hold, got {train_size:,}.")
    if not 0 <= val_size <= (0 if is_full else NUM_VAL_IMAGES):
        raise DataError(
            f"data: val_size in 0-5,000, and 0 with train_size 50,000, must hold, got {val_size:,} with {train_size:,}."
        )
    if source.folder is None:
        images_NCHW = torch.from_numpy(make_shapes_train_val(train_size, val_size))
        labels_N = torch.from_numpy(make_shapes_labels(NUM_TRAIN_IMAGES))
        info = DataInfo(
            name="shapes", digest=SHAPES_DIGEST, split_hash=hash_split(make_shapes_order())
        )
    else:
        images_NCHW, labels_N, info = _load_cifar10(source.folder)
    rows = slice(NUM_SPLIT_TRAIN_IMAGES, NUM_SPLIT_TRAIN_IMAGES + val_size)
    val = Split(images_NCHW[rows], labels_N[rows]) if val_size else None
    return TrainVal(info, Split(images_NCHW[:train_size], labels_N[:train_size]), val)


def load_test(source: DataSource) -> Split:
    """The 10,000 test images, for one honest look at the end. Opens test_batch and no other file; not cached.

    Raises:
        DataError: the file is missing, truncated, altered or unreadable.
    """
    import torch

    if source.folder is not None:
        images_NCHW, labels_N = load_batch(source.folder, TEST_FILE)
    else:
        images_NCHW = make_shapes_test()
        labels_N = make_shapes_labels(len(images_NCHW))
    return Split(torch.from_numpy(images_NCHW), torch.from_numpy(labels_N))
