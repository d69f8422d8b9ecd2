"""Evaluate the policy on held-out questions: each exactly once, greedy, without gains, failures by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from verl.evaluation.records import ResultRecord, to_result
from verl.rollout.collector import Progress
from verl.trainer.ppo.metrics import finite, mean
from verl.types import Question, Score, Trajectory
from verl.utils.failures import failure_name


class Evaluate(Protocol):
    """The part of the collector that is needed here."""

    async def evaluate(
        self, questions: Sequence[Question], *, progress: Progress | None = None
    ) -> list[Trajectory]:
        """Return one greedy trajectory per question; call `progress` after each."""
        ...


class ScoreValidation(Protocol):
    """The part of the reward that is needed here."""

    def score_validation(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Return outcomes only."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationResult:
    """One trajectory and one score per question, in the order of the questions."""

    trajectories: tuple[Trajectory, ...]
    scores: tuple[Score, ...]
    metrics: dict[str, float]
    """`val/what` over all questions and `val/what/source` per data source."""


async def evaluate(
    collector: Evaluate,
    reward: ScoreValidation,
    questions: Sequence[Question],
    *,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Play and score every question. Raises ValueError if one is missing, doubled or was not asked."""
    trajectories = _in_order(questions, await collector.evaluate(questions, progress=progress))
    scores = reward.score_validation(trajectories)
    return EvaluationResult(
        trajectories=tuple(trajectories),
        scores=tuple(scores),
        metrics=evaluation_metrics(
            [to_result(t, score=score) for t, score in zip(trajectories, scores, strict=True)]
        ),
    )


def evaluation_metrics(results: Sequence[ResultRecord]) -> dict[str, float]:
    """Return means over the answers that did not fail, and counts of those that did, by name.

    `val/what` is over all of them, `val/what/source` over a data source.
    """
    metrics = _means(results, suffix="")
    failures = Counter(failure_name(r["failure"]) for r in results if r["failure"] is not None)
    metrics |= {f"val/failures_{name}": float(count) for name, count in sorted(failures.items())}
    for source in sorted({r["data_source"] for r in results}):
        metrics |= _means([r for r in results if r["data_source"] == source], suffix=f"/{source}")
    return metrics


def _in_order(questions: Sequence[Question], trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    asked = [question.uid for question in questions]
    played = {t.question.uid: t for t in trajectories}
    if Counter(asked) != Counter(t.question.uid for t in trajectories) or len(played) != len(asked):
        raise ValueError(
            f"evaluation must play every question exactly once: {len(asked)} questions ({len(set(asked))} "
            f"distinct) gave {len(trajectories)} trajectories of {len(played)} distinct questions"
        )
    return [played[uid] for uid in asked]


def _means(results: Sequence[ResultRecord], *, suffix: str) -> dict[str, float]:
    judged = [r for r in results if r["failure"] is None]
    names = sorted({name for r in judged for name in r["metrics"]})
    searches = [sum(r["num_calls"].values()) for r in judged]
    return finite(
        {
            **{f"val/{name}{suffix}": mean([r["metrics"][name] for r in judged]) for name in names},
            f"val/searches_mean{suffix}": mean(searches),
            f"val/no_search_share{suffix}": mean([count == 0 for count in searches]),
            f"val/answer_share{suffix}": mean([bool(r["prediction"]) for r in judged]),
            f"val/output_tokens_mean{suffix}": mean([r["output_tokens"] for r in judged]),
            f"val/context_tokens_mean{suffix}": mean([r["context_tokens"] for r in judged]),
            f"val/questions{suffix}": len({r["uid"] for r in results}),
            f"val/failed{suffix}": len(results) - len(judged),
        }
    )
