"""Every knob does something: changing it alone changes what can be observed of a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.builders import FEW_IMAGES, SHAPES, make_config
from tune_cifar.data.load import load_train_val
from tune_cifar.schema import KNOBS, Numerics, TrainConfig
from tune_cifar.train.optim import schedule_steps
from tune_cifar.train.trainer import Trainer

# For each knob: another value, and the settings with which the knob is active.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": ("s8", {}),
    "dropout": (0.5, {}),
    "optimizer": ("adam", {}),
    "nesterov": (True, {}),
    "momentum": (0.5, {"schedule": "constant"}),
    "weight_decay": (0.1, {}),
    "decoupled_weight_decay": (0.5, {"optimizer": "adamw"}),
    "schedule": ("cosine", {}),
    "max_lr": (0.05, {}),
    "pct_start": (0.6, {}),
    "div_factor": (2.0, {}),
    "final_div_factor": (1.0, {}),
    "anneal_strategy": ("linear", {}),
    "cycle_momentum": (False, {}),
    "base_momentum": (0.2, {}),
    "max_momentum": (0.99, {}),
    "milestone_fractions": ((0.25,), {"schedule": "step"}),
    "gamma": (0.5, {"schedule": "step"}),
    "warm_restarts": ((1,), {}),
    "batch_size": (16, {}),
    "epochs": (4, {}),
    "label_smoothing": (0.2, {}),
    "ema_decay": (0.5, {}),
    "train_size": (60, {}),
    "val_size": (50, {}),
    "seed": (1, {}),
    "augment_backend": ("albumentations", {"shift_scale_rotate_p": 1.0}),
    "crop_pad": (4, {}),
    "hflip_p": (1.0, {}),
    "hflip_mode": ("alternating", {}),
    "shift_scale_rotate_p": (1.0, {}),
    "shift_limit": (0.4, {}),
    "scale_limit": (0.4, {}),
    "rotate_limit": (120.0, {}),
    "cutout_p": (1.0, {}),
    "cutout_size": (4, {}),
    "gray_p": (1.0, {}),
}


observed: dict[str, dict[str, Any]] = {}


def observe(config: TrainConfig, numerics: Numerics) -> dict[str, Any]:
    """Return what can be observed of a training; equal configs are trained once."""
    dump = config.model_dump_json()
    if dump not in observed:
        observed[dump] = train_and_observe(config, numerics)
    return observed[dump]


def train_and_observe(config: TrainConfig, numerics: Numerics) -> dict[str, Any]:
    """Train six of the eight steps.

    Returns:
        optimizer settings and losses of every step, number and sum of the weights, numbers of
        images.
    """
    data = load_train_val(SHAPES, config.train_size, config.val_size)
    trainer = Trainer(config, data, numerics)
    groups = []
    losses = []
    trainer._step.model.train()
    batches = trainer._repeat_batches()
    for _, batch, settings in zip(range(6), batches, schedule_steps(config), strict=False):
        losses.append(trainer._train_step(*batch, settings)[0].item())
        group = {k: v for k, v in trainer._step.optimizer.param_groups[0].items() if k != "params"}
        groups.append(repr(sorted(group.items())))
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return {
        "optimizer": groups,
        "losses": losses,
        "weights": (len(weights), weights.double().sum().item()),
        "images": (len(data.train), len(data.val) if data.val else 0),
    }


def test_every_knob_has_a_change() -> None:
    assert set(CHANGES) == set(KNOBS)


@pytest.mark.parametrize("knob", KNOBS)
def test_a_changed_knob_changes_something(knob: str, fp32: Numerics) -> None:
    value, context = CHANGES[knob]
    before = make_config(**FEW_IMAGES, **context)
    after = make_config(**{**FEW_IMAGES, **context, knob: value})
    assert before.fingerprint != after.fingerprint
    assert observe(before, fp32) != observe(after, fp32)


idle_steps: dict[Any, Any] = {}
"""The captured steps of the trainings below."""
captured_before: dict[str, list[Any]] = {}


@pytest.mark.slow
@pytest.mark.parametrize("knob", KNOBS)
def test_a_changed_knob_changes_something_in_a_captured_step_too(
    knob: str, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All trainings share one step if they can: a knob that the step ignores keeps its value."""
    monkeypatch.setattr("tune_cifar.train.step._idle", idle_steps)
    captured = fp32.model_copy(update={"execution": "captured"})

    def train(config: TrainConfig) -> list[Any]:
        data = load_train_val(SHAPES, config.train_size, config.val_size)
        trainer = Trainer(config, data, captured)
        results = [(epoch.step, epoch.train_loss, epoch.val_loss, epoch.lr) for epoch in trainer]
        weights = [weight.detach().double().sum().item() for weight in trainer.model.parameters()]
        return [*results, sum(weights)]

    value, context = CHANGES[knob]
    plain = make_config(**FEW_IMAGES, **context)
    if plain.fingerprint not in captured_before:
        captured_before[plain.fingerprint] = train(plain)
    changed = train(make_config(**{**FEW_IMAGES, **context, knob: value}))
    assert captured_before[plain.fingerprint] != changed


@pytest.mark.parametrize(
    ("knob", "value", "context"),
    [
        ("momentum", 0.5, {}),
        ("pct_start", 0.6, {"schedule": "constant"}),
        ("gamma", 0.5, {}),
        ("decoupled_weight_decay", 0.5, {}),
        ("rotate_limit", 120.0, {"shift_scale_rotate_p": 0.0}),
        ("cutout_size", 4, {"cutout_p": 0.0}),
    ],
)
def test_an_inactive_knob_changes_nothing(
    knob: str, value: Any, context: dict[str, Any], fp32: Numerics
) -> None:
    before = make_config(**FEW_IMAGES, **context)
    after = make_config(**{**FEW_IMAGES, **context, knob: value})
    assert before.fingerprint == after.fingerprint
    assert observe(before, fp32) == observe(after, fp32)
