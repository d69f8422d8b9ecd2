from __future__ import annotations

import time

import pytest

from tests.fakes import Reply, ScriptedServer
from verl.errors import ConfigError, ServiceError
from verl.utils.http import JsonService

OVERLOADED = Reply("later", 503)


async def call(server: ScriptedServer, *, timeout_s: float = 5.0) -> dict[str, object]:
    async with server.running():
        service = JsonService(server.url, name="retriever", timeout_s=timeout_s)
        try:
            return await service.post("/retrieve", {"queries": ["größe 漢字"]})
        finally:
            await service.aclose()


async def fail(server: ScriptedServer, *, timeout_s: float = 5.0) -> tuple[str, float]:
    """The message of the ServiceError and the seconds it took."""
    started = time.monotonic()
    with pytest.raises(ServiceError) as caught:
        await call(server, timeout_s=timeout_s)
    assert caught.value.service == "retriever"
    return str(caught.value), time.monotonic() - started


async def test_sends_json_and_returns_the_object() -> None:
    server = ScriptedServer([Reply('{"score": 1.5}')])
    assert await call(server) == {"score": 1.5}
    line, headers, body = server.requests[0]
    assert line == "POST /retrieve HTTP/1.1"
    assert headers["content-type"] == "application/json"
    assert "authorization" not in headers
    assert body.decode() == '{"queries":["größe 漢字"]}'


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_tries_again_when_the_service_is_overloaded(status: int) -> None:
    server = ScriptedServer([Reply("later", status), Reply("later", status), Reply('{"ok": true}')])
    assert await call(server) == {"ok": True}
    assert len(server.requests) == 3


async def test_tries_again_when_the_connection_breaks() -> None:
    server = ScriptedServer([Reply(hangs_up=True), Reply('{"ok": true}')])
    assert await call(server) == {"ok": True}
    assert len(server.requests) == 2


async def test_waits_as_long_as_it_is_asked_to() -> None:
    server = ScriptedServer([Reply("later", 429, (("Retry-After", "1"),)), Reply("{}")])
    started = time.monotonic()
    await call(server)
    assert 1.0 <= time.monotonic() - started < 2.0


async def test_does_not_wait_for_a_moment_beyond_the_deadline() -> None:
    message, seconds = await fail(
        ScriptedServer([Reply("later", 429, (("Retry-After", "60"),))]), timeout_s=2.0
    )
    assert seconds < 1.0
    assert "status 429" in message
    assert "60 s" in message


async def test_an_unreadable_retry_after_counts_as_none() -> None:
    server = ScriptedServer([Reply("later", 503, (("Retry-After", "soon"),)), Reply('{"ok": true}')])
    assert await call(server) == {"ok": True}


@pytest.mark.parametrize("script", [[Reply(delay_s=60.0)], [OVERLOADED], [Reply(hangs_up=True)]])
async def test_one_deadline_covers_everything(script: list[Reply]) -> None:
    message, seconds = await fail(ScriptedServer(script), timeout_s=0.6)
    assert seconds < 1.2
    assert "http://127.0.0.1:" in message
    assert "within 0.6 s" in message
    assert "check that it runs" in message


async def test_a_dead_service_is_named_with_what_to_start() -> None:
    service = JsonService("http://127.0.0.1:9", name="retriever", timeout_s=0.5, fix="run `bash launch.sh`")
    with pytest.raises(
        ServiceError, match=r"retriever: http://127\.0\.0\.1:9/livez: .*run `bash launch\.sh`"
    ):
        await service.get("/livez")
    await service.aclose()


@pytest.mark.parametrize("status", [302, 400, 401, 404, 422, 500])
async def test_a_refusal_is_final_and_quoted(status: int) -> None:
    server = ScriptedServer([Reply('{"detail": "topk is wrong"}', status)])
    message, _ = await fail(server)
    assert len(server.requests) == 1
    assert str(status) in message
    assert "topk is wrong" in message


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
    ],
)
async def test_an_answer_that_is_no_json_object_is_a_failure(body: str, complaint: str) -> None:
    message, _ = await fail(ScriptedServer([Reply(body)]))
    assert complaint in message


async def test_no_message_shows_the_password_of_the_url(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    service = JsonService("http://me:geheim@127.0.0.1:9", name="retriever", timeout_s=0.2)
    with pytest.raises(ServiceError) as caught:
        await service.get("/")
    await service.aclose()
    assert "geheim" not in str(caught.value) + caplog.text


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "localhost", "ftp://host", "http://"])
def test_a_wrong_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match="retriever"):
        JsonService(url, name="retriever", timeout_s=1.0)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
def test_a_wrong_timeout_is_refused_at_once(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="retriever"):
        JsonService("http://localhost:8000", name="retriever", timeout_s=timeout_s)
