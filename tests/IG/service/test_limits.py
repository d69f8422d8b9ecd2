from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from IG.service.limits import Admission, QueueFullError
from tests.IG.service.backends import GOOD, FakeBackend, calling, serving

TOKEN = "a-token-of-ours"
HEAD = {"Content-Type": "application/json"}


async def test_too_many_items_are_refused_with_what_to_do() -> None:
    async with calling(FakeBackend(), "--max-items", "3") as client:
        fits = await client.post("/compute_info_gain", json={"items": [GOOD] * 3})
        refused = await client.post("/compute_info_gain", json={"items": [GOOD] * 4})
    assert fits.status_code == 200
    assert refused.status_code == 413
    assert refused.json()["detail"] == (
        "the request has 4 items, expected at most 3; split it or raise --max-items"
    )


async def test_a_request_that_never_fits_the_queue_is_not_told_to_come_back() -> None:
    async with calling(FakeBackend(), "--max-queued-items", "3") as client:
        refused = await client.post("/compute_info_gain", json={"items": [GOOD] * 4})
    assert refused.status_code == 413
    assert "--max-queued-items" in refused.json()["detail"]


async def test_a_full_queue_is_a_429_with_a_time() -> None:
    backend = FakeBackend(pause_s=0.3)
    async with serving(backend, "--max-queued-items", "4") as client:
        first = asyncio.create_task(client.post("/compute_info_gain", json={"items": [GOOD] * 3}))
        while not backend.running:
            await asyncio.sleep(0.01)
        refused = await client.post("/compute_info_gain", json={"items": [GOOD] * 2})
        assert (await first).status_code == 200
        again = await client.post("/compute_info_gain", json={"items": [GOOD] * 2})
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert "the queue is full: 3 of 4 items" in refused.json()["detail"]
    assert again.status_code == 200


def test_the_time_to_come_back_follows_the_recent_rate() -> None:
    times: Iterator[float] = iter([0.0, 0.0, 10.0, 10.0])
    admission = Admission(max_items=100, clock=lambda: next(times, 10.0))
    with admission.admit(20):
        pass  # answered at 0 s: 20 items in the 10 s until now, 2 a second
    with admission.admit(100), pytest.raises(QueueFullError) as full:
        admission.admit(30).__enter__()
    assert full.value.retry_after_s == 15
    assert admission.num_items == 0


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


async def test_a_body_that_only_says_it_is_long_is_refused_unread() -> None:
    async with serving(FakeBackend()) as client:
        assert client.base_url.port is not None
        with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
            connection.sendall(
                b"POST /compute_info_gain HTTP/1.1\r\nHost: here\r\nContent-Length: 99999999999\r\n"
                b"Content-Type: application/json\r\n\r\n"
            )
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            answer = await asyncio.wait_for(loop.sock_recv(connection, 1 << 16), 2)
    assert answer.startswith(b"HTTP/1.1 413")


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
    "presented",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        "Bearer \xff",
    ],
)
async def test_without_the_token_nothing_is_told(presented: str | None) -> None:
    headers = {} if presented is None else {"Authorization": presented.encode("latin-1")}
    async with calling(FakeBackend(), environ={"IG_TOKEN": TOKEN}) as client:
        refusals = [
            await client.get(path, headers=headers)
            for path in ("/metrics", "/version", "/openapi.json", "/docs", "/nowhere", "/health/")
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


async def test_two_tokens_are_none() -> None:
    async with calling(FakeBackend(), environ={"IG_TOKEN": TOKEN}) as client:
        twice = httpx.Headers([("Authorization", f"Bearer {TOKEN}"), ("Authorization", f"Bearer {TOKEN}")])
        assert (await client.get("/version", headers=twice)).status_code == 401


async def test_refusals_and_metrics_never_show_the_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with serving(FakeBackend(), environ={"IG_TOKEN": TOKEN}, wait_ready=False) as client:
        key = {"Authorization": f"Bearer {TOKEN}"}
        paths = ("/version", "/metrics", "/openapi.json")
        shown = [(await client.get(path, headers=key)).text for path in paths]
        shown.append((await client.post("/compute_info_gain", json={}, headers=key)).text)
    assert TOKEN not in "".join(shown)
    assert TOKEN not in caplog.text
