"""Micro-batching: queries that arrive at about the same time go to the retriever in one call.

A scan of an index costs about as much for 64 queries as for one. So a query waits a few milliseconds for
others, and while a search runs the next batch gathers. Clients that search in a loop send the next query
right after an answer: after a long search a batch waits a little longer, until as many queries are there as
there were clients, so that these do not split into two halves that search in turns. Equal queries are
searched once, and their answers are cached.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from search_r1.search.errors import ChangedFileError, RetrieverError
from search_r1.search.retriever import FailureKind, Found, Outcome, Retriever, SearchFailure

logger = logging.getLogger(__name__)

WAIT_SHARE = 0.05
"""How long to wait for one more query, as a share of what recent searches took."""
MAX_WAIT_SHARE = 0.25
"""The same for all of them together."""
MAX_WAIT_S = 0.5
"""Upper bound of that wait."""
_PASSAGES_PER_ANSWER = 10
"""The cache holds so many passages for every answer that it may hold, however they are spread."""
_MAX_CACHED_CHARS = 1000
"""Answers to longer queries are not cached."""
_STOPPED = SearchFailure(kind=FailureKind.UNAVAILABLE, reason="the server is shutting down")


class Source(StrEnum):
    """Where the answer of a query comes from."""

    SEARCHED = "searched"
    JOINED = "joined"
    """From the search of an equal query that was not answered yet."""
    CACHED = "cached"
    BLANK = "blank"


class Counts(Protocol):
    """Counters of a batcher's work."""

    def count_query(self, source: Source) -> None:
        """Count one query."""
        ...

    def count_batch(self, *, size: int, seconds: float) -> None:
        """Count one finished call of the retriever."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How queries are put together."""

    together: bool = True
    """Search queries of several requests in one call; otherwise each request is a call of its own."""
    max_batch: int = 256
    """Queries of one call; the retriever's own limit counts as well."""
    window_s: float = 0.002
    """How long a query waits for others where searches are quick."""
    cache_size: int = 10_000
    """Answers that are cached, with up to ten passages each on average; 0 for none."""


@dataclass(slots=True, eq=False)
class _Query:
    """A query to search, for all callers that wait for it."""

    text: str
    lane: _Lane
    request: int
    """Number of the first request with it."""
    answer: asyncio.Future[Outcome]
    deadline: float = 0.0
    """The latest of all callers."""
    num_waiting: int = 0


@dataclass(slots=True, eq=False)
class _Lane:
    """Queries that may share a call: those with the same number of passages."""

    topk: int
    queue: OrderedDict[_Query, None] = field(default_factory=OrderedDict)
    """In the order of their arrival."""
    num_clients: int = 1
    """Queries when the last call ended: those just answered and those waiting."""
    search_s: float = 0.0
    """Duration of recent calls."""
    since: float | None = None
    """When a call could have started first, on the loop's clock."""
    latest: float = 0.0
    """When the last query arrived."""


