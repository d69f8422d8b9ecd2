"""Several retrievers as one: their rankings are joined by reciprocal rank fusion.

Cormack, Clarke, Büttcher: Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods,
SIGIR 2009. A document's score is the sum of 1 / (60 + rank) over the rankings it is in, ranks from 1.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from search_r1.search.errors import RetrieverError
from search_r1.search.retriever import Found, Hit, Outcome, Retriever, SearchFailure

RRF_K = 60


class HybridRetriever:
    """Ask every part at once. A query that one part cannot answer has failed: never half a ranking."""

    def __init__(self, parts: Sequence[Retriever], *, depth: int, rrf_k: int = RRF_K) -> None:
        """`depth`: hits of each part that are looked at (more if more are asked for).

        Raises RetrieverError for less than two parts.
        """
        if len(parts) < 2:
            raise RetrieverError(f"a hybrid of {len(parts)} retrievers is none; expected at least two")
        if depth < 1 or rrf_k < 0:
            raise RetrieverError(f"depth {depth} and rrf_k {rrf_k}; expected at least 1 and at least 0")
        self.max_batch = min(part.max_batch for part in parts)
        self.num_parallel_calls = min(part.num_parallel_calls for part in parts)
        self._parts = tuple(parts)
        self._depth = depth
        self._rrf_k = rrf_k

    @property
    def num_passages(self) -> int | None:
        """None when the parts do not search the same number."""
        numbers = {part.num_passages for part in self._parts}
        return numbers.pop() if len(numbers) == 1 else None

    def describe(self) -> Mapping[str, str | int | float | None]:
        """Its own facts, and those of part n as `n.fact`."""
        facts: dict[str, str | int | float | None] = {
            "retriever": "hybrid",
            "rrf_k": self._rrf_k,
            "depth": self._depth,
        }
        for number, part in enumerate(self._parts):
            facts |= {f"{number}.{name}": value for name, value in part.describe().items()}
        return facts

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        depth = max(self._depth, topk)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(part.search(queries, topk=depth, timeout_s=timeout_s))
                    for part in self._parts
                ]
        except ExceptionGroup as errors:  # what `except*` raises, Python 3.11.2 (Debian 12) wraps in a group
            raise _first(errors) from errors
        by_query = zip(*(task.result() for task in tasks), strict=True)
        return [self._join(outcomes, topk=topk) for outcomes in by_query]

    async def aclose(self) -> None:
        """Close every part; then raise what the first of them raised."""
        ends = await asyncio.gather(*(part.aclose() for part in self._parts), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    def _join(self, outcomes: Sequence[Outcome], *, topk: int) -> Outcome:
        rankings: list[Found] = []
        for part, outcome in zip(self._parts, outcomes, strict=True):
            if isinstance(outcome, SearchFailure):
                name = part.describe().get("retriever", "part")
                return SearchFailure(kind=outcome.kind, reason=f"{name} of the hybrid: {outcome.reason}")
            rankings.append(outcome)
        return fuse_rankings(rankings, rrf_k=self._rrf_k)[:topk]


def fuse_rankings(rankings: Sequence[Found], *, rrf_k: int = RRF_K) -> Found:
    """All documents of the rankings, best first; of equals, the one with the better rank in some ranking.

    Two hits are the same document when id and contents agree: several corpora may count from 0.
    """
    shares: dict[tuple[str, str], dict[int, float]] = {}
    first_hits: dict[tuple[str, str], Hit] = {}
    for rank, row in enumerate(zip_longest(*rankings), start=1):
        for number, hit in enumerate(row):
            if hit is None:
                continue
            key = (hit.document.id, hit.document.contents)
            first_hits.setdefault(key, hit)
            # A ranking that has a document twice counts its better rank.
            shares.setdefault(key, {}).setdefault(number, 1 / (rrf_k + rank))
    # fsum: the sum does not depend on the order of the parts, so that equals are equal.
    scored = [(math.fsum(parts.values()), first_hits[key]) for key, parts in shares.items()]
    scored.sort(key=lambda pair: -pair[0])  # stable: equals stay in the order they were met in
    return tuple(Hit(document=hit.document, score=score) for score, hit in scored)


def _first(group: ExceptionGroup[Exception]) -> Exception:
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
