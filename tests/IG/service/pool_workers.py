"""Fake workers for tests of the pool: they die of poison, slow down and refuse to start on demand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from IG.sampler import SampledAnswer, SamplingError
from IG.service.jobs import WorkerLostError
from IG.service.pool import WorkerPool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Pair = tuple[str, str]
POISON = "poison"


def answer(prompt: str) -> tuple[SampledAnswer, ...]:
    return (SampledAnswer(text=f"answer to {prompt}", mean_log_prob=-1.0, num_tokens=1),)


def probability(pair: Pair) -> float:
    return (hash(pair) % 1000) / 1000


class FakeWorkers:
    """Starts fake workers and remembers all of them."""

    def __init__(self, *, pause: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)) -> None:
        self.workers: list[FakeWorker] = []
        self.failing_starts: list[Exception] = []
        self.makers: list[Callable[[FakeWorkers, int], FakeWorker]] = []
        """Of the first workers."""
        self.sampled: Counter[str] = Counter()
        self.pause = pause
        self.gate = asyncio.Event()
        self.gate.set()

    async def start(self, rank: int) -> FakeWorker:
        await asyncio.sleep(0)
        if self.failing_starts:
            raise self.failing_starts.pop(0)
        make = self.makers.pop(0) if self.makers else FakeWorker
        worker = make(self, rank)
        self.workers.append(worker)
        return worker

    @property
    def num_lost(self) -> int:
        return sum(worker.dead.is_set() for worker in self.workers)

    @asynccontextmanager
    async def pool(
        self,
        num_workers: int = 2,
        *,
        max_prompts: int = 4,
        pairs_per_batch: int = 8,
        min_uptime_s: float = 60.0,
    ) -> AsyncIterator[WorkerPool]:
        pool = WorkerPool(
            self.start,
            num_workers=num_workers,
            max_prompts_in_flight=max_prompts,
            pairs_per_batch=pairs_per_batch,
            retry_pause_s=0,
            min_uptime_s=min_uptime_s,
        )
        await pool.start()
        async with asyncio.timeout(200):
            yield pool
        await pool.aclose()
        assert all(worker.is_closed for worker in self.workers)


class FakeWorker:
    def __init__(self, fakes: FakeWorkers, rank: int) -> None:
        self.device = f"fake:{rank}"
        self.fakes = fakes
        self.dead = asyncio.Event()
        self.prompts: list[str] = []
        self.batches: list[list[Pair]] = []
        self.at_work: Counter[str] = Counter()
        self.most_at_work: Counter[str] = Counter()
        self.cancelled: list[str] = []
        self.is_closed = False

    def die(self) -> None:
        self.dead.set()

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        self.prompts.append(prompt)
        self.fakes.sampled[prompt] += 1
        try:
            await self._work("prompts", dies=POISON in prompt)
        except asyncio.CancelledError:
            self.cancelled.append(prompt)
            raise
        if "bad" in prompt:
            raise SamplingError(f"{prompt} is bad")
        return answer(prompt)

    async def judge(self, pairs: Sequence[Pair]) -> list[float]:
        self.batches.append(list(pairs))
        await self._work("batches", dies=any(POISON in pair[0] for pair in pairs))
        if any("bad" in pair[0] for pair in pairs):
            raise TypeError("no text")
        return [probability(pair) for pair in pairs]

    async def wait_lost(self) -> str:
        await self.dead.wait()
        return "killed"

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.is_closed = True

    async def _work(self, kind: str, *, dies: bool) -> None:
        self.at_work[kind] += 1
        self.most_at_work[kind] = max(self.most_at_work[kind], self.at_work[kind])
        try:
            await self.fakes.gate.wait()
            await self.fakes.pause()
            if dies:
                self.die()
            if self.dead.is_set():
                raise WorkerLostError("killed")
        finally:
            self.at_work[kind] -= 1


def pairs(count: int, name: str = "premise") -> list[Pair]:
    return [(f"{name} {index}", "hypothesis") for index in range(count)]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)
