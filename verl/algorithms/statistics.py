"""Shared arithmetic of the methods: pure functions over rewards of a group and tokens of a trajectory.

NumPy only. None stands for a sample that failed: it is left out of every statistic and gets no credit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import fmean

import numpy as np

from verl.trainer.config.schema import OutcomeConfig
from verl.types import Component, Credit, FloatArray, Group, Score, SpanKind, Trajectory

EPSILON = 1e-6
"""Added to the standard deviation; a group that spreads less than this has nothing to compare and gets 0."""
UNSCALED = "returns are compared with those of the other trajectories and not divided by their spread"
"""Why a method that credits `leave_one_out_turns` ignores `norm_adv_by_std_in_grpo`."""


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
    mean = fmean(valid)
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in valid) / (len(valid) - 1))
    if std < EPSILON:
        return [0.0] * len(rewards)
    scale = std + EPSILON if by_std else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]


def leave_one_out(rewards: Sequence[float | None]) -> list[float]:
    """Return per sample its reward minus the mean of the others, `n / (n - 1) * (reward - mean)`.

    n counts the valid samples. Failed samples, lone ones and equal rewards get exactly 0, as in
    `group_advantages`. A baseline that does not depend on the sample itself leaves the policy gradient
    unbiased (Kool et al. 2019, RLOO).
    """
    num_valid = sum(reward is not None for reward in rewards)
    scale = num_valid / max(1, num_valid - 1)
    return [scale * advantage for advantage in group_advantages(rewards, by_std=False)]


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


def outcome_advantages(
    rewards: Sequence[Sequence[float | None]],
    num_tokens: Sequence[Sequence[int]],
    *,
    estimator: str = "grpo",
    by_std: bool = True,
) -> list[list[float]]:
    """Return one advantage per trajectory of a batch of groups; 0 for those that failed (None).

    `grpo`: see `group_advantages`. `rloo`: the reward minus the mean of the others (Ahmadian et al. 2024,
    arXiv 2402.14740). `reinforce_plus_plus`: standardized over the whole batch (arXiv 2501.03262, eq. 10);
    `reinforce_plus_plus_baseline`: the group's mean is subtracted before. Both weigh a trajectory by its
    sampled tokens `num_tokens`, as a mean over all tokens of the batch does.
    """
    if estimator == "grpo":
        return [group_advantages(of_group, by_std=by_std) for of_group in rewards]
    if estimator == "rloo":
        return [leave_one_out(of_group) for of_group in rewards]
    values = [[*of_group] for of_group in rewards]
    if estimator == "reinforce_plus_plus_baseline":
        values = [_centered(of_group) for of_group in rewards]
    pairs = [
        (value, count)
        for of_group, counts in zip(values, num_tokens, strict=True)
        for value, count in zip(of_group, counts, strict=True)
        if value is not None
    ]
    total = sum(count for _, count in pairs)
    if total < 2:
        return [[0.0] * len(of_group) for of_group in rewards]
    mean = math.fsum(value * count for value, count in pairs) / total
    variance = math.fsum(count * (value - mean) ** 2 for value, count in pairs) / (total - 1)
    scale = math.sqrt(variance) + EPSILON
    if scale < 2 * EPSILON:
        return [[0.0] * len(of_group) for of_group in rewards]
    return [[0.0 if v is None else (v - mean) / scale for v in of_group] for of_group in values]


def _centered(rewards: Sequence[float | None]) -> list[float | None]:
    valid = [reward for reward in rewards if reward is not None]
    mean = fmean(valid) if valid else 0.0
    return [None if reward is None else reward - mean for reward in rewards]


def credit_rewards(
    groups: Sequence[Group],
    rewards: Sequence[Sequence[float | None]],
    components: Sequence[Sequence[Mapping[str, Component]]],
    *,
    settings: OutcomeConfig,
) -> list[list[Credit]]:
    """Return credits in which every policy token of a trajectory gets the advantage of its reward.

    `components` are what each reward is made of; `reward` itself is added to them.
    """
    advantages = outcome_advantages(
        rewards,
        [[trajectory.num_policy_tokens for trajectory in group.trajectories] for group in groups],
        estimator=settings.adv_estimator,
        by_std=settings.norm_adv_by_std_in_grpo,
    )
    return [
        [
            Credit(advantages=spread(trajectory, advantage), components={"reward": reward, **parts})
            for trajectory, reward, advantage, parts in zip(
                group.trajectories, of_group, of_advantages, of_components, strict=True
            )
        ]
        for group, of_group, of_advantages, of_components in zip(
            groups, rewards, advantages, components, strict=True
        )
    ]


def credit_outcomes(
    groups: Sequence[Group], scores: Sequence[Sequence[Score]], *, settings: OutcomeConfig
) -> list[list[Credit]]:
    """Return the credit of the outcomes: see `credit_rewards`."""
    return credit_rewards(
        groups,
        [[score.valid_outcome for score in some] for some in scores],
        [[{"outcome": score.outcome} for score in some] for some in scores],
        settings=settings,
    )


def returns_to_go(rewards: Sequence[float], *, discount: float = 1.0) -> list[float]:
    """Return per turn `G_t = r_t + discount * G_{t+1}`, backward from the last turn."""
    returns: list[float] = []
    for reward in reversed(rewards):
        returns.append(reward + discount * (returns[-1] if returns else 0.0))
    return returns[::-1]


def leave_one_out_returns(returns: Sequence[Sequence[float] | None]) -> list[list[float]]:
    """Return per trajectory and turn `A_{i,t} = G_{i,t} - mean over j != i of G_{j,t}`.

    `returns` has the returns-to-go of each trajectory of a group, None for one that failed, which is left out
    and gets no turns. A trajectory that had stopped before turn t counts with `G_{j,t} = 0`: nothing was left
    to collect. Because the baseline does not depend on the trajectory's own actions, the gradient is
    unbiased. A trajectory without valid others has nothing to be compared with and gets 0 everywhere.
    """
    longest = max((len(of_one) for of_one in returns if of_one is not None), default=0)
    by_turn = [
        leave_one_out([None if r is None else r[t] if t < len(r) else 0.0 for r in returns])
        for t in range(longest)
    ]
    return [[by_turn[t][i] for t in range(len(of_one or ()))] for i, of_one in enumerate(returns)]


def leave_one_out_turns(
    gains: Sequence[Sequence[float | None]],
    outcomes: Sequence[float | None],
    *,
    gain_weight: float,
    discount: Callable[[int], float],
) -> list[list[float]]:
    """Return per trajectory and turn what it earned from there on, minus the mean of the others of its group.

    The returns of the weighted `gains` (one per turn, None counts 0) are compared at the same turn, see
    `leave_one_out_returns`; `discount` maps the number of turns to their discount. The outcome counts in full
    at every turn and is compared as a whole, so that a constant on all outcomes changes nothing. A trajectory
    whose outcome is None failed and gets no turns.
    """
    returns = [
        None
        if outcome is None
        else returns_to_go([gain_weight * (gain or 0.0) for gain in of_one], discount=discount(len(of_one)))
        for of_one, outcome in zip(gains, outcomes, strict=True)
    ]
    return [
        [value + advantage for value in of_one]
        for of_one, advantage in zip(leave_one_out_returns(returns), leave_one_out(outcomes), strict=True)
    ]


def credit_turns(trajectory: Trajectory, values: Sequence[float], *, score: Score) -> Credit:
    """Return a credit that gives each turn's tokens the turn's value; no values: the trajectory failed.

    Its components are the outcome as the reward that attempts are compared by, and the value of each turn.
    """
    failed = not values
    return Credit(
        advantages=spread_turns(trajectory, values if values else [0.0] * len(trajectory.turns)),
        components={
            "reward": None if failed else score.outcome,
            "outcome": score.outcome,
            "gain": score.gain.turns or None,
            "turn_advantage": None if failed else tuple(values),
        },
    )


def credit_returns(
    groups: Sequence[Group], scores: Sequence[Sequence[Score]], *, gain_weight: float, discount: float
) -> list[list[Credit]]:
    """Return credits of the outcome and the weighted gains, each turn with all that came from it on.

    See `leave_one_out_turns`, whose baseline keeps the gradient unbiased where papers have a value network
    that estimates the same.
    """
    credits = []
    for group, of_group in zip(groups, scores, strict=True):
        advantages = leave_one_out_turns(
            [gains_of_turns(*pair) for pair in zip(group.trajectories, of_group, strict=True)],
            [score.valid_outcome for score in of_group],
            gain_weight=gain_weight,
            discount=lambda _: discount,
        )
        credits.append(
            [
                credit_turns(trajectory, values, score=score)
                for trajectory, values, score in zip(group.trajectories, advantages, of_group, strict=True)
            ]
        )
    return credits


def gains_of_turns(trajectory: Trajectory, score: Score) -> tuple[float | None, ...]:
    """Return one gain per turn, None where none was measured."""
    return score.gain.turns or (None,) * len(trajectory.turns)
