"""Reciprocal rank fusion, and what becomes of a failed part."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.hybrid import HybridRetriever, fuse_rankings
from search_r1.search.retriever import FailureKind, Found, Hit, Outcome, SearchFailure
from search_r1.search.schema import Document


def rank(*ids: str) -> Found:
    """Hits with these ids, best first."""
    return tuple(
        Hit(document=Document(id=key, contents=f"text of {key}"), score=100.0 - place)
        for place, key in enumerate(ids)
    )


class Part:
    """Answers from a table; remembers what it was asked for."""

    def __init__(
        self,
        answers: Mapping[str, Outcome | RetrieverError],
        *,
        name: str = "part",
        max_batch: int = 8,
        num_parallel_calls: int = 4,
        num_passages: int | None = 7,
    ) -> None:
        self.max_batch = max_batch
        self.num_parallel_calls = num_parallel_calls
        self.num_passages = num_passages
        self.depths: list[int] = []
        self.num_closed = 0
        self.was_cancelled = False
        self.gate: asyncio.Event | None = None
        self._answers = answers
        self._name = name

    def describe(self) -> Mapping[str, str | int | float | None]:
        return {"retriever": self._name, "size": 3}

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        self.depths.append(topk)
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.was_cancelled = True
                raise
        outcomes: list[Outcome] = []
        for query in queries:
            answer = self._answers[query]
            if isinstance(answer, RetrieverError):
                raise answer
            outcomes.append(answer if isinstance(answer, SearchFailure) else answer[:topk])
        return outcomes

    async def aclose(self) -> None:
        self.num_closed += 1


def ids(found: Outcome) -> list[str]:
    assert not isinstance(found, SearchFailure)
    return [hit.document.id for hit in found]


def test_scores_are_those_of_the_paper() -> None:
    found = fuse_rankings([rank("a", "b", "c"), rank("c", "a", "d")])
    # a: 1/61 + 1/62, c: 1/63 + 1/61, b: 1/62, d: 1/63
    assert ids(found) == ["a", "c", "b", "d"]
    expected = [0.03252247488101534, 0.032266458495966696, 0.016129032258064516, 0.015873015873015872]
    assert [hit.score for hit in found] == pytest.approx(expected, rel=1e-12)


def test_of_equals_the_earlier_part_wins() -> None:
    assert ids(fuse_rankings([rank("a", "b"), rank("b", "a")])) == ["a", "b"]
    assert ids(fuse_rankings([rank("x"), rank("y"), rank("z")])) == ["x", "y", "z"]


def test_a_document_that_one_ranking_has_twice_counts_once() -> None:
    [best, other] = fuse_rankings([rank("a", "b", "a"), ()])
    assert (best.document.id, best.score) == ("a", 1 / 61)
    assert (other.document.id, other.score) == ("b", 1 / 62)


async def test_parts_are_asked_for_more_than_is_wanted() -> None:
    parts = [Part({"q": rank("a", "b", "c")}), Part({"q": rank("c", "b", "d")})]
    hybrid = HybridRetriever(parts, depth=3)
    [found] = await hybrid.search(["q"], topk=1, timeout_s=1.0)
    assert ids(found) == ["c"]  # 1/63 + 1/61 is more than b's 2/62, and no first place of part 0
    await hybrid.search(["q"], topk=5, timeout_s=1.0)
    assert parts[0].depths == [3, 5]


async def test_a_failed_part_is_a_failed_query_and_only_that_one() -> None:
    failure = SearchFailure(kind=FailureKind.QUOTA, reason="used up")
    parts = [
        Part({"good": rank("a"), "bad": rank("b")}, name="e5"),
        Part({"good": rank("a"), "bad": failure}, name="serper"),
    ]
    good, bad = await HybridRetriever(parts, depth=10).search(["good", "bad"], topk=3, timeout_s=1.0)
    assert ids(good) == ["a"]
    assert bad == SearchFailure(kind=FailureKind.QUOTA, reason="serper of the hybrid: used up")


async def test_an_error_of_a_part_ends_the_others_and_is_raised_as_it_is() -> None:
    slow, broken = Part({"q": rank("a")}), Part({"q": RetrieverError("no such index")})
    slow.gate = asyncio.Event()
    with pytest.raises(RetrieverError, match="no such index"):
        await HybridRetriever([slow, broken], depth=10).search(["q"], topk=3, timeout_s=1.0)
    assert slow.was_cancelled


def test_what_it_is_made_of() -> None:
    hybrid = HybridRetriever(
        [Part({}, name="e5", max_batch=4), Part({}, name="bm25", num_parallel_calls=1)], depth=50
    )
    assert (hybrid.max_batch, hybrid.num_parallel_calls, hybrid.num_passages) == (4, 1, 7)
    assert hybrid.describe() == {
        "retriever": "hybrid",
        "rrf_k": 60,
        "depth": 50,
        "0.retriever": "e5",
        "0.size": 3,
        "1.retriever": "bm25",
        "1.size": 3,
    }
    assert HybridRetriever([Part({}), Part({}, num_passages=8)], depth=1).num_passages is None
