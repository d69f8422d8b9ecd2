from __future__ import annotations

import asyncio
import gzip
import json
import time
import tracemalloc
from typing import Any

import pytest

from serving.http import CallError, JsonService
from tests.fakes import FakeGainService, Reply, ScriptedServer

OVERLOADED = Reply("later", 503)


async def call(server: ScriptedServer, *, timeout_s: float = 60.0) -> dict[str, object]:
    async with server.running():
        service = JsonService(server.url, name="retriever", timeout_s=timeout_s)
        try:
            return await service.post("/retrieve", {"queries": ["größe 漢字"]})
        finally:
            await service.aclose()


async def fail(server: ScriptedServer, *, timeout_s: float = 60.0) -> CallError:
    with pytest.raises(CallError) as caught:
        await call(server, timeout_s=timeout_s)
    assert caught.value.service == "retriever"
    return caught.value


async def test_sends_json_and_returns_the_object() -> None:
    server = ScriptedServer([Reply('{"score": 1.5}')])
    assert await call(server) == {"score": 1.5}
    line, headers, body = server.requests[0]
    assert line == "POST /retrieve HTTP/1.1"
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "gzip"
    assert "authorization" not in headers
    assert body.decode() == '{"queries":["größe 漢字"]}'


async def test_tries_again_when_the_service_is_overloaded_or_the_connection_breaks() -> None:
    failures = [Reply("later", status) for status in (408, 429, 502, 503, 504)] + [Reply(hangs_up=True)]
    for failure in failures:
        server = ScriptedServer([failure, failure, Reply('{"ok": true}')])
        assert await call(server) == {"ok": True}
        assert len(server.requests) == 3


async def test_tries_again_once_after_an_error_of_the_service() -> None:
    server = ScriptedServer([Reply("kaput", 500), Reply('{"ok": true}')])
    assert await call(server) == {"ok": True}
    server = ScriptedServer([Reply("kaput", 500)])
    error = await fail(server)
    assert len(server.requests) == 2
    assert "status 500" in str(error)
    assert (error.status, error.retryable) == (500, False)


async def test_an_answer_may_be_packed_but_not_unpack_to_too_much() -> None:
    def packed(body: bytes) -> Reply:
        return Reply(gzip.compress(body, 1), headers=(("Content-Encoding", "gzip"),))

    assert await call(ScriptedServer([packed(b'{"score": 1.5}')])) == {"score": 1.5}
    server = ScriptedServer([packed(b" " * 200_000_000)])
    tracemalloc.start()
    error = await fail(server)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "more than 64 MiB" in str(error)
    assert not error.retryable
    assert peak < 300 * 2**20


async def test_an_answer_that_cannot_be_unpacked_is_a_failure() -> None:
    error = await fail(ScriptedServer([Reply("{}", headers=(("Content-Encoding", "gzip"),))]))
    assert "its Content-Encoding is wrong" in str(error)


async def test_waits_as_long_as_it_is_asked_to() -> None:
    server = ScriptedServer([Reply("later", 429, (("Retry-After", "1"),)), Reply("{}")])
    started = time.monotonic()
    await call(server)
    assert time.monotonic() - started >= 1.0


async def test_does_not_wait_for_a_moment_beyond_the_deadline() -> None:
    error = await fail(ScriptedServer([Reply("later", 429, (("Retry-After", "600"),))]), timeout_s=200.0)
    assert "status 429" in str(error)
    assert "it asks to wait 600 s, and " in str(error)
    assert error.retryable


@pytest.mark.parametrize("header", ["soon", "\u00b2", "Mon, 01 Jan 0001 00:00:00 -0000", "-5"])
async def test_an_unreadable_retry_after_counts_as_none(header: str) -> None:
    server = ScriptedServer([Reply("later", 503, (("Retry-After", header),)), Reply('{"ok": true}')])
    assert await call(server) == {"ok": True}


