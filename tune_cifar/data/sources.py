"""Sources of images to import: class folders, an .npz or a Parquet file, each read by its reader.

A reader gives the labels at once and decodes an image when it is asked for. Nothing is unpickled.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tune_cifar.data.imported import Images
from tune_cifar.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_CLASSES = 1000
# An image that unpacks to more pixels is taken for an attack; a photograph has 12 to 50 million.
MAX_PIXELS = 100_000_000
MAX_NPZ_BYTES = 16 * 2**30
# 8 bits a channel; PIL's names of modes.
MODES = ("RGB", "L", "1", "P", "RGBA", "LA")


@dataclass(frozen=True)
class Source:
    """A source before its images are decoded.

    Attributes:
        kind: folder, npz or Parquet, for the description.
        class_names: in the order of the labels.
        labels: of all images.
        decode: return image i, (H, W, 3) uint8, and its name for errors.
    """

    path: Path
    kind: str
    class_names: tuple[str, ...]
    labels: Sequence[int]
    decode: Callable[[int], tuple[Images, str]]


def open_source(path: Path, class_names: Sequence[str] | None = None) -> Source:
    """Return what a source holds, without decoding its images.

    Args:
        class_names: of the training images, when this is the source of test images.

    Raises:
        DataError: it is none of the three kinds, is damaged or empty, or has classes or labels
            that break a rule.
    """
    try:
        opened = _open(path)
    except DataError:
        raise
    except Exception as exc:  # the system, zip files and numpy raise many kinds
        reason = " ".join(str(exc).split())
        raise DataError(f"{path}: the source is damaged, or cannot be read: {reason}.") from exc
    if not len(opened.labels):
        raise DataError(f"{path}: the source must hold images, got none.")
    return opened if class_names is None else _match_classes(opened, class_names)


def _open(path: Path) -> Source:
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path)
    if path.suffix == ".parquet" and path.is_file():
        return _open_parquet(path)
    kinds = "a folder of class folders, an .npz or a .parquet file"
    raise DataError(f"{path}: the source must be {kinds}, got something else.")


def _match_classes(source: Source, class_names: Sequence[str]) -> Source:
    """Return a source of test images with the training images' labels."""
    unknown = [name for name in source.class_names if name not in class_names]
    if unknown:
        known = ", ".join(class_names[:10])
        rule = f"classes of test images must be those of training images ({known})"
        raise DataError(f"{source.path}: {rule}, got {unknown[0]!r}.")
    places = [class_names.index(name) for name in source.class_names]
    labels = [places[label] for label in source.labels]
    return Source(source.path, source.kind, tuple(class_names), labels, source.decode)


def _open_folder(root: Path) -> Source:
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not _is_hidden(path))
    if not classes:
        raise DataError(f"{root}: the folder must hold a folder for each class, got none.")
    resolved = root.resolve()
    files, labels = [], []
    for label, folder in enumerate(classes):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() not in SUFFIXES or _is_hidden(path):
                continue
            if not path.resolve().is_relative_to(resolved):
                raise DataError(f"{path}: a link must stay in {root}, got one that leaves it.")
            files.append(path)
            labels.append(label)

    def decode(index: int) -> tuple[Images, str]:
        path = files[index]
        try:
            content = path.read_bytes()
        except OSError as exc:
            raise DataError(f"{path}: the file cannot be read: {exc.strerror}.") from exc
        return decode_image(content, str(path)), str(path)

    return Source(root, "folder", tuple(path.name for path in classes), labels, decode)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _open_npz(path: Path) -> Source:
    with zipfile.ZipFile(path) as archive:
        num_bytes = sum(entry.file_size for entry in archive.infolist())
    if num_bytes > MAX_NPZ_BYTES:
        rule = f"the file must unpack to at most {MAX_NPZ_BYTES / 2**30:.0f} GiB"
        raise DataError(f"{path}: {rule}, got {num_bytes / 2**30:.1f} GiB.")
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    for name in ("images", "labels"):
        if name not in found:
            got = ", ".join(found) or "nothing"
            raise DataError(f"{path}: the file must hold `images` and `labels`, got {got}.")
    images = _to_rgb(found["images"], path)
    labels = found["labels"].reshape(-1) if found["labels"].shape == (len(images), 1) else None
    labels = found["labels"] if labels is None else labels
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        rule = f"`labels` must be whole numbers, one for each of {len(images):,} images"
        raise DataError(f"{path}: {rule}, got {labels.dtype} {labels.shape}.")
    names = [str(name) for name in found["class_names"]] if "class_names" in found else None
    checked = _check_labels([int(label) for label in labels], names, path)
    return Source(path, "npz", *checked, lambda index: (images[index], f"{path}, image {index}"))


