"""Images of one's own: what each kind of source becomes, and a sentence for everything bad."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from tune_cifar.data import importing, sources
from tune_cifar.data.files import CIFAR100_FILES, DataSource, describe_data, fetch_data, find_data
from tune_cifar.data.imported import DESCRIPTION_FILE, PART_FILES, read_imported
from tune_cifar.data.importing import import_data
from tune_cifar.data.load import interleave, load_test, load_train_val, order_split, pack_data
from tune_cifar.errors import DataError

CLASSES = ("cat", "dog", "owl")
Pixels = Any


@pytest.fixture(autouse=True)
def home(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the user's data folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(workplace / "home"))
    monkeypatch.delenv("TUNE_CIFAR_DATA", raising=False)
    return workplace / "home" / "tune_cifar"


def draw(label: int, number: int, side: int = 12) -> Pixels:
    """An image (side, side, 3) whose class is its brightness; all differ."""
    random = np.random.default_rng(1000 * label + number)
    noise = random.integers(0, 60, (side, side, 3), dtype=np.uint8)
    return noise + np.uint8(60 * label)


def encode(pixels: Pixels, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(root: Path, num_images: int = 12, side: int = 12) -> Path:
    """A folder of class folders with PNG files."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(num_images):
            (root / name / f"{number:03}.png").write_bytes(encode(draw(label, number, side)))
    return root


def write_npz(path: Path, num_images: int = 12, **changes: Any) -> Path:
    """An .npz with the images of `write_folder`, the classes in turn; None drops an array."""
    pairs = [(label, number) for number in range(num_images) for label in range(len(CLASSES))]
    arrays = {
        "images": np.stack([draw(label, number) for label, number in pairs]),
        "labels": np.array([label for label, _ in pairs]),
        "class_names": np.array(CLASSES),
    }
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def write_parquet(path: Path, num_images: int = 12, names: bool = True) -> Path:
    """A Parquet file as Hugging Face writes it: image structs and labels with names."""
    pairs = [(label, number) for label in range(len(CLASSES)) for number in range(num_images)]
    images = [{"bytes": encode(draw(*pair)), "path": f"{pair}.png"} for pair in pairs]
    labels = [label for label, _ in pairs]
    features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    table = pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)
    parquet.write_table(table, path)
    return path


def collect(source: DataSource) -> Counter[tuple[int, bytes]]:
    """All images of a data set with their labels."""
    about = describe_data(source)
    everything = load_train_val(source, about.num_all, 0).train, load_test(source)
    return Counter(
        (int(label), image.numpy().tobytes())
        for part in everything
        for image, label in zip(part.images_NCHW, part.labels_N, strict=True)
    )


def test_a_folder_an_npz_and_a_parquet_file_give_the_same_images(tmp_path: Path) -> None:
    import_data(write_folder(tmp_path / "photos"), "one")
    import_data(write_npz(tmp_path / "photos.npz"), "two")
    import_data(write_parquet(tmp_path / "photos.parquet"), "three")
    one, two, three = (find_data(name) for name in ("one", "two", "three"))
    assert collect(one) == collect(two) == collect(three)
    assert sum(collect(one).values()) == 36
    assert describe_data(one).class_names == describe_data(three).class_names == CLASSES
    assert describe_data(one).mean == pytest.approx(describe_data(two).mean, abs=0.01)


def test_every_part_has_each_class_and_the_description_its_numbers(
    tmp_path: Path, home: Path
) -> None:
    seen: list[tuple[int, int]] = []
    found = import_data(
        write_folder(tmp_path / "photos"), "pets", on_progress=lambda *counts: seen.append(counts)
    )
    assert found.folder == home / "pets" and seen[-1] == (36, 36)
    about = found.data.description
    # Two of twelve test, one of the other ten validates.
    assert (about.num_train, about.num_val, about.num_test) == (27, 3, 6)
    source = find_data("pets")
    data = load_train_val(source, 27, 3)
    assert data.val is not None and data.about == about
    assert sorted(data.val.labels_N.tolist()) == [0, 1, 2]
    assert Counter(load_test(source).labels_N.tolist()) == {0: 2, 1: 2, 2: 2}
    pixels = load_train_val(source, 30, 0).train.images_NCHW.double() / 255
    for channel in range(3):
        assert about.mean[channel] == pytest.approx(pixels[:, channel].mean().item(), abs=1e-5)
        std = pixels[:, channel].std(correction=0).item()
        assert about.std[channel] == pytest.approx(std, abs=1e-5)
    assert data.info.num_classes == 3 and data.info.chance == pytest.approx(1 / 3)
    assert data.info.label == "pets"
    assert "3 validation images" in found.notes[-1]


