from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import make_question, make_trajectory
from verl.algorithms.statistics import (
    group_advantages,
    leave_one_out,
    leave_one_out_returns,
    spread_spans,
    spread_turns,
)
from verl.types import Span, SpanKind

REWARDS = st.lists(st.one_of(st.none(), st.floats(-2, 2)), min_size=1, max_size=12)


@pytest.mark.parametrize(
    "rewards",
    [[0.7], [None, 0.7, None], [None, None], [0.1] * 7, [2 / 3] * 3, [0.6 * 0.3] * 5, [1.0, 1.0 + 1e-7, 1.0]],
)
def test_nothing_to_compare_is_exactly_zero(rewards: list[float | None]) -> None:
    zeros = [0.0] * len(rewards)
    assert group_advantages(rewards) == zeros
    assert group_advantages(rewards, by_std=False) == zeros
    assert leave_one_out(rewards) == zeros
    returns = [None if reward is None else [reward, reward] for reward in rewards]
    assert leave_one_out_returns(returns) == [[0.0] * len(of_one or ()) for of_one in returns]


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
def test_advantages_are_finite_and_centered(rewards: list[float | None]) -> None:
    advantages = group_advantages(rewards)
    assert np.isfinite(advantages).all()
    assert sum(advantages) == pytest.approx(0.0, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(REWARDS)
def test_leave_one_out_subtracts_the_mean_of_the_others(rewards: list[float | None]) -> None:
    for i, (reward, advantage) in enumerate(zip(rewards, leave_one_out(rewards), strict=True)):
        others = [other for j, other in enumerate(rewards) if j != i and other is not None]
        if reward is None or not others:
            assert advantage == 0.0
        else:
            assert advantage == pytest.approx(reward - sum(others) / len(others), abs=1e-5)


def test_values_of_turns_go_to_the_tokens_sampled_in_them_or_to_those_of_the_query() -> None:
    plain = make_trajectory(make_question(), queries=("a", "b"), answer="x")
    thought = Span(kind=SpanKind.THINK, start=0, end=1, text="hm")
    turns = tuple(
        replace(t, action=replace(t.action, spans=(thought, replace(t.action.spans[0], start=1, end=2 + k))))
        for k, t in enumerate(plain.turns)
    )
    trajectory = replace(plain, turns=turns)
    values = (0.5, -1.0, 2.0)
    by_turn = spread_turns(trajectory, values)
    by_action = spread_spans(trajectory, values, kinds={SpanKind.QUERY, SpanKind.ANSWER})
    assert len(by_turn) == len(by_action) == len(trajectory.token_ids)
    lengths = [len(turn.output_ids) for turn in trajectory.turns]
    np.testing.assert_array_equal(by_turn[trajectory.policy_mask], np.repeat(values, lengths))
    np.testing.assert_array_equal(by_action[by_action != 0], np.repeat(values, (1, 2, 3)))
    assert by_action[len(trajectory.prompt_ids) : len(trajectory.prompt_ids) + 3].tolist() == [0.0, 0.5, 0.0]
    for spread in (by_turn, by_action):
        assert not spread[~trajectory.policy_mask].any()
