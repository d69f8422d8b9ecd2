"""A retriever behind HTTP: any server of the published wire format, asked so that one query fails alone.

What was asked is answered by one outcome per query. A server of ours is told to answer what it can
(`allow_failures`) and how long it may take (`timeout_s`); one that knows neither key is asked without them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial
from http import HTTPStatus

from pydantic import TypeAdapter, ValidationError

from search_r1.search.retriever import FailureKind, Found, Hit, Outcome, SearchFailure
from search_r1.search.schema import MAX_TIMEOUT_S, Document, ScoredDocument
from serving.http import CallError, JsonService

SERVICE = "retriever"
_START = "start it with `bash retrieval_launch.sh` and check its URL"
_PATH = "/retrieve"
_MAX_QUERIES = 256
_MAX_CALLS = 8
_MAX_DIVISIONS = 32
"""Requests of a call that may be asked again in halves: enough to find a few bad queries among 256."""
_MAX_REASON_CHARS = 300
_REFUSALS_OF_KEYS = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY})
_REFUSALS_OF_ONE = _REFUSALS_OF_KEYS | {
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""A whole request may be refused for its size or for one query of it."""
_WITHOUT_ROUTE = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED})
_HITS = TypeAdapter(list[ScoredDocument])


class RemoteRetriever:
    """Implements `Retriever`. One per event loop."""

    num_parallel_calls = _MAX_CALLS
    num_passages = None

    def __init__(self, url: str, *, token: str | None = None) -> None:
        """`url`: of the server or of its `/retrieve`. Raises ValueError for a bad URL or token."""
        self.max_batch = _MAX_QUERIES
        """Less once the server has said that a request was too large."""
        self._service = JsonService(
            url.rstrip("/").removesuffix(_PATH),
            name=SERVICE,
            timeout_s=1.0,  # every call names its own
            fix=_START,
            token=token,
        )
        self._knows_our_keys: bool | None = None

    @property
    def url(self) -> str:
        """For messages."""
        return self._service.shown_url

    def describe(self) -> Mapping[str, str | int | float | None]:
        return {"url": self.url}

    async def fetch_description(self, *, timeout_s: float) -> dict[str, object] | None:
        """What the server's answers depend on; None from one that does not say. Raises CallError."""
        try:
            return await self._service.get("/version", timeout_s=timeout_s)
        except CallError as error:
            if error.status in _WITHOUT_ROUTE:
                return None
            raise

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        """One outcome per query, in order; what is not known by the deadline is a failure. Raises nothing."""
        # Lone surrogates have no UTF-8 form and would spoil the request of all the others.
        texts = [query.encode("utf-8", "replace").decode("utf-8") for query in queries]
        asked = [row for row, text in enumerate(texts) if text.strip()]
        outcomes: list[Outcome] = [()] * len(texts)
        if asked:
            call = _Call(self, topk=topk, deadline=time.monotonic() + timeout_s)
            for row, outcome in zip(asked, await call.ask([texts[row] for row in asked]), strict=True):
                outcomes[row] = outcome
        return outcomes

    async def aclose(self) -> None:
        """Close all connections."""
        await self._service.aclose()

    async def post(self, queries: Sequence[str], *, topk: int, deadline: float) -> dict[str, object]:
        """The body of one answer. Raises CallError."""
        bare: dict[str, object] = {"queries": list(queries), "topk": topk, "return_scores": True}

        async def send(*, with_our_keys: bool) -> dict[str, object]:
            payload = partial(_add_our_keys, bare) if with_our_keys else bare
            return await self._service.post(_PATH, payload, timeout_s=deadline - time.monotonic())

        if self._knows_our_keys is False:
            return await send(with_our_keys=False)
        try:
            body = await send(with_our_keys=True)
        except CallError as error:
            if self._knows_our_keys or error.status not in _REFUSALS_OF_KEYS:
                raise
            body = await send(with_our_keys=False)
            self._knows_our_keys = False
            return body
        self._knows_our_keys = True
        return body


