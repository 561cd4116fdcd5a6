"""The draws of a policy: frequencies, ranges, independence, reproducibility.

Bounds are 5 sigma, seeds are fixed.
"""

import math
from typing import Any

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
    alternate_flips,
    draw_policy,
)
from tune_cifar.augment.policies import (
    Crop,
    Cutout,
    Gray,
    HFlip,
    Policy,
    ShiftScaleRotate,
)

NUM_IMAGES = 20_000
WARP = ShiftScaleRotate(shift_limit=0.1, scale_limit=0.2, rotate_limit=30.0, p=0.6)
POLICY: Policy = (Crop(4), HFlip(0.3), WARP, Cutout(8, 0.5), Gray(0.7))


def make_generator(seed: int = 20) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(policy: Policy = POLICY, num_images: int = NUM_IMAGES, seed: int = 20) -> Any:
    """Typed Any: each test knows which operation's draws are at which place."""
    return draw_policy(policy, num_images, make_generator(seed))


def columns(draws: Draws) -> list[Tensor]:
    return [column for op_draws in draws for column in op_draws]


def are_equal(a: Draws, b: Draws) -> bool:
    pairs = zip(columns(a), columns(b), strict=True)
    return all(left.dtype == right.dtype and torch.equal(left, right) for left, right in pairs)


def test_draws_hold_one_entry_for_each_operation() -> None:
    kinds = [CropDraws, HFlipDraws, ShiftScaleRotateDraws, CutoutDraws, GrayDraws]
    assert [type(op_draws) for op_draws in draw()] == kinds
    assert all(column.shape == (NUM_IMAGES,) for column in columns(draw()))


@pytest.mark.parametrize(("place", "p"), [(1, 0.3), (2, 0.6), (3, 0.5), (4, 0.7)])
def test_selected_frequency_is_the_probability(place: int, p: float) -> None:
    sigma = math.sqrt(p * (1 - p) / NUM_IMAGES)
    assert abs(draw()[place].selected.float().mean().item() - p) < 5 * sigma


def test_probability_one_selects_every_image() -> None:
    policy: Policy = (HFlip(1.0), Cutout(8, 1.0), Gray(1.0))
    assert all(op_draws.selected.all() for op_draws in draw(policy))


@pytest.mark.parametrize(
    ("place", "name", "num_values"),
    [(0, "top", 9), (0, "left", 9), (3, "top", 25), (3, "left", 25)],
)
def test_integer_draws_hit_every_place_equally_often(
    place: int, name: str, num_values: int
) -> None:
    values = getattr(draw()[place], name)
    counts = values.bincount(minlength=num_values)
    assert len(counts) == num_values and values.min() == 0
    p = 1 / num_values
    assert ((counts / NUM_IMAGES - p).abs() < 5 * math.sqrt(p * (1 - p) / NUM_IMAGES)).all()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("angle", -30, 30), ("scale", 0.8, 1.2), ("shift_x", -0.1, 0.1), ("shift_y", -0.1, 0.1)],
)
def test_real_draws_are_uniform_between_their_limits(name: str, low: float, high: float) -> None:
    values = getattr(draw()[2], name).double().sort().values
    assert low - 1e-6 <= values[0] and values[-1] <= high + 1e-6
    empirical = (torch.arange(NUM_IMAGES) + 0.5) / NUM_IMAGES
    distance = ((values - low) / (high - low) - empirical).abs().max().item()
    # Kolmogorov-Smirnov: a uniform sample exceeds 2.7 / sqrt(n) with probability 1e-6.
    assert distance < 2.7 / math.sqrt(NUM_IMAGES)


def test_all_draws_are_pairwise_uncorrelated() -> None:
    correlation = torch.corrcoef(torch.stack([column.double() for column in columns(draw())]))
    off_diagonal = correlation - torch.eye(len(correlation))
    assert off_diagonal.abs().max() < 5 / math.sqrt(NUM_IMAGES)