def test_training_needs_no_test_file_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    folder = import_data(write_folder(tmp_path / "photos"), "pets").folder
    (folder / PART_FILES["test"]).unlink()
    source = find_data("pets")
    assert len(load_train_val(source, 27, 3).train) == 27
    with pytest.raises(DataError, match=r"test.safetensors: the file cannot be read"):
        load_test(source)
    path = folder / PART_FILES["train"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    from tune_cifar.data.load import _load_imported

    _load_imported.cache_clear()
    with pytest.raises(DataError, match=r"must have SHA-256 .*Import the data again"):
        load_train_val(source, 27, 3)


@pytest.mark.filterwarnings("error")
def test_images_that_were_packed_for_another_machine_are_those_of_this_one(tmp_path: Path) -> None:
    """Also read-only, as they lie in a node's object store; shapes are made where they train."""
    folder = import_data(write_folder(tmp_path / "pets"), "pets", size=8).folder
    source = DataSource("pets", folder)
    packed = pack_data(source)
    assert packed is not None
    packed.images_NCHW.flags.writeable = False
    here, there = load_train_val(source, 20, 3), packed.select(20, 3)
    assert (there.info, there.about) == (here.info, here.about)
    assert torch.equal(there.train.images_NCHW, here.train.images_NCHW)
    assert there.val is not None and here.val is not None
    assert torch.equal(there.val.labels_N, here.val.labels_N)
    with pytest.raises(DataError, match="train_size"):
        packed.select(10**6, 3)
    assert pack_data(DataSource("shapes", None)) is None


def test_a_data_set_is_found_by_its_name_its_folder_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_folder(tmp_path / "photos")
    import_data(photos, "pets")
    elsewhere = import_data(photos, "mine", home=tmp_path / "elsewhere").folder
    assert find_data("pets").name == "pets"
    assert find_data(str(elsewhere)) == DataSource("mine", elsewhere)
    monkeypatch.setenv("TUNE_CIFAR_DATA", str(elsewhere))
    assert find_data(None).name == "mine"
    with pytest.raises(DataError, match=r"Did you mean pets\?"):
        find_data("pet")


def test_test_images_of_their_own_keep_the_labels_of_the_training_images(tmp_path: Path) -> None:
    train = write_folder(tmp_path / "photos")
    test = tmp_path / "others"
    (test / "owl").mkdir(parents=True)
    for number in range(3):
        (test / "owl" / f"{number}.png").write_bytes(encode(draw(2, 50 + number)))
    found = import_data(train, "pets", test=test)
    assert found.data.description.num_all == 36
    assert load_test(find_data("pets")).labels_N.tolist() == [2, 2, 2]
    assert found.data.imported_from == "folder photos, test others"
    (test / "emu").mkdir()
    (test / "emu" / "1.png").write_bytes(encode(draw(1, 99)))
    with pytest.raises(DataError, match=r"must be those of training images .* got 'emu'"):
        import_data(train, "more", test=test)


def test_test_images_that_equal_a_training_image_are_counted_and_reported(tmp_path: Path) -> None:
    train = write_folder(tmp_path / "photos")
    test = tmp_path / "others"
    (test / "cat").mkdir(parents=True)
    for number in (3, 77):
        (test / "cat" / f"{number}.png").write_bytes(encode(draw(0, number)))
    found = import_data(train, "pets", test=test)
    assert found.data.num_duplicates == 1
    assert found.notes[0].startswith("1 of 2 test images are equal to a training image")


def test_images_are_cut_to_their_middle_and_resized(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 255  # the middle square
    assert (importing.resize(wide, 8) == 255).all()
    folder = write_folder(tmp_path / "photos", side=40)
    assert import_data(folder, "small", size=16).data.description.side == 16


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_grey_images_become_rgb(kind: str) -> None:
    grey = np.full((8, 8), 100, dtype=np.uint8)
    pixels = sources.decode_image(encode(grey, kind), "x")
    assert pixels.shape == (8, 8, 3) and (abs(pixels.astype(int) - 100) <= 2).all()


def test_a_photograph_is_turned_as_its_exif_says() -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:, :4] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: white comes to the top
    turned = sources.decode_image(encode(pixels, "PNG", exif=exif), "x")
    assert turned[:3].min() == 255 and turned[5:].max() == 0


def make_cmyk() -> bytes:
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_transparent() -> bytes:
    return encode(np.zeros((8, 8, 4), dtype=np.uint8))


BAD_IMAGES = {
    "truncated": (encode(draw(0, 0))[:-40], "the image is damaged, or no PNG, JPEG or WebP"),
    "text": (b"no image at all", "the image is damaged, or no PNG, JPEG or WebP"),
    "gif": (encode(draw(0, 0), "GIF"), "the image is damaged, or no PNG, JPEG or WebP"),
    "16 bits": (
        encode(np.full((8, 8), 4000, dtype=np.uint16)),
        "an image must be RGB or grey with 8 bits a channel, got I;16",
    ),
    "cmyk": (make_cmyk(), "an image must be RGB or grey with 8 bits a channel, got CMYK"),
    "transparent": (make_transparent(), "an image must not be transparent"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_named(case: str, tmp_path: Path) -> None:
    content, rule = BAD_IMAGES[case]
    folder = write_folder(tmp_path / "photos", 3)
    bad = folder / "dog" / "zz.png"
    bad.write_bytes(content)
    with pytest.raises(DataError) as caught:
        import_data(folder, "pets", size=12)
    assert str(caught.value).startswith(f"{bad}: {rule}")
    assert not find_home_folders()


def find_home_folders() -> list[Path]:
    from tune_cifar.data.imported import find_home

    return list(find_home().glob("*"))


def test_an_image_that_unpacks_to_too_many_pixels_is_refused_before_it_is_unpacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match=r"must have at most 100 pixels, got 12x12"):
        sources.decode_image(encode(draw(0, 0)), "x")


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", 3)
    (tmp_path / "secret.png").write_bytes(encode(draw(0, 0)))
    (folder / "cat" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"link.png: a link must stay in .*photos"):
        import_data(folder, "pets")


def test_classes_that_break_a_rule_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", 4)
    (folder / "Cat").mkdir()
    with pytest.raises(DataError, match=r"must differ by more than case, got 'Cat' and 'cat'"):
        import_data(folder, "pets")
    (folder / "Cat").rmdir()
    for path in sorted((folder / "owl").iterdir())[:2]:
        path.unlink()
    with pytest.raises(DataError, match=r"at least 3 images .*, got 2 of 'owl'"):
        import_data(folder, "pets")
    assert import_data(folder, "pets", test=write_folder(tmp_path / "more", 1)).data
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"must hold a folder for each class, got none"):
        import_data(tmp_path / "empty", "none")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"images": None}, "must hold `images` and `labels`, got labels, class_names"),
        ({"images": np.zeros((36, 12, 12, 3))}, "`images` must be uint8, 0 to 255, got float64"),
        ({"images": np.zeros((36, 12, 12, 5), dtype=np.uint8)}, "with 1 or 3 channels, got 36x12"),
        ({"labels": np.zeros(35, dtype=int)}, "one for each of 36 images, got int64 (35,)"),
        ({"labels": np.zeros(36)}, "`labels` must be whole numbers"),
        ({"labels": np.full(36, 3)}, "labels must be 0 to 2, got 3 of image 0"),
        ({"labels": np.full(36, -1)}, "labels must be 0 to 2, got -1 of image 0"),
        ({"class_names": np.array(["a", "b", "b"])}, "class names must differ"),
        ({"class_names": None, "labels": np.zeros(36, dtype=int)}, "2 to 1000 classes must hold"),
    ],
)
def test_arrays_that_break_a_rule_are_refused(
    changes: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        import_data(write_npz(tmp_path / "x.npz", **changes), "pets")
    assert rule in str(caught.value)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=np.array([{"a": 1}], dtype=object), labels=np.array([0]))
    with pytest.raises(DataError, match=r"cannot be read: Object arrays cannot be loaded"):
        import_data(path, "pets")
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match=r"cannot be read: File is not a zip file"):
        import_data(path, "pets")


