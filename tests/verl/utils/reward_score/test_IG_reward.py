from __future__ import annotations

import math

import pytest

from verl.utils.reward_score.IG_reward import combine


@pytest.mark.parametrize(
    ("outcome", "gain", "expected"),
    [(1.0, 0.585424, 1.351254), (0.0, 0.585424, 0.351254), (1.0, None, 1.0), (0.0, -1.0, -0.6)],
)
def test_outcome_plus_weighted_gain(outcome: float, gain: float | None, expected: float) -> None:
    assert combine(outcome, gain, weight=0.6) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("gain", [math.nan, math.inf])
def test_a_reward_is_finite(gain: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        combine(1.0, gain, weight=0.6)
