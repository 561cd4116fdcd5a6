"""The five networks against their sources: counts, tables, place of dropout, order of layers."""

from __future__ import annotations

import copy
import json
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_cifar.dataset import CIFAR10
from tune_cifar.errors import ConfigError
from tune_cifar.models.build import MODELS, build_model
from tune_cifar.models.dropout import Dropout, round_probability, set_dropout_generator
from tune_cifar.models.fast_conv import Depthwise5x5, StridedDepthwiseConv2d, SubsamplingConv2d
from tune_cifar.models.layers import Residual
from tune_cifar.models.summary import describe_model
from tune_cifar.schema import ModelName, TrainConfig

# name: parameters, MACs (millions), receptive field with pooling, parameters of BN, Dropout layers
FACTS = {
    "s6": (197_498, 77.5, 47, 656, 3),
    "s7": (86_816, 19.2, 83, 832, 8),
    "s8": (115_360, 19.9, 113, 832, 9),
    "s10": (6_573_130, 379.3, 88, 4_480, 3),
    "s10_postact": (6_575_370, 379.3, 88, 4_480, 3),
}
NAMES = tuple(FACTS)
SLOWLY = [
    pytest.param(name, marks=pytest.mark.slow if name.startswith("s10") else ()) for name in NAMES
]

# Convs in forward order: kernel, channels in, out, groups, stride, padding, dilation, side of the
# output, parameters.
S6_CONVS = [
    (3, 3, 8, 1, 1, 1, 1, 32, 224),
    (3, 8, 16, 1, 1, 1, 1, 32, 1_168),
    (3, 16, 32, 1, 1, 1, 1, 32, 4_640),
    (3, 32, 64, 1, 1, 1, 1, 32, 18_496),
    (3, 64, 64, 1, 1, 0, 2, 28, 36_928),
    (5, 64, 64, 64, 1, 0, 1, 24, 1_664),
    (1, 64, 8, 1, 1, 0, 1, 24, 520),
    (3, 8, 16, 1, 1, 1, 1, 24, 1_168),
    (3, 16, 24, 1, 1, 1, 1, 24, 3_480),
    (3, 24, 32, 1, 1, 1, 1, 24, 6_944),
    (3, 32, 64, 1, 1, 0, 2, 20, 18_496),
    (5, 64, 64, 1, 2, 1, 1, 9, 102_464),
    (1, 64, 10, 1, 1, 0, 1, 9, 650),
]
S7_CONVS = [
    (3, 3, 32, 1, 1, 1, 1, 32, 864),
    (3, 32, 32, 1, 1, 1, 1, 32, 9_216),
    (3, 32, 32, 1, 2, 1, 1, 16, 9_216),
    (3, 32, 64, 1, 1, 1, 1, 16, 18_432),
    (3, 64, 64, 64, 2, 1, 1, 8, 576),
    (1, 64, 64, 1, 1, 0, 1, 8, 4_160),
    (3, 64, 64, 64, 1, 1, 1, 8, 576),
    (1, 64, 128, 1, 1, 0, 1, 8, 8_320),
    (1, 128, 32, 1, 1, 0, 1, 8, 4_096),
    (3, 32, 32, 1, 1, 1, 2, 6, 9_216),
    (3, 32, 32, 1, 1, 1, 2, 4, 9_216),
    (3, 32, 32, 1, 1, 1, 1, 4, 9_216),
    (3, 32, 10, 1, 1, 1, 1, 4, 2_880),
]
S8_CONVS = [
    *(
        (3, width, 32, 1, stride, padding, dilation, side, width * 32 * 9)
        for first, half in ((3, 16), (32, 8), (32, 4))
        for width, stride, padding, dilation, side in (
            (first, 1, 1, 1, 2 * half),
            (32, 1, 1, 1, 2 * half),
            (32, 2, 2, 2, half),
        )
    ),
    (3, 32, 32, 32, 1, 1, 1, 4, 320),
    (1, 32, 64, 1, 1, 0, 1, 4, 2_112),
    (3, 64, 64, 1, 1, 1, 1, 4, 36_864),
    (1, 64, 10, 1, 1, 0, 1, 1, 640),
]
S10_CONVS = [
    (3, num_in, num_out, 1, 1, 1, 1, side, num_in * num_out * 9)
    for num_in, num_out, side in (
        (3, 64, 32),
        (64, 128, 32),
        (128, 128, 16),
        (128, 128, 16),
        (128, 256, 16),
        (256, 512, 8),
        (512, 512, 4),
        (512, 512, 4),
    )
]
S10_POSTACT_CONVS = [(*row[:-1], row[-1] + row[2]) for row in S10_CONVS]
CONVS = {
    "s6": S6_CONVS,
    "s7": S7_CONVS,
    "s8": S8_CONVS,
    "s10": S10_CONVS,
    "s10_postact": S10_POSTACT_CONVS,
}

