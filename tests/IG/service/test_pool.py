"""The pool over fake workers: work is shared, and every call ends exactly once and right."""

from __future__ import annotations

import asyncio

import pytest

from IG.sampler import SamplingError
from IG.service.pool import PoolFailedError, WorkerPool
from IG.sharing import JudgementError
from tests.IG.service.pool_workers import (
    FakeWorker,
    FakeWorkers,
    answer,
    pairs,
    probability,
    settle,
)


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
