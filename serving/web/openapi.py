"""Document what all services have in common: states, refusals, the token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_CHALLENGE = {"WWW-Authenticate": {"schema": {"type": "string"}}}
_HEADERS = {401: _CHALLENGE, 429: _RETRY_AFTER, 503: _RETRY_AFTER}
_MEANINGS = {
    400: "The body is not readable text.",
    401: "The bearer token is missing or wrong.",
    403: "On loopback without a token: the header Host names another machine.",
    408: "The body did not arrive in time.",
    413: "Too much is asked for, or the body is too long: send less at once.",
    415: "The body is compressed.",
    429: "So much waits that this must come back later.",
    503: "Not ready: loading, shutting down, or unable to work.",
}


class StateResponse(BaseModel):
    """The state of the process."""

    status: Literal["alive", "ready"]


class ErrorResponse(BaseModel):
    """The reason why a request was refused."""

    detail: str = Field(examples=["the queue is full: 16384 items wait; try again in 1 s"])


def refusals(*statuses: int, meanings: Mapping[int, str] | None = None) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of these refusals, for FastAPI's `responses`.

    `meanings` are those of a service's own; FastAPI documents 422 by itself.
    """
    known = _MEANINGS | dict(meanings or {})
    return {
        status: {
            "model": ErrorResponse,
            "description": known[status],
            **({"headers": _HEADERS[status]} if status in _HEADERS else {}),
        }
        for status in statuses
    }
