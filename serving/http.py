"""Call services: JSON in, a JSON object out, or `CallError`; one policy of retries and deadlines.

A call ends at its deadline at the latest, whatever hangs. It is repeated after the statuses 408, 429, 502,
503 and 504, after failed connections, and once after a 500; every other refusal is final. Repeating a POST
must be harmless: the services of this project compute, they store nothing. Cancelling a call closes its
connection, so that the service can stop working on it.
"""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Container, Mapping
from typing import NoReturn, TypeVar

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_never,
    wait_exponential,
    wait_random,
)

T = TypeVar("T")

Payload = Mapping[str, object] | Callable[[float], Mapping[str, object]]
"""What to send; a callable makes the payload of each attempt from the seconds that are left."""

_RETRIED_STATUSES = frozenset({408, 429, 502, 503, 504})
_RETRIED_AT_FIRST = _RETRIED_STATUSES | {500}
_BACKOFF = wait_exponential(multiplier=0.1, max=2.0) + wait_random(0.0, 0.1)
MAX_CONNECTIONS = 64
"""Of one client to its service."""
_MAX_QUOTED_CHARS = 300
_MAX_ANSWER_BYTES = 64 * 2**20
"""Of a decompressed answer; parsing so much takes half a second."""
WITHOUT_ROUTE = frozenset({httpx.codes.NOT_FOUND, httpx.codes.METHOD_NOT_ALLOWED})
"""Statuses of a server that does not offer what it is asked for."""


class CallError(RuntimeError):
    """A service did not give a usable answer within the deadline."""

    def __init__(
        self, service: str, message: str, *, status: int | None = None, retryable: bool = False
    ) -> None:
        super().__init__(service, message)
        self.service = service
        """Short name of the service."""
        self.message = message
        self.status = status
        """HTTP status of a final refusal; None when there was none."""
        self.retryable = retryable
        """Whether the same call may succeed later: time ran out, nothing about the call itself was wrong."""

    def __str__(self) -> str:
        return f"{self.service}: {self.message}"


