"""An online engine as a Retriever: typed outcomes, record and replay, a limit of requests; and a mock."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from search_r1.search.errors import RetrieverError
from search_r1.search.online.engines import (
    ENGINES,
    MAX_QUERY_CHARS,
    MAX_RESULTS,
    PAGE_SIZE,
    Engine,
    EngineError,
    make_document,
    read_answer,
)
from search_r1.search.online.options import ANY_DATE, ENGINE_NAMES, MOCK, OnlineMode, OnlineOptions
from search_r1.search.online.store import AnswerKey, OnlineStore, normalize_query, today
from search_r1.search.online.transport import Transport
from search_r1.search.retriever import FailureKind, Found, Hit, Outcome, Retriever, SearchFailure
from search_r1.search.schema import Document

logger = logging.getLogger(__name__)


def open_online(name: str, *, options: OnlineOptions) -> Retriever:
    """Open one of ENGINE_NAMES. Raises RetrieverError for a missing key or file."""
    if name not in ENGINE_NAMES:
        raise RetrieverError(f"no online engine {name!r}; expected one of {', '.join(ENGINE_NAMES)}")
    if options.mock or name == MOCK:
        logger.warning("MOCK SEARCH in place of %s: every document is made up from its query", name)
        return MockRetriever(engine=name)
    engine, replays = ENGINES[name], options.mode is OnlineMode.REPLAY
    transport = None
    if not replays:
        if missing := [variable for variable in engine.key_variables if variable not in options.keys]:
            raise RetrieverError(
                f"--retriever_name {name} needs {' and '.join(missing)} in the environment; set it, or try "
                "without one by --mock_search"
            )
        url = options.url or engine.url
        transport = Transport(
            engine,
            url=url,
            keys=options.keys,
            proxy=options.proxy_for(url),
            max_connections=options.num_parallel_calls,
        )
    store = OnlineStore(options.cache_path, read_only=replays) if options.cache_path else None
    logger.info("online engine %s, mode %s, file %s", name, options.mode, options.cache_path or "none")
    return OnlineRetriever(engine, options=options, store=store, transport=transport)


class OnlineRetriever:
    """Asks one engine, or its recording. The score of a hit is 1 / rank: engines publish none.

    A query that needs several pages fails as a whole when one of them does. Every attempt is counted before
    it is sent, also one that fails.
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
        """Take `transport`, None in a replay, and `store`, None when nothing is recorded or counted."""
        self.num_parallel_calls = options.num_parallel_calls
        self._engine = engine
        self._options = options
        self._store = store
        self._transport = transport
        self._source = engine.name if options.url is None else f"{engine.name}@{options.url}"
        self._is_closed = False

    def describe(self) -> Mapping[str, str | int | float | None]:
        """Return what the answers depend on."""
        options = self._options
        return {
            "retriever": self._engine.name,
            "url": options.url or self._engine.url,
            "mode": options.mode.value,
            "date": self._date if options.mode is not OnlineMode.LIVE else None,
            "recording": options.cache_path.name if options.cache_path else None,
            "max_requests": options.max_requests,
        }

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        """Search with one request per query and started ten of `topk`; at most 100 hits per query."""
        deadline = time.monotonic() + timeout_s
        try:
            async with asyncio.TaskGroup() as group:  # after a defect no other search goes on
                searches = [
                    group.create_task(self._search_one(query, topk=topk, deadline=deadline))
                    for query in queries
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [search.result() for search in searches]

    async def aclose(self) -> None:
        """Close connections and file; log how many requests were counted."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._transport is not None:
            await self._transport.aclose()
        if self._store is not None:
            if self._transport is not None:
                logger.info("%s: %d requests so far", self._engine.name, await self._store.num_requests())
            await self._store.aclose()

    async def _search_one(self, query: str, *, topk: int, deadline: float) -> Outcome:
        text = normalize_query(query)[:MAX_QUERY_CHARS].rstrip()
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
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                recorded = await self._store.find(key)
        except TimeoutError:
            raise EngineError(FailureKind.DEADLINE, "the recording was not read in time") from None
        if recorded is not None:
            return recorded
        if self._options.mode is OnlineMode.REPLAY:
            raise EngineError(
                FailureKind.NOT_RECORDED,
                f"no answer to {query!r} with topk {topk} by {key.source}, date {key.date}, in "
                f"{self._store.path.name}; record it with --online_mode record, or try another --online_date",
            )
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
        body = await self._transport.ask(call, timeout_s=left_s, count=self._count_request)
        return read_answer(self._engine, body)

    async def _count_request(self) -> None:
        limit = self._options.max_requests
        if self._store is not None and not await self._store.count_request(limit=limit):
            raise EngineError(
                FailureKind.QUOTA,
                f"--max_online_requests {limit} is reached by what {self._store.path.name} has counted; "
                "raise it to go on",
            )


class MockRetriever:
    """A search engine that makes its results up from the query; every document says so.

    It needs no network and no key, and always gives the same answer.
    """

    max_batch = 256
    num_parallel_calls = 16
    num_passages: int | None = None

    def __init__(self, *, engine: str) -> None:
        """Take `engine`, the name that was asked for."""
        self._engine = engine

    def describe(self) -> Mapping[str, str | int | float | None]:
        """Return what it stands in for."""
        return {"retriever": "mock", "stands_in_for": self._engine}

    async def search(
        self,
        queries: Sequence[str],
        *,
        topk: int,
        timeout_s: float,  # noqa: ARG002 - takes no time
    ) -> list[Outcome]:
        """Make the results of every query up."""
        return [_make_up(normalize_query(query), topk=min(topk, MAX_RESULTS)) for query in queries]

    async def aclose(self) -> None:
        """Do nothing: there is nothing to close."""


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
