"""Import a data set of one's own: square RGB images of one size, in a training and a test part.

Every image of a source (`sources`) is checked and brought to one size; then both parts, class
names, statistics and digests are written as a folder that `imported` reads.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tune_cifar.data.imported import (
    DESCRIPTION_FILE,
    NAME_PATTERN,
    PART_FILES,
    TAKEN_NAMES,
    Digests,
    Images,
    ImportedData,
    Labels,
    Part,
    find_home,
)
from tune_cifar.data.load import SPLIT_SEED, order_split
from tune_cifar.data.sources import MAX_CLASSES, Source, open_source
from tune_cifar.dataset import DataDescription
from tune_cifar.errors import DataError

# Of each class one image in this many becomes a test image, where no test images are given.
TEST_FRACTION = 6
# Larger ones are for other tools: all images of a data set lie in memory, and networks for images
# of CIFAR's size see all of it at once.
MAX_SIDE = 256
Channels = tuple[float, float, float]
Progress = Callable[[int, int], None]
"""Called with the number of images that are done and of all."""


@dataclass(frozen=True)
class Imported:
    """The result of an import, with what a user should know of it."""

    folder: Path
    data: ImportedData
    notes: tuple[str, ...]


def import_data(
    source: Path,
    name: str,
    size: int | None = None,
    test: Path | None = None,
    home: Path | None = None,
    on_progress: Progress = lambda done, total: None,
) -> Imported:
    """Import a data set; it can then be named as `data`.

    Args:
        source: a folder of class folders with PNG, JPEG or WebP files; an .npz with `images` (uint8
            N H W C, N C H W or N H W) and `labels`, maybe `class_names`; or a .parquet with a
            column of image files (bytes) and one of labels, as Hugging Face writes it.
        name: of the data set.
        size: side to which the images' middle square is resized; None takes them as they are.
        test: a source of test images; without it a sixth of each class becomes test images.
        home: folder in which the data set's folder is made; None is `find_home()`, where it is
            found by its name.

    Raises:
        DataError: one sentence on the first image, label or name that breaks a rule.
    """
    target = (home or find_home()) / name
    _check_new(name, target)
    if size is not None and not 1 <= size <= MAX_SIDE:
        raise DataError(f"`size` must be 1 to {MAX_SIDE}, got {size}.")
    opened = open_source(source)
    tested = open_source(test, opened.class_names) if test is not None else None
    _check_classes(opened, least=3 if tested is None else 2)
    total = len(opened.labels) + (len(tested.labels) if tested else 0)
    images = decode_all(opened, size, lambda done: on_progress(done, total))
    labels = np.array(opened.labels, dtype=np.int64)
    parts: dict[Part, tuple[Images, Labels]] = {}
    if tested is None:
        train_rows, test_rows = split_test(labels, len(opened.class_names))
        parts["train"] = (images[train_rows], labels[train_rows])
        parts["test"] = (images[test_rows], labels[test_rows])
    else:
        before = len(labels)
        others = decode_all(
            tested, size, lambda done: on_progress(before + done, total), side=images.shape[-1]
        )
        parts["train"] = (images, labels)
        parts["test"] = (others, np.array(tested.labels, dtype=np.int64))
    origin = f"{opened.kind} {source.name}" + (f", test {test.name}" if test else "")
    origin = origin.encode(errors="replace").decode()  # a file's name may be no UTF-8
    data = _write(target, name, opened.class_names, origin, parts)
    return Imported(target, data, tuple(_list_notes(data)))


def _check_new(name: str, target: Path) -> None:
    if not re.fullmatch(NAME_PATTERN, name) or name in TAKEN_NAMES:
        taken = ", ".join(TAKEN_NAMES)
        rule = "`name` must be letters, digits, dots, dashes and underscores, at most 64, and none"
        raise DataError(f"{rule} of {taken}; got {name!r}.")
    if target.exists():
        raise DataError(f"{target} exists already. Delete it, or take another `name`.")


def _check_classes(source: Source, least: int) -> None:
    """Refuse class names that are not UTF-8 or differ by case only, and too small classes."""
    names = source.class_names
    if not 2 <= len(names) <= MAX_CLASSES:
        raise DataError(f"{source.path}: 2 to {MAX_CLASSES} classes must hold, got {len(names)}.")
    seen: dict[str, str] = {}
    for name in names:
        if name.encode(errors="replace").decode() != name:
            raise DataError(f"{source.path}: class names must be UTF-8, got {name!r}. Rename it.")
        if (other := seen.setdefault(name.casefold(), name)) != name:
            rule = "class names must differ by more than case"
            raise DataError(f"{source.path}: {rule}, got {other!r} and {name!r}.")
    counts = Counter(source.labels)
    for label, name in enumerate(names):
        if counts[label] < least:
            parts = "training, validation and test" if least == 3 else "training and validation"
            rule = f"a class must have at least {least} images ({parts})"
            raise DataError(f"{source.path}: {rule}, got {counts[label]} of {name!r}.")


def decode_all(
    source: Source,
    size: int | None,
    on_image: Callable[[int], None],
    side: int | None = None,
) -> Images:
    """Decode all images of a source to (N, 3, side, side).

    Args:
        size: side to which they are brought; None takes them as they are.
        on_image: called with the number of images that are done.
        side: that all must have without `size`; None takes that of the first image.
    """
    images: Images | None = None
    for index in range(len(source.labels)):
        pixels, where = source.decode(index)
        height, width = pixels.shape[:2]
        if size is None:
            _check_square(where, height, width)
        side = size or side or height
        if size is None and height != side:
            rule = f"all images must have one size ({side}x{side}) without `size`"
            raise DataError(f"{where}: {rule}, got {width}x{height}. Give `size`.")
        if images is None:
            images = np.empty((len(source.labels), 3, side, side), dtype=np.uint8)
        images[index] = resize(pixels, side).transpose(2, 0, 1)
        on_image(index + 1)
    assert images is not None, "a source has images"
    return images


def _check_square(where: str, height: int, width: int) -> None:
    if height != width or height > MAX_SIDE:
        rule = f"an image must be a square of at most {MAX_SIDE} pixels without `size`"
        raise DataError(f"{where}: {rule}, got {width}x{height}. Give `size`, such as 32.")


def resize(pixels: Images, side: int) -> Images:
    """Return the middle square of an image (H, W, 3) as (side, side, 3)."""
    height, width = pixels.shape[:2]
    if height == width == side:
        return pixels
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    middle = Image.fromarray(pixels[top : top + square, left : left + square])
    resized: Images = np.asarray(middle.resize((side, side), Image.Resampling.LANCZOS))
    return resized


# Parts, statistics, files.


def split_test(labels: Labels, num_classes: int) -> tuple[Labels, Labels]:
    """Return the rows that train (and validate), and those that test: of each class a sixth."""
    generator = np.random.RandomState(SPLIT_SEED)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(num_classes):
        rows = generator.permutation(np.flatnonzero(labels == label))
        is_test[rows[: max(1, round(len(rows) / TEST_FRACTION))]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def measure_pixels(images: Images) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of each channel, scaled to [0, 1], to six digits."""
    # Exact sums of integers; 2^63 is never reached.
    counts = np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(3)])
    values, total = np.arange(256), counts[0].sum()
    means = (counts * values).sum(1) / total
    squares = (counts * values**2).sum(1) / total
    return _scale(means), _scale(np.sqrt(np.maximum(squares - means**2, 0.0)))