class TransientError(Exception):
    """One attempt failed, and another one may succeed."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """How long the service asks to wait, None if it does not."""


class DeadlineExceededError(Exception):
    """No attempt succeeded before the deadline."""

    def __init__(self, message: str, *, last: TransientError | None, fix: str | None = None) -> None:
        super().__init__(message)
        self.last = last
        """The last failure; None when the first attempt never ended."""
        self.fix = fix


class BodyError(ValueError):
    """The body of an answer cannot be decompressed, or is too long."""


async def retry_within(
    timeout_s: float, attempt: Callable[[float], Awaitable[T]], *, max_attempts: int | None = None
) -> T:
    """Repeat `attempt`, with growing pauses, while it raises TransientError and time is left.

    `attempt` receives the seconds that are left and is cancelled at the deadline. Raises
    DeadlineExceededError then, and the last TransientError after `max_attempts`.
    """
    deadline = time.monotonic() + timeout_s
    failures: list[TransientError] = []

    def wait_s(state: RetryCallState) -> float:
        assert state.outcome is not None
        failure = state.outcome.exception()
        assert isinstance(failure, TransientError)
        failures.append(failure)
        return _BACKOFF(state) if failure.retry_after_s is None else _requested_wait_s(failure, deadline)

    async def attempt_in_time() -> T:
        return await attempt(deadline - time.monotonic())

    stop = stop_never if max_attempts is None else stop_after_attempt(max_attempts)
    retried = retry_if_exception_type(TransientError)
    attempts = AsyncRetrying(retry=retried, wait=wait_s, stop=stop, reraise=True)
    try:
        async with asyncio.timeout(timeout_s):
            return await attempts(attempt_in_time)
    except TimeoutError as error:
        last = failures[-1] if failures else None
        reason = f"last failure: {last}" if last else "no answer to the first attempt"
        message = f"no usable answer within {round(timeout_s, 1):g} s ({reason})"
        raise DeadlineExceededError(message, last=last) from error


def _requested_wait_s(failure: TransientError, deadline: float) -> float:
    """Return the seconds of Retry-After, with jitter: rejected clients must not all return at once.

    Raises DeadlineExceededError if that is more than the time that is left.
    """
    assert failure.retry_after_s is not None
    left_s = deadline - time.monotonic()
    if failure.retry_after_s >= left_s:
        asks = f"it asks to wait {failure.retry_after_s:g} s, and {left_s:.1f} s are left"
        raise DeadlineExceededError(
            f"{failure}; {asks}", last=failure, fix="lower the load or raise the timeout"
        )
    return failure.retry_after_s + random.uniform(0.0, 0.1)


class JsonService:
    """The client of one service, with a pool of connections. Use it on one event loop, and close it."""

    def __init__(
        self,
        base_url: str,
        *,
        name: str,
        timeout_s: float,
        max_connections: int = MAX_CONNECTIONS,
        fix: str = "check that it runs at this URL",
        token: str | None = None,
        use_proxy: bool = False,
    ) -> None:
        """Take `timeout_s` for a whole call with all attempts, and `fix` for messages about no answer.

        `token` is sent as a bearer token. `use_proxy` is for services on the internet: the proxy of the
        environment is used. Raises ValueError for a bad URL, timeout or token.
        """
        self._url = _checked_url(base_url, name=name)
        self.shown_url = _without_credentials(self._url)
        """Without credentials, for messages."""
        if not timeout_s > 0:
            raise ValueError(f"timeout of the {name} must be more than 0 seconds, got {timeout_s}")
        self._name = name
        self._timeout_s = timeout_s
        self._fix = fix
        self._has_token = bool(token)
        # Only gzip: a piece of another encoding can unpack to far more than the limit before it is counted.
        headers = {"Accept-Encoding": "gzip"}
        if token:
            headers["Authorization"] = f"Bearer {_checked_token(token, name=name)}"
        # Services sit next to the trainer: a proxy for the internet must not get loopback calls.
        self._client = httpx.AsyncClient(
            timeout=None,
            limits=httpx.Limits(max_connections=max_connections),
            trust_env=use_proxy,
            headers=headers,
        )

    async def post(self, path: str, payload: Payload, *, timeout_s: float | None = None) -> dict[str, object]:
        """Send `payload` as JSON. Raises CallError at the deadline at the latest."""
        return await self._call("POST", path, payload, timeout_s=timeout_s)

    async def get(self, path: str, *, timeout_s: float | None = None) -> dict[str, object]:
        """Return the JSON object at this path. Raises CallError at the deadline at the latest."""
        return await self._call("GET", path, None, timeout_s=timeout_s)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _call(
        self, method: str, path: str, payload: Payload | None, *, timeout_s: float | None
    ) -> dict[str, object]:
        url = self._url + path
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if timeout_s <= 0:
            self._fail(url, "not called: no time was left", retryable=True)

        attempts = itertools.count()

        async def attempt(left_s: float) -> dict[str, object]:
            retried = _RETRIED_STATUSES if next(attempts) else _RETRIED_AT_FIRST
            return await self._attempt(method, url, payload, left_s=left_s, retried=retried)

        try:
            return await retry_within(timeout_s, attempt)
        except DeadlineExceededError as error:
            self._fail(url, f"{error}; {error.fix or self._fix}", retryable=True)

    async def _attempt(
        self, method: str, url: str, payload: Payload | None, *, left_s: float, retried: Container[int]
    ) -> dict[str, object]:
        content = payload(left_s) if callable(payload) else payload
        try:
            async with self._client.stream(method, url, json=content) as answer:
                body = await read_body(answer, max_bytes=_MAX_ANSWER_BYTES)
        except httpx.TransportError as error:
            raise TransientError(f"{type(error).__name__} {error}".strip()) from error
        except BodyError as error:
            self._fail(url, f"unreadable answer ({error}); {self._fix}")
        quoted = _quote(body)
        if answer.status_code in retried:
            retry_after_s = parse_retry_after(answer.headers.get("Retry-After"))
            raise TransientError(f"status {answer.status_code} {quoted}", retry_after_s=retry_after_s)
        if not answer.is_success:
            refused = f"refused with status {answer.status_code}{self._hint(answer.status_code)}"
            self._fail(url, f"{refused}: {quoted}", status=answer.status_code)
        return self._parse(body, url=url)

    def _hint(self, status: int) -> str:
        if status != httpx.codes.UNAUTHORIZED:
            return ""
        return " (the token that was sent is not its token)" if self._has_token else " (no token was sent)"

    def _parse(self, body: bytes, *, url: str) -> dict[str, object]:
        quoted = _quote(body)
        try:
            parsed = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            self._fail(url, f"answer is not JSON ({error}): {quoted}; {self._fix}")
        if not isinstance(parsed, dict):
            kind = type(parsed).__name__
            self._fail(url, f"answer is a JSON {kind}, not an object: {quoted}; {self._fix}")
        return parsed

    def _fail(
        self, url: str, message: str, *, status: int | None = None, retryable: bool = False
    ) -> NoReturn:
        message = f"{_without_credentials(url)}: {message}"
        raise CallError(self._name, message, status=status, retryable=retryable)


async def read_body(answer: httpx.Response, *, max_bytes: int) -> bytes:
    """Return the decompressed body of a streamed answer.

    Raises BodyError, also as soon as more than `max_bytes` are decompressed, and httpx.TransportError.
    """
    body = bytearray()
    try:
        async for part in answer.aiter_bytes():
            body += part
            if len(body) > max_bytes:
                raise BodyError(f"it has more than {max_bytes / 2**20:g} MiB")
    except httpx.DecodingError as error:
        raise BodyError(f"its Content-Encoding is wrong: {error}") from error
    return bytes(body)


def _checked_url(base_url: str, *, name: str) -> str:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"URL of the {name} is not a URL: {base_url!r} ({error})") from error
    if url.scheme not in ("http", "https") or not url.host or not (url.port or 80) < 2**16:
        raise ValueError(
            f"URL of the {name} must look like http://host:port, with a port below 65536, got {base_url!r}"
        )
    return base_url.rstrip("/")


def _checked_token(token: str, *, name: str) -> str:
    """Return the token if a header can contain it. The message of the ValueError does not show it."""
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"token of the {name} must be printable ASCII without spaces")
    return token


def _without_credentials(url: str) -> str:
    return str(httpx.URL(url).copy_with(username=None, password=None))


def parse_retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; None if it is absent or unreadable."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _quote(body: bytes) -> str:
    """Return the beginning of a body, on one line."""
    line = " ".join(body[: 4 * _MAX_QUOTED_CHARS].decode(errors="replace").split())
    return repr(line if len(line) <= _MAX_QUOTED_CHARS else line[:_MAX_QUOTED_CHARS] + "…")
