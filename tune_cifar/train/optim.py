"""Optimizers and learning-rate schedules from a config: the only module that names torch.optim.

A schedule advances once per batch over `epochs x steps per epoch`, whatever the batch size. It
depends on the config alone, so a resumed training takes the rest of it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
)

from tune_cifar.errors import ConfigError
from tune_cifar.schema import TrainConfig

# Adam's published defaults; all source systems use them.
BETA2, ADAM_EPS = 0.999, 1e-8


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """Make the config's optimizer, in torch's fused implementation.

    All parameters are in one group. Weight decay applies to every parameter, as in the source
    systems.
    """
    decay = config.decoupled_weight_decay if config.optimizer == "adamw" else config.weight_decay
    options: dict[str, Any] = {"lr": config.max_lr, "weight_decay": decay, "fused": True}
    if config.optimizer == "sgd":
        options |= {"momentum": config.momentum, "nesterov": config.nesterov}
    else:
        options |= {"betas": (config.momentum, BETA2), "eps": ADAM_EPS}
    return _CLASSES[config.optimizer](parameters, **options)


def _without_compiler(kind: type[Optimizer]) -> type[Optimizer]:
    """Return the optimizer class without its `torch.compile` decorators.

    Nothing is compiled here, and the decorators import torch's compiler, which takes two seconds.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    plain = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    plain["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), plain)


_CLASSES = {
    "sgd": _without_compiler(SGD),
    "adam": _without_compiler(Adam),
    "adamw": _without_compiler(AdamW),
}


class Settings(NamedTuple):
    """The values that a schedule gives one step; momentum is Adam's beta1."""

    lr: float
    momentum: float


def schedule_steps(config: TrainConfig, num_done: int = 0) -> Iterator[Settings]:
    """Return the settings of every step of a training, without the first `num_done` steps.

    With warm restarts the schedule has several cycles, one after another.

    Raises:
        ConfigError: a OneCycle's warm-up would take one step or less.
    """
    lengths = [num_epochs * config.num_steps_per_epoch for num_epochs in config.cycle_epochs]
    for total_steps in lengths:
        if config.schedule == "onecycle" and config.pct_start * total_steps <= 1:
            raise ConfigError(
                "schedule onecycle: pct_start x total steps > 1 must hold, "
                f"got {config.pct_start} x {total_steps}. "
                "Raise pct_start or epochs, or lower batch_size."
            )
    cycles = (_schedule_cycle(config, total_steps) for total_steps in lengths)
    return itertools.islice(itertools.chain.from_iterable(cycles), num_done, None)


def _schedule_cycle(config: TrainConfig, total_steps: int) -> Iterator[Settings]:
    """Yield the settings of a cycle, from torch's schedule on an optimizer of one weight."""
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], config)
    schedule = _make_schedule(optimizer, config, total_steps)
    group = optimizer.param_groups[0]
    for step in range(total_steps):
        momentum = group["momentum"] if "momentum" in group else group["betas"][0]
        yield Settings(float(group["lr"]), float(momentum))
        optimizer.step()
        if step + 1 < total_steps:
            schedule.step()


def _make_schedule(optimizer: Optimizer, config: TrainConfig, total_steps: int) -> LRScheduler:
    if config.schedule == "onecycle":
        return OneCycleLR(
            optimizer,
            max_lr=config.max_lr,
            total_steps=total_steps,
            pct_start=config.pct_start,
            anneal_strategy=config.anneal_strategy,
            cycle_momentum=config.cycle_momentum,
            base_momentum=config.base_momentum,
            max_momentum=config.max_momentum,
            div_factor=config.div_factor,
            final_div_factor=config.final_div_factor,
        )
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=total_steps)
    if config.schedule == "step":
        milestones = [round(fraction * total_steps) for fraction in config.milestone_fractions]
        return MultiStepLR(optimizer, milestones=milestones, gamma=config.gamma)
    return ConstantLR(optimizer, factor=1.0, total_iters=0)


def apply_settings(optimizer: Optimizer, settings: Settings) -> None:
    """Set the learning rate and momentum of the optimizer's next step."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr
        if "betas" in group:
            group["betas"] = (settings.momentum, group["betas"][1])
        else:
            group["momentum"] = settings.momentum
