"""Work for one or several workers: one queue, the least loaded worker first, and a lost worker is replaced.

What was on a worker when it was lost is suspect: it is tried again, each piece alone on a worker that takes
nothing else meanwhile, and given up when it loses that worker, too. So one poisoned piece costs two workers,
and its neighbours time. One worker at a time, the ward, tries suspects; the others go on.

Everything here runs on one event loop, and nothing between two awaits sees a half-made change.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from IG.entailment import Pair
from IG.sampler import SampledAnswer
from IG.service.jobs import Computes, Job, PairBatch, PairCall, PairQueue, PromptJob

logger = logging.getLogger(__name__)

_MAX_FAILED_STARTS = 3
_CLOSING_S = 30.0


class WorkerLostError(RuntimeError):
    """The worker is gone, and with it whatever it was doing."""


class PoolFailedError(RuntimeError):
    """No worker is left and none could be started."""


class Worker(Computes, Protocol):
    """Both models on one device; what it does raises WorkerLostError once it is gone."""

    @property
    def device(self) -> str:
        """Where it computes: `cpu` or `cuda:N`."""
        ...

    async def wait_lost(self) -> str:
        """Why it is gone, as soon as it is."""
        ...

    async def aclose(self) -> None:
        """Stop it, also when it is lost or half of it is."""
        ...


StartWorker = Callable[[int], Awaitable[Worker]]
"""Makes the worker of a rank. Raises what loading raises; cancelling it leaves nothing behind."""


class _Slot:
    """A place for a worker: whoever works there, and what it does."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.device = ""
        self.worker: Worker | None = None
        self.jobs: dict[Job, asyncio.Task[None]] = {}
        self.batch: PairBatch | None = None
        self.lost = asyncio.Event()
        self.is_proven = False
        """Whether the present worker was given any work."""
        self.opened_at = 0.0
        """Since when it is there, by the clock of the event loop."""
        self.failed_starts = 0

    @property
    def num_prompts(self) -> int:
        return len(self.jobs) - (self.batch is not None)


