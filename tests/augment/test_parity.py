"""The two interpreters of a policy give equal images for equal draws, and do what the names say."""

import functools
from collections.abc import Callable
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from tune_cifar.augment.batched import (
    CropDraws,
    CutoutDraws,
    Draws,
    GrayDraws,
    HFlipDraws,
    ShiftScaleRotateDraws,
    apply_normalize,
    apply_pixel_ops,
    change_all_and_choose,
    change_some,
    cut_hole,
    draw_policy,
    drop_color,
    flip,
    warp,
)
from tune_cifar.augment.policies import (
    Crop,
    Cutout,
    Gray,
    HFlip,
    PixelOp,
    Policy,
    ShiftScaleRotate,
    mean_color,
)
from tune_cifar.augment.reference import apply_pixel_ops_reference
from tune_cifar.dataset import CIFAR10

S7_WARP = ShiftScaleRotate(0.1, 0.1, 30.0, 0.5)
S7: Policy = (HFlip(0.3), S7_WARP, Cutout(16, 0.5), Gray(0.5))
S10: Policy = (Crop(4), HFlip(0.5), Cutout(8, 0.5))
EVERYTHING: Policy = (Crop(4), HFlip(0.5), S7_WARP, Cutout(16, 0.5), Gray(0.5))

# Measured with OpenCV 5.0 for the three warps below: pixels differ by at most 1 level, and 1 in
# 6,300 to 9,900 (1,000 noise images, the hardest) or 1 in 30,000 to 43,000 (4,000 real ones)
# differs at all: sums near a half are rounded to either side. Warps whose coordinates are round
# numbers (scale 1.25) have a hundred times as many.
WARP_MAX_DIFFERENCE = 1
WARP_DIFFERING_FRACTION = 1e-3


@functools.cache
def noise_images(num_images: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (num_images, 3, 32, 32), dtype=torch.uint8, generator=generator)


def draw(policy: Policy, num_images: int = 200, seed: int = 7) -> Draws:
    return draw_policy(policy, num_images, torch.Generator().manual_seed(seed))


def columns(draws: Draws) -> list[Tensor]:
    return [column for op_draws in draws for column in op_draws]


def map_columns(function: Callable[[Tensor], Tensor], draws: Draws) -> Any:
    return tuple(type(op_draws)(*map(function, op_draws)) for op_draws in draws)


def apply_one(op: PixelOp, image_CHW: Tensor, draws: Any) -> Tensor:
    return apply_pixel_ops((op,), image_CHW[None], (draws,))[0]


def to_hwc(image_CHW: Tensor) -> Any:
    return image_CHW.permute(1, 2, 0).contiguous().numpy()


def to_chw(image_HWC: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_HWC)).permute(2, 0, 1)


def number(value: float) -> Tensor:
    return torch.tensor([value])


YES = torch.tensor([True])


def check_warp(ours: Tensor, theirs: Tensor) -> None:
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= WARP_MAX_DIFFERENCE
    assert (difference > 0).float().mean() < WARP_DIFFERING_FRACTION


# Both interpreters, equal draws


@pytest.mark.parametrize(
    "op",
    [
        Crop(1),
        Crop(4),
        Crop(16),
        HFlip(0.5),
        HFlip(1.0),
        Cutout(1, 1.0),
        Cutout(8, 0.5),
        Cutout(32, 0.5),
        Gray(0.5),
    ],
    ids=str,
)
def test_batched_equals_reference_on_uint8_for_the_same_draws(op: PixelOp) -> None:
    policy = (op,)
    ours = apply_pixel_ops(policy, noise_images(), draw(policy))
    assert not torch.equal(ours, noise_images())
    assert torch.equal(ours, apply_pixel_ops_reference(policy, noise_images(), draw(policy)))


@pytest.mark.parametrize(
    "op",
    [S7_WARP, ShiftScaleRotate(0.0625, 0.1, 45.0, 1.0), ShiftScaleRotate(0.5, 0.5, 180.0, 1.0)],
    ids=["s7", "s6 and s8", "strongest"],
)
def test_batched_warp_equals_reference_within_rounding_for_the_same_draws(op: PixelOp) -> None:
    policy = (op,)
    ours = apply_pixel_ops(policy, noise_images(), draw(policy))
    assert (ours != noise_images()).float().mean() > 0.4
    check_warp(ours, apply_pixel_ops_reference(policy, noise_images(), draw(policy)))


