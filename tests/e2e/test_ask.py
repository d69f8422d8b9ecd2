"""A trained policy behind the endpoint, with the real engine and the real retriever."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.e2e.conftest import Quickstart
from tests.e2e.running import running_service
from verl.run.records import TrajectoryRecord, read_records

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


def test_the_endpoint_starts_its_retriever_answers_as_the_evaluation_and_ends_on_a_signal(
    tmp_path: Path, quickstart: Quickstart
) -> None:
    """The answers are those of the run's last evaluation, with the settings of the run."""
    records = read_records(quickstart.run_dir / "evaluation/step_000002.jsonl")
    flags = ("--serve", "--model", str(quickstart.run_dir), "--gains")
    with running_service("verl.ask", *flags, folder=tmp_path) as (process, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id

        def ask(record: TrajectoryRecord, **request: bool) -> Any:
            messages: Any = [{"role": "user", "content": record["question"]}]
            return client.chat.completions.create(model=model, messages=messages, **request)

        done = [ask(record) for record in records]
        assert [describe_answer(answer) for answer in done] == [describe_record(r) for r in records]

        right = next(k for k, r in enumerate(records) if r["outcome"] == 1 and len(r["turns"]) == 2)
        (choice,) = done[right].choices
        search, answer = choice.message.search_trace
        assert search["gain"] > 0
        assert answer["gain"] is None
        chunks = list(ask(records[right], stream=True))
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(texts) == choice.message.content
        last = {s["turn"]: s for c in chunks for s in getattr(c.choices[0].delta, "search_trace", [])}
        assert [step["text"] for step in last.values()] == [search["text"], answer["text"]]
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert "Traceback" not in (tmp_path / "verl.ask.log").read_text()


def describe_answer(done: Any) -> list[object]:
    """Return what was read and written, and the numbers of tokens."""
    (choice,) = done.choices
    turns = [(step["text"], list(map(describe_call, step["calls"]))) for step in choice.message.search_trace]
    return [choice.message.content, turns, done.usage.prompt_tokens, done.usage.completion_tokens]


def describe_call(call: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    return call["text"], list(map(describe_passage, call["passages"]))


def describe_passage(passage: Mapping[str, Any]) -> tuple[str, str, str]:
    return passage["id"], passage["title"], passage["text"]


def describe_record(record: TrajectoryRecord) -> list[object]:
    """Return the same of a recorded trajectory."""
    turns = []
    for turn in record["turns"]:
        passages = iter(turn["passages"])
        calls = [
            (call["text"], list(map(describe_passage, islice(passages, call["num_passages"]))))
            for call in turn["observations"]
        ]
        turns.append((turn["output_text"], calls))
    sampled = sum(len(turn["output_ids"]) for turn in record["turns"])
    read = sum(len(turn["observation_ids"]) for turn in record["turns"])
    return [record["answer"], turns, len(record["prompt_ids"]) + read, sampled]
