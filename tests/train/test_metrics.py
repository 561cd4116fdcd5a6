"""Evaluations: known metrics of hand-made logits, their figures, and the whole command."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.builders import (
    CIFAR10_CLASSES,
    CONFIG,
    SHAPES,
    evaluate_answers,
    invoke,
    make_config,
    make_grey_images,
    make_header,
    make_logits,
    make_trial,
    refuse,
    write_record,
)
from tune_cifar.data.load import load_train_val
from tune_cifar.data.shapes import SHAPE_NAMES
from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record.state import SearchState
from tune_cifar.report.plots.evaluation import (
    draw_confusion,
    draw_mistakes,
    draw_per_class,
    draw_reliability,
    save_evaluation,
)
from tune_cifar.tracking.address import make_tracking_uri
from tune_cifar.tracking.upload import sync_search
from tune_cifar.train.metrics import Mistake, evaluate_logits, load_evaluation, measure_logits
from tune_cifar.train.numerics import resolve_numerics
from tune_cifar.train.trainer import Trainer

FILES = ["judgement.json", "confusion.png", "per_class.png", "reliability.png", "mistakes.png"]


def test_perfect_answers_have_no_mistake_and_no_warning() -> None:
    labels = list(range(10)) * 3
    evaluation = evaluate_answers(labels, labels)
    assert (evaluation.num_images, evaluation.accuracy, evaluation.mistakes) == (30, 1.0, ())
    assert evaluation.loss == pytest.approx(-math.log(0.9))
    found = [(metrics.name, metrics.num_images, metrics.accuracy) for metrics in evaluation.classes]
    assert found == [(name, 3, 1.0) for name in CIFAR10_CLASSES]
    assert evaluation.confusion.dtype == torch.int64
    assert torch.equal(evaluation.confusion, 3 * torch.eye(10).long())
    assert evaluation.never_predicted == evaluation.warnings == []


def test_a_constant_answer_warns_of_the_nine_classes_that_are_never_predicted() -> None:
    evaluation = evaluate_answers([3] * 20, list(range(10)) * 2)
    others = [name for name in CIFAR10_CLASSES if name != "cat"]
    assert evaluation.accuracy == 0.1 and evaluation.never_predicted == others
    assert evaluation.warnings == [f"9 of 10 classes are never predicted: {', '.join(others)}."]
    for metrics in evaluation.classes:
        is_cat = metrics.name == "cat"
        assert (metrics.accuracy, metrics.num_predicted) == (float(is_cat), 20 * is_cat)


def test_one_class_that_is_never_predicted_is_named() -> None:
    labels = list(range(10))
    warnings = evaluate_answers([*labels[:9], 0], labels).warnings
    assert warnings == ["1 of 10 classes is never predicted: truck."]


def test_confusion_has_true_classes_by_rows_and_predicted_ones_by_columns() -> None:
    evaluation = evaluate_answers([0, 0, 2, 5, 5], [0, 0, 0, 3, 5])
    expected = torch.zeros(10, 10, dtype=torch.int64)
    expected[0, 0], expected[0, 2], expected[3, 5], expected[5, 5] = 2, 1, 1, 1
    assert torch.equal(evaluation.confusion, expected)
    assert evaluation.confusion_shares[0].tolist() == [2 / 3, 0, 1 / 3, *[0] * 7]
    assert evaluation.confusion_shares[1].tolist() == [0] * 10


def test_a_class_without_images_has_no_accuracy_and_does_not_count_as_never_predicted() -> None:
    evaluation = evaluate_answers([0, 1, 0], [0, 1, 1])
    assert [found.accuracy for found in evaluation.classes[:3]] == [1.0, 0.5, None]
    assert evaluation.never_predicted == []
    absent = ", ".join(CIFAR10_CLASSES[2:])
    assert evaluation.warnings == [f"Classes without an image: {absent}."]


@pytest.mark.parametrize(("confidence", "num_right"), [(0.7, 3), (0.95, 10), (0.3, 7)])
def test_answers_of_one_confidence_are_miscalibrated_by_its_distance_from_their_accuracy(
    confidence: float, num_right: int
) -> None:
    labels = [1] * num_right + [2] * (10 - num_right)
    evaluation = evaluate_answers([1] * 10, labels, confidence)
    assert evaluation.ece == pytest.approx(abs(num_right / 10 - confidence), abs=1e-6)
    (filled,) = [found for found in evaluation.bins if found.num_images]
    assert (filled.num_images, filled.accuracy) == (10, num_right / 10)
    assert filled.confidence == pytest.approx(confidence, abs=1e-6)
    assert filled.low <= confidence < filled.high
    bins = evaluation.bins
    assert (len(bins), bins[0].low, bins[-1].high) == (15, 0, 1)


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    """torchmetrics 1.9.0: multiclass_calibration_error(logits, labels, 10, n_bins=15)."""
    images = torch.arange(60)
    logits = 4 * torch.sin(1.7 * images[:, None] + 2.3 * torch.arange(10))
    evaluation = evaluate_logits(logits, images * 7 % 10, CIFAR10_CLASSES, "test")
    assert evaluation.ece == pytest.approx(0.4244566559791565, abs=1e-6)


def test_a_confidence_of_one_belongs_to_the_last_bin() -> None:
    """Unlike torchmetrics 1.9.0, which opens a sixteenth one for it and finds 0.525 here."""
    evaluation = evaluate_answers([0] * 100, [1] * 50 + [0] * 50, [1.0] * 50 + [0.95] * 50)
    assert evaluation.bins[-1].num_images == 100
    assert evaluation.ece == pytest.approx(0.475, abs=1e-6)


def test_mistakes_are_ordered_by_confidence_and_equally_confident_ones_by_index() -> None:
    confidences = [0.5, 0.9, 0.7, 0.9, 0.99, 0.8, 0.8]
    evaluation = evaluate_answers([1, 1, 1, 1, 0, 2, 2], [0] * 7, confidences)
    assert [mistake.index for mistake in evaluation.mistakes] == [1, 3, 5, 6, 2, 0]
    first = evaluation.mistakes[0]
    assert first == Mistake(1, 0, 1, pytest.approx(0.9, abs=1e-6))


def test_only_the_ten_most_confident_mistakes_are_kept() -> None:
    evaluation = evaluate_answers([1] * 50, [0] * 50, [0.5 + i / 200 for i in range(50)])
    assert [mistake.index for mistake in evaluation.mistakes] == list(range(49, 39, -1))


def test_answers_that_float32_rounds_to_certainty_keep_their_order() -> None:
    logits = torch.zeros(3, 10)
    logits[:, 1] = torch.tensor([20.0, 30.0, 25.0])
    assert logits.softmax(1)[1:, 1].tolist() == [1.0, 1.0]
    labels = torch.zeros(3, dtype=torch.int64)
    evaluation = evaluate_logits(logits, labels, CIFAR10_CLASSES, "test")
    assert [mistake.index for mistake in evaluation.mistakes] == [1, 2, 0]


def test_logits_that_are_not_finite_are_a_warning_and_the_evaluation_is_still_json() -> None:
    logits = make_logits([0, 1], [0.9, 0.9])
    logits[0] = float("nan")
    evaluation = evaluate_logits(logits, torch.tensor([0, 1]), CIFAR10_CLASSES, "test")
    assert evaluation.warnings[-1] == "The loss is nan: the confidences mean nothing."
    assert json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))["loss"] is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predicted_logits_measure_exactly_what_evaluate_does(precision: str) -> None:
    """210 images: two full batches and a part of one."""
    config, data = make_config(train_size=100, val_size=210), load_train_val(SHAPES, 100, 210)
    trainer = Trainer(config, data, resolve_numerics("cpu", precision, threads=1))
    assert data.val is not None
    trainer.model.train()
    logits = trainer.predict(data.val)
    assert (logits.shape, logits.dtype, logits.device.type) == ((210, 10), torch.float32, "cpu")
    evaluated = trainer.evaluate(data.val)
    evaluation = evaluate_logits(logits, data.val.labels_N, SHAPE_NAMES, "validation")
    assert (evaluation.loss, evaluation.accuracy) == evaluated
    assert measure_logits(logits, data.val.labels_N) == evaluated


# Figures


def read_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_an_evaluations_folder_holds_four_figures_and_all_data(tmp_path: Path) -> None:
    evaluation = evaluate_answers([0, 0, 2, 5, 5], [0, 0, 0, 3, 5])
    folder, title = tmp_path / "a" / "b", "x:0: 5 validation images"
    files = save_evaluation(evaluation, make_grey_images(5), title, folder)
    assert files == [folder / name for name in FILES]
    sizes = [read_size(path) for path in files[1:]]
    expected = [(946, 836), (836, 506), (704, 792), (1155, 616)]
    assert np.allclose(sizes, expected, rtol=0, atol=1)  # versions of matplotlib round differently
    found = json.loads(files[0].read_text())
    assert (found["title"], found["confusion"]) == (title, evaluation.confusion.tolist())
    confidence = pytest.approx(0.9)
    mistake = {"index": 2, "true": 0, "predicted": 2, "confidence": confidence}
    assert mistake in found["mistakes"]  # others are as confident, to rounding
    assert found["never_predicted"] == ["cat"] and len(found["bins"]) == 15


def test_a_saved_evaluation_is_read_back_as_it_was(tmp_path: Path) -> None:
    evaluation = evaluate_answers([0, 0, 2, 5, 5], [0, 0, 0, 3, 5])
    file = tmp_path / "judgement.json"
    file.write_text(json.dumps({"title": "x:0"} | evaluation.to_dict()))
    found = load_evaluation(file)
    assert found.to_dict() == evaluation.to_dict() and found.warnings == evaluation.warnings


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"part": "test"}', '{"classes": 3'])
def test_a_file_that_is_no_evaluation_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "judgement.json"
    file.write_text(text)
    command = "python -m tune_cifar evaluate RUN$"
    problem = "judgement.json: cannot read the evaluation: .*"
    with pytest.raises(RecordError, match=rf"{problem}\. Make it again with: {command}"):
        load_evaluation(file)
    file.unlink()
    problem = "judgement.json: no evaluation there"
    with pytest.raises(RecordError, match=rf"{problem}\. Make it with: {command}"):
        load_evaluation(file)


def test_a_folder_that_cannot_be_written_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    evaluation, folder = evaluate_answers([0], [0]), tmp_path / "file" / "x"
    problem = r"file/x: the figures cannot be written: Not a directory\."
    with pytest.raises(ConfigError, match=problem):
        save_evaluation(evaluation, make_grey_images(1), "x", folder)


def test_the_drawn_confusion_shows_percents_of_the_true_class() -> None:
    figure = draw_confusion(evaluate_answers([0, 0, 2, 5, 5], [0, 0, 0, 3, 5]), "x:0")
    axes = figure.axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "66.7", (2, 0): "33.3", (5, 3): "100.0", (5, 5): "100.0"}
    assert axes.get_yticklabels()[0].get_text() == "airplane (3)"
    assert axes.get_title() == "x:0\naccuracy 60.00 %; an empty field is no image"


def test_the_drawn_classes_show_their_accuracy_and_which_have_no_image() -> None:
    figure = draw_per_class(evaluate_answers([0, 1, 0], [0, 1, 1]), "x:0")
    axes = figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["100.0 % of 1", "50.0 % of 2", *["no image"] * 8]
    assert [bar.get_width() for bar in axes.patches[:2]] == [100.0, 50.0]
    assert axes.lines[0].get_label() == "all images: 66.67 %"


def test_the_reliability_diagram_shows_each_filled_bin() -> None:
    evaluation = evaluate_answers([1] * 4, [1, 1, 1, 0], [0.9, 0.9, 0.5, 0.5])
    figure = draw_reliability(evaluation, "x:0")
    above, below = figure.axes
    assert np.allclose(above.lines[1].get_xydata(), [[50, 50], [90, 100]], atol=1e-4)
    assert [text.get_text() for text in below.texts] == ["2", "2"]
    assert above.get_title() == "x:0\nexpected calibration error 5.00 % (15 bins)"


def test_the_drawn_mistakes_are_the_images_that_were_predicted_wrong() -> None:
    evaluation = evaluate_answers([3, 0, 9, 1], [3, 5, 0, 1], [0.9, 0.8, 0.99999, 0.9])
    figure = draw_mistakes(evaluation, make_grey_images(4), "x:0")
    shown = [axes for axes in figure.axes if axes.images]
    assert [int(np.asarray(axes.images[0].get_array())[0, 0, 0]) for axes in shown] == [2, 1]
    assert [axes.get_title() for axes in shown] == [
        "taken for truck, > 99.99 %\nlabelled airplane (no. 2)",
        "taken for airplane, 80.00 %\nlabelled dog (no. 1)",
    ]
    assert figure.get_suptitle() == "x:0\nthe 2 most confident mistakes"
    figure = draw_mistakes(evaluate_answers([0], [0]), make_grey_images(1), "x:0")
    assert figure.get_suptitle() == "x:0\nno mistake"


# The command


EVALUATE = ("evaluate", "--data", "shapes")


def test_evaluate_shows_and_saves_the_metrics_of_the_kept_weights_on_the_validation_images(
    storage: Path, trained: SearchState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("tune_cifar.verify.test_set.load_test")  # the test set is not read
    answer = invoke(*EVALUATE, "small:0")
    assert answer.exit_code == 0, answer.output
    last, folder = trained.trials[0].epochs[-1], storage / "judge" / "small-0"
    lines = answer.stdout.splitlines()
    start = lines.index("small:0 on its 20 validation images")
    rows = [line.split() for line in lines[start + 2 : start + 12]]
    assert [(row[0], row[1]) for row in rows] == [(name, "2") for name in SHAPE_NAMES]
    percent = f"{100 * (last.val_acc or 0):.2f} %"
    assert lines[start + 12] == f"accuracy {percent} (recorded: {percent})"
    assert "NOT CIFAR-10" in answer.stdout
    assert f"figures: {folder} ({', '.join(FILES)})" in lines
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    found = json.loads((folder / "judgement.json").read_text())
    assert (found["loss"], found["accuracy"]) == (last.val_loss, last.val_acc)
    assert found["num_images"] == 20
    assert found["title"] == "small:0: 20 validation images, NOT CIFAR-10 (shapes)"
    assert all(sentence in lines for sentence in found["warnings"])
    fault = "evaluation of small:0 not uploaded to MLflow: the trial has no run there"
    remedy = "Complete MLflow: python -m tune_cifar sync --search small"
    assert lines[-1] == f"{fault}. The files are kept. {remedy}"
    assert not (storage / "mlflow.db").exists(), "an absent MLflow is not created"


def test_evaluate_best_as_json_writes_to_its_folder_and_survives_a_broken_tracking_store(
    storage: Path, trained: SearchState
) -> None:
    (storage / "mlflow.db").write_text("this is no database, whatever its name says\n" * 40)
    answer = invoke(*EVALUATE, "--best", "--search", "small", "--json", "--out", "here")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert (found["run_id"], found["part"]) == ("small:0", "validation")
    assert (found["folder"], found["files"]) == ("here", FILES)
    assert found["accuracy"] == found["recorded_val_acc"] == trained.trials[0].val_acc
    assert "SQLite database: file is not a database." in found["mlflow_fault"]
    assert sorted(path.name for path in Path("here").iterdir()) == sorted(FILES)
    assert not (storage / "judge").exists()


def test_a_run_without_kept_weights_is_refused_with_a_remedy(
    storage: Path, trained: SearchState
) -> None:
    (storage / "searches" / "small" / str(trained.trials[0].weights_file)).unlink()
    sentence = refuse(RecordError, *EVALUATE, "small:0")
    assert sentence.startswith("small:0: its weights were not kept")
    remedy = "Evaluate the best one: --best --search, or keep more: search --keep-weights."
    assert sentence.endswith(remedy)


def test_a_run_without_validation_images_is_refused(workplace: Path) -> None:
    config = CONFIG.model_copy(update={"train_size": 50_000, "val_size": 0})
    events = make_trial(0, [None] * 3, "complete", config)
    write_record(workplace / "runs", make_header("full"), events)
    sentence = refuse(RecordError, *EVALUATE, "full:0")
    assert sentence == "full:0 was trained without validation images. Try: reproduce --test."


@pytest.mark.parametrize("words", [(), ("small:0", "--best"), ("--best",)], ids=" ".join)
def test_evaluate_needs_a_run_or_the_best_of_a_search(words: tuple[str, ...]) -> None:
    answer = invoke(*EVALUATE, *words)
    assert answer.exit_code == 2 and "Invalid value" in answer.stderr


@pytest.mark.slow
def test_an_evaluation_is_logged_on_its_trials_run_and_a_second_time_changes_nothing(
    storage: Path, trained: SearchState, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    uri, out = make_tracking_uri(storage, None), tmp_path / "out"
    sync_search(uri, storage, trained.folder)
    out.mkdir()
    (out / "notes.txt").write_text("not part of the evaluation")
    for _ in range(2):
        answer = invoke(*EVALUATE, "small:0", "--out", str(out))
        assert answer.exit_code == 0 and "MLflow" not in answer.stdout, answer.output
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("smoke (shapes)")
    (run,) = client.search_runs([experiment.experiment_id], "tags.trial = '0'")
    artifacts = client.list_artifacts(run.info.run_id, "judge/validation")
    assert {Path(item.path).name for item in artifacts} == set(FILES)
    found = json.loads((out / "judgement.json").read_text())
    expected = {f"val_acc_{row['name']}": row["accuracy"] for row in found["classes"]}
    expected |= {"val_ece": found["ece"]}
    assert {name: run.data.metrics[name] for name in expected} == expected
    assert len(client.get_metric_history(run.info.run_id, "val_ece")) == 1
    assert run.info.status == "FINISHED"
