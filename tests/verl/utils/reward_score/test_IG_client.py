from __future__ import annotations

import asyncio
import json
import time

import pytest

from tests.fakes import Reply, ScriptedServer
from verl.errors import ServiceError
from verl.utils.reward_score.IG_client import GainRequest, GainResult, IGClient

GOLDS = ("Bolton", "Bolton, England")


def requests(count: int) -> list[GainRequest]:
    return [GainRequest(question=f"Where {i}?", context="größe", golds=GOLDS) for i in range(count)]


def answer(scores: list[float | None], errors: list[str | None] | None = None) -> Reply:
    return Reply(json.dumps({"scores": scores, "errors": errors or [None] * len(scores), "details": None}))


async def compute(
    server: ScriptedServer, count: int, *, batch_size: int = 256, timeout_s: float = 5.0
) -> list[GainResult]:
    async with server.running():
        client = IGClient(server.url + "/", timeout_s=timeout_s, batch_size=batch_size)
        try:
            return await client.compute(requests(count))
        finally:
            await client.aclose()


async def test_gains_come_back_in_order_and_the_request_is_the_published_one() -> None:
    server = ScriptedServer([answer([0.5, None, -0.25], [None, "prompt too long", None])])
    results = await compute(server, 3)
    assert results == [
        GainResult(gain=0.5, error=None),
        GainResult(gain=None, error="IG service: prompt too long"),
        GainResult(gain=-0.25, error=None),
    ]
    line, _, body = server.requests[0]
    assert line.startswith("POST /compute_info_gain ")
    assert json.loads(body)["include_details"] is False
    assert json.loads(body)["items"][2] == {
        "question": "Where 2?",
        "context": "größe",
        "answers": list(GOLDS),
    }


async def test_nothing_is_asked_for_nothing() -> None:
    server = ScriptedServer([Reply(status=500)])
    assert await compute(server, 0) == []
    assert server.requests == []


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Reply("kaput", 500), "500"),
        (Reply(hangs_up=True), "no usable answer within"),
        (Reply(delay_s=60), "no usable answer within 1 s"),
        (Reply('{"scores": [NaN, 0.5], "errors": [null, null]}'), "NaN"),
        (answer([0.5]), "asked for 2 scores, got 1"),
        (Reply('{"scores": [0.5, 0.5], "errors": [null]}'), "1 errors"),
        (Reply('{"scores": 3}'), "must hold lists"),
        (Reply("[]"), "not an object"),
        (answer([None, None]), "finite score was expected, got None"),
        (Reply('{"scores": ["0.5", true], "errors": [null, null]}'), "finite score was expected"),
        (Reply('{"scores": [1e999, 1e999], "errors": [null, null]}'), "finite score was expected, got inf"),
    ],
)
async def test_a_failure_is_named_and_never_a_number(reply: Reply, why: str) -> None:
    started = time.monotonic()
    results = await compute(ScriptedServer([reply]), 2, timeout_s=1.0)
    assert time.monotonic() - started < 10
    for result in results:
        assert result.gain is None
        assert result.error is not None
        assert why in result.error


async def test_a_failed_chunk_does_not_touch_the_others() -> None:
    results = await compute(ScriptedServer([Reply("kaput", 500), answer([0.5, 0.5])]), 6, batch_size=2)
    failed = [result.gain is None for result in results]
    assert sorted(failed[::2]) == [False, False, True]
    assert failed[::2] == failed[1::2]


async def test_chunks_do_not_time_out_behind_each_other() -> None:
    """A server that works on one chunk at a time: six of them take longer than the timeout of each."""
    busy = asyncio.Lock()
    waiting: list[int] = []
    most = 0
    body = answer([0.5]).body

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
        waiting.append(1)
        most = max(most, len(waiting))
        async with busy:
            await asyncio.sleep(0.3)
        waiting.pop()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write((head + body).encode())
        writer.close()

    server = await asyncio.start_server(play, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = IGClient(url, timeout_s=1.2, batch_size=1)
    together = await asyncio.gather(client.compute(requests(3)), client.compute(requests(3)))
    await client.aclose()
    server.close()
    assert together == [[GainResult(gain=0.5, error=None)] * 3] * 2
    assert most == 2


async def test_wait_ready_waits_until_the_models_are_loaded() -> None:
    loading = Reply('{"status": "unhealthy", "message": "Models not loaded"}')
    healthy = {"status": "healthy", "mode": "single-CPU", "device": "cpu"}
    server = ScriptedServer([loading, loading, Reply(json.dumps(healthy))])
    async with server.running():
        client = IGClient(server.url, timeout_s=5)
        assert await client.wait_ready(10) == healthy
        await client.aclose()


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Reply('{"status": "unhealthy", "message": "Models not loaded"}'), "Models not loaded"),
        (Reply(delay_s=60), "no answer"),
    ],
)
async def test_wait_ready_gives_up_and_names_what_to_start(reply: Reply, why: str) -> None:
    async with (server := ScriptedServer([reply])).running():
        client = IGClient(server.url, timeout_s=5)
        started = time.monotonic()
        with pytest.raises(ServiceError, match=f"{why}.*IG_service_launch.sh"):
            await client.wait_ready(1.2)
        assert time.monotonic() - started < 10
        await client.aclose()