def test_whole_policy_of_s7_equals_reference_but_for_rounding() -> None:
    ours = apply_pixel_ops(S7, noise_images(), draw(S7))
    theirs = apply_pixel_ops_reference(S7, noise_images(), draw(S7))
    check_warp(ours, theirs)


def test_gray_equals_albumentations_for_all_colors() -> None:
    code = torch.arange(256**3, dtype=torch.int32).view(16, 1, 1024, 1024)
    colors = torch.cat([(code >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)], dim=1)
    for image in colors:
        theirs = to_chw(A.ToGray(p=1.0)(image=to_hwc(image))["image"])
        assert torch.equal(apply_one(Gray(1.0), image, GrayDraws(YES)), theirs)


@pytest.mark.parametrize(
    ("place", "change"),
    [(1, flip), (2, warp), (3, functools.partial(cut_hole, Cutout(16, 0.5))), (4, drop_color)],
    ids=["flip", "warp", "hole", "gray"],
)
def test_changing_some_images_equals_changing_all_and_choosing(place: int, change: Any) -> None:
    draws: Any = draw(EVERYTHING)[place]
    some = change_some(noise_images(), draws, change)
    assert torch.equal(some, change_all_and_choose(noise_images(), draws, change))
    assert torch.equal(some[~draws.selected], noise_images()[~draws.selected])


# albumentations' own public transforms, as a user would write them


def test_crop_means_pad_if_needed_and_crop() -> None:
    image = noise_images()[0]
    pad = A.PadIfNeeded(40, 40, border_mode=cv2.BORDER_REFLECT_101, p=1.0)
    padded = pad(image=to_hwc(image))["image"]
    for top, left in [(0, 0), (0, 8), (8, 0), (3, 6), (4, 4)]:
        crop = A.Crop(x_min=left, y_min=top, x_max=left + 32, y_max=top + 32, p=1.0)
        theirs = crop(image=padded)["image"]
        draws = CropDraws(torch.tensor([top]), torch.tensor([left]))
        assert torch.equal(apply_one(Crop(4), image, draws), to_chw(theirs))


def test_flip_means_horizontal_flip() -> None:
    image = noise_images()[0]
    theirs = A.HorizontalFlip(p=1.0)(image=to_hwc(image))["image"]
    assert torch.equal(apply_one(HFlip(1.0), image, HFlipDraws(YES)), to_chw(theirs))


@pytest.mark.parametrize(
    ("angle", "scale", "x", "y"),
    [
        (20.0, 1.0, 0, 0),
        (-35.0, 1.0, 0, 0),
        (0.0, 1.23, 0, 0),
        (0.0, 1.0, 3, -2),
        (20.0, 0.9, -3, 5),
        (180.0, 1, 0, 0),
    ],
)
def test_warp_means_affine_with_the_same_signs(angle: float, scale: float, x: int, y: int) -> None:
    affine = A.Affine(
        rotate=(angle, angle),
        scale=(scale, scale),
        translate_px={"x": (x, x), "y": (y, y)},
        border_mode=cv2.BORDER_REFLECT_101,
        p=1.0,
    )
    draws = ShiftScaleRotateDraws(YES, number(angle), number(scale), number(x / 32), number(y / 32))
    images = noise_images()[:20]
    ours = [apply_one(S7_WARP, image, draws) for image in images]
    theirs = [to_chw(affine(image=to_hwc(image))["image"]) for image in images]
    check_warp(torch.stack(ours), torch.stack(theirs))


def test_warp_shifts_by_fractions_of_a_pixel_where_albumentations_truncates_them() -> None:
    image = noise_images()[0]
    affine = functools.partial(A.Affine, border_mode=cv2.BORDER_REFLECT_101, p=1.0)
    by_percent = affine(translate_percent={"x": (0.1, 0.1), "y": (0.0, 0.0)})
    by_pixels = affine(translate_px={"x": (3, 3), "y": (0, 0)})
    truncated = by_pixels(image=to_hwc(image))["image"]
    assert np.array_equal(by_percent(image=to_hwc(image))["image"], truncated)
    matrix = np.array([[1.0, 0.0, 3.2], [0.0, 1.0, 0.0]])
    expected = cv2.warpAffine(to_hwc(image), matrix, (32, 32), borderMode=cv2.BORDER_REFLECT_101)
    draws = ShiftScaleRotateDraws(YES, number(0.0), number(1.0), number(0.1), number(0.0))
    ours = apply_one(S7_WARP, image, draws)
    check_warp(ours, to_chw(expected))
    assert not torch.equal(ours, to_chw(truncated))


