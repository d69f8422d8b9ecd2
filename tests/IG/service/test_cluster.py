from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest

from IG.sampler import SamplingError
from IG.service.cluster import RayCluster
from IG.service.jobs import WorkerLostError
from tests.processes import eventually

pytestmark = pytest.mark.slow


class Host:
    """Everything that an actor may do."""

    async def double(self, number: int) -> int:
        await asyncio.sleep(0.01)
        return 2 * number

    async def refuse(self) -> None:
        raise SamplingError("the prompt is too long")

    async def sleep_until_cancelled(self, folder: str) -> None:
        (Path(folder) / "started").touch()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            (Path(folder) / "cancelled").touch()
            raise

    async def identify(self) -> tuple[int, dict[str, str]]:
        return os.getpid(), dict(os.environ)

    async def die(self) -> None:
        sys.stderr.write("out of cheese\n")
        sys.stderr.flush()
        os._exit(3)


@asynccontextmanager
async def cluster() -> AsyncIterator[RayCluster]:
    started = await RayCluster.start()
    try:
        yield started
    finally:
        await started.aclose()


async def test_a_signal_to_stop_reaches_the_handler_and_not_ray(capfd: pytest.CaptureFixture[str]) -> None:
    received: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [
        signal.signal(number, lambda arrived, _: loop.call_soon_threadsafe(received.put_nowait, arrived))
        for number in numbers
    ]
    try:
        async with cluster():
            for number in numbers:
                os.kill(os.getpid(), number)
                assert await received.get() == number
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert "SIGTERM" not in capfd.readouterr().err


async def test_actors_answer_refuse_stop_and_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IG_TOKEN", "hush")
    monkeypatch.setenv("HF_TOKEN", "needed")
    handler = signal.getsignal(signal.SIGTERM)
    async with cluster() as started:
        assert signal.getsignal(signal.SIGTERM) is handler
        assert os.environ["IG_TOKEN"] == "hush"
        first, second = (started.launch(Host, name=name) for name in ("first", "second"))
        assert await asyncio.gather(*(first.call("double", i) for i in range(50))) == list(range(0, 100, 2))
        with pytest.raises(SamplingError, match="the prompt is too long"):
            await first.call("refuse")

        pid, environment = await first.call("identify")
        first.pid = pid
        assert "IG_TOKEN" not in environment
        assert environment["HF_TOKEN"] == "needed"
        assert Path(environment["RAY_AUTH_TOKEN_PATH"]).parent == started._ray.folder

        waiting = asyncio.create_task(first.call("sleep_until_cancelled", str(tmp_path)))
        await eventually((tmp_path / "started").exists)
        waiting.cancel()
        await eventually((tmp_path / "cancelled").exists)

        with pytest.raises(WorkerLostError, match=r"the process of first died(.|\n)*out of cheese"):
            await first.call("die")
        with pytest.raises(WorkerLostError):
            await first.call("double", 1)
        assert await second.call("double", 1) == 2
    assert not [child for child in psutil.Process().children(recursive=True) if "ray" in child.name()]


async def test_a_cancelled_start_leaves_no_process() -> None:
    before = set(psutil.Process().children(recursive=True))

    def live_children() -> list[str]:
        found = []
        for child in set(psutil.Process().children(recursive=True)) - before:
            with suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child.name())
        return found

    starting = asyncio.create_task(RayCluster.start())
    await eventually(lambda: "gcs_server" in live_children())
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await eventually(lambda: not live_children())
