"""One retry-with-deadline policy for every service call: JSON in, JSON object out, or `ServiceError` in time.

A call ends at its deadline at the latest, however many attempts it took and whatever hangs. Worth another
attempt are answers that say so (429, 502, 503, 504) and connections that fail; every other refusal is final.
A repeated POST must be harmless, which holds for the services of this project: they compute, not store.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Mapping
from typing import NoReturn

import httpx
import stamina

from verl.errors import ConfigError, ServiceError

_RETRIED_STATUSES = frozenset({429, 502, 503, 504})
_MAX_QUOTED_CHARS = 300


class _PassingFailureError(Exception):
    """One attempt failed in a way that another one may not."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class JsonService:
    """Client of one service. Keep one per event loop and close it: it holds `max_connections` sockets."""

    def __init__(
        self,
        base_url: str,
        *,
        name: str,
        timeout_s: float,
        max_connections: int = 64,
        fix: str = "check that it runs at this URL",
    ) -> None:
        """`timeout_s` covers a whole call with all attempts; `fix` ends messages about a dead service."""
        self._url = _checked_url(base_url, name=name)
        if not timeout_s > 0:
            raise ConfigError(f"timeout of the {name} must be more than 0 seconds, got {timeout_s}")
        self._name = name
        self._timeout_s = timeout_s
        self._fix = fix
        # Services sit next to the trainer: a proxy set for the internet must not swallow loopback calls.
        self._client = httpx.AsyncClient(
            timeout=None,
            limits=httpx.Limits(max_connections=max_connections),
            trust_env=False,
        )

    async def post(self, path: str, payload: Mapping[str, object]) -> dict[str, object]:
        """Send `payload` as JSON. Raises ServiceError at the deadline at the latest."""
        return await self._call("POST", path, payload)

    async def get(self, path: str) -> dict[str, object]:
        """Raises ServiceError at the deadline at the latest."""
        return await self._call("GET", path, None)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _call(self, method: str, path: str, payload: Mapping[str, object] | None) -> dict[str, object]:
        url = self._url + path
        deadline = time.monotonic() + self._timeout_s
        last_failure: _PassingFailureError | None = None

        def choose_wait(error: Exception) -> bool | float:
            nonlocal last_failure
            if not isinstance(error, _PassingFailureError):
                return False
            last_failure = error
            if error.retry_after_s is None:
                return True
            # Jitter, so that clients that were turned away together do not come back together.
            wait_s = error.retry_after_s + random.uniform(0.0, 0.1)
            return wait_s if time.monotonic() + wait_s < deadline else False

        attempts = stamina.retry_context(
            on=choose_wait, attempts=None, timeout=None, wait_initial=0.1, wait_max=2.0, wait_jitter=0.1
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                async for attempt in attempts:
                    with attempt:
                        return await self._attempt(method, url, payload)
        except TimeoutError:
            said = f"last failure: {last_failure}" if last_failure else "it stayed silent"
            self._fail(url, f"no usable answer within {self._timeout_s:g} s ({said}); {self._fix}")
        except _PassingFailureError as error:
            wait = f"asks to wait {error.retry_after_s or 0:g} s, past the deadline of {self._timeout_s:g} s"
            self._fail(url, f"{error}; it {wait}: lower the load or raise the timeout")
        raise AssertionError("unlimited attempts end with an answer or an exception")

    async def _attempt(
        self, method: str, url: str, payload: Mapping[str, object] | None
    ) -> dict[str, object]:
        try:
            answer = await self._client.request(method, url, json=payload)
        except httpx.TransportError as error:
            raise _PassingFailureError(f"{type(error).__name__} {error}".strip()) from error
        except httpx.RequestError as error:
            self._fail(url, f"unreadable answer ({type(error).__name__} {error}); {self._fix}")
        if answer.status_code in _RETRIED_STATUSES:
            retry_after_s = _parse_retry_after(answer.headers.get("Retry-After"))
            said = f"status {answer.status_code} {_quote(answer.text)}"
            raise _PassingFailureError(said, retry_after_s=retry_after_s)
        if not answer.is_success:
            self._fail(url, f"refused with status {answer.status_code}: {_quote(answer.text)}")
        return self._parse(answer, url=url)

    def _parse(self, answer: httpx.Response, *, url: str) -> dict[str, object]:
        try:
            body = json.loads(answer.content, parse_constant=_refuse_constant)
        except ValueError as error:
            self._fail(url, f"answer is not JSON ({error}): {_quote(answer.text)}; {self._fix}")
        if not isinstance(body, dict):
            kind = type(body).__name__
            self._fail(url, f"answer is a JSON {kind}, not an object: {_quote(answer.text)}; {self._fix}")
        return body

    def _fail(self, url: str, message: str) -> NoReturn:
        raise ServiceError(self._name, f"{_without_credentials(url)}: {message}")


def _checked_url(base_url: str, *, name: str) -> str:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"URL of the {name} is not a URL: {base_url!r} ({error})") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"URL of the {name} must look like http://host:port, got {base_url!r}")
    return base_url.rstrip("/")


def _without_credentials(url: str) -> str:
    return str(httpx.URL(url).copy_with(username=None, password=None))


def _parse_retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None when absent or unreadable."""
    if header is None:
        return None
    if header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _quote(text: str) -> str:
    """The beginning of a body, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _MAX_QUOTED_CHARS else line[:_MAX_QUOTED_CHARS] + "…")
