"""Carry a request from its parsing to its answer, and a service from its start to its end.

The backend, which does the work, is loaded in the background. Accepted work is finished before the service
stops, and cancelled when its client disconnects.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from serving.web.limits import Admission, ClientDisconnectedError

logger = logging.getLogger(__name__)


class Closable(Protocol):
    """A backend, as far as its host is concerned."""

    async def aclose(self) -> None:
        """Release everything."""
        ...


Backend = TypeVar("Backend", bound=Closable)
Result = TypeVar("Result")


class UnavailableError(Exception):
    """No work can be accepted now, or accepted work could not be finished."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Host(Generic[Backend]):
    """Holds the backend, and every request from its acceptance to its end."""

    def __init__(
        self,
        start_backend: Callable[[], Awaitable[Backend]],
        *,
        admission: Admission,
        not_loaded: str,
        require_usable: Callable[[Backend], None] = lambda _: None,
    ) -> None:
        """Answer `not_loaded` until the backend is loaded; `require_usable` may raise UnavailableError."""
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
        """Stop loading, or close the backend."""
        self._close()
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self.backend is not None:
            await self.backend.aclose()

    async def drain(self, *, grace_s: float) -> None:
        """Accept no more requests and wait for the accepted ones; cancel them after `grace_s`."""
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
        """Cancel all accepted requests; they are answered with 503."""
        self._close()
        for task in self._running:
            task.cancel()

    @property
    def draining(self) -> bool:
        """Return whether the service is stopping."""
        return self._draining

    def require_open(self) -> Backend:
        """Return the backend. Raises UnavailableError unless work can be accepted."""
        if self._draining:
            raise UnavailableError("Shutting down", retry_after_s=5)
        if self.backend is None:
            raise UnavailableError(self._not_loaded, retry_after_s=1)
        self._require_usable(self.backend)
        return self.backend

    async def read(self, body: Callable[[], Awaitable[bytes]]) -> None:
        """Wait for the body of a request, if the request can be accepted.

        Raises UnavailableError and QueueFullError before the body is read, UnavailableError also when the
        service stops before the body is complete, and what `body` raises.
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
        disconnected: Callable[[], Awaitable[None]],
    ) -> Result:
        """Return the result of work on `size` items, which is cancelled when its client disconnects.

        Raises UnavailableError, QueueFullError, ClientDisconnectedError, and what the work raises.
        """
        backend = self.require_open()
        with self.admission.admit(size):
            work = asyncio.create_task(do_work(backend))
            self._running.add(work)
            self._idle.clear()
            try:
                return await self._wait_for_result(work, disconnected)
            finally:
                self._running.discard(work)
                if not self._running:
                    self._idle.set()

    async def _wait_for_result(
        self, work: asyncio.Task[Result], disconnected: Callable[[], Awaitable[None]]
    ) -> Result:
        """Return the result of the work. However this ends, the work has ended, too."""
        disconnect = asyncio.ensure_future(disconnected())
        try:
            await asyncio.wait((work, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnectedError
            if work.cancelled():
                reason = "Shutting down" if self._draining else "the work was cancelled"
                raise UnavailableError(reason, retry_after_s=5)
            return work.result()
        finally:
            work.cancel()
            disconnect.cancel()
            await asyncio.gather(work, disconnect, return_exceptions=True)

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
