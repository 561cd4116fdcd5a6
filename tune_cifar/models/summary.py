"""What a network is made of: a row per layer with shape, parameters, MACs and receptive field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tune_cifar.errors import ConfigError
from tune_cifar.models.build import MODELS
from tune_cifar.schema import TrainConfig, nearest_name

IMAGE_SHAPE = (1, 3, 32, 32)


class ReceptiveField(NamedTuple):
    """How far a layer's output sees, in pixels of the image."""

    size: int
    """Side of the square that one output value may depend on."""
    jump: int
    """Distance of two neighbouring outputs."""


@dataclass(frozen=True)
class LayerRow:
    name: str
    """Dotted path in the model."""
    kind: str
    """Class of the module; Conv2d for our variants of it too."""
    output_shape: tuple[int, ...]
    """For one image, without the batch."""
    params: int
    macs: int
    """Multiply-accumulates of one image with conv and linear weights; torchinfo's own count adds biases and BN."""
    receptive_field: int
    """Side in pixels, from the image to this layer's output; dilation, strides and pooling counted, padding not."""


@dataclass(frozen=True)
class ModelSummary:
    name: str
    params: int
    macs: int
    receptive_field: int
    layers: tuple[LayerRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        result = asdict(self)
        result["layers"] = [
            {**row, "output_shape": list(row["output_shape"])} for row in result["layers"]
        ]
        return result


def describe_model(config_or_name: TrainConfig | str) -> ModelSummary:
    """The layers of a network in the order in which an image passes them; nothing is drawn and nothing computed.

    Raises:
        ConfigError: no network has that name.
    """
    import torchinfo

    name = config_or_name if isinstance(config_or_name, str) else config_or_name.model
    if name not in MODELS:
        hint = nearest_name(name, tuple(MODELS)) or f" Choose from {', '.join(MODELS)}."
        raise ConfigError(f"model: {name!r} is not a known name.{hint}")
    with torch.device("meta"):
        model = MODELS[name]().eval()
        images = torch.zeros(IMAGE_SHAPE)
    with ReceptiveFieldWalk(model, images) as walk:
        info = torchinfo.summary(model, input_data=images, device="meta", mode="eval", verbose=0)
    names = {id(module): path for path, module in model.named_modules()}
    rows = tuple(
        LayerRow(
            name=names[layer.layer_id],
            kind="Conv2d" if isinstance(layer.module, nn.Conv2d) else layer.class_name,
            output_shape=tuple(layer.output_size[1:]),
            params=layer.num_params,
            macs=count_macs(layer.module, layer.output_size),
            receptive_field=walk.reaches[layer.layer_id].size,
        )
        for layer in info.summary_list
        if layer.is_leaf_layer
    )
    return ModelSummary(
        name, info.total_params, sum(row.macs for row in rows), rows[-1].receptive_field, rows
    )


def count_macs(module: nn.Module, output_shape: Sequence[int]) -> int:
    """Weights x output positions of a conv or linear layer."""
    if not isinstance(module, nn.Conv2d | nn.Linear):
        return 0
    return module.weight.numel() * math.prod(output_shape[2:])


class ReceptiveFieldWalk:
    """While open, follows an image through the leaf modules and notes each one's ReceptiveField under id(module) in `reaches`.

    Paths that meet (a module with several inputs) see as far as the farthest of them. Every tensor must come from a
    leaf module: an operation between modules would break the trail (KeyError).
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.reaches: dict[int, ReceptiveField] = {}
        # Tensors are kept beside their ReceptiveField: an id would be used again once its tensor is gone.
        self._tensors = {id(images): (images, ReceptiveField(size=1, jump=1))}
        self._leaves = [
            module for module in model.modules() if next(module.children(), None) is None
        ]
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> ReceptiveFieldWalk:
        self._hooks = [leaf.register_forward_hook(self._note) for leaf in self._leaves]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        arriving = [self._tensors[id(tensor)][1] for tensor in inputs]
        reach = apply_window(
            module, ReceptiveField(max(r.size for r in arriving), max(r.jump for r in arriving))
        )
        self.reaches[id(module)] = reach
        self._tensors[id(output)] = (output, reach)


def apply_window(module: nn.Module, reach: ReceptiveField) -> ReceptiveField:
    """ReceptiveField after a conv or a pooling (square windows); every other layer works pixel by pixel."""
    if not isinstance(module, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d):
        return reach

    def side(name: str) -> int:
        value = getattr(module, name, 1)
        return int(value[0] if isinstance(value, tuple) else value)

    size = reach.size + (side("kernel_size") - 1) * side("dilation") * reach.jump
    return ReceptiveField(size, reach.jump * side("stride"))
