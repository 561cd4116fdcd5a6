"""Find, verify, split and read CIFAR-10 safely; without it, every refusal is one sentence."""

from __future__ import annotations

import builtins
import hashlib
import http.server
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from platformdirs import user_cache_path

from tests.builders import RunsCommand, make_data_files
from tune_cifar.data import files
from tune_cifar.data import load as data
from tune_cifar.data.files import (
    BATCHES_FOLDER,
    FILES,
    TEST_FILE,
    TRAIN_FILES,
    DataSource,
    fetch_data,
    find_data,
    read_batch,
    verify_data,
)
from tune_cifar.data.load import Split, load_test, load_train_val, make_split_order
from tune_cifar.dataset import CIFAR10 as CIFAR10_DATA
from tune_cifar.errors import DataError

SHAPES = DataSource("shapes", None)
ROUND_ROBIN = np.arange(50_000) % 10
BATCH = Path("data_batch_1")

# Of the order in which the real training images are kept. It must not change: every recorded score
# depends on it.
GOLDEN_SPLIT_HASH = "9c81e95fa40b6f63"
GOLDEN_DIGEST = "5e09b4a5f8c5fba2"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder without data; home and cache have none either."""
    monkeypatch.delenv("TUNE_CIFAR_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def link_files(source: DataSource, folder: Path, without: str) -> Path:
    """Make a folder with links to all real files but one; return the path of the missing one."""
    assert source.folder is not None
    (folder / BATCHES_FOLDER).mkdir(parents=True)
    for name in FILES:
        if name != without:
            (folder / BATCHES_FOLDER / name).symlink_to(source.folder / BATCHES_FOLDER / name)
    return folder / BATCHES_FOLDER / without


def assert_is_a_sentence(message: str) -> None:
    assert "\n" not in message
    assert message.endswith(".")
    assert "`data='shapes'`" in message


def count_images(splits: Iterable[Split]) -> int:
    """Count the different images in some splits."""
    images = (image.numpy() for split in splits for image in split.images_NCHW)
    return len({hashlib.sha1(image).digest() for image in images})


# Finding


def test_finding_data_imports_neither_torch_nor_torchvision() -> None:
    code = (
        "import sys; from tune_cifar.data.files import find_data; find_data('shapes'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_argument_wins_over_the_environment_the_working_folder_and_the_cache(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = user_cache_path("tune_cifar")
    assert cache.is_relative_to(nowhere)
    make_data_files(cache)
    assert find_data(None) == DataSource("cifar10", cache)
    make_data_files(nowhere / "data")
    assert find_data(None) == DataSource("cifar10", nowhere / "data")
    monkeypatch.setenv("TUNE_CIFAR_DATA", str(make_data_files(nowhere / "environment")))
    assert find_data(None) == DataSource("cifar10", nowhere / "environment")
    make_data_files(nowhere / "option")
    assert find_data("option") == DataSource("cifar10", nowhere / "option")
    assert find_data("shapes") == SHAPES
    monkeypatch.setenv("TUNE_CIFAR_DATA", "shapes")
    assert find_data(None) == SHAPES


@pytest.mark.parametrize(
    "spelling", ["there", "there/", "there/cifar-10-batches-py", "./there/cifar-10-batches-py/"]
)
def test_the_folder_and_the_one_that_holds_it_are_the_same_source(
    nowhere: Path, spelling: str
) -> None:
    make_data_files(nowhere / "there")
    assert find_data(spelling) == DataSource("cifar10", nowhere / "there")


@pytest.mark.parametrize("given_by", ["`data`", "TUNE_CIFAR_DATA"])
@pytest.mark.parametrize(
    ("place", "found"), [("empty", "which has none"), ("absent", "which is not a folder")]
)
def test_a_given_folder_without_data_is_an_error_although_another_place_has_it(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, given_by: str, place: str, found: str
) -> None:
    make_data_files(nowhere / "data")
    (nowhere / "empty").mkdir()
    monkeypatch.setenv("TUNE_CIFAR_DATA", place)
    with pytest.raises(DataError) as caught:
        find_data(place if given_by == "`data`" else None)
    message = str(caught.value)
    assert_is_a_sentence(message)
    rule = f"{given_by} must be a folder with cifar-10-batches-py in it"
    assert message.startswith(f"{rule}, got '{place}', {found}.")
    assert f"python -m tune_cifar data fetch {nowhere / place}" in message


def test_cifar10_by_its_name_is_looked_for_in_its_usual_places(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the environment names other data."""
    with pytest.raises(DataError) as caught:
        find_data("cifar10")
    places = f"{nowhere / 'data'}, {user_cache_path('tune_cifar')}"
    hint = "Run `python -m tune_cifar data fetch`."
    assert str(caught.value) == f"data: no {BATCHES_FOLDER} in {places}. {hint}"
    make_data_files(nowhere / "data")
    for other in ("shapes", "cifar10", "cifar100"):
        monkeypatch.setenv("TUNE_CIFAR_DATA", other)
        assert find_data("cifar10") == DataSource("cifar10", nowhere / "data")
    monkeypatch.setenv("TUNE_CIFAR_DATA", "cifar10")
    assert find_data(None) == DataSource("cifar10", nowhere / "data")
    inner = make_data_files(nowhere / "environment") / BATCHES_FOLDER
    monkeypatch.setenv("TUNE_CIFAR_DATA", str(inner))
    assert find_data("cifar10") == DataSource("cifar10", nowhere / "environment")
    make_data_files(nowhere / "cifar10")  # a folder of that name, as ever
    assert find_data("cifar10") == DataSource("cifar10", nowhere / "cifar10")
    with pytest.raises(DataError, match=r"Did you mean cifar10\?"):
        find_data("cifar-10")


