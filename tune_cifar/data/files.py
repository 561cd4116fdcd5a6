"""Find, fetch and verify CIFAR-10's files, and read one as arrays.

The files are pickles of 2009, so they are trusted twice over before they become tensors: size and full MD5 must be the
published ones, and the unpickler can build numpy arrays and nothing else."""

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

from tune_cifar.errors import DataError
from tune_cifar.schema import NUM_CLASSES, nearest_name

Bytes: TypeAlias = npt.NDArray[np.uint8]
Ints: TypeAlias = npt.NDArray[np.int64]
IMAGE_SHAPE = (3, 32, 32)
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
IMAGES_PER_FILE = 10_000
# A server that stays silent for so long, in seconds, counts as unreachable.
FETCH_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True)
class DataSource:
    """Where images come from. Made by `find_data` and `fetch_data`."""

    name: Literal["cifar10", "shapes"]
    folder: Path | None
    """Absolute folder that holds cifar-10-batches-py; None for shapes."""

    def __post_init__(self) -> None:
        if (self.name == "shapes") != (self.folder is None):
            raise DataError(
                f"data: a folder must be given exactly for cifar10, got {self.folder} for {self.name}."
            )


@dataclass(frozen=True)
class FileCheck:
    """What became of proving one of CIFAR-10's files."""

    name: str
    expected_md5: str
    found_md5: str | None
    """None when the file is missing, unreadable or of the wrong size."""
    num_bytes: int | None
    problem: str | None
    """The broken rule and what was found, as the middle of a sentence; None for a genuine file."""


def find_data(option: str | None) -> DataSource:
    """Where the data lies: option, else TUNE_CIFAR_DATA, else ./data, else the user's cache. Opens nothing.

    Args:
        option: a folder that holds cifar-10-batches-py, that folder itself, or "shapes" for the generated stand-in.
            TUNE_CIFAR_DATA takes the same. A folder given in either way that lacks the data is an error: the next
            place is not tried.

    Raises:
        DataError: no data there (or anywhere), or one of the five training files is missing.
    """
    if option is not None:
        return _find_data_at(option, "--data")
    if from_environment := os.environ.get("TUNE_CIFAR_DATA"):
        return _find_data_at(from_environment, "TUNE_CIFAR_DATA")
    places = (Path("data").absolute(), user_cache_path("tune_cifar"))
    for folder in places:
        if not _find_folder_problem(folder / BATCHES_FOLDER):
            return _check_train_files_exist(folder)
    raise DataError(
        f"data: {BATCHES_FOLDER} must be in {places[0]} or {places[1]}, found in neither. "
        "Run `python -m tune_cifar data fetch`, name its folder with --data or TUNE_CIFAR_DATA, or use --data shapes."
    )


def _find_data_at(option: str, where: str) -> DataSource:
    if option == "shapes":
        return DataSource("shapes", None)
    given = _expand(Path(option))
    folder = _get_outer_folder(given)
    found = _find_folder_problem(given) or _find_folder_problem(folder / BATCHES_FOLDER, "has none")
    if found or not option:
        raise DataError(
            f"{where}: a folder with {BATCHES_FOLDER} in it must be given, got {option!r}, which "
            f"{found or 'is no folder'}.{nearest_name(option, ['shapes'])} {_describe_mending(folder)}"
        )
    return _check_train_files_exist(folder)


