from __future__ import annotations

import json

import pytest

from search_r1.search.answers import find_refusal, render_answer
from search_r1.search.retriever import FailureKind, Hit, SearchFailure
from search_r1.search.schema import BareAnswer, Document, ScoredAnswer

HIT = Hit(document=Document(id="7", contents='"Größe"\n漢字 🎬'), score=0.5)
FAILURE = SearchFailure(kind=FailureKind.QUOTA, reason="used up")


def test_both_published_shapes_and_what_the_schema_reads() -> None:
    bare = render_answer([(HIT,), ()], with_scores=False, with_errors=False)
    scored = render_answer([(HIT,), FAILURE], with_scores=True, with_errors=True)
    assert json.loads(bare) == {"result": [[{"id": "7", "contents": '"Größe"\n漢字 🎬'}], []]}
    assert BareAnswer.model_validate_json(bare).errors is None
    read = ScoredAnswer.model_validate_json(scored)
    assert read.result[1] is None
    assert read.errors is not None
    assert read.errors[1] is not None
    assert (read.errors[0], read.errors[1].kind) == (None, "quota")


@pytest.mark.parametrize(
    ("queries", "detail"),
    [
        (["a"], "query 0 'a': quota: used up"),
        (["a" * 200], f"query 0 '{'a' * 80}…': quota: used up"),
    ],
)
def test_a_refusal_names_the_query_in_short(queries: list[str], detail: str) -> None:
    refusal = find_refusal([FAILURE], queries=queries)
    assert refusal is not None
    assert (refusal.status, refusal.detail, refusal.retry_after_s) == (402, detail, None)


def test_of_several_failures_the_first_is_named_and_all_are_counted() -> None:
    late = SearchFailure(kind=FailureKind.DEADLINE, reason="too slow")
    refusal = find_refusal([(HIT,), late, FAILURE], queries=["a", "b", "c"])
    assert refusal is not None
    assert refusal.status == 504
    assert refusal.detail == "query 1 'b': deadline: too slow (2 of 3 queries failed)"
    assert find_refusal([(HIT,), ()], queries=["a", "b"]) is None
