from __future__ import annotations

import asyncio
import json
import logging

import numpy as np
import pytest

from tests.fakes import FakeGainService, Reply, ScriptedServer
from verl.errors import ConfigError, ServiceError
from verl.utils.reward_score.IG_client import (
    GainClient,
    GainRequest,
    GainResult,
    IGClient,
    get_ig_client,
    is_ig_service_available,
)

REQUEST = GainRequest(question="Where?", context="There.", golds=("Bolton",))


async def test_it_is_the_client_of_the_service() -> None:
    async with (server := FakeGainService(work={"pairs_judged": 3})).running():
        client = GainClient(server.url, timeout_s=5, batch_size=2)
        gain = GainResult(gain=FakeGainService.gain("Where?", "There."))
        assert await client.compute([REQUEST] * 3) == [gain] * 3
        assert await client.submit(REQUEST) == gain
        assert client.take_work() == {"pairs_judged": 9}
        assert client.take_work() == {"pairs_judged": 0}
        await client.aclose()


async def test_pairs_that_were_not_judged_are_none_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    reply = Reply(json.dumps({"probabilities": [0.75, None], "errors": [None, "kaput"]}))
    async with (server := ScriptedServer([reply])).running():
        client = GainClient(server.url, timeout_s=5)
        assert await client.judge([("a", "b"), ("c", "d")]) == [0.75, None]
        await client.aclose()
    assert "1 of 2 pairs were not judged: IG service: kaput" in caplog.text


async def test_its_errors_are_those_of_the_trainer() -> None:
    with pytest.raises(ConfigError, match="URL of the IG service"):
        GainClient("localhost", timeout_s=5)
    with pytest.raises(ConfigError, match="batch_size"):
        GainClient("http://127.0.0.1:9", timeout_s=5, batch_size=0)
    async with (server := ScriptedServer([Reply('{"detail": "loading"}', 503)])).running():
        client = GainClient(server.url, timeout_s=5)
        with pytest.raises(ServiceError, match=r"loading.*IG_service_launch\.sh"):
            await client.wait_ready(0.2)
        await client.aclose()


@pytest.mark.parametrize(
    ("answers", "sent"),
    [
        ("Bolton", ["Bolton"]),
        (["Bolton", "Hull"], ["Bolton", "Hull"]),
        ([["Bolton"], "Hull"], ["Bolton", "Hull"]),
        (np.array(["Bolton", "Hull"], dtype=object), ["Bolton", "Hull"]),
        (np.array([1990.0, 3.5]), ["1990", "3.5"]),
        ([np.int64(7), None], ["7"]),
    ],
)
async def test_the_published_client_takes_answers_of_every_kind(answers: object, sent: list[str]) -> None:
    """Called from a thread and, as here, while an event loop runs."""
    async with (server := FakeGainService()).running():
        client = IGClient(service_url=server.url + "/", timeout=5.0, max_retries=3, retry_delay=1.0)
        items = [{"question": "Where?", "context": "There.", "answers": answers}, {"question": "Who?"}]
        items[1]["answers"] = answers
        gains = await asyncio.to_thread(client.compute_info_gain_batch, items)
        assert gains == [FakeGainService.gain("Where?", "There."), 0.0]
        assert await asyncio.to_thread(client.compute_info_gain, "Where?", "There.", answers) == gains[0]
    assert [item["answers"] for body in server.bodies for item in body["items"]] == [sent] * 3
    assert client.compute_info_gain_batch([]) == []


async def test_the_published_client_gives_none_for_what_failed_and_raises_when_all_did(
    caplog: pytest.LogCaptureFixture,
) -> None:
    some = {"scores": [0.5, None], "errors": [None, "too long"], "details": None}
    items = [{"question": "Where?", "context": "There.", "answers": ["Bolton"]}] * 2
    async with (server := ScriptedServer([Reply(json.dumps(some)), Reply("{}", status=400)])).running():
        client = IGClient(server.url, timeout=5.0)
        with caplog.at_level(logging.WARNING):
            assert await asyncio.to_thread(client.compute_info_gain_batch, items) == [0.5, None]
        assert "1 of 2 gains were not measured: " in caplog.text
        assert "too long" in caplog.text
        with pytest.raises(RuntimeError, match=f"no gain could be measured by {server.url}: .*400"):
            await asyncio.to_thread(client.compute_info_gain_batch, items)


async def test_there_is_one_published_client_for_each_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IG_SERVICE_URL", raising=False)
    assert get_ig_client() is None
    assert not is_ig_service_available()
    replies = [Reply('{"status": "healthy"}'), Reply('{"scores": [], "errors": []}')]
    async with (server := ScriptedServer(replies)).running():
        monkeypatch.setenv("IG_SERVICE_URL", server.url)
        client = get_ig_client()
        assert client is not None
        assert client is get_ig_client(server.url + "/")
        assert await asyncio.to_thread(is_ig_service_available)
    client.timeout = 0.2
    assert not await asyncio.to_thread(client.health_check)
