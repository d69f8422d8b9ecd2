"""An online engine as a Retriever: typed outcomes, record and replay, spend cap."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from search_r1.search.errors import RetrieverError
from search_r1.search.online.engines import (
    MAX_QUERY_CHARS,
    MAX_RESULTS,
    PAGE_SIZE,
    Engine,
    EngineError,
    read_answer,
)
from search_r1.search.online.options import OnlineMode, OnlineOptions
from search_r1.search.online.store import (
    ANY_DATE,
    NANO,
    AnswerKey,
    CapReachedError,
    OnlineStore,
    normalise_query,
    today,
)
from search_r1.search.online.transport import Transport
from search_r1.search.retriever import FailureKind, Found, Hit, Outcome, SearchFailure
from search_r1.search.schema import Document

logger = logging.getLogger(__name__)

T = TypeVar("T")


class OnlineRetriever:
    """Asks one engine, or its recording. The score of a hit is 1 / rank: engines publish none.

    A query that needs several pages fails as a whole when one of them does. Charged is every attempt,
    before it is sent; taken back is only what never got a connection. Engines that do not bill refusals
    therefore bill less than is counted, never more.
    """

    max_batch = 1
    num_passages: int | None = None

    def __init__(
        self,
        engine: Engine,
        *,
        options: OnlineOptions,
        store: OnlineStore | None,
        transport: Transport | None,
    ) -> None:
        """`transport` is None in a replay, `store` is None when nothing is recorded or counted."""
        self.num_parallel_calls = options.num_parallel_calls
        self._engine = engine
        self._options = options
        self._store = store
        self._transport = transport
        self._source = engine.name if options.url is None else f"{engine.name}@{options.url}"
        price = options.price_of(engine)
        self._price = 0 if price is None else round(price * NANO / 1000)
        cap = options.spend_cap_usd
        self._cap = None if cap is None else round(cap * NANO)
        self._running: set[asyncio.Task[Outcome]] = set()
        self._is_closed = False

    def describe(self) -> Mapping[str, str | int | float | None]:
        options = self._options
        return {
            "retriever": self._engine.name,
            "url": options.url or self._engine.url,
            "mode": options.mode.value,
            "date": self._date if options.mode is not OnlineMode.LIVE else None,
            "recording": options.cache_path.name if options.cache_path else None,
            "spend_cap_usd": options.spend_cap_usd,
            "price_per_1000_usd": options.price_of(self._engine),
        }

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        """One request per query and started ten of `topk`; pages may be short, and nothing is past 100."""
        if self._is_closed:
            raise RetrieverError(f"{self._engine.name}: the retriever is closed; open another one")
        deadline = time.monotonic() + timeout_s
        tasks = [
            asyncio.create_task(self._search_one(query, topk=topk, deadline=deadline)) for query in queries
        ]
        self._running.update(tasks)
        try:
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self._running.difference_update(tasks)
        return [self._read_end(end) for end in ends]

    def _read_end(self, end: Outcome | BaseException) -> Outcome:
        if isinstance(end, asyncio.CancelledError):
            return self._fail(FailureKind.UNAVAILABLE, "stopped, because the retriever was closed")
        if isinstance(end, BaseException):
            raise end
        return end

    async def aclose(self) -> None:
        """Stop what runs, close connections and file; say what was spent."""
        if self._is_closed:
            return
        self._is_closed = True
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._transport is not None:
            await self._transport.aclose()
        if self._store is not None:
            if self._transport is not None:
                logger.info("%s: charged so far: %s", self._engine.name, await self._store.spending())
            await self._store.aclose()

    async def _search_one(self, query: str, *, topk: int, deadline: float) -> Outcome:
        text = normalise_query(query)[:MAX_QUERY_CHARS].rstrip()
        if not text:
            return ()
        try:
            return await self._look_up_or_ask(text, topk=topk, deadline=deadline)
        except EngineError as error:
            return self._fail(error.kind, error.reason)
        except sqlite3.Error as error:
            assert self._store is not None
            return self._fail(FailureKind.INTERNAL, f"--online_cache {self._store.path.name}: {error}")

    def _fail(self, kind: FailureKind, reason: str) -> SearchFailure:
        if self._transport is not None:
            reason = self._transport.hide(reason)
        return SearchFailure(kind=kind, reason=f"{self._engine.name}: {reason}")

    async def _look_up_or_ask(self, query: str, *, topk: int, deadline: float) -> Found:
        if self._options.mode is OnlineMode.LIVE:
            return await self._ask(query, topk=topk, deadline=deadline)
        assert self._store is not None
        key = AnswerKey(source=self._source, query=query, topk=topk, date=self._date)
        recorded = await _before(deadline, self._store.find(key))
        if recorded is not None:
            return recorded
        if self._options.mode is OnlineMode.REPLAY:
            asked = f"{query!r} with topk {topk} by {key.source}, date {key.date},"
            fix = "record it with --online_mode record, or choose another --online_date"
            reason = f"no answer to {asked} in {self._store.path.name}; {fix}"
            raise EngineError(FailureKind.NOT_RECORDED, reason)
        hits = await self._ask(query, topk=topk, deadline=deadline)
        day = today() if key.date == ANY_DATE else key.date
        return await self._store.keep(replace(key, date=day), hits)

    @property
    def _date(self) -> str:
        if self._options.date is not None:
            return self._options.date
        return ANY_DATE if self._options.mode is OnlineMode.REPLAY else today()

    async def _ask(self, query: str, *, topk: int, deadline: float) -> Found:
        wanted = min(topk, MAX_RESULTS)
        documents: dict[str, Document] = {}
        for start in range(0, wanted, PAGE_SIZE):
            page = await self._ask_page(query, start=start, deadline=deadline)
            for document in page:
                documents.setdefault(document.id, document)
            # A page may be short of ten and not be the last: other kinds of results take places.
            if not page:
                break
        best = list(documents.values())[:wanted]
        return tuple(Hit(document=document, score=1.0 / rank) for rank, document in enumerate(best, 1))

    async def _ask_page(self, query: str, *, start: int, deadline: float) -> list[Document]:
        assert self._transport is not None
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise EngineError(FailureKind.DEADLINE, "not asked: no time was left")
        call = self._engine.make_call(query, start)
        body = await self._transport.ask(call, timeout_s=left_s, charge=self._charge, refund=self._refund)
        return read_answer(self._engine, body)

    async def _charge(self) -> None:
        if self._store is None:
            return
        try:
            await self._store.charge(self._engine.name, price=self._price, cap=self._cap)
        except CapReachedError as error:
            cap = f"--spend_cap_usd {self._options.spend_cap_usd:g}"
            reason = f"our own spend cap is reached: {error} were charged, and {cap} leaves no other request"
            raise EngineError(FailureKind.QUOTA, f"{reason}; raise it to go on") from None

    async def _refund(self) -> None:
        if self._store is not None:
            await self._store.refund(self._engine.name, price=self._price)


async def _before(deadline: float, work: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await work
    except TimeoutError:
        raise EngineError(FailureKind.DEADLINE, "the recording was not read in time") from None