def _scale(values: NDArray[np.float64]) -> Channels:
    red, green, blue = (round(float(value) / 255, 6) for value in values)
    return red, green, blue


def _write(
    target: Path,
    name: str,
    class_names: tuple[str, ...],
    origin: str,
    parts: dict[Part, tuple[Images, Labels]],
) -> ImportedData:
    """Write the data set's folder as a whole or not at all."""
    from safetensors.numpy import save

    images, labels = parts["train"]
    _, num_train = order_split(labels, len(class_names))
    means, stds = measure_pixels(images)
    if min(stds) == 0:
        raise DataError(f"{target.name}: the images of a data set must differ, got equal pixels.")
    num_bytes = sum(part.nbytes for part, _ in parts.values())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < 1.1 * num_bytes:
            rule = f"{num_bytes / 1e6:,.0f} MB must be free"
            raise DataError(f"{target.parent}: {rule}, got {free / 1e6:,.0f} MB. Make room.")
        with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as new:
            folder = Path(new) / name
            folder.mkdir()
            sha256: dict[str, str] = {}
            for part, (pixels, numbers) in parts.items():
                content = save({"images": pixels, "labels": numbers})
                sha256[part] = hashlib.sha256(content).hexdigest()
                (folder / PART_FILES[part]).write_bytes(content)
            data = ImportedData(
                description=DataDescription(
                    name=name,
                    class_names=class_names,
                    side=images.shape[-1],
                    num_train=num_train,
                    num_val=len(labels) - num_train,
                    num_test=len(parts["test"][1]),
                    mean=means,
                    std=stds,
                ),
                sha256=Digests(**sha256),
                imported_from=origin,
                num_duplicates=count_duplicates(images, parts["test"][0]),
                created=datetime.now(UTC).date().isoformat(),
            )
            text = data.model_dump_json(indent=2) + "\n"
            (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")
            folder.rename(target)
    except OSError as exc:
        raise DataError(f"{target}: the data set cannot be written: {exc.strerror}.") from exc
    return data


def count_duplicates(train: Images, test: Images) -> int:
    """Return the number of test images that are equal to a training image, pixel by pixel."""
    known = {_digest(image) for image in train}
    return sum(_digest(image) in known for image in test)


def _digest(image: Images) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def _list_notes(data: ImportedData) -> Iterator[str]:
    """Yield what a user should know of an imported data set, a sentence each."""
    about = data.description
    if data.num_duplicates:
        yield (
            f"{data.num_duplicates} of {about.num_test} test images are equal to a training image: "
            "accuracy on them says nothing about new images."
        )
    if about.num_val < 20 * about.num_classes:
        sd = (0.25 / about.num_val) ** 0.5
        yield (
            f"{about.num_val} validation images measure an accuracy to about "
            f"{100 * sd:.2g} points: small differences between trials are chance."
        )