# The layers in forward order: C conv, B BN, R ReLU, D dropout, P pooling, A addition, L linear.
CBR, CBRD, CRBD = "C B R", "C B RD", "C R B D"
ORDERS = {
    "s6": f"{CBR} {CBR} {CBR} {CBR} D {CBR} D C {CBR} {CBR} {CBR} {CBR} {CBR} D C C P",
    "s7": f"{CBRD} {CBRD} {CBRD} {CBRD} C {CBRD} C {CBRD} {CBRD} C {CBRD} C R C P",
    "s8": f"{' '.join([CRBD] * 9)} C C R B C R B P C",
    "s10": f"{CBR} C P B R {CBRD} {CBR} A C P B R C P B R {CBRD} {CBR} A P D L",
    "s10_postact": f"{CBR} C P B R {CBRD} C B A R C P B R C P B R {CBRD} C B A R P D L",
}
LETTERS = {
    "BatchNorm2d": "B",
    "ScaledBatchNorm2d": "B",
    "ReLU": "R",
    "ReluDropout": "RD",
    "Dropout": "D",
    "MaxPool2d": "P",
    "AvgPool2d": "P",
    "Add": "A",
    "Linear": "L",
}


def make_images(num: int = 4, side: int = 32) -> Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(0))


def make_config(name: str, dropout: float = 0.0) -> TrainConfig:
    recipe = {"optimizer": "sgd", "schedule": "constant", "max_lr": 0.1, "batch_size": 8}
    return TrainConfig(model=name, **recipe, epochs=1, dropout=dropout)


def make_model(name: str, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name](dropout=dropout)
    set_dropout_generator(model, torch.Generator().manual_seed(seed))
    return model


def list_convs(name: str) -> list[tuple[int, ...]]:
    """Return the rows of the network's table that are convs, in the form of S6_CONVS."""
    modules = dict(MODELS[name]().named_modules())
    convs = []
    for row in describe_model(name).layers:
        conv = modules[row.name]
        if isinstance(conv, nn.Conv2d):
            channels = (conv.kernel_size[0], conv.in_channels, conv.out_channels, conv.groups)
            places = (conv.stride[0], conv.padding[0], conv.dilation[0], row.output_shape[1])
            convs.append((*channels, *places, row.params))
    return convs


def test_the_table_has_every_model_of_the_schema() -> None:
    assert set(MODELS) == set(get_args(ModelName)) == set(FACTS)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_parameters_is_the_sources(name: str) -> None:
    model = MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == FACTS[name][0]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert sum(p.numel() for norm in norms for p in norm.parameters()) == FACTS[name][3]


@pytest.mark.parametrize("name", NAMES)
def test_images_become_ten_logits_and_every_parameter_gets_a_gradient(name: str) -> None:
    model = make_model(name)
    logits = model(make_images())
    assert logits.shape == (4, 10)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    without = [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    # A bias before BN has no effect, up to rounding.
    assert all(n.endswith("bias") for n in without)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_logits_and_not_probabilities(name: str) -> None:
    logits = make_model(name).eval()(5 * make_images(16))
    assert (logits < 0).any() and (logits > 0).any()  # neither softmax nor log-softmax
    assert ((logits.sum(1) - 1).abs() > 0.01).all()


@pytest.mark.parametrize("name", NAMES)
def test_convs_are_the_sources_row_by_row(name: str) -> None:
    assert list_convs(name) == CONVS[name]


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_in_the_sources_order(name: str) -> None:
    kinds = [row.kind for row in describe_model(name).layers if row.kind != "Flatten"]
    assert [LETTERS.get(kind, "C") for kind in kinds] == ORDERS[name].split()


@pytest.mark.parametrize("name", NAMES)
def test_the_summary_has_the_sources_totals(name: str) -> None:
    summary = describe_model(name)
    params, macs, receptive_field, _, _ = FACTS[name]
    assert (summary.name, summary.params) == (name, params)
    assert summary.receptive_field == receptive_field
    assert round(summary.macs / 1e6, 1) == macs
    assert sum(row.params for row in summary.layers) == summary.params
    assert sum(row.macs for row in summary.layers) == summary.macs


@pytest.mark.parametrize("name", NAMES)
def test_macs_of_a_conv_are_its_weights_times_its_positions(name: str) -> None:
    macs = [row.macs for row in describe_model(name).layers if row.kind == "Conv2d"]
    assert macs == [
        kernel**2 * num_in * num_out // groups * side**2
        for kernel, num_in, num_out, groups, _, _, _, side, _ in CONVS[name]
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s6", [3, 5, 7, 9, 13, 17, 17, 19, 21, 23, 27, 31, 31]),
        ("s7", [3, 5, 7, 11, 15, 15, 23, 23, 23, 39, 55, 63, 71]),
        ("s8", [3, 5, 9, 13, 17, 25, 33, 41, 57, 73, 73, 89, 113]),
        ("s10", [3, 5, 10, 14, 18, 28, 48, 64]),
        ("s10_postact", [3, 5, 10, 14, 18, 28, 48, 64]),
    ],
)
def test_receptive_fields_of_the_convs_are_those_computed_by_hand(
    name: str, expected: list[int]
) -> None:
    convs = [row for row in describe_model(name).layers if row.kind == "Conv2d"]
    assert [row.receptive_field for row in convs] == expected