def test_an_empty_text_is_refused(nowhere: Path) -> None:
    make_data_files(nowhere)
    with pytest.raises(DataError, match="got '', which is not a folder"):
        find_data("")


def test_a_misspelt_name_of_the_synthetic_data_is_recognised(nowhere: Path) -> None:
    with pytest.raises(DataError, match=r"Did you mean shapes\?"):
        find_data("shape")


def test_data_found_nowhere_names_the_places_and_the_ways_out(nowhere: Path) -> None:
    with pytest.raises(DataError) as caught:
        find_data(None)
    assert_is_a_sentence(str(caught.value))
    places = f"{nowhere / 'data'} or {user_cache_path('tune_cifar')}"
    assert f"no {BATCHES_FOLDER} in {places}. " in str(caught.value)
    for way_out in ("`python -m tune_cifar data fetch`", "`data`", "TUNE_CIFAR_DATA"):
        assert way_out in str(caught.value)


@pytest.mark.parametrize("missing", TRAIN_FILES)
def test_a_missing_training_file_is_named_when_looking(nowhere: Path, missing: str) -> None:
    make_data_files(nowhere / "data", tuple(name for name in FILES if name != missing))
    with pytest.raises(DataError) as caught:
        find_data(None)
    assert_is_a_sentence(str(caught.value))
    path = nowhere / "data" / BATCHES_FOLDER / missing
    assert str(caught.value).startswith(f"{path}: the file is missing. ")


def test_data_without_the_test_file_is_found(nowhere: Path) -> None:
    make_data_files(nowhere / "data", TRAIN_FILES)
    assert find_data(None) == DataSource("cifar10", nowhere / "data")


def test_a_source_without_its_folder_is_refused_and_never_taken_for_synthetic_data() -> None:
    with pytest.raises(
        DataError, match="shapes must have no folder and other data one, got None for"
    ):
        DataSource("cifar10", None)


# Verifying