def test_cutout_means_coarse_dropout() -> None:
    transform = A.CoarseDropout((1, 1), (8, 8), (8, 8), fill=mean_color(CIFAR10), p=1.0)
    transform.set_random_seed(3)
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    for _ in range(20):
        theirs = to_chw(transform(image=to_hwc(white))["image"])
        top, left = (theirs[0] != 255).nonzero()[0].tolist()
        draws = CutoutDraws(YES, torch.tensor([top]), torch.tensor([left]))
        assert torch.equal(apply_one(Cutout(8, 1.0), white, draws), theirs)


def test_gray_means_to_gray_with_its_defaults() -> None:
    image = noise_images()[0]
    theirs = A.ToGray(p=1.0)(image=to_hwc(image))["image"]
    assert torch.equal(apply_one(Gray(1.0), image, GrayDraws(YES)), to_chw(theirs))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalize_means_normalize(memory_format: torch.memory_format) -> None:
    theirs = A.Normalize(CIFAR10.mean, CIFAR10.std, p=1.0)(image=to_hwc(noise_images()[0]))["image"]
    ours = apply_normalize(noise_images()[:1], CIFAR10, memory_format)
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=memory_format)
    assert (ours[0] - to_chw(theirs)).abs().max() < 1e-6


# Images whose result is known


@pytest.mark.parametrize(
    "apply", [apply_pixel_ops, apply_pixel_ops_reference], ids=["batched", "reference"]
)
def test_flip_swaps_left_and_right_and_leaves_top_and_channels(apply: Any) -> None:
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[0, 0, :5, :10] = 200
    expected = torch.zeros_like(image)
    expected[0, 0, :5, -10:] = 200
    assert torch.equal(apply((HFlip(1.0),), image, (HFlipDraws(YES),)), expected)


@pytest.mark.parametrize(
    "apply", [apply_pixel_ops, apply_pixel_ops_reference], ids=["batched", "reference"]
)
def test_crop_borders_mirror_without_repeating_the_edge(apply: Any) -> None:
    policy, ramp = (Crop(4),), torch.arange(32, dtype=torch.uint8)
    to_the_right = ramp.expand(1, 3, 32, 32).contiguous()
    leftmost = CropDraws(top=torch.tensor([4]), left=torch.tensor([0]))
    row = apply(policy, to_the_right, (leftmost,))[0, 0, 0]
    assert row.tolist() == [4, 3, 2, 1, *range(28)]
    lowest = CropDraws(top=torch.tensor([8]), left=torch.tensor([4]))
    column = apply(policy, to_the_right.mT, (lowest,))[0, 0, :, 0]
    assert column.tolist() == [*range(4, 32), 30, 29, 28, 27]


@pytest.mark.parametrize(
    "apply", [apply_pixel_ops, apply_pixel_ops_reference], ids=["batched", "reference"]
)
def test_warp_turns_counter_clockwise_and_shifts_right_and_down(apply: Any) -> None:
    policy, image = (S7_WARP,), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[..., 4:8, 20:22] = 255
    quarter = ShiftScaleRotateDraws(YES, number(90.0), number(1.0), number(0.0), number(0.0))
    assert torch.equal(apply(policy, image, (quarter,)), image.rot90(1, (2, 3)))
    shift = ShiftScaleRotateDraws(YES, number(0.0), number(1.0), number(1 / 32), number(3 / 32))
    assert torch.equal(apply(policy, image, (shift,)), image.roll((3, 1), (2, 3)))


def test_warp_that_moves_nothing_returns_the_image() -> None:
    still = ShiftScaleRotateDraws(YES, number(0.0), number(1.0), number(0.0), number(0.0))
    assert torch.equal(apply_one(S7_WARP, noise_images()[0], still), noise_images()[0])


@pytest.mark.parametrize("size", [1, 8, 16, 31, 32])
def test_hole_is_one_square_of_the_mean_color_inside_the_image(size: int) -> None:
    policy: Policy = (Cutout(size, 1.0),)
    white = torch.full((500, 3, 32, 32), 255, dtype=torch.uint8)
    holed = apply_pixel_ops(policy, white, draw(policy, 500))
    inside = (holed != 255).any(dim=1)
    assert (inside.any(dim=2).sum(1) == size).all() and (inside.any(dim=1).sum(1) == size).all()
    assert (inside.sum((1, 2)) == size * size).all()
    assert (holed.permute(0, 2, 3, 1)[inside] == torch.tensor(mean_color(CIFAR10))).all()


