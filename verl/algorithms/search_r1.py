"""Search-R1: GRPO on the outcome of the answer (arXiv 2503.09516, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl.algorithms.base import Algorithm
from verl.algorithms.statistics import credit_outcomes
from verl.trainer.config.schema import OutcomeConfig
from verl.types import Credit, Group, Score


@dataclass
class SearchR1Config(OutcomeConfig):
    """Settings of `algorithm=search_r1`."""

    name: str = "search_r1"


class SearchR1(Algorithm):
    """Reward a trajectory by its outcome; every policy token gets the advantage within its group."""

    settings: SearchR1Config
    settings_class = SearchR1Config
    compares_outcomes_only = True

    def credit(
        self, groups: Sequence[Group], scores: Sequence[Sequence[Score]], *, progress: float = 0.0
    ) -> list[list[Credit]]:
        """Credit the outcome: see `credit_outcomes`."""
        return credit_outcomes(groups, scores, settings=self.settings)
