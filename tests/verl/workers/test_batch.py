from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import make_question, make_trajectory
from tests.verl.workers.episodes import random_batch, random_trajectory
from verl.workers.batch import build_batch, shard_batch


def test_rows_are_the_trajectories_padded_on_the_right() -> None:
    rng = np.random.default_rng(1)
    trajectories = [random_trajectory(rng, index=i) for i in range(5)]
    credit = [np.where(t.policy_mask, 1.5, 0).astype(np.float32) for t in trajectories]
    batch = build_batch(trajectories, credit, pad_id=7)
    for row, trajectory in enumerate(trajectories):
        length = len(trajectory.token_ids)
        assert batch.lengths[row] == length
        np.testing.assert_array_equal(batch.input_ids[row, :length], trajectory.token_ids)
        assert (batch.input_ids[row, length:] == 7).all()
        np.testing.assert_array_equal(batch.policy_mask[row, :length], trajectory.policy_mask)
        assert not batch.policy_mask[row, length:].any()
        np.testing.assert_array_equal(batch.sampling_log_probs[row, :length], trajectory.sampling_log_probs)
        np.testing.assert_array_equal(batch.advantages[row] != 0, batch.policy_mask[row])
    assert batch.num_policy_tokens == sum(t.num_policy_tokens for t in trajectories)


def test_what_cannot_be_trained_on_is_refused_by_name() -> None:
    question = make_question("nq/test/3")
    good = make_trajectory(question, answer="a")
    with pytest.raises(ValueError, match="no trajectories"):
        build_batch([], [], pad_id=0)
    with pytest.raises(ValueError, match=r"nq/test/3#0.*at least one sampled token"):
        build_batch([make_trajectory(question)], [np.zeros(3, np.float32)], pad_id=0)
    with pytest.raises(ValueError, match=r"nq/test/3#0: \(2,\) advantages for \(7,\) tokens"):
        build_batch([good], [np.zeros(2, np.float32)], pad_id=0)
    with pytest.raises(ValueError, match="must be finite"):
        build_batch([good], [np.full(7, np.nan, np.float32)], pad_id=0)
    turns = (good.turns[0], replace(good.turns[0], num_dropped=1))
    with pytest.raises(ValueError, match="nq/test/3#0: observations were dropped from its context"):
        build_batch([replace(good, turns=turns)], [np.zeros(11, np.float32)], pad_id=0)
    with pytest.raises(ValueError, match="must have shape"):
        build_batch([good], [np.zeros(7, np.float32)], pad_id=0).with_old(np.zeros((1, 6), np.float32))


@given(
    count=st.integers(1, 30),
    num_ranks=st.integers(1, 4),
    mini_batch_size=st.integers(1, 40),
    max_tokens=st.integers(10, 400),
)
def test_shards_cover_every_row_once_and_keep_the_ranks_in_step(
    count: int, num_ranks: int, mini_batch_size: int, max_tokens: int
) -> None:
    batch = random_batch(count)
    shards = shard_batch(batch, num_ranks=num_ranks, mini_batch_size=mini_batch_size, max_tokens=max_tokens)
    assert sorted(row for shard in shards for row in shard.rows) == list(range(count))
    for minis in zip(*(shard.mini_batches for shard in shards), strict=True):
        assert len({len(mini.micro_batches) for mini in minis}) == 1
        assert len({mini.num_policy_tokens for mini in minis}) == 1
    seen = []
    for shard in shards:
        for mini in shard.mini_batches:
            for rows in mini.micro_batches:
                seen += list(shard.rows[rows])
                micro = shard.batch.select(rows)
                np.testing.assert_array_equal(micro.lengths, batch.lengths[shard.rows[rows]])
                assert len(rows) <= 1 or micro.input_ids.size <= max_tokens
    assert sorted(seen) == list(range(count))
    sizes = [mini.num_trajectories for mini in shards[0].mini_batches]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert sum(mini.num_policy_tokens for mini in shards[0].mini_batches) == batch.num_policy_tokens


def test_one_trajectory_too_many_is_no_optimizer_step_of_its_own() -> None:
    (shard,) = shard_batch(random_batch(17), num_ranks=1, mini_batch_size=16, max_tokens=999)
    assert [mini.num_trajectories for mini in shard.mini_batches] == [17]
