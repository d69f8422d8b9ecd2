"""Many small searches as few large ones: what is asked at about the same time goes to the retriever together.

A scan of an index costs about as much for 64 queries as for one. So a query waits a few milliseconds for
others, and while a search runs the next batch gathers. Who asks in a loop asks again just after the answer:
after a long search a batch waits a little longer, until as many queries are there as there were askers, so
that they do not fall apart into two halves that search in turns. Equal queries are searched once, and
remembered.
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

STRETCH = 0.05
"""How long to wait for one more asker, as a share of what recent searches took."""
LONGEST_STRETCH = 0.25
"""The same for as many as keep coming: two halves that search in turns would be slower."""
LONGEST_WAIT_S = 0.5
"""However slow searches are, nobody waits longer than this for company."""
PASSAGES_PER_ANSWER = 10
"""Remembered are that many for every answer that may be, however they are spread: they take the memory."""
_MAX_REMEMBERED_CHARS = 1000
"""Longer queries are not remembered."""
_STOPPED = SearchFailure(kind=FailureKind.UNAVAILABLE, reason="the server is shutting down")


class Source(StrEnum):
    """Where the answer of a query comes from."""

    SEARCHED = "searched"
    JOINED = "joined"
    """Somebody had asked the same and was not answered yet."""
    CACHED = "cached"
    BLANK = "blank"


class Counts(Protocol):
    """What a batcher tells of its work."""

    def count_query(self, source: Source) -> None:
        """One query was asked."""
        ...

    def count_batch(self, *, size: int, seconds: float) -> None:
        """One call of the retriever came to its end."""
        ...


class _CountNothing:
    def count_query(self, source: Source) -> None: ...

    def count_batch(self, *, size: int, seconds: float) -> None: ...


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
    """Answers that are remembered, as long as their passages are not too many; 0 for none."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A query that is searched, and all who wait for it."""

    query: str
    lane: _Lane
    request: int
    """Whose query it was first."""
    answer: asyncio.Future[Outcome]
    deadline: float = 0.0
    """Of the one who waits longest."""
    num_waiting: int = 0


@dataclass(slots=True, eq=False)
class _Lane:
    """Queries that may share a call: those that ask for the same number of passages."""

    topk: int
    queue: OrderedDict[_Asked, None] = field(default_factory=OrderedDict)
    """In the order of their arrival."""
    crowd: int = 1
    """How many queries were there when the last call ended: those just answered and those waiting."""
    search_s: float = 0.0
    """What recent calls took."""
    since: float | None = None
    """When a call could have started first, on the loop's clock."""
    latest: float = 0.0
    """When somebody asked last."""


