"""What keeps callers within bounds: the token, the size of a body and its time, how much is accepted.

The middlewares are plain ASGI: they see a request before its body is read and parsed. `things` is what the
service calls that of which one request asks for many (items, queries), for its messages.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
from collections import deque
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
"""Need no token: who watches over processes has none."""
_MAX_RETRY_AFTER_S = 60
_BODY_S = 60.0
"""How long a whole body may take to arrive."""
_BODIES_HELD = 16
"""Bodies of the greatest length that are held at a time, from their first byte to their answer."""
_MAX_VALUES = 1_000_000
"""Reading so many takes about half a second, in which nobody else is answered."""


class TrimSlash:
    """Serve `/path/` as `/path`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["path"].rstrip("/") or "/"
        await self._app(scope, receive, send)


class RequireToken:
    """Turns away who does not present the bearer token, before anything of the body is read."""

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
    """Refuses a body that is too long (413) or too slow (408), both while it comes, or encoded (415).

    Also one that comes while too much is held already (429): what all callers together send is bounded, too.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, flag: str, things: str) -> None:
        """`flag`: what sets the limit."""
        self.num_held = 0
        """Bytes of the requests that are not answered yet."""
        self.max_bytes = max_bytes
        self.flag = flag
        self._things = things
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
        """What to tell about a body beyond the limit."""
        limit = f"{self.max_bytes / 2**20:.3g} MiB"
        return f"the body is longer than {limit}; send fewer {self._things} per request or raise {self.flag}"

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
    """Counts a body while it is read. Whoever reads it gets HTTPException or QueueFullError."""

    def __init__(self, receive: Receive, *, limit: LimitBody) -> None:
        self.num_bytes = 0
        self._receive = receive
        self._limit = limit
        self._deadline = asyncio.get_running_loop().time() + _BODY_S
        self._is_whole = False

    async def receive(self) -> Message:
        if self._is_whole:  # from now on it is asked only whether the caller is still there
            return await self._receive()
        message = await self._receive_in_time()
        self._is_whole = not message.get("more_body", False)
        self._count(len(message.get("body", b"")))
        return message

    async def _receive_in_time(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline) as patience:
                return await self._receive()
        except TimeoutError:
            if not patience.expired():
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
                "try again in 1 s",
                retry_after_s=1,
            )


class CallerLeftError(Exception):
    """Nobody waits for the answer any more; the work was cancelled."""


def bounded_route(
    *,
    read: Callable[[Callable[[], Awaitable[bytes]]], Awaitable[None]],
    require_fitting: Callable[[object], None],
    things: str,
) -> type[APIRoute]:
    """A route for work: who gets no place is told before the body is read, who sends too much before it is
    looked at thing by thing.

    `read`, which is given what reads the body, and `require_fitting`, which is given the JSON value before
    anything of it was checked, raise what the caller is told.
    """

    class BoundedRequest(Request):
        async def json(self) -> object:
            body = await self.body()
            _require_few_values(body, things=things)
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
    """Raises HTTPException: what else it could raise, FastAPI would keep in a cycle with the whole body."""
    try:
        value: object = json.loads(body)
    except json.JSONDecodeError as error:
        problem = {"loc": ["body", error.pos], "msg": f"not JSON: {error.msg}", "type": "json_invalid"}
        raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, [problem]) from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"the body cannot be read: {error}") from None
    return value


def _require_few_values(body: bytes, *, things: str) -> None:
    """Every value of a JSON text but the first comes after one of these; text has some of them, too."""
    num_values = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if num_values > _MAX_VALUES:
        raise HTTPException(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body has {num_values} commas and opening brackets, expected at most {_MAX_VALUES}; send "
            f"fewer {things} per request",
        )


class QueueFullError(Exception):
    """So much was accepted that this must come back later."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Admission:
    """Counts the things that were accepted and are not answered yet, and how fast answers go out."""

    def __init__(
        self,
        *,
        max_things: int,
        things: str,
        window_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_held = 0
        """Accepted and not answered yet."""
        self._max_things = max_things
        self._things = things
        self._window_s = window_s
        self._clock = clock
        self._answered: deque[tuple[float, int]] = deque()

    @contextmanager
    def admit(self, number: int) -> Iterator[None]:
        """Hold places for so many. Raises QueueFullError."""
        self.require_room(number)
        self.num_held += number
        try:
            yield
        finally:
            self.num_held -= number
            self._answered.append((self._clock(), number))
            self._forget_old()

    def require_room(self, number: int) -> None:
        """Raises QueueFullError unless so many could be admitted now."""
        excess = self.num_held + number - self._max_things
        if excess > 0:
            retry_after_s = self._wait_s(excess)
            raise QueueFullError(
                f"the queue is full: {self.num_held} of {self._max_things} {self._things} wait or are "
                f"worked on, no place for {number} more; try again in {retry_after_s} s",
                retry_after_s=retry_after_s,
            )

    def _wait_s(self, number: int) -> int:
        """About when so many places will be free, at the recent rate."""
        self._forget_old()
        num_answered = sum(count for _, count in self._answered)
        if not num_answered:
            return 1
        rate = num_answered / max(self._clock() - self._answered[0][0], 1.0)
        return min(max(math.ceil(number / rate), 1), _MAX_RETRY_AFTER_S)

    def _forget_old(self) -> None:
        start = self._clock() - self._window_s
        while self._answered and self._answered[0][0] < start:
            self._answered.popleft()
