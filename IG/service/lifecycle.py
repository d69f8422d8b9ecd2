"""Gains for a request: its turn among the others, and a deadline that waiting for it counts against.

What the queue, callers who leave and the end of the service have to do with it is the host's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from IG.estimator import Estimates, FailureKind, GainFailure, GainQuery
from IG.service.backend import Backend
from IG.sharing import ModelIdentity, Work
from serving.web.host import Host, UnavailableError
from serving.web.limits import Admission

logger = logging.getLogger(__name__)

StartBackend = Callable[[], Awaitable[Backend]]


class Service:
    """Lets requests take turns with the backend that its host holds."""

    def __init__(
        self, start_backend: StartBackend, *, max_queued_items: int, max_concurrent_requests: int
    ) -> None:
        self.host: Host[Backend] = Host(
            start_backend,
            admission=Admission(max_things=max_queued_items, things="items"),
            not_loaded="Models not loaded",
            require_usable=_require_hope,
        )
        self._turns = asyncio.Semaphore(max_concurrent_requests)

    @property
    def identity(self) -> ModelIdentity | None:
        """Of the models that are loaded."""
        return None if self.host.backend is None else self.host.backend.identity

    def require_ready(self) -> None:
        """Raises UnavailableError unless a worker can start on work right now."""
        if self.host.require_open().num_ready_workers == 0:
            raise UnavailableError("No workers available", retry_after_s=1)

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
        deadline = asyncio.get_running_loop().time() + timeout_s

        async def take_turn(backend: Backend) -> Estimates:
            return await self._take_turn(backend, queries, details=details, deadline=deadline)

        return await self.host.run(take_turn, size=len(queries), caller_left=caller_left)

    async def _take_turn(
        self, backend: Backend, queries: Sequence[GainQuery], *, details: bool, deadline: float
    ) -> Estimates:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline):
                await self._turns.acquire()
        except TimeoutError:
            return _failed(
                queries, FailureKind.deadline, "deadline: other requests were worked on until then"
            )
        try:
            timeout_s = max(deadline - loop.time(), 0.0)
            return await backend.estimate(queries, details=details, timeout_s=timeout_s)
        except Exception as error:  # a request must get its answer, item by item, whatever went wrong
            logger.exception("a request of %d items failed", len(queries))
            return _failed(queries, FailureKind.internal, f"{type(error).__name__}: {error}")
        finally:
            self._turns.release()


def _require_hope(backend: Backend) -> None:
    """Raises UnavailableError when no worker can be had any more."""
    if backend.failure is not None:
        raise UnavailableError(backend.failure, retry_after_s=10)


def _failed(queries: Sequence[GainQuery], kind: FailureKind, reason: str) -> Estimates:
    failure = GainFailure(kind=kind, reason=reason)
    return Estimates(outcomes=[failure for _ in queries], work=Work(items=len(queries)))
