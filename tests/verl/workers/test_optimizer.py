from __future__ import annotations

import pytest

from verl.trainer.config.schema import OptimConfig
from verl.workers.optimizer import learning_rate


def test_learning_rate_warms_up_and_stays() -> None:
    config = OptimConfig(lr=1.0, lr_warmup_steps_ratio=0.3)
    rates = [learning_rate(step, config=config, total_steps=10) for step in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert learning_rate(0, config=OptimConfig(lr=2.0), total_steps=10) == 2.0
