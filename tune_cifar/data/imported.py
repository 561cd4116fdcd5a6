"""Imported data sets: a folder with dataset.json, train.safetensors and test.safetensors.

The test images have a file of their own, so that training works without it, as with CIFAR-10's.
Every file is compared with its SHA-256 in dataset.json before it is decoded; nothing is unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from platformdirs import user_data_path
from pydantic import Field, ValidationError

from tune_cifar.dataset import DataDescription
from tune_cifar.errors import DataError, describe_validation_error
from tune_cifar.schema import Frozen

DESCRIPTION_FILE = "dataset.json"
PART_FILES = {"train": "train.safetensors", "test": "test.safetensors"}
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# Words of `find_data` that no imported data set may have as its name.
TAKEN_NAMES = ("cifar10", "cifar100", "shapes")
Part = Literal["train", "test"]
Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Digests(Frozen):
    """SHA-256 of each part's file."""

    train: Sha256
    test: Sha256


class ImportedData(Frozen):
    """The contents of dataset.json.

    Attributes:
        imported_from: the source's name and kind, without its folder.
        num_duplicates: test images that are equal to a training image, pixel by pixel.
        created: date of the import.
    """

    description: DataDescription
    sha256: Digests
    imported_from: str
    num_duplicates: int = Field(ge=0)
    created: str

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name the data in records: of both files."""
        both = self.sha256.train + self.sha256.test
        return hashlib.sha256(both.encode()).hexdigest()[:16]


def find_home() -> Path:
    """Return the folder of the data sets that are found by name."""
    return user_data_path("tune_cifar")


def list_imported() -> list[str]:
    """Return the names of the imported data sets; none where the folder cannot be read."""
    try:
        return sorted(path.parent.name for path in find_home().glob(f"*/{DESCRIPTION_FILE}"))
    except OSError:
        return []


def find_imported(place: str) -> Path | None:
    """Return the folder of an imported data set, given by its name or its folder; None if none."""
    if not place:
        return None
    candidates = [find_home() / place] if re.fullmatch(NAME_PATTERN, place) else []
    try:
        candidates.append(Path(place).expanduser().absolute())
        return next(path for path in candidates if (path / DESCRIPTION_FILE).is_file())
    except (StopIteration, RuntimeError, OSError, ValueError):  # ~ of an unknown user; a long name
        return None


def read_imported(folder: Path) -> ImportedData:
    """Read and check dataset.json.

    Raises:
        DataError: it cannot be read or breaks a rule.
    """
    path = folder / DESCRIPTION_FILE
    try:
        return _parse(path.read_bytes(), path)
    except OSError as exc:
        raise DataError(f"{path}: the file cannot be read: {exc.strerror}.") from exc


@functools.lru_cache(maxsize=8)
def _parse(content: bytes, path: Path) -> ImportedData:
    try:
        return ImportedData.model_validate_json(content)
    except ValidationError as exc:
        problem = describe_validation_error(exc, ImportedData)
        raise DataError(f"{path}: {problem} Import the data again.") from exc


def load_part(folder: Path, part: Part) -> tuple[Images, Labels]:
    """Read the images (N, 3, H, W) and labels (N,) of a part; the other part's file is not opened.

    Raises:
        DataError: the file is missing, altered, or does not hold what dataset.json says.
    """
    from safetensors.numpy import load

    data, path = read_imported(folder), folder / PART_FILES[part]
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise DataError(f"{path}: the file cannot be read: {exc.strerror}.") from exc
    expected: str = getattr(data.sha256, part)
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        rule = f"the file must have SHA-256 {expected[:16]}..., found {found[:16]}..."
        raise DataError(f"{path}: {rule}. Import the data again.")
    tensors = load(content)
    about = data.description
    num_images = about.num_all if part == "train" else about.num_test
    images, labels = tensors["images"], tensors["labels"]
    is_sound = (
        images.dtype == np.uint8
        and images.shape == (num_images, 3, about.side, about.side)
        and labels.dtype == np.int64
        and labels.shape == (num_images,)
        and 0 <= labels.min() <= labels.max() < about.num_classes
    )
    if not is_sound:
        rule = f"the file must hold the images and labels of {DESCRIPTION_FILE}"
        raise DataError(f"{path}: {rule}, found others. Import the data again.")
    return images.copy(), labels.copy()  # safetensors' memory cannot be written
