"""What the server asks of a retriever, whatever is behind it: an index, a search engine, a mixture."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeAlias

from search_r1.search.schema import Document


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One search result."""

    document: Document
    score: float


class FailureKind(StrEnum):
    """Why a query has no answer."""

    DEADLINE = "deadline"
    UNAVAILABLE = "unavailable"
    """The engine cannot be reached, is out of order, or asks for fewer queries at a time."""
    REFUSED = "refused"
    """The engine does not accept the key or the query."""
    QUOTA = "quota"
    """The engine's quota or our own spend cap is used up: asking again does not help."""
    MALFORMED = "malformed"
    """The engine's answer cannot be read."""
    NOT_RECORDED = "not_recorded"
    """A replay has no answer for this query."""
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFailure:
    """A query that was not answered. Not the same as one that found nothing."""

    kind: FailureKind
    reason: str
    """For people and logs. Never evidence: it must not reach a prompt."""


Found: TypeAlias = tuple[Hit, ...]
"""Best first; empty when nothing was found."""
Outcome: TypeAlias = Found | SearchFailure


class Retriever(Protocol):
    """Find passages. Lives on one event loop."""

    max_batch: int
    """Most queries of one call."""
    num_parallel_calls: int
    """Calls that may run at the same time."""

    @property
    def num_passages(self) -> int | None:
        """In the corpus; None when nobody knows."""
        ...

    def describe(self) -> Mapping[str, str | int | float | None]:
        """What its answers depend on, for `/version`: names, hashes, parameters. No secrets."""
        ...

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        """One outcome per query, in order, at most `topk` hits each; a blank query finds nothing.

        Queries are text: whoever lets them in has seen to it that none holds a lone surrogate.
        Raises nothing but RetrieverError, for what concerns every query alike.
        """
        ...

    async def aclose(self) -> None:
        """Let go of threads, files and connections."""
        ...


class BatchSearch(Protocol):
    """A search that computes, here and now. Called from one thread at a time."""

    def __len__(self) -> int:
        """Passages in the corpus."""
        ...

    def search(self, queries: Sequence[str], *, topk: int) -> list[list[Hit]]:
        """One list per query, best first, at most `topk` long, empty when nothing was found."""
        ...

    def close(self) -> None:
        """Let go of threads and files. Called once, after the last search."""
        ...


class ThreadedRetriever:
    """A computing search as a Retriever: its calls run one after the other in a thread of their own."""

    num_parallel_calls = 1

    def __init__(
        self,
        batch_search: BatchSearch,
        *,
        facts: Mapping[str, str | int | float | None],
        max_batch: int = 256,
    ) -> None:
        """`facts`: what `describe` returns."""
        self.max_batch = max_batch
        self._batch_search = batch_search
        self._facts = dict(facts)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")
        self._is_closed = False

    @property
    def num_passages(self) -> int | None:
        return len(self._batch_search)

    def describe(self) -> Mapping[str, str | int | float | None]:
        return self._facts

    async def search(
        self,
        queries: Sequence[str],
        *,
        topk: int,
        timeout_s: float,  # noqa: ARG002 - what computes cannot be interrupted
    ) -> list[Outcome]:
        def compute() -> list[list[Hit]]:
            return self._batch_search.search(queries, topk=topk)

        found = await asyncio.get_running_loop().run_in_executor(self._thread, compute)
        return [tuple(hits) for hits in found]

    async def aclose(self) -> None:
        """Wait for the running call; drop those that wait."""
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        self._batch_search.close()
