"""The trainer's client of the retriever: simultaneous queries share a request, and each fails by itself."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

from search_r1.search.remote import SERVICE, RemoteRetriever
from search_r1.search.retriever import FailureKind, Hit, Outcome, SearchFailure
from serving.http import MAX_CONNECTIONS
from verl.errors import ServiceError
from verl.protocols import Page
from verl.types import Passage
from verl.utils.http import translated_calls, translated_settings

_POLL_S = 0.5
_GRACE_S = 0.5
"""A request that takes too long says why itself; this is for a query that shares one with later queries."""
_PROBE = "ready?"
_RETRYABLE_KINDS = frozenset({FailureKind.DEADLINE, FailureKind.UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A query that is not sent yet."""

    query: str
    deadline: float
    outcome: asyncio.Future[Outcome]


class HttpSearch:
    """Search over HTTP. One per event loop.

    Queries that come in the same round of the event loop, or while all connections are busy, go together:
    the processor time of a request is the same for any number of queries.
    """

    def __init__(
        self,
        url: str,
        *,
        topk: int,
        timeout_s: float,
        token: str | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """Ask the server at `url`, or its `/retrieve`. `timeout_s`: of a search, with all its attempts.

        Raises ConfigError for a bad URL, timeout or token.
        """
        with translated_settings():
            if not timeout_s > 0:
                raise ValueError(f"timeout of the {SERVICE} must be more than 0 seconds, got {timeout_s}")
            self._remote = RemoteRetriever(url, token=token, max_connections=max_connections)
        self._topk = topk
        self._timeout_s = timeout_s
        self._max_requests = max_connections
        self._waiting: deque[_Waiting] = deque()
        self._num_requests = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def search(self, query: str) -> tuple[Passage, ...]:
        """Return passages, best first; none when nothing was found. Raises ServiceError when it failed."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(query, time.monotonic() + self._timeout_s, future))
        if len(self._waiting) == 1 and self._num_requests < self._max_requests:
            self._num_requests += 1
            task = asyncio.create_task(self._send())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            async with asyncio.timeout(self._timeout_s + _GRACE_S):
                outcome = await future
        except TimeoutError as error:
            url = self._remote.describe()["url"]
            raise ServiceError(SERVICE, f"{url}: no answer within {self._timeout_s:g} s") from error
        if isinstance(outcome, SearchFailure):
            raise ServiceError(SERVICE, outcome.reason)
        return tuple(map(_make_passage, outcome))

    async def _send(self) -> None:
        """Search what waits until nothing does, as many queries in each request as it takes."""
        try:
            while self._waiting:
                size = min(len(self._waiting), self._remote.max_batch)
                batch = [self._waiting.popleft() for _ in range(size)]
                # The newest has the latest deadline: with an earlier one it would fail before its time.
                outcomes = await self._remote.search(
                    [each.query for each in batch],
                    topk=self._topk,
                    timeout_s=max(0.001, batch[-1].deadline - time.monotonic()),
                )
                for each, outcome in zip(batch, outcomes, strict=True):
                    if not each.outcome.done():  # its episode may have ended meanwhile
                        each.outcome.set_result(outcome)
        finally:
            self._num_requests -= 1

    async def open_page(self, page_id: str, *, part: int, part_chars: int, timeout_s: float) -> Page | None:
        """Return a part of the page that a passage is on; None for an unknown id. Raises ServiceError."""
        with translated_calls():
            page = await self._remote.open_page(
                page_id, part=part, part_chars=part_chars, timeout_s=timeout_s
            )
        if page is None:
            return None
        pieces = [Passage(id=p.id, title=page.title, text=p.text, score=0.0) for p in page.passages]
        return Page(title=page.title, part=page.part, num_parts=page.num_parts, passages=tuple(pieces))

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once the server answers a search.

        Raises ServiceError if that takes longer than `timeout_s`, and at once when waiting does not help (a
        wrong token, a key that its engine refuses). Uses no route that a published server does not have.
        """
        end = time.monotonic() + timeout_s
        while True:
            left_s = max(0.001, end - time.monotonic())
            (outcome,) = await self._remote.search([_PROBE], topk=self._topk, timeout_s=left_s)
            # A replay of recorded searches need not have recorded this one.
            if not isinstance(outcome, SearchFailure) or outcome.kind is FailureKind.NOT_RECORDED:
                return
            if outcome.kind not in _RETRYABLE_KINDS or time.monotonic() + _POLL_S >= end:
                raise ServiceError(SERVICE, outcome.reason)
            await asyncio.sleep(_POLL_S)

    async def describe(self) -> dict[str, object] | None:
        """Return what the server's answers depend on, None where that is unknown. Raises ServiceError."""
        with translated_calls():
            return await self._remote.fetch_description(timeout_s=self._timeout_s)

    async def aclose(self) -> None:
        """Close all connections."""
        for task in self._tasks:
            task.cancel()
        await self._remote.aclose()


def _make_passage(hit: Hit) -> Passage:
    document = hit.document
    return Passage(id=document.id, title=document.title, text=document.text, score=hit.score)
