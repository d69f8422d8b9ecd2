"""The trainer's client of the retriever: one request per query, so that each fails by itself."""

from __future__ import annotations

import asyncio
import time

from search_r1.search.remote import SERVICE, RemoteRetriever
from search_r1.search.retriever import FailureKind, Hit, SearchFailure
from serving.http import MAX_CONNECTIONS
from verl.errors import ServiceError
from verl.protocols import Page
from verl.types import Passage
from verl.utils.http import translated_calls, translated_settings

_POLL_S = 0.5
_PROBE = "ready?"
_RETRYABLE_KINDS = frozenset({FailureKind.DEADLINE, FailureKind.UNAVAILABLE})


class HttpSearch:
    """Search over HTTP. One per event loop. The server searches concurrent queries together."""

    def __init__(
        self,
        url: str,
        *,
        topk: int,
        timeout_s: float,
        token: str | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """`url`: of the server or of its `/retrieve`. `timeout_s`: of a search, with all its attempts.

        Raises ConfigError for a bad URL, timeout or token.
        """
        with translated_settings():
            if not timeout_s > 0:
                raise ValueError(f"timeout of the {SERVICE} must be more than 0 seconds, got {timeout_s}")
            self._remote = RemoteRetriever(url, token=token, max_connections=max_connections)
        self._topk = topk
        self._timeout_s = timeout_s

    async def search(self, query: str) -> tuple[Passage, ...]:
        """Return passages, best first; none when nothing was found. Raises ServiceError when it failed."""
        (outcome,) = await self._remote.search([query], topk=self._topk, timeout_s=self._timeout_s)
        if isinstance(outcome, SearchFailure):
            raise ServiceError(SERVICE, outcome.reason)
        return tuple(map(_make_passage, outcome))

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
        """Close all connections."""
        await self._remote.aclose()


def _make_passage(hit: Hit) -> Passage:
    document = hit.document
    return Passage(id=document.id, title=document.title, text=document.text, score=hit.score)