def damage_npz(path: Path) -> Path:
    """An .npz with compressed images, which unpack to nothing."""
    np.savez_compressed(path, images=np.zeros((36, 12, 12, 3), np.uint8), labels=np.zeros(36, int))
    content = bytearray(path.read_bytes())
    content[60:120] = b"\xff" * 60
    path.write_bytes(content)
    return path


def encrypt_npz(path: Path) -> Path:
    """An .npz whose every member says that it is encrypted."""
    content = bytearray(write_npz(path).read_bytes())
    for header, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for found in re.finditer(header, content):
            content[found.start() + offset] |= 1
    path.write_bytes(content)
    return path


def name_by_no_list(path: Path) -> Path:
    return write_npz(path, class_names=np.array("cat"))


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (damage_npz, "x.npz", "Error -3 while decompressing data"),
        (encrypt_npz, "x.npz", "is encrypted, password required"),
        (name_by_no_list, "x.npz", "iteration over a 0-d array"),
    ],
)
def test_a_source_that_is_damaged_is_refused_in_a_sentence(
    make: Callable[[Path], Path], name: str, reason: str, tmp_path: Path
) -> None:
    source = make(tmp_path / name)
    with pytest.raises(DataError) as caught:
        import_data(source, "pets")
    sentence = str(caught.value)
    assert sentence.startswith(f"{source}: the source is damaged, or cannot be read: ")
    assert reason in sentence and "\n" not in sentence


