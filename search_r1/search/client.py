"""The trainer's client of the retriever: concurrent queries share a request, and each fails by itself.

A request takes this client 5 ms of a core, whatever it holds, so simultaneous queries are sent together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from search_r1.search.remote import SERVICE, RemoteRetriever
from search_r1.search.retriever import FailureKind, Hit, Outcome, SearchFailure
from verl.errors import ServiceError
from verl.types import Passage
from verl.utils.http import translated_calls, translated_settings

_GATHER_S = 0.005
_POLL_S = 0.5
_PROBE = "ready?"
_CLOSED = SearchFailure(kind=FailureKind.UNAVAILABLE, reason="the client was closed")
_RETRYABLE_KINDS = frozenset({FailureKind.DEADLINE, FailureKind.UNAVAILABLE})


class HttpSearch:
    """Search over HTTP. One per event loop."""

    def __init__(self, url: str, *, topk: int, timeout_s: float, token: str | None = None) -> None:
        """`url`: of the server or of its `/retrieve`. `timeout_s`: of a search, with all its attempts.

        Raises ConfigError for a bad URL, timeout or token.
        """
        with translated_settings():
            if not timeout_s > 0:
                raise ValueError(f"timeout of the {SERVICE} must be more than 0 seconds, got {timeout_s}")
            self._remote = RemoteRetriever(url, token=token)
        self._topk = topk
        self._timeout_s = timeout_s
        self._waiting: dict[asyncio.Future[Outcome], str] = {}
        """Queries of the next request."""
        self._sending: set[asyncio.Task[None]] = set()

    async def search(self, query: str) -> tuple[Passage, ...]:
        """Return passages, best first; none when nothing was found. Raises ServiceError when it failed."""
        if not query.strip():
            return ()
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting[answer] = query
        if len(self._waiting) == 1:
            self._start(self._waiting)
        if len(self._waiting) == self._remote.max_batch:
            self._waiting = {}
        # Each caller waits for a future of its own: one that is cancelled leaves the others alone.
        outcome = await answer
        if isinstance(outcome, SearchFailure):
            raise ServiceError(SERVICE, outcome.reason)
        return tuple(map(_make_passage, outcome))

    async def wait_ready(self, deadline_s: float) -> None:
        """Return once the server answers a search.

        Raises ServiceError if that takes longer than `deadline_s`, and at once when waiting does not help (a
        wrong token, a key that its engine refuses). Uses no route that a published server does not have.
        """
        end = time.monotonic() + deadline_s
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
        """Fail the searches that run and close all connections."""
        self._waiting = {}
        for task in (sending := list(self._sending)):
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        await self._remote.aclose()

    def _start(self, batch: dict[asyncio.Future[Outcome], str]) -> None:
        task = asyncio.create_task(self._send_soon(batch))
        self._sending.add(task)

        def fail_unanswered(task: asyncio.Task[None]) -> None:
            # Not a `finally` in the task: one that is cancelled before its first step would not run it.
            self._sending.discard(task)
            _answer(batch, [_CLOSED] * len(batch))

        task.add_done_callback(fail_unanswered)

    async def _send_soon(self, batch: dict[asyncio.Future[Outcome], str]) -> None:
        await asyncio.sleep(_GATHER_S)
        if self._waiting is batch:
            self._waiting = {}
        queries = list(batch.values())
        _answer(batch, await self._remote.search(queries, topk=self._topk, timeout_s=self._timeout_s))


def _answer(batch: Iterable[asyncio.Future[Outcome]], outcomes: Sequence[Outcome]) -> None:
    """Answer the callers that still wait, one outcome each, in order."""
    for answer, outcome in zip(batch, outcomes, strict=True):
        if not answer.done():
            answer.set_result(outcome)


def _make_passage(hit: Hit) -> Passage:
    """Split `contents` after its first line, the title. Contents of one line are text without a title."""
    title, newline, text = hit.document.contents.partition("\n")
    if not newline:
        title, text = "", title
    return Passage(id=hit.document.id, title=title, text=text, score=hit.score)
