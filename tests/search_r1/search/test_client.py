from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import pytest

from search_r1.search.client import HttpSearch
from tests.fakes import Reply, ScriptedServer
from tests.search_r1.search.small_world import PASSAGES, RunningServer
from verl.errors import ServiceError
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


async def test_concurrent_searches_share_one_request_and_get_their_own_answers() -> None:
    lists = [[(str(row), f'"T{row}"\nt', 1.0)] for row in range(5)]
    scripted = ScriptedServer([Reply(render(*lists))])
    async with scripted.running():
        search = HttpSearch(scripted.url, topk=3, timeout_s=5.0)
        found = await asyncio.gather(*(search.search(f"q{row}") for row in range(5)))
        await search.aclose()
    assert [passages[0].id for passages in found] == ["0", "1", "2", "3", "4"]
    assert len(scripted.requests) == 1
    assert json.loads(scripted.requests[0][2]) == {
        "queries": ["q0", "q1", "q2", "q3", "q4"],
        "topk": 3,
        "return_scores": True,
    }


async def test_real_concurrent_answers_equal_serial_ones(server: RunningServer) -> None:
    search = HttpSearch(server.url, topk=3, timeout_s=60.0)
    queries = ["Alice Marsh", "river", "ships in Calder", "film"]
    serial = {query: [hit.id for hit in await search.search(query)] for query in queries}
    # More than one request's worth.
    found = await asyncio.gather(*(search.search(query) for query in queries * 80))
    await search.aclose()
    assert [[hit.id for hit in hits] for hits in found] == [serial[query] for query in queries * 80]


async def test_title_and_text() -> None:
    scripted = ScriptedServer([Reply(ONE)])
    async with scripted.running():
        search = HttpSearch(scripted.url, topk=3, timeout_s=5.0)
        assert await search.search("q") == (
            Passage(id="7", title='"Bolton"', text="A town.\nIn England.", score=0.5),
        )
        await search.aclose()


async def test_found_nothing_is_not_a_failure() -> None:
    scripted = ScriptedServer([Reply(render([]))])
    async with scripted.running():
        search = HttpSearch(scripted.url, topk=3, timeout_s=5.0)
        assert await search.search("q") == ()
        assert await search.search("  ") == ()
        await search.aclose()
    assert len(scripted.requests) == 1


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
        (Reply("{}"), "malformed at result"),
        (Reply('{"result": null}'), "malformed at result"),
        (Reply('{"result": [[{"id": "1", "contents": "t"}]]}'), "malformed at result.0.0.document"),
        (Reply('{"result": [[{"document": {"id": "1"}, "score": 1}]]}'), "document.contents"),
        (Reply('{"result": [[{"document": {"id": "1", "contents": "t"}, "score": null}]]}'), "score"),
        (Reply('{"result": [[{"document": {"id": "1", "contents": "t"}, "score": NaN}]]}'), "NaN"),
        (Reply(render()), "1 queries were answered by 0 lists"),
        (Reply(render([], [])), "1 queries were answered by 2 lists"),
        (Reply(render([("1", "t", 1.0)] * 4)), "4 passages, asked for 3"),
        (Reply('{"detail": "index is gone"}', 500), "index is gone"),
        (Reply(hangs_up=True), "within 0.5 s"),
        (Reply(delay_s=60.0), "within 0.5 s"),
    ],
)
async def test_a_failed_search_says_so_in_time(reply: Reply, complaint: str) -> None:
    scripted = ScriptedServer([reply])
    async with scripted.running():
        search = HttpSearch(scripted.url, topk=3, timeout_s=0.5)
        started = time.monotonic()
        with pytest.raises(ServiceError) as caught:
            await search.search("q")
        assert time.monotonic() - started < 1.5
        await search.aclose()
    assert caught.value.service == "retriever"
    assert complaint in str(caught.value)


async def test_a_dead_server_is_named_with_the_fix(free_port: Callable[[], int]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    search = HttpSearch(url, topk=3, timeout_s=0.5)
    for call in (search.search("q"), search.wait_ready(0.5)):
        with pytest.raises(ServiceError, match=f"{url}/retrieve.*retrieval_launch.sh"):
            await call
    await search.aclose()


async def test_one_cancelled_search_leaves_the_others_alone() -> None:
    scripted = ScriptedServer([Reply(render([("0", "a\nb", 1.0)], [("1", "c\nd", 1.0)]), delay_s=0.1)])
    async with scripted.running():
        search = HttpSearch(scripted.url, topk=3, timeout_s=5.0)
        first, second = (asyncio.create_task(search.search(f"q{row}")) for row in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        assert [passage.id for passage in await second] == ["1"]
        await search.aclose()
