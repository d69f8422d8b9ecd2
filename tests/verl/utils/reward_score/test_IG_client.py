from __future__ import annotations

import pytest

from tests.fakes import FakeGainService, Reply, ScriptedServer
from verl.errors import ConfigError, ServiceError
from verl.utils.reward_score.IG_client import GainRequest, GainResult, IGClient

REQUEST = GainRequest(question="Where?", context="There.", golds=("Bolton",))


async def test_it_is_the_client_of_the_service() -> None:
    async with (server := FakeGainService(work={"pairs_judged": 3})).running():
        client = IGClient(server.url, timeout_s=5, batch_size=2)
        gain = GainResult(gain=FakeGainService.gain("Where?", "There."))
        assert await client.compute([REQUEST] * 3) == [gain] * 3
        assert await client.submit(REQUEST) == gain
        assert client.work == {"pairs_judged": 9}
        await client.aclose()


async def test_its_errors_are_those_of_the_trainer() -> None:
    with pytest.raises(ConfigError, match="URL of the IG service"):
        IGClient("localhost", timeout_s=5)
    with pytest.raises(ConfigError, match="batch_size"):
        IGClient("http://127.0.0.1:9", timeout_s=5, batch_size=0)
    async with (server := ScriptedServer([Reply('{"status": "unhealthy", "message": "loading"}')])).running():
        client = IGClient(server.url, timeout_s=5)
        with pytest.raises(ServiceError, match=r"loading.*IG_service_launch\.sh"):
            await client.wait_ready(0.2)
        await client.aclose()
