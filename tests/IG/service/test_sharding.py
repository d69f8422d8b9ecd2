"""The real models, here and in Ray actors: the same numbers, and nothing is lost when processes are."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pyarrow.parquet as parquet
import pytest

from IG.config import resolve_config
from IG.estimator import GainEstimate, GainQuery
from IG.service.backend import PooledBackend

WORLD = Path(__file__).resolve().parents[3] / "world"

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]


def queries(*, start: int, stop: int) -> list[GainQuery]:
    """Questions of the embedded world; every second context holds an answer."""
    rows = parquet.read_table(WORLD / "test.parquet", columns=["question", "golden_answers"])
    return [
        GainQuery(
            question=row["question"],
            context=f'Doc 1(Title: "Note") {row["question"]} {row["golden_answers"][0] * (index % 2)}.',
            golds=tuple(row["golden_answers"]),
        )
        for index, row in enumerate(rows.slice(start, stop - start).to_pylist())
    ]


@asynccontextmanager
async def backend(num_workers: int) -> AsyncIterator[PooledBackend]:
    """It remembers next to nothing, so that what is asked again is computed again."""
    flags = ["--device", "cpu", "--num-workers", str(num_workers), "--max-new-tokens", "8"]
    flags += ["--sub-batch-size", "64", "--cpu-cache-gb", "0.25"]
    flags += ["--sample-cache-size", "1", "--pair-cache-size", "1"]
    started = await PooledBackend.start(resolve_config(flags, environ={}))
    try:
        yield started
    finally:
        await started.aclose()


async def gains(service: PooledBackend, *, start: int = 0, stop: int = 20) -> list[float]:
    estimates = await service.estimate(queries(start=start, stop=stop), details=False, timeout_s=300)
    failed = [outcome for outcome in estimates.outcomes if not isinstance(outcome, GainEstimate)]
    assert not failed, failed[:2]
    assert estimates.work.prompts_sampled >= stop - start
    return [outcome.gain for outcome in estimates.outcomes if isinstance(outcome, GainEstimate)]


def processes(name: str) -> list[psutil.Process]:
    """Return living descendants; an engine that has ended stays a zombie until Python looks for it."""
    children = psutil.Process().children(recursive=True)
    return [
        child
        for child in children
        if child.name().startswith(name) and child.status() != psutil.STATUS_ZOMBIE
    ]


async def gains_while_one_is_killed(service: PooledBackend, name: str) -> list[float]:
    """Of 60 items, with a process of that name killed while they are worked on."""
    working = asyncio.create_task(gains(service, stop=60))
    await asyncio.sleep(0.3)
    assert not working.done()
    processes(name)[0].kill()
    return await working


async def test_one_worker_and_two_give_the_same_gains_also_when_processes_are_killed() -> None:
    async with backend(2) as sharded:
        expected = await gains(sharded)
        assert len(set(expected)) > 3
        many = await gains(sharded, stop=60)
        assert many[:20] == expected  # whatever else is in the batch
        identity = sharded.identity
        assert len(processes("ray::_Host")) == 2
        assert await gains_while_one_is_killed(sharded, "ray::_Host") == many
        assert (sharded.workers.devices, sharded.workers.failure) == (("cpu", "cpu"), None)
        async with asyncio.timeout(200):
            while sharded.workers.num_ready < 2:
                await asyncio.sleep(0.5)
        assert sharded.workers.num_restarts == 1
        assert await gains_while_one_is_killed(sharded, "VLLM::EngineCor") == many
    async with backend(1) as local:
        assert gc.get_freeze_count() > 100_000  # the collector does not look through the models
        assert await gains(local, stop=60) == many
        assert await gains_while_one_is_killed(local, "VLLM::EngineCor") == many
        status = local.workers
        assert (status.devices, status.num_restarts, status.num_ready) == (("cpu",), 1, 1)
        assert local.identity == identity
    assert not processes("VLLM")
    assert not processes("ray")
