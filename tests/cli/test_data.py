"""`data`: import and list as typed, and the data of a record found again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.builders import NUMERICS, invoke, refuse, write_record
from tune_cifar.cli.options import find_recorded_data
from tune_cifar.data.files import find_data
from tune_cifar.errors import ConfigError, DataError
from tune_cifar.record.state import SearchState
from tune_cifar.schema import DataInfo
from tune_cifar.space.select import load_space
from tune_cifar.train.recorded import make_header


@pytest.fixture(autouse=True)
def home(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(workplace / "home"))
    monkeypatch.delenv("TUNE_CIFAR_DATA", raising=False)
    return workplace / "home" / "tune_cifar"


def write_npz(path: Path) -> str:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(60) % 3)
    return str(path)


def record_on(storage: Path, name: str) -> SearchState:
    """A record of a search on the data of this name."""
    data = DataInfo(name=name, digest="d", split_hash="h", num_classes=3)
    header = make_header("search", "x", load_space("smoke", "cpu"), 0, data, NUMERICS, "a test")
    return write_record(storage, header, [])


def test_an_import_says_what_it_made_and_what_comes_next(workplace: Path, home: Path) -> None:
    answer = invoke("data", "import", write_npz(workplace / "x.npz"), "--name", "pets")
    assert answer.exit_code == 0, answer.output
    counts = "pets: 45 training, 6 validation and 9 test images, 3 classes, 8x8 pixels"
    said = " ".join(answer.stdout.split())
    assert f"{counts}, in {home / 'pets'}" in said
    assert "6 validation images measure an accuracy to about 20 points" in said
    assert "next: python -m tune_cifar search --space s7 --data pets" in said
    answer = invoke("data", "list")
    assert answer.exit_code == 0 and "npz x.npz" in answer.stdout
    assert json.loads(invoke("data", "list", "--json").stdout)["pets"]["num_duplicates"] == 0
    answer = invoke("data", "verify", "--data", "pets")
    assert answer.stdout == "Imported data are checked whenever they are read.\n"


def test_an_import_elsewhere_is_named_by_its_folder(workplace: Path) -> None:
    words = ("--name", "pets", "--folder", str(workplace / "sets"), "--json")
    answer = invoke("data", "import", write_npz(workplace / "x.npz"), *words)
    assert "6 validation images measure an accuracy to about 20 points" in answer.stderr
    folder = json.loads(answer.stdout)["folder"]
    assert folder == str(workplace / "sets" / "pets") and find_data(folder).name == "pets"
    assert json.loads(invoke("data", "list", "--json").stdout) == {}


def test_a_source_that_is_none_is_refused_in_a_sentence(workplace: Path) -> None:
    (workplace / "x.txt").write_text("no")
    sentence = refuse(DataError, "data", "import", str(workplace / "x.txt"), "--name", "pets")
    kinds = "a folder of class folders, an .npz or a .parquet file"
    assert sentence == f"{workplace / 'x.txt'}: the source must be {kinds}, got something else."


def test_the_data_of_a_record_are_found_by_name_or_where_the_environment_points(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_npz(workplace / "x.npz")
    invoke("data", "import", source, "--name", "pets")
    invoke("data", "import", source, "--name", "mine", "--folder", str(workplace / "sets"))
    assert find_recorded_data(record_on(workplace / "a", "pets"), None) == find_data("pets")
    mine = record_on(workplace / "b", "mine")
    with pytest.raises(DataError):
        find_recorded_data(mine, None)
    monkeypatch.setenv("TUNE_CIFAR_DATA", str(workplace / "sets" / "mine"))
    assert find_recorded_data(mine, None).name == "mine"
    with pytest.raises(ConfigError, match="x was trained on mine, got pets"):
        find_recorded_data(mine, "pets")


def test_a_changed_source_of_an_own_network_is_told(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = load_space("smoke", "cpu")
    baseline = own.baseline.model_copy(update={"model": "net.py:Net"})
    own = replace(own, baseline=baseline, model_source="before")
    data = DataInfo(name="shapes", digest="d", split_hash="h")
    header = make_header("search", "x", own, 0, data, NUMERICS, "a test")
    state = write_record(workplace / "runs", header, [])
    for text, is_told in (("before", False), ("after", True)):
        Path("net.py").write_text(text)
        find_recorded_data(state, None)
        note = "net.py has changed since x: the recorded text is used."
        assert (note in capsys.readouterr().err) == is_told


def test_a_space_takes_the_datas_sizes_and_refuses_what_does_not_fit(workplace: Path) -> None:
    invoke("data", "import", write_npz(workplace / "x.npz"), "--name", "pets")
    words = ("plan", "--space", "s8", "--data", "pets", "--set", "batch_size=9")
    sentence = refuse(ConfigError, *words)
    assert "on pets: cutout_size <= 8 must hold, got 16" in sentence
    sizes = ("--set", "train_size=45", "--set", "val_size=6", "--set", "cutout_size=4")
    answer = invoke(*words, *sizes, "--set", "schedule=constant", "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["data"] == "pets"


def test_a_preview_shows_the_datas_own_images(workplace: Path) -> None:
    invoke("data", "import", write_npz(workplace / "x.npz"), "--name", "pets")
    words = ("--set", "batch_size=9", "--set", "cutout_size=4", "--data", "pets")
    answer = invoke("preview", "--space", "s8", *words)
    assert answer.exit_code == 0, answer.output
    assert (workplace / "preview-s8.png").exists()
