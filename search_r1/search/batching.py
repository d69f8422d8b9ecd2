"""Micro-batching: queries that are asked at about the same time go to the retriever in one call.

A scan of an index costs about as much for 64 queries as for one. So a query waits a few milliseconds for
others, and while a search runs the next batch gathers. Clients that ask in a loop ask again right after an
answer: after a long search a batch waits a little longer, until as many queries are there as there were
clients, so that these do not split into two halves that search in turns. Equal queries are searched once,
and remembered.
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
_MAX_REMEMBERED_CHARS = 1000
_MAX_REMEMBERED_PASSAGES = 100
"""Longer queries and answers with more passages are not remembered."""
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
    """Answers that are remembered; 0 for none."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A query to search, for all callers that wait for it."""

    query: str
    lane: _Lane
    request: int
    """Number of the request that asked first."""
    answer: asyncio.Future[Outcome]
    deadline: float = 0.0
    """The latest of all callers."""
    num_waiting: int = 0


@dataclass(slots=True, eq=False)
class _Lane:
    """Queries that may share a call: those that ask for the same number of passages."""

    topk: int
    queue: OrderedDict[_Asked, None] = field(default_factory=OrderedDict)
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
    """Returns one outcome per query from a retriever that is asked in batches. One per event loop."""

    def __init__(self, retriever: Retriever, *, options: BatchOptions, counts: Counts) -> None:
        self.retriever = retriever
        self.defect: str | None = None
        """Which file was changed in place, as the newest search found."""
        self._options = options
        self._max_batch = max(1, min(options.max_batch, retriever.max_batch))
        self._counts = counts
        self._lanes: dict[int, _Lane] = {}
        self._unanswered: dict[tuple[str, int], _Asked] = {}
        """Queries that are not answered yet, queued or searched."""
        self._remembered: OrderedDict[tuple[str, int], Found] = OrderedDict()
        self._facts = retriever.describe()
        self._calls: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._num_requests = 0

    @property
    def num_waiting(self) -> int:
        """Queries that wait for their call."""
        return sum(len(lane.queue) for lane in self._lanes.values())

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        """Return one outcome per query, in order. Cancelling drops queries without other callers."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        self._num_requests += 1
        if (facts := self.retriever.describe()) != self._facts:  # a recording begins a new day
            self._facts = facts
            self._remembered.clear()
        answers = [self._ask(query, topk=topk, deadline=deadline) for query in queries]
        waited_for = [answer for answer in answers if isinstance(answer, _Asked)]
        self._schedule()
        try:
            if waited_for:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await asyncio.wait({asked.answer for asked in waited_for})
        finally:
            self._leave(waited_for)
        late = SearchFailure(kind=FailureKind.DEADLINE, reason=f"not answered within {timeout_s:g} s")
        return [
            (answer.answer.result() if answer.answer.done() else late)
            if isinstance(answer, _Asked)
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
        for asked in list(self._unanswered.values()):
            self._settle(asked, _STOPPED)
        await self.retriever.aclose()

    def _ask(self, query: str, *, topk: int, deadline: float) -> _Asked | Found:
        """Return the answer if it is known, else what to wait for."""
        if not query.strip():
            self._counts.count_query(Source.BLANK)
            return ()
        key = (query, topk)
        if (found := self._remembered.get(key)) is not None:
            self._remembered.move_to_end(key)
            self._counts.count_query(Source.CACHED)
            return found
        asked = self._unanswered.get(key)
        self._counts.count_query(Source.SEARCHED if asked is None else Source.JOINED)
        if asked is None:
            loop = asyncio.get_running_loop()
            lane = self._lanes.setdefault(topk, _Lane(topk))
            asked = _Asked(query, lane, self._num_requests, loop.create_future())
            self._unanswered[key] = asked
            lane.queue[asked] = None
            lane.latest = loop.time()
        asked.num_waiting += 1
        asked.deadline = max(asked.deadline, deadline)
        return asked

    def _leave(self, waited_for: Sequence[_Asked]) -> None:
        """Remove queued queries without callers."""
        for asked in waited_for:
            asked.num_waiting -= 1
            if asked.num_waiting == 0 and asked in asked.lane.queue:
                del asked.lane.queue[asked]
                self._forget(asked)
                if not asked.lane.queue:
                    asked.lane.since = None

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
        batch: list[_Asked] = []
        while lane.queue and len(batch) < self._max_batch:
            asked = next(iter(lane.queue))
            if batch and not self._options.together and asked.request != batch[0].request:
                break
            del lane.queue[asked]
            batch.append(asked)
        lane.since = None
        call = asyncio.create_task(self._call(lane, batch))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        call.add_done_callback(lambda _: self._schedule())

    async def _call(self, lane: _Lane, batch: list[_Asked]) -> None:
        clock = asyncio.get_running_loop().time
        started = clock()
        deadline = max(asked.deadline for asked in batch)
        outcomes: list[Outcome] = [_STOPPED] * len(batch)
        try:
            outcomes = await self._search(batch, topk=lane.topk)
        finally:
            seconds = clock() - started
            lane.search_s = seconds if not lane.search_s else (lane.search_s + seconds) / 2
            lane.num_clients = max(1, sum(asked.num_waiting > 0 for asked in batch) + len(lane.queue))
            self._counts.count_batch(size=len(batch), seconds=seconds)
            for asked, outcome in zip(batch, outcomes, strict=True):
                is_late = isinstance(outcome, SearchFailure) and outcome.kind is FailureKind.DEADLINE
                # A query that was joined meanwhile, with a later deadline, is searched again.
                if is_late and asked.num_waiting and asked.deadline > deadline:
                    lane.queue[asked] = None
                else:
                    self._settle(asked, outcome)

    async def _search(self, batch: list[_Asked], *, topk: int) -> list[Outcome]:
        """Return one outcome per query. A batch that crashes is searched again in halves."""
        queries = [asked.query for asked in batch]
        left_s = max(asked.deadline for asked in batch) - asyncio.get_running_loop().time()
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
            if len(queries) == 1 or not any(asked.num_waiting for asked in batch):
                logger.exception("a search of %d queries crashed", len(queries))
                return _fail(queries, f"the search crashed ({type(error).__name__}: {error})")
        else:
            if len(outcomes) == len(queries):
                return [_check_scores(outcome) for outcome in outcomes]
            reason = f"{len(queries)} queries had {len(outcomes)} outcomes"
            logger.error("the retriever is out of order: %s", reason)
            return _fail(queries, reason)
        half = len(batch) // 2
        first = await self._search(batch[:half], topk=topk)
        return first + await self._search(batch[half:], topk=topk)

    def _settle(self, asked: _Asked, outcome: Outcome) -> None:
        self._forget(asked)
        asked.answer.set_result(outcome)
        if isinstance(outcome, SearchFailure):
            return
        if len(asked.query) > _MAX_REMEMBERED_CHARS or len(outcome) > _MAX_REMEMBERED_PASSAGES:
            return
        self._remembered[asked.query, asked.lane.topk] = outcome
        if len(self._remembered) > self._options.cache_size:
            self._remembered.popitem(last=False)

    def _forget(self, asked: _Asked) -> None:
        """Let later equal queries be searched again."""
        self._unanswered.pop((asked.query, asked.lane.topk), None)


def _fail(queries: Sequence[str], reason: str) -> list[Outcome]:
    return [SearchFailure(kind=FailureKind.INTERNAL, reason=reason) for _ in queries]


def _check_scores(outcome: Outcome) -> Outcome:
    if isinstance(outcome, SearchFailure) or all(math.isfinite(hit.score) for hit in outcome):
        return outcome
    return SearchFailure(kind=FailureKind.MALFORMED, reason="a score is not a finite number")