@pytest.mark.parametrize("script", [[Reply(delay_s=600.0)], [OVERLOADED], [Reply(hangs_up=True)]])
async def test_one_deadline_covers_everything(script: list[Reply]) -> None:
    error = await fail(ScriptedServer(script), timeout_s=0.6)
    assert "http://127.0.0.1:" in str(error)
    assert "within 0.6 s" in str(error)
    assert "check that it runs" in str(error)
    assert error.retryable


async def test_a_dead_service_is_named_with_what_to_start_and_without_its_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(0)
    url = "http://me:geheim@127.0.0.1:9"
    service = JsonService(url, name="retriever", timeout_s=0.5, fix="run `bash launch.sh`")
    with pytest.raises(
        CallError, match=r"retriever: http://.*127\.0\.0\.1:9/livez: .*run `bash launch\.sh`"
    ) as dead:
        await service.get("/livez")
    await service.aclose()
    assert "geheim" not in str(dead.value) + caplog.text


@pytest.mark.parametrize("status", [302, 400, 401, 404, 422])
async def test_a_refusal_is_final_and_quoted(status: int) -> None:
    server = ScriptedServer([Reply('{"detail": "topk is wrong"}', status)])
    error = await fail(server)
    assert ("no token was sent" in str(error)) == (status == 401)
    assert len(server.requests) == 1
    assert str(status) in str(error)
    assert "topk is wrong" in str(error)
    assert error.status == status
    assert not error.retryable


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<html>proxy</html>", "not JSON"),
        ("", "not JSON"),
        ("[1]", "JSON list"),
        ("null", "JSON NoneType"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": ', "not JSON"),
        ('{"a": ' + "[" * 100_000, "not JSON"),
    ],
)
async def test_an_answer_that_is_no_json_object_is_a_failure(body: str, complaint: str) -> None:
    error = await fail(ScriptedServer([Reply(body)]))
    assert complaint in str(error)
    assert not error.retryable


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        *(
            (url, {})
            for url in ("", "127.0.0.1:8000", "localhost", "ftp://host", "http://", "http://a:80000")
        ),
        *(("http://here:1", {"timeout_s": timeout_s}) for timeout_s in (0.0, -1.0, float("nan"))),
        *(("http://here:1", {"token": token}) for token in ("two words", "zeile\n", "schlüssel")),
    ],
)
def test_wrong_settings_are_refused_at_once(url: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="retriever") as caught:
        JsonService(url, name="retriever", **{"timeout_s": 1.0, **settings})
    assert settings.get("token", "unshown") not in str(caught.value)


async def test_a_token_is_sent_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    async with (server := ScriptedServer([Reply('{"detail": "no"}', 401)])).running():
        service = JsonService(server.url, name="retriever", timeout_s=1.0, token="geheim-123")
        with pytest.raises(CallError, match="token that was sent is not its token") as caught:
            await service.get("/")
        await service.aclose()
    assert server.requests[0][1]["authorization"] == "Bearer geheim-123"
    assert "geheim" not in str(caught.value) + caplog.text


async def test_each_attempt_says_how_much_time_is_left() -> None:
    async with (server := ScriptedServer([OVERLOADED, OVERLOADED, Reply("{}")])).running():
        service = JsonService(server.url, name="retriever", timeout_s=60)
        await service.post("/", lambda left_s: {"left_s": left_s}, timeout_s=50.0)
        await service.aclose()
    left = [json.loads(body)["left_s"] for _, _, body in server.requests]
    assert 50.0 > left[0] > left[1] > left[2] > 0.0


async def test_a_cancelled_call_hangs_up() -> None:
    async with (server := FakeGainService(delay_s=30)).running():
        service = JsonService(server.url, name="retriever", timeout_s=60)
        call = asyncio.create_task(service.post("/", {"items": []}))
        while not server.arrivals:
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        while not server.num_abandoned:
            await asyncio.sleep(0.01)
        await service.aclose()
