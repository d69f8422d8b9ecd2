"""What the OpenAPI document says beside the models: the service in a few words and every refusal."""

from __future__ import annotations

from typing import Any

from fastapi import Security
from fastapi.params import Depends
from fastapi.security import HTTPBearer

from IG.service.schema import ErrorResponse, InvalidResponse

DESCRIPTION = """
The service samples short answers to a question with a context and without it, groups them by meaning, and
returns how much the belief in the accepted answers grew.

* `null` is not 0: an item that failed has a `null` score and its error; leave it out.
* The same item gets the same score alone and among others; what items have in common is done once.
* A caller who goes away cancels what nobody else waits for.
* 429 and 503 carry `Retry-After`, in seconds.
"""

_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_REFUSALS: dict[int, tuple[str, str]] = {
    400: (
        "The body is no text that can be read.",
        "the body cannot be read: 'utf-8' codec can't decode byte 0xff in position 11: invalid start byte",
    ),
    401: (
        "The bearer token is missing or wrong.",
        "a bearer token is needed: send it as 'Authorization: Bearer TOKEN'",
    ),
    408: (
        "The body did not arrive in time.",
        "the body was not there after 60 s; send it at once, or in smaller requests",
    ),
    413: (
        "Too many items, or too long a body: send less at once.",
        "the request has 5000 items, expected at most 4096; split it or raise --max-items",
    ),
    415: ("The body is compressed.", "the body has a Content-Encoding, expected plain JSON"),
    422: ("The request is malformed: the item and the field are named.", ""),
    429: (
        "So many items wait that these must come back later.",
        "the queue is full: 16384 of 16384 items wait or are worked on, no place for 4 more; try again "
        "in 3 s",
    ),
    503: ("Not ready: loading, out of workers, or shutting down.", "Models not loaded"),
}

METRICS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Text format of Prometheus.",
        "content": {"text/plain": {"schema": {"type": "string"}, "example": "ig_items_in_progress 0.0\n"}},
    }
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documentation of refusals, for FastAPI's `responses`."""
    return {status: _refusal(status) for status in statuses}


def security(*, needs_token: bool) -> list[Depends]:
    """Documents the token; the middleware is what asks for it."""
    return (
        [Security(HTTPBearer(auto_error=False, description="--token-file or IG_TOKEN"))]
        if needs_token
        else []
    )


def _refusal(status: int) -> dict[str, Any]:
    description, example = _REFUSALS[status]
    if status == 422:
        return {"model": InvalidResponse, "description": description}
    refusal: dict[str, Any] = {
        "model": ErrorResponse,
        "description": description,
        "content": {"application/json": {"example": {"detail": example}}},
    }
    if status in (429, 503):
        refusal["headers"] = _RETRY_AFTER
    if status == 401:
        refusal["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}}}
    return refusal
