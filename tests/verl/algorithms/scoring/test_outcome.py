from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from serving.answers import AnswerRule
from tests.fakes import CharTokenizer, make_question, make_trajectory, make_turn
from verl.algorithms.scoring.outcome import measure_outcome
from verl.types import ActionKind, Span, SpanKind, Turn

QUESTION = make_question(golds=("Bolton", "Bolton, England"))


@pytest.mark.parametrize(
    ("answer", "metric", "format_score", "expected"),
    [
        ("bolton england", "em", 0.0, 1.0),
        ("Paris", "em", 0.0, 0.0),
        ("Paris", "em", 0.1, 0.1),
        ("in Bolton", "sub_em", 0.1, 1.0),
        ("in Bolton", "f1", 0.1, 2 / 3),
        ("", "em", 0.1, 0.0),
        ("the", "f1", 0.1, 0.0),
        (None, "em", 0.1, 0.0),
    ],
)
def test_value(answer: str | None, metric: str, format_score: float, expected: float) -> None:
    outcome = measure_outcome(
        make_trajectory(QUESTION, answer=answer), metric=metric, format_score=format_score
    )
    assert outcome.value == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["em", "sub_em", "f1"])
def test_all_measures_are_reported_whichever_is_the_reward(metric: str) -> None:
    outcome = measure_outcome(make_trajectory(QUESTION, answer="in Bolton"), metric=metric)
    two_thirds = pytest.approx(2 / 3)
    assert outcome.metrics == {"em": 0.0, "sub_em": 1.0, "f1": two_thirds, "set_f1": two_thirds}


@pytest.mark.parametrize(
    ("metric", "answer", "summary", "expected"),
    [
        # Both words of the longer gold answer among three: 2 * 2 / (3 + 2).
        ("autorefine_f1", "in Bolton, England", None, 0.8),
        ("autorefine_f1", "Paris", "It was Bolton.", 0.1),
        ("autorefine_f1", None, "It was Bolton.", 0.1),
        ("autorefine_f1", "Paris", "It was Boltonia.", 0.0),
        ("igpo_f1", "in Bolton, England", None, 0.8),
        ("igpo_f1", "Paris", None, 0.0),
        ("igpo_f1", None, None, -2.0),
    ],
)
def test_outcomes_of_methods(metric: str, answer: str | None, summary: str | None, expected: float) -> None:
    trajectory = make_trajectory(QUESTION, queries=("q",), answer=answer)
    if summary is not None:
        span = Span(kind=SpanKind.REFINE, start=0, end=1, text=summary)
        first, *others = trajectory.turns
        action = replace(first.action, spans=(span, *first.action.spans))
        trajectory = replace(trajectory, turns=(replace(first, action=action), *others))
    outcome = measure_outcome(trajectory, metric=metric, decode=CharTokenizer().decode)
    assert outcome.value == pytest.approx(expected)


@pytest.mark.parametrize(("rule", "value"), [(AnswerRule.folded, 1.0), (AnswerRule.published, 0.0)])
@pytest.mark.parametrize(("gold", "answer"), [("A", "A."), ("caf\u00e9", "\u201cCafe\u0301\u201d")])
def test_the_rule_decides_what_is_equal(rule: AnswerRule, value: float, gold: str, answer: str) -> None:
    trajectory = make_trajectory(make_question(golds=(gold,)), answer=answer)
    assert measure_outcome(trajectory, rule=rule, metric="autorefine_f1").value == value
    metrics = measure_outcome(trajectory, rule=rule).metrics
    del metrics["set_f1"]  # counts articles by both rules
    assert metrics == dict.fromkeys(("em", "sub_em", "f1"), value)


CALL = "<think> hm </think><tool_call> {} </tool_call>"


@pytest.mark.parametrize(
    ("searched", "answered", "kind", "expected"),
    [
        (CALL, "<think> so </think><answer> Bolton </answer>", ActionKind.TOOL, 1.0),
        (CALL, "<think> it is <answer> Bolton </answer>", ActionKind.TOOL, -2.0),
        (CALL, "</think><think> so <answer> Bolton </answer>", ActionKind.TOOL, -2.0),
        ("<code> 1 <tool_call> {} </tool_call>", "<answer> Bolton </answer>", ActionKind.TOOL, -2.0),
        # The whole text is balanced, not each turn; other tags than IGPO's are not counted.
        (
            "<think> a <tool_call> {} </tool_call>",
            "</think><search><answer> Bolton </answer>",
            ActionKind.TOOL,
            1.0,
        ),
        (CALL, "<answer> Bolton </answer>", ActionKind.INVALID, -2.0),
    ],
)
def test_igpo_pays_a_penalty_for_unbalanced_tags_and_invalid_turns(
    searched: str, answered: str, kind: ActionKind, expected: float
) -> None:
    tokenizer = CharTokenizer()

    def sampled(turn: Turn, text: str) -> Turn:
        ids = np.array(tokenizer.encode(text), np.int32)
        return replace(turn, output_ids=ids, output_log_probs=np.zeros(len(ids), np.float32))

    plain = make_trajectory(QUESTION, answer="Bolton")
    first, last = make_turn(kind, "q", titles=("q",)), plain.turns[-1]
    trajectory = replace(plain, turns=(sampled(first, searched), sampled(last, answered)))
    outcome = measure_outcome(trajectory, metric="igpo_f1", decode=tokenizer.decode)
    assert (outcome.value, outcome.metrics["em"]) == (expected, 1.0)


def test_a_thought_that_the_chat_template_opened_is_balanced() -> None:
    tokenizer = CharTokenizer()
    ids = np.array(tokenizer.encode("hm </think><answer> Bolton </answer>"), np.int32)
    plain = make_trajectory(QUESTION, answer="Bolton")
    turn = replace(plain.turns[0], output_ids=ids, output_log_probs=np.zeros(len(ids), np.float32))
    values = [
        measure_outcome(
            replace(plain, prompt_ids=np.array(tokenizer.encode(prompt), np.int32), turns=(turn,)),
            metric="igpo_f1",
            decode=tokenizer.decode,
        ).value
        for prompt in ("assistant\n<think>\n", "assistant\n")
    ]
    assert values == [1.0, -2.0]
