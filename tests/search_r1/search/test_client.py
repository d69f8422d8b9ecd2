from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from search_r1.search.client import HttpSearch
from tests.fakes import AnsweringServer, Reply, ScriptedServer
from tests.processes import free_port
from tests.search_r1.search.small_world import PASSAGES, RunningServer
from verl.errors import ConfigError, ServiceError
from verl.types import Passage


def render(*lists: list[tuple[str, str, float]]) -> str:
    result = [
        [{"document": {"id": key, "contents": text}, "score": score} for key, text, score in hits]
        for hits in lists
    ]
    return json.dumps({"result": result})


ONE = render([("7", '"Bolton"\nA town.\nIn England.', 0.5)])


@pytest.mark.parametrize("suffix", ["", "/", "/retrieve", "/retrieve/"])
async def test_passages_from_the_real_server(server: RunningServer, suffix: str) -> None:
    search = HttpSearch(server.url + suffix, topk=2, timeout_s=30.0)
    await search.wait_ready(30.0)
    found = await search.search("größe 漢字 🎬")
    await search.aclose()
    assert len(found) == 2
    assert found[0].id == "3"
    assert f"{found[0].title}\n{found[0].text}" == PASSAGES["3"]
    assert found[0].title == '"Größe 漢字"'


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"Bolton"\nA town.\nIn England.', '"Bolton"', "A town.\nIn England."),
        ("All of this is text.", "", "All of this is text."),
        ("\nAll of this is text.", "", "All of this is text."),
        ('"Bolton"\n', '"Bolton"', ""),
    ],
)
async def test_the_first_line_is_the_title_unless_it_is_the_only_one(
    contents: str, title: str, text: str
) -> None:
    async with (scripted := ScriptedServer([Reply(render([("7", contents, 0.5)]))])).running():
        search = HttpSearch(scripted.url, topk=1, timeout_s=5.0)
        found = await search.search("q")
        await search.aclose()
    assert found == (Passage(id="7", title=title, text=text, score=0.5),)


async def test_the_token_is_sent_and_a_wrong_one_noticed_at_once() -> None:
    async with (scripted := ScriptedServer([Reply(ONE), Reply("{}", 401)])).running():
        search = HttpSearch(scripted.url, topk=3, timeout_s=5.0, token="geheim-7")
        await search.wait_ready(5.0)
        with pytest.raises(ServiceError, match=r"401 .*not its token") as caught:
            await search.wait_ready(600.0)
        await search.aclose()
    assert [headers["authorization"] for _, headers, _ in scripted.requests] == ["Bearer geheim-7"] * 2
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(("kind", "complaint"), [("refused", "refused: no such key"), ("not_recorded", None)])
async def test_an_engine_that_refuses_its_key_is_noticed_before_training(
    kind: str, complaint: str | None
) -> None:
    error = {"kind": kind, "reason": "no such key"}
    reply = Reply(json.dumps({"result": [None], "errors": [error]}))
    async with (scripted := ScriptedServer([reply])).running():
        search = HttpSearch(scripted.url, topk=3, timeout_s=5.0)
        if complaint is None:
            await search.wait_ready(60.0)
        else:
            with pytest.raises(ServiceError, match=complaint):
                await search.wait_ready(60.0)
        await search.aclose()
    assert len(scripted.requests) == 1


async def test_found_nothing_is_not_a_failure() -> None:
    scripted = ScriptedServer([Reply(render([]))])
    async with scripted.running():
        search = HttpSearch(scripted.url, topk=3, timeout_s=5.0)
        assert await search.search("q") == ()
        assert await search.search("  ") == ()
        await search.aclose()
    assert len(scripted.requests) == 1


async def test_simultaneous_queries_share_a_request_but_not_their_failures() -> None:
    def answer(body: dict[str, Any]) -> Reply:
        known = [query for query in body["queries"] if query != "bad"]
        found = json.loads(render(*[[(query, "t", 1.0)] for query in known]))["result"]
        result = [None if query == "bad" else found[known.index(query)] for query in body["queries"]]
        errors = [{"kind": "internal", "reason": "no"} if each is None else None for each in result]
        return Reply(json.dumps({"result": result, "errors": errors}))

    server = AnsweringServer(answer)
    async with server.running():
        search = HttpSearch(server.url, topk=1, timeout_s=5.0)
        queries = ["a", "bad", "b", "left"]
        tasks = [asyncio.create_task(search.search(query)) for query in queries]
        await asyncio.sleep(0)
        tasks.pop().cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await search.aclose()
    assert [body["queries"] for body in server.bodies] == [queries]
    assert [each[0].id if isinstance(each, tuple) else type(each) for each in found] == [
        "a",
        ServiceError,
        "b",
    ]


