"""What of a recipe must fit a data set, in a sentence each."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tests.builders import make_config
from tune_cifar.dataset import CIFAR10

NO_VALIDATION = "val_size = 0 exactly when train_size = 50000 must hold"
SMALL = CIFAR10.model_copy(
    update={
        "name": "pets",
        "class_names": ("cat", "dog"),
        "side": 8,
        "num_train": 90,
        "num_val": 10,
    }
)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"train_size": 50_000, "val_size": 0}, None),
        ({"train_size": 50_000}, f"{NO_VALIDATION}, got val_size 5000 and train_size 50000."),
        ({"val_size": 0}, f"{NO_VALIDATION}, got val_size 0 and train_size 45000."),
        ({"train_size": 45_001}, "train_size <= 45000 or train_size = 50000 must hold, got 45001."),
        ({"train_size": 50_001}, "train_size <= 45000 or train_size = 50000 must hold, got 50001."),
        ({"train_size": 9, "batch_size": 8}, "train_size >= 10 must hold, got 9."),
        ({"val_size": 5001}, "val_size <= 5000 must hold, got 5001."),
        ({"cutout_size": 33}, "cutout_size <= 32 must hold, got 33."),
    ],
)
def test_cifar10s_bounds_are_sentences(changes: dict[str, Any], sentence: str | None) -> None:
    sizes = {"train_size": 45_000, "val_size": 5000}
    assert CIFAR10.find_problem(make_config(**{**sizes, **changes})) == sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"train_size": 100, "val_size": 0}, None),
        ({"train_size": 91}, "train_size <= 90 or train_size = 100 must hold, got 91."),
        ({"val_size": 11}, "val_size <= 10 must hold, got 11."),
        ({"crop_pad": 8}, "crop_pad < 8 must hold, got 8."),
        ({"cutout_size": 9}, "cutout_size <= 8 must hold, got 9."),
    ],
)
def test_other_data_have_their_own_bounds(changes: dict[str, Any], sentence: str | None) -> None:
    usual = {"train_size": 90, "val_size": 10, "cutout_size": 4}
    assert SMALL.find_problem(make_config(**{**usual, **changes})) == sentence


def test_a_description_follows_from_its_fields() -> None:
    assert (SMALL.num_classes, SMALL.num_all, SMALL.chance) == (2, 100, 0.5)
    assert CIFAR10.all_images == {"train_size": 50_000, "val_size": 0}
    with pytest.raises(ValidationError):
        type(CIFAR10)(**{**CIFAR10.model_dump(), "side": 0})
