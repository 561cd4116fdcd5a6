"""What a network's answers are worth: loss and accuracy, each class, confusion, calibration, the worst mistakes.

Logits and labels in, figures as data out; plots/evaluation.py draws them. All accuracies are fractions in [0, 1].
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

# Losses are summed in float32 over so many images, these sums in float64: bits of every recorded loss depend on it.
NUM_IMAGES_PER_SUM = 200
# Of equal width over [0, 1], as in Guo et al., "On Calibration of Modern Neural Networks" (2017).
NUM_BINS = 15
NUM_MISTAKES = 10
# In the folder of an evaluation, beside its figures.
EVALUATION_FILE = "judgement.json"


@dataclass(frozen=True)
class ClassFigures:
    """How the images of one class were answered, and how often it was the answer."""

    name: str
    num_images: int
    num_predicted: int
    accuracy: float | None
    """The share of its images that were answered right (recall); None without images."""


@dataclass(frozen=True)
class Bin:
    """The images whose confidence lies in [low, high), in the last bin in [low, 1]."""

    low: float
    high: float
    num_images: int
    confidence: float | None
    """Mean of these images; None without any."""
    accuracy: float | None


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: the image's place among the judged ones, the labels, the probability given to the wrong one."""

    index: int
    true: int
    predicted: int
    confidence: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The answers to all images of one part of the data.

    Attributes:
        loss: mean cross-entropy per image, without label smoothing.
        classes: in the order of the labels.
        confusion: int64 (10, 10), true classes by rows, predicted ones by columns.
        ece: expected calibration error: |accuracy - mean confidence| of each bin, weighted by its images.
        mistakes: the most confident wrong answers, at most ten; of equal confidence the lower index first.
    """

    part: Part
    num_images: int
    loss: float
    accuracy: float
    classes: tuple[ClassFigures, ...]
    confusion: Tensor
    ece: float
    bins: tuple[Bin, ...]
    mistakes: tuple[Mistake, ...]

    @property
    def class_names(self) -> list[str]:
        return [figures.name for figures in self.classes]

    @property
    def confusion_shares(self) -> Tensor:
        """float64 (10, 10): of a true class's images, the share answered with each class; 0 for a class without."""
        return self.confusion.double() / self.confusion.sum(1, keepdim=True).clamp(min=1)

    @property
    def never_predicted(self) -> list[str]:
        """Names of the classes that have images and are never the answer."""
        return [
            figures.name
            for figures in self.classes
            if figures.num_images and not figures.num_predicted
        ]

    @property
    def warnings(self) -> list[str]:
        """A sentence for each thing that must not be overlooked."""
        sentences = []
        if never := self.never_predicted:
            are = "is" if len(never) == 1 else "are"
            sentences.append(
                f"{len(never)} of {len(self.classes)} classes {are} never predicted: {', '.join(never)}."
            )
        if absent := [figures.name for figures in self.classes if not figures.num_images]:
            sentences.append(f"No image was judged of: {', '.join(absent)}.")
        if not math.isfinite(self.loss):
            sentences.append(f"The loss must be finite, got {self.loss}: confidences mean nothing.")
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it; None for a loss that is not finite."""
        return asdict(self) | {
            "loss": self.loss if math.isfinite(self.loss) else None,
            "confusion": self.confusion.tolist(),
            "never_predicted": self.never_predicted,
            "warnings": self.warnings,
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Evaluation:
        """The evaluation whose `to_dict` this is; entries that it does not know are passed over."""
        return cls(
            part=found["part"],
            num_images=found["num_images"],
            loss=math.nan if found["loss"] is None else found["loss"],
            accuracy=found["accuracy"],
            classes=tuple(ClassFigures(**figures) for figures in found["classes"]),
            confusion=torch.tensor(found["confusion"]),
            ece=found["ece"],
            bins=tuple(Bin(**figures) for figures in found["bins"]),
            mistakes=tuple(Mistake(**figures) for figures in found["mistakes"]),
        )


def load_evaluation(file: Path) -> Evaluation:
    """A kept evaluation.

    Args:
        file: EVALUATION_FILE in the folder that `judge` names.

    Raises:
        RecordError: the file is absent, or is not an evaluation.
    """
    try:
        return Evaluation.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as exc:
        raise RecordError(f"{file}: an evaluation must be there. Make it with: judge RUN.") from exc
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise RecordError(
            f"{file}: an evaluation must be readable, got {exc!r}. Make it again with: judge RUN."
        ) from exc


def measure_logits(logits_NK: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """Mean cross-entropy per image (no label smoothing) and accuracy. Waits for the device at the end only."""
    loss = torch.zeros((), dtype=torch.float64, device=logits_NK.device)
    parts = zip(
        torch.split(logits_NK, NUM_IMAGES_PER_SUM),
        torch.split(labels_N, NUM_IMAGES_PER_SUM),
        strict=True,
    )
    for logits, labels in parts:
        loss += F.cross_entropy(logits, labels, reduction="sum")
    num_correct = (logits_NK.argmax(1) == labels_N).sum()
    return loss.item() / len(labels_N), num_correct.item() / len(labels_N)


def evaluate_logits(
    logits_NK: Tensor, labels_N: Tensor, class_names: Sequence[str], part: Part
) -> Evaluation:
    """Judge the answers to at least one image.

    Args:
        logits_NK: one column per class name. A row that is not finite counts with confidence 0.
        part: which images these are: named in the evaluation, nothing else.
    """
    loss, accuracy = measure_logits(logits_NK, labels_N)
    num_classes = len(class_names)
    predicted_N = logits_NK.argmax(1)
    # float64: in float32 a sure answer's confidence is rounded to 1, and the mistakes lose their order.
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
    """Where a run's evaluation is kept, unless told otherwise."""
    return storage / "judge" / (run_id.replace(":", "-") + ("-test" if part == "test" else ""))


