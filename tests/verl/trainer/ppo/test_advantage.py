from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import make_question, make_trajectory
from verl.trainer.ppo.advantage import group_advantages, outcome_plus_gain, trajectory_reward
from verl.types import Score, Trajectory

REWARDS = st.lists(st.one_of(st.none(), st.floats(-2, 2)), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 0, 0], [1.788850] + [-0.447213] * 4),
        ([1, 1, 0, 0, 0], [1.095443] * 2 + [-0.730295] * 3),
        ([1, 0, 0, 0], [1.499997] + [-0.499999] * 3),
        ([0] * 5, [0.0] * 5),
        ([1.12, 0.30, -0.06, 0, 1.30], [0.923131, -0.364229, -0.929411, -0.835214, 1.205722]),
        ([0.18, 0.06, -0.03, 0, 0.24], [0.774590, -0.258197, -1.032787, -0.774590, 1.290983]),
    ],
)
def test_worked_examples(rewards: list[float], expected: list[float]) -> None:
    assert group_advantages(rewards) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "rewards", [[0.7], [None, 0.7, None], [None, None], [0.1] * 7, [0.6 * 0.3] * 5, [1.0, 1.0 + 1e-7, 1.0]]
)
def test_nothing_to_compare_is_exactly_zero(rewards: list[float | None]) -> None:
    assert group_advantages(rewards) == [0.0] * len(rewards)
    assert group_advantages(rewards, normalise_by_std=False) == [0.0] * len(rewards)


def test_without_std_it_is_the_distance_to_the_mean() -> None:
    assert group_advantages([1, 0, 0, 0], normalise_by_std=False) == [0.75, -0.25, -0.25, -0.25]


@settings(deadline=None, max_examples=60)
@given(REWARDS, st.randoms())
def test_order_does_not_matter_to_the_last_bit(rewards: list[float | None], rng: random.Random) -> None:
    order = list(range(len(rewards)))
    rng.shuffle(order)
    plain = group_advantages(rewards)
    assert group_advantages([rewards[i] for i in order]) == [plain[i] for i in order]


@settings(deadline=None, max_examples=60)
@given(REWARDS)
def test_failed_samples_change_nothing_and_get_nothing(rewards: list[float | None]) -> None:
    advantages = group_advantages(rewards)
    kept = [advantage for advantage, reward in zip(advantages, rewards, strict=True) if reward is not None]
    assert kept == group_advantages([reward for reward in rewards if reward is not None])
    assert all(a == 0.0 for a, reward in zip(advantages, rewards, strict=True) if reward is None)


@settings(deadline=None, max_examples=60)
@given(REWARDS)
def test_advantages_are_finite_and_centred(rewards: list[float | None]) -> None:
    advantages = group_advantages(rewards)
    assert np.isfinite(advantages).all()
    assert sum(advantages) == pytest.approx(0.0, abs=1e-6)


def play(*outcomes: tuple[float | None, float | None, str | None]) -> tuple[list[Trajectory], list[Score]]:
    question = make_question()
    trajectories = [
        make_trajectory(question, sample=i, queries=("q",) * i, answer="x") for i in range(len(outcomes))
    ]
    return trajectories, [Score(outcome=o, gain=g, failure=f) for o, g, f in outcomes]


def test_every_policy_token_gets_the_advantage_and_no_other_token() -> None:
    trajectories, scores = play((1.0, 0.2, None), (0.0, 0.5, None), (0.0, None, None), (0.0, -0.1, None))
    rule = outcome_plus_gain(gain_weight=0.6, normalise_by_std=True)
    expected = group_advantages([1.12, 0.30, 0.0, -0.06])
    for trajectory, array, advantage in zip(trajectories, rule(trajectories, scores), expected, strict=True):
        assert array.dtype == np.float32
        assert len(array) == len(trajectory.token_ids)
        np.testing.assert_array_equal(array[trajectory.policy_mask], np.float32(advantage))
        np.testing.assert_array_equal(array[~trajectory.policy_mask], 0.0)


def test_failures_are_masked_whatever_numbers_they_carry() -> None:
    trajectories, scores = play(
        (1.0, None, "gain_failed: x"), (None, None, "search_failed: y"), (0.0, 0.1, None)
    )
    credit = outcome_plus_gain(gain_weight=0.6, normalise_by_std=True)(trajectories, scores)
    assert not any(array.any() for array in credit)


def test_weight_zero_is_grpo_on_the_outcome() -> None:
    trajectories, scores = play((1.0, 0.9, None), (0.0, -0.9, None), (0.0, 0.3, None))
    rule = outcome_plus_gain(gain_weight=0.0, normalise_by_std=True)
    plain = group_advantages([1.0, 0.0, 0.0])
    assert [
        array.max() if a > 0 else array.min()
        for array, a in zip(rule(trajectories, scores), plain, strict=True)
    ] == (pytest.approx(plain))


def test_reward_of_a_score() -> None:
    assert trajectory_reward(Score(outcome=1.0, gain=0.5), gain_weight=0.6) == pytest.approx(1.3)
    assert trajectory_reward(Score(outcome=1.0), gain_weight=0.6) == 1.0
    assert trajectory_reward(Score(outcome=1.0, gain=0.5, failure="x"), gain_weight=0.6) is None
    assert trajectory_reward(Score(outcome=None), gain_weight=0.6) is None


def test_credit_rules_need_numpy_alone() -> None:
    code = (
        "import sys, verl.trainer.ppo.advantage\n"
        "heavy = {'torch', 'vllm', 'ray', 'hydra', 'httpx', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