def make_transparent(model: nn.Module) -> nn.Sequential:
    """Return the layers before Flatten, changed so that gradients reach all pixels in reach."""
    children = list(model.children())
    features = nn.Sequential(*children[: [type(child) for child in children].index(nn.Flatten)])
    for module in list(features.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.MaxPool2d):
                setattr(module, key, nn.AvgPool2d(child.kernel_size))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, key, nn.Identity())
    for parameter in features.parameters():
        nn.init.constant_(parameter, 1 / parameter[0].numel() if parameter.dim() > 1 else 0)
    return features.eval()


@pytest.mark.parametrize("name", SLOWLY)
def test_the_receptive_field_is_the_extent_of_the_gradient_in_a_large_image(name: str) -> None:
    images = torch.ones(1, 3, 192, 192, requires_grad=True)
    features = make_transparent(MODELS[name]())(images)
    middle = features.shape[2] // 2
    features[0, :, middle, middle].sum().backward()
    seen = images.grad[0].sum(0) > 0
    for axis in (0, 1):
        touched = seen.any(axis).nonzero().flatten()
        assert int(touched[-1] - touched[0]) + 1 == describe_model(name).receptive_field


@pytest.mark.parametrize("name", NAMES)
def test_the_summary_is_plain_data_and_the_same_for_name_and_configuration(name: str) -> None:
    assert describe_model(make_config(name, 0.5)) == describe_model(name)
    table = json.loads(json.dumps(describe_model(name).to_dict()))
    assert set(table) == {"name", "params", "macs", "receptive_field", "layers"}
    columns = {"name", "kind", "output_shape", "params", "macs", "receptive_field"}
    assert all(set(row) == columns for row in table["layers"])
    assert table["layers"][-1]["output_shape"] == [10]


def test_describe_model_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    describe_model("s7")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "hint"), [("s10_post", r"Did you mean s10_postact\?"), ("vgg", "Choose from s6, s7")]
)
def test_describe_model_names_the_nearest_model_for_an_unknown_one(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"^no model named '{name}'\. {hint}"):
        describe_model(name)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_occurs_as_often_as_in_the_source_and_drops_channels_only_in_s6(name: str) -> None:
    drops = [module for module in make_model(name, 0.1).modules() if isinstance(module, Dropout)]
    assert len(drops) == FACTS[name][4]
    assert {drop.drop_p for drop in drops} == {round_probability(0.1)}
    assert {drop.whole_channels for drop in drops} == {name == "s6"}


@pytest.mark.parametrize("name", NAMES)
def test_dropout_changes_training_and_never_evaluation(name: str) -> None:
    images = make_images()
    plain, dropping = make_model(name), make_model(name, 0.3)
    assert not torch.allclose(dropping(images), plain(images))
    for model in (plain, dropping):
        model.load_state_dict(make_model(name, seed=1).state_dict())
    assert torch.equal(dropping.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("name", NAMES)
def test_every_dropout_layer_draws_from_the_generator_given_in_forward_order(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(make_config(name, 0.3))
    set_dropout_generator(model, generator)
    drops = [module for module in model.modules() if isinstance(module, Dropout)]
    assert all(drop.generator is generator for drop in drops)
    before = torch.get_rng_state()
    logits = model(make_images())
    assert torch.equal(torch.get_rng_state(), before)
    set_dropout_generator(model, torch.Generator().manual_seed(5))
    assert torch.equal(model(make_images()), logits)


def test_build_model_draws_the_weights_from_the_default_generator() -> None:
    weights = []
    with torch.random.fork_rng():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            model = build_model(make_config("s7"))
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_model_with_a_generator_can_be_copied() -> None:
    model = make_model("s7", 0.3)
    other = copy.deepcopy(model)
    assert torch.equal(other(make_images()), model(make_images()))


@pytest.mark.parametrize("name", ["s10", "s10_postact"])
def test_the_relu_of_a_residual_block_is_in_the_body_in_s10_and_after_the_sum_in_s10_postact(
    name: str,
) -> None:
    model = make_model(name).eval()
    block = model.get_submodule("residual1")
    x = torch.randn(2, 128, 16, 16, generator=torch.Generator().manual_seed(0))
    residual = next(module for module in block.modules() if isinstance(module, Residual))
    body, output = residual.body(x), block(x)
    if name == "s10":
        assert body.min() == 0 and torch.equal(output, x + body) and output.min() < 0
    else:
        assert body.min() < 0 and torch.equal(output, (x + body).relu()) and output.min() == 0


@pytest.mark.parametrize("name", SLOWLY)
def test_bf16_channels_last_training_gives_nearly_the_gradient_of_fp32(name: str) -> None:
    gradients = []
    for bf16 in (False, True):
        model, images = make_model(name), make_images(8)
        if bf16:
            model = model.to(memory_format=torch.channels_last)
            images = images.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images).float(), torch.arange(8))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.9


