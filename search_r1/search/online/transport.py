"""One engine's connections: a request per call, retried as in `serving.http`; keys are never logged.

The keys are added below the HTTP client, whose log lines and errors therefore cannot show them, and whatever
an engine says is searched for them before it is quoted.
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
    may_pass,
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
"""Engines answer within a few seconds: who says nothing for so long is asked again while there is time."""
_RATE_LIMIT_S = 1.0
"""Engines count requests by the second at least; not all say how long to wait."""
_MAX_ANSWER_BYTES = 8 << 20
_MIN_KEY_CHARS = 8
"""Shorter ones are no keys, and could not be struck out of texts without harm."""

Keys = Mapping[str, SecretStr]
"""By environment variable."""


class _FailedAttemptError(TransientError):
    """A passing failure that knows what it is when it does not pass."""

    def __init__(self, final: EngineError, *, retry_after_s: float | None = None) -> None:
        super().__init__(final.reason, retry_after_s=retry_after_s)
        self.final = final


class Transport:
    """Asks one engine. Lives on one event loop; holds at most `max_connections` sockets until closed."""

    def __init__(
        self,
        engine: Engine,
        *,
        url: str,
        keys: Keys,
        proxy: SecretStr | None,
        max_connections: int,
        silence_s: float = _SILENCE_S,
    ) -> None:
        """`url`: where the engine is asked. An attempt ends after `silence_s` without any byte."""
        self._engine = engine
        self._url = url
        self._secrets = [keys[name].get_secret_value() for name in engine.key_variables]
        limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
        wire = httpx.AsyncHTTPTransport(limits=limits, proxy=proxy.get_secret_value() if proxy else None)
        # The environment is not looked at here: the proxy was resolved with the other settings.
        self._client = httpx.AsyncClient(
            transport=_KeyAdder(wire, engine=engine, keys=keys),
            timeout=httpx.Timeout(silence_s, connect=min(_CONNECT_S, silence_s), pool=None),
            trust_env=False,
        )

    async def ask(
        self,
        call: Call,
        *,
        timeout_s: float,
        charge: Callable[[], Awaitable[None]],
        refund: Callable[[], Awaitable[None]],
    ) -> Body:
        """The answer's JSON object. Raises EngineError at the deadline at the latest.

        `charge` is called before each attempt and may raise EngineError; `refund` when no connection came
        about, so that nothing can have been billed.
        """

        async def attempt(_: float) -> Body:
            await charge()
            return await self._attempt(call, refund=refund)

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

    async def _attempt(self, call: Call, *, refund: Callable[[], Awaitable[None]]) -> Body:
        method = "GET" if call.body is None else "POST"
        # Not `params=call.params`: with none it would take the URL's own away.
        url = httpx.URL(self._url).copy_merge_params(call.params) if call.params else self._url
        try:
            async with self._client.stream(method, url, json=call.body) as answer:
                content = await read_body(answer, max_bytes=_MAX_ANSWER_BYTES)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            await refund()
            raise self._failed(error) from None
        except httpx.TransportError as error:
            raise self._failed(error) from None
        except BodyError as error:
            raise EngineError(FailureKind.MALFORMED, f"unreadable answer ({error})") from None
        if answer.is_success:
            return self._parse(content)
        said = self.hide(content.decode("utf-8", "replace"))
        final = explain_refusal(self._engine, answer.status_code, said)
        if not may_pass(answer.status_code, said):
            raise final
        retry_after_s = parse_retry_after(answer.headers.get("Retry-After"))
        if retry_after_s is None and answer.status_code in (403, 429):
            retry_after_s = _RATE_LIMIT_S
        raise _FailedAttemptError(final, retry_after_s=retry_after_s)

    def _failed(self, error: httpx.TransportError) -> _FailedAttemptError:
        reason = f"cannot be reached ({type(error).__name__} {self.hide(str(error))})".replace(" )", ")")
        return _FailedAttemptError(EngineError(FailureKind.UNAVAILABLE, reason))

    def _parse(self, content: bytes) -> Body:
        text = self.hide(content.decode("utf-8", "replace"))
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = f"the answer is not JSON ({type(error).__name__}): {quote(text)}"
            raise EngineError(FailureKind.MALFORMED, reason) from None
        if not isinstance(body, dict):
            reason = f"the answer is a JSON {type(body).__name__}, not an object"
            raise EngineError(FailureKind.MALFORMED, reason)
        return body

    def hide(self, text: str) -> str:
        """`text` without the keys, however they are spelled."""
        for secret in self._secrets:
            for spelling in (secret, quote_plus(secret)):
                text = text.replace(spelling, "***")
        return text


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


def check_key(name: str, key: str) -> str:
    """What URL and header can carry. The message does not show the key. Raises ValueError."""
    if len(key) < _MIN_KEY_CHARS:
        raise ValueError(f"{name} has only {len(key)} characters; no engine has keys of that length")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{name} must be printable ASCII without spaces or line breaks")
    return key
