"""Optimizers carry the config's values; schedules follow their definition at every step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.builders import make_config
from tune_cifar.errors import ConfigError
from tune_cifar.schema import TrainConfig
from tune_cifar.train.optim import Settings, apply_settings, make_optimizer, schedule_steps


def run_schedule(config: TrainConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """LR and momentum (beta1) of every step of a training."""
    lrs, momenta = zip(*schedule_steps(config), strict=True)
    assert len(lrs) == config.epochs * config.num_steps_per_epoch
    return lrs, momenta


def anneal(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_onecycle_follows_its_definition_at_every_step(optimizer: str) -> None:
    cycle = {"pct_start": 0.25, "div_factor": 10.0, "final_div_factor": 100.0}
    config = make_config(optimizer=optimizer, max_lr=0.02, **cycle, epochs=5)
    lrs, momenta = run_schedule(config)
    peak = 0.25 * 20 - 1  # 20 steps in all; the peak is the last step of the warm-up
    for step, (lr, momentum) in enumerate(zip(lrs, momenta, strict=True)):
        up = step <= peak
        fraction = step / peak if up else (step - peak) / (19 - peak)
        lr_ends = (0.002, 0.02) if up else (0.02, 0.002 / 100)
        momentum_ends = (0.95, 0.85) if up else (0.85, 0.95)
        assert lr == pytest.approx(anneal(*lr_ends, fraction), rel=1e-9)
        assert momentum == pytest.approx(anneal(*momentum_ends, fraction), rel=1e-9)


def test_onecycle_without_cycle_momentum_keeps_the_momentum() -> None:
    _, momenta = run_schedule(make_config(cycle_momentum=False, momentum=0.7))
    assert set(momenta) == {0.7}


def test_cosine_follows_its_definition_at_every_step() -> None:
    lrs, _ = run_schedule(make_config(schedule="cosine", epochs=5))
    assert lrs == pytest.approx([anneal(0.01, 0.0, step / 20) for step in range(20)], rel=1e-9)


def test_step_schedule_falls_at_the_fractions_whatever_the_batch_size() -> None:
    recipe = {"schedule": "step", "milestone_fractions": (0.375, 0.75), "gamma": 0.1}
    for batch_size in (32, 7):
        config = make_config(**recipe, epochs=8, batch_size=batch_size)
        lrs, _ = run_schedule(config)
        per_epoch = config.num_steps_per_epoch
        want = [0.01] * 3 * per_epoch + [0.001] * 3 * per_epoch + [0.0001] * 2 * per_epoch
        assert lrs == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "step"])
def test_a_restarted_schedule_is_that_of_a_training_as_long_as_its_cycle(schedule: str) -> None:
    def list_steps(epochs: int, restarts: tuple[int, ...] = ()) -> list[Settings]:
        config = make_config(schedule=schedule, epochs=epochs, warm_restarts=restarts)
        return list(schedule_steps(config))

    assert list_steps(5, restarts=(2,)) == list_steps(2) + list_steps(3)


def test_a_resumed_training_takes_the_rest_of_its_schedule() -> None:
    config = make_config(epochs=5, warm_restarts=(2,))
    steps = list(schedule_steps(config))
    for num_done in (0, 1, 7, 8, 9, 19, 20):
        assert list(schedule_steps(config, num_done)) == steps[num_done:]


def test_constant_schedule_never_moves() -> None:
    lrs, _ = run_schedule(make_config(schedule="constant", epochs=5))
    assert lrs == (0.01,) * 20


def test_onecycle_refuses_a_warm_up_of_one_step_or_less() -> None:
    config = make_config(pct_start=0.1)
    with pytest.raises(ConfigError, match=r"pct_start x total steps > 1 must hold, got 0\.1 x 8"):
        schedule_steps(config)
    late = make_config(pct_start=0.1, epochs=5, warm_restarts=(4,))
    with pytest.raises(ConfigError, match=r"got 0\.1 x 4"):
        schedule_steps(late)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"optimizer": "sgd", "schedule": "constant", "momentum": 0.8}, "momentum", 0.8),
        ({"optimizer": "sgd", "schedule": "constant", "nesterov": True}, "nesterov", True),
        ({"optimizer": "sgd", "weight_decay": 0.03}, "weight_decay", 0.03),
        ({"optimizer": "adam", "schedule": "constant", "momentum": 0.8}, "betas", (0.8, 0.999)),
        ({"optimizer": "adam", "weight_decay": 0.03}, "weight_decay", 0.03),
        ({"optimizer": "adamw", "decoupled_weight_decay": 0.03}, "weight_decay", 0.03),
    ],
)
def test_optimizer_carries_the_configs_value(changes: dict[str, Any], key: str, value: Any) -> None:
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], make_config(**changes))
    assert optimizer.param_groups[0][key] == value


@pytest.mark.parametrize(
    ("optimizer", "key", "want"), [("sgd", "momentum", 0.6), ("adam", "betas", (0.6, 0.999))]
)
def test_settings_reach_the_optimizer(optimizer: str, key: str, want: Any) -> None:
    made = make_optimizer([nn.Parameter(torch.zeros(1))], make_config(optimizer=optimizer))
    apply_settings(made, Settings(0.3, 0.6))
    assert (made.param_groups[0]["lr"], made.param_groups[0][key]) == (0.3, want)


def test_coupled_decay_enters_adams_gradient_and_decoupled_decay_does_not() -> None:
    shrunk = {}
    for optimizer, name in (("adam", "weight_decay"), ("adamw", "decoupled_weight_decay")):
        weight = nn.Parameter(torch.ones(1))
        weight.grad = torch.zeros(1)
        make_optimizer([weight], make_config(optimizer=optimizer, max_lr=0.1, **{name: 0.1})).step()
        shrunk[optimizer] = 1 - weight.item()
    assert shrunk["adam"] == pytest.approx(0.1, rel=1e-4)  # a normalised gradient: max_lr
    assert shrunk["adamw"] == pytest.approx(0.01, rel=1e-4)  # max_lr x decay
