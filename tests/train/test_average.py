"""The moving average of weights against its definition."""

from __future__ import annotations

import torch
from torch import nn

from tune_cifar.train.average import WeightAverage


def make_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def test_the_average_is_the_recursion_with_its_warm_up() -> None:
    torch.manual_seed(0)
    model, source = make_network(), make_network()
    average = WeightAverage(model, source, 0.9)
    weight, mean = model[0].weight.detach().double(), model[1].running_mean.double()
    for step in range(1, 200):
        source(torch.randn(4, 1, 3, 3))  # moves batch norm's statistics
        with torch.no_grad():
            source[0].weight.normal_()
        average.update(step)
        share = 1 - min(0.9, (1 + step) / (10 + step))
        weight = weight + share * (source[0].weight.detach().double() - weight)
        mean = mean + share * (source[1].running_mean.double() - mean)
    torch.testing.assert_close(model[0].weight.detach().double(), weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(model[1].running_mean.double(), mean, atol=1e-5, rtol=0)
    assert model[1].num_batches_tracked == source[1].num_batches_tracked == 199


def test_an_average_of_what_does_not_move_is_that() -> None:
    model, source = make_network(), make_network()
    average = WeightAverage(model, source, 0.99)
    for step in range(1, 3000):
        average.update(step)
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)


class Counting(nn.Module):
    """Puts a new tensor in its buffers' place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, values: torch.Tensor) -> None:
        self.mean = 0.5 * self.mean + 0.5 * values
        self.count = self.count + 1


def test_a_buffer_that_the_network_replaces_is_averaged_too() -> None:
    model, source = Counting(), Counting()
    average = WeightAverage(model, source, 0.9)
    for step in (1, 2):
        source(torch.ones(2))
        average.update(step)
    first = (1 - 2 / 11) * 0.5
    expected = first + (1 - 3 / 12) * (0.75 - first)
    torch.testing.assert_close(model.mean, torch.full((2,), expected))
    assert model.count == 2
