"""Let requests take turns with the backend; waiting for a turn counts against a request's deadline.

Queue limits, callers that leave and the shutdown are the host's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from IG.estimator import Estimates, FailureKind, GainFailure, GainQuery
from IG.service.backend import Backend
from IG.sharing import Work
from serving.web.host import Host, UnavailableError
from serving.web.limits import Admission

logger = logging.getLogger(__name__)

StartBackend = Callable[[], Awaitable[Backend]]


class Service:
    """The host of the backend, and the turns of the requests."""

    def __init__(
        self, start_backend: StartBackend, *, max_queued_items: int, max_concurrent_requests: int
    ) -> None:
        self.host: Host[Backend] = Host(
            start_backend,
            admission=Admission(max_items=max_queued_items, noun="items"),
            not_loaded="Models not loaded",
            require_usable=_require_usable,
        )
        self._turns = asyncio.Semaphore(max_concurrent_requests)

    def require_ready(self) -> None:
        """Raise UnavailableError unless a worker can start on work right now."""
        if self.host.require_open().workers.num_ready == 0:
            raise UnavailableError("No workers available", retry_after_s=1)

    async def estimate(
        self,
        queries: Sequence[GainQuery],
        *,
        details: bool,
        timeout_s: float,
        caller_left: Callable[[], Awaitable[None]],
    ) -> Estimates:
        """Return outcomes in order. Raises UnavailableError, QueueFullError, CallerLeftError.

        A worker that is being replaced is no reason to refuse: the work waits for it.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s

        async def take_turn(backend: Backend) -> Estimates:
            return await self._take_turn(backend, queries, details=details, deadline=deadline)

        return await self.host.run(take_turn, size=len(queries), caller_left=caller_left)

    async def _take_turn(
        self, backend: Backend, queries: Sequence[GainQuery], *, details: bool, deadline: float
    ) -> Estimates:
        try:
            async with asyncio.timeout_at(deadline):
                await self._turns.acquire()
        except TimeoutError:
            reason = "deadline: other requests were worked on until then"
            return _failed(queries, FailureKind.deadline, reason)
        try:
            timeout_s = max(deadline - asyncio.get_running_loop().time(), 0.0)
            return await backend.estimate(queries, details=details, timeout_s=timeout_s)
        except Exception as error:  # the request still gets an answer, item by item
            logger.exception("a request of %d items failed", len(queries))
            return _failed(queries, FailureKind.internal, f"{type(error).__name__}: {error}")
        finally:
            self._turns.release()


def _require_usable(backend: Backend) -> None:
    """Raise UnavailableError when no worker is left and none can be started."""
    if (failure := backend.workers.failure) is not None:
        raise UnavailableError(failure, retry_after_s=10)


def _failed(queries: Sequence[GainQuery], kind: FailureKind, reason: str) -> Estimates:
    failure = GainFailure(kind=kind, reason=reason)
    return Estimates(outcomes=[failure for _ in queries], work=Work(items=len(queries)))