def test_neighbouring_images_are_uncorrelated() -> None:
    for column in columns(draw()):
        pair = torch.stack([column[:-1].double(), column[1:].double()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 / math.sqrt(NUM_IMAGES)


def test_different_images_get_different_draws() -> None:
    warp = draw(num_images=512)[2]
    assert len(torch.unique(torch.stack(warp[1:], dim=1), dim=0)) == 512


def test_largest_uniform_number_stays_below_every_count() -> None:
    largest = torch.tensor(1 - 2**-24)
    assert largest < 1
    assert all((largest * count).long() == count - 1 for count in range(1, 34))


def test_equal_generator_state_gives_equal_draws_and_another_seed_gives_others() -> None:
    assert are_equal(draw(seed=1), draw(seed=1))
    assert not are_equal(draw(seed=1), draw(seed=2))


def test_draws_continue_after_the_generator_state_is_restored() -> None:
    generator = make_generator()
    draw_policy(POLICY, 100, generator)
    state = generator.get_state()
    expected = [draw_policy(POLICY, 100, generator) for _ in range(2)]
    resumed = torch.Generator()
    resumed.set_state(state)
    assert all(are_equal(draws, draw_policy(POLICY, 100, resumed)) for draws in expected)
    assert not are_equal(*expected)


def test_draws_do_not_depend_on_how_images_are_divided_into_batches() -> None:
    generator = make_generator()
    parts = [columns(draw_policy(POLICY, size, generator)) for size in (128, 1, 128, 43)]
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    at_once = columns(draw(num_images=300))
    assert all(torch.equal(a, b) for a, b in zip(joined, at_once, strict=True))


def test_draws_of_an_operation_do_not_depend_on_the_other_operations() -> None:
    for op, op_draws in zip(POLICY, draw(), strict=True):
        assert are_equal(draw((op,)), (op_draws,))


def test_draws_of_the_next_batch_do_not_depend_on_the_policy() -> None:
    states = []
    for policy in (POLICY, (HFlip(0.01),)):
        generator = make_generator()
        draw_policy(policy, 128, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_stronger_knobs_move_the_same_images_further() -> None:
    strong = ShiftScaleRotate(shift_limit=0.2, scale_limit=0.4, rotate_limit=60.0, p=0.9)
    (weak_draws,), (strong_draws,) = draw((WARP,)), draw((strong,))
    assert not (weak_draws.selected & ~strong_draws.selected).any()
    assert torch.allclose(strong_draws.angle, 2 * weak_draws.angle, atol=1e-4)


def test_an_empty_policy_draws_nothing() -> None:
    generator = make_generator()
    state = generator.get_state()
    assert draw_policy((), 128, generator) == ()
    assert torch.equal(generator.get_state(), state)


def test_draws_leave_the_default_generator_alone() -> None:
    state = torch.get_rng_state()
    draw()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [0.5, 0.3, 0.25, 1.0])
def test_alternating_flips_are_a_fraction_p_of_images_and_of_epochs(p: float) -> None:
    phases = torch.rand(NUM_IMAGES, generator=make_generator(), dtype=torch.float64)
    num_epochs = 20
    flipped = torch.stack([alternate_flips(phases, p, epoch) for epoch in range(num_epochs)])
    sigma = math.sqrt(p * (1 - p) / NUM_IMAGES)
    assert ((flipped.double().mean(1) - p).abs() <= 5 * sigma).all()
    # As even as whole numbers allow, in every run of epochs.
    for length in (2, 5, num_epochs):
        counts = flipped[:length].sum(0)
        assert counts.min() >= math.floor(p * length) and counts.max() <= math.ceil(p * length)


def test_flips_that_are_given_replace_those_of_hflip_alone() -> None:
    flipped = torch.arange(NUM_IMAGES) % 3 == 0
    given = draw_policy(POLICY, NUM_IMAGES, make_generator(), flipped)
    drawn = draw_policy(POLICY, NUM_IMAGES, make_generator())
    assert isinstance(given[1], HFlipDraws) and torch.equal(given[1].selected, flipped)
    others = [(one, other) for one, other in zip(given, drawn, strict=True) if one is not given[1]]
    assert all(
        torch.equal(column, same)
        for one, other in others
        for column, same in zip(one, other, strict=True)
    )
