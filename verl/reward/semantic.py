"""Information gain of InfoReasoner: how far search results move a frozen model towards the right answer.

The IG service samples short answers with and without the results and compares the mass of the right meaning.
This module decides which trajectories are worth asking about and turns the service's replies into facts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from verl.errors import ServiceError
from verl.types import Gain, Group, Stop, Trajectory
from verl.utils.reward_score.IG_client import GainRequest, GainResult

NOTHING_TO_MEASURE = Gain()


class GainClient(Protocol):
    """The part of the IG service's client that is needed here."""

    async def compute(self, requests: Sequence[GainRequest]) -> list[GainResult]:
        """One result per request, in order."""
        ...


class SemanticGain:
    """A `GainEstimator` backed by the IG service: one scalar per trajectory over all its search results."""

    def __init__(self, client: GainClient, *, render_context: Callable[[Trajectory], str]) -> None:
        """`render_context` gives the passages of a trajectory as the text the policy read."""
        self._client = client
        self._render_context = render_context

    async def measure(self, groups: Sequence[Group]) -> list[list[Gain]]:
        """Ask the service once about all trajectories of all groups that searched and answered."""
        asked = [t for group in groups for t in group.trajectories if has_gain(t)]
        gains = iter(await self._ask(asked))
        return [
            [next(gains) if has_gain(trajectory) else NOTHING_TO_MEASURE for trajectory in group.trajectories]
            for group in groups
        ]

    async def _ask(self, trajectories: Sequence[Trajectory]) -> list[Gain]:
        if not trajectories:
            return []
        requests = [
            GainRequest(question=t.question.text, context=self._render_context(t), golds=t.question.golds)
            for t in trajectories
        ]
        try:
            results = await self._client.compute(requests)
        except ServiceError as error:
            return [_failed(str(error))] * len(requests)
        if len(results) != len(requests):
            return [_failed(f"{len(results)} results for {len(requests)} requests")] * len(requests)
        return [_as_gain(result) for result in results]


def has_gain(trajectory: Trajectory) -> bool:
    """Whether there is a gain to measure: it did not fail, read at least one passage, and gave an answer.

    Without an answer the published reward is 0 whatever was found, so no gain is paid for it.
    """
    return trajectory.stop is not Stop.FAILED and trajectory.answer is not None and bool(trajectory.passages)


def _as_gain(result: GainResult) -> Gain:
    if result.error is not None:
        return _failed(result.error)
    if result.gain is None or not math.isfinite(result.gain):
        return _failed(f"the service returned {result.gain}")
    return Gain(value=result.gain)


def _failed(message: str) -> Gain:
    return Gain(failure=f"gain_failed: {message}")