class MicroBatcher:
    """One outcome per query from a retriever that is asked in batches. Lives on one event loop."""

    def __init__(self, retriever: Retriever, *, options: BatchOptions, counts: Counts | None = None) -> None:
        self.retriever = retriever
        self.defect: str | None = None
        """Which file was changed under the retriever, as the newest search found."""
        self._options = options
        self._max_batch = max(1, min(options.max_batch, retriever.max_batch))
        self._counts = counts or _CountNothing()
        self._lanes: dict[int, _Lane] = {}
        self._flying: dict[tuple[str, int], _Asked] = {}
        """Everything that is not answered yet, queued or searched."""
        self._remembered: OrderedDict[tuple[str, int], Found] = OrderedDict()
        self._num_passages_remembered = 0
        self._facts = retriever.describe()
        self._calls: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._num_requests = 0

    @property
    def num_waiting(self) -> int:
        """Queries that wait for their call."""
        return sum(len(lane.queue) for lane in self._lanes.values())

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        """One outcome per query, in order. Raises nothing; cancelling it drops what nobody else waits for."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        self._num_requests += 1
        self._forget_what_does_not_hold()
        answers = [self._ask(query, topk=topk, deadline=deadline) for query in queries]
        waited_for = [answer for answer in answers if isinstance(answer, _Asked)]
        self._look()
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
        """Cancel what runs, fail what waits, and let go of the retriever."""
        for lane in self._lanes.values():
            lane.queue.clear()
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        # Not only what was queued: a call that is cancelled before its first step answers nobody.
        for asked in list(self._flying.values()):
            self._settle(asked, _STOPPED)
        await self.retriever.aclose()

    def _forget_what_does_not_hold(self) -> None:
        """An engine's recording begins a new day: what answers depend on is another."""
        if (facts := self.retriever.describe()) != self._facts:
            self._facts = facts
            self._remembered.clear()
            self._num_passages_remembered = 0

    def _ask(self, query: str, *, topk: int, deadline: float) -> _Asked | Found:
        """What is known, or what to wait for."""
        if not query.strip():
            self._counts.count_query(Source.BLANK)
            return ()
        key = (query, topk)
        if (found := self._remembered.get(key)) is not None:
            self._remembered.move_to_end(key)
            self._counts.count_query(Source.CACHED)
            return found
        asked = self._flying.get(key)
        if asked is None:
            lane = self._lanes.setdefault(topk, _Lane(topk))
            asked = _Asked(query, lane, self._num_requests, asyncio.get_running_loop().create_future())
            self._flying[key] = asked
            lane.queue[asked] = None
            lane.latest = asyncio.get_running_loop().time()
            self._counts.count_query(Source.SEARCHED)
        else:
            self._counts.count_query(Source.JOINED)
        asked.num_waiting += 1
        asked.deadline = max(asked.deadline, deadline)
        return asked

    def _leave(self, waited_for: Sequence[_Asked]) -> None:
        """Their caller has an answer, or waits no more: what nobody waits for need not be searched."""
        for asked in waited_for:
            asked.num_waiting -= 1
            if asked.num_waiting == 0 and not asked.answer.done() and asked in asked.lane.queue:
                del asked.lane.queue[asked]
                self._forget(asked)
                if not asked.lane.queue:
                    asked.lane.since = None

    def _look(self) -> None:
        """Start the calls that should start now, and come back for the next one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = asyncio.get_running_loop().time()
        waiting = [lane for lane in self._lanes.values() if lane.queue]
        while waiting and len(self._calls) < self.retriever.num_parallel_calls:
            times = {id(lane): self._start_time(lane, now=now) for lane in waiting}
            first = min(waiting, key=lambda lane: times[id(lane)])
            if times[id(first)] > now:
                self._timer = asyncio.get_running_loop().call_at(times[id(first)], self._look)
                return
            self._start(first)
            waiting = [lane for lane in waiting if lane.queue]

    def _start_time(self, lane: _Lane, *, now: float) -> float:
        """When this lane's next call should start, given that one can; that is in the past if it should now.

        Of several lanes the one that has waited longest comes first.
        """
        if lane.since is None:
            lane.since = now
        if not self._options.together or len(lane.queue) >= self._max_batch:
            return lane.since
        start = lane.since + self._options.window_s
        if len(lane.queue) >= lane.crowd:
            return start
        patient = max(lane.since, lane.latest) + STRETCH * lane.search_s
        longest = min(LONGEST_STRETCH * lane.search_s, LONGEST_WAIT_S)
        return max(start, min(patient, lane.since + longest))

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
        call.add_done_callback(lambda _: self._look())

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
            num_wanted = sum(asked.num_waiting > 0 for asked in batch)
            lane.crowd = max(1, num_wanted + len(lane.queue))
            self._counts.count_batch(size=len(batch), seconds=seconds)
            for asked, outcome in zip(batch, outcomes, strict=True):
                if asked.num_waiting and _is_premature(
                    outcome, called_until=deadline, wanted_until=asked.deadline
                ):
                    lane.queue[asked] = None
                else:
                    self._settle(asked, outcome)

    async def _search(self, batch: list[_Asked], *, topk: int) -> list[Outcome]:
        """One outcome per query. A crash is looked for in halves: it must not take the neighbours with it."""
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
        except Exception as error:  # whatever is behind the retriever: each query must have its outcome
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
        if not isinstance(outcome, SearchFailure) and len(asked.query) <= _MAX_REMEMBERED_CHARS:
            self._remember((asked.query, asked.lane.topk), outcome)

    def _remember(self, key: tuple[str, int], found: Found) -> None:
        size = self._options.cache_size
        self._remembered[key] = found
        self._num_passages_remembered += len(found)
        while len(self._remembered) > size or self._num_passages_remembered > PASSAGES_PER_ANSWER * size:
            _, oldest = self._remembered.popitem(last=False)
            self._num_passages_remembered -= len(oldest)

    def _forget(self, asked: _Asked) -> None:
        """Who asks the same from now on is not answered by this one."""
        self._flying.pop((asked.query, asked.lane.topk), None)


def _fail(queries: Sequence[str], reason: str) -> list[Outcome]:
    return [SearchFailure(kind=FailureKind.INTERNAL, reason=reason) for _ in queries]


def _is_premature(outcome: Outcome, *, called_until: float, wanted_until: float) -> bool:
    """Whether the call's time was over, and somebody joined meanwhile who has more of it."""
    is_late = isinstance(outcome, SearchFailure) and outcome.kind is FailureKind.DEADLINE
    return is_late and wanted_until > called_until


def _check_scores(outcome: Outcome) -> Outcome:
    if isinstance(outcome, SearchFailure) or all(math.isfinite(hit.score) for hit in outcome):
        return outcome
    return SearchFailure(kind=FailureKind.MALFORMED, reason="a score is not a finite number")