def test_a_link_to_itself_is_refused_in_a_sentence(tmp_path: Path) -> None:
    link = write_folder(tmp_path / "photos", 3) / "cat" / "a.png"
    link.symlink_to(link.name)
    # Python 3.13 finds it where the image is read.
    with pytest.raises(DataError, match=r"cannot be read: (Symlink loop|Too many levels)"):
        import_data(tmp_path / "photos", "pets")


def test_a_class_folder_without_permission_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system is made to refuse: root may read every folder."""
    folder, list_folder = write_folder(tmp_path / "photos", 3), Path.iterdir

    def refuse_owls(path: Path) -> Iterator[Path]:
        if path.name == "owl":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(Path, "iterdir", refuse_owls)
    with pytest.raises(DataError, match=r"photos: the source .* Permission denied: '.*owl'\.$"):
        import_data(folder, "pets")


def test_a_source_may_have_a_name_that_is_not_utf_8_and_a_class_may_not(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / os.fsdecode(b"caf\xe9"), 3)
    assert import_data(folder, "pets").data.imported_from == "folder caf?"
    (folder / "cat").rename(folder / os.fsdecode(b"caf\xe9"))
    rule = r"class names must be UTF-8, got 'caf\udce9'. Rename it."
    with pytest.raises(DataError, match=re.escape(f"{folder}: {rule}")):
        import_data(folder, "more")


@pytest.mark.parametrize("shape", ["N C H W", "N H W", "N H W 1"])
def test_channels_may_come_first_or_be_missing(shape: str, tmp_path: Path) -> None:
    images = np.stack([draw(label, number) for number in range(12) for label in range(3)])
    changed = {
        "N C H W": images.transpose(0, 3, 1, 2),
        "N H W": images[..., 0],
        "N H W 1": images[..., :1],
    }[shape]
    import_data(write_npz(tmp_path / "x.npz", images=changed), "pets")
    data = load_train_val(find_data("pets"), 30, 0).train.images_NCHW
    is_grey = bool((data[:, 0] == data[:, 1]).all())
    assert data.shape == (30, 3, 12, 12) and is_grey == (shape != "N C H W")


def test_parquet_that_breaks_a_rule_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"the file must be Parquet"):
        import_data(path, "pets")
    parquet.write_table(pa.table({"a": [1.0], "b": ["x"]}), path)
    with pytest.raises(DataError, match=r"one column must hold the images, got a \(double\)"):
        import_data(path, "pets")
    cells = [encode(draw(0, 0)), b"bad"] * 6
    parquet.write_table(pa.table({"img": cells, "label": ["u", "v"] * 6}), path)
    with pytest.raises(DataError, match=r"x.parquet, row 1: the image is damaged"):
        import_data(path, "pets")
    assert describe_labels(write_parquet(path, names=False)) == ("0", "1", "2")


def describe_labels(path: Path) -> tuple[str, ...]:
    return sources.open_source(path).class_names


@pytest.mark.parametrize("name", ["shapes", "cifar10", "../x", "", "a b", "x" * 65])
def test_a_name_that_is_taken_or_a_path_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`name` must be letters, digits"):
        import_data(tmp_path, name)


def test_a_data_set_is_never_overwritten(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", 3)
    import_data(folder, "pets")
    with pytest.raises(DataError, match=r"exists already. Delete it, or take another `name`"):
        import_data(folder, "pets")


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", 3)
    (folder / "owl" / "big.png").write_bytes(encode(draw(2, 9, side=20)))
    with pytest.raises(DataError, match=r"all images must have one size \(12x12\) .* got 20x20"):
        import_data(folder, "pets")
    with pytest.raises(DataError, match=r"`size` must be 1 to 256, got 0"):
        import_data(folder, "pets", size=0)
    wide = folder / "cat" / "000.png"
    wide.write_bytes(encode(np.zeros((8, 9, 3), dtype=np.uint8)))
    with pytest.raises(DataError, match=r"must be a square of at most 256 .* got 9x8"):
        import_data(folder, "pets")


def test_test_images_of_another_size_need_a_size_too(tmp_path: Path, home: Path) -> None:
    train = write_folder(tmp_path / "photos", 3)
    test = write_folder(tmp_path / "others", 2, side=20)
    rule = r"cat/000.png: all images must have one size \(12x12\) without `size`, got 20x20"
    with pytest.raises(DataError, match=rf"others/{rule}\. Give `size`\.$"):
        import_data(train, "pets", test=test)
    assert not (home / "pets").exists()
    assert import_data(train, "pets", size=8, test=test).data.description.side == 8


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(DataError, match=r"MB must be free, got 0 MB. Make room"):
        import_data(write_folder(tmp_path / "photos", 3), "pets")
    assert not find_home_folders()


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    folder = import_data(write_folder(tmp_path / "photos", 3), "pets").folder
    path = folder / DESCRIPTION_FILE
    path.write_text(path.read_text().replace('"side": 12', '"side": 0'))
    with pytest.raises(DataError, match=r"dataset.json: .*side >= 1 must hold, got 0"):
        read_imported(folder)


def test_a_description_that_is_cut_in_half_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / DESCRIPTION_FILE
    path.write_text('{"description": {"name": "pets"')
    with pytest.raises(DataError) as caught:
        read_imported(tmp_path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: the file must be JSON, got: EOF while parsing")
    assert sentence.endswith("Import the data again.") and "pets" not in sentence


def test_a_description_must_have_the_digests_of_both_parts(tmp_path: Path) -> None:
    folder = import_data(write_folder(tmp_path / "photos", 3), "pets").folder
    written = json.loads((folder / DESCRIPTION_FILE).read_text())
    del written["sha256"]["test"]
    (folder / DESCRIPTION_FILE).write_text(json.dumps(written))
    with pytest.raises(DataError, match=r"dataset.json: sha256.test must be given\. Import"):
        read_imported(folder)


def test_the_scatter_of_many_validation_images_is_not_rounded_to_nothing(tmp_path: Path) -> None:
    data = import_data(write_folder(tmp_path / "photos", 3), "pets").data
    many = {"class_names": tuple(map(str, range(1000))), "num_val": 10_000}
    about = data.description.model_copy(update=many)
    (note,) = importing._list_notes(data.model_copy(update={"description": about}))
    assert "10000 validation images measure an accuracy to about 0.5 points" in note


def test_every_prefix_of_an_unbalanced_split_has_the_classes_in_proportion() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 30])
    order, num_train = order_split(labels, 3)
    assert num_train == 540 + 270 + 27 and sorted(order) == list(range(930))
    for size in (31, 155, 310):
        counts = np.bincount(labels[order[:size]], minlength=3) / size
        assert counts == pytest.approx([600 / 930, 300 / 930, 30 / 930], abs=0.02)
    assert interleave([np.arange(3), np.arange(10, 13)]).tolist() == [0, 10, 1, 11, 2, 12]


# CIFAR-100


def write_cifar100(
    folder: Path, monkeypatch: pytest.MonkeyPatch | None, num_images: int = 50_000
) -> Path:
    """Files in torchvision's layout; their MD5s are expected if monkeypatch is given."""
    random = np.random.default_rng(0)
    inner = folder / "cifar-100-python"
    inner.mkdir(parents=True)
    fine = np.arange(num_images) % 100
    parts = {
        "train": {b"data": np.zeros((num_images, 3072), np.uint8), b"fine_labels": fine.tolist()},
        "test": {b"data": np.zeros((10_000, 3072), np.uint8), b"fine_labels": [7] * 10_000},
        "meta": {b"fine_label_names": [b"c%d" % number for number in range(100)]},
    }
    parts["train"][b"data"][:, 0] = fine
    parts["train"][b"coarse_labels"] = random.integers(0, 20, num_images).tolist()
    for name, content in parts.items():
        raw = pickle.dumps(content, protocol=4)
        (inner / name).write_bytes(raw)
        if monkeypatch is not None:
            md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
            monkeypatch.setitem(CIFAR100_FILES, name, (md5, None))
    return folder


