from __future__ import annotations

import pytest

from serving.answers import AnswerRule
from tests.fakes import make_question, make_trajectory
from verl.algorithms.scoring.outcome import measure_outcome

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


@pytest.mark.parametrize(("rule", "value"), [(AnswerRule.folded, 1.0), (AnswerRule.published, 0.0)])
@pytest.mark.parametrize(("gold", "answer"), [("A", "A."), ("caf\u00e9", "\u201cCafe\u0301\u201d")])
def test_the_rule_decides_what_is_equal(rule: AnswerRule, value: float, gold: str, answer: str) -> None:
    trajectory = make_trajectory(make_question(golds=(gold,)), answer=answer)
    metrics = measure_outcome(trajectory, rule=rule).metrics
    del metrics["set_f1"]  # counts articles by both rules
    assert metrics == dict.fromkeys(("em", "sub_em", "f1"), value)