def compare_convs(ours: nn.Conv2d, plain: nn.Conv2d, images: Tensor) -> None:
    """Check that outputs and all three gradients agree in float64."""
    plain.load_state_dict(ours.state_dict())
    results = []
    for conv in (ours.double(), plain.double()):
        x = images.double().requires_grad_()
        output = conv(x)
        (output * torch.sin(torch.arange(output.numel())).view_as(output)).sum().backward()
        results.append([output, x.grad, *(p.grad for p in conv.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_the_depthwise_5x5_of_s6_has_the_gradients_of_an_ordinary_conv() -> None:
    images = torch.randn(3, 6, 11, 14, generator=torch.Generator().manual_seed(0))
    compare_convs(Depthwise5x5(6), nn.Conv2d(6, 6, 5, groups=6), images)


def test_the_strided_depthwise_of_s7_has_the_gradients_of_an_ordinary_conv() -> None:
    options = {"stride": 2, "padding": 1, "groups": 6, "bias": False}
    images = torch.randn(3, 6, 11, 14, generator=torch.Generator().manual_seed(0))
    compare_convs(StridedDepthwiseConv2d(6, stride=2), nn.Conv2d(6, 6, 3, **options), images)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_strided_and_dilated_conv_of_s8_has_the_gradients_of_an_ordinary_conv(
    memory_format: torch.memory_format, stride: int
) -> None:
    options = {"stride": stride, "dilation": stride, "padding": stride, "bias": False}
    images = torch.randn(3, 5, 11, 14, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=memory_format)
    conv = SubsamplingConv2d(5, 4, stride)
    compare_convs(conv, nn.Conv2d(5, 4, 3, **options), images)
    x = images.double().requires_grad_()
    conv(x).square().sum().backward()
    assert x.grad.stride() == images.stride()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_strided_depthwise_of_s7_has_the_gradients_of_an_ordinary_conv_in_bf16_too(
    memory_format: torch.memory_format,
) -> None:
    """Under autocast, where it has a backward of its own; to bf16's rounding."""
    conv = StridedDepthwiseConv2d(64, stride=2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 64, 16, 16, generator=generator).bfloat16()
    images = images.to(memory_format=memory_format).requires_grad_()
    weights = torch.randn(4, 64, 8, 8, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        output = conv(images)
    (output * weights).sum().backward()
    assert output.dtype == images.grad.dtype == torch.bfloat16
    assert conv.weight.grad.dtype == torch.float32
    assert images.grad.stride() == images.stride()
    wide = images.detach().float().requires_grad_()
    weight = conv.weight.detach().bfloat16().float().requires_grad_()
    exact = F.conv2d(wide, weight, stride=2, padding=1, groups=64)
    (exact * weights.bfloat16()).sum().backward()
    pairs = [(output, exact), (images.grad, wide.grad), (conv.weight.grad, weight.grad)]
    for ours, theirs in pairs:
        atol = 2**-7 * float(theirs.detach().abs().max())
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-7, atol=atol)


# What TrainConfig needs beside the network.
PLAIN = {
    "optimizer": "sgd",
    "schedule": "constant",
    "max_lr": 0.1,
    "batch_size": 8,
    "epochs": 1,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_network_takes_other_classes_and_larger_images(name: str) -> None:
    config = TrainConfig(**PLAIN, model=name)
    for side, classes in ((32, 3), (48, 10), (33, 100), (MODELS[name].MIN_SIDE, 2)):
        names = tuple(str(number) for number in range(classes))
        data = CIFAR10.model_copy(update={"side": side, "class_names": names})
        model = build_model(config, data).eval()
        with torch.no_grad():
            assert model(torch.zeros(2, 3, side, side)).shape == (2, classes)


@pytest.mark.parametrize("name", ["s6", "s7", "s10", "s10_postact"])
def test_images_too_small_for_a_network_are_refused(name: str) -> None:
    side = MODELS[name].MIN_SIDE - 1
    small = CIFAR10.model_copy(update={"side": side, "name": "pets"})
    with pytest.raises(ConfigError, match=f"{name} takes images of at least .* got {side}x{side}"):
        build_model(TrainConfig(**PLAIN, model=name), small)
