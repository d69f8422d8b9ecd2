"""Rewards that are broken or withheld on purpose, to see whether a comparison notices.

They wrap the reward of a run: episodes, gains, scores and metrics stay what they are, only the credit that
the policy is trained with changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from verl.algorithms.base import Algorithm, Prefetch
from verl.trainer.ppo.trainer import PPOTrainer, StepReward
from verl.types import Credit, Group, Score, ScoredGroups, Trajectory
from verl.utils.seeding import derive_seed


def apply_handicap(trainer: PPOTrainer, name: str | None, *, seed: int) -> None:
    """Let a trainer that is built train with one of `comparison.plan.HANDICAPS`; None changes nothing."""
    if name is None:
        return
    parts = trainer.parts
    reward: StepReward
    if name == "shuffled_outcomes":
        reward = ShuffledOutcomes(parts.reward, algorithm=parts.algorithm, seed=seed)
    else:
        reward = FailedGroupsOnly(parts.reward)
    trainer.parts = replace(parts, reward=reward)


class ChangedCredit(ABC):
    """A reward whose credit is changed; scores stay as they are."""

    def __init__(self, reward: StepReward) -> None:
        self._reward = reward

    async def score(
        self,
        groups: Sequence[Group],
        *,
        prefetch: Prefetch,
        progress: float = 0.0,
        stats: Mapping[str, float] | None = None,
    ) -> ScoredGroups:
        """Return true scores, and the changed credit."""
        scored = await self._reward.score(groups, prefetch=prefetch, progress=progress, stats=stats)
        return replace(scored, credits=self._credit(groups, scored, progress=progress))

    def score_validation(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Return the outcomes as they are."""
        return self._reward.score_validation(trajectories)

    @abstractmethod
    def _credit(
        self, groups: Sequence[Group], scored: ScoredGroups, *, progress: float
    ) -> Sequence[Sequence[Credit]]: ...


class ShuffledOutcomes(ChangedCredit):
    """Credits every episode with the outcome of another one of the step, drawn at random: a broken reward."""

    def __init__(self, reward: StepReward, *, algorithm: Algorithm, seed: int) -> None:
        super().__init__(reward)
        self._algorithm = algorithm
        self._seed = seed

    def _credit(
        self, groups: Sequence[Group], scored: ScoredGroups, *, progress: float
    ) -> Sequence[Sequence[Credit]]:
        seed = derive_seed(self._seed, "shuffled", *(group.question.uid for group in groups))
        shuffled = shuffle_outcomes(scored.scores, seed=seed)
        return self._algorithm.credit(groups, shuffled, progress=progress)


class FailedGroupsOnly(ChangedCredit):
    """Credits only groups in which no episode has a full outcome: what does a method teach there?"""

    def _credit(
        self,
        groups: Sequence[Group],  # noqa: ARG002
        scored: ScoredGroups,
        *,
        progress: float,  # noqa: ARG002
    ) -> Sequence[Sequence[Credit]]:
        return [
            [_silence(credit) for credit in of_group] if any(_is_right(s) for s in scores) else of_group
            for of_group, scores in zip(scored.credits, scored.scores, strict=True)
        ]


def shuffle_outcomes(scores: Sequence[Sequence[Score]], *, seed: int) -> list[list[Score]]:
    """Return the scores with their outcomes permuted over all groups; those that failed keep theirs, None."""
    valid = [score.outcome for of_group in scores for score in of_group if score.failure is None]
    drawn = iter(np.random.default_rng(seed).permutation(len(valid)).tolist())
    return [
        [s if s.failure is not None else replace(s, outcome=valid[next(drawn)]) for s in of_group]
        for of_group in scores
    ]


def _is_right(score: Score) -> bool:
    return score.metrics.get("em", 0.0) >= 1.0


def _silence(credit: Credit) -> Credit:
    return replace(credit, advantages=np.zeros_like(credit.advantages))
