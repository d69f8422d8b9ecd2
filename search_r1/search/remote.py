"""A retriever behind HTTP: any server of the published wire format; pages only from ours.

A server is asked to answer what it can (`allow_failures`) and how long it may take (`timeout_s`): Search-R1's
ignores these keys.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from http import HTTPStatus

from pydantic import TypeAdapter, ValidationError

from search_r1.search.retriever import FailureKind, Hit, Outcome, SearchFailure
from search_r1.search.schema import (
    MAX_ID_CHARS,
    MAX_TIMEOUT_S,
    Document,
    Page,
    PageAnswer,
    PagePassage,
    ScoredDocument,
)
from serving.encoding import replace_surrogates
from serving.http import MAX_CONNECTIONS, WITHOUT_ROUTE, CallError, JsonService

SERVICE = "retriever"
_PATH, _PAGE_PATH = "/retrieve", "/page"
_MAX_REASON_CHARS = 300
_DIVIDED = frozenset({HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.INTERNAL_SERVER_ERROR})
"""Refusals that one query or the number of queries may cause, by servers without `allow_failures`."""
_HITS = TypeAdapter(list[ScoredDocument])


class RemoteRetriever:
    """A Retriever that asks a server. One per event loop."""

    max_batch = 256
    num_parallel_calls = 8
    num_passages = None

    def __init__(self, url: str, *, token: str | None = None, max_connections: int = MAX_CONNECTIONS) -> None:
        """Ask the server at `url`, or its `/retrieve`. Raises ValueError for a bad URL or token."""
        self._service = JsonService(
            url.rstrip("/").removesuffix(_PATH),
            name=SERVICE,
            timeout_s=1.0,  # every call has its own
            fix="start it with `bash retrieval_launch.sh` and check its URL",
            token=token,
            max_connections=max_connections,
        )

    def describe(self) -> Mapping[str, str | int | float | None]:
        """Return the URL."""
        return {"url": self._service.shown_url}

    async def fetch_description(self, *, timeout_s: float) -> dict[str, object] | None:
        """Return what the server's answers depend on; None from one without that route. Raises CallError."""
        try:
            return await self._service.get("/version", timeout_s=timeout_s)
        except CallError as error:
            if error.status in WITHOUT_ROUTE:
                return None
            raise

    async def open_page(self, page_id: str, *, part: int, part_chars: int, timeout_s: float) -> Page | None:
        """Return a part of a page; None for an unknown id. Raises CallError."""
        if len(page_id) > MAX_ID_CHARS:
            return None
        payload = {"id": _to_unicode(page_id), "part": part, "part_chars": part_chars}
        try:
            body = await self._service.post(_PAGE_PATH, payload, timeout_s=timeout_s)
            page = PageAnswer.model_validate(body).page
        except CallError as error:
            if error.status not in WITHOUT_ROUTE:
                raise
            url = self._service.shown_url
            reason = (
                f"{url} serves no pages; use the retriever of this project with a corpus: {error.message}"
            )
            raise CallError(SERVICE, reason, status=error.status) from error
        except ValidationError as invalid:
            reason = f"{self._service.shown_url}: the page is malformed: {_first_problem(invalid)}"
            raise CallError(SERVICE, reason) from invalid
        if page is None:
            return None
        pieces = [PagePassage(id=_to_unicode(p.id), text=_to_unicode(p.text)) for p in page.passages]
        return page.model_copy(update={"title": _to_unicode(page.title), "passages": pieces})

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        """Return one outcome per query, in order; a deadline that passes is a failure. Raises nothing."""
        # A lone surrogate would spoil the request of all the others.
        texts = [replace_surrogates(query) for query in queries]
        rows = [row for row, text in enumerate(texts) if text.strip()]
        outcomes: list[Outcome] = [()] * len(texts)
        if rows:
            deadline = time.monotonic() + timeout_s
            found = await self._search([texts[row] for row in rows], topk=topk, deadline=deadline)
            for row, outcome in zip(rows, found, strict=True):
                outcomes[row] = outcome
        return outcomes

    async def _search(self, queries: list[str], *, topk: int, deadline: float) -> list[Outcome]:
        """Search in one request; one that crashes, or is too large for the server, is divided in halves."""
        payload = partial(_make_payload, queries, topk)
        try:
            body = await self._service.post(_PATH, payload, timeout_s=deadline - time.monotonic())
            return read_outcomes(body, expected=len(queries), topk=topk, url=self._service.shown_url)
        except CallError as error:
            if error.status not in _DIVIDED or len(queries) == 1:
                return [SearchFailure(kind=_kind_of(error), reason=error.message)] * len(queries)
        half = len(queries) // 2
        first = await self._search(queries[:half], topk=topk, deadline=deadline)
        return first + await self._search(queries[half:], topk=topk, deadline=deadline)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._service.aclose()


def read_outcomes(body: Mapping[str, object], *, expected: int, topk: int, url: str) -> list[Outcome]:
    """Read one answer, published or ours. What cannot be read is a failure, of one query where possible.

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
        fields = error if isinstance(error, Mapping) else {"reason": error}
        name, reason = (str(fields.get(key))[:_MAX_REASON_CHARS] for key in ("kind", "reason"))
        kind = FailureKind(name) if name in set(FailureKind) else FailureKind.INTERNAL
        return SearchFailure(kind=kind, reason=f"{url}: {name}: {reason}")
    if hits is None:
        return _malformed("a result is null without an error", url=url)
    try:
        found = _HITS.validate_python(hits)
    except ValidationError as invalid:
        return _malformed(f"result.{_first_problem(invalid)}", url=url)
    if len(found) > topk:
        return _malformed(f"{len(found)} passages, asked for {topk}", url=url)
    return tuple(Hit(document=_clean(scored.document), score=scored.score) for scored in found)


def _first_problem(invalid: ValidationError) -> str:
    first = invalid.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _clean(document: Document) -> Document:
    return Document(id=_to_unicode(document.id), contents=_to_unicode(document.contents))


def _to_unicode(text: str) -> str:
    """Replace lone surrogates, which JSON can spell and no tokenizer can read, by U+FFFD."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _malformed(complaint: str, *, url: str) -> SearchFailure:
    return SearchFailure(kind=FailureKind.MALFORMED, reason=f"{url}: answer is malformed: {complaint}")


def _kind_of(error: CallError) -> FailureKind:
    if error.retryable:
        return FailureKind.DEADLINE
    if error.status is None:
        return FailureKind.MALFORMED
    return FailureKind.REFUSED if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else FailureKind.INTERNAL


def _make_payload(queries: Sequence[str], topk: int, left_s: float) -> dict[str, object]:
    """Return the request; the server's deadline is before ours, so that a partial answer arrives in time."""
    timeout_s = max(0.001, left_s - min(1.0, 0.1 * left_s))
    return {
        "queries": list(queries),
        "topk": topk,
        "return_scores": True,
        "allow_failures": True,
        "timeout_s": round(min(MAX_TIMEOUT_S, timeout_s), 3),
    }
