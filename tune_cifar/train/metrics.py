"""Metrics of a network's predictions: loss, accuracy, classes, confusion, calibration, mistakes.

The input is logits and labels, the output is plain data, drawn by report/plots/evaluation.py. All
accuracies and confidences are fractions in [0, 1].
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_cifar.errors import RecordError

Part = Literal["validation", "test"]

# The number of images whose losses are summed in float32; these sums are added in float64. The bits
# of every recorded loss depend on it.
NUM_IMAGES_PER_SUM = 200
# Bins of equal width over [0, 1]: Guo et al., "On Calibration of Modern Neural Networks" (2017).
NUM_BINS = 15
NUM_MISTAKES = 10
# The data of an evaluation, in its folder beside the figures. Older versions wrote the same name.
EVALUATION_FILE = "judgement.json"


@dataclass(frozen=True)
class ClassMetrics:
    """The predictions for the images of one class, and how often the class was predicted."""

    name: str
    num_images: int
    num_predicted: int
    accuracy: float | None
    """The fraction of its images that were predicted correctly (recall); None without images."""


@dataclass(frozen=True)
class Bin:
    """The images whose confidence lies in [low, high); in the last bin in [low, 1]."""

    low: float
    high: float
    num_images: int
    confidence: float | None
    """Mean over these images; None without any, like `accuracy`."""
    accuracy: float | None


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction."""

    index: int
    """Position among the evaluated images."""
    true: int
    predicted: int
    confidence: float
    """Probability of the predicted class."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metrics of a network on all images of one part of the data.

    Attributes:
        loss: mean cross-entropy per image, without label smoothing.
        classes: in the order of the labels.
        confusion: int64 (classes, classes), true classes by rows, predicted ones by columns.
        ece: expected calibration error: |accuracy - mean confidence| of each bin, weighted by its
            number of images.
        mistakes: the ten most confident wrong predictions, or fewer; of equally confident ones the
            lower index comes first.
    """

    part: Part
    num_images: int
    loss: float
    accuracy: float
    classes: tuple[ClassMetrics, ...]
    confusion: Tensor
    ece: float
    bins: tuple[Bin, ...]
    mistakes: tuple[Mistake, ...]

    @property
    def class_names(self) -> list[str]:
        return [metrics.name for metrics in self.classes]

    @property
    def confusion_shares(self) -> Tensor:
        """Confusion as fractions of each true class's images (0 without any), float64."""
        return self.confusion.double() / self.confusion.sum(1, keepdim=True).clamp(min=1)

    @property
    def never_predicted(self) -> list[str]:
        """Names of the classes that have images and are never predicted."""
        return [
            found.name for found in self.classes if found.num_images and not found.num_predicted
        ]

    @property
    def warnings(self) -> list[str]:
        """Sentences about classes never predicted or without images, and a loss not finite."""
        sentences = []
        if never := self.never_predicted:
            are = "is" if len(never) == 1 else "are"
            count = f"{len(never)} of {len(self.classes)} classes"
            sentences.append(f"{count} {are} never predicted: {', '.join(never)}.")
        if absent := [metrics.name for metrics in self.classes if not metrics.num_images]:
            sentences.append(f"Classes without an image: {', '.join(absent)}.")
        if not math.isfinite(self.loss):
            sentences.append(f"The loss is {self.loss}: the confidences mean nothing.")
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; None for a loss that is not finite."""
        return asdict(self) | {
            "loss": self.loss if math.isfinite(self.loss) else None,
            "confusion": self.confusion.tolist(),
            "never_predicted": self.never_predicted,
            "warnings": self.warnings,
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Evaluation:
        """Restore an evaluation from its `to_dict`; unknown entries are ignored."""
        return cls(
            part=found["part"],
            num_images=found["num_images"],
            loss=math.nan if found["loss"] is None else found["loss"],
            accuracy=found["accuracy"],
            classes=tuple(ClassMetrics(**metrics) for metrics in found["classes"]),
            confusion=torch.tensor(found["confusion"]),
            ece=found["ece"],
            bins=tuple(Bin(**values) for values in found["bins"]),
            mistakes=tuple(Mistake(**values) for values in found["mistakes"]),
        )


def load_evaluation(file: Path) -> Evaluation:
    """Read an evaluation from its file.

    Args:
        file: EVALUATION_FILE in the folder that the command `evaluate` prints.

    Raises:
        RecordError: the file is absent, or is not an evaluation.
    """
    command = "python -m tune_cifar evaluate RUN"
    try:
        return Evaluation.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as exc:
        raise RecordError(f"{file}: no evaluation there. Make it with: {command}") from exc
    except (OSError, ValueError, TypeError, KeyError) as exc:
        problem = f"cannot read the evaluation: {exc!r}"
        raise RecordError(f"{file}: {problem}. Make it again with: {command}") from exc


def measure_logits(logits_NK: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """Return mean cross-entropy per image (no label smoothing) and accuracy.

    It waits for the device only at the end.
    """
    loss = torch.zeros((), dtype=torch.float64, device=logits_NK.device)
    logit_parts = torch.split(logits_NK, NUM_IMAGES_PER_SUM)
    label_parts = torch.split(labels_N, NUM_IMAGES_PER_SUM)
    for logits, labels in zip(logit_parts, label_parts, strict=True):
        loss += F.cross_entropy(logits, labels, reduction="sum")
    num_correct = (logits_NK.argmax(1) == labels_N).sum()
    return loss.item() / len(labels_N), num_correct.item() / len(labels_N)


def evaluate_logits(
    logits_NK: Tensor, labels_N: Tensor, class_names: Sequence[str], part: Part
) -> Evaluation:
    """Evaluate predictions.

    Args:
        logits_NK: one row per image (at least one), one column per class name. A row that is not
            finite counts with confidence 0.
        part: which images these are; a label of the evaluation, which changes no figure.
    """
    loss, accuracy = measure_logits(logits_NK, labels_N)
    num_classes = len(class_names)
    predicted_N = logits_NK.argmax(1)
    # In float32 high confidences would be rounded to 1, and the mistakes would lose their order.
    confidence_N = logits_NK.double().softmax(1).amax(1).nan_to_num(nan=0.0)
    confusion = torch.bincount(labels_N * num_classes + predicted_N, minlength=num_classes**2)
    confusion = confusion.view(num_classes, num_classes)
    bins, ece = _make_bins(confidence_N, predicted_N == labels_N)
    return Evaluation(
        part=part,
        num_images=len(labels_N),
        loss=loss,
        accuracy=accuracy,
        classes=_make_classes(confusion, class_names),
        confusion=confusion,
        ece=ece,
        bins=bins,
        mistakes=_find_mistakes(confidence_N, predicted_N, labels_N),
    )


def find_evaluation_folder(storage: Path, run_id: str, part: Part) -> Path:
    """Return the default folder of a run's evaluation."""
    suffix = "-test" if part == "test" else ""
    return storage / "judge" / f"{run_id.replace(':', '-')}{suffix}"


