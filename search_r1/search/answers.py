"""From the outcomes of a request to its answer: the published shapes, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from search_r1.search.retriever import FailureKind, Hit, Outcome, SearchFailure

_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What a whole request is told because one of its queries has no answer."""

    status: int
    detail: str
    retry_after_s: int | None = None


# Clients ask again after 408, 429, 502, 503 and 504. What will be no other for that is final: 402 and 424.
_STATUS = {
    FailureKind.DEADLINE: 504,
    FailureKind.UNAVAILABLE: 503,
    FailureKind.QUOTA: 402,
    FailureKind.REFUSED: 424,
    FailureKind.MALFORMED: 502,
    FailureKind.NOT_RECORDED: 424,
    FailureKind.INTERNAL: 500,
}
_RETRY_AFTER_S = {FailureKind.UNAVAILABLE: 5}


def find_refusal(outcomes: Sequence[Outcome], *, queries: Sequence[str]) -> Refusal | None:
    """Of the first query that failed; None when all were answered."""
    failed = [row for row, outcome in enumerate(outcomes) if isinstance(outcome, SearchFailure)]
    if not failed:
        return None
    first = outcomes[failed[0]]
    assert isinstance(first, SearchFailure)
    query = queries[failed[0]]
    shown = query if len(query) <= _SHOWN_CHARS else query[:_SHOWN_CHARS] + "…"
    others = f" ({len(failed)} of {len(queries)} queries failed)" if len(queries) > 1 else ""
    return Refusal(
        status=_STATUS[first.kind],
        detail=_encode(f"query {failed[0]} {shown!r}: {first.kind}: {first.reason}{others}").decode("utf-8"),
        retry_after_s=_RETRY_AFTER_S.get(first.kind),
    )


def render_answer(outcomes: Sequence[Outcome], *, with_scores: bool, with_errors: bool) -> bytes:
    """The JSON of an answer; `with_errors` where failures are allowed."""
    render = _render_scored if with_scores else _render_bare
    # List by list: whoever writes a large answer in a thread lets others have turns in between.
    results = ",".join(
        "null" if isinstance(outcome, SearchFailure) else _dump([render(hit) for hit in outcome])
        for outcome in outcomes
    )
    errors = ""
    if with_errors:
        errors = f',"errors":{_dump([_render_error(outcome) for outcome in outcomes])}'
    return _encode(f'{{"result":[{results}]{errors}}}')


def _encode(text: str) -> bytes:
    """A library's message or an engine's text may hold half a character, which no JSON can carry."""
    return text.encode("utf-8", "replace")


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _render_error(outcome: Outcome) -> dict[str, object] | None:
    if not isinstance(outcome, SearchFailure):
        return None
    return {"kind": outcome.kind, "reason": outcome.reason}


def _render_bare(hit: Hit) -> dict[str, object]:
    return {"id": hit.document.id, "contents": hit.document.contents}


def _render_scored(hit: Hit) -> dict[str, object]:
    return {"document": _render_bare(hit), "score": hit.score}
