"""InfoReasoner: GRPO on `outcome + lambda * semantic information gain` of all passages of a trajectory.

The IG service samples short answers with and without the passages and compares the mass of the right meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from IG.messages import GainRequest
from verl.algorithms.base import Algorithm, Measurement, Need, Prefetch
from verl.algorithms.scoring.ig_service import GainRequests, as_gain
from verl.algorithms.statistics import credit_rewards
from verl.trainer.config.schema import OutcomeConfig, not_negative
from verl.types import Credit, Gain, Group, Question, Score, Stop, Trajectory
from verl.utils.reward_score.IG_reward import combine


@dataclass
class InfoReasonerConfig(OutcomeConfig):
    """Settings of `algorithm=inforeasoner`."""

    name: str = "inforeasoner"
    gain_weight: float = not_negative(0.6)
    """lambda."""


class InfoReasoner(Algorithm):
    """Reward a trajectory by its outcome and the gain of all that it read, one number per trajectory."""

    settings: InfoReasonerConfig
    settings_class = InfoReasonerConfig
    needs = frozenset({Need.IG_SERVICE})

    def prefetch(self, questions: Sequence[Question]) -> GainRequests:
        """Ask for the baselines at once, and for every gain as soon as its episode has ended."""
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
            [Gain() if not some else as_gain(results[some[0]]) for some in of_group] for of_group in requests
        ]
        return Measurement(gains=gains, stats=prefetch.stats)

    def credit(
        self, groups: Sequence[Group], scores: Sequence[Sequence[Score]], *, progress: float = 0.0
    ) -> list[list[Credit]]:
        """Credit outcome plus weighted gain: see `credit_rewards`."""
        return credit_rewards(
            groups,
            [[self._reward(score) for score in of_group] for of_group in scores],
            [[{"outcome": s.outcome, "gain": s.gain.trajectory} for s in of_group] for of_group in scores],
            settings=self.settings,
        )

    def _requests_of(self, trajectory: Trajectory) -> list[GainRequest]:
        """Return what is asked about a trajectory: nothing without a passage or without an answer.

        Without an answer the published reward is 0, also after good searches, so that no gain is needed.
        """
        if trajectory.stop is Stop.FAILED or trajectory.answer is None or not trajectory.passages:
            return []
        question = trajectory.question
        context = self.services.render_context(trajectory)
        return [GainRequest(question=question.text, context=context, golds=question.golds)]

    def _reward(self, score: Score) -> float | None:
        if score.failure is not None or score.outcome is None:
            return None
        return combine(score.outcome, score.gain.trajectory, weight=self.settings.gain_weight)
