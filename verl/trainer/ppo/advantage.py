"""Credit rules: pure functions from the scores of one group to one advantage per token (NumPy only).

rule = outcome_plus_gain(gain_weight=0.6, normalise_by_std=True)
credit = rule(group.trajectories, scores)      # one float32 array per trajectory, as long as its token_ids
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from verl.protocols import CreditRule
from verl.types import FloatArray, Score, Trajectory
from verl.utils.reward_score.IG_reward import combine

EPSILON = 1e-6
"""Added to the standard deviation; a group that spreads less than this has nothing to compare and gets 0."""


def outcome_plus_gain(*, gain_weight: float, normalise_by_std: bool) -> CreditRule:
    """GRPO on `outcome + gain_weight * gain`: every policy token of a trajectory gets its group advantage.

    With weight 0, or without gains, it is plain GRPO on the outcome.
    """

    def rule(trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[FloatArray]:
        rewards = [trajectory_reward(score, gain_weight=gain_weight) for score in scores]
        advantages = group_advantages(rewards, normalise_by_std=normalise_by_std)
        return [_spread(t, advantage) for t, advantage in zip(trajectories, advantages, strict=True)]

    return rule


def trajectory_reward(score: Score, *, gain_weight: float) -> float | None:
    """Outcome plus weighted gain; None when anything of it failed."""
    if score.failure is not None or score.outcome is None:
        return None
    return combine(score.outcome, score.gain, weight=gain_weight)


def group_advantages(rewards: Sequence[float | None], *, normalise_by_std: bool = True) -> list[float]:
    """`(reward - mean) / (sample std + 1e-6)` within one group; without `normalise_by_std` no division.

    Failed samples (None) are left out of the statistics and get 0. Fewer than two valid samples, or rewards
    that are equal up to rounding, say nothing about which sample was better and give exactly 0. (Search-R1
    gives a lone sample its raw reward instead, an advantage without a baseline.) Sums are exactly rounded, so
    the order of the samples does not matter.
    """
    valid = [reward for reward in rewards if reward is not None]
    if len(valid) < 2:
        return [0.0] * len(rewards)
    mean = math.fsum(valid) / len(valid)
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in valid) / (len(valid) - 1))
    if std < EPSILON:
        return [0.0] * len(rewards)
    scale = std + EPSILON if normalise_by_std else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]


def _spread(trajectory: Trajectory, advantage: float) -> FloatArray:
    return np.where(trajectory.policy_mask, np.float32(advantage), np.float32(0.0))