def test_cifar100_is_read_with_its_fine_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_CIFAR_DATA", str(write_cifar100(tmp_path / "c", monkeypatch)))
    source = find_data("cifar100")
    about = describe_data(source)
    assert (about.num_classes, about.class_names[7]) == (100, "c7")
    data = load_train_val(source, 45_000, 5000)
    assert data.val is not None
    assert torch.equal(data.train.images_NCHW[:, 0, 0, 0].long(), data.train.labels_N)
    assert set(Counter(data.val.labels_N.tolist()).values()) == {50}
    assert (data.info.name, data.info.num_classes) == ("cifar100", 100)
    assert load_test(source).labels_N.tolist()[:2] == [7, 7]


@pytest.mark.parametrize("inner", ["", "cifar-100-python"])
def test_a_folder_with_cifar100_alone_is_cifar100(inner: str, tmp_path: Path) -> None:
    folder = write_cifar100(tmp_path / "c", None, 100)
    assert find_data(str(folder / inner)) == DataSource("cifar100", folder)
    (folder / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"data_batch_1: the file is missing"):
        find_data(str(folder))  # CIFAR-10 comes first


def test_other_files_are_refused_as_cifar100(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"no cifar-100-python in .* data fetch --name cifar100"):
        find_data("cifar100")
    monkeypatch.setenv("TUNE_CIFAR_DATA", str(write_cifar100(tmp_path / "c", None, 100)))
    with pytest.raises(DataError, match=r"meta: the file must have MD5 7973b15"):
        describe_data(find_data("cifar100"))
    with pytest.raises(DataError, match=r"`name` must be cifar10 or cifar100, got 'cifar1000'"):
        fetch_data(tmp_path, "cifar1000")


def test_cifar100s_checksums_are_torchvisions() -> None:
    from torchvision.datasets import CIFAR100

    listed = dict([*CIFAR100.train_list, *CIFAR100.test_list])
    listed[CIFAR100.meta["filename"]] = CIFAR100.meta["md5"]
    assert {name: md5 for name, (md5, _) in CIFAR100_FILES.items()} == listed
