"""What `scripts/bench_step.py` measures: methods with their costs, and batches of trajectories."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from verl.algorithms.base import Algorithm, LogProbScorer
from verl.algorithms.scoring.reward import Reward
from verl.branches import Tree, TreeLogProbs, lay_out, split
from verl.forest import ForestBuilder
from verl.trainer.ppo.trainer import PPOTrainer
from verl.types import Group, Trajectory
from verl.utils.reward_score.IG_client import GainClient


@dataclass(slots=True, kw_only=True)
class Cost:
    """What a method added, once per repetition."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def add(self, cpu_s: float, wall_s: float) -> None:
        """Add one repetition."""
        self.cpu_s.append(cpu_s)
        self.wall_s.append(wall_s)


class CountingScorer:
    """A scorer that counts the tokens of one pass for all trees, and those of a pass per state."""

    def __init__(self, scorer: LogProbScorer) -> None:
        self._scorer = scorer
        self.scores_trajectories: bool = scorer.scores_trajectories
        self.shared = self.naive = 0

    async def score(self, trees: Sequence[Tree]) -> list[TreeLogProbs]:
        """Return the log-probs of each tree, in order."""
        builder = ForestBuilder()
        for tree in trees:
            if tree.num_scored:
                lay_out(tree, builder)
        self.shared += builder.num_tokens
        self.naive += sum(len(part.used_trunk) for tree in trees for part in split(tree))
        return await self._scorer.score(trees)


@dataclass(slots=True, kw_only=True)
class Method:
    """A method under measurement."""

    name: str
    algorithm: Algorithm
    reward: Reward
    scorer: CountingScorer | None
    client: GainClient | None
    cost: Cost = field(default_factory=Cost)

    async def aclose(self) -> None:
        """Close the connections to the IG service."""
        if self.client is not None:
            await self.client.aclose()


@dataclass(slots=True, kw_only=True)
class Batch:
    """The trajectories of one step, and the seconds of its rollout and of its update."""

    groups: Sequence[Group]
    step: int
    rollout_s: float
    update_s: float = 0.0
    num_trained: int = 0
    """Sampled tokens that the update trained on."""

    @property
    def trajectories(self) -> list[Trajectory]:
        """Return all trajectories."""
        return [trajectory for group in self.groups for trajectory in group.trajectories]

    def requests(self) -> list[tuple[list[int], int]]:
        """Return the context of every completion and the number of its tokens."""
        requests = []
        for trajectory in self.trajectories:
            ids, start = trajectory.token_ids, len(trajectory.prompt_ids)
            for turn in trajectory.turns:
                requests.append((ids[:start].tolist(), len(turn.output_ids)))
                start += len(turn.output_ids) + len(turn.observation_ids)
        return requests

    async def train(self, trainer: PPOTrainer) -> None:
        """Train on the batch as a step does, from the log-probs that it needs on."""
        parts = trainer.parts
        async with aclosing(parts.algorithm.prefetch([group.question for group in self.groups])) as prefetch:
            scored = await parts.reward.score(self.groups, prefetch=prefetch)
        rows = await trainer.add_log_probs(trainer.build_batch(scored))
        self.num_trained = rows.num_policy_tokens
        began = time.perf_counter()
        await parts.policy.update(rows)
        self.update_s = time.perf_counter() - began
