"""The agent loop's way to the retriever: gathers concurrent queries, and fails each by its own name."""

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
_BROKEN_OFF = SearchFailure(kind=FailureKind.INTERNAL, reason="the search was broken off")
_PASSING_KINDS = frozenset({FailureKind.DEADLINE, FailureKind.UNAVAILABLE})
"""Failures that waiting may mend."""


class _Batch:
    """Queries that travel in one request, and who waits for them."""

    def __init__(self, *, deadline: float) -> None:
        self.deadline = deadline
        """On the clock of `time.monotonic`; of its oldest query."""
        self.waiting: dict[str, list[asyncio.Future[Outcome]]] = {}
        self.sending: asyncio.Task[None] | None = None
        """Set once nobody can join any more."""

    def add(self, query: str) -> asyncio.Future[Outcome]:
        """Join those who wait for this query."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        future.add_done_callback(self._leave)
        self.waiting.setdefault(query, []).append(future)
        return future

    def close(self, *, sending: asyncio.Task[None] | None) -> list[str]:
        """Nobody joins from now on. The queries that somebody still waits for."""
        self.sending = sending
        self.waiting = {query: futures for query, futures in self.waiting.items() if _is_wanted(futures)}
        return list(self.waiting)

    def settle(self, outcomes: Iterable[Outcome]) -> None:
        """One outcome per query, in order."""
        for futures, outcome in zip(self.waiting.values(), outcomes, strict=True):
            for future in futures:
                if not future.done():
                    future.set_result(outcome)

    def _leave(self, _: asyncio.Future[Outcome]) -> None:
        """When nobody waits any more, the connection closes and the server can give the request up."""
        if self.sending is not None and not any(map(_is_wanted, self.waiting.values())):
            self.sending.cancel()


class HttpSearch:
    """Search over HTTP. Queries asked within 5 ms of each other share one request, equal ones an answer.

    One per event loop.
    """

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
        self._open: _Batch | None = None
        self._sending: set[asyncio.Task[None]] = set()

    async def search(self, query: str) -> tuple[Passage, ...]:
        """Best first; empty when nothing was found. Raises ServiceError when the search itself failed."""
        if not query.strip():
            return ()
        if self._open is None:
            self._open = self._start_batch()
        batch = self._open
        waiting = batch.add(query)
        if len(batch.waiting) >= self._remote.max_batch:
            self._open = None
        # Each waits for a future of its own: one cancelled episode leaves the searches of the others alone.
        outcome = await waiting
        if isinstance(outcome, SearchFailure):
            raise ServiceError(SERVICE, outcome.reason)
        return tuple(map(_make_passage, outcome))

    async def wait_ready(self, deadline_s: float) -> None:
        """Return once the server answers a search.

        Raises ServiceError if that takes longer than `deadline_s`, and at once when waiting does not help (a
        wrong token, a key that its engine refuses). Asks what any server of this wire format answers, not a
        health route of ours.
        """
        end = time.monotonic() + deadline_s
        while True:
            left_s = max(0.001, end - time.monotonic())
            (outcome,) = await self._remote.search([_PROBE], topk=self._topk, timeout_s=left_s)
            # Who replays recorded searches need not have recorded this one.
            if not isinstance(outcome, SearchFailure) or outcome.kind is FailureKind.NOT_RECORDED:
                return
            if outcome.kind not in _PASSING_KINDS or time.monotonic() + _POLL_S >= end:
                raise ServiceError(SERVICE, outcome.reason)
            await asyncio.sleep(_POLL_S)

    async def describe(self) -> dict[str, object] | None:
        """What the server's answers depend on; None from one that does not say. Raises ServiceError."""
        with translated_calls():
            return await self._remote.fetch_description(timeout_s=self._timeout_s)

    async def aclose(self) -> None:
        """Stop what is under way and close all connections."""
        self._open = None
        for task in (sending := list(self._sending)):
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        await self._remote.aclose()

    def _start_batch(self) -> _Batch:
        batch = _Batch(deadline=time.monotonic() + self._timeout_s)
        task = asyncio.create_task(self._send_soon(batch))
        self._sending.add(task)

        def leave_nobody_waiting(task: asyncio.Task[None]) -> None:
            # After a defect, or when this client is closed. A task that never started has no `finally`.
            self._sending.discard(task)
            batch.settle([_BROKEN_OFF] * len(batch.waiting))

        task.add_done_callback(leave_nobody_waiting)
        return batch

    async def _send_soon(self, batch: _Batch) -> None:
        await asyncio.sleep(_GATHER_S)
        if self._open is batch:
            self._open = None
        if queries := batch.close(sending=asyncio.current_task()):
            left_s = batch.deadline - time.monotonic()
            batch.settle(await self._remote.search(queries, topk=self._topk, timeout_s=left_s))


def _is_wanted(futures: Sequence[asyncio.Future[Outcome]]) -> bool:
    return not all(future.done() for future in futures)


def _make_passage(hit: Hit) -> Passage:
    """Split `contents` after its first line, the title. Contents of one line have none: all of it is text."""
    title, newline, text = hit.document.contents.partition("\n")
    if not newline:
        title, text = "", title
    return Passage(id=hit.document.id, title=title, text=text, score=hit.score)
