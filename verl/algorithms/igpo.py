"""IGPO: every turn is rewarded by how much it raised the log-prob of the gold answer (arXiv 2510.14967).

b_t is the mean log-prob per token of the gold answer after turn t, under the policy before the update; the
reward of turn t is b_t - b_{t-1} (or the difference of exp b), that of the last turn the outcome. Rewards are
normalized within the group, summed from each turn on with a discount, and given to the turn's tokens.

`info_gain_norm_mode` are the paper's `separate` and `joint`, and `raw_ig` and `scaled_separate`, which the
authors use in DR-Venus. `baseline=leave_one_out` is ours: it keeps the incentive to search.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np

from verl.algorithms.base import Algorithm, Measurement, Need, Prefetch, ScorerOptions, Services
from verl.algorithms.scoring.log_prob import AnswerProbes, measure_states
from verl.algorithms.statistics import (
    UNSCALED,
    credit_turns,
    gains_of_turns,
    leave_one_out_turns,
    returns_to_go,
)
from verl.trainer.config.fields import not_negative, one_of, share
from verl.trainer.config.schema import AlgorithmConfig
from verl.types import Credit, Group, Score, Trajectory

STD_FLOOR = 1e-8
"""Added to a variance before its root, as in the authors' code."""
EPSILON = 1e-6
_LEAST_SPREAD = math.sqrt(2 * STD_FLOOR) + EPSILON
"""Divisor of values whose variance is `STD_FLOOR`; `raw_ig` does not divide by a smaller one."""
_MAX_SCALE, _MIN_OUTCOME = 10.0, 0.3
"""Bounds of `scaled_separate`, as in the authors' code."""


