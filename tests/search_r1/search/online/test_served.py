"""The server as users start it, over engines that are local fakes."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.processes import free_port
from tests.search_r1.search.online.fake_engines import KEY_VARIABLES, SECRET, FakeEngine, Fault
from tests.search_r1.search.small_world import SERVER, RunningServer, wait_until_ready

Start = Callable[..., RunningServer]
QUERIES = [f"question {i}" for i in range(20)]


async def started(start: Start, port: int, *flags: str) -> RunningServer:
    running = start([sys.executable, str(SERVER), *flags, "--port", str(port)], port=port)
    await asyncio.to_thread(wait_until_ready, running)
    return running


async def stopped(running: RunningServer) -> str:
    """The log."""
    running.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(running.process.wait, 30)
    return running.log.read_text()


async def ask(running: RunningServer, queries: list[str]) -> dict[str, object]:
    async with httpx.AsyncClient(trust_env=False) as client:
        body = {"queries": queries, "return_scores": True, "allow_failures": True, "timeout_s": 5}
        answer = await client.post(f"{running.url}/retrieve", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


async def test_a_run_is_recorded_and_replayed_by_the_server_and_no_key_shows(
    start_server: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    cache = str(tmp_path / "searches.sqlite")
    fault = Fault(status=401, body=f"Invalid API key: {SECRET}")
    async with (fake := FakeEngine("serpapi", faults=[fault])).running():
        flags = ["--retriever_name", "serpapi", "--online_url", fake.url, "--online_cache", cache]
        with monkeypatch.context() as environment:
            for name in KEY_VARIABLES:
                environment.setenv(name, SECRET)
            running = await started(start_server, free_port(), *flags, "--max_online_requests", "50")
        seen.append(" ".join(psutil.Process(running.process.pid).cmdline()))
        denied = await ask(running, ["denied"])
        assert denied["result"] == [None]
        assert "the key is not accepted" in str(denied["errors"])
        recorded = await ask(running, QUERIES)
        async with httpx.AsyncClient(trust_env=False) as client:
            for path in ("/version", "/metrics", "/health"):
                seen.append((await client.get(running.url + path)).text)
        seen += [str(denied), str(recorded), await stopped(running)]
        assert len(fake.asked) == 1 + len(QUERIES)
        num_connections = fake.num_connections

        replaying = await started(start_server, free_port(), *flags, "--online_mode", "replay")
        replayed = await ask(replaying, [*QUERIES, "another one"])
        seen.append(await stopped(replaying))
        assert fake.num_connections == num_connections
    assert list(replayed["result"])[:-1] == recorded["result"]  # type: ignore[call-overload]
    assert "not_recorded" in str(replayed["errors"])
    assert "21 requests so far" in seen[-2]
    for text in seen:
        assert SECRET not in text
    for file in tmp_path.iterdir():
        assert SECRET.encode() not in file.read_bytes()