def _to_rgb(images: Any, path: Path) -> Images:
    """Return (N, H, W, 3) uint8 of an array with the channels last, first or missing."""
    shape = images.shape
    if images.dtype != np.uint8:
        rule = "`images` must be uint8, 0 to 255"
        raise DataError(f"{path}: {rule}, got {images.dtype}.")
    if len(shape) == 3:
        images = images[..., None]
    elif len(shape) == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if len(images.shape) != 4 or images.shape[3] not in (1, 3):
        rule = "`images` must be N H W C, N C H W or N H W with 1 or 3 channels"
        raise DataError(f"{path}: {rule}, got {'x'.join(map(str, shape))}.")
    rgb: Images = np.broadcast_to(images, (*images.shape[:3], 3))
    return rgb


def _check_labels(
    labels: Sequence[int], names: Sequence[str] | None, path: Path
) -> tuple[tuple[str, ...], Sequence[int]]:
    """Return class names and labels; without names the classes are called by their numbers."""
    if names is None:
        names = [str(label) for label in range(min(max(labels, default=0), MAX_CLASSES) + 1)]
    if len(set(names)) < len(names):
        raise DataError(f"{path}: class names must differ, got {list(names)}.")
    for index, label in enumerate(labels):
        if not 0 <= label < len(names):
            rule = f"labels must be 0 to {len(names) - 1}"
            raise DataError(f"{path}: {rule}, got {label} of image {index}.")
    return tuple(names), labels


def _open_parquet(path: Path) -> Source:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as exc:
        reason = str(exc).splitlines()[0]
        raise DataError(f"{path}: the file must be Parquet, got: {reason}.") from exc
    image_column = _find_column(path, table.schema, "image", _holds_images)
    label_column = _find_column(path, table.schema, "label", _holds_labels)
    cells, labels = table.column(image_column), table.column(label_column).to_pylist()
    names = _read_class_names(table.schema, label_column)
    if all(isinstance(label, str) for label in labels):
        names = sorted(set(labels)) if names is None else names
        places = {name: place for place, name in enumerate(names)}
        labels = [places.get(label, -1) for label in labels]
    if not all(isinstance(label, int) for label in labels):
        raise DataError(f"{path}: column {label_column} must have a label in every row.")

    def decode(index: int) -> tuple[Images, str]:
        cell, where = cells[index].as_py(), f"{path}, row {index}"
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if not content:
            raise DataError(f"{where}: column {image_column} must hold an image file, got none.")
        return decode_image(content, where), where

    return Source(path, "Parquet", *_check_labels(labels, names, path), decode)


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _holds_labels(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))


def _find_column(path: Path, schema: Any, word: str, fits: Callable[[Any], bool]) -> str:
    """Return the only column of a type whose name has the word, or the only one of the type."""
    fitting = [field.name for field in schema if fits(field.type)]
    named = [name for name in fitting if word in name.lower()]
    chosen = named if named else fitting
    exact = [name for name in chosen if name.lower() == word]
    chosen = exact or chosen
    if len(chosen) != 1:
        got = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(f"{path}: one column must hold the {word}s, got {got[:300]}.")
    return str(chosen[0])


def _read_class_names(schema: Any, column: str) -> list[str] | None:
    """Return the class names that Hugging Face's metadata give of a column."""
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        names = metadata["info"]["features"][column]["names"]
        return [str(name) for name in names]
    except (KeyError, TypeError, ValueError):
        return None


# Images.


def decode_image(content: bytes, where: str) -> Images:
    """Decode a PNG, JPEG or WebP file to (H, W, 3) uint8, turned as its EXIF says.

    Raises:
        DataError: the file is damaged, is no such image, is not 8-bit RGB or grey, is transparent
            or unpacks to too many pixels.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                rule = f"an image must have at most {MAX_PIXELS:,} pixels"
                raise DataError(f"{where}: {rule}, got {width}x{height}.")
            if image.mode not in MODES:
                rule = "an image must be RGB or grey with 8 bits a channel"
                raise DataError(f"{where}: {rule}, got {image.mode}.")
            image.load()
            turned = ImageOps.exif_transpose(image)
    except DataError:
        raise
    except Exception as exc:  # decoders raise many kinds
        problem = "the image is damaged, or no PNG, JPEG or WebP"
        raise DataError(f"{where}: {problem}: {exc}.") from exc
    if "A" in turned.mode or "transparency" in turned.info:
        turned = turned.convert("RGBA")
        if np.asarray(turned)[..., 3].min() < 255:
            raise DataError(f"{where}: an image must not be transparent, got a transparent one.")
    pixels: Images = np.asarray(turned.convert("RGB"))
    return pixels
