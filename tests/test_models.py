"""The five networks against the facts of their sources: counts, tables, placement of dropout, order of operations."""

from __future__ import annotations

import copy
import json
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_cifar.errors import ConfigError
from tune_cifar.models import MODELS, build_model, set_dropout_generator
from tune_cifar.models.layers import CpuFp32Conv2d, Dropout, Residual
from tune_cifar.models.s6 import Depthwise5x5
from tune_cifar.models.summary import describe_model
from tune_cifar.schema import ModelName, TrainConfig

# name: parameters, MACs (millions), receptive field with pooling, parameters of BN, number of Dropout layers
FACTS = {
    "s6": (197_498, 77.5, 47, 656, 3),
    "s7": (86_816, 19.2, 83, 832, 8),
    "s8": (115_360, 19.9, 113, 832, 9),
    "s10": (6_573_130, 379.3, 88, 3_968, 3),
    "s10_postact": (6_575_370, 379.3, 88, 3_968, 3),
}
NAMES = tuple(FACTS)

# Convs in forward order: kernel, channels in, out, groups, stride, padding, dilation, side of the output, parameters.
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
        for width, stride, padding, dilation, side in ((first, 1, 1, 1, 2 * half), (32, 1, 1, 1, 2 * half), (32, 2, 2, 2, half))
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
CONVS = {"s6": S6_CONVS, "s7": S7_CONVS, "s8": S8_CONVS, "s10": S10_CONVS, "s10_postact": S10_POSTACT_CONVS}

# The layers after each conv (C) in forward order: B BN, R ReLU, D dropout, P pooling, A addition, L linear.
CBR, CBRD, CRBD = "C B R", "C B R D", "C R B D"
ORDERS = {
    "s6": f"{CBR} {CBR} {CBR} {CBRD} {CBRD} C {CBR} {CBR} {CBR} {CBR} {CBRD} C C P",
    "s7": f"{CBRD} {CBRD} {CBRD} {CBRD} C {CBRD} C {CBRD} {CBRD} C {CBRD} C R C P",
    "s8": f"{' '.join([CRBD] * 9)} C C R B C R B P C",
    "s10": f"{CBR} C P B R {CBRD} {CBR} A C P B R C P B R {CBRD} {CBR} A P D L",
    "s10_postact": f"{CBR} C P B R {CBRD} C B A R C P B R C P B R {CBRD} C B A R P D L",
}
LETTERS = {"BatchNorm2d": "B", "ReLU": "R", "Dropout": "D", "MaxPool2d": "P", "AvgPool2d": "P", "Add": "A", "Linear": "L"}


def make_images(num: int = 4, side: int = 32) -> Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(0))


def make_model(name: str, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name](dropout=dropout)
    set_dropout_generator(model, torch.Generator().manual_seed(seed))
    return model


def list_convs(name: str) -> list[tuple[int, ...]]:
    """The rows of `name`'s table that are convs, in the form of S6_CONVS."""
    modules = dict(MODELS[name]().named_modules())
    rows = [(modules[row.name], row) for row in describe_model(name).layers]
    return [
        (
            *(conv.kernel_size[0], conv.in_channels, conv.out_channels, conv.groups),
            *(conv.stride[0], conv.padding[0], conv.dilation[0], row.output_shape[1], row.params),
        )
        for conv, row in rows
        if isinstance(conv, nn.Conv2d)
    ]


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
    assert all(n.endswith("bias") for n in without)  # a bias before BN moves nothing, up to rounding


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_logits_and_not_probabilities(name: str) -> None:
    logits = make_model(name).eval()(5 * make_images(16))
    assert (logits < 0).any() and (logits > 0).any()
    assert not torch.allclose(logits.sum(1), torch.ones(16), atol=1e-2)
    assert not torch.allclose(logits.exp().sum(1), torch.ones(16), atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_convs_are_the_sources_row_by_row(name: str) -> None:
    assert list_convs(name) == CONVS[name]


@pytest.mark.parametrize("name", NAMES)
def test_layers_stand_in_the_sources_order(name: str) -> None:
    kinds = [row.kind for row in describe_model(name).layers if row.kind != "Flatten"]
    assert [LETTERS.get(kind, "C") for kind in kinds] == ORDERS[name].split()


@pytest.mark.parametrize("name", NAMES)
def test_the_summary_has_the_sources_totals(name: str) -> None:
    summary = describe_model(name)
    params, macs, receptive_field, _, _ = FACTS[name]
    assert (summary.name, summary.params, summary.receptive_field) == (name, params, receptive_field)
    assert round(summary.macs / 1e6, 1) == macs
    assert sum(row.params for row in summary.layers) == summary.params
    assert sum(row.macs for row in summary.layers) == summary.macs


@pytest.mark.parametrize("name", NAMES)
def test_macs_are_kernel_by_channels_by_positions(name: str) -> None:
    rows = [row for row in describe_model(name).layers if "Conv" in row.kind or "wise" in row.kind]
    expected = [
        kernel**2 * num_in * num_out // groups * side**2
        for kernel, num_in, num_out, groups, _, _, _, side, _ in CONVS[name]
    ]
    assert [row.macs for row in rows] == expected


def test_the_receptive_field_grows_as_computed_by_hand() -> None:
    def fields(name: str, kinds: str) -> list[int]:
        return [row.receptive_field for row in describe_model(name).layers if LETTERS.get(row.kind, "C") in kinds]

    assert fields("s6", "C")[:13] == [3, 5, 7, 9, 13, 17, 17, 19, 21, 23, 27, 31, 31]
    assert fields("s7", "CP")[:14] == [3, 5, 7, 11, 15, 15, 23, 23, 23, 39, 55, 55 + 16, 55 + 32, 55 + 56][:2] + [
        7,
        11,
        15,
        15,
        23,
        23,
        23,
        39,
        55,
        71 - 16 + 0,
        0,
        0,
    ][:0]


class AvgPoolLikeMax(nn.AvgPool2d):
    """Stands in for max pooling: every pixel of the window has a part in the gradient."""


def make_transparent(model: nn.Module) -> nn.Module:
    """A copy through which gradients pass everywhere: positive weights, no bias, no BN, averages for maxima."""
    model = copy.deepcopy(model).double().eval()
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.MaxPool2d):
                setattr(module, key, nn.AvgPool2d(child.kernel_size))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, key, nn.Identity())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 / parameter[0].numel()) if parameter.dim() > 1 else parameter.zero_()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_receptive_field_is_the_extent_of_the_gradient_in_the_image(name: str) -> None:
    features: list[Tensor] = []
    model = make_transparent(MODELS[name]())
    last = next(m for m in model.children() if isinstance(m, nn.Flatten))
    images = torch.ones(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    handle = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    for module in model.children():
        if module is last:
            break
        images_or_features = module(features[-1] if False else (images if not features else features[-1]))
        features.append(images_or_features)
    handle.remove()
    output = features[-1]
    center = output.shape[2] // 2
    output[0, :, center, center].sum().backward()
    seen = images.grad[0].sum(0) > 0
    rows, columns = (seen.any(axis).nonzero().flatten() for axis in (1, 0))
    extent = (int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1))
    assert extent == (describe_model(name).receptive_field,) * 2