def _make_classes(confusion: Tensor, class_names: Sequence[str]) -> tuple[ClassMetrics, ...]:
    num_correct = confusion.diag().tolist()
    num_images = confusion.sum(1).tolist()
    num_predicted = confusion.sum(0).tolist()
    classes = []
    for i, name in enumerate(class_names):
        accuracy = num_correct[i] / num_images[i] if num_images[i] else None
        classes.append(ClassMetrics(name, num_images[i], num_predicted[i], accuracy))
    return tuple(classes)


def _make_bins(confidence_N: Tensor, is_right_N: Tensor) -> tuple[tuple[Bin, ...], float]:
    """Return the bins of the reliability diagram and the expected calibration error."""
    edges = [i / NUM_BINS for i in range(NUM_BINS + 1)]
    inner = torch.tensor(edges[1:-1], dtype=torch.float64, device=confidence_N.device)
    bin_N = torch.bucketize(confidence_N, inner, right=True)
    counts: list[int] = torch.bincount(bin_N, minlength=NUM_BINS).tolist()
    # Sums over the images of each bin.
    right: list[float] = torch.bincount(bin_N, is_right_N.double(), minlength=NUM_BINS).tolist()
    confidence: list[float] = torch.bincount(bin_N, confidence_N, minlength=NUM_BINS).tolist()
    bins = []
    for i, n in enumerate(counts):
        means = (confidence[i] / n, right[i] / n) if n else (None, None)
        bins.append(Bin(edges[i], edges[i + 1], n, *means))
    ece = sum(abs(right[i] - confidence[i]) for i in range(NUM_BINS)) / len(confidence_N)
    return tuple(bins), ece


def _find_mistakes(
    confidence_N: Tensor, predicted_N: Tensor, labels_N: Tensor
) -> tuple[Mistake, ...]:
    wrong = (predicted_N != labels_N).nonzero().flatten()
    order = confidence_N[wrong].sort(descending=True, stable=True).indices[:NUM_MISTAKES]
    return tuple(
        Mistake(i, int(labels_N[i]), int(predicted_N[i]), float(confidence_N[i]))
        for i in wrong[order].tolist()
    )
