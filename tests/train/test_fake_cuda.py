"""A step's program on fake CUDA tensors: on a machine without a GPU, does it ask for a value?

A fake tensor has a shape and a device, but no values: what would wait for the device raises. A
training step of every network runs so, from the block of images to the loss. Backward and torch's
fused optimizers need a real device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.builders import make_config
from tune_cifar.augment import batched
from tune_cifar.data.load import Split
from tune_cifar.models.build import MODELS
from tune_cifar.schema import Numerics
from tune_cifar.train import batches, step
from tune_cifar.train.batches import Batches
from tune_cifar.train.step import CapturedStep

BATCH_SIZE, NUM_IMAGES = 32, 80
RECIPE: dict[str, Any] = {
    "batch_size": BATCH_SIZE,
    "train_size": NUM_IMAGES,
    "dropout": 0.1,
    "label_smoothing": 0.1,
    "crop_pad": 4,
    "gray_p": 0.2,
    "hflip_p": 0.5,
    "hflip_mode": "alternating",
}


class FakeGenerator:
    """Stands for a generator on a GPU, which torch cannot make here."""

    device = torch.device("cuda")

    def manual_seed(self, seed: int) -> FakeGenerator:
        return self


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Fake tensors, and random numbers of torch's own generator for those on the GPU."""
    device = torch.device("cuda")
    rand, bernoulli = torch.rand, torch.Tensor.bernoulli_
    real_generator = step.make_generator

    def make_generator(seed: int, purpose: str, place: torch.device) -> Any:
        return FakeGenerator() if place.type == "cuda" else real_generator(seed, purpose, place)

    def without_generator(draw: Any) -> Any:
        return lambda *words, generator=None, **options: draw(*words, **options)

    for module in (step, batches):
        monkeypatch.setattr(module, "make_generator", make_generator)
    # torch.tensor makes real values, which a device cannot have here.
    monkeypatch.setattr(
        batched,
        "_constant",
        lambda values, device: torch.empty(1, len(values), 1, 1, device=device),
    )
    monkeypatch.setattr(step, "_drawn", {})
    monkeypatch.setattr(step.copy, "deepcopy", lambda model: model)
    monkeypatch.setattr(step, "place_model", lambda model, device, numerics: model)
    monkeypatch.setattr(step, "capture", lambda function, device, generator: function)
    monkeypatch.setattr(step, "_count_reserved", lambda device: 0)
    monkeypatch.setattr(step.CapturedStep, "_write", lambda self, config: None)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch, "rand", without_generator(rand))
    monkeypatch.setattr(torch.Tensor, "bernoulli_", without_generator(bernoulli))
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        yield device


@pytest.mark.parametrize("model", MODELS)
def test_a_captured_step_asks_for_no_value(
    model: str, fp32: Numerics, fake_cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = {"device": "cuda", "precision": "bf16", "memory_format": "channels_last"}
    numerics = fp32.model_copy(update={**on_gpu, "execution": "captured"})
    config = make_config(**RECIPE, model=model)
    images = torch.zeros(NUM_IMAGES, 3, 32, 32, dtype=torch.uint8, device=fake_cuda)
    split = Split(images, torch.zeros(NUM_IMAGES, dtype=torch.int64, device=fake_cuda))
    made = Batches(config, split).make_batches(torch.arange(NUM_IMAGES, device=fake_cuda))
    trained = CapturedStep(config, numerics)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # starts the device's thread
    for images_NCHW, labels_N in made:
        loss, num_correct = trained._make_gradients(images_NCHW, labels_N)
        assert loss.device.type == num_correct.device.type == "cuda"


def test_what_would_wait_for_the_device_raises(fake_cuda: torch.device) -> None:
    """The controls of the test above."""
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=fake_cuda)
    draws = batched.HFlipDraws(torch.zeros(8, dtype=torch.bool, device=fake_cuda))
    with pytest.raises(DataDependentOutputException):
        images.float().sum().item()
    with pytest.raises(Exception, match="nonzero"):
        batched.change_some(images, draws, batched.flip)