class MicroBatcher:
    """Searches in batches and returns one outcome per query. One per event loop."""

    def __init__(self, retriever: Retriever, *, options: BatchOptions, counts: Counts) -> None:
        self.retriever = retriever
        self.defect: str | None = None
        """Which file was changed in place, as the newest search found."""
        self._options = options
        self._max_batch = max(1, min(options.max_batch, retriever.max_batch))
        self._counts = counts
        self._lanes: dict[int, _Lane] = {}
        self._unanswered: dict[tuple[str, int], _Query] = {}
        """Queries that are not answered yet, queued or searched."""
        self._cache: OrderedDict[tuple[str, int], Found] = OrderedDict()
        self._num_cached_passages = 0
        self._facts = retriever.describe()
        self._calls: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._num_requests = 0

    @property
    def num_waiting(self) -> int:
        """Return the number of queries that wait for their call."""
        return sum(len(lane.queue) for lane in self._lanes.values())

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        """Return one outcome per query, in order. Cancelling drops queries without other callers."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        self._num_requests += 1
        if (facts := self.retriever.describe()) != self._facts:  # a recording begins a new day
            self._facts = facts
            self._cache.clear()
            self._num_cached_passages = 0
        answers = [self._enqueue(text, topk=topk, deadline=deadline) for text in queries]
        pending = [answer for answer in answers if isinstance(answer, _Query)]
        self._schedule()
        try:
            if pending:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await asyncio.wait({query.answer for query in pending})
        finally:
            self._release(pending)
        late = SearchFailure(kind=FailureKind.DEADLINE, reason=f"not answered within {timeout_s:g} s")
        return [
            (answer.answer.result() if answer.answer.done() else late)
            if isinstance(answer, _Query)
            else answer
            for answer in answers
        ]

    async def aclose(self) -> None:
        """Cancel what runs, fail what is queued, and close the retriever."""
        for lane in self._lanes.values():
            lane.queue.clear()
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        # Also queries whose call was cancelled before its first step.
        for query in list(self._unanswered.values()):
            self._settle(query, _STOPPED)
        await self.retriever.aclose()

    def _enqueue(self, text: str, *, topk: int, deadline: float) -> _Query | Found:
        """Return the answer if it is known, else what to wait for."""
        if not text.strip():
            self._counts.count_query(Source.BLANK)
            return ()
        key = (text, topk)
        if (found := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            self._counts.count_query(Source.CACHED)
            return found
        query = self._unanswered.get(key)
        self._counts.count_query(Source.SEARCHED if query is None else Source.JOINED)
        if query is None:
            loop = asyncio.get_running_loop()
            lane = self._lanes.setdefault(topk, _Lane(topk))
            query = _Query(text, lane, self._num_requests, loop.create_future())
            self._unanswered[key] = query
            lane.queue[query] = None
            lane.latest = loop.time()
        query.num_waiting += 1
        query.deadline = max(query.deadline, deadline)
        return query

    def _release(self, pending: Sequence[_Query]) -> None:
        """Remove queued queries without callers."""
        for query in pending:
            query.num_waiting -= 1
            if query.num_waiting == 0 and query in query.lane.queue:
                del query.lane.queue[query]
                self._remove_pending(query)
                if not query.lane.queue:
                    query.lane.since = None

    def _schedule(self) -> None:
        """Start the calls that are due, and set the timer for the next one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        while len(self._calls) < self.retriever.num_parallel_calls:
            due = [(self._start_time(lane, now=now), lane) for lane in self._lanes.values() if lane.queue]
            if not due:
                return
            start, first = min(due, key=lambda pair: pair[0])  # the lane that has waited longest
            if start > now:
                self._timer = loop.call_at(start, self._schedule)
                return
            self._start(first)

    def _start_time(self, lane: _Lane, *, now: float) -> float:
        """Return when this lane's next call should start; not after `now` if it is due."""
        if lane.since is None:
            lane.since = now
        if not self._options.together or len(lane.queue) >= self._max_batch:
            return lane.since
        start = lane.since + self._options.window_s
        if len(lane.queue) >= lane.num_clients:
            return start
        next_query = max(lane.since, lane.latest) + WAIT_SHARE * lane.search_s
        last_query = lane.since + min(MAX_WAIT_SHARE * lane.search_s, MAX_WAIT_S)
        return max(start, min(next_query, last_query))

    def _start(self, lane: _Lane) -> None:
        batch: list[_Query] = []
        while lane.queue and len(batch) < self._max_batch:
            query = next(iter(lane.queue))
            if batch and not self._options.together and query.request != batch[0].request:
                break
            del lane.queue[query]
            batch.append(query)
        lane.since = None
        call = asyncio.create_task(self._call(lane, batch))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        call.add_done_callback(lambda _: self._schedule())

    async def _call(self, lane: _Lane, batch: list[_Query]) -> None:
        clock = asyncio.get_running_loop().time
        started = clock()
        deadline = max(query.deadline for query in batch)
        outcomes: list[Outcome] = [_STOPPED] * len(batch)
        try:
            outcomes = await self._search(batch, topk=lane.topk)
        finally:
            seconds = clock() - started
            lane.search_s = seconds if not lane.search_s else (lane.search_s + seconds) / 2
            lane.num_clients = max(1, sum(query.num_waiting > 0 for query in batch) + len(lane.queue))
            self._counts.count_batch(size=len(batch), seconds=seconds)
            for query, outcome in zip(batch, outcomes, strict=True):
                is_late = isinstance(outcome, SearchFailure) and outcome.kind is FailureKind.DEADLINE
                # A query that was joined meanwhile, with a later deadline, is searched again.
                if is_late and query.num_waiting and query.deadline > deadline:
                    lane.queue[query] = None
                else:
                    self._settle(query, outcome)

    async def _search(self, batch: list[_Query], *, topk: int) -> list[Outcome]:
        """Return one outcome per query. A batch that crashes is searched again in halves."""
        queries = [query.text for query in batch]
        left_s = max(query.deadline for query in batch) - asyncio.get_running_loop().time()
        try:
            outcomes = await self.retriever.search(queries, topk=topk, timeout_s=max(left_s, 0.001))
            self.defect = None
        except RetrieverError as error:
            logger.error("a search of %d queries failed: %s", len(queries), error)
            if isinstance(error, ChangedFileError):
                self.defect = str(error)
                return [SearchFailure(kind=FailureKind.UNAVAILABLE, reason=self.defect)] * len(queries)
            return _fail(queries, str(error))
        except Exception as error:  # any retriever's defect: each query must have its outcome
            if len(queries) == 1 or not any(query.num_waiting for query in batch):
                logger.exception("a search of %d queries crashed", len(queries))
                return _fail(queries, f"the search crashed ({type(error).__name__}: {error})")
        else:
            if len(outcomes) == len(queries):
                return [_check_scores(outcome) for outcome in outcomes]
            reason = f"{len(queries)} queries had {len(outcomes)} outcomes"
            logger.error("the retriever is broken: %s", reason)
            return _fail(queries, reason)
        half = len(batch) // 2
        first = await self._search(batch[:half], topk=topk)
        return first + await self._search(batch[half:], topk=topk)

    def _settle(self, query: _Query, outcome: Outcome) -> None:
        self._remove_pending(query)
        query.answer.set_result(outcome)
        if isinstance(outcome, SearchFailure):
            return
        if len(query.text) > _MAX_CACHED_CHARS:
            return
        self._cache[query.text, query.lane.topk] = outcome
        self._num_cached_passages += len(outcome)
        size = self._options.cache_size
        while len(self._cache) > size or self._num_cached_passages > _PASSAGES_PER_ANSWER * size:
            self._num_cached_passages -= len(self._cache.popitem(last=False)[1])

    def _remove_pending(self, query: _Query) -> None:
        """Let later equal queries be searched again."""
        self._unanswered.pop((query.text, query.lane.topk), None)


def _fail(queries: Sequence[str], reason: str) -> list[Outcome]:
    return [SearchFailure(kind=FailureKind.INTERNAL, reason=reason) for _ in queries]


def _check_scores(outcome: Outcome) -> Outcome:
    if isinstance(outcome, SearchFailure) or all(math.isfinite(hit.score) for hit in outcome):
        return outcome
    return SearchFailure(kind=FailureKind.MALFORMED, reason="a score is not a finite number")
