from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from IG.client import GainRequest, GainResult, IGClient, SyncIGClient
from serving.http import CallError
from tests.fakes import AnsweringServer, FakeGainService, Reply, ScriptedServer
from tests.IG.service.backends import FakeBackend, serving

GOLDS = ("Bolton", "Bolton, England")


def requests(count: int) -> list[GainRequest]:
    return [GainRequest(question=f"Where {i}?", context="größe", golds=GOLDS) for i in range(count)]


def expected(asked: Sequence[GainRequest]) -> list[GainResult]:
    return [GainResult(gain=FakeGainService.gain(r.question, r.context)) for r in asked]


def answer(scores: list[float | None], errors: list[str | None] | None = None, **more: object) -> Reply:
    body = {"scores": scores, "errors": errors or [None] * len(scores), "details": None, **more}
    return Reply(json.dumps(body))


async def compute(
    server: ScriptedServer | FakeGainService | AnsweringServer,
    count: int,
    *,
    batch_size: int = 256,
    timeout_s: float = 5.0,
    max_in_flight: int = 8,
) -> list[GainResult]:
    async with (
        server.running(),
        IGClient(
            server.url + "/", timeout_s=timeout_s, batch_size=batch_size, max_in_flight=max_in_flight
        ) as client,
    ):
        return await client.compute(requests(count))


async def test_gains_come_back_in_order_and_the_request_is_the_published_one() -> None:
    server = ScriptedServer(
        [Reply("once", 500), answer([0.5, None, -2.5], [None, "too long", None], gain_limit=3)]
    )
    results = await compute(server, 3)
    assert results == [
        GainResult(gain=0.5),
        GainResult(gain=None, error="IG service: too long"),
        GainResult(gain=-2.5),
    ]
    line, _, body = server.requests[1]
    assert line.startswith("POST /compute_info_gain ")
    assert json.loads(body)["include_details"] is False
    assert json.loads(body)["items"][2] == {
        "question": "Where 2?",
        "context": "größe",
        "answers": list(GOLDS),
    }


async def test_standard_errors_and_the_work_of_the_service_are_read() -> None:
    reply = answer([0.5, 0.0], standard_errors=[0.125, None], work={"items": 2, "pairs_judged": 7})
    async with (
        (server := ScriptedServer([reply])).running(),
        IGClient(server.url, timeout_s=5) as client,
    ):
        results = await client.compute(requests(2))
        await client.compute(requests(2))
        assert client.work == {"items": 4, "pairs_judged": 14}
    assert results == [GainResult(gain=0.5, standard_error=0.125), GainResult(gain=0.0)]


async def test_beliefs_are_read_where_the_service_reports_them() -> None:
    reply = answer([0.5], beliefs_with_context=[0.75], beliefs_no_context=[0.25])
    (result,) = await compute(ScriptedServer([reply]), 1)
    assert (result.belief_with_context, result.belief_no_context) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("reply", "why", "retryable"),
    [
        (Reply("kaput", 500), "500", False),
        (Reply("busy", 429, (("Retry-After", "60"),)), "asks to wait 60 s", True),
        (Reply(hangs_up=True), "no usable answer within", True),
        (Reply(delay_s=60), "no usable answer within 1 s", True),
        (Reply('{"scores": [NaN, 0.5], "errors": [null, null]}'), "NaN", False),
        (answer([0.5]), "asked for 2 scores, got 1", False),
        (answer([0.5, 0.5], standard_errors=[-0.1, "x"]), "standard error was expected", False),
        (Reply('{"scores": 3}'), "must hold lists", False),
        (Reply(json.dumps({"x" * 10**6: 3})), "must hold lists", False),
        (answer([None, None], ["y" * 10**6] * 2), "yyy", False),
        (answer([None, None]), "finite score was expected, got None", False),
        (answer([1e308, -50]), "a score from -1 to 1 was expected, got", False),
        (answer([3.1, -3.1], gain_limit=3.0), "a score from -3 to 3 was expected, got", False),
        (answer([0.5, 0.5], gain_limit=1e9), "gain_limit must be a number above 0 up to 20", False),
        (answer([0.5, 0.5], beliefs_no_context=[-0.2, 1.5]), "beliefs from 0 to 1 were expected", False),
        (answer([None, None], ["deadline: not done"] * 2), "deadline: not done", True),
        (Reply('{"scores": ["0.5", true], "errors": [null, null]}'), "finite score was expected", False),
        (Reply('{"scores": [1' + "0" * 400 + ', {}], "errors": [null, null]}'), "finite score", False),
    ],
)
async def test_a_failure_is_named_and_never_a_number(reply: Reply, why: str, retryable: bool) -> None:
    results = await compute(ScriptedServer([reply]), 2, timeout_s=1.0)
    for result in results:
        assert result.gain is None
        assert why in (result.error or "")
        assert len(result.error or "") < 1000
        assert result.retryable is retryable


