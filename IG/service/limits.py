"""What keeps callers within bounds: the token, the size of a body, the number of accepted items.

The middlewares are plain ASGI: they see a request before its body is read and parsed.
"""

from __future__ import annotations

import hmac
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz"})
"""Need no token: who watches over processes has none."""
_MAX_RETRY_AFTER_S = 60


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
    """Refuses a body that is too long (413), counted while it is read, or encoded in any way (415)."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._too_long())
            return message

        await self._app(scope, receive_counted, send)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            return JSONResponse({"detail": self._too_long()}, status_code=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        encoding = headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            return JSONResponse(
                {"detail": "the body has a Content-Encoding, expected plain JSON"},
                status_code=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            )
        return None

    def _too_long(self) -> str:
        limit = f"{self._max_bytes / 2**20:.3g} MiB"
        return f"the body is longer than {limit}; send fewer items per request or raise --max-body-mb"


class QueueFullError(Exception):
    """So many items were accepted that these must come back later."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Admission:
    """Counts the items that were accepted and are not answered yet, and how fast answers go out."""

    def __init__(
        self, *, max_items: int, window_s: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_items = 0
        """Accepted and not answered yet."""
        self._max_items = max_items
        self._window_s = window_s
        self._clock = clock
        self._answered: deque[tuple[float, int]] = deque()

    @contextmanager
    def admit(self, num_items: int) -> Iterator[None]:
        """Hold places for so many items. Raises QueueFullError."""
        excess = self.num_items + num_items - self._max_items
        if excess > 0:
            retry_after_s = self._wait_s(excess)
            raise QueueFullError(
                f"the queue is full: {self.num_items} of {self._max_items} items wait or are worked on, "
                f"{num_items} more do not fit; try again in {retry_after_s} s",
                retry_after_s=retry_after_s,
            )
        self.num_items += num_items
        try:
            yield
        finally:
            self.num_items -= num_items
            self._answered.append((self._clock(), num_items))
            self._forget_old()

    def _wait_s(self, num_items: int) -> int:
        """About when so many places will be free, at the recent rate."""
        self._forget_old()
        num_answered = sum(count for _, count in self._answered)
        if not num_answered:
            return 1
        rate = num_answered / max(self._clock() - self._answered[0][0], 1.0)
        return min(max(math.ceil(num_items / rate), 1), _MAX_RETRY_AFTER_S)

    def _forget_old(self) -> None:
        start = self._clock() - self._window_s
        while self._answered and self._answered[0][0] < start:
            self._answered.popleft()
