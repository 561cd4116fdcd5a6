"""A config's augmentation knobs become a policy: plain data with the right constants."""

import subprocess
import sys
from typing import Any

import pytest

from tune_cifar.augment.policies import (
    Crop,
    Cutout,
    Gray,
    HFlip,
    ShiftScaleRotate,
    make_policy,
    mean_color,
)
from tune_cifar.dataset import CIFAR10
from tune_cifar.schema import TrainConfig, inactive_knobs

ALL_KNOBS: dict[str, Any] = {
    "crop_pad": 4,
    "hflip_p": 0.3,
    "shift_scale_rotate_p": 0.5,
    "shift_limit": 0.1,
    "scale_limit": 0.2,
    "rotate_limit": 30.0,
    "cutout_p": 0.4,
    "cutout_size": 16,
    "gray_p": 0.6,
}
LIMITS = ("shift_limit", "scale_limit", "rotate_limit")


def make_config(**knobs: Any) -> TrainConfig:
    required: dict[str, Any] = {"model": "s7", "optimizer": "sgd", "schedule": "constant"}
    return TrainConfig(**required, max_lr=0.01, batch_size=128, epochs=1, **knobs)


def test_policy_of_a_configuration_without_augmentation_is_empty() -> None:
    assert make_policy(make_config()) == ()


def test_policy_holds_every_knob_in_the_one_order() -> None:
    assert make_policy(make_config(**ALL_KNOBS)) == (
        Crop(pad=4),
        HFlip(p=0.3),
        ShiftScaleRotate(shift_limit=0.1, scale_limit=0.2, rotate_limit=30.0, p=0.5),
        Cutout(size=16, p=0.4, fill=mean_color(CIFAR10)),
        Gray(p=0.6),
    )


@pytest.mark.parametrize(
    ("knobs", "op"),
    [
        ({"crop_pad": 0}, Crop),
        ({"hflip_p": 0.0}, HFlip),
        ({"shift_scale_rotate_p": 0.0}, ShiftScaleRotate),
        (dict.fromkeys(LIMITS, 0.0), ShiftScaleRotate),
        ({"cutout_p": 0.0}, Cutout),
        ({"cutout_size": 0}, Cutout),
        ({"gray_p": 0.0}, Gray),
    ],
)
def test_policy_drops_exactly_the_operation_whose_strength_is_zero(
    knobs: dict[str, Any], op: type
) -> None:
    complete = make_policy(make_config(**ALL_KNOBS))
    expected = tuple(other for other in complete if not isinstance(other, op))
    assert make_policy(make_config(**ALL_KNOBS | knobs)) == expected


@pytest.mark.parametrize("knob", LIMITS)
def test_warp_stays_when_only_one_of_its_limits_is_left(knob: str) -> None:
    limits = dict.fromkeys(LIMITS, 0.0) | {knob: 0.25}
    warp = make_policy(make_config(**ALL_KNOBS | limits))[2]
    assert warp == ShiftScaleRotate(**limits, p=0.5)


def test_each_active_knob_changes_the_policy_and_each_inactive_one_does_not() -> None:
    complete = make_policy(make_config(**ALL_KNOBS))
    others = dict.fromkeys(ALL_KNOBS, 0.125) | {"cutout_size": 8, "crop_pad": 2}
    for name, value in others.items():
        assert make_policy(make_config(**ALL_KNOBS | {name: value})) != complete, name
        alone = make_config(**{name: value})
        if name in inactive_knobs(alone):
            assert make_policy(alone) == (), name


def test_backend_does_not_change_the_policy() -> None:
    albumentations = make_config(**ALL_KNOBS, augment_backend="albumentations")
    assert make_policy(albumentations) == make_policy(make_config(**ALL_KNOBS))


def test_mean_color_is_the_nearest_pixel_to_the_mean() -> None:
    assert mean_color(CIFAR10) == (125, 123, 114)
    for pixel, mean in zip(mean_color(CIFAR10), CIFAR10.mean, strict=True):
        assert abs(pixel - 255 * mean) <= 0.5


def test_policies_are_readable_without_torch() -> None:
    code = "import sys, tune_cifar.augment.policies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