def test_verifying_reports_every_file_that_is_missing_truncated_or_altered(tmp_path: Path) -> None:
    names = ("data_batch_1", "data_batch_2", "batches.meta")
    source = DataSource("cifar10", make_data_files(tmp_path, names))
    with (tmp_path / BATCHES_FOLDER / "data_batch_2").open("r+b") as file:
        file.truncate(12)
    (tmp_path / BATCHES_FOLDER / "data_batch_3").mkdir()
    checks = {check.name: check for check in verify_data(source)}
    assert tuple(checks) == tuple(FILES)
    zeros = hashlib.md5(bytes(158)).hexdigest()
    meta = checks["batches.meta"]
    assert meta.found_md5 == zeros
    assert meta.problem == f"the file must have MD5 {FILES['batches.meta'][0]}, found {zeros}"
    assert checks["data_batch_2"].problem == "the file must have 31,035,320 bytes, found 12"
    assert checks["data_batch_2"].num_bytes == 12
    assert checks["data_batch_4"].problem == "the file is missing"
    assert checks["data_batch_4"].num_bytes is None
    assert all(check.problem for check in checks.values())


def test_synthetic_data_have_no_files_to_verify() -> None:
    assert verify_data(SHAPES) == []


@pytest.mark.parametrize(
    ("name", "load"),
    [("data_batch_1", lambda source: load_train_val(source, 100, 100)), ("test_batch", load_test)],
)
def test_loading_refuses_a_file_of_the_wrong_size_or_content_in_one_sentence(
    tmp_path: Path, name: str, load: Callable[[DataSource], Any]
) -> None:
    source = DataSource("cifar10", make_data_files(tmp_path / "with space"))
    path = tmp_path / "with space" / BATCHES_FOLDER / name
    command = f"python -m tune_cifar data fetch '{tmp_path / 'with space'}'"
    hint = f"Run `{command}`, or use `data='shapes'`."
    md5, size = FILES[name]
    with pytest.raises(DataError) as altered:
        load(source)
    zeros = hashlib.md5(bytes(size)).hexdigest()
    assert str(altered.value) == f"{path}: the file must have MD5 {md5}, found {zeros}. {hint}"
    os.truncate(path, 1000)
    with pytest.raises(DataError) as truncated:
        load(source)
    assert str(truncated.value) == f"{path}: the file must have {size:,} bytes, found 1,000. {hint}"
    path.unlink()
    with pytest.raises(DataError) as missing:
        load(source)
    assert str(missing.value) == f"{path}: the file is missing. {hint}"


# Reading pickles


def test_a_hostile_pickle_of_the_right_name_and_size_is_refused_by_its_md5_and_never_unpickled(
    tmp_path: Path,
) -> None:
    source, marker = DataSource("cifar10", make_data_files(tmp_path / "data")), tmp_path / "marker"
    content = pickle.dumps(RunsCommand(marker), protocol=2)
    with (tmp_path / "data" / BATCHES_FOLDER / "data_batch_1").open("r+b") as file:
        file.write(content)
    with pytest.raises(DataError, match="data_batch_1: the file must have MD5 c99cafc1"):
        load_train_val(source, 100, 100)
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists()  # it would have run


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_the_unpickler_runs_no_command(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps(RunsCommand(tmp_path / "marker"), protocol=protocol)
    with pytest.raises(DataError, match=r"must hold only arrays, found: (posix|nt)\.system"):
        read_batch(content, BATCH)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "thing",
    [
        builtins.eval,
        builtins.getattr,
        np.load,
        np.ndarray.tofile,
        np.testing.assert_equal,
        Path,
        torch.load,
    ],
    ids=lambda thing: thing.__qualname__,
)
def test_the_unpickler_admits_no_other_name_not_even_of_numpy(thing: object) -> None:
    with pytest.raises(DataError, match="must hold only arrays"):
        read_batch(pickle.dumps({b"data": thing}, protocol=5), BATCH)