class _Call:
    """The requests that one call of `search` takes."""

    def __init__(self, remote: RemoteRetriever, *, topk: int, deadline: float) -> None:
        self._remote = remote
        self._topk = topk
        self._deadline = deadline
        self._divisions_left = _MAX_DIVISIONS

    async def ask(self, queries: list[str]) -> list[Outcome]:
        try:
            body = await self._remote.post(queries, topk=self._topk, deadline=self._deadline)
        except CallError as error:
            if error.status not in _REFUSALS_OF_ONE or len(queries) == 1 or not self._divisions_left:
                return [SearchFailure(kind=_kind_of(error), reason=error.message)] * len(queries)
            if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                self._remote.max_batch = min(self._remote.max_batch, (len(queries) + 1) // 2)
            self._divisions_left -= 1
            half = (len(queries) + 1) // 2
            parts = await asyncio.gather(self.ask(queries[:half]), self.ask(queries[half:]))
            return [outcome for part in parts for outcome in part]
        return read_outcomes(body, expected=len(queries), topk=self._topk, url=self._remote.url)


def read_outcomes(body: Mapping[str, object], *, expected: int, topk: int, url: str) -> list[Outcome]:
    """Outcomes of one answer, published or ours. What cannot be read is a failure, of one query where it can.

    A query has failed when its entry of `errors` says so or its entry of `result` is null: only an empty
    list found nothing.
    """
    result, errors = body.get("result"), body.get("errors")
    if errors is None:
        errors = [None] * expected
    if not isinstance(result, list) or not isinstance(errors, list):
        complaint = f"expected a list 'result', got the keys {sorted(body)}"
    elif not len(result) == len(errors) == expected:
        complaint = f"{expected} queries were answered by {len(result)} lists and {len(errors)} errors"
    else:
        parts = zip(result, errors, strict=True)
        return [_read_outcome(hits, error, topk=topk, url=url) for hits, error in parts]
    return [_malformed(complaint, url=url)] * expected


def _read_outcome(hits: object, error: object, *, topk: int, url: str) -> Outcome:
    if error is not None:
        return _read_failure(error, url=url)
    if hits is None:
        return _malformed("a result is null without an error", url=url)
    try:
        found = _HITS.validate_python(hits)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False)[0]
        where = ".".join(("result", *map(str, first["loc"])))
        return _malformed(f"{where}: {first['msg']}", url=url)
    if len(found) > topk:
        return _malformed(f"{len(found)} passages, asked for {topk}", url=url)
    return _to_hits(found)


def _to_hits(found: Sequence[ScoredDocument]) -> Found:
    return tuple(
        Hit(
            document=Document(id=_whole(scored.document.id), contents=_whole(scored.document.contents)),
            score=scored.score,
        )
        for scored in found
    )


def _whole(text: str) -> str:
    """JSON can spell half a character, which no tokenizer can read: it is shown as U+FFFD."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _read_failure(error: object, *, url: str) -> SearchFailure:
    fields = error if isinstance(error, Mapping) else {"reason": error}
    name, reason = (str(fields.get(key))[:_MAX_REASON_CHARS] for key in ("kind", "reason"))
    kind = FailureKind(name) if name in set(FailureKind) else FailureKind.INTERNAL
    return SearchFailure(kind=kind, reason=f"{url}: {name}: {reason}")


def _malformed(complaint: str, *, url: str) -> SearchFailure:
    return SearchFailure(kind=FailureKind.MALFORMED, reason=f"{url}: answer is malformed: {complaint}")


def _kind_of(error: CallError) -> FailureKind:
    if error.retryable:
        return FailureKind.DEADLINE
    if error.status is None:
        return FailureKind.MALFORMED
    return FailureKind.REFUSED if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else FailureKind.INTERNAL


def _add_our_keys(bare: Mapping[str, object], left_s: float) -> dict[str, object]:
    """The server's deadline lies before ours, so that an answer in parts arrives in time."""
    timeout_s = max(0.001, left_s - min(1.0, 0.1 * left_s))
    return {**bare, "allow_failures": True, "timeout_s": round(min(MAX_TIMEOUT_S, timeout_s), 3)}
