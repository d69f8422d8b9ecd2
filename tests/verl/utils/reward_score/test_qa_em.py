from __future__ import annotations

import pytest

from serving.answers import AnswerRule
from tests.agents import make_format
from tests.fakes import CharTokenizer
from verl.utils.reward_score.qa_em import (
    compute_score_em,
    compute_score_subem,
    em_check,
    exact_match,
    extract_solution,
    normalize_answer,
    set_f1,
    sub_exact_match,
    subem_check,
    word_f1,
)


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("The Bolton.", ["Bolton, England", "bolton"], 1.0),
        ("in Bolton", ["Bolton"], 0.0),
        ("the", ["a"], 0.0),
        ("A.", ["A"], 1.0),
        ("?", ["!!!"], 0.0),
        ("\u201cit\u2019s\u201d", ["It's"], 1.0),
        ("", [""], 0.0),
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
        ("Caf\u00e9 \u201cde\u201d Flore", ["cafe\u0301 de"], 1.0),
        ("", ["", "Bolton"], 0.0),
    ],
)
def test_cover_match_ignores_golds_that_normalize_to_nothing(
    prediction: str, golds: list[str], expected: float
) -> None:
    assert sub_exact_match(prediction, golds) == expected


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("The city of Bolton, England", ["Bolton, England"], 2 * 2 / (4 + 2)),
        ("New York New York", ["New York City"], 4 / 7),  # bags; sets would give 0.8
        ("Bolton", ["Paris", "bolton town", "Bolton"], 1.0),
        ("the", ["a"], 0.0),
        ("Paris", ["Bolton"], 0.0),
        ("\u6771\u4eac\u90fd", ["\u6771\u4eac"], 2 * 2 / (3 + 2)),
    ],
)
def test_f1_is_over_bags_of_normalized_words(prediction: str, golds: list[str], expected: float) -> None:
    assert word_f1(prediction, golds) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("New York New York", ["New York City"], 2 * 2 / (2 + 3)),  # sets; bags would give 4/7
        ("The U.S. Army", ["us army", "army"], 2 * 1 / (4 + 1)),  # the, u, s, army
        ("Paris", ["Bolton"], 0.0),
        ("", ["Bolton"], 0.0),
        ("\u6771\u4eac\u90fd", ["\u6771\u4eac"], 2 * 2 / (3 + 2)),
    ],
)
def test_set_f1_is_over_distinct_words_with_articles(
    prediction: str, golds: list[str], expected: float
) -> None:
    assert set_f1(prediction, golds) == pytest.approx(expected)


def test_the_published_rule_folds_nothing() -> None:
    published = AnswerRule.published
    assert exact_match("The Bolton.", ["bolton"], rule=published) == 1.0
    assert exact_match("it\u2019s", ["it's"], rule=published) == 0.0
    assert exact_match("A", ["A"], rule=published) == 0.0
    assert sub_exact_match("it\u2019s so", ["it's"], rule=published) == 0.0
    assert word_f1("\u6771\u4eac\u90fd", ["\u6771\u4eac"], rule=published) == 0.0
    assert set_f1("Cafe\u0301", ["caf\u00e9"], rule=published) == 0.0


PUBLISHED_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first. [...] it will "
    "return the top searched results between <information> and </information>. [...] you can directly give "
    "the answer inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing "
    "</answer>. Question: Where was Alice born?\n"
)
OUR_PROMPT = make_format(CharTokenizer()).write_prompt("Where was Alice born?")[0].content
SEARCHED = "<think>x</think><search>Alice</search>\n\n<information>Doc 1(Title: A) B</information>\n\n"


@pytest.mark.parametrize("prompt", ["", PUBLISHED_PROMPT, OUR_PROMPT])
@pytest.mark.parametrize(
    ("response", "answer", "em", "subem", "with_gain"),
    [
        ("<answer> The Bolton. </answer>", "The Bolton.", 1.0, 1.0, 1.0),
        (f"{SEARCHED}<answer>Bolton</answer>", "Bolton", 1.0, 1.0, 1.3),
        (f"{SEARCHED}<answer>in Bolton</answer>", "in Bolton", 0.1, 1.0, 0.4),
        ("<answer>Bolton</answer> or <answer>Hull</answer>", "Hull", 0.1, 0.1, 0.1),
        ("<answer>two\nlines</answer>", "two\nlines", 0.1, 0.1, 0.1),
        (f"{SEARCHED}<answer>Bolton", None, 0.0, 0.0, 0.0),  # not "Beijing"
        ("<information> </information><answer>Bolton</answer>", "Bolton", 1.0, 1.0, 1.0),
    ],
)
def test_published_functions_score_a_transcript_with_and_without_its_prompt(
    prompt: str, response: str, answer: str | None, em: float, subem: float, with_gain: float
) -> None:
    transcript, truth = prompt + response, {"target": ["Bolton", "Bolton, England"]}
    assert extract_solution(transcript) == answer
    assert compute_score_em(transcript, truth, method="strict", format_score=0.1) == em
    assert compute_score_subem(transcript, truth, "strict", 0.1) == subem
    gained = compute_score_em(transcript, truth, format_score=0.1, info_gain_score=0.5)
    assert gained == pytest.approx(with_gain)
    assert compute_score_em(transcript, {"target": "bolton"}, score=2.0) == (2.0 if em == 1.0 else 0.0)


def test_published_checks_follow_the_published_rule() -> None:
    assert normalize_answer(" An  Apple-pie, it\u2019s ") == "applepie it\u2019s"
    assert (em_check("The U.S. Army", "us army"), em_check("it\u2019s", ["it's"])) == (1, 0)
    assert (subem_check("in the party", ["art", "x"]), subem_check("in Bolton", "Hull")) == (1, 0)
    # Where published code compares empty texts, nothing is right.
    assert (em_check("the", ["a"]), subem_check("anything", ["the"])) == (0, 0)
