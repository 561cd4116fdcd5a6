"""Exported networks: metadata, computed logits, and that a wrong file is refused and not kept."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import ROOT, SHAPES, invoke, refuse, train_small
from tune_cifar.data.load import Split, load_train_val
from tune_cifar.data.shapes import SHAPE_NAMES
from tune_cifar.data.shapes import SHAPES as SHAPES_DATA
from tune_cifar.dataset import CIFAR10
from tune_cifar.errors import CheckpointError, ConfigError, ExportError, RecordError
from tune_cifar.models.build import MODELS
from tune_cifar.record.state import SearchState
from tune_cifar.schema import Numerics, TrainConfig
from tune_cifar.train.checkpoint import load_metadata, load_weights, save_weights
from tune_cifar.train.recorded import load_trained
from tune_cifar.train.trainer import Trainer
from tune_cifar.verify.export import (
    ONNX_OPSET,
    answer_images,
    check_agreement,
    compare_logits,
    describe_run,
    export_run,
    load_network,
    write_onnx,
    write_safetensors,
)

EXPORT = ("export", "--data", "shapes")
SAFETENSORS = (*EXPORT, "small:0", "--format", "safetensors")


@pytest.fixture
def val() -> Split:
    """The images that it validates on."""
    split = load_train_val(SHAPES, 20, 20).val
    assert split is not None
    return split


def load_small(trained: SearchState, numerics: Numerics) -> Trainer:
    return load_trained(trained, trained.trials[0], load_train_val(SHAPES, 20, 20), numerics)


def measure_acc(logits_NK: Tensor, split: Split) -> float:
    return (logits_NK.argmax(1) == split.labels_N).sum().item() / len(split)


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What counts as agreement


def test_equal_logits_agree() -> None:
    logits = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    found = compare_logits(logits, logits.clone(), "validation")
    assert found.holds
    assert (found.num_images, found.largest_difference, found.num_same) == (2, 0.0, 2)


@pytest.mark.parametrize("scale", [0.01, 1.0, 5000.0])
def test_logits_may_differ_by_a_ten_thousandth_of_the_largest(scale: float) -> None:
    ours = torch.tensor([[1.0, -0.5], [0.2, 0.8]]) * scale
    within, beyond = (
        compare_logits(ours, ours + torch.tensor([0.0, factor * 1e-4 * scale]), "training")
        for factor in (0.9, 1.1)
    )
    assert within.tolerance == pytest.approx(1e-4 * scale)
    assert within.holds and not beyond.holds and beyond.num_same == 2


def test_another_prediction_is_forgiven_only_where_ours_is_a_tie() -> None:
    ours = torch.tensor([[0.50005, 0.5], [0.50015, 0.5], [0.0, 1.0]])
    theirs = torch.tensor([[0.5, 0.50005], [0.50006, 0.50009], [0.0, 1.0]])
    tie = compare_logits(ours[[0, 2]], theirs[[0, 2]], "validation")
    assert tie.holds and (tie.num_same, tie.num_contrary) == (1, 0)
    other = compare_logits(ours, theirs, "validation")
    assert other.largest_difference < other.tolerance and not other.holds
    assert (other.num_same, other.num_contrary) == (1, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_agree_with_nothing(value: float) -> None:
    logits, broken = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, value]])
    for ours, theirs in ((logits, broken), (broken, logits), (broken, broken)):
        assert not compare_logits(ours, theirs, "validation").holds


# Safetensors


def test_a_safetensors_export_gives_the_recorded_accuracy_from_that_file_and_raw_images_alone(
    storage: Path, val: Split, trained: SearchState
) -> None:
    answer = invoke(*SAFETENSORS)
    assert answer.exit_code == 0, answer.output
    trial, path = trained.trials[0], storage.parent / "small-0.safetensors"
    logits = load_network(path)(val.images_NCHW.float() / 255)
    assert measure_acc(logits, val) == trial.val_acc
    kept, found = load_weights(trained.folder / str(trial.weights_file)), load_weights(path)
    assert set(kept) == set(found) and all(torch.equal(found[name], kept[name]) for name in kept)
    lines = answer.stdout.splitlines()
    assert "NOT CIFAR-10" in answer.stdout
    size = f"{path.stat().st_size:,} bytes"
    assert lines[-2] == f"small:0 (s7) as safetensors: small-0.safetensors, {size}"
    result = "20 of 20 predictions are the network's, logits differ"
    assert lines[-1].startswith(f"checked on 20 validation images: {result}")
    assert list_names(storage.parent) == ["runs", "small-0.safetensors"]


def test_an_export_says_what_it_is(storage: Path, trained: SearchState) -> None:
    assert invoke(*SAFETENSORS).exit_code == 0
    found, trial = load_metadata(Path("small-0.safetensors")), trained.trials[0]
    assert TrainConfig.model_validate_json(found["config"]) == trial.config
    assert (found["run_id"], found["model"]) == ("small:0", "s7")
    assert found["fingerprint"] == trial.fingerprint
    assert (float(found["val_acc"]), found["epochs"]) == (trial.val_acc, "3")
    assert found["data"] == "NOT CIFAR-10 (shapes)"
    assert found["split"] == trained.header.data.split_hash
    assert json.loads(found["classes"]) == list(SHAPE_NAMES)
    assert json.loads(found["mean"]) == list(CIFAR10.mean)
    assert json.loads(found["std"]) == list(CIFAR10.std)
    assert "subtract mean and divide by std" in found["input"]
    assert found["output"].startswith("logits") and found["tune_cifar"]


def test_an_export_of_the_best_as_json_replaces_the_file_it_is_told(
    storage: Path, trained: SearchState
) -> None:
    Path("here").write_bytes(b"old")
    best = ("--best", "--search", "small")
    answer = invoke(*EXPORT, *best, "--format", "safetensors", "--out", "here", "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert (found["run_id"], found["format"], found["file"]) == ("small:0", "safetensors", "here")
    assert found["bytes"] == Path("here").stat().st_size
    assert (found["part"], found["num_images"]) == ("validation", 20)
    assert (found["num_same"], found["num_contrary"]) == (20, 0)
    assert 0 <= found["largest_difference"] <= found["tolerance"]


def test_a_run_without_validation_images_is_checked_on_training_ones(
    tmp_path: Path, trained: SearchState
) -> None:
    data = replace(load_train_val(SHAPES, 20, 20), val=None)
    agreement = export_run(trained, trained.trials[0], data, "safetensors", tmp_path / "x")
    assert (agreement.part, agreement.num_images, agreement.num_same) == ("training", 20, 20)


@pytest.mark.slow
def test_no_more_than_a_thousand_images_are_asked(tmp_path: Path, trained: SearchState) -> None:
    data = replace(load_train_val(SHAPES, 20, 20), val=load_train_val(SHAPES, 20, 1010).val)
    agreement = export_run(trained, trained.trials[0], data, "safetensors", tmp_path / "x")
    assert (agreement.part, agreement.num_images, agreement.num_same) == ("validation", 1000, 1000)


# What is refused


def alter_last_conv(trainer: Trainer) -> None:
    """Change one weight of about 87,000 by a tenth of the layer's largest."""
    with torch.no_grad():
        weight = trainer.model.get_parameter("convblock4.conv2.weight")
        weight[3, 0, 1, 1] += weight.abs().max() / 10


