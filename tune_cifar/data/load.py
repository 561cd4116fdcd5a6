"""A data set as uint8 tensors: training, validation and test images.

Training never touches the test file: `load_train_val` works with it removed (of CIFAR-10
`test_batch`), and only `load_test` opens it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tune_cifar.data.files import (
    CIFAR100_FILES,
    FILES,
    IMAGE_SHAPE,
    TRAIN_FILES,
    Bytes,
    DataSource,
    Ints,
    describe_data,
    load_batch,
)
from tune_cifar.data.imported import load_part, read_imported
from tune_cifar.data.shapes import (
    SHAPES_DIGEST,
    make_shapes_labels,
    make_shapes_order,
    make_shapes_test,
    make_shapes_train_val,
)
from tune_cifar.dataset import CIFAR10, DataDescription
from tune_cifar.errors import DataError
from tune_cifar.schema import DataInfo

if TYPE_CHECKING:  # importing torch takes a second
    from torch import Tensor

# Of each class one image in this many validates, at least one.
VAL_FRACTION = 10
# Decides which images validate; not an option. (The date of CIFAR-10's technical report.)
SPLIT_SEED = 20_090_408
# Names the published training files in records.
_MD5S = "".join(FILES[name][0] for name in TRAIN_FILES)
CIFAR10_DIGEST = hashlib.sha256(_MD5S.encode()).hexdigest()[:16]
CIFAR100_DIGEST = hashlib.sha256(CIFAR100_FILES["train"][0].encode()).hexdigest()[:16]
_DIGESTS = {"cifar10": CIFAR10_DIGEST, "cifar100": CIFAR100_DIGEST}


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels in one fixed order. A view of data that are shared: never write into it."""

    images_NCHW: Tensor
    """uint8 in [0, 255]."""
    labels_N: Tensor
    """int64 in [0, classes)."""

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True, eq=False)
class TrainVal:
    """The training and validation images of a training."""

    info: DataInfo
    train: Split
    val: Split | None
    """None when val_size is 0."""
    about: DataDescription = CIFAR10
    """What networks, augmentation and evaluation must know of the images."""


@dataclass(frozen=True, eq=False)
class PackedData:
    """All training and validation images as arrays, to be sent to other machines."""

    images_NCHW: Bytes
    labels_N: Ints
    info: DataInfo
    about: DataDescription

    def select(self, train_size: int, val_size: int) -> TrainVal:
        """Return what `load_train_val` returns; without a copy, also of arrays that are read-only.

        Raises:
            DataError: a size is out of range.
        """
        import torch

        _check_sizes(self.about, train_size, val_size)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            images_NCHW, labels_N = map(torch.from_numpy, (self.images_NCHW, self.labels_N))
        return _take(images_NCHW, labels_N, self.info, self.about, (train_size, val_size))


def pack_data(source: DataSource) -> PackedData | None:
    """Return the training and validation images for other machines; None of shapes.

    Shapes are made where they are needed.

    Raises:
        DataError: as `load_train_val`.
    """
    if source.folder is None:
        return None
    about = describe_data(source)
    images_NCHW, labels_N, info = _load_all(source)
    return PackedData(images_NCHW.numpy(), labels_N.numpy(), info, about)


def load_train_val(source: DataSource, train_size: int, val_size: int) -> TrainVal:
    """Load training and validation images: stratified prefixes of a split that never changes.

    Does not open the test file. The first call of a process reads and verifies the training files
    (CIFAR-10's in 0.5 to 0.95 s on one core of a build machine, n = 6, November 2026); later calls
    take slices of the same memory.

    Args:
        train_size: of CIFAR-10 10 to 45,000, or 50,000 for all images (the training images, then
            the validation images).
        val_size: 0 to 5,000; 0 when train_size is 50,000.

    Raises:
        DataError: a size is out of range, or a file is missing, unreadable or not as published.
    """
    import torch

    about = describe_data(source)
    _check_sizes(about, train_size, val_size)
    if source.folder is None:
        images_NCHW = torch.from_numpy(make_shapes_train_val(train_size, val_size))
        labels_N = torch.from_numpy(make_shapes_labels(about.num_all))
        split_hash = hash_split(make_shapes_order())
        info = DataInfo(name="shapes", digest=SHAPES_DIGEST, split_hash=split_hash)
    else:
        images_NCHW, labels_N, info = _load_all(source)
    return _take(images_NCHW, labels_N, info, about, (train_size, val_size))


def _check_sizes(about: DataDescription, train_size: int, val_size: int) -> None:
    num_train, num_all, num_val = about.num_train, about.num_all, about.num_val
    is_full = train_size == num_all
    if not (is_full or about.num_classes <= train_size <= num_train):
        rule = f"train_size in {about.num_classes}-{num_train:,} or {num_all:,} must hold"
        raise DataError(f"data: {rule}, got {train_size:,}.")
    if not 0 <= val_size <= (0 if is_full else num_val):
        rule = f"val_size in 0-{num_val:,}, and 0 with train_size {num_all:,}, must hold"
        raise DataError(f"data: {rule}, got {val_size:,} with {train_size:,}.")


def _take(
    images_NCHW: Tensor,
    labels_N: Tensor,
    info: DataInfo,
    about: DataDescription,
    sizes: tuple[int, int],
) -> TrainVal:
    """Take as many training and validation images of all, which are in split order."""
    train_size, val_size = sizes
    rows = slice(about.num_train, about.num_train + val_size)
    val = Split(images_NCHW[rows], labels_N[rows]) if val_size else None
    return TrainVal(info, Split(images_NCHW[:train_size], labels_N[:train_size]), val, about)


