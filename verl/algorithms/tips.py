"""TIPS: the potential of a state is how likely its scorer finds a gold answer (arXiv 2603.22293).

Phi(s) = tau * logsumexp over gold answers a of (L_a(s) / tau), with L_a the summed log-prob of
`<answer>a</answer>` under a frozen, or from time to time refreshed, copy of the policy. A turn is rewarded by
alpha * (Phi after it - Phi before it).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from verl.algorithms.base import Algorithm, Measurement, Need, Prefetch, ScorerOptions, Services
from verl.algorithms.scoring.log_prob import (
    AnswerProbes,
    has_changed,
    measure_states,
)
from verl.algorithms.statistics import UNSCALED, credit_returns
from verl.trainer.config.fields import not_negative, one_of, positive, share
from verl.trainer.config.schema import AlgorithmConfig
from verl.types import Credit, Group, Score, Trajectory


@dataclass
class TIPSConfig(AlgorithmConfig):
    """Settings of `algorithm=tips`."""

    name: str = "tips"
    gamma: float = share(1.0)
    tau: float = positive(1.0)
    aliases: str = one_of("logsumexp", "max")
    scale: str = one_of("batch", "fixed")
    """`batch`: alpha gives a mean absolute reward of `target_size` over the batch; `fixed`: it is `alpha`."""
    alpha: float = not_negative(0.02)
    target_size: float = positive(0.11)
    terminal: bool = False
    """Subtract the last potential from the last turn: the shaping then leaves the best policy as it is."""
    refresh_steps: int = not_negative(0)
    """The scorer gets the policy's weights after every so many steps; 0: it stays the initial policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_ignored("norm_adv_by_std_in_grpo", because=f"algorithm=tips: {UNSCALED}")


class TIPS(Algorithm):
    """Reward every turn by the change of the state's potential, and the last one by the outcome."""

    settings: TIPSConfig
    settings_class = TIPSConfig
    needs = frozenset({Need.FROZEN_LOG_PROBS})
    answer_wrapper = "<answer>{answer}</answer>"

    def __init__(self, settings: TIPSConfig, services: Services) -> None:
        super().__init__(settings, services)
        # The tags count: a state is good when the model would answer, and answer this.
        self._probes = AnswerProbes(services.codec, services.answer_wrapper, with_tag=True)

    @classmethod
    def scorer_options(cls, settings: TIPSConfig) -> ScorerOptions:
        """Return how often the copy of the policy is refreshed."""
        return ScorerOptions(refresh_steps=settings.refresh_steps)

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        """Measure the change of potential of every turn; those of a trajectory in one pass."""
        assert self.services.frozen is not None
        return await measure_states(
            groups,
            lambda t: (
                self._probes.encode_all(t.question.golds, trajectory=t)
                if has_changed(t) or self.settings.terminal
                else None
            ),
            scorer=self.services.frozen,
            reduce=np.sum,
            turns=self._changes,
        )

    def _changes(self, _: Trajectory, log_probs: list[list[float]]) -> list[float | None]:
        potentials = [potential(of_state, self.settings) for of_state in log_probs]
        return shaping(potentials, terminal=self.settings.terminal)

    def credit(
        self,
        groups: Sequence[Group],
        scores: Sequence[Sequence[Score]],
        *,
        progress: float = 0.0,
    ) -> list[list[Credit]]:
        """Credit scaled changes of potential and the outcome, each turn with all that came from it on."""
        valid = [score for of_group in scores for score in of_group if score.failure is None]
        # Without the last turns: the terminal term is a whole potential, which would set the scale.
        alpha = batch_scale([gain for score in valid for gain in score.gain.turns[:-1]], self.settings)
        return credit_returns(groups, scores, gain_weight=alpha, discount=self.settings.gamma)


def potential(log_probs: Sequence[float], settings: TIPSConfig) -> float:
    """Return Phi of a state from the summed log-prob of each gold answer."""
    if settings.aliases == "max":
        return max(log_probs)
    scaled = [value / settings.tau for value in log_probs]
    top = max(scaled)
    return settings.tau * (top + math.log(math.fsum(math.exp(value - top) for value in scaled)))


def shaping(potentials: Sequence[float], *, terminal: bool = False) -> list[float | None]:
    """Return the difference of potentials that each turn made, from those before the first and after each.

    The last turn answers and changes no state: None. With `terminal` it loses the last potential, so that all
    differences sum to minus the first one whatever the policy does, and the best policy stays the best
    (Ng et al. 1999).
    """
    changes = [after - before for before, after in itertools.pairwise(potentials)]
    return [*changes, -potentials[-1] if terminal else None]


def batch_scale(differences: Sequence[float | None], settings: TIPSConfig) -> float:
    """Return alpha: fixed, or such that the mean of `|alpha * difference|` over non-zero ones is as set."""
    sizes = [abs(value) for value in differences if value]
    if settings.scale == "fixed":
        return settings.alpha
    return settings.target_size / fmean(sizes) if sizes else 0.0
