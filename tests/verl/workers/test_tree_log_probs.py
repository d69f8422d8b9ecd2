"""Log-probs of branches: trees against a whole forward pass per branch, in any batch or order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.verl.test_forest import paths_of
from tests.verl.workers.episodes import launch_group, make_actor, make_config
from verl.branches import Branch, Tree, pack, split
from verl.types import FloatArray, IntArray
from verl.utils.actors import LocalLauncher
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
        documents = tokens(rng, 5)
        branches.append(Branch(ids=answer, start=state, scored=(1, len(answer))))
        replaced = np.concatenate([documents, answer])
        branches.append(Branch(ids=replaced, start=state - 3, scored=(6, len(replaced))))
        branches.append(Branch(ids=replaced[[0, 1, 5]], start=state - 3, scored=(2, 3)))
    scored = rng.random(len(trunk)) < 0.4
    scored[0] = False
    return Tree(trunk=trunk, branches=tuple(branches), trunk_scored=scored if turns % 2 else None)


def naive(folder: Path, path: IntArray, first: int, end: int, *, temperature: float = 1.0) -> FloatArray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        log_softmax = (model(torch.tensor(path)[None].long()).logits[0] / temperature).log_softmax(-1)
    return np.array([float(log_softmax[i - 1, path[i]]) for i in range(first, end)], np.float32)


def launch(folder: Path, *, max_tokens: int = 8192, temperature: float = 1.0) -> WorkerGroup:
    config = make_config(
        folder, actor=make_actor(ppo_max_token_len_per_gpu=max_tokens), temperature=temperature
    )
    return launch_group(LocalLauncher(), config, name="scorer", trainable=False)


@pytest.mark.parametrize(
    "branch",
    [
        Branch(ids=np.ones(2, np.int32), start=0, scored=(0, 1)),
        Branch(ids=np.ones(2, np.int32), start=6, scored=(0, 1)),
        Branch(ids=np.ones(2, np.int32), start=1, scored=(0, 3)),
        Branch(ids=np.ones(2, np.int32), start=1, scored=(1, 1)),
    ],
)
def test_a_branch_that_continues_nothing_is_refused(branch: Branch) -> None:
    with pytest.raises(ValueError, match="branch 0"):
        Tree(trunk=np.ones(5, np.int32), branches=(branch,))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(0, 4))
def test_splitting_and_packing_score_the_same_tokens_after_the_same_paths(seed: int, turns: int) -> None:
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, turns=turns), random_tree(rng, turns=1)]
    trees.append(replace(trees[0], branches=trees[0].branches[:2]))  # begins like the first
    forest = pack(trees)
    assert len(forest.ids) == len(pack(trees[:2]).ids)
    paths = paths_of(forest)
    expected = [
        part.trunk[: i + 1].tolist()
        for tree in trees
        for part in split(tree)
        if part.trunk_scored is not None
        for i in np.flatnonzero(part.trunk_scored)
    ]
    assert [forest.ids[paths[column]].tolist() for column in forest.scored] == expected


async def test_equal_to_a_forward_pass_per_branch_for_any_batch_and_order(
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
        group = launch(model_folder, max_tokens=max_tokens, temperature=temperature)
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


async def test_a_tree_without_a_scored_token_takes_no_forward_pass(
    model_folder: Path,
) -> None:
    bare = Tree(trunk=tokens(np.random.default_rng(0), 9), branches=())
    group = launch(model_folder)
    group.shutdown()  # a call of a rank would fail now
    for shared in (True, False):
        (result,) = await group.tree_log_probs([bare], shared=shared)
        assert (result.branches, result.trunk) == ((), None)
