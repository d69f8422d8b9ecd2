"""Limit what callers can do: the token, the size and the time of a body, the amount of accepted work."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import HTTPException
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.machine import is_loopback
from serving.web.metrics import CLIENT_DISCONNECTED, RequestMetrics

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz"})
"""Need no token, because process supervisors have none."""
_RETRY_AFTER_S = 1
_BODY_S = 60.0
"""How long a body may take to arrive."""
_BODIES_HELD = 16
"""Memory for bodies, from their first byte to their answer, in bodies of the greatest length."""
_MAX_VALUES = 1_000_000
"""Parsing so many takes about half a second, during which no other request is answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may send requests."""

    host: str
    """The address that the server listens on."""
    token: str
    """Empty: none is needed."""
    token_sources: str
    """The flag and the variable that set the token, for messages."""
    open_paths: Collection[str] = OPEN_PATHS
    """Need no token."""


class Guard:
    """Checks every request before its route; plain ASGI, so that nothing of its body is read before.

    It serves `/path/` as `/path`, counts the requests for work, and refuses those without the bearer token
    (401), those of web pages whose name was rebound to loopback (403), those whose body is compressed (415),
    too long (413) or too slow (408), and those that arrive while the bodies of all callers together take too
    much memory (429).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        work_paths: Collection[str],
        access: Access,
        max_body_bytes: int,
        body_flag: str,
        noun: str,
        metrics: RequestMetrics,
    ) -> None:
        """Take `body_flag`, which sets the limit, and `noun`, what a request has many of, for messages."""
        self.num_held = 0
        """Bytes of all requests that are not answered yet."""
        self.max_body_bytes = max_body_bytes
        self.body_flag = body_flag
        self._noun = noun
        self._app = app
        self._work_paths = frozenset(work_paths)
        self._access = access
        self._token = access.token.encode()
        self._needs_own_host = not access.token and is_loopback(access.host)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = scope["path"].rstrip("/") or "/"
        if scope["path"] not in self._work_paths:
            await self._check(scope, receive, send)
            return
        started = time.monotonic()
        status = CLIENT_DISCONNECTED

        async def send_watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._check(scope, receive, send_watched)
        finally:
            self._metrics.count(status=status, seconds=time.monotonic() - started)

    def too_long(self) -> str:
        """Return the message about a body beyond the limit."""
        limit = f"{self.max_body_bytes / 2**20:.3g} MiB"
        fix = f"send fewer {self._noun} per request or raise {self.body_flag}"
        return f"the body is longer than {limit}; {fix}"

    async def _check(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._find_refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        body = _BoundedBody(receive, limit=self)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self.num_held -= body.num_bytes

    def _find_refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if self._token and scope["path"] not in self._access.open_paths and not self._is_presented(scope):
            return JSONResponse(
                {"detail": "a bearer token is needed: send it as 'Authorization: Bearer TOKEN'"},
                status_code=HTTPStatus.UNAUTHORIZED,
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._needs_own_host and not _names_loopback(named := headers.get("host", "")):
            return JSONResponse({"detail": self._foreign_host(named)}, status_code=HTTPStatus.FORBIDDEN)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_body_bytes:
            return JSONResponse({"detail": self.too_long()}, status_code=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            return JSONResponse(
                {"detail": "the body has a Content-Encoding, expected plain JSON"},
                status_code=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            )
        return None

    def _foreign_host(self, named: str) -> str:
        """Return why a request to another name is refused.

        A web page can rebind its own name to 127.0.0.1; the browser then lets it read the answers.
        """
        return (
            f"the Host is {named[:100]!r}, expected 127.0.0.1, localhost or [::1]: this server listens on "
            f"loopback without a token; set one with {self._access.token_sources}, or listen elsewhere with "
            "--host"
        )

    def _is_presented(self, scope: Scope) -> bool:
        presented = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(presented) != 1:
            return False
        scheme, _, token = presented[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


def _names_loopback(host_header: str) -> bool:
    return is_loopback(re.sub(r":\d*$", "", host_header).strip("[]").lower())


class _BoundedBody:
    """Counts a body while it is read; reading it can raise HTTPException and QueueFullError."""

    def __init__(self, receive: Receive, *, limit: Guard) -> None:
        self.num_bytes = 0
        self._receive = receive
        self._limit = limit
        self._deadline = asyncio.get_running_loop().time() + _BODY_S
        self._is_whole = False

    async def receive(self) -> Message:
        if self._is_whole:  # further calls only wait for the client to disconnect
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
        if self.num_bytes > limit.max_body_bytes:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, limit.too_long())
        if limit.num_held > _BODIES_HELD * limit.max_body_bytes:
            held = f"{limit.num_held / 2**20:.3g} MiB"
            raise QueueFullError(
                f"bodies of {held} wait or are worked on, more than {_BODIES_HELD} times {limit.body_flag}; "
                f"try again in {_RETRY_AFTER_S} s"
            )


class ClientDisconnectedError(Exception):
    """The client disconnected, and its work was cancelled."""


def bounded_route(
    *,
    read: Callable[[Callable[[], Awaitable[bytes]]], Awaitable[None]],
    noun: str,
    limits: Mapping[str, int],
) -> type[APIRoute]:
    """Return a route class that refuses work early.

    `read` gets the function that reads the body, so that it can refuse, by raising, before it calls it. A
    body's list named `noun` is counted before it is validated; `limits` are those of its length by flag.
    """
    flag, limit = min(limits.items(), key=lambda item: item[1])

    class BoundedRequest(Request):
        async def json(self) -> object:
            body = await self.body()
            _require_few_values(body, noun=noun)
            value = _parse(body)
            members = value.get(noun) if isinstance(value, dict) else None
            if isinstance(members, list) and len(members) > limit:
                raise HTTPException(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f"the request has {len(members)} {noun}, expected at most {limit}; split it or raise "
                    f"{flag}",
                )
            return value

    class BoundedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[object, object, Response]]:
            handle = super().get_route_handler()

            async def handle_bounded(request: Request) -> Response:
                bounded = BoundedRequest(request.scope, request.receive)
                try:
                    await read(bounded.body)
                except ClientDisconnect:
                    raise ClientDisconnectedError from None
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
