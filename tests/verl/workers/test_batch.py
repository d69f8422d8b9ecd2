from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import make_question, make_trajectory
from tests.verl.test_forest import paths_of
from tests.verl.workers.episodes import one_rank, random_batch, random_ids, random_trajectory, row_ids
from tests.verl.workers.test_tree_log_probs import random_tree
from verl.branches import Branch, Tree, pack
from verl.workers.batch import build_batch, deal_trees, make_mini_batches, pack_rows


def test_a_batch_holds_the_trajectories_up_to_their_last_sampled_token() -> None:
    rng = np.random.default_rng(1)
    prompts = [random_ids(rng, 4), random_ids(rng, 4)]
    trajectories = [random_trajectory(rng, index=i, prompt=prompts[i % 2]) for i in range(5)]
    last = trajectories[3].turns[-1]
    trajectories[3] = replace(
        trajectories[3],
        turns=(*trajectories[3].turns[:-1], replace(last, observation_ids=random_ids(rng, 6))),
    )
    credit = [np.where(t.policy_mask, rng.normal(size=len(t.token_ids)), 9) for t in trajectories]
    batch = build_batch(trajectories, [x.astype(np.float32) for x in credit])
    assert batch.num_policy_tokens == sum(t.num_policy_tokens for t in trajectories)
    assert batch.prompts.tolist() == [0, 1, 0, 1, 0]
    assert batch.prompt_lengths.tolist() == [4] * 5
    for row, trajectory in enumerate(trajectories):
        one = batch.select(np.array([row], np.int32))
        length = len(trajectory.token_ids) - (6 if row == 3 else 0)
        assert one.lengths.tolist() == [length]
        mask = trajectory.policy_mask
        np.testing.assert_array_equal(one.token_ids, trajectory.token_ids[:length])
        np.testing.assert_array_equal(one.policy_mask, mask[:length])
        np.testing.assert_array_equal(one.advantages, credit[row][mask].astype(np.float32))
        np.testing.assert_array_equal(one.sampling_log_probs, trajectory.sampling_log_probs[mask])
        np.testing.assert_array_equal(batch.split(batch.advantages)[row], one.advantages)


def test_policy_tokens_are_scored_after_the_tokens_of_their_trajectory() -> None:
    batch = random_batch(7)
    batch = batch.select(np.array([6, 0, 3, 1, 5], np.int32))
    forest = pack_rows(batch)
    paths = paths_of(forest)
    got = [forest.ids[paths[column]].tolist() for column in forest.scored]
    rows = [row_ids(batch, row).tolist() for row in range(5)]
    masks = np.split(batch.policy_mask, np.cumsum(batch.lengths))
    assert got == [row[: i + 1] for row, mask in zip(rows, masks, strict=False) for i in np.flatnonzero(mask)]
    distinct = {tuple(row[: i + 1]) for row in rows for i in range(len(row))}
    assert len(forest.ids) == len(distinct) < batch.lengths.sum()


