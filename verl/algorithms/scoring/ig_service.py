"""Requests of one step to the IG service: sent as soon as they can be, completed when the step needs them.

A gain depends on its question, context and gold answers only, not on the time of its request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import cache

from IG.messages import GainRequest, GainResult
from verl.algorithms.base import IGService, Prefetch
from verl.types import Trajectory

logger = logging.getLogger(__name__)

VISIBLE, HIDDEN = "perf/gain_visible_s", "perf/gain_hidden_s"
"""Seconds that a step waited for gains; seconds in which at least one request for a gain of it was under way
before, while episodes ran or the step before trained."""
_WORK = ("prompts_sampled", "baselines_sampled", "answers_sampled", "answers_empty", "pairs_judged")
"""Counters of the service that become metrics of their own."""


class GainRequests(Prefetch):
    """The requests of one step. Equal requests are sent once."""

    def __init__(
        self, service: IGService, *, requests_of: Callable[[Trajectory], Sequence[GainRequest]]
    ) -> None:
        """Ask what `requests_of` returns for a trajectory, possibly nothing."""
        self._service = service
        self.requests_of = cache(requests_of)  # needed twice: when the episode ends and when all have
        self._tasks: dict[GainRequest, asyncio.Task[GainResult]] = {}
        self._num_under_way = 0
        self._busy_s = 0.0
        self._busy_since = 0.0
        self.stats: dict[str, float] = {}
        """After `results`: seconds visible and hidden, and what the service did for the step."""

    def on_episode_end(self, trajectory: Trajectory) -> None:
        """Send the requests about a trajectory."""
        for request in self.requests_of(trajectory):
            self.send(request)

    def send(self, request: GainRequest) -> None:
        """Send a request, unless an equal one was sent."""
        if request in self._tasks:
            return
        if self._num_under_way == 0:
            self._busy_since = time.perf_counter()
        self._num_under_way += 1
        task = asyncio.create_task(self._service.submit(request))
        task.add_done_callback(self._note_end)
        self._tasks[request] = task

    async def results(self, requests: Sequence[GainRequest]) -> dict[GainRequest, GainResult]:
        """Return the results of these requests, by the service's timeout at the latest.

        What was not sent yet is sent now. A prefetched request whose failure was transient says nothing about
        its item and is repeated while there is time.
        """
        started, hidden_s = time.perf_counter(), self._total_busy_s()
        deadline = time.monotonic() + self._service.timeout_s
        distinct = dict.fromkeys(requests)
        sent = [request for request in distinct if request in self._tasks]
        fresh = [request for request in distinct if request not in self._tasks]
        results = dict(zip(fresh, await self._service.compute(fresh), strict=True)) if fresh else {}
        results |= await self._wait(sent, timeout_s=deadline - time.monotonic())
        self._log_failures()
        repeated = [request for request in sent if results[request].retryable]
        left_s = deadline - time.monotonic()
        if repeated and left_s > 0:
            answers = await self._service.compute(repeated, timeout_s=left_s)
            results |= dict(zip(repeated, answers, strict=True))
        self.stats = {VISIBLE: time.perf_counter() - started, HIDDEN: hidden_s, **self._count_work()}
        return results

    async def aclose(self) -> None:
        """Cancel what is under way."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _wait(
        self, requests: Sequence[GainRequest], *, timeout_s: float
    ) -> dict[GainRequest, GainResult]:
        """Return the results of prefetched requests; those that are not known in time may be repeated."""
        tasks = [self._tasks[request] for request in requests]
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.0, timeout_s))
        late = GainResult(gain=None, error="late; raise reward.semantic.timeout_s", retryable=True)
        return {r: t.result() if t.done() else late for r, t in zip(requests, tasks, strict=True)}

    def _log_failures(self) -> None:
        """Log one line for all failed prefetched requests: they cost time, not gains."""
        ended = [task for task in self._tasks.values() if task.done() and not task.cancelled()]
        errors = [error for task in ended if (error := task.result().error) is not None]
        if errors:
            logger.warning(
                "%d of %d prefetched requests for gains failed, the first by: %s",
                len(errors),
                len(self._tasks),
                errors[0],
            )

    def _count_work(self) -> dict[str, float]:
        """Return what the service did since the last step was measured, as far as it reports it."""
        work = self._service.take_work()
        return {f"ig/{name}": float(work[name]) for name in _WORK if name in work}

    def _total_busy_s(self) -> float:
        """Return the seconds so far in which at least one request was under way."""
        return self._busy_s + (time.perf_counter() - self._busy_since if self._num_under_way else 0.0)

    def _note_end(self, _: asyncio.Task[GainResult]) -> None:
        until_now = self._total_busy_s()
        self._num_under_way -= 1
        if self._num_under_way == 0:
            self._busy_s = until_now
