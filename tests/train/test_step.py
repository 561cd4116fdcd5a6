"""The two executions of a step: kernel by kernel, and one program with its knobs on the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests import builders
from tests.builders import FEW_IMAGES
from tune_cifar.augment.batched import apply_pixel_ops, draw_policy
from tune_cifar.augment.policies import make_policy
from tune_cifar.data.load import TrainVal
from tune_cifar.models.dropout import Dropout
from tune_cifar.schema import REPRODUCIBLE_FIELDS, EpochResult, Numerics, TrainConfig
from tune_cifar.train import step as step_module
from tune_cifar.train.checkpoint import load_checkpoint, save_checkpoint
from tune_cifar.train.numerics import resolve_numerics
from tune_cifar.train.optim import (
    DeviceOptimizer,
    Settings,
    apply_settings,
    make_optimizer,
    schedule_steps,
)
from tune_cifar.train.step import (
    DEVICE_KNOBS,
    CapturedStep,
    EagerStep,
    acquire_step,
    make_graph_key,
)
from tune_cifar.train.trainer import Trainer


@pytest.fixture
def captured(fp32: Numerics, monkeypatch: pytest.MonkeyPatch) -> Numerics:
    """The captured program on the CPU, where nothing is captured, without idle steps."""
    monkeypatch.setattr(step_module, "_idle", {})
    return fp32.model_copy(update={"execution": "captured"})


def make_config(**changes: Any) -> TrainConfig:
    return builders.make_config(**{**FEW_IMAGES, **changes})


def curve(results: list[EpochResult]) -> list[list[Any]]:
    return [[getattr(result, name) for name in REPRODUCIBLE_FIELDS] for result in results]


PLAIN = {"dropout": 0.0}
RECIPES: list[dict[str, Any]] = [
    {},
    {"nesterov": True, "weight_decay": 0.01, "label_smoothing": 0.1},
    {"optimizer": "adam", "weight_decay": 0.01},
    {"optimizer": "adamw", "decoupled_weight_decay": 0.05, "label_smoothing": 0.2, "crop_pad": 4},
]


@pytest.mark.parametrize(
    ("recipe", "max_lr"),
    [
        (RECIPES[0], 0.001),
        (RECIPES[0], 0.01),
        (RECIPES[0], 0.03),
        *((recipe, 0.002) for recipe in RECIPES[1:]),
    ],
)
def test_a_captured_training_is_the_eager_one_to_rounding(
    recipe: dict[str, Any], max_lr: float, few: TrainVal, fp32: Numerics, captured: Numerics
) -> None:
    """Without dropout, whose random numbers differ: order, augmentation and every update agree."""
    config = make_config(**PLAIN, **recipe, max_lr=max_lr, epochs=1)
    start, eager, program = (Trainer(config, few, numerics) for numerics in (fp32, fp32, captured))
    (result,), (other,) = list(eager), list(program)
    assert result.lr == other.lr and result.step == other.step
    assert result.train_loss == pytest.approx(other.train_loss, rel=1e-4)
    before, one, two = (flatten(trainer.model) for trainer in (start, eager, program))
    # Adam takes a step of lr for any gradient, however small: single weights may go either way.
    tolerance = 1e-3 if config.optimizer == "sgd" else 0.02
    assert float((one - two).norm() / (one - before).norm()) < tolerance


def flatten(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_dropout_of_a_captured_step_has_the_configs_drop_probability(captured: Numerics) -> None:
    step = CapturedStep(make_config(model="s8", dropout=0.3), captured)
    step.reset(make_config(model="s8", dropout=0.1))
    dropout = next(layer for layer in step.model.modules() if isinstance(layer, Dropout))
    output = dropout(torch.ones(64, 32, 16, 16))
    kept = output != 0
    assert abs(float(kept.float().mean()) - 0.9) < 0.003
    assert output[kept].unique().tolist() == pytest.approx([1 / 0.9], rel=1e-4)


def test_a_reused_step_trains_as_a_new_one(few: TrainVal, captured: Numerics) -> None:
    first = make_config(max_lr=0.01, rotate_limit=30.0, weight_decay=0.01)
    knobs = {"max_lr": 0.05, "rotate_limit": 5.0, "weight_decay": 0.1, "dropout": 0.2}
    second = make_config(**knobs, seed=3, epochs=3)
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
        {"optimizer": "adam"},
        {"nesterov": True},
        {"gray_p": 0.0},
        {"dropout": 0.0},
        {"dropout": 1e-9},
        {"label_smoothing": 0.1},
    ],
)
def test_what_changes_the_program_changes_its_graph_key(
    changes: dict[str, Any], captured: Numerics
) -> None:
    other = make_graph_key(make_config(**changes), captured)
    assert make_graph_key(make_config(), captured) != other


def test_only_the_last_idle_steps_are_kept(captured: Numerics) -> None:
    steps = [CapturedStep(make_config(batch_size=size), captured) for size in (2, 4, 8)]
    for step in steps:
        step_module.release_step(step)
    assert list(step_module._idle.values()) == steps[-step_module.NUM_IDLE :]


def test_the_reference_augmentation_is_never_captured(captured: Numerics) -> None:
    config = make_config(augment_backend="albumentations")
    assert isinstance(acquire_step(config, captured), EagerStep)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_resumed_captured_training_is_bitwise_the_uninterrupted_one(
    optimizer: str, few: TrainVal, captured: Numerics, tmp_path: Any
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


def test_a_sweep_runs_captured_too(few: TrainVal, fp32: Numerics, captured: Numerics) -> None:
    config = make_config(**PLAIN)
    lrs = [10 ** (i / 2 - 4) for i in range(6)]
    losses = [list(Trainer(config, few, numerics).sweep(lrs)) for numerics in (fp32, captured)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.get("optimizer", "sgd"))
def test_the_device_optimizer_makes_torchs_updates(recipe: dict[str, Any]) -> None:
    config = make_config(**recipe, epochs=3)
    weights = [torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3)]
    mine, theirs = ([nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    names = ("lr", "momentum", "weight_decay", "decoupled_weight_decay")
    knobs = {name: torch.tensor(float(getattr(config, name, 0.0))) for name in names}
    ours, torchs = DeviceOptimizer(mine, config, knobs), make_optimizer(theirs, config)
    generator = torch.Generator().manual_seed(1)
    for settings in schedule_steps(config):
        for name, value in settings._asdict().items():
            knobs[name].fill_(value)
        apply_settings(torchs, settings)
        for one, two in zip(mine, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        ours.step()
        torchs.step()
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_knobs_in_device_memory_give_the_same_images(few: TrainVal) -> None:
    config = make_config(crop_pad=4)
    tensors = {name: torch.tensor(float(getattr(config, name))) for name in DEVICE_KNOBS}
    with_tensors: Any = SimpleNamespace(**(config.model_dump() | tensors))
    on_device = make_policy(with_tensors)
    augmented = []
    for policy in (make_policy(config), on_device):
        draws = draw_policy(policy, len(few.train), torch.Generator().manual_seed(0))
        augmented.append(apply_pixel_ops(policy, few.train.images_NCHW, draws))
    assert torch.equal(*augmented)


@pytest.mark.gpu
@pytest.mark.parametrize("max_lr", [0.001, 0.01, 0.03])
@pytest.mark.parametrize("model", ["s7", "s8", "s10"])
def test_a_cuda_graph_trains_as_its_program_does(model: str, max_lr: float, few: TrainVal) -> None:
    """With deterministic kernels the graph and the same program kernel by kernel agree in bits."""
    eager = resolve_numerics("cuda", "bf16", deterministic=True)
    numerics = eager.model_copy(update={"execution": "captured"})
    config = make_config(model=model, max_lr=max_lr)
    graph = Trainer(config, few, numerics)
    program = Trainer(config, few, numerics)
    assert isinstance(program._step, CapturedStep)
    program._step._replay = program._step._run_captured
    assert curve(list(graph)) == curve(list(program))


@pytest.mark.gpu
def test_a_captured_gpu_training_follows_the_eager_one(few: TrainVal) -> None:
    config = make_config(**PLAIN)
    eager = resolve_numerics("cuda", "fp32", deterministic=True)
    results = [
        list(Trainer(config, few, eager.model_copy(update={"execution": execution})))[-1]
        for execution in ("eager", "captured")
    ]
    assert results[0].train_loss == pytest.approx(results[1].train_loss, rel=0.01)


@pytest.mark.gpu
def test_a_captured_step_never_waits_for_the_device(few: TrainVal) -> None:
    numerics = resolve_numerics("cuda", "bf16").model_copy(update={"execution": "captured"})
    config = make_config()
    step = CapturedStep(config, numerics)
    images, labels = few.train.images_NCHW[:8].cuda(), few.train.labels_N[:8].cuda()
    schedule = step.to_device([Settings(0.01, 0.9)] * 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for settings in schedule:
            step.train(images, labels, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_device_knob_is_a_knob() -> None:
    assert set(DEVICE_KNOBS) <= set(TrainConfig.model_fields)
