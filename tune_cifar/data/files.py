"""Find a data set; CIFAR's files: download and verify them, and read one as arrays.

CIFAR-10's and CIFAR-100's files are pickles of 2009, so they are checked twice before they become
tensors: the full MD5 (of CIFAR-10 the size, too) must be the published one, and the unpickler can
build numpy arrays and nothing else. Imported data sets: see `imported`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
import shlex
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
from platformdirs import user_cache_path

from tune_cifar.data.imported import find_imported, list_imported, read_imported
from tune_cifar.data.shapes import SHAPES
from tune_cifar.dataset import CIFAR10, DataDescription
from tune_cifar.errors import DataError, did_you_mean

Bytes: TypeAlias = npt.NDArray[np.uint8]
Ints: TypeAlias = npt.NDArray[np.int64]
IMAGE_SHAPE = (3, CIFAR10.side, CIFAR10.side)

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

CIFAR100_FILES: dict[str, tuple[str, int | None]] = {
    "train": ("16019d7e3df5f24257cddd939b257f8d", None),
    "test": ("f0ef6b0ae62326f3e7ffdfab6717acfc", None),
    "meta": ("7973b15100ade9c7d40fb424638fde48", None),
}


# Of all pixels of its 50,000 training images, as widely published; not measured here.
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class Layout(NamedTuple):
    """How torchvision lays out a published data set."""

    folder: str
    train_files: tuple[str, ...]
    test_file: str
    label_key: bytes
    num_classes: int

    def count_images(self, name: str) -> int:
        """Return the number of images in a file."""
        if name == self.test_file:
            return CIFAR10.num_test
        return CIFAR10.num_all // len(self.train_files)


LAYOUTS = {
    "cifar10": Layout(BATCHES_FOLDER, TRAIN_FILES, TEST_FILE, b"labels", CIFAR10.num_classes),
    "cifar100": Layout("cifar-100-python", ("train",), "test", b"fine_labels", 100),
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

    name: str
    """cifar10, cifar100, shapes, or the name of an imported data set."""
    folder: Path | None
    """Absolute folder: of CIFAR what holds cifar-10-batches-py or cifar-100-python, of an imported
    data set the one with its files; None for shapes."""

    def __post_init__(self) -> None:
        if (self.name == "shapes") != (self.folder is None):
            raise DataError(
                "data: shapes must have no folder and other data one, "
                f"got {self.folder} for {self.name}."
            )

    @property
    def layout(self) -> Layout | None:
        """Of a published data set; None for shapes and imported data."""
        return LAYOUTS.get(self.name)


@dataclass(frozen=True)
class FileCheck:
    """The result of verifying one of the published files."""

    name: str
    expected_md5: str
    found_md5: str | None
    """None when the file is missing, unreadable or of the wrong size."""
    num_bytes: int | None
    problem: str | None
    """What is wrong with the file, as the middle of a sentence; None for the published file."""


def find_data(data: str | None) -> DataSource:
    """Find the data: in `data`, else TUNE_CIFAR_DATA, else ./data, else the user's cache.

    No image is read. If a folder given by `data` or TUNE_CIFAR_DATA lacks the data, no other place
    is tried.

    Args:
        data: a folder that holds cifar-10-batches-py, else cifar-100-python; such a folder itself;
            "cifar10" or "cifar100" (in the same places); "shapes" for synthetic data; or an
            imported data set by its name or folder. TUNE_CIFAR_DATA takes the same values.

    Raises:
        DataError: there are no data, or one of the training files is missing.
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


def describe_data(source: DataSource) -> DataDescription:
    """Return what is known of the data before an image is read: sizes, classes, statistics.

    Raises:
        DataError: the names of CIFAR-100's classes, or the description of an imported data set,
            cannot be read.
    """
    if source.name in ("cifar10", "shapes"):
        return CIFAR10 if source.name == "cifar10" else SHAPES
    assert source.folder is not None, "only shapes have no folder"
    if source.layout is None:
        return read_imported(source.folder).description
    return CIFAR10.model_copy(
        update={
            "name": source.name,
            "class_names": _load_class_names(source.folder),
            "mean": CIFAR100_MEAN,
            "std": CIFAR100_STD,
        }
    )


