from __future__ import annotations

import pytest

from serving.http import CallError, JsonService
from tests.fakes import Reply, ScriptedServer
from verl.errors import ConfigError, ServiceError
from verl.utils.http import translated_calls, translated_settings


async def test_an_answer_comes_through_and_a_failure_is_a_service_error() -> None:
    async with (server := ScriptedServer([Reply('{"a": 1}'), Reply("no", 404)])).running():
        service = JsonService(server.url, name="retriever", timeout_s=5)
        with translated_calls():
            assert await service.post("/retrieve", {"queries": ["q"]}) == {"a": 1}
        with (
            pytest.raises(ServiceError, match=r"^retriever: http://127\.0\.0\.1:.* status 404") as caught,
            translated_calls(),
        ):
            await service.post("/retrieve", {})
        await service.aclose()
    assert caught.value.service == "retriever"
    assert isinstance(caught.value.__cause__, CallError)


def test_a_setting_that_cannot_be_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="URL of the retriever"), translated_settings():
        JsonService("localhost:8000", name="retriever", timeout_s=1.0)
