"""Search-R1: GRPO on the outcome of the answer (arXiv 2503.09516, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl.algorithms.base import Algorithm
from verl.algorithms.statistics import credit_outcomes
from verl.trainer.config.schema import AlgorithmConfig
from verl.types import Credit, Group, Score


@dataclass
class SearchR1Config(AlgorithmConfig):
    """Settings of `algorithm=search_r1`."""

    name: str = "search_r1"


class SearchR1(Algorithm):
    """Reward a trajectory by its outcome; every policy token gets the advantage within its group."""

    settings_class = SearchR1Config

    def credit(self, groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> list[list[Credit]]:
        """Credit the outcome: see `credit_outcomes`."""
        return [
            credit_outcomes(group.trajectories, of_group, by_std=self.settings.norm_adv_by_std_in_grpo)
            for group, of_group in zip(groups, scores, strict=True)
        ]
