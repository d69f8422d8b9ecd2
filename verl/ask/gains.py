"""Measure how much each search informed the policy when the gold answer is not known.

A gain of the training is the rise of the belief in the gold answer. Without one, it is measured for the
answer that the policy gave in the end, after the episode: it says which search led to this answer, not that
the answer is right. A gold answer that the user names (`--gold`) is measured as in training.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from verl.agent.tools.search import render_context
from verl.algorithms.base import Algorithm, IGService, Services, TextCodec
from verl.algorithms.igpo import IGPO, IGPOConfig
from verl.algorithms.inforeasoner import InfoReasoner, InfoReasonerConfig
from verl.branches import Tree, TreeLogProbs
from verl.errors import RolloutError
from verl.types import FloatArray, Gain, Group, IntArray, Trajectory

_WRAPPER = "<answer> {answer} </answer>"
"""Where the run of a model is not known: as models write an answer."""

Score = Callable[[IntArray], Awaitable[FloatArray]]
"""Return the log-prob of every token [L]; position 0 holds 0. Raises RolloutError."""


class EngineScorer:
    """The log-probs of an engine as a `verl.algorithms.base.LogProbScorer`: a request per continuation."""

    scores_trajectories = False

    def __init__(self, score: Score) -> None:
        self._score = score

    async def score(self, trees: Sequence[Tree]) -> list[TreeLogProbs]:
        """Return the log-probs of each tree, in order. Raises RolloutError."""
        return [
            TreeLogProbs(branches=tuple([await self._branch(t, k) for k in range(len(t.branches))]))
            for t in trees
        ]

    async def _branch(self, tree: Tree, index: int) -> FloatArray:
        branch = tree.branches[index]
        first, end = branch.scored
        path = tree.path(index)
        start = len(path) - len(branch.ids)
        return (await self._score(path))[start + first : start + end]


@dataclass(frozen=True, slots=True, kw_only=True)
class GainMeter:
    """Measures the gain of each turn of one trajectory."""

    algorithm: Algorithm
    unit: str
    """What the numbers are, for people."""

    @classmethod
    def by_log_prob(cls, score: Score, *, codec: TextCodec, wrapper: str) -> GainMeter:
        """Measure as `algorithm=igpo`: the rise of the answer's mean log-prob per token.

        `wrapper` is `reward.answer_wrapper` of the run, `auto` where that is not known.
        """
        services = Services(
            render_context=render_context,
            codec=codec,
            answer_wrapper=_WRAPPER if wrapper == "auto" else wrapper,
            policy=EngineScorer(score),
        )
        return cls(algorithm=IGPO(IGPOConfig(), services), unit="log-prob per token of the answer")

    @classmethod
    def by_service(cls, service: IGService) -> GainMeter:
        """Measure as `algorithm=inforeasoner` with `granularity=turn`, by the IG service."""
        services = Services(render_context=render_context, ig_service=service)
        settings = InfoReasonerConfig(granularity="turn")
        return cls(algorithm=InfoReasoner(settings, services), unit="probability of the answer's meaning")

    async def measure(self, trajectory: Trajectory, *, golds: Sequence[str]) -> Gain:
        """Return the gains of the turns for these answers, or why they could not be measured."""
        if not trajectory.is_one_sequence:
            return Gain(failure="gain_failed: the full context dropped results, so that it has no one state")
        question = replace(trajectory.question, golds=tuple(golds))
        group = Group(question=question, trajectories=(replace(trajectory, question=question),))
        try:
            async with aclosing(self.algorithm.prefetch([question])) as prefetch:
                measurement = await self.algorithm.measure([group], prefetch=prefetch)
        except RolloutError as error:
            return Gain(failure=f"gain_failed: {error}")
        return measurement.gains[0][0]
