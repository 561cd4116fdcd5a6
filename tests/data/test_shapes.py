"""Synthetic data: the same pixels everywhere, ten classes that differ only in their shape."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest

from tune_cifar.data import shapes
from tune_cifar.data.shapes import NUM_CLASSES

# SHA-256 of chunk 0 and of chunk 59 (the last test images). A change of a pixel needs a new
# GENERATOR_VERSION.
GOLDEN = {
    0: "23f34029eb5e088f45b1f883bead0af5c2239f10587c93646ea70b4c762e65dd",
    59: "2f49f7aa8e9fcf3e7c820fbf103f0ae4b45856709ab3bf2ccad94151f3735749",
}


@pytest.fixture(scope="module")
def chunk() -> npt.NDArray[np.uint8]:
    return shapes.draw_shapes(0)


def render(label: int, degrees: float = 0.0, flip: bool = False) -> npt.NDArray[np.bool_]:
    """Return one class's shape on a fine grid as a mask, rotated and mirrored on request."""
    grid = (np.arange(64, dtype=np.float32) - 31.5) / 24
    right, down = np.meshgrid(-grid if flip else grid, grid)
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    u, v = (cos * right + sin * down)[None], (cos * down - sin * right)[None]
    coverage = shapes.compute_coverage(label, u, v, np.array([1 / 24]), np.array([0.5]))
    mask: npt.NDArray[np.bool_] = coverage[0] > 0.5
    return mask


def measure_overlap(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("number", GOLDEN)
def test_the_pixels_are_the_golden_ones(number: int) -> None:
    assert hashlib.sha256(shapes.draw_shapes(number).tobytes()).hexdigest() == GOLDEN[number]


def test_the_digest_names_the_generator_version() -> None:
    assert (shapes.GENERATOR_VERSION, shapes.SHAPES_DIGEST) == (1, "230d21872a062d0e")


def test_no_image_is_drawn_twice_in_neighbouring_chunks(chunk: npt.NDArray[np.uint8]) -> None:
    images = np.concatenate([chunk, shapes.draw_shapes(1)])
    assert len({image.tobytes() for image in images}) == 2 * shapes.CHUNK_SIZE


def test_a_small_training_draws_only_the_chunks_that_it_needs() -> None:
    shapes._make_store.cache_clear()
    first = shapes.make_shapes_train_val(1_001, 10)
    assert shapes._make_store()[1] == {0, 1, 45}
    second = shapes.make_shapes_train_val(2_001, 2_000)
    assert shapes._make_store()[1] == {0, 1, 2, 45, 46}
    assert second is first


def test_validation_images_are_the_first_generated_ones_and_training_follows() -> None:
    images = shapes.make_shapes_train_val(10, 10)
    assert np.array_equal(images[45_000:45_010], shapes.draw_shapes(0)[:10])
    assert np.array_equal(images[:10], shapes.draw_shapes(5)[:10])


def test_every_class_differs_from_every_other_when_rotated_or_mirrored() -> None:
    # 1 would be the same shape. Ring and frame overlap by 0.66, the most of all pairs.
    for label in range(NUM_CLASSES):
        variants = []
        for degrees in range(-45, 46, 15):
            variants += [render(label, degrees, flip) for flip in (False, True)]
        for other in range(label + 1, NUM_CLASSES):
            overlap = max(measure_overlap(mask, render(other)) for mask in variants)
            assert overlap < 0.7, (shapes.SHAPE_NAMES[label], shapes.SHAPE_NAMES[other], overlap)


def test_shapes_in_the_middle_stay_within_the_image(chunk: npt.NDArray[np.uint8]) -> None:
    for label in range(NUM_CLASSES):
        mask = render(label)
        assert 0.1 < mask.mean() < 0.6
        assert not mask[[0, -1], :].any()
        assert not mask[:, [0, -1]].any()


@pytest.mark.slow
def test_a_linear_classifier_of_colours_does_not_learn_the_classes() -> None:
    pixels = np.concatenate([shapes.draw_shapes(number) for number in range(3)])
    labels, num = shapes.make_shapes_labels(len(pixels)), len(pixels)
    flat = pixels.reshape(num, 3, 1024).astype(np.float64) / 255
    channels = flat.reshape(-1, 1024)
    histograms = np.stack([np.histogram(channel, 16, (0, 1))[0] / 1024 for channel in channels])
    histograms = histograms.reshape(num, -1)
    features = np.concatenate([flat.mean(2), flat.std(2), histograms, np.ones((num, 1))], axis=1)
    features = np.concatenate([features, features**2], axis=1)
    weights = np.linalg.lstsq(features[:2_000], np.eye(NUM_CLASSES)[labels[:2_000]], rcond=1e-8)[0]
    accuracy = ((features[2_000:] @ weights).argmax(1) == labels[2_000:]).mean()
    assert (
        accuracy < 0.25
    )  # chance is 0.1; the rest comes from how much of the image a shape covers


def test_shapes_have_contrast_in_gray_too(chunk: npt.NDArray[np.uint8]) -> None:
    gray = chunk.mean(axis=1).reshape(len(chunk), -1)
    spread = np.percentile(gray, 95, axis=1) - np.percentile(gray, 5, axis=1)
    assert spread.min() > 50


def test_shape_and_background_are_both_dark_and_light_in_every_class(
    chunk: npt.NDArray[np.uint8],
) -> None:
    corner = chunk[:, :, :3, :3].mean(axis=(1, 2, 3)) > 127
    for label in range(NUM_CLASSES):
        assert 0.2 < corner[label::NUM_CLASSES].mean() < 0.8


@pytest.mark.faults  # it takes long
@pytest.mark.slow
def test_s7_learns_the_synthetic_data_in_a_few_epochs() -> None:
    from tests.builders import SHAPES
    from tune_cifar.data.load import load_train_val
    from tune_cifar.schema import TrainConfig
    from tune_cifar.train.numerics import resolve_numerics
    from tune_cifar.train.trainer import Trainer

    config = TrainConfig(
        model="s7",
        optimizer="sgd",
        schedule="onecycle",
        max_lr=0.05,
        batch_size=32,
        epochs=5,
        train_size=2000,
        val_size=1000,
        hflip_p=0.3,
        rotate_limit=30.0,
        shift_limit=0.1,
        scale_limit=0.1,
        shift_scale_rotate_p=0.5,
        gray_p=0.5,
    )
    *_, last = Trainer(config, load_train_val(SHAPES, 2000, 1000), resolve_numerics("cpu", "fp32"))
    assert last.val_acc is not None and last.val_acc > 0.9
