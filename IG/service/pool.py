"""Give work to one or several workers, and replace workers that are lost.

One queue serves all workers, the least loaded first. Each item (prompt or pair) that was on a lost worker is
retried alone, on a worker that has nothing else to do meanwhile, and is quarantined when that worker is lost,
too. So one poison item costs two workers and its neighbors only time. One worker at a time retries such
items; the others go on.

Everything runs on one event loop: between two awaits, no other code sees a half-made change.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from IG.entailment import Pair
from IG.sampler import PoisonedError, SampledAnswer
from IG.service.jobs import Item, Job, Worker, WorkerLostError
from IG.sharing import JudgementError

logger = logging.getLogger(__name__)

_MAX_FAILED_STARTS = 3
_START_TIMEOUT_S = 600.0
_CLOSE_TIMEOUT_S = 30.0


class PoolFailedError(RuntimeError):
    """No worker is left and none could be started."""


StartWorker = Callable[[int], Awaitable[Worker]]
"""Starts the worker of a rank. Raises what loading raises; cancelling it leaves nothing behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """The state of the workers."""

    devices: tuple[str, ...]
    """Where each worker computes, or did last, in the order of ranks."""
    num_ready: int
    """Workers that can take work now; the others are being replaced or cannot be."""
    num_restarts: int
    """Lost workers that were replaced so far."""
    failure: str | None
    """Why nothing can be computed any more; None also while a worker is being replaced."""