def _expand(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:  # ~ of a user who is not there: a folder of that name, then
        return path.absolute()


def _find_folder_problem(path: Path, absent: str = "is no folder") -> str:
    """Why no folder can be read there, as the end of a sentence; empty for a folder."""
    try:
        return "" if stat.S_ISDIR(path.stat().st_mode) else absent
    except (FileNotFoundError, NotADirectoryError):
        return absent
    except OSError as exc:  # no right to look; a name too long
        return f"cannot be read ({exc.strerror})"


def _get_outer_folder(folder: Path) -> Path:
    """The folder that holds cifar-10-batches-py, whichever of the two was given."""
    is_inner = folder.name == BATCHES_FOLDER and bool(_find_folder_problem(folder / BATCHES_FOLDER))
    return folder.parent if is_inner else folder


def _check_train_files_exist(folder: Path) -> DataSource:
    for name in TRAIN_FILES:
        path = folder / BATCHES_FOLDER / name
        try:
            is_there = stat.S_ISREG(path.stat().st_mode)
        except FileNotFoundError:
            is_there = False
        except OSError as exc:
            problem = f"the file must be readable, found: {exc.strerror}"
            raise DataError(f"{path}: {problem}. {_describe_mending(folder)}") from exc
        if not is_there:
            raise DataError(f"{path}: the file must exist, found none. {_describe_mending(folder)}")
    return DataSource("cifar10", folder)


def _describe_mending(folder: Path) -> str:
    return (
        f"Run `python -m tune_cifar data fetch {shlex.quote(str(folder))}`, or use --data shapes."
    )


def fetch_data(folder: Path | None = None) -> DataSource:
    """Download CIFAR-10 with torchvision (163 MiB, progress on stderr), unless genuine files are there already.

    Args:
        folder: what will hold cifar-10-batches-py; None is TUNE_CIFAR_DATA, else the user's cache. An archive
            cifar-10-python.tar.gz that lies there already is unpacked without any network, and kept.

    Raises:
        DataError: the server cannot be reached, sends something else, or the folder cannot be written.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_and_extract_archive

    folder = _get_outer_folder(_expand(folder or _get_fetch_folder()))
    source = DataSource("cifar10", folder)
    if all(check.problem is None for check in verify_data(source)):
        return source
    archive, url, md5 = folder / CIFAR10.filename, CIFAR10.url, CIFAR10.tgz_md5
    by_hand = f"Put {archive.name} (MD5 {md5}) into {folder} by hand and run this again, or use --data shapes."
    had_archive, old_timeout = archive.exists(), socket.getdefaulttimeout()
    socket.setdefaulttimeout(FETCH_TIMEOUT_SECONDS)
    try:
        download_and_extract_archive(url, str(folder), filename=archive.name, md5=md5)
    except (URLError, TimeoutError, ConnectionError, HTTPException) as exc:
        reason = getattr(exc, "reason", None) or exc
        raise DataError(f"data fetch: {url} must be reachable, got: {reason}. {by_hand}") from exc
    except RuntimeError as exc:  # torchvision's word for a wrong MD5
        raise DataError(
            f"data fetch: {url} must send the archive, got something else or a part. {by_hand}"
        ) from exc
    except OSError as exc:
        raise DataError(
            f"data fetch: {folder} must be writable and have 350 MiB to spare, got: {exc}."
        ) from exc
    finally:
        socket.setdefaulttimeout(old_timeout)
        if not had_archive and archive.is_file():
            archive.unlink()
    for check in verify_data(source):
        _raise_problem(check, folder)
    return source


def _get_fetch_folder() -> Path:
    from_environment = os.environ.get("TUNE_CIFAR_DATA", "")
    return (
        user_cache_path("tune_cifar")
        if from_environment in ("", "shapes")
        else Path(from_environment)
    )


def verify_data(source: DataSource) -> list[FileCheck]:
    """Prove all seven files, the test file included (hashed, not decoded); shapes has no files: an empty list."""
    if source.folder is None:
        return []
    return [_read_checked(source.folder, name)[0] for name in FILES]


def _read_checked(folder: Path, name: str) -> tuple[FileCheck, bytes]:
    """Whether one file is the published one, and its bytes: the very bytes that were hashed, not a second reading."""
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
    except FileNotFoundError:
        problem = "the file must exist, found none"
    except OSError as exc:
        problem = f"the file must be readable, found: {exc.strerror}"
    return FileCheck(name, expected_md5, md5, num_bytes, problem), content


def _raise_problem(check: FileCheck, folder: Path) -> None:
    if check.problem is not None:
        path = folder / BATCHES_FOLDER / check.name
        raise DataError(f"{path}: {check.problem}. {_describe_mending(folder)}")


# All that a batch's pickle may name. numpy has renamed its private module since 2009, so the maker of arrays is taken
# from an array of today.
_make_array = np.empty(0).__reduce__()[0]
_ALLOWED_NAMES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _make_array,
    ("numpy._core.multiarray", "_reconstruct"): _make_array,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays, numbers, bytes, lists and dicts; any other name in a pickle is refused, not looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _ALLOWED_NAMES[module, name]


def read_batch(content: bytes, path: Path) -> tuple[Bytes, Ints]:
    """Images (10000, 3, 32, 32) and labels (10000,) of one file's bytes.

    Args:
        path: named in errors, not opened.

    Raises:
        DataError: the pickle asks for anything but arrays, is broken, or holds something else than a batch.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images, labels = batch[b"data"], np.array(batch[b"labels"], dtype=np.int64)
    except pickle.UnpicklingError as exc:
        raise DataError(
            f"{path}: the pickle must hold arrays and nothing else, found: {exc}."
        ) from exc
    except Exception as exc:  # a broken pickle may raise anything
        raise DataError(
            f"{path}: the file must be a CIFAR-10 batch, got {type(exc).__name__}: {exc}."
        ) from exc
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.size != IMAGES_PER_FILE * np.prod(IMAGE_SHAPE)
        or labels.shape != (IMAGES_PER_FILE,)
        or not 0 <= labels.min() <= labels.max() < NUM_CLASSES
    ):
        raise DataError(
            f"{path}: the file must hold {IMAGES_PER_FILE:,} images labelled 0-9, found something else."
        )
    return images.reshape(IMAGES_PER_FILE, *IMAGE_SHAPE), labels


def load_batch(folder: Path, name: str) -> tuple[Bytes, Ints]:
    check, content = _read_checked(folder, name)
    _raise_problem(check, folder)
    return read_batch(content, folder / BATCHES_FOLDER / name)