def test_the_unpickler_admits_no_dotted_name_below_an_allowed_one() -> None:
    hostile = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."
    assert pickle.loads(hostile) is np.ndarray.tofile
    with pytest.raises(DataError, match=r"found: numpy\.ndarray\.tofile"):
        read_batch(hostile, BATCH)


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\x80\x02}q\x01(U", b"N."], ids=["empty", "junk", "torn", "none"]
)
def test_a_broken_pickle_is_refused_in_one_sentence(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^data_batch_1: the (file|pickle) must [^\n]*\.$"):
        read_batch(content, BATCH)


@pytest.mark.parametrize(
    "module", [b"numpy.core.multiarray", b"numpy._core.multiarray"], ids=["old", "new"]
)
def test_arrays_pickled_by_old_and_new_numpy_are_read(module: bytes) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10_000, 3_072), dtype=np.uint8)
    content = pickle.dumps({b"data": images, b"labels": ROUND_ROBIN[:10_000].tolist()}, protocol=3)
    assert b"cnumpy._core.multiarray\n" in content
    content = content.replace(b"cnumpy._core.multiarray\n", b"c" + module + b"\n")
    read, labels = read_batch(content, BATCH)
    assert np.array_equal(read, images.reshape(10_000, 3, 32, 32))
    assert np.array_equal(labels, ROUND_ROBIN[:10_000])


@pytest.mark.parametrize(
    "batch",
    [
        {b"data": np.zeros((10_000, 3_072), np.int8), b"labels": [0] * 10_000},
        {b"data": np.zeros((9_999, 3_072), np.uint8), b"labels": [0] * 10_000},
        {b"data": np.zeros((10_000, 3_072), np.uint8), b"labels": [0] * 9_999},
        {b"data": np.zeros((10_000, 3_072), np.uint8), b"labels": [10] * 10_000},
        {b"data": np.zeros((10_000, 3_072), np.uint8), b"labels": [-1] * 10_000},
        {b"data": b"bytes", b"labels": [0] * 10_000},
    ],
    ids=["type", "images", "labels", "label 10", "label -1", "no array"],
)
def test_a_pickle_of_something_else_than_a_batch_is_refused(batch: dict[bytes, Any]) -> None:
    rule = "must hold 10,000 images labelled 0-9"
    with pytest.raises(DataError, match=f"{rule}, found something else"):
        read_batch(pickle.dumps(batch, protocol=3), BATCH)


# Splitting


@given(st.integers(0, 2**32 - 1), st.integers(1, 45_000), st.integers(1, 5_000))
def test_every_prefix_is_stratified_for_labels_in_any_order(
    seed: int, num_train: int, num_val: int
) -> None:
    labels = np.random.default_rng(seed).permutation(ROUND_ROBIN)
    order = make_split_order(labels)
    for prefix in (order[:num_train], order[45_000 : 45_000 + num_val]):
        counts = np.bincount(labels[prefix], minlength=10)
        assert counts.max() - counts.min() <= 1
        assert counts.min() == len(prefix) // 10


def test_the_split_takes_every_image_once_and_validates_with_500_of_each_class() -> None:
    order = make_split_order(ROUND_ROBIN)
    train, val = order[:45_000], order[45_000:]
    assert not set(train) & set(val)
    assert set(train) | set(val) == set(range(50_000))
    assert np.bincount(ROUND_ROBIN[val]).tolist() == [500] * 10
    assert abs(np.mean(val) - 25_000) < 1_000  # drawn from all over the files, not from one


def test_the_split_never_changes() -> None:
    assert data.hash_split(make_split_order(ROUND_ROBIN)) == "7ba35c0f8b29a700"


def test_labels_that_are_not_5000_of_each_class_are_refused() -> None:
    labels = ROUND_ROBIN.copy()
    labels[0] = 1
    rule = "the training files must have 5,000 images of each class"
    with pytest.raises(DataError, match=rf"{rule}, got \[4999, 5001, "):
        make_split_order(labels)


# Loading synthetic data