async def test_a_query_has_its_own_time_also_in_a_request_with_one_that_waited_longer() -> None:
    scripted = ScriptedServer([Reply(delay_s=60.0), Reply(render([("2", "t", 1.0)], [("3", "t", 1.0)]))])
    async with scripted.running():
        search = HttpSearch(scripted.url, topk=1, timeout_s=1.0, max_connections=1)
        hanging = asyncio.create_task(search.search("hangs"))
        await asyncio.sleep(0.01)  # it has the only connection
        waiting = asyncio.create_task(search.search("waits"))
        await asyncio.sleep(0.6)
        assert [passage.id for passage in await search.search("late")] == ["3"]
        with pytest.raises(ServiceError, match=r"within 1 s"):
            await hanging
        await asyncio.wait([waiting])
        await search.aclose()
    assert len(scripted.requests) == 2


async def test_waits_for_a_server_that_still_loads() -> None:
    scripted = ScriptedServer([Reply("loading", 503), Reply("loading", 503), Reply(ONE)])
    async with scripted.running():
        search = HttpSearch(scripted.url, topk=3, timeout_s=0.05)
        await search.wait_ready(10.0)
        await search.aclose()
    assert len(scripted.requests) == 3


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (Reply("nonsense"), "not JSON"),
        (Reply("{}"), "malformed: expected a list 'result'"),
        (Reply('{"result": null}'), "malformed: expected a list 'result'"),
        (Reply('{"result": [null]}'), "malformed: a result is null without an error"),
        (Reply('{"result": [[{"id": "1", "contents": "t"}]]}'), "malformed: result.0.document"),
        (Reply('{"result": [[{"document": {"id": "1"}, "score": 1}]]}'), "document.contents"),
        (Reply('{"result": [[{"document": {"id": "1", "contents": "t"}, "score": null}]]}'), "score"),
        (Reply('{"result": [[{"document": {"id": "1", "contents": "t"}, "score": NaN}]]}'), "NaN"),
        (Reply(render()), "1 queries were answered by 0 lists"),
        (Reply(render([], [])), "1 queries were answered by 2 lists"),
        (Reply(render([("1", "t", 1.0)] * 4)), "4 passages, asked for 3"),
        (Reply('{"detail": "index is gone"}', 500), "index is gone"),
        (Reply(status=429, headers=(("Retry-After", "60"),)), "it asks to wait 60 s"),
        (Reply(status=503, headers=(("Retry-After", "60"),)), "it asks to wait 60 s"),
        (Reply(hangs_up=True), "within 0.5 s"),
        (Reply(delay_s=60.0), "within 0.5 s"),
    ],
)
async def test_a_failed_search_says_so_in_time(reply: Reply, complaint: str) -> None:
    scripted = ScriptedServer([reply])
    async with scripted.running():
        search = HttpSearch(scripted.url, topk=3, timeout_s=0.5)
        with pytest.raises(ServiceError) as caught:
            await search.search("q")
        await search.aclose()
    assert caught.value.service == "retriever"
    assert complaint in str(caught.value)


async def test_a_dead_server_is_named_with_the_fix() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    search = HttpSearch(url, topk=3, timeout_s=0.5)
    for call in (search.search("q"), search.wait_ready(0.5)):
        with pytest.raises(ServiceError, match=f"{url}/retrieve.*retrieval_launch.sh"):
            await call
    await search.aclose()


def test_a_setting_that_cannot_be_is_a_config_error() -> None:
    for url, timeout_s, token in (
        ("localhost:8000", 1.0, None),
        ("http://localhost:8000", 0.0, None),
        ("http://localhost:8000", 1.0, "a b"),
    ):
        with pytest.raises(ConfigError, match="of the retriever must"):
            HttpSearch(url, topk=3, timeout_s=timeout_s, token=token)
