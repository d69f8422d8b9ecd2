from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serving.web import limits
from tests.IG.service.backends import GOOD, FakeBackend, calling, serving
from tests.processes import announcing, first_line

TOKEN = "a-token-of-ours"
HEAD = {"Content-Type": "application/json"}
PATH = "/compute_info_gain"


async def test_too_many_items_are_refused_with_what_to_do() -> None:
    async with calling(FakeBackend(), "--max-items", "3") as client:
        fits = await client.post("/compute_info_gain", json={"items": [GOOD] * 3})
        refused = await client.post("/compute_info_gain", json={"items": [GOOD] * 4})
    assert fits.status_code == 200
    assert refused.status_code == 413
    assert refused.json()["detail"] == (
        "the request has 4 items, expected at most 3; split it or raise --max-items"
    )


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_long_body_is_refused_while_it_comes(chunked: bool) -> None:
    body = json.dumps({"items": [GOOD | {"context": "word " * 100_000}]}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1 << 14):
            yield body[start : start + (1 << 14)]

    async with serving(FakeBackend(), "--max-body-mb", "0.1") as client:
        content = pieces() if chunked else body
        refused = await client.post("/compute_info_gain", content=content, headers=HEAD)
        fits = await client.post("/compute_info_gain", json={"items": [GOOD]})
    assert refused.status_code == 413
    assert refused.json()["detail"].startswith("the body is longer than 0.1 MiB; send fewer items")
    assert fits.status_code == 200


async def test_a_full_queue_refuses_before_the_body_is_read() -> None:
    backend = FakeBackend(pause_s=60)
    async with serving(backend, "--max-queued-items", "2") as client:
        work = asyncio.create_task(client.post("/compute_info_gain", json={"items": [GOOD] * 2}))
        while not backend.running:
            await asyncio.sleep(0.01)
        async with announcing(client, PATH, 1000) as (reader, _):
            assert (await first_line(reader)).startswith("HTTP/1.1 429")
        refused = await client.post("/compute_info_gain", json={"items": [GOOD]})
        assert int(refused.headers["Retry-After"]) >= 1
        assert "the queue is full: 2 of 2 items" in refused.json()["detail"]
        work.cancel()


async def test_a_body_that_trickles_in_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_BODY_S", 0.5)
    async with serving(FakeBackend(pause_s=0.8)) as client:
        slow = asyncio.create_task(client.post("/compute_info_gain", json={"items": [GOOD]}))
        async with announcing(client, PATH, 1000) as (reader, writer):
            for _ in range(4):
                writer.write(b"[")
                await asyncio.sleep(0.1)
            answer = await reader.read()  # to its end: the connection is closed
        assert (await slow).json()["scores"] == [0.5], "the time of the work does not count"
        metrics = (await client.get("/metrics")).text
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"the body was not there after 0.5 s" in answer
    assert 'ig_requests_total{status="408"} 1.0' in metrics


async def test_a_caller_that_disconnects_within_its_body_is_counted_as_499() -> None:
    async with serving(FakeBackend()) as client:
        async with announcing(client, PATH, 1000) as (_, writer):
            writer.write(b"[")
            await writer.drain()
        while 'ig_requests_total{status="' not in (metrics := (await client.get("/metrics")).text):
            await asyncio.sleep(0.01)
    assert 'ig_requests_total{status="499"} 1.0' in metrics


async def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many callers there are: from the first byte of a body to its answer."""
    monkeypatch.setattr(limits, "_BODIES_HELD", 2)
    body = json.dumps({"items": [GOOD | {"context": "good " * 15_000}]}).encode()
    backend = FakeBackend(gate=asyncio.Event())
    async with (
        serving(backend, "--max-body-mb", "0.1") as client,
        announcing(client, PATH, 100_000) as (_, writer),
    ):
        writer.write(body)
        worked_on = asyncio.create_task(client.post("/compute_info_gain", content=body, headers=HEAD))
        while not backend.running:
            await asyncio.sleep(0.01)
        refused = await client.post("/compute_info_gain", content=body, headers=HEAD)
        backend.gate.set()
        await worked_on
        fits = await client.post("/compute_info_gain", content=body, headers=HEAD)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert "bodies of 0.215 MiB wait or are worked on" in refused.json()["detail"]
    assert (fits.status_code, fits.json()["errors"]) == (200, [None])


async def test_nothing_keeps_a_body_once_it_is_answered() -> None:
    """Reference cycles would: the collector may come much later, after many bodies."""
    bodies = [
        json.dumps({"items": items}).encode()
        for items in ([GOOD], [0], [GOOD] * 5000, [GOOD | {"answers": 1}])
    ]
    bodies += [b'{"items": [,]}', b'{"items": "\xff"}', b"[" * 100_000, b"9" * 5000, b"," * 2_000_000]

    def num_kept() -> int:
        return sum(type(thing).__name__ in ("BoundedRequest", "_BoundedBody") for thing in gc.get_objects())

    async with serving(FakeBackend()) as client:
        gc.collect()
        gc.disable()
        try:
            for body in bodies:
                await client.post("/compute_info_gain", content=body, headers=HEAD)
                while num_kept():  # a hang is ended by the limit that every test has
                    await asyncio.sleep(0.01)
            async with announcing(client, PATH, 1000) as (_, writer):
                writer.write(b"[")
                while not num_kept():
                    await asyncio.sleep(0.01)
            while num_kept():
                await asyncio.sleep(0.01)
        finally:
            gc.enable()


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
async def test_a_compressed_body_is_refused(encoding: str) -> None:
    async with calling(FakeBackend()) as client:
        headers = HEAD | {"Content-Encoding": encoding}
        refused = await client.post("/compute_info_gain", content=b"\x1f\x8b\x08", headers=headers)
        plain = await client.post(
            "/compute_info_gain", content=b'{"items": []}', headers=HEAD | {"Content-Encoding": "identity"}
        )
    assert (refused.status_code, plain.status_code) == (415, 200)


@pytest.mark.parametrize(
    "presented", [None, "Bearer ", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer \xff"]
)
async def test_without_the_token_everything_is_refused(presented: str | None) -> None:
    headers = {} if presented is None else {"Authorization": presented.encode("latin-1")}
    async with calling(FakeBackend(), environ={"IG_TOKEN": TOKEN}) as client:
        refusals = [
            await client.get(path, headers=headers)
            for path in ("/metrics", "/version", "/openapi.json", "/docs", "/nowhere", "/metrics/")
        ]
        refusals.append(await client.post("/compute_info_gain", headers=headers, content=b"not even json"))
    for refused in refusals:
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert TOKEN not in refused.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
async def test_the_token_opens_everything_and_states_are_open_anyway(scheme: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    key = {"Authorization": f"{scheme} {TOKEN}"}
    async with calling(FakeBackend(), "--token-file", str(tmp_path / "token")) as client:
        opened = [await client.get(path) for path in ("/health", "/livez", "/readyz")]
        opened += [await client.get(path, headers=key) for path in ("/metrics", "/version", "/openapi.json")]
        opened.append(await client.post("/compute_info_gain", json={"items": [GOOD]}, headers=key))
    assert [answer.status_code for answer in opened] == [200] * 7