def test_loaded_images_and_labels_have_their_documented_types() -> None:
    loaded = load_train_val(SHAPES, 1_234, 321)
    assert loaded.val is not None
    for split, size in ((loaded.train, 1_234), (loaded.val, 321)):
        images, labels = split.images_NCHW, split.labels_N
        assert len(split) == size
        assert (images.shape, images.dtype) == ((size, *files.IMAGE_SHAPE), torch.uint8)
        assert (labels.shape, labels.dtype) == ((size,), torch.int64)
        assert labels.tolist() == [i % 10 for i in range(size)]
    assert loaded.info.name == "shapes"
    assert loaded.info.digest == "230d21872a062d0e"
    assert loaded.info.split_hash == "f5d7111e3944c662"


def test_a_larger_training_sees_the_smaller_one_first_in_the_same_memory() -> None:
    small, large = load_train_val(SHAPES, 100, 50), load_train_val(SHAPES, 2_000, 500)
    assert small.val is not None
    assert large.val is not None
    assert torch.equal(small.train.images_NCHW, large.train.images_NCHW[:100])
    assert small.train.images_NCHW.data_ptr() == large.train.images_NCHW.data_ptr()
    assert small.val.images_NCHW.data_ptr() == large.val.images_NCHW.data_ptr()


def test_all_50000_images_train_without_validation_training_images_first() -> None:
    full, parts = load_train_val(SHAPES, 50_000, 0), load_train_val(SHAPES, 45_000, 5_000)
    assert full.val is None
    assert parts.val is not None
    assert torch.equal(full.train.images_NCHW[:45_000], parts.train.images_NCHW)
    assert torch.equal(full.train.images_NCHW[45_000:], parts.val.images_NCHW)
    assert torch.bincount(full.train.labels_N).tolist() == [5_000] * 10


def test_the_three_parts_of_the_synthetic_data_have_no_image_in_common() -> None:
    loaded, test = load_train_val(SHAPES, 5_000, 5_000), load_test(SHAPES)
    assert loaded.val is not None
    assert len(test) == 10_000
    assert torch.bincount(test.labels_N).tolist() == [1_000] * 10
    splits = (loaded.train, loaded.val, test)
    assert [count_images([split]) for split in splits] == [5_000, 5_000, 10_000]
    assert count_images(splits) == 20_000


@pytest.mark.parametrize("train_size", [-1, 0, 9, 45_001, 49_999, 50_001])
def test_a_number_of_training_images_out_of_range_is_refused(train_size: int) -> None:
    rule = "train_size in 10-45,000 or 50,000 must hold"
    with pytest.raises(DataError, match=rf"^data: {rule}, got {train_size:,}\.$"):
        load_train_val(SHAPES, train_size, 0)


@pytest.mark.parametrize(("train_size", "val_size"), [(100, -1), (100, 5_001), (50_000, 1)])
def test_a_number_of_validation_images_out_of_range_is_refused(
    train_size: int, val_size: int
) -> None:
    found = f"got {val_size:,} with {train_size:,}"
    with pytest.raises(DataError, match=rf"^data: val_size .* must hold, {found}\.$"):
        load_train_val(SHAPES, train_size, val_size)


# Fetching


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Point torchvision at a server on this machine that sends what the test gives it, else 404."""
    from torchvision.datasets import CIFAR10

    (tmp_path / "served").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *args: Any) -> None:
            """Silence."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}"
        monkeypatch.setattr(CIFAR10, "url", url)
        yield lambda content: (tmp_path / "served" / CIFAR10.filename).write_bytes(content)
        server.shutdown()
        thread.join()


def test_fetching_without_network_fails_soon_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    with socket.create_server(("127.0.0.1", 0)) as closed_later:
        port = closed_later.getsockname()[1]
    url = f"http://127.0.0.1:{port}/{CIFAR10.filename}"
    monkeypatch.setattr(CIFAR10, "url", url)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        fetch_data(tmp_path / "new")
    assert time.monotonic() - start < 60
    message = str(caught.value)
    assert_is_a_sentence(message)
    assert message.startswith(f"data fetch: cannot reach {url}: ")
    archive = f"cifar-10-python.tar.gz (MD5 {CIFAR10.tgz_md5})"
    assert f"Put {archive} into {tmp_path / 'new'} by hand" in message
    assert socket.getdefaulttimeout() is None


