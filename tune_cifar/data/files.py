"""CIFAR-10's files: find, download and verify them, and read one as arrays.

The files are pickles of 2009, so they are checked twice before they become tensors: size and full
MD5 must be the published ones, and the unpickler can build numpy arrays and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shlex
import socket
import stat
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
from platformdirs import user_cache_path

from tune_cifar.errors import DataError, did_you_mean
from tune_cifar.schema import NUM_CLASSES

Bytes: TypeAlias = npt.NDArray[np.uint8]
Ints: TypeAlias = npt.NDArray[np.int64]
IMAGE_SHAPE = (3, 32, 32)
IMAGES_PER_FILE = 10_000

# torchvision's layout. MD5s as torchvision lists them; sizes measured on files with these MD5s.
BATCHES_FOLDER = "cifar-10-batches-py"
TRAIN_FILES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
TEST_FILE = "test_batch"
FILES: dict[str, tuple[str, int]] = {
    "data_batch_1": ("c99cafc152244af753f735de768cd75f", 31_035_704),
    "data_batch_2": ("d4bba439e000b95fd0a9bffe97cbabec", 31_035_320),
    "data_batch_3": ("54ebc095f3ab1f0389bbae665268c751", 31_035_999),
    "data_batch_4": ("634d18415352ddfa80567beed471001a", 31_035_696),
    "data_batch_5": ("482c414d41f54cd18b22e5b47cb7c3cb", 31_035_623),
    TEST_FILE: ("40351d587109b95175f43aff81a1287e", 31_035_526),
    "batches.meta": ("5ff9c542aee3614f3951f8cda6e48888", 158),
}

# A server that sends nothing for this long counts as unreachable.
FETCH_TIMEOUT_SECONDS = 20.0

# All names that a batch's pickle may contain. numpy has renamed its private module since 2009, so
# the function that makes arrays is taken from an array of the installed numpy.
_make_array = np.empty(0).__reduce__()[0]
_ALLOWED_NAMES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _make_array,
    ("numpy._core.multiarray", "_reconstruct"): _make_array,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


@dataclass(frozen=True)
class DataSource:
    """A data set and its folder. Made by `find_data` and `fetch_data`."""

    name: Literal["cifar10", "shapes"]
    folder: Path | None
    """Absolute folder that holds cifar-10-batches-py; None for shapes."""

    def __post_init__(self) -> None:
        if (self.name == "shapes") != (self.folder is None):
            raise DataError(
                "data: cifar10 must have a folder and shapes none, "
                f"got {self.folder} for {self.name}."
            )


@dataclass(frozen=True)
class FileCheck:
    """The result of verifying one of CIFAR-10's files."""

    name: str
    expected_md5: str
    found_md5: str | None
    """None when the file is missing, unreadable or of the wrong size."""
    num_bytes: int | None
    problem: str | None
    """What is wrong with the file, as the middle of a sentence; None for the published file."""


def find_data(data: str | None) -> DataSource:
    """Find the data: in `data`, else TUNE_CIFAR_DATA, else ./data, else the user's cache.

    No file is opened. If a folder given by `data` or TUNE_CIFAR_DATA lacks the data, no other place
    is tried.

    Args:
        data: a folder that holds cifar-10-batches-py, that folder itself, or "shapes" for synthetic
            data. TUNE_CIFAR_DATA takes the same values.

    Raises:
        DataError: there are no data, or one of the five training files is missing.
    """
    if data is not None:
        return _find_data_at(data, "`data`")
    if from_environment := os.environ.get("TUNE_CIFAR_DATA"):
        return _find_data_at(from_environment, "TUNE_CIFAR_DATA")
    places = (Path("data").absolute(), user_cache_path("tune_cifar"))
    for folder in places:
        if not _find_folder_problem(folder / BATCHES_FOLDER):
            return _check_train_files_exist(folder)
    raise DataError(
        f"data: no {BATCHES_FOLDER} in {places[0]} or {places[1]}. "
        "Run `python -m tune_cifar data fetch`, name its folder with `data` or TUNE_CIFAR_DATA, "
        "or use `data='shapes'`."
    )


