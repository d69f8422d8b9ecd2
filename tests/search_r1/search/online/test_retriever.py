from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from search_r1.search.online.engines import ENGINES
from search_r1.search.online.options import OnlineMode, OnlineOptions
from search_r1.search.online.retriever import OnlineRetriever, open_online
from search_r1.search.online.store import AnswerKey
from search_r1.search.retriever import FailureKind, Found, SearchFailure
from tests.search_r1.search.online.fake_engines import (
    KEYS,
    NAMES,
    NOTHING,
    FakeEngine,
    Fault,
    as_found,
    search,
)


async def fail(fake: FakeEngine, *, timeout_s: float = 5.0) -> SearchFailure:
    async with fake.running():
        [outcome] = await search(fake.name, fake.options(), timeout_s=timeout_s)
    assert isinstance(outcome, SearchFailure)
    assert outcome.reason.startswith(f"{fake.name}: ")
    return outcome


@pytest.mark.parametrize("name", NAMES)
async def test_finds_documents_in_the_format_of_the_corpora(name: str) -> None:
    async with (fake := FakeEngine(name)).running():
        found, nothing, blank = await search(name, fake.options(), ["größe 漢字", NOTHING, "  "])
    hits = as_found(found)
    assert [hit.document.id for hit in hits] == [f"https://a.example/größe 漢字/{i}" for i in (1, 2, 3)]
    assert hits[0].document.contents == '"Title 1"\nAbout größe 漢字. More.'
    assert [hit.score for hit in hits] == [1.0, 1 / 2, 1 / 3]
    assert nothing == ()
    assert blank == ()
    assert sorted(asked.query for asked in fake.asked) == ["größe 漢字", NOTHING]


@pytest.mark.parametrize("name", NAMES)
async def test_asks_for_the_pages_it_needs_and_no_more(name: str) -> None:
    async with (fake := FakeEngine(name)).running():
        for topk, num_hits, num_requests in [(2, 2, 1), (10, 3, 1), (11, 6, 2), (100, 6, 3), (1000, 6, 3)]:
            fake.asked.clear()
            [found] = await search(name, fake.options(), topk=topk)
            assert len(as_found(found)) == num_hits
            assert len(fake.asked) == num_requests
    ids = [hit.document.id for hit in as_found(found)]
    assert len(set(ids)) == 6


@pytest.mark.parametrize("name", NAMES)
async def test_a_wrong_key_is_refused_and_never_shown(name: str) -> None:
    wrong = "falsch-9876543210"
    async with (fake := FakeEngine(name)).running():
        options = OnlineOptions(keys={key: SecretStr(wrong) for key in KEYS}, url=fake.url)
        [outcome] = await search(name, options)
    assert isinstance(outcome, SearchFailure)
    assert outcome.kind is FailureKind.REFUSED
    assert "the key is not accepted" in outcome.reason
    assert "_KEY" in outcome.reason
    assert wrong not in outcome.reason
    assert len(fake.asked) == 1


@pytest.mark.parametrize(
    ("name", "status", "body"),
    [
        ("serper", 400, '{"message": "Not enough credits", "statusCode": 400}'),
        ("serpapi", 429, '{"error": "Your account has run out of searches."}'),
        (
            "google",
            429,
            '{"error": {"message": "Quota exceeded for quota metric and limit Queries per day"}}',
        ),
        ("google", 403, '{"error": {"errors": [{"reason": "dailyLimitExceeded"}]}}'),
        (
            "serpapi",
            403,
            '{"error": {"message": "Out of call volume quota. Quota will be replenished in 2 days"}}',
        ),
    ],
)
async def test_a_used_up_quota_is_named_without_another_attempt(name: str, status: int, body: str) -> None:
    failure = await fail(fake := FakeEngine(name, faults=[Fault(status=status, body=body)]))
    assert failure.kind is FailureKind.QUOTA
    assert "quota is used up" in failure.reason
    assert len(fake.asked) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=503),
        Fault(status=408),
        Fault(status=200, body='{"organic": [', breaks_off=True),
    ],
)
@pytest.mark.parametrize("name", NAMES)
async def test_what_may_pass_is_tried_again(name: str, fault: Fault) -> None:
    async with (fake := FakeEngine(name, faults=[fault])).running():
        [found] = await search(name, fake.options())
    assert len(as_found(found)) == 3
    assert len(fake.asked) == 2


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503, headers={"Retry-After": "1"}),
        # Without the header: the shortest limits are counted by the second.
        Fault(status=429, body='{"error": "limit: Queries per minute per user"}'),
        Fault(status=403, body='{"error": {"errors": [{"reason": "rateLimitExceeded"}]}}'),
    ],
)
async def test_a_rate_limit_is_waited_for(fault: Fault) -> None:
    """For a second before each other attempt, so that no more than one of the three fits."""
    failure = await fail(fake := FakeEngine("serper", faults=[fault] * 4), timeout_s=1.5)
    assert len(fake.asked) <= 2, "not four, as without a wait"
    assert "tried 4 times" not in failure.reason