def test_fetching_from_a_silent_server_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(files, "FETCH_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/{CIFAR10.filename}"
        monkeypatch.setattr(CIFAR10, "url", url)
        with pytest.raises(DataError, match=r"cannot reach .*: timed out\. Put"):
            fetch_data(tmp_path)


def test_fetching_a_page_that_is_gone_says_so(tmp_path: Path, serve: Callable[..., None]) -> None:
    with pytest.raises(DataError, match=r"cannot reach .*: File not found\. Put"):
        fetch_data(tmp_path / "data")


def test_fetching_something_else_than_the_archive_is_refused_and_not_kept(
    tmp_path: Path, serve: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    serve(b"<html>Log in to the hotel's network</html>")
    with pytest.raises(DataError) as caught:
        fetch_data(tmp_path / "data")
    assert_is_a_sentence(str(caught.value))
    assert "sent something else than the archive, or a part of it. " in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_fetching_into_a_place_that_is_a_file_is_refused(
    tmp_path: Path, serve: Callable[..., None]
) -> None:
    serve(b"")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file must be writable and have 350 MiB to spare"):
        fetch_data(tmp_path / "file")


# On the real CIFAR-10


def test_the_expected_md5s_are_torchvisions() -> None:
    from torchvision.datasets import CIFAR10

    listed = dict([*CIFAR10.train_list, *CIFAR10.test_list])
    listed[CIFAR10.meta["filename"]] = CIFAR10.meta["md5"]
    assert {name: md5 for name, (md5, _) in FILES.items()} == listed
    assert CIFAR10.base_folder == BATCHES_FOLDER


@pytest.mark.slow
@pytest.mark.real_data
def test_all_real_files_are_as_published(cifar10: DataSource) -> None:
    checks = verify_data(cifar10)
    assert [check.name for check in checks] == list(FILES)
    assert [check.problem for check in checks] == [None] * 7
    assert [(check.found_md5, check.num_bytes) for check in checks] == list(FILES.values())


@pytest.mark.slow
@pytest.mark.real_data
def test_the_real_split_is_the_recorded_one(cifar10: DataSource) -> None:
    info = load_train_val(cifar10, 45_000, 5_000).info
    assert info.name == "cifar10"
    assert (info.digest, info.split_hash) == (GOLDEN_DIGEST, GOLDEN_SPLIT_HASH)


@pytest.mark.slow
@pytest.mark.real_data
def test_real_splits_have_their_sizes_their_classes_and_no_image_in_common(
    cifar10: DataSource,
) -> None:
    loaded, test = load_train_val(cifar10, 45_000, 5_000), load_test(cifar10)
    assert loaded.val is not None
    splits = (loaded.train, loaded.val, test)
    counts = [torch.bincount(split.labels_N).tolist() for split in splits]
    assert counts == [[4_500] * 10, [500] * 10, [1_000] * 10]
    assert [count_images([split]) for split in splits] == [45_000, 5_000, 10_000]
    assert count_images(splits) == 60_000


@pytest.mark.slow
@pytest.mark.real_data
def test_real_pixels_and_labels_are_those_that_torchvision_reads(cifar10: DataSource) -> None:
    from torchvision.datasets import CIFAR10

    train, test = load_train_val(cifar10, 50_000, 0).train, load_test(cifar10)
    for is_train, split in ((True, train), (False, test)):
        theirs = CIFAR10(str(cifar10.folder), train=is_train)
        labels = np.array(theirs.targets)
        order = make_split_order(labels) if is_train else np.arange(10_000)
        assert np.array_equal(split.labels_N.numpy(), labels[order])
        assert np.array_equal(split.images_NCHW.permute(0, 2, 3, 1).numpy(), theirs.data[order])
        assert tuple(theirs.classes) == CIFAR10_DATA.class_names


@pytest.mark.slow
@pytest.mark.real_data
def test_the_normalising_constants_are_those_of_the_50000_training_images(
    cifar10: DataSource,
) -> None:
    images = load_train_val(cifar10, 50_000, 0).train.images_NCHW.numpy()
    values = np.arange(256) / 255
    for channel in range(3):
        pixels = images[:, channel].reshape(-1)
        frequencies = np.bincount(pixels, minlength=256) / pixels.size
        mean = (frequencies * values).sum()
        std = np.sqrt((frequencies * (values - mean) ** 2).sum())
        assert CIFAR10_DATA.mean[channel] == pytest.approx(mean, abs=5e-5)
        assert CIFAR10_DATA.std[channel] == pytest.approx(std, abs=5e-5)


@pytest.mark.slow
@pytest.mark.real_data
def test_training_data_load_with_the_test_file_removed_or_full_of_rubbish(
    cifar10: DataSource, tmp_path: Path
) -> None:
    missing = link_files(cifar10, tmp_path / "links", TEST_FILE)
    source = find_data(str(tmp_path / "links"))
    assert load_train_val(source, 45_000, 5_000).info.split_hash == GOLDEN_SPLIT_HASH
    data._load_published.cache_clear()
    missing.write_bytes(b"rubbish")
    assert load_train_val(source, 45_000, 5_000).info.split_hash == GOLDEN_SPLIT_HASH
    with pytest.raises(DataError, match="test_batch: the file must have 31,035,526 bytes, found 7"):
        load_test(source)


@pytest.mark.slow
@pytest.mark.real_data
def test_loading_opens_the_training_files_or_the_test_file_and_never_both(
    cifar10: DataSource,
) -> None:
    opened: list[str] = []
    is_watching = True

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if is_watching and event == "open" and BATCHES_FOLDER in str(args[0]):
            opened.append(Path(args[0]).name)

    sys.addaudithook(watch)  # a hook cannot be removed, hence is_watching
    data._load_published.cache_clear()
    load_train_val(cifar10, 100, 100)
    assert opened == list(TRAIN_FILES)
    load_train_val(cifar10, 45_000, 5_000)
    assert opened == list(TRAIN_FILES)  # once per process
    opened.clear()
    load_test(cifar10)
    assert opened == [TEST_FILE]
    is_watching = False


@pytest.mark.slow
@pytest.mark.real_data
def test_one_altered_pixel_is_refused(cifar10: DataSource, tmp_path: Path) -> None:
    path = link_files(cifar10, tmp_path, "data_batch_5")
    assert cifar10.folder is not None
    content = bytearray((cifar10.folder / BATCHES_FOLDER / "data_batch_5").read_bytes())
    content[20_000_000] ^= 1
    path.write_bytes(content)
    rule = "data_batch_5: the file must have MD5 482c414d41f54cd18b22e5b47cb7c3cb"
    with pytest.raises(DataError, match=f"{rule}, found "):
        load_train_val(find_data(str(tmp_path)), 100, 100)


@pytest.mark.slow
@pytest.mark.real_data
def test_fetching_unpacks_verifies_and_cleans_up(
    cifar10: DataSource, tmp_path: Path, serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    assert cifar10.folder is not None
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=0) as tar:
        tar.add(cifar10.folder / BATCHES_FOLDER, BATCHES_FOLDER)
    content = archive.read_bytes()
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    serve(content)
    folder = tmp_path / "fetched"
    source = fetch_data(folder / BATCHES_FOLDER)
    assert source == DataSource("cifar10", folder) == find_data(str(folder))
    assert [path.name for path in folder.iterdir()] == [BATCHES_FOLDER]
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/nothing.tar.gz")
    assert fetch_data(folder) == source  # all files are the published ones: no network needed
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    (by_hand / CIFAR10.filename).write_bytes(content)
    assert fetch_data(by_hand) == DataSource("cifar10", by_hand)
    assert (by_hand / CIFAR10.filename).exists()
