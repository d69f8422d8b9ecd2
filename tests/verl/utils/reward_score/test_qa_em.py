from __future__ import annotations

import pytest

from verl.utils.reward_score.qa_em import exact_match, normalise_answer, sub_exact_match, word_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The U.S. Army", "us army"),
        (" An  Apple-pie ", "applepie"),
        ("A.", ""),
        ("the", ""),
        ("Theatre and anthem", "theatre and anthem"),
        ("\u201cquoted\u201d it\u2019s", "\u201cquoted\u201d it\u2019s"),
        ("Zürich\n東京", "zürich 東京"),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("The Bolton.", ["Bolton, England", "bolton"], 1.0),
        ("Bolton England", ["Bolton, England"], 1.0),
        ("in Bolton", ["Bolton"], 0.0),
        ("the", ["a"], 0.0),
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
        ("the", ["the"], 0.0),
        ("Paris", ["Bolton"], 0.0),
    ],
)
def test_f1_is_over_bags_of_normalised_words(prediction: str, golds: list[str], expected: float) -> None:
    assert word_f1(prediction, golds) == pytest.approx(expected)