def fetch_data(folder: Path | None = None, name: str = "cifar10") -> DataSource:
    """Download CIFAR-10 or CIFAR-100 (163 MiB, progress on stderr), unless the files are there.

    Args:
        folder: what will hold cifar-10-batches-py; None is TUNE_CIFAR_DATA, else the user's cache.
            An archive cifar-10-python.tar.gz in it is unpacked without any network, and kept.
        name: cifar10 or cifar100.

    Raises:
        DataError: the server cannot be reached or sends something else, or the folder cannot be
            written.
    """
    if name not in LAYOUTS:
        raise DataError(f"`name` must be {' or '.join(LAYOUTS)}, got {name!r}.")
    folder = _get_outer_folder(_expand(folder or _get_fetch_folder()), LAYOUTS[name].folder)
    source = DataSource(name, folder)
    if any(check.problem for check in verify_data(source)):
        _download(folder, name)
        for check in verify_data(source):
            _refuse_problem(folder, name, check.name, check.problem)
    return source


def verify_data(source: DataSource) -> list[FileCheck]:
    """Compare MD5 (of CIFAR-10 the size, too) of all files with the published ones.

    The test file is hashed, not decoded. Synthetic data have no files: the list is empty. Imported
    data are compared with their description whenever they are read.
    """
    if source.folder is None or source.layout is None:
        return []
    return [_read_checked(source.folder, name, source.name)[0] for name in _list_files(source.name)]


def load_batch(folder: Path, name: str, data: str = "cifar10") -> tuple[Bytes, Ints]:
    """Read a published file: images (10000, 3, 32, 32) and labels (10000,); of CIFAR-100 50000.

    Raises:
        DataError: the file is missing, unreadable or not the published one.
    """
    check, content = _read_checked(folder, name, data)
    _refuse_problem(folder, data, name, check.problem)
    layout = LAYOUTS[data]
    return read_batch(content, folder / layout.folder / name, layout)


def read_batch(
    content: bytes, path: Path, layout: Layout = LAYOUTS["cifar10"]
) -> tuple[Bytes, Ints]:
    """Decode the bytes of one file: images (10000, 3, 32, 32) and labels (10000,).

    Args:
        path: named in errors, not opened.

    Raises:
        DataError: the pickle asks for anything but arrays, is broken, or is not a batch.
    """
    batch = _unpickle(content, path)
    num_images, num_classes = layout.count_images(path.name), layout.num_classes
    try:
        images, labels = batch[b"data"], np.array(batch[layout.label_key], dtype=np.int64)
    except Exception as exc:  # anything may be in it
        found = f"{type(exc).__name__}: {exc}"
        raise DataError(f"{path}: the file must be a CIFAR-10 batch, got {found}.") from exc
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.size != num_images * np.prod(IMAGE_SHAPE)
        or labels.shape != (num_images,)
        or not 0 <= labels.min() <= labels.max() < num_classes
    ):
        rule = f"the file must hold {num_images:,} images labelled 0-{num_classes - 1}"
        raise DataError(f"{path}: {rule}, found something else.")
    return images.reshape(num_images, *IMAGE_SHAPE), labels


def _unpickle(content: bytes, path: Path) -> Any:
    """Return the arrays, numbers, bytes, lists and dicts that a pickle holds."""
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as exc:
        raise DataError(f"{path}: the pickle must hold only arrays, found: {exc}.") from exc
    except Exception as exc:  # a broken pickle may raise anything
        found = f"{type(exc).__name__}: {exc}"
        raise DataError(f"{path}: the file must be a CIFAR-10 batch, got {found}.") from exc


@functools.lru_cache(maxsize=4)
def _load_class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of CIFAR-100's fine classes, in the order of their labels."""
    check, content = _read_checked(folder, "meta", "cifar100")
    _refuse_problem(folder, "cifar100", "meta", check.problem)
    path = folder / LAYOUTS["cifar100"].folder / "meta"
    return tuple(name.decode() for name in _unpickle(content, path)[b"fine_label_names"])


def _list_files(data: str) -> Mapping[str, tuple[str, int | None]]:
    """Return MD5 and size of a published data set's files by name; None is an unknown size."""
    return FILES if data == "cifar10" else CIFAR100_FILES


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of numpy arrays, numbers, bytes, lists and dicts; it looks up no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _ALLOWED_NAMES[module, name]


