"""InfoReasoner: reward `outcome + lambda * semantic information gain` of what a trajectory read.

The IG service samples short answers with and without passages and compares the mass S of the right meaning.
`granularity=trajectory`, as published: the gain of all passages against none, one number per trajectory, and
GRPO on the sum. `granularity=turn`: the gain of each turn that found passages, against what had been read
before it (`turn_baseline=previous`; these gains sum to that of the trajectory) or against none
(`no_retrieval`), and the return-to-go of every turn against that of the other trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from IG.messages import GainRequest, GainResult
from verl.algorithms.base import Algorithm, Measurement, Need, Prefetch
from verl.algorithms.scoring.ig_service import GainRequests
from verl.algorithms.statistics import UNSCALED, credit_returns, credit_rewards
from verl.trainer.config.fields import not_negative, one_of, positive
from verl.trainer.config.schema import OutcomeConfig
from verl.types import Credit, Gain, Group, Question, Score, Stop, Trajectory
from verl.utils.reward_score.IG_reward import combine


@dataclass
class InfoReasonerConfig(OutcomeConfig):
    """Settings of `algorithm=inforeasoner`."""

    name: str = "inforeasoner"
    gain_weight: float = not_negative(0.6)
    """lambda."""
    granularity: str = one_of("trajectory", "turn")
    turn_baseline: str = one_of("previous", "no_retrieval")
    gain_form: str = one_of("difference", "log_ratio")
    gain_floor: float = positive(0.01)
    """Least S in a logarithm."""
    gain_clip: float = positive(3.0)
    """Largest absolute value of a log ratio."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity == "turn":
            self.refuse_ignored(
                "adv_estimator",
                "norm_adv_by_std_in_grpo",
                because=f"algorithm.granularity=turn: {UNSCALED}",
            )


class InfoReasoner(Algorithm):
    """Reward a trajectory, or each of its turns, by the gain of what it read, and the end by the outcome."""

    settings: InfoReasonerConfig
    settings_class = InfoReasonerConfig
    needs = frozenset({Need.IG_SERVICE})

    def prefetch(self, questions: Sequence[Question]) -> GainRequests:
        """Request the baselines at once, and every gain as soon as its episode has ended."""
        assert self.services.ig_service is not None
        requests = GainRequests(self.services.ig_service, requests_of=self._requests_of)
        for question in questions:
            requests.send(GainRequest(question=question.text, context="", golds=question.golds))
        return requests

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        """Return the gains of all trajectories that read a passage and answered."""
        assert isinstance(prefetch, GainRequests)
        requests = [[prefetch.requests_of(t) for t in group.trajectories] for group in groups]
        results = await prefetch.results([r for of_group in requests for some in of_group for r in some])
        gains = [
            [
                self._gain(trajectory, [results[request] for request in some])
                for trajectory, some in zip(group.trajectories, of_group, strict=True)
            ]
            for group, of_group in zip(groups, requests, strict=True)
        ]
        return Measurement(gains=gains, stats=prefetch.stats)

    def credit(
        self, groups: Sequence[Group], scores: Sequence[Sequence[Score]], *, progress: float = 0.0
    ) -> list[list[Credit]]:
        """Credit outcome plus weighted gain: see `credit_rewards`, and `credit_returns` for turns."""
        if self.settings.granularity == "turn":
            return credit_returns(groups, scores, gain_weight=self.settings.gain_weight, discount=1.0)
        return credit_rewards(
            groups,
            [[self._reward(score) for score in of_group] for of_group in scores],
            [[{"outcome": s.outcome, "gain": s.gain.trajectory} for s in of_group] for of_group in scores],
            settings=self.settings,
        )

    def _requests_of(self, trajectory: Trajectory) -> list[GainRequest]:
        """Return the requests for a trajectory: none without a passage or without an answer.

        Without an answer the published reward is 0, also after good searches, so that no gain is needed. For
        turns there is one request per turn that found passages, of all that was read up to it: the service
        measures each against none, so that all share one baseline.
        """
        if trajectory.stop is Stop.FAILED or trajectory.answer is None or not trajectory.passages:
            return []
        states = [trajectory]
        if self.settings.granularity == "turn":
            states = [replace(trajectory, turns=trajectory.turns[: t + 1]) for t in _searches(trajectory)]
        question = trajectory.question
        contexts = map(self.services.render_context, states)
        return [GainRequest(question=question.text, context=c, golds=question.golds) for c in contexts]

    def _gain(self, trajectory: Trajectory, results: Sequence[GainResult]) -> Gain:
        """Return the gain of a trajectory from the results of its requests, or the first failure."""
        if not results:
            return Gain()
        failures = [result.error for result in results if result.gain is None]
        if not failures and self.settings.gain_form == "log_ratio" and None in _beliefs(results):
            failures = ["the IG service reports no beliefs, which algorithm.gain_form=log_ratio needs"]
        if failures:
            return Gain(failure=f"gain_failed: {failures[0]}")
        values = gains_of(results, self.settings)
        if self.settings.granularity == "trajectory":
            return Gain(trajectory=values[0])
        turns: list[float | None] = [None] * len(trajectory.turns)
        for t, value in zip(_searches(trajectory), values, strict=True):
            turns[t] = value
        return Gain(turns=tuple(turns))

    def _reward(self, score: Score) -> float | None:
        if score.failure is not None or score.outcome is None:
            return None
        return combine(score.outcome, score.gain.trajectory, weight=self.settings.gain_weight)


def _searches(trajectory: Trajectory) -> list[int]:
    """Return the turns that found passages."""
    return [t for t, turn in enumerate(trajectory.turns) if turn.passages]


def _beliefs(results: Sequence[GainResult]) -> list[float | None]:
    """Return S without a context, then with each."""
    return [results[0].belief_no_context, *(result.belief_with_context for result in results)]


def gains_of(results: Sequence[GainResult], settings: InfoReasonerConfig) -> list[float]:
    """Return the gain of each context against the one before it or against none.

    `results` are of growing contexts, each measured against none; none failed. A log ratio is
    `log S(after) - log S(before)`, with S at least `gain_floor`, clipped to `gain_clip`.
    """
    if settings.gain_form == "difference":
        # All are against the same baseline, which drops out of their differences.
        levels, limit = [0.0, *(result.gain or 0.0 for result in results)], math.inf
    else:
        levels = [math.log(max(belief or 0.0, settings.gain_floor)) for belief in _beliefs(results)]
        limit = settings.gain_clip
    is_step = settings.turn_baseline == "previous"
    before = levels[:-1] if is_step else levels[:1] * len(results)
    return [max(-limit, min(limit, b - a)) for a, b in zip(before, levels[1:], strict=True)]
