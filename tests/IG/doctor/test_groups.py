from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from IG.doctor.groups import (
    RewardGroup,
    simulate_groups,
    tied_share_of_draws,
    tied_share_of_observed,
    zero_variance,
)
from IG.doctor.readings import GainRule
from IG.doctor.scenarios import Scenario
from tests.IG.doctor.synthetic import GOLD, bernoulli, reading, samples


def test_tied_shares_by_hand() -> None:
    fair = {"values": np.asarray([1.0, 0.0]), "shares": np.asarray([0.5, 0.5]), "tolerance": 0.0}
    assert tied_share_of_draws(**fair, size=2) == pytest.approx(0.5)
    assert tied_share_of_draws(**fair, size=3) == pytest.approx(0.25)
    near = {"values": np.asarray([0.1, 1.0, 0.0]), "shares": np.full(3, 1 / 3), "size": 2}
    assert tied_share_of_draws(**near, tolerance=0.15) == pytest.approx(5 / 9)
    one_right = {
        "values": np.asarray([1.0, 0.0, 0.0]),
        "counts": np.ones(3, dtype=np.int64),
        "tolerance": 0.0,
    }
    assert tied_share_of_observed(**one_right, size=2) == pytest.approx(1 / 3)
    assert tied_share_of_observed(**one_right, size=3) == 0.0


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.integers(2, 4),
    st.integers(0, 2),
)
def test_tied_shares_are_those_of_all_groups(values: list[int], size: int, tolerance: int) -> None:
    def tied(group: tuple[int, ...]) -> bool:
        return max(group) - min(group) <= tolerance

    draws = [tied(group) for group in product(values, repeat=size)]
    found = tied_share_of_draws(
        np.asarray(values, dtype=np.float64),
        shares=np.full(len(values), 1 / len(values)),
        size=size,
        tolerance=tolerance,
    )
    assert found == pytest.approx(np.mean(draws))
    subsets = [tied(group) for group in combinations(values, size)]
    if subsets:
        exact = tied_share_of_observed(
            np.asarray(values, dtype=np.float64),
            counts=np.ones(len(values), dtype=np.int64),
            size=size,
            tolerance=tolerance,
        )
        assert exact == pytest.approx(np.mean(subsets))


def test_a_simulated_rollout_is_a_scenario_and_an_answer() -> None:
    # Without a document always wrong; with it right in half of the answers, for a gain of 0.5.
    conditions = {
        Scenario.none: samples(["York"] * 4),
        Scenario.supporting: samples([GOLD, GOLD, "York", "Hull"]),
    }
    groups = simulate_groups([reading(conditions)], GainRule(), num_samples=4, rng=np.random.default_rng(0))
    level = zero_variance(groups, group_size=2, gain_weight=0.6, noise=None)
    assert level is not None
    # Outcomes are right with 1/4: tied with 1/16 + 9/16. Rewards are 0, 0.3, 1.3 with 1/2, 1/4, 1/4.
    assert level.outcome == pytest.approx(10 / 16)
    assert level.with_gain == pytest.approx(1 / 4 + 1 / 16 + 1 / 16)
    assert level.within_noise is None
    # Noise of 0.55 makes 0.33 of reward: 0 and 0.3 are no longer told apart; 0.4 makes 0.24.
    for noise, within in ((0.55, 9 / 16 + 1 / 16), (0.4, 1 / 4 + 1 / 16 + 1 / 16)):
        noisy = zero_variance(groups, group_size=2, gain_weight=0.6, noise=noise)
        assert noisy is not None
        assert noisy.within_noise == pytest.approx(within)


def test_simulated_gains_are_those_of_the_samples_that_training_will_take() -> None:
    # One answer of 64 is right: its gain of 1/64 keeps the two scenarios apart, one of 2 rarely sees it.
    rare = reading(
        {Scenario.none: samples(["York"] * 64), Scenario.supporting: samples([GOLD, *["York"] * 63])},
    )
    shares = []
    for num_samples in (64, 2):
        groups = simulate_groups(
            [rare] * 30, GainRule(), num_samples=num_samples, rng=np.random.default_rng(0)
        )
        level = zero_variance(groups, group_size=2, gain_weight=0.6, noise=None)
        assert level is not None
        shares.append(level.with_gain)
    # P(same scenario and outcome) = 0.5^2 + (63/128)^2 + (1/128)^2; without a gain to see 1 - 2 * 127/128^2.
    assert shares[0] == pytest.approx(0.25 + (63 / 128) ** 2 + (1 / 128) ** 2)
    assert shares[1] == pytest.approx(1 - 2 * 127 / 128**2, abs=0.03)


def test_the_noise_of_two_gains_of_a_question_is_that_of_one() -> None:
    rng = np.random.default_rng(0)
    conditions = {
        name: bernoulli(0.5, size=64, rng=rng)
        for name in (Scenario.none, Scenario.supporting, Scenario.random)
    }
    asked = reading(conditions)
    gains = asked.gains_of(GainRule(), asked.draw(size=8, num_draws=4000, rng=rng))
    alone = np.std(gains[Scenario.supporting])
    between = np.std(gains[Scenario.supporting] - gains[Scenario.random])
    assert between == pytest.approx(alone, rel=0.1), "the baseline is the same"


def test_observed_groups_are_subsampled_as_far_as_they_go() -> None:
    def group(outcomes: list[float], gains: list[float] | None) -> RewardGroup:
        return RewardGroup(
            outcomes=np.asarray(outcomes),
            gains=None if gains is None else np.asarray([gains]),
            counts=np.ones(len(outcomes)),
            is_observed=True,
        )

    groups = [group([0, 0, 0, 0], [0.0, 0.1, 0.2, 0.3]), group([1, 1], [0.5, 0.5])]
    pairs = zero_variance(groups, group_size=2, gain_weight=0.6, noise=None)
    fours = zero_variance(groups, group_size=4, gain_weight=0.6, noise=None)
    assert pairs is not None
    assert fours is not None
    assert (pairs.num_groups, pairs.outcome, pairs.with_gain) == (2, 1.0, 0.5)
    assert (fours.num_groups, fours.outcome, fours.with_gain) == (1, 1.0, 0.0)
    assert zero_variance(groups, group_size=5, gain_weight=0.6, noise=None) is None
    unmeasured = zero_variance([group([0, 1], None)], group_size=2, gain_weight=0.6, noise=0.1)
    assert unmeasured is not None
    assert (unmeasured.outcome, unmeasured.with_gain, unmeasured.within_noise) == (0.0, None, None)
