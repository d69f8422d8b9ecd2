"""Give work to one or several workers, and replace workers that are lost.

One queue serves all workers, the least loaded first. Jobs that were on a lost worker are suspects: each is
retried alone, on a worker that has nothing else to do meanwhile, and is quarantined when that worker is lost,
too. So one poison item costs two workers and its neighbors only time. One worker at a time retries suspects;
the others go on.

Everything runs on one event loop: between two awaits, no other code sees a half-made change.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from IG.entailment import Pair
from IG.sampler import SampledAnswer
from IG.service.jobs import Computes, Job, PairBatch, PairCall, PairQueue, PromptJob

logger = logging.getLogger(__name__)

_MAX_FAILED_STARTS = 3
_START_TIMEOUT_S = 600.0
_CLOSE_TIMEOUT_S = 30.0


class WorkerLostError(RuntimeError):
    """The worker is gone, and with it whatever it was doing."""


class PoolFailedError(RuntimeError):
    """No worker is left and none could be started."""


class Worker(Computes, Protocol):
    """Both models on one device; its methods raise WorkerLostError once it is gone."""

    @property
    def device(self) -> str:
        """Where it computes: `cpu` or `cuda:N`."""
        ...

    async def wait_lost(self) -> str:
        """Wait until it is gone and return the reason."""
        ...

    async def aclose(self) -> None:
        """Stop it, also when it is lost or partly lost."""
        ...


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
        self.batch: PairBatch | None = None
        self.lost = asyncio.Event()
        self.had_work = False
        """Whether the present worker was given any work."""
        self.opened_at = 0.0
        """When the present worker was started, on the clock of the event loop."""
        self.num_failed_starts = 0
        """In a row."""

    @property
    def num_prompts(self) -> int:
        return len(self.jobs) - (self.batch is not None)


class WorkerPool:
    """Workers behind one queue; an AnswerSampler and a PairJudge.

    Up to `max_prompts_in_flight` prompts and one batch of at most `pairs_per_batch` pairs are on a worker at
    a time. A worker that is lost idle within `settled_s` counts as a failed start.
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
        settled_s: float = 60.0,
    ) -> None:
        self._start_worker = start_worker
        self._max_prompts = max_prompts_in_flight
        self._start_timeout_s = start_timeout_s
        self._retry_pause_s = retry_pause_s
        self._settled_s = settled_s
        self._num_restarts = 0
        self._failure: str | None = None
        self._slots = [_Slot(rank) for rank in range(num_workers)]
        self._keepers: list[asyncio.Task[None]] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._prompts: OrderedDict[PromptJob, None] = OrderedDict()  # an abandoned one is removed in O(1)
        self._pairs = PairQueue(pairs_per_batch)
        self._suspects: deque[Job] = deque()
        self._retry_slot: _Slot | None = None
        """The slot that retries suspects."""

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
            self._keepers.append(asyncio.create_task(self._keep(slot, worker)))

    @property
    def status(self) -> PoolStatus:
        """The state of the workers now."""
        return PoolStatus(
            devices=tuple(slot.device for slot in self._slots),
            num_ready=sum(slot.worker is not None for slot in self._slots),
            num_restarts=self._num_restarts,
            failure=self._failure,
        )

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        """Return answers to the prompt. Raises SamplingError (PoisonedError is one) and PoolFailedError."""
        self._require_workers()
        job = PromptJob(prompt)
        self._prompts[job] = None
        self._dispatch()
        try:
            return await job.future
        finally:
            self._abandon(job)

    async def judge(self, pairs: Sequence[Pair]) -> list[float | Exception]:
        """Return P(premise entails hypothesis) of every pair, or its error. Raises PoolFailedError."""
        self._require_workers()
        if not pairs:
            return []
        call = PairCall(pairs)
        self._pairs.append(call)
        self._dispatch()
        try:
            return await call.future
        finally:
            self._pairs.remove(call)

    async def aclose(self) -> None:
        """Stop all workers; waiting work fails."""
        self._fail("the service is shutting down")
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        workers = [slot.worker for slot in self._slots if slot.worker is not None]
        for slot in self._slots:
            self._clear(slot)
        await asyncio.gather(*(_close(worker) for worker in workers), *self._closing)

    # ------------------------------------------------------------------------------------------------ workers

    async def _keep(self, slot: _Slot, worker: Worker) -> None:
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
            if not slot.had_work and lived_s < self._settled_s:
                slot.num_failed_starts += 1
            await self._close_lost(present)
            present = await self._replace(slot)
        logger.error("worker %d cannot be replaced", slot.rank)
        if all(keeper.done() or keeper is asyncio.current_task() for keeper in self._keepers):
            self._fail("all workers were lost and none could be started again; restart the service")

    async def _close_lost(self, worker: Worker) -> None:
        """Free what is left of a worker; this goes on when the pool is closed meanwhile."""
        closing = asyncio.create_task(_close(worker))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await asyncio.shield(closing)

    async def _watch(self, slot: _Slot, worker: Worker) -> None:
        self._lose(slot, worker, reason=await worker.wait_lost())

    async def _replace(self, slot: _Slot) -> Worker | None:
        while slot.num_failed_starts < _MAX_FAILED_STARTS:
            try:
                worker = await self._start_in_time(slot)
            except Exception as error:  # whatever one start raises, the next may succeed
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
        slot.had_work, slot.opened_at = False, asyncio.get_running_loop().time()
        slot.lost.clear()
        self._dispatch()

    def _lose(self, slot: _Slot, worker: Worker, *, reason: str) -> None:
        """Take a lost worker out and make its jobs suspects; a second report of the same loss is ignored."""
        if slot.worker is not worker:
            return
        jobs = self._clear(slot)
        logger.warning("worker %d (%s) was lost with %d jobs: %s", slot.rank, slot.device, len(jobs), reason)
        for job in jobs:
            if job.is_over:
                continue
            job.num_lost_workers += 1
            if job.num_lost_workers >= 2:
                logger.error("quarantined after two lost workers: %s", job)
                job.quarantine()
            else:
                self._suspects.extend(job.split())
        slot.lost.set()
        self._dispatch()

    def _clear(self, slot: _Slot) -> list[Job]:
        jobs, slot.jobs, slot.batch, slot.worker = slot.jobs, {}, None, None
        if self._retry_slot is slot:
            self._retry_slot = None
        for task in jobs.values():
            if task is not asyncio.current_task():
                task.cancel()
        return list(jobs)

    # --------------------------------------------------------------------------------------------------- jobs

    def _dispatch(self) -> None:
        """Start waiting jobs as far as workers are free. Called after every change; never waits."""
        # Suspects come first: they have waited longest, and they need a worker for themselves.
        self._retry_suspects()
        free = [slot for slot in self._slots if slot.worker is not None and slot is not self._retry_slot]
        # Prompts one at a time, so that each goes to the worker with the fewest: engines batch by themselves.
        while (slot := _least_loaded(free)) is not None and slot.num_prompts < self._max_prompts:
            job = self._next_prompt()
            if job is None:
                break
            self._begin(slot, job)
        # Pairs: one batch per worker. What arrives while a batch runs is its next batch, so batches grow with
        # the load and no timer is needed.
        while (slot := _least_loaded(idle := [slot for slot in free if slot.batch is None])) is not None:
            batch = self._pairs.next_batch(num_idle=len(idle))
            if batch is None:
                break
            slot.batch = batch
            self._begin(slot, batch)

    def _retry_suspects(self) -> None:
        """Start the next suspect on the slot that is reserved for them, once that slot is empty."""
        while self._suspects and self._suspects[0].is_over:
            self._suspects.popleft()
        if self._retry_slot is None and self._suspects:
            self._retry_slot = _least_loaded([slot for slot in self._slots if slot.worker is not None])
        # Alone on the worker: if the worker is lost, this suspect and no other job is the cause.
        if self._retry_slot is None or self._retry_slot.jobs:
            return
        if not self._suspects:
            self._retry_slot = None
            return
        suspect = self._suspects.popleft()
        self._retry_slot.batch = suspect if isinstance(suspect, PairBatch) else None
        self._begin(self._retry_slot, suspect)

    def _next_prompt(self) -> PromptJob | None:
        while self._prompts:
            job, _ = self._prompts.popitem(last=False)
            if not job.is_over:
                return job
        return None

    def _begin(self, slot: _Slot, job: Job) -> None:
        assert slot.worker is not None
        slot.had_work = True
        slot.jobs[job] = job.task = asyncio.create_task(self._run(slot, slot.worker, job))

    async def _run(self, slot: _Slot, worker: Worker, job: Job) -> None:
        try:
            await job.run(worker)
            slot.num_failed_starts = 0
        except WorkerLostError as error:
            self._lose(slot, worker, reason=str(error))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._lose(slot, worker, reason="it stopped by itself in the middle of its work")
        except Exception as error:  # the job's own failure, unless the worker was lost meanwhile
            if slot.worker is worker:
                self._pairs.retry_first(job.fail(error))
        finally:
            # A job of a lost worker may already be on another one: only its present task removes it.
            if slot.jobs.get(job) is asyncio.current_task():
                del slot.jobs[job]
                slot.batch = None if slot.batch is job else slot.batch
            self._dispatch()

    def _abandon(self, job: PromptJob) -> None:
        """Stop work on a prompt whose caller is gone or served."""
        self._prompts.pop(job, None)
        job.future.cancel()
        if job.task is not None:
            job.task.cancel()

    def _require_workers(self) -> None:
        if self._failure is not None:
            raise PoolFailedError(self._failure)

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        error = PoolFailedError(self._failure)
        running = [job for slot in self._slots for job in slot.jobs]
        for job in (*self._prompts, *self._suspects, *running):
            job.stop(error)
        self._pairs.stop(error)
        self._prompts.clear()
        self._suspects.clear()


def _least_loaded(slots: Sequence[_Slot]) -> _Slot | None:
    return min(slots, key=lambda slot: (slot.num_prompts, slot.batch is not None), default=None)


async def _close(worker: Worker) -> None:
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await worker.aclose()
    except Exception:  # it is being ended anyway; its failure must not stop the pool
        logger.warning("a worker did not close cleanly", exc_info=True)