class WorkerPool:
    """Shares work among workers; an AnswerSampler and a PairJudge.

    Up to `max_prompts_in_flight` prompts and one batch of pairs are on a worker at a time. What waits while
    its batch runs becomes its next batch, of at most `pairs_per_batch`. A worker that lived for `settled_s`
    did not die of its start.
    """

    def __init__(
        self,
        start_worker: StartWorker,
        *,
        num_workers: int,
        max_prompts_in_flight: int,
        pairs_per_batch: int,
        start_timeout_s: float = 600.0,
        retry_pause_s: float = 1.0,
        settled_s: float = 60.0,
    ) -> None:
        self.num_worker_restarts = 0
        """Lost workers that were replaced."""
        self.failure: str | None = None
        """Why nothing can be done any more; not set while a worker is being replaced."""
        self._start_worker = start_worker
        self._max_prompts = max_prompts_in_flight
        self._start_timeout_s = start_timeout_s
        self._retry_pause_s = retry_pause_s
        self._settled_s = settled_s
        self._slots = [_Slot(rank) for rank in range(num_workers)]
        self._keepers: list[asyncio.Task[None]] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._prompts: OrderedDict[PromptJob, None] = OrderedDict()  # whoever leaves is out at once
        self._pairs = PairQueue(pairs_per_batch)
        self._suspects: deque[Job] = deque()
        self._ward: _Slot | None = None

    async def start(self) -> None:
        """Start all workers together. Raises what the first that fails raises, with none left."""
        starts = [asyncio.create_task(self._start_in_time(slot)) for slot in self._slots]
        try:
            workers = await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            ended = await asyncio.gather(*starts, return_exceptions=True)
            await asyncio.gather(
                *(_close(worker) for worker in ended if not isinstance(worker, BaseException))
            )
            raise
        for slot, worker in zip(self._slots, workers, strict=True):
            self._open(slot, worker)
            self._keepers.append(asyncio.create_task(self._keep(slot, worker)))

    @property
    def devices(self) -> tuple[str, ...]:
        """Where each worker computes, or did last."""
        return tuple(slot.device for slot in self._slots)

    @property
    def num_ready_workers(self) -> int:
        """Workers that can take work now."""
        return sum(slot.worker is not None for slot in self._slots)

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        """Answers to the prompt. Raises SamplingError (PoisonedError among them) and PoolFailedError."""
        self._require_well()
        job = PromptJob(prompt)
        self._prompts[job] = None
        self._dispatch()
        try:
            return await job.future
        finally:
            self._abandon(job)

    async def judge(self, pairs: Sequence[Pair]) -> list[float | Exception]:
        """P(premise entails hypothesis) of every pair, or why there is none. Raises PoolFailedError."""
        self._require_well()
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
        """Stop all workers; what still waits fails."""
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
        """Replace the slot's worker whenever it is lost, until that fails too often."""
        present: Worker | None = worker
        while present is not None:
            watcher = asyncio.create_task(self._watch(slot, present))
            try:
                await slot.lost.wait()
            finally:
                watcher.cancel()
            lived_s = asyncio.get_running_loop().time() - slot.opened_at
            if not slot.is_proven and lived_s < self._settled_s:  # by itself; a new one may do so for ever
                slot.failed_starts += 1
            await self._close_lost(present)
            present = await self._replace(slot)
        logger.error("worker %d cannot be replaced and is given up", slot.rank)
        if all(keeper.done() or keeper is asyncio.current_task() for keeper in self._keepers):
            self._fail("all workers were lost and none could be started again; restart the service")

    async def _close_lost(self, worker: Worker) -> None:
        """Free what is left of it; that goes on when the pool is closed meanwhile."""
        closing = asyncio.create_task(_close(worker))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await asyncio.shield(closing)

    async def _watch(self, slot: _Slot, worker: Worker) -> None:
        self._lose(slot, worker, reason=await worker.wait_lost())

    async def _replace(self, slot: _Slot) -> Worker | None:
        while slot.failed_starts < _MAX_FAILED_STARTS:
            try:
                worker = await self._start_in_time(slot)
            except Exception as error:  # whatever a start raises, the next may go well
                slot.failed_starts += 1
                logger.error("worker %d did not start again: %s: %s", slot.rank, type(error).__name__, error)
                await asyncio.sleep(self._retry_pause_s * slot.failed_starts)
            else:
                self.num_worker_restarts += 1
                logger.info("worker %d is back", slot.rank)
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
            raise TimeoutError(
                f"worker {slot.rank} was not ready after {self._start_timeout_s:g} s "
                "(--worker-start-timeout-s)"
            ) from error

    def _open(self, slot: _Slot, worker: Worker) -> None:
        slot.worker, slot.device = worker, worker.device
        slot.is_proven, slot.opened_at = False, asyncio.get_running_loop().time()
        slot.lost.clear()
        self._dispatch()

    def _lose(self, slot: _Slot, worker: Worker, *, reason: str) -> None:
        """Take the worker out, and what it was doing as suspects; the second to say so changes nothing."""
        if slot.worker is not worker:
            return
        jobs = self._clear(slot)
        logger.warning("worker %d (%s) was lost with %d jobs: %s", slot.rank, slot.device, len(jobs), reason)
        for job in jobs:
            if job.is_over:
                continue
            job.num_lost_workers += 1
            if job.num_lost_workers >= 2:
                logger.error("given up after two lost workers: %s", job)
                job.give_up()
            else:
                self._suspects.extend(job.alone())
        slot.lost.set()
        self._dispatch()

    def _clear(self, slot: _Slot) -> list[Job]:
        jobs, slot.jobs, slot.batch, slot.worker = slot.jobs, {}, None, None
        if self._ward is slot:
            self._ward = None
        for task in jobs.values():
            if task is not asyncio.current_task():
                task.cancel()
        return list(jobs)

    # --------------------------------------------------------------------------------------------------- jobs

    def _dispatch(self) -> None:
        """Give out what waits, as far as workers are free. Called after every change."""
        self._try_suspects()
        free = [slot for slot in self._slots if slot.worker is not None and slot is not self._ward]
        while (slot := _least_loaded(free)) is not None and slot.num_prompts < self._max_prompts:
            job = self._next_prompt()
            if job is None:
                break
            self._begin(slot, job)
        while (slot := _least_loaded(idle := [slot for slot in free if slot.batch is None])) is not None:
            batch = self._pairs.next_batch(num_sharers=len(idle))
            if batch is None:
                break
            slot.batch = batch
            self._begin(slot, batch)

    def _try_suspects(self) -> None:
        while self._suspects and self._suspects[0].is_over:
            self._suspects.popleft()
        if self._ward is None and self._suspects:
            self._ward = _least_loaded([slot for slot in self._slots if slot.worker is not None])
        if self._ward is None or self._ward.jobs:  # it empties first, then has one suspect at a time
            return
        if not self._suspects:
            self._ward = None
            return
        suspect = self._suspects.popleft()
        self._ward.batch = suspect if isinstance(suspect, PairBatch) else None
        self._begin(self._ward, suspect)

    def _next_prompt(self) -> PromptJob | None:
        while self._prompts:
            job, _ = self._prompts.popitem(last=False)
            if not job.is_over:
                return job
        return None

    def _begin(self, slot: _Slot, job: Job) -> None:
        assert slot.worker is not None
        slot.is_proven = True
        slot.jobs[job] = job.task = asyncio.create_task(self._run(slot, slot.worker, job))

    async def _run(self, slot: _Slot, worker: Worker, job: Job) -> None:
        try:
            await job.run(worker)
            slot.failed_starts = 0
        except WorkerLostError as error:
            self._lose(slot, worker, reason=str(error))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._lose(slot, worker, reason="it stopped by itself in the middle of its work")
        except Exception as error:  # the job's own; once the worker is lost, it says nothing of the job
            if slot.worker is worker:
                self._pairs.return_first(job.fail(error))
        finally:
            if slot.jobs.get(job) is asyncio.current_task():
                del slot.jobs[job]
                slot.batch = None if slot.batch is job else slot.batch
            self._dispatch()

    def _abandon(self, job: PromptJob) -> None:
        """The caller is gone or served: whoever still works for it stops."""
        self._prompts.pop(job, None)
        job.future.cancel()
        if job.task is not None:
            job.task.cancel()

    def _require_well(self) -> None:
        if self.failure is not None:
            raise PoolFailedError(self.failure)

    def _fail(self, reason: str) -> None:
        if self.failure is None:
            logger.debug("the pool ends: %s", reason)
        self.failure = self.failure or reason
        error = PoolFailedError(self.failure)
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
        async with asyncio.timeout(_CLOSING_S):
            await worker.aclose()
    except Exception:  # it is gone or going; its end must not end ours
        logger.warning("a worker did not close well", exc_info=True)