async def test_what_always_fails_is_found_and_its_neighbors_are_measured() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        asked = [(item["question"], item["context"]) for item in body["items"]]
        if any(question == "Where 5?" for question, _ in asked):
            return Reply("kaput", 500)
        return answer([FakeGainService.gain(*texts) for texts in asked])

    results = await compute(AnsweringServer(reply), 8)
    assert [k for k, result in enumerate(results) if result.gain is None] == [5]
    assert "500" in (results[5].error or "")
    assert results[:5] + results[6:] == expected(requests(8)[:5] + requests(8)[6:])


async def test_a_service_that_always_fails_is_not_flooded() -> None:
    server = ScriptedServer([Reply("kaput", 500)])
    results = await compute(server, 100, timeout_s=30.0)
    assert all("500" in (result.error or "") for result in results)
    assert len(server.requests) <= 2 * (1 + 2 * 32)


async def test_single_gains_share_requests() -> None:
    async with (
        (server := FakeGainService(delay_s=0.05)).running(),
        IGClient(server.url, timeout_s=5, max_in_flight=2) as client,
    ):

        async def ask_later(number: int, request: GainRequest) -> GainResult:
            await asyncio.sleep(number * 0.002)
            return await client.submit(request)

        asked = requests(100)
        results = await asyncio.gather(*(ask_later(k, request) for k, request in enumerate(asked)))
    assert results == expected(asked)
    assert sorted(server.items) == sorted((r.question, r.context) for r in asked)
    assert len(server.bodies) <= 14


async def test_a_large_call_is_split_and_few_requests_are_in_flight() -> None:
    server = FakeGainService(delay_s=0.1)
    results = await compute(server, 25, batch_size=5, max_in_flight=2)
    assert results == expected(requests(25))
    assert [len(body["items"]) for body in server.bodies] == [5] * 5


async def test_the_size_that_the_service_accepts_is_remembered() -> None:
    async with (
        (server := FakeGainService(max_items=3)).running(),
        IGClient(server.url, timeout_s=5, max_in_flight=1) as client,
    ):
        assert await client.compute(requests(8)) == expected(requests(8))
        server.bodies.clear()
        assert await client.compute(requests(4)) == expected(requests(4))
    assert [len(body["items"]) for body in server.bodies] == [2, 2]


async def test_one_deadline_covers_all_requests_of_a_call_and_what_is_done_counts() -> None:
    server = FakeGainService(delay_s=0.4)
    results = await compute(server, 6, batch_size=1, max_in_flight=2, timeout_s=1.0)
    assert results[:4] == expected(requests(4))
    assert all(r.gain is None and r.retryable and "within" in (r.error or "") for r in results[4:])


async def test_requests_carry_a_deadline() -> None:
    server = FakeGainService()
    await compute(server, 1, timeout_s=5.0)
    assert 0.0 < server.bodies[0]["timeout_s"] < 5.0
    await compute(server, 1, timeout_s=1e6)
    assert server.bodies[1]["timeout_s"] == 86400


async def test_an_urgent_request_does_not_cut_short_its_companions() -> None:
    async with (
        (server := FakeGainService(delay_s=1.0)).running(),
        IGClient(server.url, timeout_s=5) as client,
    ):
        asked = requests(2)
        urgent, patient = await asyncio.gather(
            client.submit(asked[0], timeout_s=0.3), client.submit(asked[1], timeout_s=4.0)
        )
    assert urgent.gain is None
    assert urgent.retryable
    assert patient == expected(asked)[1]
    assert len(server.bodies) == 1


