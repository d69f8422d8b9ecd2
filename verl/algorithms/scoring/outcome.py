"""Score the final answer of a trajectory, from its structured answer and the gold answers alone."""

from __future__ import annotations

from dataclasses import dataclass

from serving.answers import AnswerRule, normalize_answer
from verl.types import Trajectory
from verl.utils.reward_score.qa_em import exact_match, sub_exact_match, word_f1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The reward of the final answer, and every measure of it for the logs."""

    value: float
    metrics: dict[str, float]
    """em, sub_em and f1, whichever of them is the reward."""


def measure_outcome(
    trajectory: Trajectory,
    *,
    metric: str = "em",
    format_score: float = 0.0,
    rule: AnswerRule = AnswerRule.folded,
) -> Outcome:
    """Score the answer by `metric` (em, sub_em or f1), normalized by `rule`.

    No answer is worth 0. A wrong answer that says something, in well-formed tags, is worth at least
    `format_score`.
    """
    answer = trajectory.answer
    golds = trajectory.question.golds
    if answer is None:
        return Outcome(value=0.0, metrics={"em": 0.0, "sub_em": 0.0, "f1": 0.0})
    metrics = {
        "em": exact_match(answer, golds, rule=rule),
        "sub_em": sub_exact_match(answer, golds, rule=rule),
        "f1": word_f1(answer, golds, rule=rule),
    }
    says_something = bool(normalize_answer(answer, rule=AnswerRule.published))
    return Outcome(value=max(metrics[metric], format_score if says_something else 0.0), metrics=metrics)