class _Slot:
    """The place of one rank: its present worker and the jobs on it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.device = ""
        self.worker: Worker | None = None
        self.jobs: dict[Job, asyncio.Task[None]] = {}
        self.lost = asyncio.Event()
        self.was_used = False
        """Whether the present worker was given any work."""
        self.opened_at = 0.0
        """When the present worker was started, on the clock of the event loop."""
        self.num_failed_starts = 0
        """In a row."""

    @property
    def num_batches(self) -> int:
        return sum(job.is_batch for job in self.jobs)

    @property
    def num_prompts(self) -> int:
        return len(self.jobs) - self.num_batches


class WorkerPool:
    """Workers behind one queue; an AnswerSampler and a PairJudge.

    Up to `max_prompts_in_flight` prompts and one batch of at most `pairs_per_batch` pairs are on a worker at
    a time. A worker that is lost unused within `min_uptime_s` counts as a failed start.
    """

    def __init__(
        self,
        start_worker: StartWorker,
        *,
        num_workers: int,
        max_prompts_in_flight: int,
        pairs_per_batch: int,
        start_timeout_s: float = _START_TIMEOUT_S,
        retry_pause_s: float = 1.0,
        min_uptime_s: float = 60.0,
    ) -> None:
        self._start_worker = start_worker
        self._max_prompts = max_prompts_in_flight
        self._start_timeout_s = start_timeout_s
        self._retry_pause_s = retry_pause_s
        self._min_uptime_s = min_uptime_s
        self._num_restarts = 0
        self._failure: str | None = None
        self._slots = [_Slot(rank) for rank in range(num_workers)]
        self._supervisors: list[asyncio.Task[None]] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._pairs_per_batch = pairs_per_batch
        # What waits, oldest first; an abandoned item is removed in O(1).
        self._prompts: OrderedDict[Item, None] = OrderedDict()
        self._pairs: OrderedDict[Item, None] = OrderedDict()
        self._halves: deque[Sequence[Item]] = deque()
        """Halves of batches that failed, to find the pair that fails."""
        self._retries: deque[Item] = deque()
        """Items to retry alone, since the worker that had them was lost."""
        self._retry_slot: _Slot | None = None
        """The slot that retries them."""

    async def start(self) -> None:
        """Start all workers together. Raises what the first failure raises, and leaves none running."""
        starts = [asyncio.create_task(self._start_in_time(slot)) for slot in self._slots]
        try:
            workers = await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            ended = await asyncio.gather(*starts, return_exceptions=True)
            started = [worker for worker in ended if not isinstance(worker, BaseException)]
            await asyncio.gather(*map(_close, started))
            raise
        for slot, worker in zip(self._slots, workers, strict=True):
            self._open(slot, worker)
            self._supervisors.append(asyncio.create_task(self._supervise(slot, worker)))

    @property
    def status(self) -> PoolStatus:
        """Return the state of the workers now."""
        return PoolStatus(
            devices=tuple(slot.device for slot in self._slots),
            num_ready=sum(slot.worker is not None for slot in self._slots),
            num_restarts=self._num_restarts,
            failure=self._failure,
        )

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        """Return answers to the prompt. Raises SamplingError (PoisonedError is one) and PoolFailedError."""
        self._require_workers()
        item = Item(prompt)
        self._prompts[item] = None
        self._dispatch()
        try:
            answers: tuple[SampledAnswer, ...] = await item.future
            return answers
        finally:
            self._prompts.pop(item, None)
            item.future.cancel()
            if item.task is not None:
                item.task.cancel()

    async def judge(self, pairs: Sequence[Pair]) -> list[float | Exception]:
        """Return P(premise entails hypothesis) of every pair, or its error. Raises PoolFailedError."""
        size = self._pairs_per_batch * len(self._slots)
        # At most two rounds of batches at a time: a very long call does not block others, and no worker waits
        # for the slowest batch of a round.
        rounds = asyncio.Semaphore(2)

        async def judge_round(start: int) -> list[float | Exception]:
            async with rounds:
                return await self._judge(pairs[start : start + size])

        judged = await asyncio.gather(*map(judge_round, range(0, len(pairs), size)))
        return list(itertools.chain.from_iterable(judged))

    async def _judge(self, pairs: Sequence[Pair]) -> list[float | Exception]:
        self._require_workers()
        items = [Item(pair) for pair in pairs]
        self._pairs |= dict.fromkeys(items)
        self._dispatch()
        try:
            outcomes: list[Any] = await asyncio.gather(
                *(item.future for item in items), return_exceptions=True
            )
        finally:
            for item in items:
                self._pairs.pop(item, None)
        for outcome in outcomes:
            if isinstance(outcome, PoolFailedError):
                raise outcome
        return outcomes

    async def aclose(self) -> None:
        """Stop all workers; waiting work fails."""
        self._fail("the service is shutting down")
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        workers = [slot.worker for slot in self._slots if slot.worker is not None]
        for slot in self._slots:
            self._clear(slot)
        await asyncio.gather(*(_close(worker) for worker in workers), *self._closing)

    async def _supervise(self, slot: _Slot, worker: Worker) -> None:
        """Replace the worker of a slot whenever it is lost, until that fails too often."""
        present: Worker | None = worker
        while present is not None:
            watcher = asyncio.create_task(self._watch(slot, present))
            try:
                await slot.lost.wait()
            finally:
                watcher.cancel()
            lived_s = asyncio.get_running_loop().time() - slot.opened_at
            # Lost soon after its start, before any work: its replacements may end the same way.
            if not slot.was_used and lived_s < self._min_uptime_s:
                slot.num_failed_starts += 1
            await self._close_lost(present)
            present = await self._replace(slot)
        logger.error("worker %d cannot be replaced", slot.rank)
        if all(task.done() or task is asyncio.current_task() for task in self._supervisors):
            self._fail("all workers were lost and none could be started again; restart the service")

    async def _close_lost(self, worker: Worker) -> None:
        """Free what is left of a worker; this goes on when the pool is closed meanwhile."""
        closing = asyncio.create_task(_close(worker))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await asyncio.shield(closing)

    async def _watch(self, slot: _Slot, worker: Worker) -> None:
        self._handle_loss(slot, worker, reason=await worker.wait_lost())

    async def _replace(self, slot: _Slot) -> Worker | None:
        while slot.num_failed_starts < _MAX_FAILED_STARTS:
            try:
                worker = await self._start_in_time(slot)
            except Exception as error:  # the next start may succeed
                slot.num_failed_starts += 1
                logger.error("worker %d did not restart: %s: %s", slot.rank, type(error).__name__, error)
                await asyncio.sleep(self._retry_pause_s * slot.num_failed_starts)
            else:
                self._num_restarts += 1
                logger.info("worker %d was replaced", slot.rank)
                self._open(slot, worker)
                return worker
        return None

    async def _start_in_time(self, slot: _Slot) -> Worker:
        try:
            async with asyncio.timeout(self._start_timeout_s) as limit:
                return await self._start_worker(slot.rank)
        except TimeoutError as error:
            if not limit.expired():
                raise
            reason = f"worker {slot.rank} was not ready after {self._start_timeout_s:g} s"
            raise TimeoutError(reason) from error

    def _open(self, slot: _Slot, worker: Worker) -> None:
        slot.worker, slot.device = worker, worker.device
        slot.was_used, slot.opened_at = False, asyncio.get_running_loop().time()
        slot.lost.clear()
        self._dispatch()

    def _handle_loss(self, slot: _Slot, worker: Worker, *, reason: str) -> None:
        """Take a lost worker out, and retry its items alone; ignore a second report of the loss."""
        if slot.worker is not worker:
            return
        jobs = self._clear(slot)
        logger.warning("worker %d (%s) was lost with %d jobs: %s", slot.rank, slot.device, len(jobs), reason)
        for item in (item for job in jobs for item in job.items if not item.future.done()):
            item.num_lost_workers += 1
            if item.num_lost_workers < 2:
                self._retries.append(item)
            else:
                logger.error("quarantined after two lost workers: %s", item)
                item.settle(PoisonedError(f"{item} ended two workers in a row; it is quarantined"))
        slot.lost.set()
        self._dispatch()

    def _clear(self, slot: _Slot) -> list[Job]:
        jobs, slot.jobs, slot.worker = slot.jobs, {}, None
        if self._retry_slot is slot:
            self._retry_slot = None
        for task in jobs.values():
            if task is not asyncio.current_task():
                task.cancel()
        return list(jobs)

    def _dispatch(self) -> None:
        """Start waiting work as far as workers are free. Called after every change; never waits."""
        # Retries come first: they have waited longest, and they need a worker for themselves.
        self._retry_alone()
        free = [slot for slot in self._slots if slot.worker is not None and slot is not self._retry_slot]
        # Prompts one at a time, so that each goes to the worker with the fewest: engines batch by themselves.
        while self._prompts and free and (slot := _least_loaded(free)).num_prompts < self._max_prompts:
            item, _ = self._prompts.popitem(last=False)
            self._begin(slot, [item])
        # Pairs: one batch per worker. What arrives while a batch runs is its next batch, so batches grow with
        # the load and no timer is needed.
        while idle := [slot for slot in free if not slot.num_batches]:
            items = self._next_batch(num_idle=len(idle))
            if not items:
                break
            self._begin(_least_loaded(idle), items)

    def _retry_alone(self) -> None:
        """Retry the next item of a lost worker, on a slot that is reserved for these, once it is empty."""
        while self._retries and self._retries[0].future.done():
            self._retries.popleft()
        ready = [slot for slot in self._slots if slot.worker is not None]
        if self._retry_slot is None and self._retries and ready:
            self._retry_slot = _least_loaded(ready)
        # Alone on the worker: if the worker is lost, this item and no other one is the cause.
        if self._retry_slot is None or self._retry_slot.jobs:
            return
        if self._retries:
            self._begin(self._retry_slot, [self._retries.popleft()])
        else:
            self._retry_slot = None

    def _next_batch(self, *, num_idle: int) -> list[Item]:
        """Return pairs for one of `num_idle` workers, an even share of what waits; empty when none wait."""
        while self._halves:
            if items := [item for item in self._halves.popleft() if not item.future.done()]:
                return items
        share = -(-len(self._pairs) // num_idle)
        least = -(-self._pairs_per_batch // 4)  # batches for several idle workers are not cut smaller
        size = min(self._pairs_per_batch, max(least, share), len(self._pairs))
        return [self._pairs.popitem(last=False)[0] for _ in range(size)]

    def _begin(self, slot: _Slot, items: Sequence[Item]) -> None:
        assert slot.worker is not None
        slot.was_used = True
        job = Job(items)
        task = asyncio.create_task(self._run(slot, slot.worker, job))
        slot.jobs[job] = items[0].task = task
        # Not in the task itself: one that is cancelled before it runs would never get there.
        task.add_done_callback(lambda _: self._end(slot, job))

    async def _run(self, slot: _Slot, worker: Worker, job: Job) -> None:
        try:
            await job.run(worker)
            if slot.worker is worker:  # not a late answer of a lost worker
                slot.num_failed_starts = 0
        except WorkerLostError as error:
            self._handle_loss(slot, worker, reason=str(error))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._handle_loss(slot, worker, reason="it stopped by itself in the middle of its work")
        except Exception as error:  # the job's own failure, unless the worker was lost meanwhile
            if slot.worker is worker:
                self._settle_failed(job, error)

    def _end(self, slot: _Slot, job: Job) -> None:
        slot.jobs.pop(job, None)  # a lost worker has none any more
        self._dispatch()

    def _settle_failed(self, job: Job, error: Exception) -> None:
        """Fail a prompt or a single pair; of a batch, try halves until the pair that fails is alone."""
        if (half := len(job.items) // 2) > 0:
            self._halves += [job.items[:half], job.items[half:]]
        elif job.is_batch:
            reason = f"the entailment model failed: {type(error).__name__}: {error}"
            job.items[0].settle(JudgementError(reason))
        else:
            job.items[0].settle(error)

    def _require_workers(self) -> None:
        if self._failure is not None:
            raise PoolFailedError(self._failure)

    def _fail(self, reason: str) -> None:
        """Fail everything that waits or runs, now and from now on."""
        self._failure = self._failure or reason
        running = [item for slot in self._slots for job in slot.jobs for item in job.items]
        halves = [item for half in self._halves for item in half]
        for item in (*self._prompts, *self._pairs, *halves, *self._retries, *running):
            item.settle(PoolFailedError(self._failure))
        for waiting in (self._prompts, self._pairs, self._halves, self._retries):
            waiting.clear()


def _least_loaded(slots: Sequence[_Slot]) -> _Slot:
    return min(slots, key=lambda slot: (slot.num_prompts, slot.num_batches))


async def _close(worker: Worker) -> None:
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await worker.aclose()
    except Exception:  # it is being ended anyway; its failure must not stop the pool
        logger.warning("a worker did not close cleanly", exc_info=True)