def test_what_cannot_be_trained_on_is_refused_by_name() -> None:
    question = make_question("nq/test/3")
    good = make_trajectory(question, answer="a")
    with pytest.raises(ValueError, match="no trajectories"):
        build_batch([], [])
    with pytest.raises(ValueError, match=r"nq/test/3#0.*at least one sampled token"):
        build_batch([make_trajectory(question)], [np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match=r"nq/test/3#0: \(2,\) advantages for \(7,\) tokens"):
        build_batch([good], [np.zeros(2, np.float32)])
    with pytest.raises(ValueError, match="must be finite"):
        build_batch([good], [np.full(7, np.nan, np.float32)])
    turns = (good.turns[0], replace(good.turns[0], num_dropped=1))
    with pytest.raises(ValueError, match="nq/test/3#0: observations were dropped from its context"):
        build_batch([replace(good, turns=turns)], [np.zeros(11, np.float32)])
    with pytest.raises(ValueError, match="must have shape"):
        build_batch([good], [np.zeros(7, np.float32)]).with_old(np.zeros(2, np.float32))


@given(
    count=st.integers(1, 30),
    num_ranks=st.integers(1, 4),
    mini_batch_size=st.integers(1, 40),
    max_tokens=st.integers(1, 400),
    only_advantages=st.booleans(),
)
def test_ranks_share_every_row_once_in_as_many_passes(
    count: int, num_ranks: int, mini_batch_size: int, max_tokens: int, only_advantages: bool
) -> None:
    numbers = np.arange(count, dtype=np.float32)
    per_row = np.where(numbers % 3 > 0, numbers, 0.0).astype(np.float32)
    batch = random_batch(count)
    batch = replace(
        batch,
        advantages=np.repeat(per_row, batch.policy_lengths),
        sampling_log_probs=np.repeat(numbers, batch.policy_lengths),
    )
    shards = make_mini_batches(
        batch,
        num_ranks=num_ranks,
        mini_batch_size=mini_batch_size,
        max_tokens=max_tokens,
        only_advantages=only_advantages,
    )
    seen: list[float] = []
    for minis in zip(*shards, strict=True):
        assert len({(len(mini.micro_batches), len(mini.uncredited)) for mini in minis}) == 1
        uncredited = [micro for mini in minis for micro in mini.uncredited]
        assert only_advantages or not uncredited
        assert not any(micro.advantages.any() for micro in uncredited)
        trained = [micro for mini in minis for micro in mini.micro_batches]
        if uncredited:
            rows = [(set(micro.prompts.tolist()), micro.advantages.any()) for micro in trained]
            assert any(has_advantage for _, has_advantage in rows)
            of_others = {prompt for micro in uncredited for prompt in micro.prompts.tolist()}
            assert not any(prompts & of_others for prompts, _ in rows), "a prompt is computed in one kind"
        micros = trained + uncredited
        assert {mini.num_policy_tokens for mini in minis} == {sum(m.num_policy_tokens for m in micros)}
        assert {mini.num_trajectories for mini in minis} == {sum(m.num_trajectories for m in micros)}
        for micro in micros:
            assert micro.num_trajectories <= 1 or len(pack_rows(micro).ids) <= max_tokens
            seen += [float(values[0]) for values in micro.split(micro.sampling_log_probs)]
    assert sorted(seen) == list(range(count))
    sizes = [mini.num_trajectories for mini in shards[0]]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


def test_trees_are_dealt_once_in_as_many_passes() -> None:
    rng = np.random.default_rng(3)
    trees = [random_tree(rng, turns=turns) for turns in (1, 4, 2, 0, 3, 1, 1)]
    plan = deal_trees(trees, num_ranks=3, max_tokens=120)
    assert sorted(i for of_rank in plan for of_pass in of_rank for i in of_pass) == list(range(7))
    assert len({len(of_rank) for of_rank in plan}) == 1
    for of_pass in itertools.chain.from_iterable(plan):
        assert len(of_pass) <= 1 or len(pack([trees[i] for i in of_pass]).ids) <= 120
    assert [len(of_rank[0]) for of_rank in deal_trees(trees[:1], num_ranks=2, max_tokens=120)] == [1, 0]


def test_a_pass_of_trees_counts_what_they_share_with_trees_of_other_passes() -> None:
    """The first and the last ask for the same answer after the prompt, the two between for none there."""
    rng = np.random.default_rng(5)
    prompt = np.arange(40, dtype=np.int32)
    answer = Branch(ids=random_ids(rng, 104), start=40, scored=(0, 1))
    trunks = [np.concatenate([prompt, np.array([k]), random_ids(rng, 20)]).astype(np.int32) for k in range(4)]
    trees = [
        Tree(
            trunk=trunk,
            branches=(*((answer,) if k in (0, 3) else ()), replace(answer, ids=trunk[41:50], start=61)),
            prompt_length=40,
        )
        for k, trunk in enumerate(trunks)
    ]
    assert len(pack(trees).ids) == 40 + 104 + 4 * 30
    for max_tokens in (300, 263, 230, 200, 160):
        (plan,) = deal_trees(trees, num_ranks=1, max_tokens=max_tokens)
        sizes = [len(pack([trees[i] for i in of_pass]).ids) for of_pass in plan]
        assert all(len(of_pass) == 1 or n <= max_tokens for of_pass, n in zip(plan, sizes, strict=True))


def test_one_trajectory_too_many_is_no_optimizer_step_of_its_own() -> None:
    assert [mini.num_trajectories for mini in one_rank(random_batch(17), mini_batch_size=16)] == [17]
