"""The pool over fake workers: everything ends exactly once and right, whatever is lost or cancelled."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from IG.sampler import PoisonedError, SampledAnswer, SamplingError
from IG.service.jobs import WorkerLostError
from IG.service.pool import PoolFailedError, WorkerPool
from IG.sharing import JudgementError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Pair = tuple[str, str]
POISON = "poison"


def answer(prompt: str) -> tuple[SampledAnswer, ...]:
    return (SampledAnswer(text=f"answer to {prompt}", mean_log_prob=-1.0, num_tokens=1),)


def probability(pair: Pair) -> float:
    return (hash(pair) % 1000) / 1000


class FakeWorkers:
    """Starts fake workers and remembers all of them; dies of poison, slows down, refuses starts on demand."""

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


async def test_prompts_go_to_the_least_loaded_and_no_worker_gets_too_many() -> None:
    fakes = FakeWorkers()
    async with fakes.pool(3, max_prompts=4) as pool:
        fakes.gate.clear()
        asked = [asyncio.create_task(pool.sample(f"prompt {index}")) for index in range(20)]
        await settle()
        assert [len(worker.prompts) for worker in fakes.workers] == [4, 4, 4]
        fakes.gate.set()
        assert await asyncio.gather(*asked) == [answer(f"prompt {index}") for index in range(20)]
        assert max(worker.most_at_work["prompts"] for worker in fakes.workers) == 4


async def test_pairs_that_wait_become_the_next_batch_and_come_back_in_order() -> None:
    fakes = FakeWorkers()
    async with fakes.pool(1, pairs_per_batch=8) as pool:
        asked = [pairs(3, f"caller {index}") for index in range(10)]
        judged = await asyncio.gather(*(pool.judge(call) for call in asked), pool.judge([]))
        assert judged == [[probability(pair) for pair in call] for call in asked] + [[]]
        sizes = [len(batch) for batch in fakes.workers[0].batches]
        assert sizes == [3, 8, 8, 8, 3]
        assert fakes.workers[0].most_at_work["batches"] == 1


async def test_a_very_long_call_does_not_block_others() -> None:
    fakes = FakeWorkers()
    async with fakes.pool(1, pairs_per_batch=8) as pool:
        giant = asyncio.create_task(pool.judge(pairs(804, "giant")))
        await asyncio.sleep(0)
        others = [pairs(count, f"caller {count}") for count in (3, 20, 8)]
        for judged, call in zip(await asyncio.gather(*map(pool.judge, others)), others, strict=True):
            assert judged == [probability(pair) for pair in call]
        assert len(fakes.workers[0].batches) < 12
        assert await giant == [probability(pair) for pair in pairs(804, "giant")]


class Held(FakeWorker):
    """Works on its first batch until it is released."""

    def __init__(self, fakes: FakeWorkers, rank: int) -> None:
        super().__init__(fakes, rank)
        self.release = asyncio.Event()

    async def _work(self, kind: str, *, dies: bool) -> None:
        await self.release.wait()
        await super()._work(kind, dies=dies)


async def test_a_worker_need_not_wait_for_the_others_between_the_batches_of_a_long_call() -> None:
    fakes = FakeWorkers()
    held = Held(fakes, 0)
    fakes.makers = [lambda *_: held]
    async with fakes.pool(2, pairs_per_batch=8) as pool:
        long = asyncio.create_task(pool.judge(pairs(100)))
        for _ in range(5):
            await settle()
        other = fakes.workers[1]
        assert [len(worker.batches) for worker in (held, other)] == [1, 12]
        held.release.set()
        assert await long == [probability(pair) for pair in pairs(100)]


async def test_free_workers_share_what_waits() -> None:
    fakes = FakeWorkers()
    async with fakes.pool(2, pairs_per_batch=64) as pool:
        await pool.judge(pairs(40))
        assert [[len(batch) for batch in worker.batches] for worker in fakes.workers] == [[20], [20]]
        await pool.judge(pairs(10))  # too few to be cut
        assert sum(len(worker.batches) for worker in fakes.workers) == 3


async def test_a_bad_prompt_and_a_bad_pair_fail_alone() -> None:
    fakes = FakeWorkers()
    async with fakes.pool(2, pairs_per_batch=64) as pool:
        asked = [*pairs(20), ("bad", "pair"), *pairs(20, "more")]
        good, bad, judged = await asyncio.gather(
            pool.sample("good"), pool.sample("bad"), pool.judge(asked), return_exceptions=True
        )
        assert good == answer("good")
        assert isinstance(bad, SamplingError)
        assert isinstance(judged, list)
        assert [outcome for outcome in judged if isinstance(outcome, Exception)] == [judged[20]]
        assert isinstance(judged[20], JudgementError)
        assert "no text" in str(judged[20])
        assert judged[:20] == [probability(pair) for pair in asked[:20]]
        assert fakes.num_lost == 0


async def test_a_cancelled_call_stops_its_work() -> None:
    fakes = FakeWorkers()
    async with fakes.pool(1, max_prompts=1, pairs_per_batch=4) as pool:
        fakes.gate.clear()
        running, waiting, last = (asyncio.create_task(pool.sample(name)) for name in ("a", "b", "c"))
        judging, dropped = (asyncio.create_task(pool.judge(pairs(4, name))) for name in ("first", "second"))
        await settle()
        for task in (running, waiting, dropped):
            task.cancel()
        await settle()
        assert fakes.workers[0].cancelled == ["a"]
        fakes.gate.set()
        assert await last == answer("c")
        assert len(await judging) == 4
        assert fakes.workers[0].prompts == ["a", "c"]
        assert fakes.workers[0].batches == [pairs(4, "first")]


async def test_work_of_a_worker_that_stops_by_itself_is_done_again() -> None:
    """A cancellation from inside the worker is a lost worker."""

    class Quitter(FakeWorker):
        async def _work(self, kind: str, *, dies: bool) -> None:
            raise asyncio.CancelledError

    fakes = FakeWorkers()
    fakes.makers = [Quitter]
    async with fakes.pool(1) as pool:
        answers, judged = await asyncio.gather(pool.sample("prompt"), pool.judge(pairs(2)))
        assert answers == answer("prompt")
        assert judged == [probability(pair) for pair in pairs(2)]
        assert pool.status.num_restarts == 1


async def test_work_of_a_lost_worker_is_retried_item_by_item() -> None:
    fakes = FakeWorkers()
    async with fakes.pool(2, max_prompts=4, pairs_per_batch=8) as pool:
        fakes.gate.clear()
        asked = [asyncio.create_task(pool.sample(f"prompt {index}")) for index in range(12)]
        judged = asyncio.create_task(pool.judge(pairs(6)))
        await settle()
        lost = fakes.workers[0]
        retried = set(lost.prompts)
        assert len(retried) == 4
        lost.die()
        await settle()
        fakes.gate.set()
        assert await asyncio.gather(*asked) == [answer(f"prompt {index}") for index in range(12)]
        assert await judged == [probability(pair) for pair in pairs(6)]
        assert pool.status.num_restarts == 1
        assert pool.status.num_ready == 2
        assert {prompt for prompt, count in fakes.sampled.items() if count == 2} == retried
        for batch in lost.batches:  # its pairs one by one
            again = [later for worker in fakes.workers[1:] for later in worker.batches]
            assert all([pair] in again for pair in batch)


async def test_items_of_a_lost_worker_are_retried_alone() -> None:
    fakes = FakeWorkers()
    async with fakes.pool(1, max_prompts=8) as pool:
        fakes.gate.clear()
        asked = [asyncio.create_task(pool.sample(f"prompt {index}")) for index in range(8)]
        await settle()
        fakes.workers[0].die()
        asked += [asyncio.create_task(pool.sample(f"later {index}")) for index in range(8)]
        judged = asyncio.create_task(pool.judge(pairs(4)))
        await settle()
        second = fakes.workers[1]
        assert len(second.prompts) == 1
        assert not second.batches
        fakes.gate.set()
        await asyncio.gather(*asked, judged)
        assert second.prompts[:8] == [f"prompt {index}" for index in range(8)]
        assert not second.cancelled


@pytest.mark.parametrize("num_workers", [1, 2, 3])
async def test_poison_is_quarantined_after_two_workers_and_its_neighbors_succeed(num_workers: int) -> None:
    fakes = FakeWorkers()
    async with fakes.pool(num_workers, max_prompts=16, pairs_per_batch=64) as pool:
        names = [*(f"prompt {index}" for index in range(7)), POISON, "prompt 7"]
        outcomes = await asyncio.gather(*map(pool.sample, names), return_exceptions=True)
        assert isinstance(outcomes.pop(7), PoisonedError)
        assert outcomes == [answer(f"prompt {index}") for index in range(8)]
        assert fakes.num_lost == 2
        asked = [*pairs(20), (POISON, "pair"), *pairs(20, "more")]
        judged = await pool.judge(asked)
        assert isinstance(judged.pop(20), PoisonedError)
        assert judged == [probability(pair) for pair in asked if pair[0] != POISON]
        assert fakes.num_lost == 4


class Stubborn(FakeWorker):
    """Does not notice that it died, and when its work is cancelled answers, late, with `late_error`."""

    def __init__(self, fakes: FakeWorkers, rank: int, late_error: Exception | None) -> None:
        super().__init__(fakes, rank)
        self.late_error = late_error
        self.num_cancelled = 0

    async def _work(self, kind: str, *, dies: bool) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            await settle()
            if self.late_error is not None:
                raise self.late_error from None


@pytest.mark.parametrize("late_error", [None, RuntimeError("half dead"), WorkerLostError("again")])
async def test_late_answers_of_a_lost_worker_are_ignored(late_error: Exception | None) -> None:
    fakes = FakeWorkers()
    stubborn = Stubborn(fakes, 0, late_error)
    fakes.makers = [lambda *_: stubborn]
    async with fakes.pool(1, max_prompts=2) as pool:
        asked = [asyncio.create_task(pool.sample(f"prompt {index}")) for index in range(4)]
        judged = asyncio.create_task(pool.judge(pairs(16)))
        await settle()
        fakes.gate.clear()
        stubborn.die()
        for _ in range(5):
            await settle()
        assert pool.status.num_ready == 1
        assert stubborn.num_cancelled == 3  # two prompts and a batch
        fakes.gate.set()
        assert await asyncio.gather(*asked) == [answer(f"prompt {index}") for index in range(4)]
        assert await judged == [probability(pair) for pair in pairs(16)]
        assert len(fakes.workers) == 2


async def test_a_late_answer_of_a_lost_worker_does_not_hide_failed_starts() -> None:
    answering = asyncio.Event()

    class Late(FakeWorker):
        async def _work(self, kind: str, *, dies: bool) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await answering.wait()

    class Starts(FakeWorkers):
        async def start(self, rank: int) -> FakeWorker:
            if len(self.failing_starts) == 1:  # the last of three
                answering.set()
                await settle()
            return await super().start(rank)

    fakes = Starts()
    fakes.makers = [Late]
    async with fakes.pool(1) as pool:
        asked = asyncio.create_task(pool.sample("prompt"))
        await settle()
        fakes.failing_starts = [OSError("no")] * 3
        fakes.workers[0].die()
        await asked
        for _ in range(5):
            await settle()
        assert pool.status.failure is not None


async def test_failed_starts_count_in_a_row_only() -> None:
    fakes = FakeWorkers()
    async with fakes.pool(1) as pool:
        for _ in range(3):
            assert await pool.sample("prompt") == answer("prompt")
            fakes.failing_starts = [OSError("no"), OSError("no")]
            fakes.workers[-1].die()
            await settle()
        assert await pool.sample("prompt") == answer("prompt")
        assert (pool.status.failure, pool.status.num_restarts) == (None, 3)


async def test_all_work_fails_when_no_worker_can_be_started() -> None:
    fakes = FakeWorkers()
    async with fakes.pool(2) as pool:
        fakes.gate.clear()
        asked = [asyncio.create_task(pool.sample(f"prompt {index}")) for index in range(20)]
        judged = asyncio.create_task(pool.judge(pairs(20)))
        await settle()
        fakes.failing_starts = [OSError("no")] * 6
        for worker in fakes.workers:
            worker.die()
        outcomes = await asyncio.gather(*asked, judged, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {PoolFailedError}
        assert pool.status.failure is not None
        assert "none could be started" in pool.status.failure
        with pytest.raises(PoolFailedError):
            await pool.sample("later")


async def test_workers_that_die_at_their_start_are_not_restarted_for_ever() -> None:
    fakes = FakeWorkers()
    pool = WorkerPool(fakes.start, num_workers=1, max_prompts_in_flight=1, pairs_per_batch=1, retry_pause_s=0)
    await pool.start()
    while pool.status.failure is None:
        fakes.workers[-1].die()
        await settle()
    assert len(fakes.workers) == 3
    await pool.aclose()


async def test_a_worker_that_is_lost_unused_after_its_minimum_uptime_is_no_failed_start() -> None:
    fakes = FakeWorkers()
    async with fakes.pool(2, min_uptime_s=0) as pool:
        for _ in range(5):
            fakes.workers[-1].die()
            await settle()
        assert (pool.status.num_ready, pool.status.num_restarts) == (2, 5)


async def test_a_pool_that_cannot_start_leaves_no_worker() -> None:
    fakes = FakeWorkers()
    fakes.failing_starts = [OSError("no GPU")]
    pool = WorkerPool(fakes.start, num_workers=3, max_prompts_in_flight=1, pairs_per_batch=1)
    with pytest.raises(OSError, match="no GPU"):
        await pool.start()
    assert all(worker.is_closed for worker in fakes.workers)


async def test_a_start_that_takes_too_long_is_named() -> None:
    async def start(rank: int) -> FakeWorker:
        await asyncio.sleep(60)
        raise AssertionError

    pool = WorkerPool(start, num_workers=1, max_prompts_in_flight=1, pairs_per_batch=1, start_timeout_s=0.01)
    with pytest.raises(TimeoutError, match=r"worker 0 was not ready after 0.01 s"):
        await pool.start()


async def test_closing_fails_what_waits_and_closes_every_worker() -> None:
    fakes = FakeWorkers()
    fakes.gate.clear()
    pool = WorkerPool(fakes.start, num_workers=2, max_prompts_in_flight=1, pairs_per_batch=4)
    await pool.start()
    asked = [asyncio.create_task(pool.sample(f"prompt {index}")) for index in range(5)]
    judged = asyncio.create_task(pool.judge(pairs(20)))
    await settle()
    await pool.aclose()
    outcomes = await asyncio.gather(*asked, judged, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {PoolFailedError}
    assert all(worker.is_closed for worker in fakes.workers)


def count_unlucky(
    asked: dict[str, asyncio.Task[Any]], judged: list[tuple[list[Pair], asyncio.Task[Any]]], leaving: set[Any]
) -> int:
    """Count quarantined items that are no poison; every other one must have its own outcome."""
    unlucky = 0
    for name, task in asked.items():
        if task.cancelled():
            assert task in leaving
        elif isinstance(task.exception(), PoisonedError):
            unlucky += POISON not in name
        else:
            assert task.result() == answer(name)
    for call, task in judged:
        assert not task.cancelled() or task in leaving
        outcomes = [None] * len(call) if task.cancelled() else task.result()
        for pair, outcome in zip(call, outcomes, strict=True):
            unlucky += isinstance(outcome, PoisonedError) and POISON not in pair[0]
            assert outcome is None or isinstance(outcome, PoisonedError) or outcome == probability(pair)
    return unlucky


@pytest.mark.parametrize("seed", range(30))
async def test_random_losses_and_cancellations_end_every_call_once_and_right(seed: int) -> None:
    """Random deaths, poison and callers who leave, at random moments."""
    chance = random.Random(seed)

    async def pause() -> None:
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)

    fakes = FakeWorkers(pause=pause)
    killed: set[FakeWorker] = set()

    async def kill_some() -> None:
        for _ in range(chance.randrange(4)):
            await pause()
            await pause()
            worker = chance.choice(fakes.workers)
            if not worker.dead.is_set():
                killed.add(worker)
                worker.die()

    poisons = [f"{POISON} {index}" for index in range(chance.randrange(3))]
    names = [f"prompt {index}" for index in range(60)] + poisons
    calls = [pairs(chance.randrange(1, 20), f"call {index}") for index in range(20)]
    if is_pair_poisoned := chance.random() < 0.5:
        calls[3].append((POISON, "pair"))
    chance.shuffle(names)
    async with fakes.pool(chance.randrange(1, 4), max_prompts=chance.randrange(1, 9)) as pool:
        asked = {name: asyncio.create_task(pool.sample(name)) for name in names}
        judged = [(call, asyncio.create_task(pool.judge(call))) for call in calls]
        everything = [*asked.values(), *(task for _, task in judged)]
        leaving = set(chance.sample(everything, 8))
        killing = asyncio.create_task(kill_some())
        for task in leaving:
            await pause()
            task.cancel()
        await asyncio.wait([*everything, killing])
        assert pool.status.failure is None
    # A neighbor is quarantined only when it is alone on a worker that is killed, for the second time.
    assert count_unlucky(asked, judged, leaving) <= len(killed)
    assert fakes.num_lost <= len(killed) + 2 * (len(poisons) + is_pair_poisoned)
    assert all(worker.most_at_work["batches"] <= 1 for worker in fakes.workers)
    assert max(fakes.sampled.values()) <= 2
