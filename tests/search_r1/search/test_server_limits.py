"""What the server tells callers beside passages: failures, limits, states. Over a real socket."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from search_r1.search.retriever import FailureKind, SearchFailure
from search_r1.search.schema import Document
from serving.http import CallError, JsonService
from tests.processes import announcing, eventually, first_line, read_metrics
from tests.search_r1.search.servers import EchoRetriever, serving

TOKEN = "a-token-of-ours"
HEAD = {"Content-Type": "application/json"}


async def retrieve(client: httpx.AsyncClient, **payload: object) -> httpx.Response:
    return await client.post("/retrieve", json=payload)


def failing(kind: FailureKind) -> EchoRetriever:
    return EchoRetriever(act={"bad": SearchFailure(kind=kind, reason="for a reason")})


# ------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("kind", "status"),
    [(FailureKind.QUOTA, 402), (FailureKind.REFUSED, 424), (FailureKind.NOT_RECORDED, 424)],
)
async def test_a_client_that_retries_does_not_run_against_what_is_final(
    kind: FailureKind, status: int
) -> None:
    retriever = failing(kind)
    async with serving(retriever) as client:
        service = JsonService(str(client.base_url), name="retriever", timeout_s=90.0)
        with pytest.raises(CallError, match=f"{kind}: for a reason") as caught:
            await service.post("/retrieve", {"query": "bad"})
        await service.aclose()
    assert (caught.value.status, caught.value.retryable) == (status, False)
    assert len(retriever.calls) == 1


@pytest.mark.parametrize(
    ("kind", "status", "retry_after"),
    [
        (FailureKind.DEADLINE, 504, None),
        (FailureKind.UNAVAILABLE, 503, "5"),
        (FailureKind.QUOTA, 402, None),
        (FailureKind.REFUSED, 424, None),
        (FailureKind.MALFORMED, 502, None),
        (FailureKind.NOT_RECORDED, 424, None),
        (FailureKind.INTERNAL, 500, None),
    ],
)
async def test_without_that_the_request_fails_and_names_the_query(
    kind: FailureKind, status: int, retry_after: str | None
) -> None:
    async with serving(failing(kind)) as client:
        refused = await retrieve(client, queries=["good", "bad"])
        metrics = await read_metrics(client)
    assert refused.status_code == status
    assert refused.headers.get("Retry-After") == retry_after
    assert refused.json() == {
        "detail": f"query 1 'bad': {kind}: for a reason (1 of 2 queries failed)",
    }
    assert metrics[f'retriever_failures_total{{kind="{kind}"}}'] == 1


async def test_the_deadline_of_the_request_goes_before_that_of_the_server() -> None:
    gate = asyncio.Event()
    async with serving(EchoRetriever(gate=gate), "--request_timeout_s", "0.1") as client:
        late = await retrieve(client, query="a")
        patient = asyncio.create_task(retrieve(client, query="a", timeout_s=600))
        partial = await retrieve(client, queries=["b", ""], timeout_s=0.1, allow_failures=True)
        gate.set()
        assert (late.status_code, (await patient).status_code) == (504, 200)
    assert late.json()["detail"] == "query 0 'a': deadline: not answered within 0.1 s"
    assert [error and error["kind"] for error in partial.json()["errors"]] == ["deadline", None]


# --------------------------------------------------------------------------------------------------- limits


async def test_a_full_queue_is_a_429_with_a_time_also_before_the_body_is_read() -> None:
    retriever = EchoRetriever(gate=(gate := asyncio.Event()))
    async with serving(retriever, "--max_queue", "4") as client:
        first = asyncio.create_task(retrieve(client, queries=["a", "b", "c", "d"]))
        await eventually(lambda: retriever.running == 1)
        refused = await retrieve(client, query="e")
        async with announcing(client, "/retrieve", 1000) as (reader, _):
            assert (await first_line(reader)).startswith("HTTP/1.1 429")
        gate.set()
        assert (await first).status_code == 200
        assert (await retrieve(client, query="e")).status_code == 200
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert "the queue is full: 4 of 4 queries wait" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("flags", "payload", "named"),
    [
        (
            ("--max_queries", "3"),
            {"queries": ["a"] * 4},
            "expected at most 3; split it or raise --max_queries",
        ),
        (("--max_queue", "3"), {"queries": ["a"] * 4}, "--max_queue"),
        ((), {"queries": ["a"] * 51, "topk": 1000}, "asks for 1000 passages for each of 51 queries"),
        ((), {"queries": ["a"] * 51, "topk": "1000"}, "asks for 1000 passages for each of 51 queries"),
        ((), {"queries": [0] * 5000}, "the request has 5000 queries"),
        (("--max_body_mb", "0.01"), {"query": "a" * 11000}, "longer than 0.01 MiB; send fewer queries"),
    ],
)
async def test_what_is_too_much_is_refused_with_what_to_do(
    flags: tuple[str, ...], payload: dict[str, object], named: str
) -> None:
    async with serving(EchoRetriever(), *flags) as client:
        refused = await retrieve(client, **payload)
        assert (await retrieve(client, query="a")).status_code == 200
    assert refused.status_code == 413
    assert named in refused.json()["detail"]


@pytest.mark.parametrize(
    "payload",
    [
        {"query": "a", "timeout_s": 0},
        {"query": "a", "timeout_s": -1},
        {"query": "a", "timeout_s": 1e9},
        {"query": "a", "allow_failures": "maybe"},
        {"queries": ["a"] * 100, "topk": 1001},
        {"queries": None},
    ],
)
async def test_values_out_of_bounds_are_refused(payload: dict[str, object]) -> None:
    async with serving(EchoRetriever()) as client:
        refused = await retrieve(client, **payload)
    assert refused.status_code == 422
    assert len(refused.content) < 500, "the input is not repeated"


@pytest.mark.parametrize("presented", [None, "Bearer wrong", TOKEN])
async def test_without_the_token_nothing_is_told(presented: str | None, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    flags = ("--token_file", str(tmp_path / "token"))
    headers = {} if presented is None else {"Authorization": presented}
    async with serving(EchoRetriever(), *flags) as client:
        refusals = [
            await client.get(path, headers=headers) for path in ("/version", "/metrics", "/openapi.json")
        ]
        refusals.append(await client.post("/retrieve", json={"query": "a"}, headers=headers))
        open_to_all = [await client.get(path) for path in ("/livez", "/readyz", "/health")]
        key = {"Authorization": f"Bearer {TOKEN}"}
        let_in = await client.post("/retrieve", json={"query": "a"}, headers=key)
    assert [refused.status_code for refused in refusals] == [401] * 4
    assert [answer.status_code for answer in (*open_to_all, let_in)] == [200] * 4


# --------------------------------------------------------------------------------------------------- states


async def test_until_it_is_loaded_it_says_so() -> None:
    async with serving(EchoRetriever(), load_s=60) as client:
        refused = await retrieve(client, query="a")
        assert (refused.status_code, refused.json()) == (503, {"detail": "Retriever not loaded"})
        assert refused.headers["Retry-After"] == "1"
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/version")).json()["retriever"] is None
        async with announcing(client, "/retrieve", 1000) as (reader, _):
            assert (await first_line(reader)).startswith("HTTP/1.1 503")


async def test_the_search_of_a_caller_who_hangs_up_is_dropped() -> None:
    retriever = EchoRetriever(gate=(gate := asyncio.Event()))
    async with serving(retriever) as client:
        running = asyncio.create_task(retrieve(client, query="running"))
        await eventually(lambda: retriever.running == 1)
        body = json.dumps({"queries": ["dropped", "shared"]}).encode()
        async with announcing(client, "/retrieve", len(body)) as (_, writer):
            writer.write(body)
            staying = asyncio.create_task(retrieve(client, query="shared"))
            while (await read_metrics(client))["retriever_queries_in_progress"] < 4:
                await asyncio.sleep(0.01)
        while (await read_metrics(client))["retriever_queries_in_progress"] > 2:
            await asyncio.sleep(0.01)
        gate.set()
        assert (await staying).status_code == 200
        await running
        metrics = await read_metrics(client)
    assert retriever.calls == [("running",), ("shared",)]
    assert metrics['retriever_requests_total{status="499"}'] == 1
    assert metrics["retriever_queries_in_progress"] == 0


async def test_everything_is_counted_once() -> None:
    async with serving(EchoRetriever(search_s=0.05)) as client:
        await asyncio.gather(*(retrieve(client, query=query) for query in ("a", "b", "a")))
        await retrieve(client, queries=["a", "", "c"])
        await retrieve(client, query=7)
        metrics = await read_metrics(client)
    assert metrics['retriever_requests_total{status="200"}'] == 4
    assert metrics['retriever_requests_total{status="422"}'] == 1
    assert metrics["retriever_request_seconds_count"] == 5
    by_source = {
        source: metrics[f'retriever_queries_total{{source="{source}"}}']
        for source in ("searched", "joined", "cached", "blank")
    }
    assert by_source == {"searched": 3, "joined": 1, "cached": 1, "blank": 1}
    assert metrics["retriever_batch_queries_sum"] == 3
    assert metrics["retriever_batch_queries_count"] == metrics["retriever_batch_seconds_count"] <= 3
    assert metrics['retriever_failures_total{kind="deadline"}'] == 0
    assert (metrics["retriever_queries_in_progress"], metrics["retriever_queries_waiting"]) == (0, 0)


async def test_where_failures_are_allowed_the_others_are_answered() -> None:
    async with serving(failing(FailureKind.QUOTA)) as client:
        asked = {"queries": ["good", "bad", " "], "topk": 1, "allow_failures": True}
        bare, scored = await retrieve(client, **asked), await retrieve(client, **asked, return_scores=True)
        clean = await retrieve(client, query="good", topk=1, allow_failures=True)
    document = {"id": "good/0", "contents": "good"}
    errors = [None, {"kind": "quota", "reason": "for a reason"}, None]
    assert (bare.status_code, bare.json()) == (200, {"result": [[document], None, []], "errors": errors})
    assert scored.json() == {"result": [[{"document": document, "score": 0}], None, []], "errors": errors}
    assert clean.json() == {"result": [[document]], "errors": [None]}


async def test_large_answers_are_not_written_in_the_loop() -> None:
    class WatchedHit:
        """Keeps the threads that read its document."""

        score = 1.0
        threads: ClassVar[set[int]] = set()

        @property
        def document(self) -> Document:
            self.threads.add(threading.get_ident())
            return Document(id="1", contents="text")

    hits = (WatchedHit(),) * 1000
    async with serving(EchoRetriever(act={"q": hits})) as client:  # type: ignore[dict-item]
        answer = await retrieve(client, queries=["q", "other"], topk=1000)
    assert len(answer.json()["result"][0]) == 1000
    assert WatchedHit.threads
    assert WatchedHit.threads.isdisjoint({threading.get_ident()})
