"""The reward of a batch: outcome of every answer, one gain estimator, and what to do when measuring fails.

A trajectory or a gain that failed is named, masked and counted, never 0; above a share of failures training
halts, because what is left is no longer the batch that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

from verl.protocols import GainEstimator, OnEpisodeEnd
from verl.reward.outcome import Outcome
from verl.types import Gain, Group, Question, Score, Stop, Trajectory
from verl.utils.failures import check_failure_share

OutcomeRule = Callable[[Trajectory], Outcome]


class Reward:
    """Score trajectories: `score` for training, `score_validation` for evaluation."""

    def __init__(
        self,
        outcome: OutcomeRule,
        *,
        gain: GainEstimator | None,
        max_failure_share: float,
        fix: str = "is the IG service at reward.semantic.url up?",
    ) -> None:
        """`max_failure_share` in [0, 1]; `fix` ends the message of a halt: name the service's URL in it."""
        self._outcome = outcome
        self._gain = gain
        self._max_failure_share = max_failure_share
        self._fix = fix

    @property
    def figures(self) -> Mapping[str, float]:
        """What measuring the last gains cost, by metric name; empty without gains."""
        return {} if self._gain is None else self._gain.figures

    def asking_early(self, questions: Sequence[Question]) -> AbstractAsyncContextManager[OnEpisodeEnd]:
        """Inside, gains are asked for as soon as episodes end, so that `score` waits less."""
        return nullcontext(_ignore) if self._gain is None else self._gain.asking_early(questions)

    async def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        """One score per trajectory, in order. Raises TrainingHaltedError above the failure share."""
        gains = await self._measure(groups)
        scores = [
            [self._score(t, gain) for t, gain in zip(group.trajectories, of_group, strict=True)]
            for group, of_group in zip(groups, gains, strict=True)
        ]
        measured = [g for of_group in gains for g in of_group if g.value is not None or g.failure is not None]
        self._check("gain measurements", [gain.failure for gain in measured], fix=self._fix)
        everything = [score.failure for of_group in scores for score in of_group]
        self._check("trajectories", everything, fix="mend what the failures name.")
        return scores

    async def score_validation(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Outcomes only: validation never asks for a gain, and its failures are counted by the caller."""
        return [self._score(trajectory, Gain()) for trajectory in trajectories]

    def _check(self, what: str, failures: Sequence[str | None], *, fix: str) -> None:
        check_failure_share(
            [failure for failure in failures if failure is not None],
            total=len(failures),
            max_share=self._max_failure_share,
            what=what,
            fix=fix,
        )

    async def _measure(self, groups: Sequence[Group]) -> list[list[Gain]]:
        if self._gain is None:
            return [[Gain()] * len(group.trajectories) for group in groups]
        return await self._gain.measure(groups)

    def _score(self, trajectory: Trajectory, gain: Gain) -> Score:
        if trajectory.stop is Stop.FAILED:
            return Score(outcome=None, failure=trajectory.failure or "failed: no reason given")
        outcome = self._outcome(trajectory)
        return Score(outcome=outcome.value, gain=gain.value, failure=gain.failure, metrics=outcome.metrics)


def _ignore(_: Trajectory) -> None:
    """There is no gain to ask for."""
