"""The executions of a step: they differ in how kernels are launched alone.

On the CPU the captured program runs uncaptured; where there is a GPU the same is asserted on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests import builders
from tests.builders import FEW_IMAGES, SHAPES
from tune_cifar.data.load import TrainVal, load_train_val
from tune_cifar.dataset import CIFAR10
from tune_cifar.models.dropout import Dropout
from tune_cifar.schema import REPRODUCIBLE_FIELDS, EpochResult, Numerics, TrainConfig
from tune_cifar.train import step as step_module
from tune_cifar.train.checkpoint import load_checkpoint, save_checkpoint
from tune_cifar.train.numerics import resolve_numerics
from tune_cifar.train.optim import Settings
from tune_cifar.train.step import (
    CapturedStep,
    make_graph_key,
    make_smoothing,
    smoothed_cross_entropy,
)
from tune_cifar.train.trainer import Trainer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Three batches of three images and one of one: s10 is slow on a CPU, in bf16 (44 s) above all.
FEWEST_IMAGES = {"batch_size": 3, "train_size": 10, "val_size": 10}
RECIPES: list[tuple[str, str, dict[str, Any]]] = [
    ("s7", "fp32", {}),
    ("s8", "bf16", {"nesterov": True, "weight_decay": 0.01, "label_smoothing": 0.1}),
    (
        "s10",
        "fp32",
        {"optimizer": "adam", "weight_decay": 0.01, "label_smoothing": 0.2, **FEWEST_IMAGES},
    ),
    ("s6", "fp32", {"optimizer": "adamw", "decoupled_weight_decay": 0.05, "crop_pad": 4}),
]


@pytest.fixture(autouse=True)
def no_idle_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "_idle", {})


def make_numerics(device: str, precision: str = "fp32", execution: str = "captured") -> Numerics:
    found = resolve_numerics(device, precision, deterministic=device == "cuda")
    return found.model_copy(update={"execution": execution})


@pytest.fixture(params=DEVICES)
def captured(request: pytest.FixtureRequest) -> Numerics:
    return make_numerics(request.param)


def make_config(**changes: Any) -> TrainConfig:
    return builders.make_config(**{**FEW_IMAGES, **changes})


def curve(results: list[EpochResult]) -> list[list[Any]]:
    return [[getattr(result, name) for name in REPRODUCIBLE_FIELDS] for result in results]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("model", "precision", "recipe"), RECIPES)
def test_without_dropout_a_captured_training_is_the_eager_one_bit_for_bit(
    device: str, model: str, precision: str, recipe: dict[str, Any]
) -> None:
    """Three steps an epoch, and a smaller batch that no graph runs."""
    config = make_config(model=model, dropout=0.0, **recipe, epochs=2)
    data = load_train_val(SHAPES, config.train_size, config.val_size)
    assert config.train_size % config.batch_size
    eager, captured = (
        curve(list(Trainer(config, data, make_numerics(device, precision, execution))))
        for execution in ("eager", "captured")
    )
    assert eager == captured


@pytest.mark.parametrize("share", [0.05, 0.1, 0.137, 0.9])
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_the_loss_is_torchs_with_label_smoothing_bit_for_bit(
    share: float, num_classes: int
) -> None:
    """Of factors that are numbers, and in device memory."""
    names = tuple(f"class{number}" for number in range(num_classes))
    data = CIFAR10.model_copy(update={"class_names": names})
    factors = make_smoothing(make_config(label_smoothing=share), data)
    assert factors is not None
    generator = torch.Generator().manual_seed(num_classes)
    logits = 3 * torch.randn(127, num_classes, generator=generator)
    labels = torch.randint(num_classes, (127,), generator=generator)
    found = []
    for smoothing in (share, factors, torch.tensor(factors).unbind()):
        inputs = logits.clone().requires_grad_()
        if isinstance(smoothing, float):
            loss = F.cross_entropy(inputs, labels, label_smoothing=smoothing)
        else:
            loss = smoothed_cross_entropy(inputs, labels, smoothing)
        loss.backward()
        found.append((loss.detach(), inputs.grad))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])


def test_dropout_of_a_captured_step_has_the_configs_drop_probability(captured: Numerics) -> None:
    step = CapturedStep(make_config(model="s8", dropout=0.3), captured)
    step.reset(make_config(model="s8", dropout=0.1))
    dropout = next(layer for layer in step.model.modules() if isinstance(layer, Dropout))
    output = dropout(torch.ones(64, 32, 16, 16, device=captured.device))
    kept = output != 0
    assert abs(float(kept.float().mean()) - 0.9) < 0.003
    assert output[kept].unique().tolist() == pytest.approx([1 / 0.9], rel=1e-4)


def test_a_reused_step_trains_as_a_new_one(few: TrainVal, captured: Numerics) -> None:
    """Two recipes with another optimizer, schedule and augmentation share a graph."""
    first = make_config(max_lr=0.01, rotate_limit=30.0, weight_decay=0.01)
    other = {"optimizer": "adam", "gray_p": 0.0, "rotate_limit": 5.0, "dropout": 0.2}
    second = make_config(**other, seed=3, epochs=3)
    assert make_graph_key(first, captured) == make_graph_key(second, captured)
    alone = curve(list(Trainer(second, few, captured)))
    step_module._idle.clear()
    trainer = Trainer(first, few, captured)
    step = trainer._step
    before = curve(list(trainer))
    del trainer
    assert list(step_module._idle.values()) == [step]
    trainer = Trainer(second, few, captured)
    assert trainer._step is step and step_module._idle == {}
    assert curve(list(trainer)) == alone
    del trainer
    assert curve(list(Trainer(first, few, captured))) == before


def test_two_trainings_at_once_have_a_step_each(few: TrainVal, captured: Numerics) -> None:
    config = make_config(epochs=2)
    alone = curve(list(Trainer(config, few, captured)))
    trainers = [Trainer(config, few, captured) for _ in range(2)]
    results = [list(pair) for pair in zip(*(iter(trainer) for trainer in trainers), strict=True)]
    assert [curve(list(column)) for column in zip(*results, strict=True)] == [alone, alone]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "s8"},
        {"batch_size": 16},
        {"dropout": 0.0},
        {"dropout": 1e-9},
        {"label_smoothing": 0.1},
    ],
)
def test_what_changes_the_graph_changes_its_key(changes: dict[str, Any], fp32: Numerics) -> None:
    other = make_graph_key(make_config(**changes), fp32)
    assert make_graph_key(make_config(), fp32) != other


def test_idle_steps_are_kept_as_long_as_they_leave_room(
    fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = fp32.model_copy(update={"execution": "captured"})
    monkeypatch.setattr(step_module, "get_memory_mb", lambda numerics: 80.0)
    steps = [CapturedStep(make_config(batch_size=size), captured) for size in (2, 4, 8, 16)]
    for step, num_mb in zip(steps, (4, 3, 5, 11), strict=True):
        step.num_bytes = num_mb * 2**20
    for step in steps[:3]:
        step_module.release_step(step, captured)
    assert list(step_module._idle.values()) == steps[1:3]
    step_module.release_step(steps[3], captured)
    assert step_module._idle == {}
    # A process that may use half of a GPU.
    on_gpu = captured.model_copy(update={"device": "cuda"})
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.5)
    for step in steps[:2]:
        step_module.release_step(step, on_gpu)
    assert list(step_module._idle.values()) == steps[1:2]


def test_a_capture_takes_what_is_in_use_after_it_and_was_not_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not less what the allocator had kept of tensors that are gone: a capture empties that."""
    kept = [9]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5 + sum(kept))
    assert step_module._count_reserved(torch.device("cuda")) == 5
    assert step_module._count_reserved(torch.device("cpu")) == 0


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_resumed_captured_training_is_bitwise_the_uninterrupted_one(
    optimizer: str, few: TrainVal, captured: Numerics, tmp_path: Path
) -> None:
    config = make_config(optimizer=optimizer, epochs=3)
    uninterrupted = curve(list(Trainer(config, few, captured)))
    interrupted = Trainer(config, few, captured)
    next(iter(interrupted))
    save_checkpoint(tmp_path / "checkpoint-0001.pt", interrupted.state_dict())
    list(interrupted)
    del interrupted
    resumed = Trainer(config, few, captured)
    resumed.load_state_dict(load_checkpoint(tmp_path / "checkpoint-0001.pt"))
    assert curve(list(resumed)) == uninterrupted[1:]


