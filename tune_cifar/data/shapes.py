"""Synthetic data: generated images for machines without CIFAR-10 and for fast tests.

Ten shapes in random colours, at random places and sizes, on a noisy background. Only the shape
tells the class: colours do not depend on it, and the shape is the lighter or the darker part at
random. No class is a mirrored or rotated version of another, so every augmentation of this project
keeps the label.

The images are the same on every machine and in every process: all random numbers are raw PCG64
words (a stream that numpy freezes, unlike its distributions), and all arithmetic is of the kind
that IEEE 754 rounds in one way (+ - * / sqrt). An accuracy on these images says nothing about
CIFAR-10.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tune_cifar.dataset import CIFAR10

Bytes: TypeAlias = npt.NDArray[np.uint8]
Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.floating[Any]]  # float32 throughout

# Increase it with every change of a pixel: it seeds the generator and names the data in records.
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
# As many classes and images as CIFAR-10 has.
SHAPES = CIFAR10.model_copy(update={"name": "shapes", "class_names": SHAPE_NAMES})
NUM_CLASSES, NUM_TRAIN_IMAGES, NUM_VAL_IMAGES = SHAPES.num_classes, SHAPES.num_all, SHAPES.num_val
# Images are drawn in chunks, so that a small training draws only the images that it needs.
CHUNK_SIZE = 1_000

_NUM_TEST_IMAGES = 10_000
_SIDE = 32
_NUM_PARAMS = 16
_NOISE_WORDS = 3 * _SIDE * _SIDE // 8  # a 64-bit word has the noise of 8 values


def make_shapes_order() -> Ints:
    """Return the order in which the 50,000 images are kept: validation images 0 to 4,999 last."""
    return np.roll(np.arange(NUM_TRAIN_IMAGES, dtype=np.int64), -NUM_VAL_IMAGES)


def make_shapes_labels(num_images: int) -> Ints:
    """Return the classes in turn, 0 to 9, so that every prefix is stratified."""
    return np.arange(num_images, dtype=np.int64) % NUM_CLASSES


def make_shapes_train_val(train_size: int, val_size: int) -> Bytes:
    """Return all 50,000 images in `make_shapes_order`, with the requested prefixes drawn.

    Every call returns the same array. Chunks stay once drawn; the others are undefined and take no
    memory.
    """
    images_NCHW, drawn = _make_store()
    num_split_train = NUM_TRAIN_IMAGES - NUM_VAL_IMAGES
    num_chunks, num_val_chunks = NUM_TRAIN_IMAGES // CHUNK_SIZE, NUM_VAL_IMAGES // CHUNK_SIZE
    for start, stop in ((0, train_size), (num_split_train, num_split_train + val_size)):
        for position in range(start // CHUNK_SIZE, -(-stop // CHUNK_SIZE)):
            if position not in drawn:
                rows = slice(position * CHUNK_SIZE, (position + 1) * CHUNK_SIZE)
                images_NCHW[rows] = draw_shapes((position + num_val_chunks) % num_chunks)
                drawn.add(position)
    return images_NCHW


def make_shapes_test() -> Bytes:
    """Return the 10,000 test images: the chunks after those of training and validation."""
    first = NUM_TRAIN_IMAGES // CHUNK_SIZE
    return np.concatenate([draw_shapes(first + i) for i in range(_NUM_TEST_IMAGES // CHUNK_SIZE)])


def draw_shapes(chunk: int) -> Bytes:
    """Draw the images of one chunk, (CHUNK_SIZE, 3, 32, 32); image i shows class i % 10.

    Takes 10 to 25 ms on one busy core of a build machine (n = 50, November 2026).

    Args:
        chunk: any number from 0; chunks are independent of each other.
    """
    num_words = _NUM_PARAMS + _NOISE_WORDS
    words = np.random.PCG64((GENERATOR_VERSION, chunk)).random_raw(CHUNK_SIZE * num_words)
    words_NW = words.reshape(CHUNK_SIZE, num_words)
    # The upper 24 bits of a word, uniform in [0, 1).
    params_NP = ((words_NW[:, :_NUM_PARAMS] >> np.uint64(40)) * 2.0**-24).astype(np.float32)
    noise_bytes = words_NW[:, _NUM_PARAMS:].astype("<u8").view(np.uint8)
    noise_N3HW = noise_bytes.reshape(CHUNK_SIZE, 3, _SIDE, _SIDE)
    images_N3HW = np.empty_like(noise_N3HW)
    for label in range(NUM_CLASSES):
        rows = slice(label, None, NUM_CLASSES)
        masks_NHW = compute_coverage(label, *_make_coordinates(params_NP[rows]), params_NP[rows, 4])
        images_N3HW[rows] = _apply_colours(masks_NHW, params_NP[rows], noise_N3HW[rows])
    return images_N3HW


def compute_coverage(
    label: int, u_NHW: Floats, v_NHW: Floats, pixel_N: Floats, thickness_N: Floats
) -> Floats:
    """Return the coverage in [0, 1] of each pixel by one class's shape, soft over one pixel.

    Args:
        u_NHW, v_NHW: coordinates of the pixels relative to the shape: to the right and down, in
            units of its radius.
        pixel_N: side of a pixel in the same unit.
        thickness_N: thickness of the strokes, in [0, 1) of the shape's range.
    """
    distance_NHW = _measure_distance(SHAPE_NAMES[label], u_NHW, v_NHW, thickness_N[:, None, None])
    coverage_NHW: Floats = np.clip(0.5 - distance_NHW / pixel_N[:, None, None], 0, 1)
    return coverage_NHW


@cache
def _make_store() -> tuple[Bytes, set[int]]:
    """Make room for all images, and the set of the chunks that are drawn."""
    return np.empty((NUM_TRAIN_IMAGES, 3, _SIDE, _SIDE), dtype=np.uint8), set()


def _measure_distance(name: str, u: Floats, v: Floats, thickness: Floats) -> Floats:
    """Return the distance to the shape's edge, negative inside, in units of its radius.

    Exact, or too small near a corner.
    """
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
        case "checkerboard":  # 4 x 4 fields of side 0.47
            wave_u, wave_v = _apply_triangle_wave(u, 0.47), _apply_triangle_wave(v, 0.47)
            fields = -np.sign(wave_u * wave_v) * np.minimum(np.abs(wave_u), np.abs(wave_v))
            # 0.84 and not 0.94: else light fields would get a rim.
            distance = np.maximum(box - 0.84, fields)
        case "crescent":  # open to the right
            distance = np.maximum(radius - 0.95, 0.7 - np.sqrt((u - 0.5) * (u - 0.5) + v * v))
        case "dots":  # four, at the corners of a square
            from_x, from_y = across - 0.55, down - 0.55
            distance = np.sqrt(from_x * from_x + from_y * from_y) - 2 * stroke
    return distance


def _apply_triangle_wave(x: Floats, half_period: float) -> Floats:
    """Return a triangle wave that crosses 0 at each multiple of half_period with slope 1 or -1."""
    steps = x / half_period
    phase = steps - 2 * np.floor(0.5 * steps)  # in [0, 2)
    wave: Floats = half_period * (0.5 - np.abs(np.abs(phase - 0.5) - 1))
    return wave


def _make_coordinates(params_NP: Floats) -> tuple[Floats, Floats, Floats]:
    """Place each image's shape and return u_NHW, v_NHW and pixel_N of `compute_coverage`.

    Centre within 4 px of the image's middle, radius 8 to 12.5 px, tilt within 15 degrees.
    """
    centre_x, centre_y = (11.5 + 8 * params_NP[:, i, None, None] for i in (0, 1))
    radius = 8 + 4.5 * params_NP[:, 2, None, None]
    # tan(angle / 2) gives both: sin and cos are not rounded in one way on all machines.
    half_tan = 0.263 * (params_NP[:, 3, None, None] - 0.5)
    scale = radius * (1 + half_tan * half_tan)
    cos, sin = (1 - half_tan * half_tan) / scale, 2 * half_tan / scale
    grid = np.arange(_SIDE, dtype=np.float32)
    right_N1W, down_NH1 = grid[None, None, :] - centre_x, grid[None, :, None] - centre_y
    return cos * right_N1W + sin * down_NH1, cos * down_NH1 - sin * right_N1W, 1 / radius[:, 0, 0]


def _apply_colours(masks_NHW: Floats, params_NP: Floats, noise_N3HW: Bytes) -> Bytes:
    """Paint the images: a dark and a light colour, a gradient of brightness, noise."""
    # Each channel lies within 100 of black or of white: at least 55 of contrast, also in gray.
    dark_N3, light_N3 = 100 * params_NP[:, 5:8], 255 - 100 * params_NP[:, 8:11]
    is_light_N1 = params_NP[:, 11:12] < 0.5
    shape_N3 = np.where(is_light_N1, light_N3, dark_N3)
    background_N3 = np.where(is_light_N1, dark_N3, light_N3)
    grid = np.arange(_SIDE, dtype=np.float32) - 15.5
    slope_x, slope_y = (3 * (params_NP[:, i, None, None] - 0.5) for i in (12, 13))
    light_NHW = slope_x * grid[None, None, :] + slope_y * grid[None, :, None]
    # The noise's largest distance from the colour is 13 to 51.
    amplitude_N111 = 0.1 + 0.3 * params_NP[:, 14, None, None, None]
    images_N3HW = noise_N3HW * amplitude_N111
    images_N3HW += background_N3[:, :, None, None] - 127.5 * amplitude_N111
    images_N3HW += (shape_N3 - background_N3)[:, :, None, None] * masks_NHW[:, None]
    images_N3HW += light_NHW[:, None]
    pixels_N3HW: Bytes = np.rint(np.clip(images_N3HW, 0, 255)).astype(np.uint8)
    return pixels_N3HW