def _make_classes(confusion: Tensor, class_names: Sequence[str]) -> tuple[ClassFigures, ...]:
    num_right, num_true, num_predicted = (
        confusion.diag().tolist(),
        confusion.sum(1).tolist(),
        confusion.sum(0).tolist(),
    )
    return tuple(
        ClassFigures(name, total, predicted, right / total if total else None)
        for name, total, predicted, right in zip(
            class_names, num_true, num_predicted, num_right, strict=True
        )
    )


def _make_bins(confidence_N: Tensor, is_right_N: Tensor) -> tuple[tuple[Bin, ...], float]:
    """The reliability diagram's bins and the expected calibration error."""
    edges = [i / NUM_BINS for i in range(NUM_BINS + 1)]
    inner = torch.tensor(edges[1:-1], dtype=torch.float64, device=confidence_N.device)
    bin_N = torch.bucketize(confidence_N, inner, right=True)
    counts: list[int] = torch.bincount(bin_N, minlength=NUM_BINS).tolist()
    right: list[float] = torch.bincount(bin_N, is_right_N.double(), minlength=NUM_BINS).tolist()
    confidence: list[float] = torch.bincount(bin_N, confidence_N, minlength=NUM_BINS).tolist()
    bins = tuple(
        Bin(
            edges[i], edges[i + 1], n, confidence[i] / n if n else None, right[i] / n if n else None
        )
        for i, n in enumerate(counts)
    )
    return bins, sum(abs(right[i] - confidence[i]) for i in range(NUM_BINS)) / len(confidence_N)


def _find_mistakes(
    confidence_N: Tensor, predicted_N: Tensor, labels_N: Tensor
) -> tuple[Mistake, ...]:
    wrong = (predicted_N != labels_N).nonzero().flatten()
    order = confidence_N[wrong].sort(descending=True, stable=True).indices[:NUM_MISTAKES]
    columns = (
        wrong[order],
        labels_N[wrong[order]],
        predicted_N[wrong[order]],
        confidence_N[wrong[order]],
    )
    return tuple(
        Mistake(*row) for row in zip(*(column.tolist() for column in columns), strict=True)
    )
