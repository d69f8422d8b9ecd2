"""CW-GRPO: the advantage of a trajectory is redistributed over its searches (arXiv 2604.14267).

A search that contributed more to a right answer gets more of its advantage. The paper asks a judge model for
contributions; here they are the positive parts of the gains of `igpo`: how much each search raised the
log-prob of the gold answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl.algorithms.base import Algorithm, Measurement, Need, Prefetch, Services
from verl.algorithms.scoring.log_prob import AnswerProbes, has_changed, measure_states
from verl.algorithms.statistics import credit_turns, gains_of_turns, group_advantages
from verl.trainer.config.schema import AlgorithmConfig
from verl.types import ActionKind, Credit, Group, Score, Trajectory


@dataclass
class CWGRPOConfig(AlgorithmConfig):
    """Settings of `algorithm=cw_grpo`."""

    name: str = "cw_grpo"


class CWGRPO(Algorithm):
    """Reward a trajectory by its outcome, and distribute its advantage by what each search contributed."""

    settings: CWGRPOConfig
    settings_class = CWGRPOConfig
    compares_outcomes_only = True
    needs = frozenset({Need.POLICY_LOG_PROBS})
    answer_wrapper = "<answer> {answer} </answer>"

    def __init__(self, settings: CWGRPOConfig, services: Services) -> None:
        super().__init__(settings, services)
        self._probes = AnswerProbes(services.codec, services.answer_wrapper)

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        """Measure how much every turn but the last raised the mean log-prob of the gold answer."""
        assert self.services.policy is not None
        return await measure_states(
            groups,
            lambda t: self._probes.encode_all(t.question.golds[:1], trajectory=t) if has_changed(t) else None,
            scorer=self.services.policy,
            reduce=np.mean,
            turns=lambda _, states: [*(b[0] - a[0] for a, b in itertools.pairwise(states)), None],
        )

    def credit(
        self,
        groups: Sequence[Group],
        scores: Sequence[Sequence[Score]],
        *,
        progress: float = 0.0,
    ) -> list[list[Credit]]:
        """Credit each search with its share of the trajectory's advantage, other turns with the advantage."""
        credits = []
        for group, of_group in zip(groups, scores, strict=True):
            outcomes = [score.valid_outcome for score in of_group]
            advantages = group_advantages(outcomes, by_std=self.settings.norm_adv_by_std_in_grpo)
            credits.append(
                [
                    _credit(*parts)
                    for parts in zip(group.trajectories, of_group, outcomes, advantages, strict=True)
                ]
            )
        return credits


def _credit(trajectory: Trajectory, score: Score, outcome: float | None, advantage: float) -> Credit:
    searches = [t for t, turn in enumerate(trajectory.turns) if turn.action.kind is ActionKind.TOOL]
    gains = gains_of_turns(trajectory, score)
    shares = redistribute(advantage, [gains[t] for t in searches])
    values = [advantage] * len(trajectory.turns)
    for turn, value in zip(searches, shares, strict=True):
        values[turn] = value
    return credit_turns(trajectory, [] if outcome is None else values, score=score)


def redistribute(advantage: float, contributions: Sequence[float | None]) -> list[float]:
    """Return the advantage of each search: `A * c_t * n` for A >= 0, else A for all (section 3.3).

    `contributions` are gains, of which the positive part counts, None where none was measured; they are
    normalized to sum to 1 over the n searches that were measured. A search without one keeps A, and so do all
    searches where no contribution is positive: otherwise a right answer would give no search any credit.
    """
    known = [max(0.0, value) for value in contributions if value is not None]
    total = math.fsum(known)
    if advantage < 0 or total <= 0:
        return [advantage] * len(contributions)
    return [
        advantage if value is None else advantage * len(known) * max(0.0, value) / total
        for value in contributions
    ]
