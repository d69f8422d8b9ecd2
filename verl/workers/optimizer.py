"""AdamW, and a learning rate that warms up linearly and then stays."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from verl.trainer.config.schema import OptimConfig


def make_optimizer(parameters: Iterable[nn.Parameter], *, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019): at lr 0 nothing moves or decays."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )


def learning_rate(step: int, *, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of training step `step` (from 0); the whole of it from the end of the warm-up on."""
    warmup_steps = int(config.lr_warmup_steps_ratio * total_steps)
    return config.lr * min(1.0, (step + 1) / (warmup_steps + 1))