@dataclass
class IGPOConfig(AlgorithmConfig):
    """Settings of `algorithm=igpo`, by the keys of its published script."""

    name: str = "igpo"
    gamma: float = share(1.0)
    """Discount of later turns; 0 credits each turn with its own reward alone."""
    adaptive_gamma: float | None = share(None)
    """Weight that the last turn has for the first one: the discount is this to the power 1 / turns."""
    info_gain_type: str = one_of("log_prob_diff", "prob_diff")
    info_gain_norm_mode: str = one_of("separate", "joint", "raw_ig", "scaled_separate")
    baseline: str = one_of("group", "leave_one_out")
    gain_weight: float = not_negative(1.0)
    """Weight of gains against the outcome in `raw_ig` and with `baseline=leave_one_out`."""
    gain_tools: list[str] | None = None
    """Tools whose turns get a gain; null: every turn but the last."""
    use_vectorized_gt_logprob: bool = True
    """Compute all states of a trajectory in one pass that shares their prefix; false: a pass per state."""
    answers: str = one_of("best", "first")
    """Gold answer that is scored: the most likely one after the last turn, or the first (as published)."""
    use_curriculum: bool = False
    curriculum_f1_init: float = not_negative(0.5)
    curriculum_f1_final: float = not_negative(1.0)
    curriculum_ig_init: float = not_negative(1.0)
    curriculum_ig_final: float = not_negative(0.5)
    curriculum_before_norm: bool = False
    """Weigh rewards before they are normalized, as published first: without effect in `separate`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline == "leave_one_out":
            self.refuse_ignored(
                "info_gain_norm_mode",
                "norm_adv_by_std_in_grpo",
                because=f"algorithm.baseline=leave_one_out: {UNSCALED}",
            )

    def curriculum(self, progress: float) -> tuple[float, float]:
        """Return the weights of outcome and gains at a share of the run in [0, 1]."""
        if not self.use_curriculum:
            return 1.0, 1.0
        done = min(progress, 1.0)
        return (
            self.curriculum_f1_init + (self.curriculum_f1_final - self.curriculum_f1_init) * done,
            self.curriculum_ig_init + (self.curriculum_ig_final - self.curriculum_ig_init) * done,
        )


class IGPO(Algorithm):
    """Reward every turn by the rise of the gold answer's log-prob, and the last one by the outcome."""

    settings: IGPOConfig
    settings_class = IGPOConfig
    needs = frozenset({Need.POLICY_LOG_PROBS})
    outcome = "igpo_f1"
    format = "igpo"
    answer_wrapper = (
        "<think>\nNow there's enough information to answer\n</think>\n<answer>\n{answer}\n</answer>"
    )

    def __init__(self, settings: IGPOConfig, services: Services) -> None:
        super().__init__(settings, services)
        self._probes = AnswerProbes(services.codec, services.answer_wrapper)

    @classmethod
    def scorer_options(cls, settings: IGPOConfig) -> ScorerOptions:
        """Return whether the states of a trajectory share a pass."""
        return ScorerOptions(shares_prefixes=settings.use_vectorized_gt_logprob)

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        """Measure the gains of every turn but the last, all states of a trajectory in one pass."""
        assert self.services.policy is not None
        count = None if self.settings.answers == "best" else 1
        return await measure_states(
            groups,
            lambda t: (
                self._probes.encode_all(t.question.golds[:count], trajectory=t)
                if self._chosen_turns(t)
                else None
            ),
            states=self._states,
            scorer=self.services.policy,
            reduce=np.mean,
            turns=self._gains,
        )

    def _chosen_turns(self, trajectory: Trajectory) -> list[int]:
        """Return the turns that get a gain: all but the last, or those of them that called `gain_tools`."""
        tools = self.settings.gain_tools
        return [
            t
            for t, turn in enumerate(trajectory.turns[:-1])
            if tools is None or any(call.tool in tools for call in turn.action.calls)
        ]

    def _states(self, trajectory: Trajectory) -> list[int]:
        """Return the states before and after each chosen turn, and the last one, which chooses the answer."""
        chosen = self._chosen_turns(trajectory)
        return sorted({*chosen, *(t + 1 for t in chosen), len(trajectory.turns) - 1})

    def _gains(self, trajectory: Trajectory, log_probs: list[list[float]]) -> list[float | None]:
        last = log_probs[-1]
        best = last.index(max(last))  # the same answer in every state, or their differences say nothing
        beliefs = {s: of_state[best] for s, of_state in zip(self._states(trajectory), log_probs, strict=True)}
        gains: list[float | None] = [None] * len(trajectory.turns)
        for t in self._chosen_turns(trajectory):
            (gains[t],) = gains_of([beliefs[t], beliefs[t + 1]], kind=self.settings.info_gain_type)
        return gains

    def credit(
        self, groups: Sequence[Group], scores: Sequence[Sequence[Score]], *, progress: float = 0.0
    ) -> list[list[Credit]]:
        """Credit every token of a turn with the turn's return."""
        rewards = [
            [
                None
                if (outcome := score.valid_outcome) is None
                else TurnRewards(gains=gains_of_turns(trajectory, score)[:-1], outcome=outcome)
                for trajectory, score in zip(group.trajectories, of_group, strict=True)
            ]
            for group, of_group in zip(groups, scores, strict=True)
        ]
        returns = turn_returns(rewards, self.settings, progress=progress)
        return [
            [
                credit_turns(trajectory, of_one, score=score)
                for trajectory, of_one, score in zip(group.trajectories, of_group, of_scores, strict=True)
            ]
            for group, of_group, of_scores in zip(groups, returns, scores, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRewards:
    """The raw rewards of one trajectory that did not fail."""

    gains: tuple[float | None, ...]
    """One per turn but the last; None where a turn gets none, which is not 0: it enters no statistic."""
    outcome: float


RewardGroup = Sequence[TurnRewards | None]
"""The trajectories of one question; None for one that failed."""


def gains_of(beliefs: Sequence[float], *, kind: str) -> list[float]:
    """Return the gains of turns from the mean log-probs before the first turn and after each one (eq. 3)."""
    values = [math.exp(b) for b in beliefs] if kind == "prob_diff" else list(beliefs)
    return [after - before for before, after in itertools.pairwise(values)]


def turn_returns(
    groups: Sequence[RewardGroup], settings: IGPOConfig, *, progress: float = 0.0
) -> list[list[list[float]]]:
    """Return the advantage of every turn of a batch of groups; no turns for a failed trajectory."""
    if settings.baseline == "leave_one_out":
        return [_leave_one_out(group, settings, progress=progress) for group in groups]
    normalized = [_normalize(group, settings, progress=progress) for group in groups]
    scale = _scale_of_gains(normalized) if settings.info_gain_norm_mode == "scaled_separate" else 1.0
    return [
        [[] if rewards is None else _sum_later(rewards, settings, scale=scale) for rewards in group]
        for group in normalized
    ]


def _sum_later(rewards: TurnRewards, settings: IGPOConfig, *, scale: float) -> list[float]:
    """Return per turn its normalized reward and the discounted ones of later turns (eq. 6)."""
    gains = [0.0 if gain is None else scale * gain for gain in rewards.gains]
    discount = _discount(settings, len(gains) + 1)
    if settings.info_gain_norm_mode == "raw_ig":  # the discount is for gains, the outcome counts in full
        return [value + rewards.outcome for value in returns_to_go([*gains, 0.0], discount=discount)]
    return returns_to_go([*gains, rewards.outcome], discount=discount)


def _normalize(group: RewardGroup, settings: IGPOConfig, *, progress: float) -> list[TurnRewards | None]:
    """Return z-scored gains and outcomes of a group (section 3.2 of the paper, eq. 5)."""
    mode = settings.info_gain_norm_mode
    outcome_weight, gain_weight = settings.curriculum(progress)
    before = settings.curriculum_before_norm
    early = (outcome_weight, gain_weight) if before else (1.0, 1.0)
    late = (1.0, 1.0) if before else (outcome_weight, gain_weight)
    valid = [rewards for rewards in group if rewards is not None]
    gains = [early[1] * gain for r in valid for gain in r.gains if gain is not None]
    outcomes = [early[0] * r.outcome for r in valid]
    by_std = settings.norm_adv_by_std_in_grpo
    of_gains = _moments(gains + outcomes if mode == "joint" else gains, by_std=by_std)
    of_outcomes = of_gains if mode == "joint" else _moments(outcomes, by_std=by_std)
    weight = late[1]
    if mode == "raw_ig":  # not centered: a gain stays what it is, in units of its spread
        # Equal gains have no spread: they would be multiplied by 10,000.
        of_gains = (0.0, of_gains[1] if of_gains[1] > _LEAST_SPREAD else 1.0 + EPSILON)
        weight *= settings.gain_weight
    return [
        None
        if r is None
        else TurnRewards(
            gains=tuple(
                None if gain is None else weight * (early[1] * gain - of_gains[0]) / of_gains[1]
                for gain in r.gains
            ),
            outcome=late[0] * (early[0] * r.outcome - of_outcomes[0]) / of_outcomes[1],
        )
        for r in group
    ]


def _moments(values: Sequence[float], *, by_std: bool) -> tuple[float, float]:
    """Return mean and divisor: `sqrt(population variance + 1e-8) + 1e-6`, or about 1 for a lone value."""
    mean = fmean(values) if values else 0.0
    if len({*values}) == 1:
        mean = values[0]  # exactly, so that equal rewards give exactly 0
    if not by_std:
        return mean, 1.0
    if len(values) < 2:
        return mean, 1.0 + EPSILON
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return mean, math.sqrt(variance + STD_FLOOR) + EPSILON


def _scale_of_gains(groups: Sequence[RewardGroup]) -> float:
    """Return the factor that gives gains about the size of the outcomes, over the whole batch."""
    valid = [rewards for group in groups for rewards in group if rewards is not None]
    gains = [abs(gain) for rewards in valid for gain in rewards.gains if gain is not None]
    outcomes = [abs(rewards.outcome) for rewards in valid]
    if not gains or not any(gains):
        return 1.0
    size = max(_MIN_OUTCOME, fmean(outcomes))
    return min(_MAX_SCALE, size / fmean(gains))


def _leave_one_out(group: RewardGroup, settings: IGPOConfig, *, progress: float) -> list[list[float]]:
    """Return advantages of raw rewards against the other trajectories; see `leave_one_out_turns`."""
    outcome_weight, gain_weight = settings.curriculum(progress)
    return leave_one_out_turns(
        [() if r is None else (*r.gains, None) for r in group],
        [None if r is None else outcome_weight * r.outcome for r in group],
        gain_weight=settings.gain_weight * gain_weight,
        discount=partial(_discount, settings),
    )


def _discount(settings: IGPOConfig, turns: int) -> float:
    if settings.adaptive_gamma is not None:
        return float(settings.adaptive_gamma ** (1.0 / turns))
    return settings.gamma
