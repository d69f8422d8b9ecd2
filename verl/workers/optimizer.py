"""AdamW, and a learning rate that warms up linearly and then stays constant."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from verl.trainer.config.schema import OptimConfig


def make_optimizer(parameters: Iterable[nn.Parameter], *, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019); at learning rate 0 no weight changes or decays."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )


def learning_rate(step: int, *, config: OptimConfig, total_steps: int) -> float:
    """Return the learning rate of training step `step`, counted from 0."""
    warmup_steps = int(config.lr_warmup_steps_ratio * total_steps)
    return config.lr * min(1.0, (step + 1) / (warmup_steps + 1))
