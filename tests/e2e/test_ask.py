"""The shipped policy behind the endpoint, with the real engine and the real retriever."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from openai import OpenAI

from tests.e2e.running import running_service

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def test_the_endpoint_starts_its_retriever_answers_and_ends_on_a_signal(tmp_path: Path) -> None:
    flags = ("--serve", "--model", "world/models/policy", "--gains")
    with running_service("verl.ask", *flags, folder=tmp_path) as (process, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        asked = {
            "model": client.models.list().data[0].id,
            "messages": [{"role": "user", "content": "What is the award of Ursula Ellis?"}],
        }
        (choice,) = client.chat.completions.create(**asked).choices
        search, answer = choice.message.search_trace
        assert choice.message.content == "Comet Medal"
        assert any("Comet Medal" in passage["text"] for passage in search["calls"][0]["passages"])
        assert search["gain"] > 0
        assert answer["gain"] is None
        chunks = list(client.chat.completions.create(**asked, stream=True))
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(texts) == choice.message.content
        last = {s["turn"]: s for c in chunks for s in getattr(c.choices[0].delta, "search_trace", [])}
        assert [step["text"] for step in last.values()] == [search["text"], answer["text"]]
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert "Traceback" not in (tmp_path / "verl.ask.log").read_text()
