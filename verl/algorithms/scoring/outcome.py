"""Score the final answer of a trajectory, from its structured answer and the gold answers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from serving.answers import AnswerRule, normalize_answer
from verl.agent.spans import THINK_TAG, opens_thought
from verl.types import ActionKind, SpanKind, Trajectory
from verl.utils.reward_score.math_grader import Grade
from verl.utils.reward_score.qa_em import exact_match, overlap_f1, set_f1, sub_exact_match, word_f1

_IGPO_TAGS = ("think", "tool_call", "code", "answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The reward of the final answer, and every measure of it for the logs."""

    value: float | None
    """None where it could not be measured."""
    metrics: dict[str, float]
    """em, sub_em, f1 and set_f1, whatever the reward is; math and math_unfinished if that is math."""
    failure: str | None = None
    """Why it could not be measured."""


def measure_outcome(
    trajectory: Trajectory,
    *,
    metric: str = "em",
    format_score: float = 0.0,
    rule: AnswerRule = AnswerRule.folded,
    decode: Callable[[Sequence[int]], str] | None = None,
    grade: Callable[[str, Sequence[str]], Grade] | None = None,
) -> Outcome:
    """Score the answer by `metric`, normalized by `rule`.

    All measures are 0 without an answer; a wrong answer that is not empty, in well-formed tags, is worth at
    least `format_score`. `igpo_f1` and `autorefine_f1` are the outcomes of these methods, which have a rule
    of their own for answers that are wrong or missing. For `igpo_f1`, which needs `decode` (the text of
    sampled tokens), an answer counts as missing when the sampled text has unbalanced tags or when a turn was
    INVALID: in the authors' code, and in the format `igpo`, such a turn ends the episode without an answer.
    `math` needs `grade`; where that fails for a reason other than the answer, there is a failure, no outcome.
    """
    answer, golds = trajectory.answer, trajectory.question.golds
    metrics = {"em": 0.0, "sub_em": 0.0, "f1": 0.0, "set_f1": 0.0}
    if answer is not None:
        metrics = {
            "em": exact_match(answer, golds, rule=rule),
            "sub_em": sub_exact_match(answer, golds, rule=rule),
            "f1": word_f1(answer, golds, rule=rule),
            "set_f1": set_f1(answer, golds, rule=rule),
        }
    if metric == "igpo_f1":
        assert decode is not None
        text = _text_of_turns(trajectory, decode)
        is_invalid = any(turn.action.kind is ActionKind.INVALID for turn in trajectory.turns)
        is_broken = is_invalid or not has_balanced_tags(text)
        return Outcome(value=igpo_f1(None if is_broken else answer, golds), metrics=metrics)
    if metric == "autorefine_f1":
        summaries = [s.text for t in trajectory.turns for s in t.action.spans if s.kind is SpanKind.REFINE]
        return Outcome(value=autorefine_f1(answer, golds, summaries=summaries, rule=rule), metrics=metrics)
    if metric == "math":
        assert grade is not None
        verdict = Grade(score=0.0) if answer is None else grade(answer, golds)
        if verdict.score is None:
            return Outcome(value=None, metrics={}, failure=verdict.failure)
        metrics["math"] = verdict.score
        metrics["math_unfinished"] = float(verdict.is_unfinished)
    value = metrics[metric]
    if answer is not None and normalize_answer(answer, rule=AnswerRule.published):
        value = max(value, format_score)
    return Outcome(value=value, metrics=metrics)


def igpo_f1(answer: str | None, golds: Iterable[str]) -> float:
    """Return `set_f1`, or -2 without an answer (IGPO; the value is that of its code)."""
    return -2.0 if answer is None else set_f1(answer, golds, rule=AnswerRule.published)


def _text_of_turns(trajectory: Trajectory, decode: Callable[[Sequence[int]], str]) -> str:
    """Return the sampled text, with the tag `<think>` where the chat template opened it before a turn."""
    text, before = "", trajectory.prompt_ids
    for turn in trajectory.turns:
        text += THINK_TAG if opens_thought(before, decode=decode) else ""
        text += decode(turn.output_ids.tolist())
        before = turn.observation_ids
    return text


def has_balanced_tags(text: str) -> bool:
    """Return whether each of IGPO's tags is closed as often as opened, and no opened one stays open."""
    for name in _IGPO_TAGS:
        opened, closed = f"<{name}>", f"</{name}>"
        if text.count(opened) != text.count(closed) or text.rfind(opened) > text.rfind(closed):
            return False
    return True


def autorefine_f1(
    answer: str | None,
    golds: Sequence[str],
    *,
    summaries: Sequence[str],
    rule: AnswerRule = AnswerRule.folded,
) -> float:
    """Return the best F1 between sets of normalized words; 0.1 if it is 0 but a summary has a gold answer.

    Source: AutoRefine, arXiv 2505.11277, section 3.3.
    """
    normalize = partial(normalize_answer, rule=rule)
    words = _count_distinct(normalize(answer or ""))
    value = max((overlap_f1(words, _count_distinct(normalize(gold))) for gold in golds), default=0.0)
    if value > 0.0:
        return value
    refined = f" {normalize(' '.join(summaries))} "
    found = any(f" {gold} " in refined for gold in map(normalize, golds) if gold)
    return 0.1 if found else 0.0


def _count_distinct(text: str) -> Counter[str]:
    return Counter(set(text.split()))