def fetch_data(folder: Path | None = None) -> DataSource:
    """Download CIFAR-10 (163 MiB, progress on stderr), unless the published files are there.

    Args:
        folder: what will hold cifar-10-batches-py; None is TUNE_CIFAR_DATA, else the user's cache.
            An archive cifar-10-python.tar.gz in it is unpacked without any network, and kept.

    Raises:
        DataError: the server cannot be reached or sends something else, or the folder cannot be
            written.
    """
    folder = _get_outer_folder(_expand(folder or _get_fetch_folder()))
    source = DataSource("cifar10", folder)
    if any(check.problem for check in verify_data(source)):
        _download(folder)
        for check in verify_data(source):
            _refuse_problem(folder, check.name, check.problem)
    return source


def verify_data(source: DataSource) -> list[FileCheck]:
    """Compare size and MD5 of all seven files with the published ones.

    The test file is hashed, not decoded. Synthetic data have no files: the list is empty.
    """
    if source.folder is None:
        return []
    return [_read_checked(source.folder, name)[0] for name in FILES]


def load_batch(folder: Path, name: str) -> tuple[Bytes, Ints]:
    """Read one of the published files: images (10000, 3, 32, 32) and labels (10000,).

    Raises:
        DataError: the file is missing, unreadable or not the published one.
    """
    check, content = _read_checked(folder, name)
    _refuse_problem(folder, name, check.problem)
    return read_batch(content, folder / BATCHES_FOLDER / name)


