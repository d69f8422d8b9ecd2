"""The scores of a step: the outcome of every answer and the method's gains, and a halt when too many failed.

A trajectory or a gain that failed is named, masked and counted, never 0; above a share of failures training
halts, because what is left is no longer the configured batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from verl.algorithms.base import Algorithm, Prefetch
from verl.algorithms.scoring.outcome import Outcome
from verl.types import Gain, Group, Sample, Score, ScoredGroups, Stop, Trajectory
from verl.utils.failures import check_failure_share

OutcomeRule = Callable[[Trajectory], Outcome]
NO_GAIN = Gain()


class Reward:
    """Scores trajectories: `score` for training, `score_validation` for evaluation."""

    def __init__(
        self, outcome: OutcomeRule, *, algorithm: Algorithm, max_failure_share: float, fix: str
    ) -> None:
        """Halt above `max_failure_share`, in [0, 1]; `fix` ends the message: name the service's URL in it."""
        self._outcome = outcome
        self._algorithm = algorithm
        self._max_failure_share = max_failure_share
        self._fix = fix

    async def score(
        self,
        groups: Sequence[Group],
        *,
        prefetch: Prefetch,
        progress: float = 0.0,
        stats: Mapping[str, float] | None = None,
    ) -> ScoredGroups:
        """Measure and credit every trajectory. Raises TrainingHaltedError above the failure share.

        `progress` is the share of the run that is done; `stats` are what is known of the step so far, by
        metric name.
        """
        measurement = await self._algorithm.measure(groups, prefetch=prefetch)
        scores = [
            [
                score_answer(t, outcome=self._outcome, gain=gain)
                for t, gain in zip(group.trajectories, gains, strict=True)
            ]
            for group, gains in zip(groups, measurement.gains, strict=True)
        ]
        measured = [g for gains in measurement.gains for g in gains if g.values or g.failure is not None]
        self._check("gain measurements", [gain.failure for gain in measured], fix=self._fix)
        failures = [score.failure for of_group in scores for score in of_group]
        self._check("trajectories", failures, fix="repair what the failures name.")
        scored = ScoredGroups(
            groups=groups,
            scores=scores,
            credits=self._algorithm.credit(groups, scores, progress=progress),
            stats={**(stats or {}), **measurement.stats},
            old_log_probs=measurement.old_log_probs,
        )
        for sample in scored.samples():
            check_sample(sample)
        return scored

    def score_validation(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Return outcomes only: evaluation measures no gain, and the caller counts its failures."""
        return [score_answer(trajectory, outcome=self._outcome) for trajectory in trajectories]

    def _check(self, what: str, failures: Sequence[str | None], *, fix: str) -> None:
        check_failure_share(
            [failure for failure in failures if failure is not None],
            total=len(failures),
            max_share=self._max_failure_share,
            what=what,
            fix=fix,
        )


def score_answer(trajectory: Trajectory, *, outcome: OutcomeRule, gain: Gain = NO_GAIN) -> Score:
    """Return the score of a trajectory; one that failed, or whose outcome did, has neither it nor metrics."""
    if trajectory.stop is Stop.FAILED:
        return Score(outcome=None, failure=trajectory.failure or "failed: no reason given")
    measured = outcome(trajectory)
    if measured.value is None:
        return Score(outcome=None, failure=measured.failure)
    return Score(outcome=measured.value, gain=gain, failure=gain.failure, metrics=measured.metrics)


def check_sample(sample: Sample) -> None:
    """Raise ValueError where a method breaks what batch, metrics and records rely on."""
    trajectory, score, credit = sample
    name = f"{trajectory.question.uid}#{trajectory.sample}"
    gain = score.gain
    parts = {"gain": gain.trajectory, "gain of turns": gain.turns or None, **credit.components}
    for label, part in parts.items():
        values = part if isinstance(part, tuple) else (part,)
        if isinstance(part, tuple) and len(part) != len(trajectory.turns):
            raise ValueError(f"{name}: {label} has {len(part)} values for {len(trajectory.turns)} turns")
        # Numbers of Python: records are JSON, which has none of NumPy's.
        if not all(v is None or (isinstance(v, int | float) and math.isfinite(v)) for v in values):
            raise ValueError(f"{name}: {label} must be finite or None, got {part!r}")
    reward = credit.components.get("reward")
    if isinstance(reward, tuple):
        raise ValueError(f"{name}: the component reward is one number per trajectory, got {reward!r}")
    if score.failure is not None and (reward is not None or credit.advantages.any()):
        raise ValueError(f"{name} failed ({score.failure}): it must have no reward and no advantage")
