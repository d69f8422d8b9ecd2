"""What the benchmark of methods counts, on hand-made trajectories."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.step import Batch, CountingScorer
from tests.fakes import make_question, make_trajectory
from verl.branches import Branch, Tree, TreeLogProbs
from verl.types import Group


class EmptyScorer:
    """Knows no log-probs."""

    scores_trajectories = False

    async def score(self, trees: Sequence[Tree]) -> list[TreeLogProbs]:
        return [TreeLogProbs(branches=()) for _ in trees]


async def test_shared_tokens_are_those_of_the_rows_and_naive_ones_those_of_a_pass_per_branch() -> None:
    answer = np.arange(3, dtype=np.int32)
    asked = Tree(
        trunk=np.arange(10, dtype=np.int32),
        branches=tuple(Branch(ids=answer, start=start, scored=(0, 3)) for start in (4, 8)),
    )
    scorer = CountingScorer(EmptyScorer())
    await scorer.score([asked, Tree(trunk=answer, branches=())])
    assert scorer.shared == 8 + 3 + 3  # the trunk up to the last branch, and both answers
    assert scorer.naive == (4 + 3) + (8 + 3)


def test_a_request_of_the_bare_engine_is_the_context_and_length_of_a_completion() -> None:
    question = make_question()
    trajectory = make_trajectory(question, queries=("a",), answer="b", outputs=4, observed=5)
    batch = Batch(groups=[Group(question=question, trajectories=(trajectory,))], step=1, rollout_s=1.0)
    ids = trajectory.token_ids.tolist()
    assert batch.requests() == [(ids[:3], 4), (ids[:12], 4)]
