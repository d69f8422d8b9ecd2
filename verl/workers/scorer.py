"""Log-probs for methods and the KL term: of the policy before the update, or of a frozen model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from serving.files import FileRecord
from verl.branches import Tree, TreeLogProbs
from verl.errors import ConfigError
from verl.types import FloatArray
from verl.workers.batch import TrainBatch
from verl.workers.worker_group import WorkerGroup


class ScoringModel(Protocol):
    """The part of a `WorkerGroup` that scores."""

    async def log_probs(self, batch: TrainBatch) -> FloatArray: ...

    async def tree_log_probs(self, trees: Sequence[Tree], *, shared: bool = True) -> list[TreeLogProbs]: ...


class InitialPolicy:
    """The policy with its adapters off, which is the initial model: the frozen reference with LoRA."""

    def __init__(self, policy: WorkerGroup) -> None:
        self._policy = policy

    async def log_probs(self, batch: TrainBatch) -> FloatArray:
        """Return the log-prob of every policy token at the sampling temperature [N]."""
        return await self._policy.log_probs(batch, adapters=False)

    async def tree_log_probs(self, trees: Sequence[Tree], *, shared: bool = True) -> list[TreeLogProbs]:
        """Return the log-probs of each tree, see `WorkerGroup.tree_log_probs`."""
        return await self._policy.tree_log_probs(trees, shared=shared, adapters=False)


class LogProbScorer:
    """A model as a `verl.algorithms.base.LogProbScorer`."""

    def __init__(self, model: ScoringModel, *, shares_prefixes: bool, scores_trajectories: bool) -> None:
        """Compute, with `scores_trajectories`, also the log-probs of sampled tokens that the update needs."""
        self._model = model
        self._shares_prefixes = shares_prefixes
        self.scores_trajectories = scores_trajectories

    async def score(self, trees: Sequence[Tree]) -> list[TreeLogProbs]:
        """Return the log-probs of each tree, in order."""
        return await self._model.tree_log_probs(trees, shared=self._shares_prefixes)


class PolicyCopy:
    """A frozen model that gets the policy's weights every so many steps, and is kept in checkpoints."""

    def __init__(self, policy: WorkerGroup, model: WorkerGroup, *, every: int, scratch: Path) -> None:
        """Refresh after `every` steps; weights travel through a folder in `scratch`."""
        self.model = model
        self._policy = policy
        self._every = every
        self._folder = scratch / "policy_copy"

    async def refresh(self, step: int) -> None:
        """Copy the policy's weights, exactly, if that is due after this step."""
        if step % self._every:
            return
        try:
            await self._policy.save(self._folder, weights_only=True)
            await self.model.load(self._folder)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def stage(self, key: str) -> None:
        """Copy the weights to host memory for `write`."""
        await self.model.stage(key)

    async def write(self, key: str, checkpoint: Path) -> dict[Path, FileRecord]:
        """Write what was staged under `key` into a checkpoint; return what the files must be."""
        return await self.model.write(key, checkpoint / _COPY)

    async def load(self, checkpoint: Path) -> None:
        """Restore the copy that was saved. Raises ConfigError where there is none."""
        if not (checkpoint / _COPY).is_dir():
            raise ConfigError(
                f"{checkpoint} has no copy of the policy, which algorithm.refresh_steps={self._every} scores "
                "with: it was saved with 0. Resume with algorithm.refresh_steps=0, or start another run"
            )
        await self.model.load(checkpoint / _COPY)


_COPY = "policy_copy"
"""Folder in a checkpoint."""
