"""A search engine that makes its results up from the query: no network, no key, always the same answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from search_r1.search.online.engines import MAX_RESULTS, make_document
from search_r1.search.online.store import normalise_query
from search_r1.search.retriever import Found, Hit, Outcome


class MockRetriever:
    """Stands in for any engine. Every document says that it is made up."""

    max_batch = 256
    num_parallel_calls = 16
    num_passages: int | None = None

    def __init__(self, *, engine: str) -> None:
        """`engine`: the name that was asked for."""
        self._engine = engine

    def describe(self) -> Mapping[str, str | int | float | None]:
        return {"retriever": "mock", "stands_in_for": self._engine}

    async def search(
        self,
        queries: Sequence[str],
        *,
        topk: int,
        timeout_s: float,  # noqa: ARG002 - takes no time
    ) -> list[Outcome]:
        return [_make_up(normalise_query(query), topk=min(topk, MAX_RESULTS)) for query in queries]

    async def aclose(self) -> None:
        """Nothing to let go of."""


def _make_up(query: str, *, topk: int) -> Found:
    if not query:
        return ()
    digest = hashlib.sha256(query.encode()).hexdigest()[:16]
    return tuple(
        Hit(
            document=make_document(
                url=f"mock://{digest}/{rank}",
                title=f"Mock result {rank} for: {query}",
                snippet=f"Made up by the mock search engine, not found anywhere. Number {rank} for: {query}",
            ),
            score=1.0 / rank,
        )
        for rank in range(1, topk + 1)
    )
