"""`--data shapes`: a generated stand-in for CIFAR-10, for machines without the data set and for fast tests.

Ten forms in random colours, at random places and sizes, on a noisy ground. The class lies in the form alone: colours
are drawn without regard to it, and whether the form is the lighter or the darker part is a coin. No class is the mirror
image of another, nor another one turned, so every augmentation of this project keeps the label.

The same images come out on every machine and in every process: all dice are raw PCG64 words (a stream that numpy
freezes, unlike its distributions), and all arithmetic is of the kind that IEEE 754 rounds in one way (+ - * / sqrt).
A figure measured on these images says nothing about CIFAR-10.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tune_cifar.schema import NUM_CLASSES, NUM_TRAIN_IMAGES, NUM_VAL_IMAGES

Bytes: TypeAlias = npt.NDArray[np.uint8]
Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.floating[Any]]  # float32 throughout

# Bump it with every change that alters a pixel: it seeds the dice and names the data in every record.
GENERATOR_VERSION = 1
SHAPES_DIGEST = hashlib.sha256(f"tune_cifar shapes {GENERATOR_VERSION}".encode()).hexdigest()[:16]
SHAPE_NAMES = (
    "disk",
    "ring",
    "hourglass",
    "frame",
    "triangle",
    "plus",
    "stripes",
    "checkerboard",
    "crescent",
    "dots",
)
# Images are seeded and drawn a chunk at a time, so that a small training pays only for the images that it sees.
CHUNK_SIZE = 1_000

_NUM_TEST_IMAGES = 10_000
_SIDE = 32
_NUM_PARAMS = 16
_NOISE_WORDS = 3 * _SIDE * _SIDE // 8


def make_shapes_order() -> Ints:
    """The order in which the 50,000 generated images are kept: 45,000 that train, then the first 5,000 to validate."""
    return np.roll(np.arange(NUM_TRAIN_IMAGES, dtype=np.int64), -NUM_VAL_IMAGES)


def make_shapes_labels(num_images: int) -> Ints:
    """Round robin in every part, so that every prefix is stratified."""
    return np.arange(num_images, dtype=np.int64) % NUM_CLASSES


def make_shapes_train_val(train_size: int, val_size: int) -> Bytes:
    """All 50,000 images in `make_shapes_order`, of which only the wanted prefixes of both parts are sure to be drawn.

    Every call returns the same array: chunks drawn once stay, and room that is not drawn takes no memory.
    """
    images_NCHW, drawn = _make_store()
    num_split_train = NUM_TRAIN_IMAGES - NUM_VAL_IMAGES
    for start, stop in ((0, train_size), (num_split_train, num_split_train + val_size)):
        for place in range(start // CHUNK_SIZE, -(-stop // CHUNK_SIZE)):
            if place not in drawn:
                chunk = (place + NUM_VAL_IMAGES // CHUNK_SIZE) % (NUM_TRAIN_IMAGES // CHUNK_SIZE)
                images_NCHW[place * CHUNK_SIZE : (place + 1) * CHUNK_SIZE] = draw_shapes(chunk)
                drawn.add(place)
    return images_NCHW


def make_shapes_test() -> Bytes:
    """10,000 images that no training and no validation sees: the chunks after theirs."""
    first = NUM_TRAIN_IMAGES // CHUNK_SIZE
    return np.concatenate([draw_shapes(first + i) for i in range(_NUM_TEST_IMAGES // CHUNK_SIZE)])


@cache
def _make_store() -> tuple[Bytes, set[int]]:
    return np.empty((NUM_TRAIN_IMAGES, 3, _SIDE, _SIDE), dtype=np.uint8), set()


def draw_shapes(chunk: int) -> Bytes:
    """The images of one chunk, (CHUNK_SIZE, 3, 32, 32); image i shows class i % 10.

    Takes 10 to 25 ms on one busy core of a build machine (n = 50, November 2026).

    Args:
        chunk: any number from 0; chunks are independent of each other.
    """
    words = np.random.PCG64((GENERATOR_VERSION, chunk)).random_raw(
        CHUNK_SIZE * (_NUM_PARAMS + _NOISE_WORDS)
    )
    words_NW = words.reshape(CHUNK_SIZE, _NUM_PARAMS + _NOISE_WORDS)
    params_NP = ((words_NW[:, :_NUM_PARAMS] >> np.uint64(40)) * 2.0**-24).astype(
        np.float32
    )  # uniform in [0, 1)
    noise_N3HW = (
        words_NW[:, _NUM_PARAMS:].astype("<u8").view(np.uint8).reshape(CHUNK_SIZE, 3, _SIDE, _SIDE)
    )
    images_N3HW = np.empty((CHUNK_SIZE, 3, _SIDE, _SIDE), dtype=np.uint8)
    for label in range(NUM_CLASSES):
        rows = slice(label, None, NUM_CLASSES)
        masks_NHW = apply_form(label, *_make_coordinates(params_NP[rows]), params_NP[rows, 4])
        images_N3HW[rows] = _apply_colours(masks_NHW, params_NP[rows], noise_N3HW[rows])
    return images_N3HW


def apply_form(
    label: int, u_NHW: Floats, v_NHW: Floats, pixel_N: Floats, thickness_N: Floats
) -> Floats:
    """Coverage in [0, 1] of one class's form, soft over one pixel.

    Args:
        u_NHW, v_NHW: coordinates of the pixels in the form's own frame: rightwards, downwards, in units of its radius.
        pixel_N: side of a pixel in the same unit.
        thickness_N: in [0, 1): how thick the strokes are, within the form's range.
    """
    distance_NHW = _measure_distance(SHAPE_NAMES[label], u_NHW, v_NHW, thickness_N[:, None, None])
    coverage_NHW: Floats = np.clip(0.5 - distance_NHW / pixel_N[:, None, None], 0, 1)
    return coverage_NHW


def _measure_distance(name: str, u: Floats, v: Floats, thickness: Floats) -> Floats:
    """Distance to the form's edge (exact, or less beside a corner), negative inside, in units of its radius."""
    across, down = np.abs(u), np.abs(v)
    box, radius = np.maximum(across, down), np.sqrt(u * u + v * v)
    stroke = 0.14 + 0.08 * thickness
    distance: Floats
    match name:
        case "disk":
            distance = radius - 0.85
        case "ring":
            distance = np.abs(radius - 0.8) - stroke
        case "hourglass":  # not a square: a disk beside it takes s7 too long to tell apart
            distance = np.maximum(box - 0.95, 0.7 * (across - down) - 0.05)
        case "frame":
            distance = np.abs(box - 0.75) - stroke
        case "triangle":  # equilateral, point up
            distance = np.maximum(v, 0.866 * across - 0.5 * v) - 0.55
        case "plus":
            distance = np.maximum(box - 0.95, np.minimum(across, down) - 1.5 * stroke)
        case "stripes":
            distance = np.maximum(box - 0.95, np.minimum(np.abs(down - 0.7), down) - stroke)
        case (
            "checkerboard"
        ):  # 4 x 4 fields of side 0.47; the board is cut 0.1 short, lest light fields get a rim
            wave_u, wave_v = _apply_triangle_wave(u, 0.47), _apply_triangle_wave(v, 0.47)
            fields = -np.sign(wave_u * wave_v) * np.minimum(np.abs(wave_u), np.abs(wave_v))
            distance = np.maximum(box - 0.84, fields)
        case "crescent":  # open to the right
            distance = np.maximum(radius - 0.95, 0.7 - np.sqrt((u - 0.5) * (u - 0.5) + v * v))
        case "dots":  # four, at the corners of a square
            distance = (
                np.sqrt((across - 0.55) * (across - 0.55) + (down - 0.55) * (down - 0.55))
                - 2 * stroke
            )
    return distance