async def test_lone_surrogates_are_replaced() -> None:
    async with (server := FakeGainService()).running(), IGClient(server.url, timeout_s=5) as client:
        (result,) = await client.compute([GainRequest(question="a\ud800b", context="c", golds=("\udc00",))])
    assert result.error is None
    assert server.bodies[0]["items"] == [{"question": "a?b", "context": "c", "answers": ["?"]}]


async def test_a_service_that_dies_and_comes_back_before_the_deadline_costs_time_only() -> None:
    server = FakeGainService(delay_s=0.2)
    async with server.running():
        port = int(server.url.rpartition(":")[2])
        client = IGClient(server.url, timeout_s=10)
        assert await client.compute(requests(2)) == expected(requests(2))
    was_dropped = asyncio.Event()

    def drop(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        was_dropped.set()

    async with await asyncio.start_server(drop, "127.0.0.1", port):
        call = asyncio.create_task(client.compute(requests(3)))
        await was_dropped.wait()
    assert not call.done()
    async with server.running(port=port):
        assert await call == expected(requests(3))
        await client.aclose()


async def test_cancelled_requests_are_closed_or_never_sent() -> None:
    async with (
        (server := FakeGainService(delay_s=30)).running(),
        IGClient(server.url, timeout_s=60, batch_size=1, max_in_flight=1) as client,
    ):
        calls = [asyncio.create_task(client.submit(request)) for request in requests(3)]
        while not server.arrivals:
            await asyncio.sleep(0.01)
        calls[1].cancel()
        calls[0].cancel()
        while not server.num_abandoned:
            await asyncio.sleep(0.01)
        while len(server.arrivals) < 2:
            await asyncio.sleep(0.01)
        assert [question for question, _ in server.items] == ["Where 0?", "Where 2?"]
        calls[2].cancel()
        await asyncio.wait(calls)


async def test_closing_ends_what_is_under_way() -> None:
    async with (server := FakeGainService(delay_s=30)).running():
        client = IGClient(server.url, timeout_s=60)
        call = asyncio.create_task(client.compute(requests(2)))
        while not server.arrivals:
            await asyncio.sleep(0.01)
        await client.aclose()
        assert [result.gain for result in await call] == [None, None]
        with pytest.raises(RuntimeError, match="closed"):
            await client.submit(requests(1)[0])


async def test_wait_ready_waits_until_work_is_accepted() -> None:
    """A worker that is being replaced makes /health unhealthy, and the others work."""
    loading = Reply('{"detail": "Models not loaded"}', 503, (("Retry-After", "0"),))
    health = {"status": "unhealthy", "message": "Some workers are unhealthy"}
    server = ScriptedServer([loading, loading, answer([]), Reply(json.dumps(health))])
    async with server.running(), IGClient(server.url, timeout_s=5) as client:
        assert await client.wait_ready(10) == health


@pytest.mark.parametrize(
    ("reply", "why"),
    [(Reply("Models not loaded", 503), "Models not loaded"), (Reply(delay_s=60), "no usable answer")],
)
async def test_wait_ready_gives_up_and_names_what_to_start(reply: Reply, why: str) -> None:
    async with (server := ScriptedServer([reply])).running(), IGClient(server.url, timeout_s=5) as client:
        with pytest.raises(CallError, match=f"was not ready within 0.5 s.*{why}.*IG_service_launch.sh"):
            await client.wait_ready(0.5)


GOOD_REQUEST = GainRequest(question="Where?", context="a good passage", golds=("Bolton",))


async def test_at_the_deadline_the_real_service_gives_what_is_done_and_names_the_rest() -> None:
    backend = FakeBackend(sampling_s=1.5)
    slow = [replace(GOOD_REQUEST, context=f"a good passage {k}") for k in range(3)]
    async with (
        serving(backend) as service,
        IGClient(str(service.base_url), timeout_s=5, batch_size=2) as client,
    ):
        assert [result.gain for result in await client.compute([GOOD_REQUEST])] == [0.5]
        known, *late = await client.compute([GOOD_REQUEST, *slow], timeout_s=1.0)
        assert backend.num_cancelled == 0, "the service answered in time"
        assert [result.gain for result in await client.compute([GOOD_REQUEST, *slow])] == [0.5] * 4
    assert known.gain == 0.5
    for result in late:
        assert result.gain is None
        assert result.retryable
        assert (result.error or "").startswith("IG service: deadline: ")


async def test_a_full_service_is_asked_again_until_there_is_room() -> None:
    many = [replace(GOOD_REQUEST, context=f"a good passage {k}") for k in range(12)]
    async with (
        serving(FakeBackend(pause_s=0.1), "--max-queued-items", "5", "--max-items", "4") as service,
        IGClient(str(service.base_url), timeout_s=20, max_in_flight=3) as client,
    ):
        results = await client.compute(many)
        metrics = (await service.get("/metrics")).text
    assert [(result.gain, result.error) for result in results] == [(0.5, None)] * 12
    assert 'ig_requests_total{status="429"}' in metrics
    assert 'ig_requests_total{status="413"}' in metrics
    assert client.work["items"] == 12


async def test_describe_returns_the_version_if_there_is_one() -> None:
    server = ScriptedServer([Reply('{"seed": 3}'), Reply("{}", 404), Reply("kaput", 500)])
    async with server.running(), IGClient(server.url, timeout_s=5) as client:
        assert await client.describe() == {"seed": 3}
        assert await client.describe() is None
        with pytest.raises(CallError, match="500"):
            await client.describe()


async def test_the_sync_client_works_inside_a_running_loop() -> None:
    """It blocks that loop: the server runs in another thread's."""
    async with (server := FakeGainService()).running():

        def outside() -> list[GainResult]:
            with SyncIGClient(server.url, timeout_s=5) as client:
                return client.compute(requests(3))

        async def inside() -> list[GainResult]:
            return outside()

        assert await asyncio.to_thread(outside) == expected(requests(3))
        assert await asyncio.to_thread(lambda: asyncio.run(inside())) == expected(requests(3))


def test_the_sync_client_names_failures_and_is_closed_once() -> None:
    client = SyncIGClient("http://127.0.0.1:9", timeout_s=0.3)
    (result,) = client.compute(requests(1))
    assert "ConnectError" in (result.error or "")
    with pytest.raises(CallError, match=r"IG_service_launch\.sh"):
        client.wait_ready(0.2)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.compute(requests(1))


def test_the_client_needs_none_of_the_service_and_nothing_of_the_trainer() -> None:
    code = (
        "import sys, IG.client; "
        "print(sorted({'verl', 'torch', 'numpy', 'vllm', 'fastapi', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_entailment_is_asked_many_pairs_at_a_time_and_what_fails_is_named() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if len(body["pairs"]) > 2:
            return Reply(status=413)
        found = [0.25 if pair["premise"] == "a" else None for pair in body["pairs"]]
        errors = [None if one is not None else "kaput" for one in found]
        return Reply(json.dumps({"probabilities": found, "errors": errors, "work": {"pairs_judged": 1}}))

    server = AnsweringServer(reply)
    async with server.running(), IGClient(server.url, timeout_s=5) as client:
        results = await client.judge([("a", "x"), ("b", "x"), ("a", "y\ud800")])
        assert client.work == {"pairs_judged": 2}
    assert [result.probability for result in results] == [0.25, None, 0.25]
    assert results[1].error == "IG service: kaput"
    assert [line for line, _, _ in server.requests] == ["POST /entailment HTTP/1.1"] * 3
    assert server.bodies[-1]["pairs"] == [{"premise": "a", "hypothesis": "y?"}]


@pytest.mark.parametrize("wrong", [1.5, "0.5", None])
async def test_what_is_no_probability_is_a_failure(wrong: object) -> None:
    reply = Reply(json.dumps({"probabilities": [wrong], "errors": [None]}))
    async with (server := ScriptedServer([reply])).running(), IGClient(server.url, timeout_s=5) as client:
        (result,) = await client.judge([("a", "b")])
    assert result.probability is None
    assert "a probability was expected" in (result.error or "")