def test_a_file_with_one_altered_weight_is_caught(
    tmp_path: Path, trained: SearchState, val: Split, fp32: Numerics
) -> None:
    trainer, path = load_small(trained, fp32), tmp_path / "x.safetensors"
    metadata, logits = describe_run(trained, trained.trials[0], SHAPES_DATA), trainer.predict(val)
    write_safetensors(path, trainer.model, metadata)
    theirs = answer_images(path, "safetensors", val.images_NCHW)
    check_agreement(compare_logits(logits, theirs, "validation"), "x:0", "safetensors")
    alter_last_conv(trainer)
    write_safetensors(path, trainer.model, metadata)
    theirs = answer_images(path, "safetensors", val.images_NCHW)
    agreement = compare_logits(logits, theirs, "validation")
    rule = r"^x:0: the safetensors file's logits must be the network's to within"
    with pytest.raises(ExportError, match=rf"{rule} .*, got a difference of .* Nothing"):
        check_agreement(agreement, "x:0", "safetensors")


@pytest.mark.parametrize("key", ["mean", "std"])
def test_a_file_with_other_constants_is_caught(
    tmp_path: Path, trained: SearchState, val: Split, fp32: Numerics, key: str
) -> None:
    trainer, path = load_small(trained, fp32), tmp_path / "x.safetensors"
    metadata = describe_run(trained, trained.trials[0], SHAPES_DATA) | {key: "[0.49, 0.48, 0.45]"}
    write_safetensors(path, trainer.model, metadata)
    found = answer_images(path, "safetensors", val.images_NCHW)
    assert not compare_logits(trainer.predict(val), found, "validation").holds


def test_a_network_that_gives_no_numbers_is_refused_and_what_was_there_stays(
    storage: Path, trained: SearchState
) -> None:
    path = storage / "searches" / "small" / str(trained.trials[0].weights_file)
    weights = load_weights(path)
    weights["convblock4.conv2.weight"][0] = float("nan")
    save_weights(path, weights)
    Path("here").write_bytes(b"old")
    sentence = refuse(ExportError, *SAFETENSORS, "--out", "here")
    result = "got a difference of nan and 20 other predictions. Nothing was written."
    assert sentence.endswith(f"on 20 validation images, {result}")
    assert Path("here").read_bytes() == b"old" and list_names(storage.parent) == ["here", "runs"]


