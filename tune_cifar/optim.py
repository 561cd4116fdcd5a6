"""Optimizers and learning-rate schedules from a config: the only room that names torch.optim.

Schedules are stepped once per batch over `total_steps = epochs x steps per epoch`, whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from tune_cifar.errors import ConfigError
from tune_cifar.schema import TrainConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """The config's optimizer over all parameters in one group, in torch's fused implementation.

    Weight decay applies to every parameter, as in the source systems.
    """
    if config.optimizer == "sgd":
        return SGD(
            parameters,
            lr=config.max_lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
    betas = (config.momentum, 0.999)  # beta2: Adam's published default, which every source system kept
    if config.optimizer == "adam":
        return Adam(parameters, lr=config.max_lr, betas=betas, weight_decay=config.weight_decay, fused=True)
    return AdamW(parameters, lr=config.max_lr, betas=betas, weight_decay=config.decoupled_weight_decay, fused=True)


def make_schedule(optimizer: Optimizer, config: TrainConfig, epoch: int = 1) -> LRScheduler:
    """The config's schedule from its beginning, over the whole cycle that the epoch (from 1) belongs to; to be stepped
    after every optimizer step of the cycle but the last.

    Raises:
        ConfigError: when OneCycle's warm-up would be no longer than one step.
    """
    for group in optimizer.param_groups:
        group["lr"] = config.max_lr  # a warm restart finds it annealed
    total_steps = config.count_cycle_epochs(epoch) * config.num_steps_per_epoch
    if config.schedule == "onecycle":
        if config.pct_start * total_steps <= 1:
            raise ConfigError(
                f"schedule onecycle: pct_start x total steps > 1 must hold, got {config.pct_start} x {total_steps}. "
                "Raise pct_start or epochs, or lower batch_size."
            )
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
