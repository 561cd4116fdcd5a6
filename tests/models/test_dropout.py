"""Dropout: its frequency, scale, random numbers and memory formats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from tune_cifar.errors import ConfigError
from tune_cifar.models.dropout import (
    CACHED_ACTIVATIONS,
    Dropout,
    ReluDropout,
    compute_scale,
    set_dropout_generator,
)
from tune_cifar.models.layers import conv_bn_relu, stack

SHAPE = (16, 32, 20, 20)
CHANNELS_LAST = torch.channels_last


def make_dropout(
    p: float, seed: int = 0, whole_channels: bool = False, device: str = "cpu"
) -> Dropout:
    layer = Dropout(p, whole_channels)
    layer.generator = torch.Generator(device).manual_seed(seed)
    return layer


def count_dropped(output: Tensor) -> int:
    return int((output == 0).sum())


def assert_count_is_binomial(count: int, num: int, p: float) -> None:
    """Within 5 standard deviations: one seed in two million would fail."""
    assert abs(count - num * p) <= 5 * math.sqrt(num * p * (1 - p))


def correlation(first: Tensor, second: Tensor) -> float:
    pair = torch.stack([first.flatten(), second.flatten()]).double()
    return float(torch.corrcoef(pair)[0, 1])


@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_with_probability_p(p: float, dtype: torch.dtype) -> None:
    ones = torch.ones(SHAPE, dtype=dtype)
    assert_count_is_binomial(count_dropped(make_dropout(p)(ones)), ones.numel(), p)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_dropout_rounds_p_to_16_bits_and_scales_by_the_rounded_one(p: float) -> None:
    layer = make_dropout(p)
    rounded = layer.drop_p
    assert rounded * 2**16 == int(rounded * 2**16)
    assert abs(rounded - p) <= 2**-17
    assert compute_scale(layer.drop_p) == pytest.approx(1 / (1 - rounded), rel=1e-15)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_dropout_keeps_the_expectation(p: float) -> None:
    images = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    difference = make_dropout(p)(images) - images
    standard_error = float(difference.std()) / math.sqrt(difference.numel())
    assert abs(float(difference.mean())) <= 5 * standard_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_output_is_zero_or_the_scaled_input_rounded_once(dtype: torch.dtype) -> None:
    images = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = make_dropout(0.1)
    output = layer(images)
    kept = output != 0
    assert torch.equal(output[kept], (images.float() * compute_scale(layer.drop_p)).to(dtype)[kept])


def test_dropout_gradient_is_the_mask_times_the_scale() -> None:
    images = torch.ones(SHAPE, requires_grad=True)
    output = make_dropout(0.3)(images)
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    # The input is 1: the output is mask x scale.
    assert torch.allclose(images.grad, weights * output.detach(), rtol=1e-6)


@pytest.mark.parametrize("whole_channels", [False, True])
def test_dropout_passes_gradcheck(whole_channels: bool) -> None:
    layer = make_dropout(0.3, whole_channels=whole_channels)
    state = layer.generator.get_state()

    def forward(x: Tensor) -> Tensor:
        layer.generator.set_state(state)
        return layer(x)

    images = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    assert torch.autograd.gradcheck(forward, images.requires_grad_())


@pytest.mark.parametrize("whole_channels", [False, True])
def test_dropout_of_two_layers_and_two_calls_is_uncorrelated(whole_channels: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = Dropout(0.5, whole_channels), Dropout(0.5, whole_channels)
    first.generator = second.generator = generator
    ones = torch.ones(512, 64, 1, 1) if whole_channels else torch.ones(SHAPE)
    masks = [first(ones), second(ones), first(ones)]
    bound = 5 / math.sqrt(masks[0].numel())
    pairs = [(masks[0], masks[1]), (masks[0], masks[2]), (masks[1], masks[2])]
    assert all(abs(correlation(*pair)) <= bound for pair in pairs)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 32])
def test_dropout_of_neighbours_in_the_drawn_lanes_is_uncorrelated(lag: int) -> None:
    mask = make_dropout(0.5)(torch.ones(SHAPE)).movedim(1, -1).flatten()
    assert abs(correlation(mask[:-lag], mask[lag:])) <= 5 / math.sqrt(mask.numel() - lag)


def test_dropout_of_neighbouring_seeds_is_uncorrelated() -> None:
    first, second = (make_dropout(0.5, seed)(torch.ones(SHAPE)) for seed in (7, 8))
    assert abs(correlation(first, second)) <= 5 / math.sqrt(first.numel())


def test_dropout_draws_the_same_mask_again_from_the_same_generator_state() -> None:
    layer, ones = make_dropout(0.2), torch.ones(SHAPE)
    layer(ones)
    state = layer.generator.get_state()
    expected = [layer(ones), layer(ones)]
    resumed = make_dropout(0.2, seed=99)
    resumed.generator.set_state(state)
    assert all(torch.equal(resumed(ones), output) for output in expected)
    assert not torch.equal(expected[0], expected[1])


def test_dropout_mask_depends_on_the_generator_and_the_shape_alone() -> None:
    """Not on precision, memory format, threads or the default generator."""
    ones, threads = torch.ones(SHAPE), torch.get_num_threads()
    expected = make_dropout(0.2)(ones) != 0
    variants = (
        ones.to(memory_format=CHANNELS_LAST),
        ones.bfloat16(),
        ones.double().to(memory_format=CHANNELS_LAST),
    )
    try:
        for num_threads, variant in enumerate(variants, start=1):
            torch.set_num_threads(num_threads)
            torch.manual_seed(num_threads)
            assert torch.equal(make_dropout(0.2)(variant) != 0, expected)
    finally:
        torch.set_num_threads(threads)


def test_dropout_leaves_the_default_generator_alone_when_given_its_own() -> None:
    before = torch.get_rng_state()
    make_dropout(0.2)(torch.ones(SHAPE))
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_draws_from_the_default_generator_when_given_none() -> None:
    layer = Dropout(0.2)
    with torch.random.fork_rng():
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(layer(torch.ones(SHAPE)))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("whole_channels", [False, True])
def test_dropout_keeps_memory_format_and_dtype(
    memory_format: torch.memory_format, whole_channels: bool
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        images = torch.ones(SHAPE, dtype=dtype).to(memory_format=memory_format).requires_grad_()
        output = make_dropout(0.2, whole_channels=whole_channels)(images)
        assert output.dtype == dtype and output.stride() == images.stride()
        output.backward(torch.ones_like(output))
        assert images.grad.stride() == images.stride()


def test_dropout_of_whole_channels_drops_them_together_with_probability_p() -> None:
    output = make_dropout(0.1, whole_channels=True)(torch.ones(128, 64, 5, 5))
    dropped = output[:, :, 0, 0] == 0
    assert torch.equal((output == 0), dropped[:, :, None, None].expand(output.shape))
    assert_count_is_binomial(int(dropped.sum()), dropped.numel(), 0.1)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 512), (2, 3, 5), (1, 3, 3, 7)])
def test_dropout_takes_any_number_of_activations(shape: tuple[int, ...]) -> None:
    layer = make_dropout(0.5)
    drops = sum(count_dropped(layer(torch.ones(shape))) for _ in range(200))
    assert layer(torch.ones(shape)).shape == shape
    assert_count_is_binomial(drops, 200 * math.prod(shape), 0.5)


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False), (0.0, False)])
def test_dropout_is_the_identity_and_draws_nothing_when_off(p: float, training: bool) -> None:
    layer, images = make_dropout(p).train(training), torch.randn(4, 3, 2, 2)
    before = layer.generator.get_state()
    assert layer(images) is images
    assert torch.equal(layer.generator.get_state(), before)


@pytest.mark.parametrize("p", [1.0, 1.5, -0.1, math.nan])
def test_dropout_refuses_a_p_outside_its_range(p: float) -> None:
    with pytest.raises(ConfigError, match=rf"^dropout: 0 <= p < 1 must hold, got {p}\. "):
        Dropout(p)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_cuda_draws_on_the_device_from_the_generator(dtype: torch.dtype) -> None:
    ones = torch.ones(SHAPE, dtype=dtype, device="cuda").to(memory_format=CHANNELS_LAST)
    layer = make_dropout(0.1, device="cuda")
    state = layer.generator.get_state()
    output = layer(ones)
    layer.generator.set_state(state)
    assert torch.equal(layer(ones.contiguous()), output) and output.stride() == ones.stride()
    assert_count_is_binomial(count_dropped(output), ones.numel(), 0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("p", [0.0, 0.01, 0.5])
def test_conv_bn_relu_with_dropout_is_conv_bn_relu_then_dropout(
    p: float, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    """Compare values, gradients and running statistics.

    Bit for bit where the scale is a power of two, else to rounding (of the sums over a channel's
    17,152 values, in any order).
    """
    shape = (67, 24, 16, 16)
    assert math.prod(shape) > CACHED_ACTIVATIONS, "more than one part must be drawn"

    def draw(seed: int) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return values.to(dtype).to(memory_format=memory_format)

    images, grad = draw(1), draw(2)

    def run(layers: torch.nn.Sequential) -> list[Tensor]:
        bn = layers.get_submodule("bn")
        torch.nn.init.uniform_(bn.weight, -1, 1, generator=torch.Generator().manual_seed(4))
        torch.nn.init.uniform_(bn.bias, -1, 1, generator=torch.Generator().manual_seed(5))
        x = images.clone().requires_grad_()
        set_dropout_generator(layers, torch.Generator().manual_seed(3))
        y = layers(x)
        y.backward(grad.clone())  # it is changed in place
        assert y.stride() == x.grad.stride() == images.stride()
        assert y.dtype == x.grad.dtype == dtype
        return [y.detach(), x.grad, bn.weight.grad, bn.bias.grad, *bn.buffers()]

    fused = conv_bn_relu(torch.nn.Conv2d(24, 24, 1), p)
    fused.conv = torch.nn.Identity()
    conv, bn, relu = torch.nn.Identity(), torch.nn.BatchNorm2d(24), torch.nn.ReLU()
    apart = stack(conv=conv, bn=bn, relu=relu, drop=Dropout(p))
    if dtype == torch.float64:
        fused, apart = fused.double(), apart.double()
    eps = torch.finfo(dtype).eps
    sum_eps = {torch.float64: 1e-11, torch.float32: 2e-3, torch.bfloat16: 1.0}[dtype]
    for one, other in zip(run(fused), run(apart), strict=True):
        if p in (0.0, 0.5):
            assert torch.equal(one, other)
        else:
            atol = sum_eps if one.dim() == 1 else eps
            torch.testing.assert_close(one, other, rtol=8 * eps, atol=8 * atol)


def test_relu_dropout_is_a_relu_in_evaluation() -> None:
    layer = ReluDropout(0.5).eval()
    assert torch.equal(layer(torch.tensor([[-1.0, 2.0]])), torch.tensor([[0.0, 2.0]]))


def test_relu_dropout_keeps_nan_so_that_divergence_is_seen() -> None:
    layer = ReluDropout(0.5)
    layer.generator = torch.Generator().manual_seed(0)
    assert layer(torch.full((4, 8, 2, 2), math.nan)).isnan().all()


def test_the_lanes_are_a_stream_of_aes_in_counter_mode() -> None:
    """NIST SP 800-38A defines it, so a seed gives the same mask in every version."""
    layer = make_dropout(0.5, seed=0)
    generator = torch.Generator().manual_seed(0)
    key = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    encryptor = Cipher(algorithms.AES(key.to_bytes(16, "little")), modes.CTR(bytes(16))).encryptor()
    num = 2 * CACHED_ACTIVATIONS + 5  # more than one piece of zeros
    lanes = np.frombuffer(encryptor.update(bytes(2 * num)), np.int16)
    assert torch.equal(layer(torch.ones(num, 1))[:, 0] != 0, torch.from_numpy(lanes >= 0))
