from __future__ import annotations

import pytest

from serving.answers import AnswerRule
from verl.utils.reward_score.qa_em import exact_match, sub_exact_match, word_f1


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("The Bolton.", ["Bolton, England", "bolton"], 1.0),
        ("Bolton England", ["Bolton, England"], 1.0),
        ("in Bolton", ["Bolton"], 0.0),
        ("the", ["a"], 0.0),
        ("A.", ["A"], 1.0),
        ("the the", ["The The"], 1.0),
        ("!!!", ["!!!"], 1.0),
        ("?", ["!!!"], 0.0),
        ("\u201cit\u2019s\u201d", ["It's"], 1.0),
        ("\uff11\uff19\uff19\uff10\u5e74", ["1990\u5e74"], 1.0),
        ("", [""], 0.0),
        ("", ["Bolton"], 0.0),
        ("Bolton", [], 0.0),
    ],
)
def test_exact_match(prediction: str, golds: list[str], expected: float) -> None:
    assert exact_match(prediction, golds) == expected


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("It is in Bolton, in England", ["Paris", "Bolton"], 1.0),
        ("Bolton", ["Bolton, England"], 0.0),
        ("anything", ["the"], 0.0),
        ("The.", ["the"], 1.0),
        ("the the", ["he"], 0.0),
        ("Caf\u00e9 \u201cde\u201d Flore", ["cafe\u0301 de"], 1.0),
        ("", ["", "Bolton"], 0.0),
    ],
)
def test_cover_match_ignores_golds_that_normalise_to_nothing(
    prediction: str, golds: list[str], expected: float
) -> None:
    assert sub_exact_match(prediction, golds) == expected


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("The city of Bolton, England", ["Bolton, England"], 2 * 2 / (4 + 2)),
        ("New York New York", ["New York City"], 4 / 7),  # bags; sets would give 0.8
        ("Bolton", ["Paris", "bolton town", "Bolton"], 1.0),
        ("the", ["the"], 1.0),
        ("the", ["a"], 0.0),
        ("Paris", ["Bolton"], 0.0),
        ("\u6771\u4eac\u90fd", ["\u6771\u4eac"], 2 * 2 / (3 + 2)),
        ("in \u6771\u4eac", ["\u6771\u4eac\u3002"], 2 * 2 / (3 + 2)),
    ],
)
def test_f1_is_over_bags_of_normalised_words(prediction: str, golds: list[str], expected: float) -> None:
    assert word_f1(prediction, golds) == pytest.approx(expected)


def test_the_published_rule_folds_nothing() -> None:
    published = AnswerRule.published
    assert exact_match("The Bolton.", ["bolton"], rule=published) == 1.0
    assert exact_match("it\u2019s", ["it's"], rule=published) == 0.0
    assert exact_match("A", ["A"], rule=published) == 0.0
    assert sub_exact_match("it\u2019s so", ["it's"], rule=published) == 0.0
    assert word_f1("\u6771\u4eac\u90fd", ["\u6771\u4eac"], rule=published) == 0.0