def read_batch(content: bytes, path: Path) -> tuple[Bytes, Ints]:
    """Decode the bytes of one file: images (10000, 3, 32, 32) and labels (10000,).

    Args:
        path: named in errors, not opened.

    Raises:
        DataError: the pickle asks for anything but arrays, is broken, or is not a batch.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images, labels = batch[b"data"], np.array(batch[b"labels"], dtype=np.int64)
    except pickle.UnpicklingError as exc:
        raise DataError(f"{path}: the pickle must hold only arrays, found: {exc}.") from exc
    except Exception as exc:  # a broken pickle may raise anything
        found = f"{type(exc).__name__}: {exc}"
        raise DataError(f"{path}: the file must be a CIFAR-10 batch, got {found}.") from exc
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.size != IMAGES_PER_FILE * np.prod(IMAGE_SHAPE)
        or labels.shape != (IMAGES_PER_FILE,)
        or not 0 <= labels.min() <= labels.max() < NUM_CLASSES
    ):
        rule = f"the file must hold {IMAGES_PER_FILE:,} images labelled 0-9"
        raise DataError(f"{path}: {rule}, found something else.")
    return images.reshape(IMAGES_PER_FILE, *IMAGE_SHAPE), labels


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of numpy arrays, numbers, bytes, lists and dicts; it looks up no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _ALLOWED_NAMES[module, name]


def _find_data_at(place: str, given_by: str) -> DataSource:
    if place == "shapes":
        return DataSource("shapes", None)
    given = _expand(Path(place))
    folder = _get_outer_folder(given)
    problem = _find_folder_problem(given) if place else "is not a folder"
    problem = problem or _find_folder_problem(folder / BATCHES_FOLDER, "has none")
    if problem:
        rule = f"{given_by} must be a folder with {BATCHES_FOLDER} in it"
        hint = f"{did_you_mean(place, ['shapes'])} {_describe_remedy(folder)}"
        raise DataError(f"{rule}, got {place!r}, which {problem}.{hint}")
    return _check_train_files_exist(folder)


def _expand(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:  # ~ of an unknown user: take it for a folder's name
        return path.absolute()


def _find_folder_problem(path: Path, absent: str = "is not a folder") -> str:
    """Return why no folder can be read there, as the end of a sentence; empty for a folder."""
    try:
        return "" if stat.S_ISDIR(path.stat().st_mode) else absent
    except (FileNotFoundError, NotADirectoryError):
        return absent
    except OSError as exc:  # no permission; a name too long
        return f"cannot be read ({exc.strerror})"


def _get_outer_folder(folder: Path) -> Path:
    """Return the folder that holds cifar-10-batches-py, whichever of the two was given."""
    is_inner = folder.name == BATCHES_FOLDER and bool(_find_folder_problem(folder / BATCHES_FOLDER))
    return folder.parent if is_inner else folder


def _check_train_files_exist(folder: Path) -> DataSource:
    for name in TRAIN_FILES:
        problem = None
        try:
            if not stat.S_ISREG((folder / BATCHES_FOLDER / name).stat().st_mode):
                problem = "the file is missing"
        except OSError as exc:
            problem = _describe_os_error(exc)
        _refuse_problem(folder, name, problem)
    return DataSource("cifar10", folder)


def _describe_os_error(exc: OSError) -> str:
    if isinstance(exc, FileNotFoundError):
        return "the file is missing"
    return f"the file cannot be read: {exc.strerror}"


def _refuse_problem(folder: Path, name: str, problem: str | None) -> None:
    if problem is not None:
        path = folder / BATCHES_FOLDER / name
        raise DataError(f"{path}: {problem}. {_describe_remedy(folder)}")


def _describe_remedy(folder: Path) -> str:
    command = f"python -m tune_cifar data fetch {shlex.quote(str(folder))}"
    return f"Run `{command}`, or use `data='shapes'`."


def _get_fetch_folder() -> Path:
    from_environment = os.environ.get("TUNE_CIFAR_DATA", "")
    if from_environment in ("", "shapes"):
        return user_cache_path("tune_cifar")
    return Path(from_environment)


def _download(folder: Path) -> None:
    """Download and unpack the archive with torchvision; only an archive that was there is kept."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_and_extract_archive

    archive, url, md5 = folder / CIFAR10.filename, CIFAR10.url, CIFAR10.tgz_md5
    by_hand = (
        f"Put {archive.name} (MD5 {md5}) into {folder} by hand and run this again, "
        "or use `data='shapes'`."
    )
    had_archive, old_timeout = archive.exists(), socket.getdefaulttimeout()
    socket.setdefaulttimeout(FETCH_TIMEOUT_SECONDS)
    try:
        download_and_extract_archive(url, str(folder), filename=archive.name, md5=md5)
    except (URLError, TimeoutError, ConnectionError, HTTPException) as exc:
        reason = getattr(exc, "reason", None) or exc
        raise DataError(f"data fetch: cannot reach {url}: {reason}. {by_hand}") from exc
    except RuntimeError as exc:  # torchvision's error for a wrong MD5
        problem = f"{url} sent something else than the archive, or a part of it"
        raise DataError(f"data fetch: {problem}. {by_hand}") from exc
    except OSError as exc:
        rule = f"{folder} must be writable and have 350 MiB to spare"
        raise DataError(f"data fetch: {rule}, got: {exc}.") from exc
    finally:
        socket.setdefaulttimeout(old_timeout)
        if not had_archive and archive.is_file():
            archive.unlink()


def _read_checked(folder: Path, name: str) -> tuple[FileCheck, bytes]:
    """Compare a file with the published one; return the bytes that were hashed, read only once."""
    path, (expected_md5, expected_bytes) = folder / BATCHES_FOLDER / name, FILES[name]
    num_bytes, md5, problem, content = None, None, None, b""
    try:
        num_bytes = path.stat().st_size
        if num_bytes != expected_bytes:
            problem = f"the file must have {expected_bytes:,} bytes, found {num_bytes:,}"
        else:
            content = path.read_bytes()
            md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
            if md5 != expected_md5:
                problem = f"the file must have MD5 {expected_md5}, found {md5}"
    except OSError as exc:
        problem = _describe_os_error(exc)
    return FileCheck(name, expected_md5, md5, num_bytes, problem), content
