from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

from search_r1.search.online.options import OnlineMode, OnlineOptions
from search_r1.search.retriever import FailureKind, SearchFailure
from tests.search_r1.search.online.fake_engines import (
    NOTHING,
    FakeEngine,
    Fault,
    as_found,
    search,
)


async def test_a_recorded_run_is_replayed_without_any_connection(tmp_path: Path) -> None:
    queries = ["moon", "  moon ", NOTHING, "größe 漢字", "sun"]
    cache = tmp_path / "deep" / "searches.sqlite"
    async with (fake := FakeEngine("serper", delay_s=0.05)).running():
        recording = fake.options(mode=OnlineMode.RECORD, cache_path=cache)
        recorded = [await search("serper", recording, [query]) for query in queries]
        assert len(fake.asked) == 4  # the second spelling of the first query is not another query
        again = [await search("serper", recording, [query]) for query in queries]
        assert len(fake.asked) == 4
        connections = fake.num_connections
        replaying = OnlineOptions(mode=OnlineMode.REPLAY, cache_path=cache, url=fake.url)  # without keys
        replayed = [await search("serper", replaying, [query]) for query in queries]
        [other, fewer] = [
            *await search("serper", replaying, ["mars"]),
            *await search("serper", replaying, ["moon"], topk=2),
        ]
        assert fake.num_connections == connections
    assert recorded == again == replayed
    assert recorded[2] == [()]
    for missing in (other, fewer):
        assert isinstance(missing, SearchFailure)
        assert missing.kind is FailureKind.NOT_RECORDED
        assert "--online_mode record" in missing.reason


async def test_failures_are_not_recorded(tmp_path: Path) -> None:
    fake = FakeEngine("google", faults=[Fault(status=400), Fault(status=200, body="<html>")])
    async with fake.running():
        options = fake.options(mode=OnlineMode.RECORD, cache_path=tmp_path / "s.sqlite")
        kinds = [type((await search("google", options))[0]) for _ in range(3)]
    assert kinds == [SearchFailure, SearchFailure, tuple]


async def test_a_damaged_recording_fails_the_queries_that_it_concerns(tmp_path: Path) -> None:
    cache = tmp_path / "s.sqlite"
    async with (fake := FakeEngine("serper")).running():
        options = fake.options(mode=OnlineMode.RECORD, cache_path=cache)
        await search("serper", options, ["a", "b"])
        with sqlite3.connect(cache) as database:
            database.execute("UPDATE answers SET hits = '[[1, 2' WHERE query = 'a'")
        damaged, whole = await search("serper", options, ["a", "b"])
    assert isinstance(damaged, SearchFailure)
    assert damaged.kind is FailureKind.INTERNAL
    assert "--online_cache s.sqlite: a recorded answer cannot be read" in damaged.reason
    assert as_found(whole)


async def test_a_recording_belongs_to_engine_and_date(tmp_path: Path) -> None:
    cache = tmp_path / "s.sqlite"

    async def ask(fake: FakeEngine, mode: OnlineMode, date: str | None) -> int:
        before = len(fake.asked)
        await search(fake.name, fake.options(mode=mode, cache_path=cache, date=date))
        return len(fake.asked) - before

    async with (google := FakeEngine("google")).running(), (serper := FakeEngine("serper")).running():
        assert await ask(google, OnlineMode.RECORD, "2025-01-31") == 1
        assert await ask(serper, OnlineMode.RECORD, "2025-01-31") == 1
        assert await ask(google, OnlineMode.RECORD, "2025-01-31") == 0
        assert await ask(google, OnlineMode.RECORD, "2025-02-01") == 1
        assert await ask(google, OnlineMode.RECORD, "any") == 0
        assert await ask(google, OnlineMode.RECORD, None) == 1  # today
        assert await ask(google, OnlineMode.LIVE, None) == 1
        for date, is_known in [("2025-01-31", True), ("2025-03-01", False), ("any", True), (None, True)]:
            options = google.options(mode=OnlineMode.REPLAY, cache_path=cache, date=date)
            [outcome] = await search("google", options)
            assert isinstance(outcome, tuple) is is_known


async def test_the_limit_of_requests_holds_under_concurrency_and_counts_attempts(tmp_path: Path) -> None:
    cache = tmp_path / "s.sqlite"
    async with (fake := FakeEngine("serper", faults=[Fault(status=500)])).running():
        options = fake.options(cache_path=cache, max_requests=25)
        queries = [f"q{i}" for i in range(40)]
        halves = await asyncio.gather(
            search("serper", options, queries[:20], timeout_s=30.0),
            search("serper", options, queries[20:], timeout_s=30.0),
        )
        assert len(fake.asked) == 25
        failures = [outcome for half in halves for outcome in half if isinstance(outcome, SearchFailure)]
        assert len(failures) == 16  # one attempt was repeated
        assert {failure.kind for failure in failures} == {FailureKind.QUOTA}
        assert "--max_online_requests 25 is reached" in failures[-1].reason
        # The count outlives the process; a higher limit continues from it.
        outcomes = await search("serper", fake.options(cache_path=cache, max_requests=26), ["a", "b"])
        assert [type(outcome) for outcome in outcomes].count(SearchFailure) == 1
    assert len(fake.asked) == 26
