from __future__ import annotations

import itertools

import pytest

from tests.scripted_evaluation import make_result
from verl.evaluation.metrics import pass_at_k, pass_sizes, score_questions, vote
from verl.evaluation.summary import curve


@pytest.mark.parametrize(
    ("num_samples", "num_right", "k", "expected"),
    [(1, 1, 1, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (5, 2, 3, 1 - 1 / 10), (4, 3, 2, 1.0), (4, 0, 4, 0.0)],
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(
    num_samples: int, num_right: int, k: int, expected: float
) -> None:
    subsets = list(itertools.combinations(range(num_samples), k))
    counted = sum(min(subset) < num_right for subset in subsets) / len(subsets)
    assert pass_at_k(num_samples, num_right, k=k) == pytest.approx(expected) == pytest.approx(counted)


def test_pass_at_k_beyond_the_samples_is_not_defined() -> None:
    with pytest.raises(ValueError, match="pass@5 of 1 right among 4 samples"):
        pass_at_k(4, 1, k=5)
    assert [pass_sizes(n) for n in (1, 2, 5, 8)] == [[], [2], [2, 4, 5], [2, 4, 8]]


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        (["Paris", "The Bolton.", "bolton"], 1),  # one answer after normalization
        (["Paris", "Bolton"], 0),  # a tie: the first sampled
        ([None, "", " ", "Bolton"], 3),  # abstentions are not votes
        ([None, ""], None),
    ],
)
def test_the_vote_of_the_majority(predictions: list[str | None], expected: int | None) -> None:
    assert vote(predictions) == expected


def test_mathematical_answers_are_voted_for_as_they_are_and_right_by_their_grade() -> None:
    assert vote(["1.5", "15", " 15 "], is_math=True) == 1
    assert vote(["-1", "1", "-1"], is_math=True) == 0
    samples = [make_result(sample=k, em=0.0, prediction=text) for k, text in enumerate(["1", "-1", "-1"])]
    for record, grade in zip(samples, (0.0, 1.0, 1.0), strict=True):
        record["metrics"]["math"] = grade
    assert score_questions(samples)[0].values["majority"] == 1.0
    (point,) = curve(samples, "num_searches", [(1, 1)])
    assert point.estimate.value == pytest.approx(2 / 3)


def test_samples_of_a_question_are_averaged_without_those_that_failed() -> None:
    samples = [
        make_result("nq/test/7", sample=3, em=1.0, prediction="Bolton", num_searches=3),
        make_result("nq/test/7", sample=0, em=0.0, prediction="Paris"),
        make_result("nq/test/7", sample=1, failure="search_failed: HTTP 500"),
        make_result("nq/test/7", sample=2, em=1.0, prediction="bolton"),
    ]
    failed = make_result("nq/test/8", failure="search_failed: HTTP 500")
    (question,) = score_questions([*samples, failed])
    assert (question.uid, question.num_samples) == ("nq/test/7", 3)
    assert question.values["em"] == pytest.approx(2 / 3)
    assert question.values["pass@2"] == 1.0
    assert "pass@4" not in question.values  # one of four samples failed
    assert (question.values["majority"], question.values["searches"]) == (1.0, pytest.approx(5 / 3))


def test_what_was_not_measured_of_all_samples_has_no_score() -> None:
    scores = score_questions([make_result("nq/test/0")])
    assert "majority" not in scores[0].values
    partly_judged = [make_result(sample=0), make_result(sample=1)]
    partly_judged[0]["metrics"]["judge"] = 1.0
    assert "judge" not in score_questions(partly_judged)[0].values
