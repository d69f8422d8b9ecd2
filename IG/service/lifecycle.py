"""What happens to a request between its parsing and its answer, and to the service from its start to its end.

Accepted work has a place in the queue, a turn among the requests that are worked on, a deadline that waiting
for the turn counts against, and a caller who may leave; it is finished before the service stops.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from IG.estimator import Estimates, FailureKind, GainFailure, GainQuery
from IG.service.backend import Backend
from IG.service.limits import Admission, CallerLeftError
from IG.sharing import ModelIdentity, Work

logger = logging.getLogger(__name__)

StartBackend = Callable[[], Awaitable[Backend]]


class UnavailableError(Exception):
    """No work can be accepted now, or what was accepted could not be finished."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Service:
    """Holds the backend from its start to its end, and every request from its acceptance to its end."""

    def __init__(
        self, start_backend: StartBackend, *, max_queued_items: int, max_concurrent_requests: int
    ) -> None:
        self.backend: Backend | None = None
        """None until it is loaded."""
        self.start_error: BaseException | None = None
        self.admission = Admission(max_items=max_queued_items)
        self._start_backend = start_backend
        self._turns = asyncio.Semaphore(max_concurrent_requests)
        self._loading: asyncio.Task[None] | None = None
        self._reading: set[asyncio.Future[bytes]] = set()
        self._running: set[asyncio.Task[Estimates]] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self, *, on_ready: Callable[[Backend], None], on_failure: Callable[[], None]) -> None:
        """Load the models in the background."""
        self._loading = asyncio.create_task(self._load(on_ready=on_ready, on_failure=on_failure))

    async def end(self) -> None:
        """Stop loading, or free what was loaded."""
        self._close()
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self.backend is not None:
            await self.backend.aclose()

    async def drain(self, *, grace_s: float) -> None:
        """Accept no more and wait for what was accepted; after `grace_s` it is cancelled."""
        self._close()
        if self._idle.is_set():
            return
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            logger.warning("%d requests were not done after %g s, cancelling", len(self._running), grace_s)
            self.abandon()
            await self._idle.wait()

    def abandon(self) -> None:
        """Cancel everything that is worked on; its callers are told."""
        self._close()
        for task in self._running:
            task.cancel()

    @property
    def draining(self) -> bool:
        """Whether it was asked to stop."""
        return self._draining

    @property
    def identity(self) -> ModelIdentity | None:
        """Of the models that are loaded."""
        return None if self.backend is None else self.backend.identity

    def require_ready(self) -> None:
        """Raises UnavailableError unless a worker can start on work right now."""
        self._require_open()
        assert self.backend is not None
        if self.backend.num_ready_workers == 0:
            raise UnavailableError("No workers available", retry_after_s=1)

    async def read(self, body: Callable[[], Awaitable[bytes]]) -> None:
        """Wait for the body of a request that may be accepted. Raises what `body` raises.

        UnavailableError and QueueFullError come before it is read, the former also when the service is
        stopped meanwhile: what is not here by then is not accepted.
        """
        self._require_open()
        self.admission.require_room(1)
        reading = asyncio.ensure_future(body())
        self._reading.add(reading)
        try:
            await asyncio.wait([reading])
        finally:
            self._reading.discard(reading)
            reading.cancel()
        try:
            if reading.cancelled():
                self._require_open()
            reading.result()
        finally:
            del reading  # an error's traceback would keep the future, and with it the body, in a cycle

    async def estimate(
        self,
        queries: Sequence[GainQuery],
        *,
        details: bool,
        timeout_s: float,
        caller_left: Callable[[], Awaitable[None]],
    ) -> Estimates:
        """Outcomes in order. Raises UnavailableError, QueueFullError, CallerLeftError.

        A worker that is being replaced is no reason to refuse: the work waits for it.
        """
        self._require_open()
        deadline = asyncio.get_running_loop().time() + timeout_s
        with self.admission.admit(len(queries)):
            work = asyncio.create_task(self._take_turn(queries, details=details, deadline=deadline))
            self._running.add(work)
            self._idle.clear()
            try:
                return await self._outlive(work, caller_left)
            finally:
                self._running.discard(work)
                if not self._running:
                    self._idle.set()

    async def _outlive(
        self, work: asyncio.Task[Estimates], caller_left: Callable[[], Awaitable[None]]
    ) -> Estimates:
        """The result of the work; whoever does not get it cancels it, and waits until it is gone."""
        leaving = asyncio.ensure_future(caller_left())
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise CallerLeftError
            if work.cancelled():
                reason = "Shutting down" if self._draining else "the work was cancelled"
                raise UnavailableError(reason, retry_after_s=5)
            return work.result()
        finally:
            work.cancel()
            leaving.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)

    async def _take_turn(self, queries: Sequence[GainQuery], *, details: bool, deadline: float) -> Estimates:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline):
                await self._turns.acquire()
        except TimeoutError:
            return _failed(
                queries, FailureKind.deadline, "deadline: other requests were worked on until then"
            )
        try:
            assert self.backend is not None
            timeout_s = max(deadline - loop.time(), 0.0)
            return await self.backend.estimate(queries, details=details, timeout_s=timeout_s)
        except Exception as error:  # a request must get its answer, item by item, whatever went wrong
            logger.exception("a request of %d items failed", len(queries))
            return _failed(queries, FailureKind.internal, f"{type(error).__name__}: {error}")
        finally:
            self._turns.release()

    async def _load(self, *, on_ready: Callable[[Backend], None], on_failure: Callable[[], None]) -> None:
        try:
            self.backend = await self._start_backend()
        except Exception as error:
            self.start_error = error
            on_failure()
        else:
            on_ready(self.backend)

    def _close(self) -> None:
        self._draining = True
        for reading in self._reading:
            reading.cancel()

    def _require_open(self) -> None:
        """Raises UnavailableError."""
        if self._draining:
            raise UnavailableError("Shutting down", retry_after_s=5)
        if self.backend is None:
            raise UnavailableError("Models not loaded", retry_after_s=1)
        if self.backend.failure is not None:
            raise UnavailableError(self.backend.failure, retry_after_s=10)


def _failed(queries: Sequence[GainQuery], kind: FailureKind, reason: str) -> Estimates:
    failure = GainFailure(kind=kind, reason=reason)
    return Estimates(outcomes=[failure for _ in queries], work=Work(items=len(queries)))
