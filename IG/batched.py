"""Send requests of one kind many at a time: those that are made together, or while others are in flight."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Generic

from IG.wire import SERVICE, RequestT, ResultT, Wire, choose_deadline, read_work
from serving.http import CallError, JsonService

_GATHER_S = 0.005
"""Requests that are made within this time are sent together."""
_GRACE_S = 0.2
"""Added to a deadline, so that a call which ends there can still name its reason."""
_SPLIT_STATUSES = frozenset({413, 422, 500})
"""The service refuses a whole request for its size or for one item: send it again in halves."""
_MAX_SPLITS_AFTER_500 = 32
"""Per request: enough to find a few bad items among 256 without flooding a service that always fails."""


@dataclass(slots=True, eq=False)
class _Pending(Generic[RequestT, ResultT]):
    """A request without a result yet."""

    request: RequestT
    deadline: float
    """On the clock of `time.monotonic`."""
    result: asyncio.Future[ResultT]

    def settle(self, result: ResultT) -> None:
        if not self.result.done():
            self.result.set_result(result)


class BatchedCalls(Generic[RequestT, ResultT]):
    """A few HTTP requests in flight, each with many requests of one kind; use it on one event loop.

    Requests that are made while all of these are in flight form the next one.
    """

    def __init__(
        self,
        service: JsonService,
        *,
        wire: Wire[RequestT, ResultT],
        batch_size: int,
        max_in_flight: int,
        work: Counter[str],
    ) -> None:
        """Add what the service reports of its work to `work`."""
        self._service = service
        self._wire = wire
        self._batch_size = batch_size
        self._max_in_flight = max_in_flight
        self._work = work
        self._queue: deque[_Pending[RequestT, ResultT]] = deque()
        self._sending: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def compute(self, requests: Sequence[RequestT], *, timeout_s: float) -> list[ResultT]:
        """Return one result per request, in order; one that is late is a named error.

        Raises only RuntimeError, once closed. Cancelling it stops the service's work.
        """
        if self._is_closed:
            raise RuntimeError(f"this client of the {SERVICE} is closed")
        deadline = time.monotonic() + timeout_s
        results: list[asyncio.Future[ResultT]] = [
            asyncio.get_running_loop().create_future() for _ in requests
        ]
        self._queue.extend(
            _Pending(request=request, deadline=deadline, result=result)
            for request, result in zip(requests, results, strict=True)
        )
        self._send_soon()
        try:
            if results:
                await asyncio.wait(results, timeout=max(0.0, timeout_s) + _GRACE_S)
            reason = f"no answer within {timeout_s:g} s; raise the timeout or lower the load"
            late = self._fail(reason, retryable=True)
            return [result.result() if result.done() else late for result in results]
        finally:
            for result in results:
                result.cancel()

    async def aclose(self) -> None:
        """Cancel requests in flight."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in (sending := list(self._sending)):
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        _settle_all(self._queue, self._fail("the client was closed"))

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

    def _take_batch(self) -> list[_Pending[RequestT, ResultT]]:
        """Take the oldest requests that a caller still waits for."""
        batch: list[_Pending[RequestT, ResultT]] = []
        while self._queue and len(batch) < self._batch_size:
            pending = self._queue.popleft()
            if pending.deadline <= time.monotonic():
                pending.settle(self._fail("no connection was free before the deadline", retryable=True))
            if not pending.result.done():
                batch.append(pending)
        return batch

    async def _send(self, batch: Sequence[_Pending[RequestT, ResultT]]) -> None:
        """Send a batch and settle it. Its deadline is the latest: earlier ones end in `compute`."""
        deadline = max(pending.deadline for pending in batch)
        try:
            requests = [pending.request for pending in batch]
            splits = iter(range(_MAX_SPLITS_AFTER_500))
            results, _ = await self._ask(requests, deadline=deadline, splits=splits)
        except BaseException as error:  # closed, or a defect: callers must not wait until the deadline
            _settle_all(batch, self._fail(f"the request was broken off ({type(error).__name__})"))
            raise
        for pending, result in zip(batch, results, strict=True):
            pending.settle(result)

    async def _ask(
        self, requests: Sequence[RequestT], *, deadline: float, splits: Iterator[int]
    ) -> tuple[list[ResultT], bool]:
        """Return results, and whether the service accepted the request whole.

        One that is refused for its size or for one item is sent again in halves. If both are accepted after
        a refusal for the size, later requests are no longer than they are.
        """

        def make_payload(left_s: float) -> dict[str, object]:
            return self._wire.make_payload(requests) | {"timeout_s": choose_deadline(left_s)}

        try:
            body = await self._service.post(
                self._wire.path, make_payload, timeout_s=deadline - time.monotonic()
            )
            results = self._wire.read_results(body, len(requests))
        except CallError as error:
            if (
                error.status not in _SPLIT_STATUSES
                or len(requests) == 1
                or (error.status == HTTPStatus.INTERNAL_SERVER_ERROR and next(splits, None) is None)
            ):
                return [self._wire.fail(str(error), error.retryable)] * len(requests), False
            half = (len(requests) + 1) // 2
            (first, is_first_whole), (second, is_second_whole) = await asyncio.gather(
                self._ask(requests[:half], deadline=deadline, splits=splits),
                self._ask(requests[half:], deadline=deadline, splits=splits),
            )
            if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE and is_first_whole and is_second_whole:
                self._batch_size = min(self._batch_size, half)
            return first + second, False
        self._work.update(read_work(body))
        return results, True

    def _fail(self, reason: str, *, retryable: bool = False) -> ResultT:
        return self._wire.fail(f"{SERVICE}: {reason}", retryable)


def _cancel_when_abandoned(task: asyncio.Task[None], batch: Sequence[_Pending[RequestT, ResultT]]) -> None:
    """Cancel a request when no caller waits for it any more: its connection closes, the service stops."""
    waiting = {pending.result for pending in batch}

    def leave(result: asyncio.Future[ResultT]) -> None:
        waiting.discard(result)
        if not waiting:
            task.cancel()

    for pending in batch:
        pending.result.add_done_callback(leave)


def _settle_all(batch: Iterable[_Pending[RequestT, ResultT]], result: ResultT) -> None:
    for pending in batch:
        pending.settle(result)
