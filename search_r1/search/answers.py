"""From the outcomes of a request to its answer: the published shapes, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from search_r1.search.retriever import FailureKind, Hit, Outcome, SearchFailure

_MAX_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The answer to a whole request, one of whose queries failed."""

    status: int
    detail: str
    retry_after_s: int | None = None


# Clients ask again after 408, 429, 502, 503 and 504. What does not pass is final: 402 and 424.
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
    """Return the refusal for the first query that failed; None when all were answered."""
    failed = [(row, outcome) for row, outcome in enumerate(outcomes) if isinstance(outcome, SearchFailure)]
    if not failed:
        return None
    row, first = failed[0]
    query = queries[row]
    shown = query if len(query) <= _MAX_SHOWN_CHARS else query[:_MAX_SHOWN_CHARS] + "…"
    others = f" ({len(failed)} of {len(queries)} queries failed)" if len(queries) > 1 else ""
    return Refusal(
        status=_STATUS[first.kind],
        detail=_encode(f"query {row} {shown!r}: {first.kind}: {first.reason}{others}").decode("utf-8"),
        retry_after_s=_RETRY_AFTER_S.get(first.kind),
    )


def render_answer(outcomes: Sequence[Outcome], *, with_scores: bool, with_errors: bool) -> bytes:
    """Return the JSON of an answer; `with_errors` where failures are allowed."""
    render = _render_scored if with_scores else _render_bare
    # List by list: a thread that writes a large answer releases the interpreter in between.
    results = ",".join(
        "null" if isinstance(outcome, SearchFailure) else _dump([render(hit) for hit in outcome])
        for outcome in outcomes
    )
    errors = f',"errors":{_dump([_render_error(outcome) for outcome in outcomes])}' if with_errors else ""
    return _encode(f'{{"result":[{results}]{errors}}}')


def _encode(text: str) -> bytes:
    """Encode a text of a library or an engine, which may hold lone surrogates, that JSON cannot carry."""
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
