"""The interface of a retriever that the server uses, and a blocking search as such a retriever."""

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
    """The engine cannot be reached, is broken, or asks for fewer queries at a time."""
    REFUSED = "refused"
    """The engine does not accept the key or the query."""
    QUOTA = "quota"
    """The engine's quota or our own limit of requests is used up: asking again does not help."""
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
    """For logs and messages; it must not reach a prompt."""


Found: TypeAlias = tuple[Hit, ...]
"""Best first; empty when nothing was found."""
Outcome: TypeAlias = Found | SearchFailure


class Retriever(Protocol):
    """Finds passages. One per event loop."""

    max_batch: int
    """Most queries of one call."""
    num_parallel_calls: int
    """Calls that may run at the same time."""

    @property
    def num_passages(self) -> int | None:
        """Return the number of passages in the corpus; None when it is unknown."""
        ...

    def describe(self) -> Mapping[str, str | int | float | None]:
        """Return what its answers depend on, for `/version`: names, hashes, parameters; no secrets."""
        ...

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        """Return one outcome per query, in order, at most `topk` hits each; a blank query finds nothing.

        No query holds a lone surrogate. Raises nothing but RetrieverError, for what concerns every query.
        """
        ...

    async def aclose(self) -> None:
        """Release threads, files and connections."""
        ...


class BatchSearch(Protocol):
    """A search that blocks. Called from one thread at a time."""

    def __len__(self) -> int:
        """Return the number of passages in the corpus."""
        ...

    def search(self, queries: Sequence[str], *, topk: int) -> list[list[Hit]]:
        """Return one list per query, best first, at most `topk` long, empty when nothing was found."""
        ...

    def close(self) -> None:
        """Release threads and files. Called once, after the last search."""
        ...


class ThreadedRetriever:
    """A BatchSearch as a Retriever: its calls run one after the other in a thread of their own."""

    max_batch = 256
    num_parallel_calls = 1

    def __init__(self, batch_search: BatchSearch, *, facts: Mapping[str, str | int | float | None]) -> None:
        """Take `facts`, which `describe` returns."""
        self._batch_search = batch_search
        self._facts = dict(facts)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")
        self._is_closed = False

    @property
    def num_passages(self) -> int | None:
        return len(self._batch_search)

    def describe(self) -> Mapping[str, str | int | float | None]:
        """Return the facts."""
        return self._facts

    async def search(
        self,
        queries: Sequence[str],
        *,
        topk: int,
        timeout_s: float,  # noqa: ARG002 - a running computation cannot be interrupted
    ) -> list[Outcome]:
        """Search in the thread."""

        def compute() -> list[list[Hit]]:
            return self._batch_search.search(queries, topk=topk)

        found = await asyncio.get_running_loop().run_in_executor(self._thread, compute)
        return [tuple(hits) for hits in found]

    async def aclose(self) -> None:
        """Wait for the running call and cancel those that wait."""
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        self._batch_search.close()
