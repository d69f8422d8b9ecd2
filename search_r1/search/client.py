"""The agent loop's way to the retriever: gathers concurrent queries, checks every answer, fails by name."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from pydantic import ValidationError

from search_r1.search.schema import Document, ScoredAnswer
from verl.errors import ServiceError
from verl.types import Passage
from verl.utils.http import JsonService

_NAME = "retriever"
_FIX = "start it with `bash retrieval_launch.sh` and check retriever.url"
_GATHER_S = 0.005
_MAX_QUERIES = 256


@dataclass(slots=True)
class _Batch:
    """Queries that travel in one request."""

    queries: list[str] = field(default_factory=list)
    answer: asyncio.Task[list[tuple[Passage, ...]]] | None = None


class HttpSearch:
    """Search over HTTP. Queries asked within 5 ms of each other share one request. One per event loop."""

    def __init__(self, url: str, *, topk: int, timeout_s: float) -> None:
        """`url`: of the server or of its `/retrieve`. `timeout_s`: of a search, with all its attempts."""
        self._url = url.rstrip("/").removesuffix("/retrieve")
        self._topk = topk
        self._service = JsonService(self._url, name=_NAME, timeout_s=timeout_s, fix=_FIX)
        self._open: _Batch | None = None

    async def search(self, query: str) -> tuple[Passage, ...]:
        """Best first; empty when nothing was found. Raises ServiceError when the search itself failed."""
        if not query.strip():
            return ()
        if self._open is None:
            self._open = _Batch()
            self._open.answer = asyncio.create_task(self._send_soon(self._open))
            # When a run is stopped, nobody may be left to ask for the outcome: that is no error.
            self._open.answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())
        batch = self._open
        position = len(batch.queries)
        # Lone surrogates have no UTF-8 form and would spoil the request of all the others.
        batch.queries.append(query.encode("utf-8", "replace").decode("utf-8"))
        if len(batch.queries) == _MAX_QUERIES:
            self._open = None
        assert batch.answer is not None
        # Shielded: one cancelled episode must not take the searches of the others with it.
        return (await asyncio.shield(batch.answer))[position]

    async def wait_ready(self, deadline_s: float) -> None:
        """Return once a search is answered; ServiceError if that takes longer than `deadline_s`.

        Asks what any server of this wire format answers, not a health route of ours.
        """
        probe = JsonService(self._url, name=_NAME, timeout_s=deadline_s, fix=_FIX)
        try:
            await self._retrieve(["ready?"], service=probe)
        finally:
            await probe.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._service.aclose()

    async def _send_soon(self, batch: _Batch) -> list[tuple[Passage, ...]]:
        await asyncio.sleep(_GATHER_S)
        if self._open is batch:
            self._open = None
        return await self._retrieve(batch.queries, service=self._service)

    async def _retrieve(self, queries: list[str], *, service: JsonService) -> list[tuple[Passage, ...]]:
        payload = {"queries": queries, "topk": self._topk, "return_scores": True}
        body = await service.post("/retrieve", payload)
        try:
            found = ScoredAnswer.model_validate(body).result
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ServiceError(
                _NAME, f"{self._url}: answer is malformed at {where}: {first['msg']}"
            ) from error
        if len(found) != len(queries):
            problem = f"{len(queries)} queries were answered by {len(found)} lists"
            raise ServiceError(_NAME, f"{self._url}: answer is malformed: {problem}")
        longest = max(len(hits) for hits in found)
        if longest > self._topk:
            raise ServiceError(_NAME, f"{self._url}: answer has {longest} passages, asked for {self._topk}")
        return [tuple(_make_passage(hit.document, score=hit.score) for hit in hits) for hits in found]


def _make_passage(document: Document, *, score: float) -> Passage:
    title, _, text = document.contents.partition("\n")
    return Passage(id=document.id, title=title, text=text, score=score)
