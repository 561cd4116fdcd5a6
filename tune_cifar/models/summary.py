"""A network's layers as a table: shape, parameters, MACs and receptive field of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tune_cifar.dataset import CIFAR10
from tune_cifar.errors import ConfigError, did_you_mean
from tune_cifar.models.build import MODELS
from tune_cifar.models.custom import build_with_defaults
from tune_cifar.schema import OWN_MODEL, TrainConfig

IMAGE_SHAPE = (1, 3, CIFAR10.side, CIFAR10.side)
WINDOWS = nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d


class ReceptiveField(NamedTuple):
    """The receptive field of a layer's output, in pixels of the image."""

    size: int
    """Side of the square that one output value may depend on."""
    jump: int
    """Distance between neighbouring outputs."""


@dataclass(frozen=True)
class LayerRow:
    """One layer of a network."""

    name: str
    """Dotted path in the model."""
    kind: str
    """Class of the module; Conv2d for its subclasses too."""
    output_shape: tuple[int, ...]
    """For one image, without the batch."""
    params: int
    macs: int
    """Multiply-accumulates of one image in conv and linear layers, without biases."""
    receptive_field: int | None
    """Side in pixels of the image; dilation, strides and pooling are counted, padding is not. None
    behind what the network computes between its layers, and behind a layer that changes the number
    of positions by another rule than a window's."""


@dataclass(frozen=True)
class ModelSummary:
    """A network's layers and their totals."""

    name: str
    params: int
    macs: int
    receptive_field: int | None
    layers: tuple[LayerRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, ready for JSON."""
        result = asdict(self)
        result["layers"] = list(result["layers"])
        for row in result["layers"]:
            row["output_shape"] = list(row["output_shape"])
        return result


def describe_model(config_or_name: TrainConfig | str) -> ModelSummary:
    """Describe the layers of a network in forward order.

    Of the five networks nothing is drawn or computed. A network of the user's own is built and one
    image sent through it, since its code may need values.

    Raises:
        ConfigError: no network has that name.
    """
    import torchinfo

    name = config_or_name if isinstance(config_or_name, str) else config_or_name.model
    if name not in MODELS and not OWN_MODEL.fullmatch(name):
        hint = did_you_mean(name, MODELS) or f" Choose from {', '.join(MODELS)}."
        raise ConfigError(f"no model named {name!r}.{hint}")
    device = "meta" if name in MODELS else "cpu"
    with torch.device(device):
        model = MODELS[name]() if name in MODELS else build_with_defaults(name, CIFAR10)
        model.eval()
        images = torch.zeros(IMAGE_SHAPE)
    with ReceptiveFieldWalk(model, images) as walk:
        info = torchinfo.summary(model, input_data=images, device=device, mode="eval", verbose=0)
    names = {id(module): path for path, module in model.named_modules()}
    rows = []
    for layer in info.summary_list:
        if layer.is_leaf_layer:
            row = LayerRow(
                name=names[layer.layer_id],
                kind="Conv2d" if isinstance(layer.module, nn.Conv2d) else layer.class_name,
                output_shape=tuple(layer.output_size[1:]),
                params=layer.num_params,
                macs=count_macs(layer.module, layer.output_size),
                receptive_field=walk.find(layer.layer_id),
            )
            rows.append(row)
    macs = sum(row.macs for row in rows)
    return ModelSummary(name, info.total_params, macs, rows[-1].receptive_field, tuple(rows))


def count_macs(module: nn.Module, output_shape: Sequence[int]) -> int:
    """Return weights x output positions of a conv or linear layer, else 0."""
    if not isinstance(module, nn.Conv2d | nn.Linear):
        return 0
    positions = output_shape[1:-1] if isinstance(module, nn.Linear) else output_shape[2:]
    return module.weight.numel() * math.prod(positions)


class ReceptiveFieldWalk:
    """A context that computes the receptive fields of all leaf modules during a forward pass.

    Where paths meet (a module with several inputs), the largest receptive field counts. Behind an
    operation between modules none is known, nor behind a layer that changes the number of positions
    without a window (AdaptiveAvgPool2d, Flatten).

    Attributes:
        receptive_fields: ReceptiveField by id(module), as far as it is known.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.receptive_fields: dict[int, ReceptiveField] = {}
        # Keeps the tensors alive: the id of a deleted tensor may be used again.
        self._tensors = {id(images): (images, ReceptiveField(size=1, jump=1))}
        self._leaves = [module for module in model.modules() if not list(module.children())]
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> ReceptiveFieldWalk:
        self._hooks = [leaf.register_forward_hook(self._record) for leaf in self._leaves]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def find(self, module_id: int) -> int | None:
        """Return the receptive field's side behind a leaf module; None if it is not known."""
        field = self.receptive_fields.get(module_id)
        return None if field is None else field.size

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not inputs or not all(id(tensor) in self._tensors for tensor in inputs):
            return
        if not isinstance(output, Tensor):
            return
        before, after = (math.prod(tensor.shape[2:]) for tensor in (inputs[0], output))
        if before != after and not isinstance(module, WINDOWS):
            return
        fields = [self._tensors[id(tensor)][1] for tensor in inputs]
        size, jump = max(field.size for field in fields), max(field.jump for field in fields)
        field = apply_window(module, ReceptiveField(size, jump))
        self.receptive_fields[id(module)] = field
        self._tensors[id(output)] = (output, field)


def apply_window(module: nn.Module, field: ReceptiveField) -> ReceptiveField:
    """Return the receptive field after a conv or pooling (square windows); other layers keep it."""
    if not isinstance(module, WINDOWS):
        return field

    def side(name: str) -> int:
        value = getattr(module, name, 1)
        return int(value[0] if isinstance(value, tuple) else value)

    size = field.size + (side("kernel_size") - 1) * side("dilation") * field.jump
    return ReceptiveField(size, field.jump * side("stride"))
