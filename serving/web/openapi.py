"""Document what all services have in common: refusals, the token, the metrics."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import Security
from fastapi.params import Depends
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field

_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}


class StateResponse(BaseModel):
    """The state of the process."""

    status: Literal["alive", "ready"]


class ErrorResponse(BaseModel):
    """The reason why a request was refused."""

    detail: str = Field(examples=["the queue is full: 16384 items wait; try again in 3 s"])


class Problem(BaseModel):
    """One error in a request."""

    loc: list[str | int] = Field(
        description="Where: `body`, then field names and positions.",
        examples=[["body", "items", 0, "question"]],
    )
    msg: str = Field(examples=["Field required"])
    type: str = Field(examples=["missing"])


class InvalidResponse(BaseModel):
    """All errors in a request; its content is not repeated."""

    detail: list[Problem]


Explained = dict[int, tuple[str, str]]
"""By status: what it means, and an example of the detail."""

COMMON: Explained = {
    400: (
        "The body is not readable text.",
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
    415: ("The body is compressed.", "the body has a Content-Encoding, expected plain JSON"),
    422: ("The request is malformed: the field and the place in it are named.", ""),
}


def refusals(explained: Explained, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of these refusals, for FastAPI's `responses`."""
    return {status: _refusal(status, *explained[status]) for status in statuses}


def security(*, needs_token: bool, described: str) -> list[Depends]:
    """Document the token, which the middleware checks."""
    return [Security(HTTPBearer(auto_error=False, description=described))] if needs_token else []


def metrics_response(example: str) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of `GET /metrics`."""
    return {
        200: {
            "description": "Text format of Prometheus.",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": example}},
        }
    }


def _refusal(status: int, description: str, example: str) -> dict[str, Any]:
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
