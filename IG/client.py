"""Client of the IG service for any trainer: results in order, never a number for a failure.

    async with IGClient("http://127.0.0.1:8310", timeout_s=120) as client:
        results = await client.compute([GainRequest(question=q, context=found, golds=("Bolton",))])

`SyncIGClient` does the same without `await`. Needs httpx and tenacity only, none of the service's models.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from types import TracebackType
from typing import Self, TypeVar

from IG.messages import GainRequest, GainResult
from IG.wire import SERVICE, failed, make_payload, read_results, read_work
from serving.http import CallError, JsonService

__all__ = ["GainRequest", "GainResult", "IGClient", "SyncIGClient"]

_START = "start it with: bash IG_service_launch.sh"
_PATH = "/compute_info_gain"
_GATHER_S = 0.005
"""Requests that are made within this time are sent together."""
_GRACE_S = 0.2
"""Added to a deadline, so that a call which ends there can still name its reason."""
_SPLIT_STATUSES = frozenset({413, 422, 500})
"""The service refuses a whole request for its size or for one item: send it again in halves."""
_MAX_SPLITS_AFTER_500 = 32
"""Per request: enough to find a few bad items among 256 without flooding a service that always fails."""
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Pending:
    """A request without a result yet."""

    request: GainRequest
    deadline: float
    """On the clock of `time.monotonic`."""
    result: asyncio.Future[GainResult]

    def settle(self, result: GainResult) -> None:
        if not self.result.done():
            self.result.set_result(result)


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
        self._batch_size = batch_size
        self._max_in_flight = max_in_flight
        self._service = JsonService(
            url,
            name=SERVICE,
            timeout_s=timeout_s,
            max_connections=max_in_flight + 1,  # one for /health
            fix=_START,
            token=token,
        )
        self._queue: deque[_Pending] = deque()
        self._sending: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self.work: Counter[str] = Counter()
        """The work that the service reports for this client, summed over its answers."""

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
        if self._is_closed:
            raise RuntimeError(f"this client of the {SERVICE} is closed")
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        results = [asyncio.get_running_loop().create_future() for _ in requests]
        self._queue.extend(
            _Pending(request=request, deadline=deadline, result=result)
            for request, result in zip(requests, results, strict=True)
        )
        self._send_soon()
        try:
            if results:
                await asyncio.wait(results, timeout=max(0.0, timeout_s) + _GRACE_S)
            reason = f"no answer within {timeout_s:g} s; raise the timeout or lower the load"
            late = failed(reason, retryable=True)
            return [result.result() if result.done() else late for result in results]
        finally:
            for result in results:
                result.cancel()

    async def submit(self, request: GainRequest, *, timeout_s: float | None = None) -> GainResult:
        """Return the result of one request, which is sent together with others that are made meanwhile."""
        (result,) = await self.compute([request], timeout_s=timeout_s)
        return result

    async def wait_ready(self, deadline_s: float) -> dict[str, object]:
        """Wait until the service accepts work and return its health.

        Raises CallError with the command that starts it, or about the token.
        """
        try:
            # An empty request, which is refused until there is a worker; unlike /health it needs the token.
            await self._service.post(_PATH, {"items": []}, timeout_s=deadline_s)
            return await self._service.get("/health")
        except CallError as error:
            if not error.retryable:
                raise
            message = f"{self._service.shown_url} was not ready within {deadline_s:g} s ({error.message})"
            raise CallError(SERVICE, message, retryable=True) from error

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
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in (sending := list(self._sending)):
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        _settle_all(self._queue, failed("the client was closed"))
        await self._service.aclose()

    def _send_soon(self) -> None:
        if len(self._queue) >= self._batch_size:
            self._send_waiting()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_GATHER_S, self._send_waiting)

    def _send_waiting(self) -> None:
        """Send waiting requests while there are free slots."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and len(self._sending) < self._max_in_flight and not self._is_closed:
            if batch := self._take_batch():
                task = asyncio.create_task(self._send(batch))
                self._sending.add(task)
                task.add_done_callback(self._sent)
                _cancel_when_abandoned(task, batch)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._send_waiting()

    def _take_batch(self) -> list[_Pending]:
        """Take the oldest requests that a caller still waits for."""
        batch: list[_Pending] = []
        while self._queue and len(batch) < self._batch_size:
            pending = self._queue.popleft()
            if pending.deadline <= time.monotonic():
                pending.settle(failed("no connection was free before the deadline", retryable=True))
            if not pending.result.done():
                batch.append(pending)
        return batch

    async def _send(self, batch: Sequence[_Pending]) -> None:
        """Send a batch and settle it. Its deadline is the latest: earlier ones end in `compute`."""
        deadline = max(pending.deadline for pending in batch)
        try:
            requests = [pending.request for pending in batch]
            splits = iter(range(_MAX_SPLITS_AFTER_500))
            results = await self._ask(requests, deadline=deadline, splits=splits)
        except BaseException as error:  # closed, or a defect: callers must not wait until the deadline
            _settle_all(batch, failed(f"the request was broken off ({type(error).__name__})"))
            raise
        for pending, result in zip(batch, results, strict=True):
            pending.settle(result)

    async def _ask(
        self, requests: Sequence[GainRequest], *, deadline: float, splits: Iterator[int]
    ) -> list[GainResult]:
        """Return results; a request that is refused for its size or for one item is sent again in halves."""
        try:
            body = await self._service.post(
                _PATH, partial(make_payload, requests), timeout_s=deadline - time.monotonic()
            )
            results = read_results(body, expected=len(requests))
        except CallError as error:
            if (
                error.status not in _SPLIT_STATUSES
                or len(requests) == 1
                or (error.status == HTTPStatus.INTERNAL_SERVER_ERROR and next(splits, None) is None)
            ):
                failure = GainResult(gain=None, error=str(error), retryable=error.retryable)
                return [failure] * len(requests)
            half = (len(requests) + 1) // 2
            first, second = await asyncio.gather(
                self._ask(requests[:half], deadline=deadline, splits=splits),
                self._ask(requests[half:], deadline=deadline, splits=splits),
            )
            return first + second
        self.work.update(read_work(body))
        return results


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

    def wait_ready(self, deadline_s: float) -> dict[str, object]:
        """Wait until the service accepts work and return its health. Raises CallError."""
        return self._run(self._client.wait_ready(deadline_s))

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


def _cancel_when_abandoned(task: asyncio.Task[None], batch: Sequence[_Pending]) -> None:
    """Cancel a request when no caller waits for it any more: its connection closes, the service stops."""
    waiting = {pending.result for pending in batch}

    def leave(result: asyncio.Future[GainResult]) -> None:
        waiting.discard(result)
        if not waiting:
            task.cancel()

    for pending in batch:
        pending.result.add_done_callback(leave)


def _settle_all(batch: Iterable[_Pending], result: GainResult) -> None:
    for pending in batch:
        pending.settle(result)
