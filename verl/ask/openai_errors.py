"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.redaction import redact_text

logger = logging.getLogger(__name__)

API = "/v1/"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "rate_limit_exceeded"}
MODEL_NOT_FOUND = "model_not_found"
TOO_LONG = "context_length_exceeded"
DEFECT = "a defect of the server"


class OpenAIErrors:
    """Rewrites the refusals of all layers below `/v1/`; plain ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(API):
            await self._app(scope, receive, send)
            return
        rewriter = _Rewriter(send)
        try:
            await self._app(scope, receive, rewriter.send)
        except Exception:  # a defect must not end as a page of HTML or as no answer at all
            logger.exception("a request failed")
            if rewriter.has_begun:
                raise
            await JSONResponse(describe(500, DEFECT), status_code=500)(scope, receive, send)


class _Rewriter:
    """Passes an answer on; holds a refusal back until its body is there."""

    def __init__(self, send: Send) -> None:
        self.has_begun = False
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        self.has_begun = True
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._finish(self._start)

    async def _finish(self, start: Message) -> None:
        body = json.dumps(describe_body(start["status"], self._body)).encode()
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["content-length"], headers["content-type"] = str(len(body)), "application/json"
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})


def describe_body(status: int, body: bytes) -> dict[str, Any]:
    """Return a refusal `{"detail": ...}` in OpenAI's shape."""
    try:
        detail = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError):
        detail = body.decode(errors="replace")
    if isinstance(detail, Mapping):
        return describe(status, detail["message"], code=detail.get("code"), param=detail.get("param"))
    if isinstance(detail, list) and detail:
        place = ".".join(str(part) for part in detail[0].get("loc", ())[1:])
        return describe(status, f"{place}: {detail[0]['msg']}".lstrip(": "), param=place or None)
    return describe(status, str(detail))


def describe(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return an error in OpenAI's shape, without secrets."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {
        "error": {
            "message": redact_text(message),
            "type": kind,
            "param": param,
            "code": code or _CODES.get(status),
        }
    }
