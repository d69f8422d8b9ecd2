"""One engine's connections: a request per call, retried as in `serving.http`; keys are never logged.

The keys are added below the HTTP client, whose log lines and errors therefore cannot show them, and they are
removed from answers of an engine before these are quoted.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import quote_plus

import httpx
from pydantic import SecretStr

from search_r1.search.online.engines import (
    Body,
    Call,
    Engine,
    EngineError,
    explain_refusal,
    is_retryable,
    quote,
)
from search_r1.search.retriever import FailureKind
from serving.http import (
    BodyError,
    DeadlineExceededError,
    TransientError,
    parse_retry_after,
    read_body,
    retry_within,
)

MAX_ATTEMPTS = 4
"""Each may be billed."""
_CONNECT_S = 5.0
_SILENCE_S = 15.0
"""Engines answer within a few seconds: after so long without a byte the request is sent again."""
_RATE_LIMIT_S = 1.0
"""Engines count requests by the second at least; not all state how long to wait."""
_MAX_ANSWER_BYTES = 8 << 20

Keys = Mapping[str, SecretStr]
"""By environment variable."""


class _FailedAttemptError(TransientError):
    """A transient failure with the error that it is when retrying does not help."""

    def __init__(self, final: EngineError, *, retry_after_s: float | None = None) -> None:
        super().__init__(final.reason, retry_after_s=retry_after_s)
        self.final = final


class Transport:
    """Asks one engine. One per event loop; holds at most `max_connections` sockets until closed."""

    def __init__(
        self,
        engine: Engine,
        *,
        url: str,
        keys: Keys,
        proxy: SecretStr | None,
        max_connections: int,
    ) -> None:
        """Ask the engine at `url`. An attempt ends after `_SILENCE_S` without any byte."""
        self._engine = engine
        self._url = url
        self._secrets = [keys[name].get_secret_value() for name in engine.key_variables]
        limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
        wire = httpx.AsyncHTTPTransport(limits=limits, proxy=proxy.get_secret_value() if proxy else None)
        # The environment is not read here: the proxy was resolved with the other settings.
        self._client = httpx.AsyncClient(
            transport=_KeyAdder(wire, engine=engine, keys=keys),
            timeout=httpx.Timeout(_SILENCE_S, connect=_CONNECT_S, pool=None),
            trust_env=False,
            headers={"Accept-Encoding": "identity"},
        )

    async def ask(self, call: Call, *, timeout_s: float, count: Callable[[], Awaitable[None]]) -> Body:
        """Return the answer's JSON object. Raises EngineError at the deadline at the latest.

        `count` is called before each attempt and may raise EngineError.
        """

        async def attempt(_: float) -> Body:
            await count()
            return await self._attempt(call)

        try:
            return await retry_within(timeout_s, attempt, max_attempts=MAX_ATTEMPTS)
        except _FailedAttemptError as error:
            reason = f"{error.final.reason}; tried {MAX_ATTEMPTS} times"
            raise EngineError(error.final.kind, reason) from None
        except DeadlineExceededError as error:
            kind = FailureKind.DEADLINE
            if isinstance(error.last, _FailedAttemptError):
                kind = error.last.final.kind
            raise EngineError(kind, f"{error}; {error.fix or 'raise the timeout'}") from None

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    def hide(self, text: str) -> str:
        """Return the text without the keys, however they are spelled."""
        for secret in self._secrets:
            for spelling in (secret, quote_plus(secret)):
                text = text.replace(spelling, "***")
        return text

    async def _attempt(self, call: Call) -> Body:
        method = "GET" if call.body is None else "POST"
        # Not `params=call.params`: with none it would remove the URL's own.
        url = httpx.URL(self._url).copy_merge_params(call.params) if call.params else self._url
        try:
            async with self._client.stream(method, url, json=call.body) as answer:
                content = await read_body(answer, max_bytes=_MAX_ANSWER_BYTES)
        except httpx.TransportError as error:
            reason = f"cannot be reached ({type(error).__name__} {self.hide(str(error))})".replace(" )", ")")
            raise _FailedAttemptError(EngineError(FailureKind.UNAVAILABLE, reason)) from None
        except BodyError as error:
            raise EngineError(FailureKind.MALFORMED, f"unreadable answer ({error})") from None
        text = self.hide(content.decode("utf-8", "replace"))
        if answer.is_success:
            return _parse(text)
        final = explain_refusal(self._engine, answer.status_code, text)
        if not is_retryable(answer.status_code, text):
            raise final
        retry_after_s = parse_retry_after(answer.headers.get("Retry-After"))
        if retry_after_s is None and answer.status_code in (403, 429):
            retry_after_s = _RATE_LIMIT_S
        raise _FailedAttemptError(final, retry_after_s=retry_after_s)


def _parse(text: str) -> Body:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"the answer is not JSON ({type(error).__name__}): {quote(text)}"
        raise EngineError(FailureKind.MALFORMED, reason) from None
    if not isinstance(body, dict):
        reason = f"the answer is a JSON {type(body).__name__}, not an object"
        raise EngineError(FailureKind.MALFORMED, reason)
    return body


class _KeyAdder(httpx.AsyncBaseTransport):
    """Adds the keys to the requests of the client above it, which logs and keeps them without."""

    def __init__(self, wire: httpx.AsyncBaseTransport, *, engine: Engine, keys: Keys) -> None:
        self._wire = wire
        self._params = {key: keys[name].get_secret_value() for key, name in engine.key_params.items()}
        self._headers = {key: keys[name].get_secret_value() for key, name in engine.key_headers.items()}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url.copy_merge_params(self._params) if self._params else request.url
        with_keys = httpx.Request(
            request.method,
            url,
            headers=request.headers,
            stream=request.stream,
            extensions=request.extensions,
        )
        with_keys.headers.update(self._headers)
        return await self._wire.handle_async_request(with_keys)

    async def aclose(self) -> None:
        await self._wire.aclose()
