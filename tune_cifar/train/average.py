"""A moving average of a network's weights, which is evaluated and kept in their place."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of weights and batch-norm statistics over the steps.

    After step n (from 1) the average moves towards the network by 1 - min(decay, (1 + n) / (10 +
    n)), so that it does not remember the initial weights for long. That warm-up is the one of
    TensorFlow's ExponentialMovingAverage.

    Args:
        model: a second network like `source`; holds the average.
        source: the network that is trained.
        decay: per step, in (0, 1).
    """

    def __init__(self, model: nn.Module, source: nn.Module, decay: float) -> None:
        self.model = model
        self._source = source
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average after this step, counted from 1; nothing waits for a GPU."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        # Listed each time: a network may put another tensor in a buffer's place.
        pairs = list(zip(_list_tensors(self.model), _list_tensors(self._source), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        averaged, trained = zip(*floats, strict=True)
        torch._foreach_lerp_(averaged, trained, weight)
        for copy, count in pairs:
            if not copy.is_floating_point():  # batch norm's number of batches
                copy.copy_(count)


def _list_tensors(model: nn.Module) -> list[Tensor]:
    """Return parameters and buffers; they are the network's own memory."""
    return [*model.parameters(), *model.buffers()]