def test_a_run_without_kept_weights_is_refused_with_the_way_out(
    storage: Path, trained: SearchState
) -> None:
    (storage / "searches" / "small" / str(trained.trials[0].weights_file)).unlink()
    sentence = refuse(RecordError, *SAFETENSORS)
    assert sentence.startswith("small:0: its weights were not kept")
    hint = "Export the best one (`best=True`), or let a search keep more of them (`keep_weights`)."
    assert sentence.endswith(hint)


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("no/x.onnx", "--out: the folder must be there, got no."),
        ("runs", "--out: a file must be given, got the folder runs."),
        ("/proc/x.onnx", "/proc/x.onnx: the file cannot be written: "),
    ],
)
def test_a_place_that_takes_no_file_is_refused(out: str, sentence: str) -> None:
    assert sentence in refuse(ConfigError, *SAFETENSORS, "--out", out)


@pytest.mark.usefixtures("storage")
def test_onnx_without_its_packages_is_refused_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    sentence = refuse(ConfigError, *EXPORT, "small:0", "--format", "onnx")
    assert sentence.startswith("`file_format='onnx'` needs onnxscript, not installed here.")
    assert "Run `python -m pip install onnx onnxruntime onnxscript`, or take saf" in sentence
    assert invoke(*SAFETENSORS).exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("small:0",),
        ("small:0", "--format", "pickle"),
        ("--format", "onnx"),
        ("--best", "--format", "onnx"),
    ],
)
@pytest.mark.usefixtures("storage")
def test_export_asks_for_a_format_and_for_a_run_or_the_best_of_something(
    words: tuple[str, ...],
) -> None:
    assert invoke(*EXPORT, *words).exit_code == 2


def test_a_file_that_is_no_export_is_refused(tmp_path: Path, trained: SearchState) -> None:
    kept = trained.folder / str(trained.trials[0].weights_file)
    with pytest.raises(CheckpointError, match="the file is not an exported network: no 'config'"):
        load_network(kept)
    metadata = describe_run(trained, trained.trials[0], SHAPES_DATA)
    save_weights(tmp_path / "x", load_weights(kept) | {"more": torch.zeros(1)}, metadata)
    with pytest.raises(CheckpointError, match=r"network: Error.* in loading state_dict"):
        load_network(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_network(tmp_path / "x")


# ONNX


def open_session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_network_is_exported_to_onnx_and_gives_the_recorded_accuracy_on_raw_images(
    workplace: Path, fp32: Numerics, val: Split, model: str
) -> None:
    state = train_small(workplace / "runs", fp32, model=model, dropout=0.1)
    answer = invoke(*EXPORT, "small:0", "--format", "onnx")
    assert answer.exit_code == 0, answer.output
    result = "20 of 20 predictions are the network's"
    assert f"checked on 20 validation images: {result}" in answer.stdout
    session = open_session(Path("small-0.onnx"))
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["N", 3, 32, 32])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["N", 10])
    pixels = (val.images_NCHW.float() / 255).numpy()
    found = [session.run(None, {"images": pixels[i : i + 1]})[0] for i in range(20)]
    logits_NK = torch.cat([torch.from_numpy(row) for row in found])
    assert measure_acc(logits_NK, val) == state.trials[0].val_acc
    assert list_names(workplace) == ["runs", "small-0.onnx"]


@pytest.mark.slow
@pytest.mark.usefixtures("storage")
def test_an_onnx_export_says_what_it_is_and_nothing_of_the_machine(trained: SearchState) -> None:
    import onnx

    answer = invoke(*EXPORT, "small:0", "--format", "onnx", "--out", "x.onnx", "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["format"] == "onnx"
    found = open_session(Path("x.onnx")).get_modelmeta().custom_metadata_map
    expected = describe_run(trained, trained.trials[0], SHAPES_DATA)
    assert found == expected | {"input": found["input"]}
    assert "normalizes them itself" in found["input"]
    graph = onnx.load("x.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", ONNX_OPSET)]
    content = Path("x.onnx").read_bytes()
    assert b"site-packages" not in content and str(ROOT).encode() not in content


@pytest.mark.slow
def test_an_onnx_file_with_one_altered_weight_is_caught(
    tmp_path: Path, trained: SearchState, val: Split, fp32: Numerics
) -> None:
    trainer = load_small(trained, fp32)
    logits = trainer.predict(val)
    alter_last_conv(trainer)
    write_onnx(tmp_path / "x.onnx", trainer.model, {})
    theirs = answer_images(tmp_path / "x.onnx", "onnx", val.images_NCHW)
    assert not compare_logits(logits, theirs, "validation").holds
