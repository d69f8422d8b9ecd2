"""Limit what callers can do: the token, the size and the time of a body, the amount of accepted work.

The middlewares are plain ASGI: they see a request before its body is read and parsed. `noun` is what the
service calls the parts of a request (items, queries) in its messages.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from http import HTTPStatus

from fastapi import HTTPException
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz"})
"""Need no token, because process supervisors have none."""
_RETRY_AFTER_S = 1
_BODY_S = 60.0
"""How long a body may take to arrive."""
_BODIES_HELD = 16
"""Memory for bodies, from their first byte to their answer, in bodies of the greatest length."""
_MAX_VALUES = 1_000_000
"""Parsing so many takes about half a second, during which no other request is answered."""


class TrimSlash:
    """Serve `/path/` as `/path`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["path"].rstrip("/") or "/"
        await self._app(scope, receive, send)


class RequireToken:
    """Refuses requests without the bearer token (401), before anything of the body is read."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_presented(scope):
            await self._app(scope, receive, send)
            return
        refusal = JSONResponse(
            {"detail": "a bearer token is needed: send it as 'Authorization: Bearer TOKEN'"},
            status_code=HTTPStatus.UNAUTHORIZED,
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal(scope, receive, send)

    def _is_presented(self, scope: Scope) -> bool:
        presented = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(presented) != 1:
            return False
        scheme, _, token = presented[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


class LimitBody:
    """Refuses a body that is too long (413), too slow (408) or compressed (415).

    Also one that arrives while the bodies of all callers together already take too much memory (429).
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, flag: str, noun: str) -> None:
        """`flag` is the one that sets the limit, for messages."""
        self.num_held = 0
        """Bytes of all requests that are not answered yet."""
        self.max_bytes = max_bytes
        self.flag = flag
        self._noun = noun
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        body = _BoundedBody(receive, limit=self)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self.num_held -= body.num_bytes

    def too_long(self) -> str:
        """Return the message about a body beyond the limit."""
        limit = f"{self.max_bytes / 2**20:.3g} MiB"
        return f"the body is longer than {limit}; send fewer {self._noun} per request or raise {self.flag}"

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_bytes:
            return JSONResponse({"detail": self.too_long()}, status_code=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        encoding = headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            return JSONResponse(
                {"detail": "the body has a Content-Encoding, expected plain JSON"},
                status_code=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            )
        return None


class _BoundedBody:
    """Counts a body while it is read; reading it can raise HTTPException and QueueFullError."""

    def __init__(self, receive: Receive, *, limit: LimitBody) -> None:
        self.num_bytes = 0
        self._receive = receive
        self._limit = limit
        self._deadline = asyncio.get_running_loop().time() + _BODY_S
        self._is_whole = False

    async def receive(self) -> Message:
        if self._is_whole:  # further calls only wait for the caller to hang up
            return await self._receive()
        message = await self._receive_in_time()
        self._is_whole = not message.get("more_body", False)
        self._count(len(message.get("body", b"")))
        return message

    async def _receive_in_time(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline) as timeout:
                return await self._receive()
        except TimeoutError:
            if not timeout.expired():
                raise
            raise HTTPException(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the body was not there after {_BODY_S:g} s; send it at once, or in smaller requests",
                headers={"Connection": "close"},
            ) from None

    def _count(self, num_bytes: int) -> None:
        limit = self._limit
        self.num_bytes += num_bytes
        limit.num_held += num_bytes
        if self.num_bytes > limit.max_bytes:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, limit.too_long())
        if limit.num_held > _BODIES_HELD * limit.max_bytes:
            held = f"{limit.num_held / 2**20:.3g} MiB"
            raise QueueFullError(
                f"bodies of {held} wait or are worked on, more than {_BODIES_HELD} times {limit.flag}; "
                f"try again in {_RETRY_AFTER_S} s"
            )


class CallerLeftError(Exception):
    """The caller hung up, and its work was cancelled."""


def bounded_route(
    *,
    read: Callable[[Callable[[], Awaitable[bytes]]], Awaitable[None]],
    require_fitting: Callable[[object], None],
    noun: str,
) -> type[APIRoute]:
    """Return a route class that refuses work early.

    `read` gets the function that reads the body, so that it can refuse before calling it. `require_fitting`
    gets the JSON value before it is validated. Both refuse by raising.
    """

    class BoundedRequest(Request):
        async def json(self) -> object:
            body = await self.body()
            _require_few_values(body, noun=noun)
            value = _parse(body)
            require_fitting(value)
            return value

    class BoundedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[object, object, Response]]:
            handle = super().get_route_handler()

            async def handle_bounded(request: Request) -> Response:
                bounded = BoundedRequest(request.scope, request.receive)
                try:
                    await read(bounded.body)
                except ClientDisconnect:
                    raise CallerLeftError from None
                return await handle(bounded)

            return handle_bounded

    return BoundedRoute


def _parse(body: bytes) -> object:
    """Return the JSON value. Raises HTTPException: FastAPI keeps others in a cycle with the whole body."""
    try:
        value: object = json.loads(body)
    except json.JSONDecodeError as error:
        problem = {"loc": ["body", error.pos], "msg": f"not JSON: {error.msg}", "type": "json_invalid"}
        raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, [problem]) from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"the body cannot be read: {error}") from None
    return value


def _require_few_values(body: bytes, *, noun: str) -> None:
    """Raise HTTPException for a body with too many values, without parsing it.

    Every value but the first follows one of these marks; strings can contain them, too.
    """
    num_values = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if num_values > _MAX_VALUES:
        raise HTTPException(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body has {num_values} commas and opening brackets, expected at most {_MAX_VALUES}; send "
            f"fewer {noun} per request",
        )


class QueueFullError(Exception):
    """So much was accepted that the caller has to come back later."""

    retry_after_s = _RETRY_AFTER_S


class Admission:
    """Counts the items that were accepted and are not answered yet."""

    def __init__(self, *, max_items: int, noun: str) -> None:
        self.num_held = 0
        """Accepted and not answered yet."""
        self._max_items = max_items
        self._noun = noun

    @contextmanager
    def admit(self, number: int) -> Iterator[None]:
        """Hold places for so many items. Raises QueueFullError."""
        self.require_room(number)
        self.num_held += number
        try:
            yield
        finally:
            self.num_held -= number

    def require_room(self, number: int) -> None:
        """Raise QueueFullError unless so many items could be accepted now."""
        if self.num_held + number > self._max_items:
            raise QueueFullError(
                f"the queue is full: {self.num_held} of {self._max_items} {self._noun} wait or are "
                f"worked on, no place for {number} more; try again in {_RETRY_AFTER_S} s"
            )
