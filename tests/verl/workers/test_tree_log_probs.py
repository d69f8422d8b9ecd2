"""Log-probs of branches: one row per tree against a whole forward pass per branch, in any batch or order."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.verl.workers.episodes import make_actor, make_config, make_worker
from verl.branches import Branch, Tree, TreeRow, pack, row_length, split, unpack
from verl.types import BoolArray, FloatArray, IntArray
from verl.utils.actors import LocalLauncher
from verl.workers.batch import build_tree_batch, shard_trees
from verl.workers.parallel import Placement
from verl.workers.worker_group import WorkerGroup

VOCABULARY = 90


def tokens(rng: np.random.Generator, count: int) -> IntArray:
    return rng.integers(3, VOCABULARY, count).astype(np.int32)


def random_tree(rng: np.random.Generator, *, turns: int) -> Tree:
    """A trajectory, an answer after every turn, and answers after documents in the place of the turn's."""
    trunk = tokens(rng, 8 + 6 * turns + int(rng.integers(0, 5)))
    branches = []
    for turn in range(turns):
        state = 8 + 6 * turn
        answer = tokens(rng, int(rng.integers(2, 7)))
        branches.append(Branch(ids=answer, start=state, scored=(1, len(answer))))
        branches.append(Branch(ids=tokens(rng, 5), start=state - 3))
        branches.append(Branch(ids=answer, start=5, scored=(1, len(answer)), parent=len(branches) - 1))
        branches.append(Branch(ids=answer, start=2, scored=(0, 1), parent=len(branches) - 2))
    scored = rng.random(len(trunk)) < 0.4
    scored[0] = False
    return Tree(trunk=trunk, branches=tuple(branches), trunk_scored=scored if turns % 2 else None)


def visible(row: TreeRow) -> BoolArray:
    """Whether token i attends to token j [R, R]."""
    seen: BoolArray = (row.enters <= row.enters[:, None]) & (row.enters[:, None] < row.leaves)
    return seen


def naive(folder: Path, path: IntArray, first: int, end: int, *, temperature: float = 1.0) -> FloatArray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        log_softmax = (model(torch.tensor(path)[None].long()).logits[0] / temperature).log_softmax(-1)
    return np.array([float(log_softmax[i - 1, path[i]]) for i in range(first, end)], np.float32)


def launch(folder: Path, *, max_tokens: int = 8192, temperature: float = 1.0, scratch: Path) -> WorkerGroup:
    config = make_config(
        folder, actor=make_actor(ppo_max_token_len_per_gpu=max_tokens), temperature=temperature
    )
    return WorkerGroup.launch(
        LocalLauncher(),
        config,
        Placement(),
        name="scorer",
        scratch=scratch,
        total_steps=1,
        seed=0,
        trainable=False,
    )


def test_a_row_has_the_positions_parents_and_sight_of_its_branches() -> None:
    trunk = np.arange(10, 15, dtype=np.int32)
    row = pack(
        Tree(
            trunk=trunk,
            branches=(
                Branch(ids=np.array([20, 21], np.int32), start=3, scored=(1, 2)),
                Branch(ids=np.array([30], np.int32), start=1, scored=(0, 1), parent=0),
            ),
        )
    )
    assert row.ids.tolist() == [10, 11, 12, 20, 21, 30]  # the trunk after token 3 is not used
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 4]
    assert row.previous.tolist() == [0, 0, 1, 2, 3, 3]
    assert row.scored.tolist() == [4, 5]
    assert [np.flatnonzero(seen).tolist() for seen in visible(row)] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 5]
    ]  # fmt: skip


@pytest.mark.parametrize(
    "branch",
    [
        Branch(ids=np.ones(2, np.int32), start=0),
        Branch(ids=np.ones(2, np.int32), start=6),
        Branch(ids=np.ones(2, np.int32), start=1, scored=(0, 3)),
        Branch(ids=np.ones(2, np.int32), start=1, parent=0),
    ],
)
def test_a_branch_that_continues_nothing_is_refused(branch: Branch) -> None:
    with pytest.raises(ValueError, match="branch 0"):
        Tree(trunk=np.ones(5, np.int32), branches=(branch,))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(0, 4))