def _find_data_at(place: str, given_by: str) -> DataSource:
    if place == "shapes":
        return DataSource("shapes", None)
    if place in LAYOUTS:
        return _find_published(place)
    if imported := find_imported(place):
        return DataSource(read_imported(imported).description.name, imported)
    given = _expand(Path(place))
    for name, layout in LAYOUTS.items():
        folder = _get_outer_folder(given, layout.folder)
        if place and not _find_folder_problem(folder / layout.folder):
            return _check_train_files_exist(folder, name)
    folder = _get_outer_folder(given)
    problem = _find_folder_problem(given) if place else "is not a folder"
    problem = problem or _find_folder_problem(folder / BATCHES_FOLDER, "has none")
    rule = f"{given_by} must be a folder with {BATCHES_FOLDER} in it"
    words = ["shapes", *LAYOUTS, *list_imported()]
    known = " `data list` lists imported data sets." if given.name == place else ""
    hint = f"{did_you_mean(place, words)}{known} {_describe_remedy(folder)}"
    raise DataError(f"{rule}, got {place!r}, which {problem}.{hint}")


def _find_published(name: str) -> DataSource:
    """Return the first place that has CIFAR-10's or CIFAR-100's folder.

    One is a folder of that name here: before `cifar10` was a word, it was a path.
    """
    from_environment = os.environ.get("TUNE_CIFAR_DATA", "")
    places = [Path("data"), user_cache_path("tune_cifar")]
    if from_environment not in ("", "shapes", *LAYOUTS):
        places.insert(0, Path(from_environment))
    inner = LAYOUTS[name].folder
    for folder in (_get_outer_folder(_expand(place), inner) for place in (Path(name), *places)):
        if not _find_folder_problem(folder / inner):
            return _check_train_files_exist(folder, name)
    looked = ", ".join(str(_expand(place)) for place in places)
    option = "" if name == "cifar10" else f" --name {name}"
    raise DataError(f"data: no {inner} in {looked}. Run `python -m tune_cifar data fetch{option}`.")


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


def _get_outer_folder(folder: Path, inner: str = BATCHES_FOLDER) -> Path:
    """Return the folder that holds cifar-10-batches-py, whichever of the two was given."""
    is_inner = folder.name == inner and bool(_find_folder_problem(folder / inner))
    return folder.parent if is_inner else folder


def _check_train_files_exist(folder: Path, data: str = "cifar10") -> DataSource:
    layout = LAYOUTS[data]
    for name in layout.train_files:
        problem = None
        try:
            if not stat.S_ISREG((folder / layout.folder / name).stat().st_mode):
                problem = "the file is missing"
        except OSError as exc:
            problem = _describe_os_error(exc)
        _refuse_problem(folder, data, name, problem)
    return DataSource(data, folder)


def _describe_os_error(exc: OSError) -> str:
    if isinstance(exc, FileNotFoundError):
        return "the file is missing"
    return f"the file cannot be read: {exc.strerror}"


def _refuse_problem(folder: Path, data: str, name: str, problem: str | None) -> None:
    if problem is not None:
        path = folder / LAYOUTS[data].folder / name
        raise DataError(f"{path}: {problem}. {_describe_remedy(folder, data)}")


def _describe_remedy(folder: Path, data: str = "cifar10") -> str:
    option = "" if data == "cifar10" else f" --name {data}"
    command = f"python -m tune_cifar data fetch {shlex.quote(str(folder))}{option}"
    return f"Run `{command}`, or use `data='shapes'`."


def _get_fetch_folder() -> Path:
    from_environment = os.environ.get("TUNE_CIFAR_DATA", "")
    if from_environment in ("", "shapes", *LAYOUTS) or find_imported(from_environment):
        return user_cache_path("tune_cifar")
    return Path(from_environment)


def _download(folder: Path, data: str) -> None:
    """Download and unpack the archive with torchvision; only an archive that was there is kept."""
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive

    published = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data]
    archive, url, md5 = folder / published.filename, published.url, published.tgz_md5
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


def _read_checked(folder: Path, name: str, data: str) -> tuple[FileCheck, bytes]:
    """Compare a file with the published one; return the bytes that were hashed, read only once."""
    path = folder / LAYOUTS[data].folder / name
    expected_md5, expected_bytes = _list_files(data)[name]
    num_bytes, md5, problem, content = None, None, None, b""
    try:
        num_bytes = path.stat().st_size
        if expected_bytes is not None and num_bytes != expected_bytes:
            problem = f"the file must have {expected_bytes:,} bytes, found {num_bytes:,}"
        else:
            content = path.read_bytes()
            md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
            if md5 != expected_md5:
                problem = f"the file must have MD5 {expected_md5}, found {md5}"
    except OSError as exc:
        problem = _describe_os_error(exc)
    return FileCheck(name, expected_md5, md5, num_bytes, problem), content
