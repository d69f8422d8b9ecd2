"""Callers who leave, deadlines, turns, and the end."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from tests.IG.service.backends import GOOD, FakeBackend, calling, serving
from tests.processes import eventually


async def test_work_of_a_caller_that_disconnects_is_cancelled() -> None:
    backend = FakeBackend(sampling_s=60)
    async with serving(backend) as client:
        port = client.base_url.port
        assert port is not None
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"items": [GOOD] * 3}).encode()
        head = "POST /compute_info_gain HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await eventually(lambda: backend.running == 1)
        assert "ig_items_in_progress 3.0" in (await client.get("/metrics")).text
        writer.close()
        await eventually(lambda: backend.num_cancelled == 1)
        metrics = (await client.get("/metrics")).text
    assert "ig_items_in_progress 0.0" in metrics
    assert 'ig_requests_total{status="499"} 1.0' in metrics


async def test_a_caller_that_disconnects_while_waiting_takes_no_turn() -> None:
    backend = FakeBackend(gate=asyncio.Event())
    async with serving(backend, "--max-concurrent-requests", "1") as client:
        first = asyncio.create_task(client.post("/compute_info_gain", json={"items": [GOOD]}))
        await eventually(lambda: backend.running == 1)
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/compute_info_gain", json={"items": [GOOD]}, timeout=0.1)
        while 'ig_requests_total{status="499"} 1.0' not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.01)
        backend.gate.set()
        assert (await first).status_code == 200
    assert len(backend.timeouts_s) == 1


async def test_the_deadline_of_the_request_goes_before_the_settings() -> None:
    backend = FakeBackend()
    async with calling(backend, "--request-timeout-s", "50") as client:
        await client.post("/compute_info_gain", json={"items": [GOOD]})
        await client.post("/compute_info_gain", json={"items": [GOOD], "timeout_s": 7})
        await client.post("/compute_info_gain", json={"items": [GOOD], "timeout_s": None})
    assert backend.timeouts_s == [pytest.approx(50, abs=1), pytest.approx(7, abs=1), pytest.approx(50, abs=1)]


async def test_late_items_have_no_score_and_say_so() -> None:
    async with calling(FakeBackend(sampling_s=30)) as client:
        late = await client.post("/compute_info_gain", json={"items": [GOOD, GOOD], "timeout_s": 0.1})
    assert late.status_code == 200
    assert late.json()["scores"] == [None, None]
    assert all(error.startswith("deadline: ") for error in late.json()["errors"])


async def test_waiting_for_a_turn_counts_against_the_deadline() -> None:
    backend = FakeBackend(gate=asyncio.Event())
    async with serving(backend, "--max-concurrent-requests", "1") as client:
        first = asyncio.create_task(client.post("/compute_info_gain", json={"items": [GOOD]}))
        await eventually(lambda: backend.running == 1)
        body = {"items": [GOOD], "timeout_s": 0.1}
        late = (await client.post("/compute_info_gain", json=body)).json()
        backend.gate.set()
        assert (await first).json()["scores"] == [0.5]
    assert late["errors"] == ["deadline: other requests were worked on until then"]
    assert len(backend.timeouts_s) == 1
