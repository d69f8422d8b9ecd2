"""Combine outcome and information gain into a reward (InfoReasoner's additive form)."""

from __future__ import annotations

import math


def combine(outcome: float, gain: float | None, *, weight: float) -> float:
    """Return `outcome + weight * gain`; the outcome alone when there was no gain to measure (None).

    Trajectories whose gain failed are masked by the caller, not passed here. Raises ValueError if the sum is
    not finite.
    """
    reward = outcome if gain is None else outcome + weight * gain
    if not math.isfinite(reward):
        raise ValueError(f"reward must be finite, got outcome {outcome!r} + {weight!r} * gain {gain!r}")
    return reward
