"""Client of the IG service for any trainer: results in order, never a number for a failure.

    async with IGClient("http://127.0.0.1:8310", timeout_s=120) as client:
        results = await client.compute([GainRequest(question=q, context=found, golds=("Bolton",))])

`SyncIGClient` does the same without `await`. Needs httpx and tenacity only, none of the service's models.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from http import HTTPStatus
from types import TracebackType
from typing import Self, TypeVar

from IG.batched import BatchedCalls
from IG.messages import EntailmentResult, GainRequest, GainResult
from IG.wire import ENTAILMENT, GAINS, SERVICE
from serving.http import CallError, JsonService

__all__ = ["EntailmentResult", "GainRequest", "GainResult", "IGClient", "SyncIGClient"]

_START = "start it with: bash IG_service_launch.sh"
T = TypeVar("T")


class IGClient:
    """Asynchronous client: a few HTTP requests in flight, each with many items. Use one per event loop.

    Requests that are made while all of these are in flight form the next one, so asking for single gains as
    they come up costs little more than asking for all together.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        batch_size: int = 256,
        max_in_flight: int = 8,
        token: str | None = None,
    ) -> None:
        """Raise ValueError for an impossible setting.

        `timeout_s` covers a call until its last result; `batch_size` is the most items per HTTP request.
        """
        for name, value in (("batch_size", batch_size), ("max_in_flight", max_in_flight)):
            if value < 1:
                raise ValueError(f"{name} of the {SERVICE} must be at least 1, got {value}")
        self._timeout_s = timeout_s
        self._service = JsonService(
            url,
            name=SERVICE,
            timeout_s=timeout_s,
            max_connections=2 * max_in_flight + 1,  # gains, entailment, and one for /health
            fix=_START,
            token=token,
        )
        self.work: Counter[str] = Counter()
        """The work that the service reports for this client, summed over its answers."""
        self._gains = BatchedCalls(
            self._service, wire=GAINS, batch_size=batch_size, max_in_flight=max_in_flight, work=self.work
        )
        self._judgements = BatchedCalls(
            self._service, wire=ENTAILMENT, batch_size=batch_size, max_in_flight=max_in_flight, work=self.work
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def compute(
        self, requests: Sequence[GainRequest], *, timeout_s: float | None = None
    ) -> list[GainResult]:
        """Return one result per request, in order; a gain that is late is a named error.

        Raises only RuntimeError, once the client is closed. Cancelling it stops the service's work.
        """
        return await self._gains.compute(
            requests, timeout_s=self._timeout_s if timeout_s is None else timeout_s
        )

    async def submit(self, request: GainRequest, *, timeout_s: float | None = None) -> GainResult:
        """Return the result of one request, which is sent together with others that are made meanwhile."""
        (result,) = await self.compute([request], timeout_s=timeout_s)
        return result

    async def judge(
        self, pairs: Sequence[tuple[str, str]], *, timeout_s: float | None = None
    ) -> list[EntailmentResult]:
        """Return P(premise entails hypothesis) of each pair (premise, hypothesis), as `compute` does."""
        return await self._judgements.compute(
            pairs, timeout_s=self._timeout_s if timeout_s is None else timeout_s
        )

    async def wait_ready(self, timeout_s: float) -> dict[str, object]:
        """Wait until the service accepts work and return its health.

        Raises CallError with the command that starts it, or about the token.
        """
        try:
            # An empty request, which is refused until there is a worker; unlike /health it needs the token.
            await self._service.post(GAINS.path, {"items": []}, timeout_s=timeout_s)
            return await self._service.get("/health")
        except CallError as error:
            if not error.retryable:
                raise
            message = (
                f"{self._service.shown_url} was not ready within {timeout_s:g} s ({error.message}); if it "
                "is loading its models, start this again when it says that it is ready"
            )
            raise CallError(SERVICE, message, retryable=True) from error

    async def require_entailment(self) -> None:
        """Raise CallError unless the service, which is ready, judges entailment."""
        try:
            await self._service.post(ENTAILMENT.path, {"pairs": []})
        except CallError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            message = f"{self._service.shown_url} has no {ENTAILMENT.path}, which this method needs; {_START}"
            raise CallError(SERVICE, message) from error

    async def describe(self) -> dict[str, object] | None:
        """Return what the service's numbers depend on; None from a published service. Raises CallError."""
        try:
            return await self._service.get("/version")
        except CallError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    async def aclose(self) -> None:
        """Cancel requests in flight and close all connections."""
        await asyncio.gather(self._gains.aclose(), self._judgements.aclose())
        await self._service.aclose()


class SyncIGClient:
    """`IGClient` without `await`, for plain code and also where an event loop already runs."""

    def __init__(
        self, url: str, *, timeout_s: float, batch_size: int = 256, token: str | None = None
    ) -> None:
        """Take the settings of `IGClient`."""
        self._client = IGClient(url, timeout_s=timeout_s, batch_size=batch_size, token=token)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ig-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def compute(self, requests: Sequence[GainRequest], *, timeout_s: float | None = None) -> list[GainResult]:
        """Return one result per request, in order; a gain that is late is a named error."""
        return self._run(self._client.compute(requests, timeout_s=timeout_s))

    def wait_ready(self, timeout_s: float) -> dict[str, object]:
        """Wait until the service accepts work and return its health. Raises CallError."""
        return self._run(self._client.wait_ready(timeout_s))

    def close(self) -> None:
        """Close all connections and end the thread; safe to call twice."""
        if self._loop.is_closed():
            return
        self._run(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[object, object, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise RuntimeError(f"this client of the {SERVICE} is closed")
        outcome = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return outcome.result()
        except BaseException:  # Ctrl-C: the caller is gone, so its work must stop
            outcome.cancel()
            raise