def test_a_sweep_runs_captured_too(few: TrainVal, captured: Numerics) -> None:
    config = make_config(dropout=0.0)
    lrs = [10 ** (i / 2 - 4) for i in range(6)]
    eager = captured.model_copy(update={"execution": "eager"})
    losses = [list(Trainer(config, few, numerics).sweep(lrs)) for numerics in (eager, captured)]
    assert losses[0] == losses[1]


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler's own reads
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_compiled_training_is_the_captured_one_to_rounding(dropout: float, few: TrainVal) -> None:
    """By inductor on the CPU: not only faults, but too slow for `make test`."""
    config = make_config(model="s8", dropout=dropout, epochs=2)
    losses = [
        [result.train_loss for result in Trainer(config, few, make_numerics("cpu", "fp32", how))]
        for how in ("captured", "compiled")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["s7", "s8", "s10"])
def test_a_cuda_graph_trains_as_its_program_does(model: str, few: TrainVal) -> None:
    """With dropout, and deterministic kernels."""
    config = make_config(model=model, dropout=0.1)
    graph, program = (Trainer(config, few, make_numerics("cuda", "bf16")) for _ in range(2))
    step = program._step
    assert isinstance(step, CapturedStep)
    step._replay, step._gradients = step._run_captured, []
    assert curve(list(graph)) == curve(list(program))


@pytest.mark.gpu
def test_a_captured_step_never_waits_for_the_device(few: TrainVal) -> None:
    step = CapturedStep(make_config(), make_numerics("cuda", "bf16"))
    images, labels = few.train.images_NCHW[:8].cuda(), few.train.labels_N[:8].cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step.train(images, labels, Settings(0.01, 0.9))
    finally:
        torch.cuda.set_sync_debug_mode("default")
