"""Shared arithmetic of the methods: pure functions over rewards of a group and tokens of a trajectory.

NumPy only. None stands for a sample that failed: it is left out of every statistic and gets no credit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from verl.types import Component, Credit, FloatArray, SpanKind, Trajectory

EPSILON = 1e-6
"""Added to the standard deviation; a group that spreads less than this has nothing to compare and gets 0."""


def group_advantages(rewards: Sequence[float | None], *, by_std: bool = True) -> list[float]:
    """Return `(reward - mean) / (sample std + 1e-6)` within one group; without `by_std` no division.

    Failed samples (None) are left out of the statistics and get 0. Fewer than two valid samples, or rewards
    that are equal up to rounding, say nothing about which sample was better and give exactly 0. (Search-R1
    gives a lone sample its raw reward instead, an advantage without a baseline.) Sums are exactly rounded, so
    the order of the samples does not matter. Source: DeepSeekMath, arXiv 2402.03300, section 4.1.
    """
    valid = [reward for reward in rewards if reward is not None]
    if len(valid) < 2:
        return [0.0] * len(rewards)
    mean = math.fsum(valid) / len(valid)
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in valid) / (len(valid) - 1))
    if std < EPSILON:
        return [0.0] * len(rewards)
    scale = std + EPSILON if by_std else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]


def leave_one_out(rewards: Sequence[float | None]) -> list[float | None]:
    """Return per sample the mean reward of the others: `(sum - reward) / (n - 1)` over the n valid samples.

    None for a failed sample and for a lone one. A baseline that does not depend on the sample itself leaves
    the policy gradient unbiased (Kool et al. 2019, RLOO).
    """
    valid = [reward for reward in rewards if reward is not None]
    total, others = math.fsum(valid), len(valid) - 1
    return [None if reward is None or others < 1 else (total - reward) / others for reward in rewards]


def spread(trajectory: Trajectory, value: float) -> FloatArray:
    """Return `value` on every policy token and 0 elsewhere [L]."""
    return np.where(trajectory.policy_mask, np.float32(value), np.float32(0.0))


def spread_turns(trajectory: Trajectory, values: Sequence[float]) -> FloatArray:
    """Return the value of a turn on each of its policy tokens and 0 elsewhere [L]; one value per turn."""
    parts = [np.zeros(len(trajectory.prompt_ids), dtype=np.float32)]
    for turn, value in zip(trajectory.turns, values, strict=True):
        parts += [
            np.full(len(turn.output_ids), value, np.float32),
            np.zeros(len(turn.observation_ids), np.float32),
        ]
    return np.concatenate(parts)


def spread_spans(
    trajectory: Trajectory, values: Sequence[float], *, kinds: Collection[SpanKind]
) -> FloatArray:
    """Return the value of a turn on the tokens of its spans of these kinds and 0 elsewhere [L]."""
    result = np.zeros(len(trajectory.token_ids), dtype=np.float32)
    start = len(trajectory.prompt_ids)
    for turn, value in zip(trajectory.turns, values, strict=True):
        for span in turn.action.spans:
            if span.kind in kinds:
                result[start + span.start : start + span.end] = value
        start += len(turn.output_ids) + len(turn.observation_ids)
    return result


def credit_by_group(
    trajectories: Sequence[Trajectory],
    rewards: Sequence[float | None],
    *,
    components: Sequence[Mapping[str, Component]],
    by_std: bool,
) -> list[Credit]:
    """Return GRPO's credit: every policy token of a trajectory gets the advantage of its reward in the group.

    `components` are what each reward is made of; `reward` itself is added to them.
    """
    advantages = group_advantages(rewards, by_std=by_std)
    return [
        Credit(advantages=spread(trajectory, advantage), components={"reward": reward, **parts})
        for trajectory, reward, advantage, parts in zip(
            trajectories, rewards, advantages, components, strict=True
        )
    ]