def test_hole_is_zero_after_normalize() -> None:
    policy: Policy = (Cutout(32, 1.0),)
    holed = apply_pixel_ops(policy, noise_images(), draw(policy))
    assert apply_normalize(holed, CIFAR10).abs().max() < 0.01


def test_normalize_follows_its_definition() -> None:
    mean, std = torch.tensor([CIFAR10.mean, CIFAR10.std], dtype=torch.float64).view(2, 1, 3, 1, 1)
    expected = (noise_images().double() / 255 - mean) / std
    assert (apply_normalize(noise_images(), CIFAR10) - expected).abs().max() < 1e-6


# Purity and refusals


@pytest.mark.parametrize(
    "apply", [apply_pixel_ops, apply_pixel_ops_reference], ids=["batched", "reference"]
)
def test_applying_a_policy_is_pure(apply: Any) -> None:
    images, draws = noise_images().clone(), draw(EVERYTHING)
    copies = [column.clone() for column in columns(draws)]
    state = torch.get_rng_state()
    first, second = apply(EVERYTHING, images, draws), apply(EVERYTHING, images, draws)
    assert torch.equal(first, second)
    assert torch.equal(images, noise_images()) and torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, copies, columns(draws)))


def test_result_does_not_depend_on_the_other_images_of_the_batch() -> None:
    draws = draw(EVERYTHING)
    parts = []
    for rows in (slice(0, 1), slice(1, 65), slice(65, 200)):
        part = map_columns(lambda column, rows=rows: column[rows], draws)
        parts.append(apply_pixel_ops(EVERYTHING, noise_images()[rows], part))
    assert torch.equal(torch.cat(parts), apply_pixel_ops(EVERYTHING, noise_images(), draws))


def test_result_does_not_depend_on_the_memory_format_of_the_images() -> None:
    draws = draw(EVERYTHING)
    channels_last = noise_images().contiguous(memory_format=torch.channels_last)
    expected = apply_pixel_ops(EVERYTHING, noise_images(), draws)
    assert torch.equal(apply_pixel_ops(EVERYTHING, channels_last, draws), expected)


def test_images_that_are_not_uint8_are_refused() -> None:
    normalized = apply_normalize(noise_images(), CIFAR10)
    with pytest.raises(TypeError, match="images must be uint8, got torch"):
        apply_normalize(normalized, CIFAR10)
    with pytest.raises(TypeError, match="images must be uint8, got torch"):
        apply_pixel_ops(S10, normalized, draw(S10))


def test_draws_of_another_policy_are_refused() -> None:
    with pytest.raises(TypeError, match="draws must be this policy's, got GrayDraws for HFlip"):
        apply_pixel_ops((HFlip(0.5),), noise_images(), draw((Gray(0.5),)))


def test_reference_leaves_opencv_single_threaded() -> None:
    assert cv2.getNumThreads() == 1


# CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [S7, S10, EVERYTHING], ids=["s7", "s10", "everything"])
def test_cuda_equals_cpu_for_the_same_draws(policy: Policy) -> None:
    draws = draw(policy)
    cuda_draws = map_columns(Tensor.cuda, draws)
    on_cuda = apply_pixel_ops(policy, noise_images().cuda(), cuda_draws).cpu()
    check_warp(on_cuda, apply_pixel_ops(policy, noise_images(), draws))
    if policy is S10:
        assert torch.equal(on_cuda, apply_pixel_ops(policy, noise_images(), draws))
    normalized = apply_normalize(noise_images().cuda(), CIFAR10)
    assert (normalized.cpu() - apply_normalize(noise_images(), CIFAR10)).abs().max() < 1e-6


@pytest.mark.gpu
def test_cuda_never_makes_the_host_wait() -> None:
    images, generator = noise_images().cuda(), torch.Generator("cuda").manual_seed(1)
    augmented = apply_pixel_ops(EVERYTHING, images, draw_policy(EVERYTHING, len(images), generator))
    apply_normalize(augmented, CIFAR10, torch.channels_last)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draws = draw_policy(EVERYTHING, len(images), generator)
        augmented = apply_pixel_ops(EVERYTHING, images, draws)
        result = apply_normalize(augmented, CIFAR10, torch.channels_last)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.is_cuda and all(column.is_cuda for column in columns(draws))
    assert result.isfinite().all()
