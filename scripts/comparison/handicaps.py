"""Rewards that are broken or withheld on purpose, to see whether a comparison notices.

They wrap the reward of a run: episodes, gains, scores and metrics stay what they are, only the credit that
the policy is trained with changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from verl.algorithms.base import Algorithm, Prefetch
from verl.trainer.ppo.trainer import PPOTrainer, StepReward
from verl.types import Credit, Group, Score, ScoredGroups, Trajectory
from verl.utils.seeding import derive_seed

Credits = Sequence[Sequence[Credit]]
Change = Callable[[Sequence[Group], ScoredGroups, float], Credits]
"""Takes groups, their scores and true credit, and the progress of the run; returns the changed credit."""


def apply_handicap(trainer: PPOTrainer, name: str | None, *, seed: int) -> None:
    """Let a trainer that is built train with one of `comparison.plan.HANDICAPS`; None changes nothing."""
    if name is None:
        return
    parts = trainer.parts
    change: Change = keep_failed_groups
    if name == "shuffled_outcomes":
        change = partial(credit_shuffled, algorithm=parts.algorithm, seed=seed)
    trainer.parts = replace(parts, reward=ChangedCredit(parts.reward, change))


class ChangedCredit:
    """A reward whose credit is changed; scores stay as they are."""

    def __init__(self, reward: StepReward, change: Change) -> None:
        self._reward = reward
        self._change = change

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
        return replace(scored, credits=self._change(groups, scored, progress))

    def score_validation(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Return the outcomes as they are."""
        return self._reward.score_validation(trajectories)


def credit_shuffled(
    groups: Sequence[Group], scored: ScoredGroups, progress: float, *, algorithm: Algorithm, seed: int
) -> Credits:
    """Credit every episode with the outcome of another one of the step, drawn at random: a broken reward."""
    drawn = derive_seed(seed, "shuffled", *(group.question.uid for group in groups))
    return algorithm.credit(groups, shuffle_outcomes(scored.scores, seed=drawn), progress=progress)


def keep_failed_groups(groups: Sequence[Group], scored: ScoredGroups, progress: float) -> Credits:  # noqa: ARG001
    """Credit only groups in which no episode has a full outcome: what does a method teach there?"""
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
