"""How many groups of rollouts would teach nothing because all their rewards are equal.

GRPO compares the rollouts of one question; where all rewards tie there is nothing to compare. The share is
computed exactly, not by drawing groups:

    P(all n rewards within tolerance) = sum over values v of  P(v <= X <= v + t)^n - P(v < X <= v + t)^n

for independent draws, and with binomial coefficients in place of powers for draws without replacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from IG.doctor.matching import exact_matches
from IG.doctor.readings import GainRule, QuestionReading
from IG.doctor.statistics import EQUAL
from IG.semantics import FloatArray, IntArray

GROUP_SIZES = (2, 3, 4, 5, 8, 16)
NUM_DRAWS = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RewardGroup:
    """What the rollouts of one question are rewarded."""

    outcomes: FloatArray  # [kind of rollout]
    gains: FloatArray | None  # [measurement, kind of rollout]; None when nobody measured them
    counts: FloatArray  # [kind of rollout]: how many rollouts (observed) or which share (simulated)
    is_observed: bool
    """Observed groups are subsampled without replacement, simulated rollouts are independent draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroVariance:
    """Shares of groups of one size."""

    group_size: int
    num_groups: int
    outcome: float
    """All outcomes are equal."""
    with_gain: float | None
    """All rewards are equal, gain included; None when no gains are known."""
    within_noise: float | None
    """All rewards lie closer together than the noise of the weighted gain."""


def simulate_groups(
    readings: Sequence[QuestionReading], rule: GainRule, *, num_samples: int, rng: np.random.Generator
) -> list[RewardGroup]:
    """A rollout is a scenario drawn at random and one of the answers sampled with it.

    Gains are those of `num_samples` samples, drawn several times, as training will have them: with more
    samples fewer of them tie.
    """
    groups = []
    for reading in readings:
        chosen = reading.draw(size=num_samples, num_draws=NUM_DRAWS, rng=rng)
        gains = np.stack(list(reading.gains_of(rule, chosen).values()), axis=1)  # [draw, scenario]
        right = np.asarray(
            [
                exact_matches(samples.texts, reading.question.golds).mean()
                for samples in reading.conditions.values()
            ]
        )
        groups.append(
            RewardGroup(
                outcomes=np.repeat([1.0, 0.0], len(right)),
                gains=np.tile(gains, 2) if reading.contexts else None,
                counts=np.concatenate([right, 1 - right]) / len(right),
                is_observed=False,
            )
        )
    return groups


def zero_variance(
    groups: Sequence[RewardGroup], *, group_size: int, gain_weight: float, noise: float | None
) -> ZeroVariance | None:
    """Mean shares over all groups that are large enough; None when none is.

    `noise` is that of one gain: rewards that differ by less tell nothing, so they count as equal in
    `within_noise`. It is the noise of the difference of two gains of a question as well: they share their
    baseline, so that what is left are two conditions, as in one gain.
    """
    chosen = [group for group in groups if not group.is_observed or group.counts.sum() >= group_size]
    if not chosen:
        return None
    knows_gains = all(group.gains is not None for group in chosen)
    tolerance = None if noise is None or not knows_gains else gain_weight * noise

    def mean(*, weight: float, tolerance: float) -> float:
        return float(
            np.mean([_tied(group, size=group_size, weight=weight, tolerance=tolerance) for group in chosen])
        )

    return ZeroVariance(
        group_size=group_size,
        num_groups=len(chosen),
        outcome=mean(weight=0.0, tolerance=EQUAL),
        with_gain=mean(weight=gain_weight, tolerance=EQUAL) if knows_gains else None,
        within_noise=None if tolerance is None else mean(weight=gain_weight, tolerance=max(EQUAL, tolerance)),
    )


def _tied(group: RewardGroup, *, size: int, weight: float, tolerance: float) -> float:
    gains = np.zeros((1, 1)) if group.gains is None or not weight else weight * group.gains
    rewards = group.outcomes + gains  # [measurement, kind of rollout]
    if group.is_observed:
        counts = group.counts.astype(np.int64)
        tied = [tied_share_of_observed(row, counts=counts, size=size, tolerance=tolerance) for row in rewards]
    else:
        tied = [
            tied_share_of_draws(row, shares=group.counts, size=size, tolerance=tolerance) for row in rewards
        ]
    return float(np.mean(tied))


def tied_share_of_draws(values: FloatArray, *, shares: FloatArray, size: int, tolerance: float) -> float:
    """Chance that `size` independent draws lie within `tolerance` of each other; `shares` sum to 1."""
    order = np.argsort(values, kind="stable")
    upper = np.concatenate([[0.0], np.cumsum(shares[order])])
    ends = np.searchsorted(values[order], values[order] + tolerance, side="right")
    inside = upper[ends] - upper[:-1]  # from this value on; equal ones before it had their turn
    beyond = upper[ends] - upper[1:]
    return float((np.clip(inside, 0, 1) ** size - np.clip(beyond, 0, 1) ** size).sum())


def tied_share_of_observed(values: FloatArray, *, counts: IntArray, size: int, tolerance: float) -> float:
    """Share of the subsets of `size` rollouts whose values lie within `tolerance` of each other."""
    order = np.argsort(values, kind="stable")
    upper = np.concatenate([[0], np.cumsum(counts[order])])
    ends = np.searchsorted(values[order], values[order] + tolerance, side="right")
    tied = sum(
        comb(int(upper[end] - upper[start]), size) - comb(int(upper[end] - upper[start + 1]), size)
        for start, end in enumerate(ends)
    )
    return tied / comb(int(upper[-1]), size)