def test_splitting_and_packing_score_the_same_tokens_after_the_same_paths(seed: int, turns: int) -> None:
    tree = random_tree(np.random.default_rng(seed), turns=turns)
    row = pack(tree)
    assert len(row.ids) == row_length(tree)

    def path_of(index: int) -> list[int]:
        return row.ids[visible(row)[index]].tolist()

    expected = [
        part.trunk[: i + 1].tolist()
        for part in split(tree)
        if part.trunk_scored is not None
        for i in np.flatnonzero(part.trunk_scored)
    ]
    assert [path_of(index) for index in row.scored] == expected
    assert all(int(row.positions[i]) == len(path_of(i)) - 1 for i in range(len(row.ids)))
    assert all(path_of(int(row.previous[i])) == path_of(i)[:-1] for i in range(1, len(row.ids)))


async def test_equal_to_a_forward_pass_per_branch_for_any_batch_order_and_padding(
    model_folder: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(7)
    trees = [random_tree(rng, turns=turns) for turns in (3, 0, 1, 5, 2)]
    temperature = 0.7
    expected = []
    for tree in trees:
        branches = []
        for i, branch in enumerate(tree.branches):
            path = tree.path(i)
            start = len(path) - len(branch.ids)
            first, end = branch.scored
            branches.append(naive(model_folder, path, start + first, start + end, temperature=temperature))
        expected.append(branches)
    order = [3, 1, 4, 0, 2]
    for max_tokens in (8192, 150, 1):
        group = launch(model_folder, max_tokens=max_tokens, temperature=temperature, scratch=tmp_path)
        for shared in (True, False):
            got = await group.tree_log_probs([trees[i] for i in order], shared=shared)
            for i, of_tree in zip(order, got, strict=True):
                for branch, reference in zip(of_tree.branches, expected[i], strict=True):
                    np.testing.assert_allclose(branch, reference, atol=1e-4)
                scored = trees[i].trunk_scored
                assert (of_tree.trunk is None) == (scored is None)
                if scored is not None:
                    whole = naive(
                        model_folder, trees[i].trunk, 1, len(trees[i].trunk), temperature=temperature
                    )
                    reference = np.concatenate([[0.0], whole]) * scored
                    np.testing.assert_allclose(of_tree.trunk, reference, atol=1e-4)
        group.shutdown()


@pytest.mark.parametrize(
    ("attention", "of_trees"), [("sdpa", "sdpa"), ("eager", "sdpa"), ("sdpa", "flex_attention")]
)
def test_the_attention_of_the_model_is_kept_for_training(
    model_folder: Path, attention: str, of_trees: str
) -> None:
    if of_trees == "flex_attention" and shutil.which("g++") is None:
        pytest.skip("FlexAttention on the CPU is compiled, and this machine has no g++")
    config = make_config(model_folder)
    config.model.attention = attention
    config.model.tree_attention = of_trees
    worker = make_worker(config, trainable=False)
    tree = random_tree(np.random.default_rng(1), turns=2)
    (log_probs,) = worker.tree_log_probs(shard_trees([tree], num_ranks=1, max_tokens=8192)[0])
    assert worker._model.config._attn_implementation == attention
    path = tree.path(0)
    start = len(path) - len(tree.branches[0].ids)
    np.testing.assert_allclose(
        unpack(tree, log_probs).branches[0], naive(model_folder, path, start + 1, len(path)), atol=1e-4
    )


async def test_a_tree_without_a_scored_token_takes_no_forward_pass(
    model_folder: Path, tmp_path: Path
) -> None:
    bare = Tree(trunk=tokens(np.random.default_rng(0), 9), branches=())
    group = launch(model_folder, scratch=tmp_path)
    group.shutdown()  # a call of a rank would fail now
    for shared in (True, False):
        (result,) = await group.tree_log_probs([bare], shared=shared)
        assert (result.branches, result.trunk) == ((), None)


def test_every_rank_has_as_many_passes_and_each_tree_is_scored_once() -> None:
    rng = np.random.default_rng(3)
    trees = [random_tree(rng, turns=turns) for turns in (1, 4, 2, 0, 3, 1, 1)]
    shards = shard_trees(trees, num_ranks=3, max_tokens=120)
    assert sorted(i for shard in shards for i in shard.index) == list(range(7))
    assert len({len(shard.micro_batches) for shard in shards}) == 1
    for shard in shards:
        for micro in shard.micro_batches:
            if len(micro) > 1:
                batch = build_tree_batch([shard.trees[i] for i in micro])
                assert batch.input_ids.size <= 120
    none = shard_trees(trees[:1], num_ranks=2, max_tokens=120)
    assert [len(shard.trees) for shard in none] == [1, 0]