async def test_after_the_wait_the_engine_is_asked_again() -> None:
    fake = FakeEngine("serper", faults=[Fault(status=503, headers={"Retry-After": "0"})])
    async with fake.running():
        [found] = await search("serper", fake.options(), timeout_s=60.0)
    assert as_found(found)


async def test_a_retry_after_beyond_the_deadline_is_not_waited_for() -> None:
    failure = await fail(FakeEngine("serpapi", faults=[Fault(status=429, headers={"Retry-After": "60"})]))
    assert failure.kind is FailureKind.UNAVAILABLE
    assert "asks to wait 60 s" in failure.reason


async def test_attempts_are_few_because_each_may_cost() -> None:
    failure = await fail(fake := FakeEngine("serper", faults=[Fault(status=500)] * 9))
    assert failure.kind is FailureKind.UNAVAILABLE
    assert "tried 4 times" in failure.reason
    assert len(fake.asked) == 4


async def test_a_silent_engine_ends_at_the_deadline() -> None:
    failure = await fail(FakeEngine("google", faults=[Fault(hangs=True)] * 9), timeout_s=0.4)
    assert failure.kind is FailureKind.DEADLINE
    assert "within 0.4 s" in failure.reason


@pytest.mark.parametrize(
    "body",
    [
        "<html>busy</html>",
        "",
        "[1]",
        "null",
        '{"a": ',
        "[" * 100_000,
        "{}",
        '{"message": "hello"}',
        '{"organic": {"a": 1}, "organic_results": 3, "items": "x", "webPages": {"value": {}}}',
        '{"organic": [3], "organic_results": [3], "items": [3], "webPages": {"value": [3]}}',
        '{"organic": [{}], "organic_results": [{}], "items": [{}], "webPages": {"value": [{}]}}',
        '{"organic": [{"link": 3}], "organic_results": [{"link": 3}], "items": [{"link": [3]}], '
        '"webPages": {"value": [{"url": 3}]}}',
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("name", NAMES)
async def test_an_unreadable_answer_is_a_failure_and_no_document(name: str, body: str | bytes) -> None:
    failure = await fail(FakeEngine(name, faults=[Fault(status=200, body=body)]))
    assert failure.kind is FailureKind.MALFORMED
    assert len(failure.reason) < 700


async def test_an_endless_answer_is_not_read_to_its_end() -> None:
    failure = await fail(FakeEngine("serper", faults=[Fault(status=200, body=b" " * (9 << 20))]))
    assert failure.kind is FailureKind.MALFORMED
    assert "8 MiB" in failure.reason


async def test_a_defect_ends_the_searches_beside_it(tmp_path: Path) -> None:
    class Store:
        """Hangs, or has a defect."""

        num_ended = 0

        async def find(self, key: AnswerKey) -> Found | None:
            if key.query == "defect":
                raise KeyError("hits")
            try:
                await asyncio.Event().wait()
            finally:
                self.num_ended += 1

        async def aclose(self) -> None:
            """Close nothing."""

    store = Store()
    options = OnlineOptions(mode=OnlineMode.REPLAY, cache_path=tmp_path / "s.sqlite")
    retriever = OnlineRetriever(ENGINES["serper"], options=options, store=store, transport=None)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="hits"):
        await retriever.search(["a", "defect", "b"], topk=3, timeout_s=600.0)
    assert store.num_ended == 2
    await retriever.aclose()


async def test_many_calls_use_few_connections_and_leave_none() -> None:
    process = psutil.Process()
    async with (fake := FakeEngine("serper")).running():
        retriever = open_online("serper", options=fake.options(num_parallel_calls=8))
        await retriever.search(["warm"], topk=3, timeout_s=5.0)
        before = len(process.net_connections("tcp"))
        for _ in range(3):
            outcomes = await retriever.search([f"q{i}" for i in range(100)], topk=3, timeout_s=30.0)
            assert all(len(as_found(outcome)) == 3 for outcome in outcomes)
        # Both ends of seven more connections.
        assert len(process.net_connections("tcp")) <= before + 2 * 7
        assert fake.most_open <= 8
        await retriever.aclose()
        for _ in range(100):
            if not fake.num_open:
                break
            await asyncio.sleep(0.01)
        assert fake.num_open == 0
