from __future__ import annotations

import numpy as np
import pytest

from verl.types import IntArray
from verl.workers.dealing import deal


def waiting(plan: list[list[IntArray]], lengths: IntArray) -> int:
    """Tokens computed, or waited for: in each pass every rank takes as long as the slowest."""
    passes = zip(*plan, strict=True)
    return len(plan) * sum(max(int(lengths[rows].sum()) for rows in of_pass) for of_pass in passes)


@pytest.mark.parametrize("n_agent", [3, 5])
@pytest.mark.parametrize("mini_batch_size", [64, 512])
def test_ranks_wait_little_for_each_other(n_agent: int, mini_batch_size: int) -> None:
    """512 questions over 8 ranks, trajectories of 600 to 4,096 tokens that share nothing."""
    lengths = np.random.default_rng(n_agent).integers(600, 4097, 512 * n_agent).astype(np.int32)
    computed = 0
    for rows in np.array_split(lengths, len(lengths) // mini_batch_size):
        plan = deal(
            rows,
            overlaps=np.zeros_like(rows),
            num_ranks=8,
            max_tokens=16_384,
            prefixes=np.zeros_like(rows),
            groups=np.arange(len(rows), dtype=np.int32),
        )
        computed += waiting(plan, rows)
    assert computed <= 1.05 * lengths.sum()


def test_groups_stay_together_unless_ranks_would_wait() -> None:
    """Prompts of 100 tokens and 50 for each of 4 trajectories."""

    def plan(num_groups: int, *, num_ranks: int) -> list[list[IntArray]]:
        rows = np.repeat(np.arange(num_groups, dtype=np.int32), 4)
        return deal(
            np.full(len(rows), 50, np.int32),
            overlaps=np.zeros(len(rows), np.int32),
            num_ranks=num_ranks,
            max_tokens=1000,
            prefixes=np.full(len(rows), 100, np.int32),
            groups=rows,
        )

    for of_rank in plan(4, num_ranks=2):
        assert [len(set(rows // 4)) for rows in of_rank] == [2]  # 8 rows of two groups
    assert [[len(rows) for rows in of_rank] for of_rank in plan(1, num_ranks=4)] == [[1]] * 4


def test_rows_that_begin_like_the_one_before_them_take_less_room() -> None:
    """Four rows of 90 tokens after a prompt of 10; each but the first has 80 of the row before it."""

    def plan(max_tokens: int) -> list[int]:
        (passes,) = deal(
            np.full(4, 90, np.int32),
            overlaps=np.array([0, 80, 80, 80], np.int32),
            prefixes=np.full(4, 10, np.int32),
            groups=np.zeros(4, np.int32),
            num_ranks=1,
            max_tokens=max_tokens,
        )
        return [len(rows) for rows in passes]

    assert plan(130) == [4]  # 10 + 90 + 3 * 10
    assert plan(129) == [2, 2]
    assert plan(109) == [1, 1, 1, 1]
