"""Workers that are lost or do not start: everything ends exactly once and right, whatever is cancelled."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from IG.sampler import PoisonedError
from IG.service.jobs import WorkerLostError
from IG.service.pool import PoolFailedError, WorkerPool
from tests.IG.service.pool_workers import (
    POISON,
    FakeWorker,
    FakeWorkers,
    Pair,
    answer,
    pairs,
    probability,
    settle,
)


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
