"""What happens to a request between its parsing and its answer, and to a service from its start to its end.

What does the work is loaded in the background. Accepted work has a place in the queue and a caller who may
leave; it is finished before the service stops.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from serving.web.limits import Admission, CallerLeftError

logger = logging.getLogger(__name__)


class Closable(Protocol):
    """What does the work."""

    async def aclose(self) -> None:
        """Let go of everything."""
        ...


Backend = TypeVar("Backend", bound=Closable)
Result = TypeVar("Result")


class UnavailableError(Exception):
    """No work can be accepted now, or what was accepted could not be finished."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Host(Generic[Backend]):
    """Holds the backend from its start to its end, and every request from its acceptance to its end."""

    def __init__(
        self,
        start_backend: Callable[[], Awaitable[Backend]],
        *,
        admission: Admission,
        not_loaded: str,
        require_usable: Callable[[Backend], None] = lambda _: None,
    ) -> None:
        """`not_loaded`: what callers are told until it is; `require_usable` may raise UnavailableError."""
        self.backend: Backend | None = None
        """None until it is loaded."""
        self.start_error: BaseException | None = None
        self.admission = admission
        self._start_backend = start_backend
        self._not_loaded = not_loaded
        self._require_usable = require_usable
        self._loading: asyncio.Task[None] | None = None
        self._reading: set[asyncio.Future[bytes]] = set()
        self._running: set[asyncio.Task[Any]] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self, *, on_ready: Callable[[Backend], None], on_failure: Callable[[], None]) -> None:
        """Load the backend in the background."""
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

    def require_open(self) -> Backend:
        """What does the work. Raises UnavailableError unless work can be accepted."""
        if self._draining:
            raise UnavailableError("Shutting down", retry_after_s=5)
        if self.backend is None:
            raise UnavailableError(self._not_loaded, retry_after_s=1)
        self._require_usable(self.backend)
        return self.backend

    async def read(self, body: Callable[[], Awaitable[bytes]]) -> None:
        """Wait for the body of a request that may be accepted. Raises what `body` raises.

        UnavailableError and QueueFullError come before it is read, the former also when the service is
        stopped meanwhile: what is not here by then is not accepted.
        """
        self.require_open()
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
                self.require_open()
            reading.result()
        finally:
            del reading  # an error's traceback would keep the future, and with it the body, in a cycle

    async def run(
        self,
        do_work: Callable[[Backend], Coroutine[Any, Any, Result]],
        *,
        size: int,
        caller_left: Callable[[], Awaitable[None]],
    ) -> Result:
        """The result of work of so many things, which is cancelled when its caller leaves.

        Raises UnavailableError, QueueFullError, CallerLeftError, and what the work raises.
        """
        backend = self.require_open()
        with self.admission.admit(size):
            work = asyncio.create_task(do_work(backend))
            self._running.add(work)
            self._idle.clear()
            try:
                return await self._outlive(work, caller_left)
            finally:
                self._running.discard(work)
                if not self._running:
                    self._idle.set()

    async def _outlive(
        self, work: asyncio.Task[Result], caller_left: Callable[[], Awaitable[None]]
    ) -> Result:
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
