"""The arithmetic of the reward: outcome plus weighted information gain (InfoReasoner's additive form)."""

from __future__ import annotations

import math


def combine(outcome: float, gain: float | None, *, weight: float) -> float:
    """`outcome + weight * gain`; the outcome alone when there was no gain to measure (`None`).

    A gain whose measurement failed must not get here: it is masked, not left out of the sum. Raises
    ValueError if the sum is not finite.
    """
    reward = outcome if gain is None else outcome + weight * gain
    if not math.isfinite(reward):
        raise ValueError(f"reward must be finite, got outcome {outcome!r} + {weight!r} * gain {gain!r}")
    return reward
