"""Log-probs for methods: of the policy before the update, or of a copy of it that stays behind."""

from __future__ import annotations

from collections.abc import Sequence

from verl.branches import Tree, TreeLogProbs
from verl.workers.worker_group import WorkerGroup


class LogProbScorer:
    """A model as a `verl.algorithms.base.LogProbScorer`."""

    def __init__(self, model: WorkerGroup, *, shares_prefixes: bool, scores_trajectories: bool) -> None:
        """`scores_trajectories` also computes the log-probs of sampled tokens, if the update needs them."""
        self._model = model
        self._shares_prefixes = shares_prefixes
        self.scores_trajectories = scores_trajectories

    async def score(self, trees: Sequence[Tree]) -> list[TreeLogProbs]:
        """Return the log-probs of each tree, in order."""
        return await self._model.tree_log_probs(trees, shared=self._shares_prefixes)