def _load_all(source: DataSource) -> tuple[Tensor, Tensor, DataInfo]:
    """Load all training and validation images of files."""
    assert source.folder is not None, "shapes have no files"
    if source.layout is not None:
        return _load_published(source)
    return _load_imported(source.folder, read_imported(source.folder).digest)


def load_test(source: DataSource) -> Split:
    """Load the test images (of CIFAR-10 10,000), for the final evaluation.

    Opens the test file and no other with images. The result is not cached.

    Raises:
        DataError: the file is missing, unreadable or not the published one.
    """
    import torch

    if source.folder is None:
        images_NCHW = make_shapes_test()
        labels_N = make_shapes_labels(len(images_NCHW))
    elif source.layout is not None:
        images_NCHW, labels_N = load_batch(source.folder, source.layout.test_file, source.name)
    else:
        images_NCHW, labels_N = load_part(source.folder, "test")
    return Split(torch.from_numpy(images_NCHW), torch.from_numpy(labels_N))


def make_split_order(labels_N: Ints, num_classes: int = CIFAR10.num_classes) -> Ints:
    """Return the order in which a published set's 50,000 images are kept: 45,000, then 5,000.

    See `order_split`.

    Raises:
        DataError: the labels are not as many of each class.
    """
    counts = np.bincount(labels_N, minlength=num_classes).tolist()
    num_wanted = CIFAR10.num_all // num_classes
    if counts != [num_wanted] * num_classes:
        rule = f"the training files must have {num_wanted:,} images of each class"
        raise DataError(f"data: {rule}, got {counts}.")
    order_N, num_train = order_split(labels_N, num_classes)
    assert num_train == CIFAR10.num_train
    return order_N


def order_split(labels_N: Ints, num_classes: int) -> tuple[Ints, int]:
    """Return the order in which training images are kept, and how many of them train.

    Each class is shuffled on its own; its first tenth validates, at least one image. Both parts
    take the classes in turn, in proportion to their numbers (of CIFAR-10: 0 to 9), so that every
    prefix is stratified. The shuffle is that of numpy's legacy RandomState, whose random numbers
    numpy has frozen.
    """
    generator = np.random.RandomState(SPLIT_SEED)
    val_rows, train_rows = [], []
    for label in range(num_classes):
        shuffled = generator.permutation(np.flatnonzero(labels_N == label))
        num_val = max(1, round(len(shuffled) / VAL_FRACTION))
        val_rows.append(shuffled[:num_val])
        train_rows.append(shuffled[num_val:])
    train_N, val_N = interleave(train_rows), interleave(val_rows)
    order_N = np.concatenate([train_N, val_N])
    # Every image exactly once: none both trains and validates.
    assert np.array_equal(np.sort(order_N), np.arange(len(labels_N)))
    return order_N, len(train_N)


def interleave(rows_of_classes: Sequence[Ints]) -> Ints:
    """Return all rows, those of each class in their order and evenly spaced among the others."""
    places = np.concatenate([(np.arange(len(rows)) + 0.5) / len(rows) for rows in rows_of_classes])
    return np.concatenate(rows_of_classes)[np.argsort(places, kind="stable")]


def hash_split(order_N: Ints) -> str:
    """Return a split's name: 16 hexadecimal digits of the SHA-256 of its little-endian int64s."""
    return hashlib.sha256(order_N.astype("<i8").tobytes()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _load_published(source: DataSource) -> tuple[Tensor, Tensor, DataInfo]:
    """Load all 50,000 training images in split order, once for all trainings of a process."""
    import torch

    layout, folder = source.layout, source.folder
    assert layout is not None and folder is not None, "a published data set has files"
    images_NCHW = np.empty((CIFAR10.num_all, *IMAGE_SHAPE), dtype=np.uint8)
    labels_N = np.empty(CIFAR10.num_all, dtype=np.int64)
    start = 0
    for name in layout.train_files:
        rows = slice(start, start + layout.count_images(name))
        images_NCHW[rows], labels_N[rows] = load_batch(folder, name, source.name)
        start = rows.stop
    order_N = make_split_order(labels_N, layout.num_classes)
    _reorder(images_NCHW, order_N)
    info = DataInfo(
        name=source.name,
        digest=_DIGESTS[source.name],
        split_hash=hash_split(order_N),
        num_classes=layout.num_classes,
    )
    return torch.from_numpy(images_NCHW), torch.from_numpy(labels_N[order_N]), info


@lru_cache(maxsize=1)
def _load_imported(folder: Path, digest: str) -> tuple[Tensor, Tensor, DataInfo]:
    """Load all training images of an imported data set in split order, once for a process."""
    import torch

    about = read_imported(folder).description
    images_NCHW, labels_N = load_part(folder, "train")
    order_N, num_train = order_split(labels_N, about.num_classes)
    assert num_train == about.num_train, "the description was made with the same split"
    _reorder(images_NCHW, order_N)
    info = DataInfo(
        name=about.name,
        digest=digest,
        split_hash=hash_split(order_N),
        num_classes=about.num_classes,
    )
    return torch.from_numpy(images_NCHW), torch.from_numpy(labels_N[order_N]), info


def _reorder(images_NCHW: Bytes, order_N: Ints) -> None:
    """Reorder images in place, channel by channel: there is never a second copy of all."""
    for channel in range(images_NCHW.shape[1]):
        images_NCHW[:, channel] = images_NCHW[order_N, channel]