def _apply_triangle_wave(x: Floats, half_period: float) -> Floats:
    """A triangle wave that crosses 0 at every multiple of half_period with slope 1 or -1."""
    steps = x / half_period
    phase = steps - 2 * np.floor(0.5 * steps)  # in [0, 2)
    wave: Floats = half_period * (0.5 - np.abs(np.abs(phase - 0.5) - 1))
    return wave


def _make_coordinates(params_NP: Floats) -> tuple[Floats, Floats, Floats]:
    """Where each image's form stands: centre within 4 px of the middle, radius 8-12.5 px, tilt within 15 degrees."""
    centre_x, centre_y = (11.5 + 8 * params_NP[:, i, None, None] for i in (0, 1))
    radius = 8 + 4.5 * params_NP[:, 2, None, None]
    half_tan = 0.263 * (
        params_NP[:, 3, None, None] - 0.5
    )  # tan(angle / 2): sin and cos are not rounded in one way
    scale = radius * (1 + half_tan * half_tan)
    cos, sin = (1 - half_tan * half_tan) / scale, 2 * half_tan / scale
    grid = np.arange(_SIDE, dtype=np.float32)
    right_N1W, down_NH1 = grid[None, None, :] - centre_x, grid[None, :, None] - centre_y
    return cos * right_N1W + sin * down_NH1, cos * down_NH1 - sin * right_N1W, 1 / radius[:, 0, 0]


def _apply_colours(masks_NHW: Floats, params_NP: Floats, noise_N3HW: Bytes) -> Bytes:
    """Paint the forms: a dark and a light colour (a coin says which is the ground's), a slope of light, noise."""
    # Each channel lies within 100 of black or of white: at least 55 of contrast, also in gray.
    dark_N3, light_N3 = 100 * params_NP[:, 5:8], 255 - 100 * params_NP[:, 8:11]
    is_light_N1 = params_NP[:, 11:12] < 0.5
    form_N3, ground_N3 = (
        np.where(is_light_N1, light_N3, dark_N3),
        np.where(is_light_N1, dark_N3, light_N3),
    )
    grid = np.arange(_SIDE, dtype=np.float32) - 15.5
    slope_x, slope_y = (3 * (params_NP[:, i, None, None] - 0.5) for i in (12, 13))
    light_NHW = slope_x * grid[None, None, :] + slope_y * grid[None, :, None]
    amplitude_N111 = (
        0.1 + 0.3 * params_NP[:, 14, None, None, None]
    )  # noise within 13 to 51 of the colour
    images_N3HW = noise_N3HW * amplitude_N111
    images_N3HW += ground_N3[:, :, None, None] - 127.5 * amplitude_N111
    images_N3HW += (form_N3 - ground_N3)[:, :, None, None] * masks_NHW[:, None]
    images_N3HW += light_NHW[:, None]
    pixels_N3HW: Bytes = np.rint(np.clip(images_N3HW, 0, 255)).astype(np.uint8)
    return pixels_N3HW
