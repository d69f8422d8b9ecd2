"""Several retrievers as one: their rankings are joined by reciprocal rank fusion.

Cormack, Clarke, Büttcher: Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods,
SIGIR 2009. A document's score is the sum of 1 / (60 + rank) over the rankings it is in, ranks from 1.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from search_r1.search.retriever import Found, Hit, Outcome, Retriever, SearchFailure

RRF_K = 60


class HybridRetriever:
    """Asks every part at once. A query that one part cannot answer has failed: there is no half ranking."""

    def __init__(self, parts: Sequence[Retriever], *, depth: int) -> None:
        """Take `depth` hits of each part to fuse, more if more are asked for."""
        self.max_batch = min(part.max_batch for part in parts)
        self.num_parallel_calls = min(part.num_parallel_calls for part in parts)
        self._parts = tuple(parts)
        self._depth = depth

    @property
    def num_passages(self) -> int | None:
        """Return the number of passages in the corpus; None when the parts do not search the same number."""
        numbers = {part.num_passages for part in self._parts}
        return numbers.pop() if len(numbers) == 1 else None

    def describe(self) -> Mapping[str, str | int | float | None]:
        """Return its own facts, and those of part n as `n.fact`."""
        facts: dict[str, str | int | float | None] = {
            "retriever": "hybrid",
            "rrf_k": RRF_K,
            "depth": self._depth,
        }
        for number, part in enumerate(self._parts):
            facts |= {f"{number}.{name}": value for name, value in part.describe().items()}
        return facts

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        """Search every part and fuse the rankings. Raises what the first part raises."""
        depth = max(self._depth, topk)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(part.search(queries, topk=depth, timeout_s=timeout_s))
                    for part in self._parts
                ]
        except ExceptionGroup as errors:  # in which the task group wraps what a part raised
            raise errors.exceptions[0] from None
        by_query = zip(*(task.result() for task in tasks), strict=True)
        return [self._join(outcomes, topk=topk) for outcomes in by_query]

    async def aclose(self) -> None:
        """Close every part."""
        await asyncio.gather(*(part.aclose() for part in self._parts))

    def _join(self, outcomes: Sequence[Outcome], *, topk: int) -> Outcome:
        rankings: list[Found] = []
        for part, outcome in zip(self._parts, outcomes, strict=True):
            if isinstance(outcome, SearchFailure):
                name = part.describe().get("retriever", "part")
                return SearchFailure(kind=outcome.kind, reason=f"{name} of the hybrid: {outcome.reason}")
            rankings.append(outcome)
        return fuse_rankings(rankings)[:topk]


def fuse_rankings(rankings: Sequence[Found]) -> Found:
    """Return all documents of the rankings, best first; of equals, the one with the better rank in a ranking.

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
            shares.setdefault(key, {}).setdefault(number, 1 / (RRF_K + rank))
    # fsum: the sum does not depend on the order of the parts, so that equals are equal.
    scored = [(math.fsum(parts.values()), first_hits[key]) for key, parts in shares.items()]
    scored.sort(key=lambda pair: -pair[0])  # stable: equals keep the order of their first rank
    return tuple(Hit(document=hit.document, score=score) for score, hit in scored)
