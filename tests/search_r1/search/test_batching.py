"""Every caller gets its own answer, whatever arrives when; and batches are as large as they can be."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from search_r1.search.batching import BatchOptions, MicroBatcher, Source
from search_r1.search.errors import RetrieverError
from search_r1.search.retriever import FailureKind, Hit, Outcome, SearchFailure
from search_r1.search.schema import Document
from tests.search_r1.search.servers import EchoRetriever, hits_for
from tests.search_r1.search.skipped_time import on_skipped_time, run_skipping


@dataclass(slots=True)
class Counted:
    sources: Counter[Source] = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)

    def count_query(self, source: Source) -> None:
        self.sources[source] += 1

    def count_batch(self, *, size: int, seconds: float) -> None:
        self.sizes.append(size)


def make(retriever: EchoRetriever, counts: Counted | None = None, **options: object) -> MicroBatcher:
    """Its window is so long that a busy machine does not tear apart what is asked at the same time."""
    known = {"window_s": 0.02} | options
    return MicroBatcher(retriever, options=BatchOptions(**known), counts=counts or Counted())  # type: ignore[arg-type]


def ask(
    batcher: MicroBatcher, *queries: str, topk: int = 1, timeout_s: float = 30.0
) -> asyncio.Task[list[Outcome]]:
    return asyncio.create_task(batcher.search(queries, topk=topk, timeout_s=timeout_s))


def kinds(outcomes: Sequence[Outcome]) -> list[FailureKind | None]:
    return [outcome.kind if isinstance(outcome, SearchFailure) else None for outcome in outcomes]


async def test_what_is_asked_at_the_same_time_is_searched_together() -> None:
    retriever = EchoRetriever()
    batcher = make(retriever)
    answers = await asyncio.gather(*(ask(batcher, f"q{number}") for number in range(20)))
    assert [answer[0] for answer in answers] == [hits_for(f"q{number}", 1) for number in range(20)]
    assert len(retriever.calls) == 1


def test_who_is_alone_waits_for_the_window_only() -> None:
    batcher = make(EchoRetriever(search_s=0.2), window_s=0.01, cache_size=0)

    async def play() -> float:
        await ask(batcher, "first")
        started = asyncio.get_running_loop().time()
        await ask(batcher, "second")
        return asyncio.get_running_loop().time() - started

    assert run_skipping(play()) == pytest.approx(0.21)


def test_askers_in_a_loop_end_in_one_batch() -> None:
    """Not in two halves that search in turns, although they start in two."""
    retriever = EchoRetriever(search_s=0.4)
    batcher = make(retriever, cache_size=0, window_s=0.002)

    async def ask_in_a_loop(number: int) -> None:
        await asyncio.sleep(0.1 if number % 2 else 0.0)
        for turn in range(6):
            await batcher.search([f"{number}.{turn}"], topk=1, timeout_s=30)
            await asyncio.sleep(0.0005 * number)  # up to 32 ms: the answer travels, the next question comes

    async def play() -> None:
        await asyncio.gather(*(ask_in_a_loop(number) for number in range(64)))

    run_skipping(play())
    assert [len(call) for call in retriever.calls] == [32, 64, 64, 64, 64, 64, 32]


@on_skipped_time
async def test_without_batching_every_request_is_a_call_of_its_own() -> None:
    retriever = EchoRetriever(search_s=0.001)
    batcher = make(retriever, together=False)
    await asyncio.gather(*(ask(batcher, f"a{number}", f"b{number}") for number in range(5)))
    assert retriever.calls == [(f"a{number}", f"b{number}") for number in range(5)]
    assert retriever.most == 1


async def test_queries_that_ask_for_other_numbers_of_passages_are_searched_apart() -> None:
    retriever = EchoRetriever()
    batcher = make(retriever)
    three, five = ask(batcher, "a", "b", topk=3), ask(batcher, "a", topk=5)
    assert await ask(batcher, "c", topk=3) == [hits_for("c", 3)]
    assert (await three, await five) == ([hits_for("a", 3), hits_for("b", 3)], [hits_for("a", 5)])
    assert sorted(zip(retriever.topks, retriever.calls, strict=True)) == [(3, ("a", "b", "c")), (5, ("a",))]


@on_skipped_time
async def test_equal_queries_are_searched_once_and_remembered() -> None:
    retriever, counts = EchoRetriever(search_s=0.02), Counted()
    batcher = make(retriever, counts)
    first = ask(batcher, "a", "a", " ")
    await asyncio.sleep(0.01)  # its search runs
    assert await ask(batcher, "a") == [hits_for("a", 1)]
    assert await first == [hits_for("a", 1), hits_for("a", 1), ()]
    assert await ask(batcher, "a") == [hits_for("a", 1)]
    assert retriever.calls == [("a",)]
    assert counts.sources == {Source.SEARCHED: 1, Source.JOINED: 2, Source.BLANK: 1, Source.CACHED: 1}
    assert counts.sizes == [1]


async def test_as_many_answers_are_remembered_as_asked_for() -> None:
    retriever = EchoRetriever()
    batcher = make(retriever, cache_size=2)
    for query in ("a", "b", "a", "c", "a", "b"):  # b is forgotten for c
        await ask(batcher, query)
    assert retriever.calls == [("a",), ("b",), ("c",), ("b",)]
    batcher = make(retriever, cache_size=0)
    for _ in range(3):
        await ask(batcher, "a")
    assert len(retriever.calls) == 4 + 3


async def test_long_queries_are_not_remembered() -> None:
    retriever = EchoRetriever()
    batcher = make(retriever)
    for _ in range(2):
        await ask(batcher, "long " * 1000)
    assert len(retriever.calls) == 2


async def test_ten_passages_are_remembered_for_every_answer() -> None:
    retriever = EchoRetriever()
    batcher = make(retriever, cache_size=6)
    for query, topk in (("a", 25), ("b", 25), ("a", 25), ("c", 20), ("a", 25), ("d", 10), ("b", 25)):
        await ask(batcher, query, topk=topk)  # b is forgotten for c: these are more than 60
    assert retriever.calls == [("a",), ("b",), ("c",), ("d",), ("b",)]
    await ask(batcher, "huge", topk=61)
    await ask(batcher, "huge", topk=61)
    assert retriever.calls[5:] == [("huge",), ("huge",)]


async def test_answers_are_forgotten_when_what_they_depend_on_changes() -> None:
    """As the day of a recording does: the new one must not lack what was asked on the old one."""
    retriever = EchoRetriever(facts={"date": "2025-06-01"})
    batcher = make(retriever)
    for date in ("2025-06-01", "2025-06-02"):
        retriever.facts = {"date": date}
        for _ in range(2):
            assert await ask(batcher, "a") == [hits_for("a", 1)]
    assert len(retriever.calls) == 2


async def test_failures_are_not_remembered() -> None:
    failure = SearchFailure(kind=FailureKind.UNAVAILABLE, reason="no connection")
    retriever = EchoRetriever(act={"a": failure})
    batcher = make(retriever)
    assert await ask(batcher, "a", "b") == [failure, hits_for("b", 1)]
    retriever.act = {}
    assert await ask(batcher, "a") == [hits_for("a", 1)]


async def test_a_query_that_crashes_takes_no_neighbour_with_it() -> None:
    retriever = EchoRetriever(act={"q5": ValueError("no such row")})
    outcomes = await ask(make(retriever), *(f"q{number}" for number in range(16)))
    assert [row for row, kind in enumerate(kinds(outcomes)) if kind] == [5]
    assert outcomes[5] == SearchFailure(
        kind=FailureKind.INTERNAL, reason="the search crashed (ValueError: no such row)"
    )
    assert len(retriever.calls) == 9, "halves, not one by one"


async def test_what_concerns_all_is_asked_once() -> None:
    retriever = EchoRetriever(act={"b": RetrieverError("the index is gone")})
    outcomes = await ask(make(retriever), "a", "b")
    assert kinds(outcomes) == [FailureKind.INTERNAL] * 2
    assert len(retriever.calls) == 1


async def test_a_retriever_out_of_order_is_found_out() -> None:
    class Forgetful(EchoRetriever):
        async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
            return (await super().search(queries, topk=topk, timeout_s=timeout_s))[1:]

    assert kinds(await ask(make(Forgetful()), "a", "b")) == [FailureKind.INTERNAL] * 2
    nan = (Hit(document=Document(contents="x"), score=float("nan")),)
    assert kinds(await ask(make(EchoRetriever(act={"a": nan})), "a", "b")) == [FailureKind.MALFORMED, None]


def test_each_waits_until_its_own_deadline() -> None:
    retriever = EchoRetriever(search_s=0.3)
    batcher = make(retriever)

    async def play() -> float:
        hasty, patient = ask(batcher, "a", timeout_s=0.05), ask(batcher, "a", "b", timeout_s=10)
        assert kinds(await hasty) == [FailureKind.DEADLINE]
        answered_s = asyncio.get_running_loop().time()
        assert await patient == [hits_for("a", 1), hits_for("b", 1)]
        return answered_s

    assert run_skipping(play()) == pytest.approx(0.05)
    assert len(retriever.calls) == 1
    assert retriever.timeouts_s == [pytest.approx(9.98)]


@on_skipped_time
async def test_who_joins_late_is_not_failed_by_the_deadline_of_another() -> None:
    late = SearchFailure(kind=FailureKind.DEADLINE, reason="too slow")
    retriever = EchoRetriever(search_s=0.1, act={"a": late})
    batcher = make(retriever)
    hasty = ask(batcher, "a", timeout_s=0.1)
    await asyncio.sleep(0.05)
    patient = ask(batcher, "a", timeout_s=10)
    await hasty
    retriever.act = {}
    assert await patient == [hits_for("a", 1)]


@on_skipped_time
async def test_what_nobody_waits_for_any_more_is_not_searched() -> None:
    retriever = EchoRetriever(search_s=0.1)
    batcher = make(retriever)
    running = ask(batcher, "running")
    await asyncio.sleep(0.02)
    leaving = ask(batcher, "only mine", "ours")
    staying = ask(batcher, "ours")
    expiring = ask(batcher, "late", timeout_s=0.01)
    await asyncio.sleep(0.02)
    leaving.cancel()
    assert kinds(await expiring) == [FailureKind.DEADLINE]
    assert await staying == [hits_for("ours", 1)]
    await running
    assert retriever.calls == [("running",), ("ours",)]
    assert batcher.num_waiting == 0


@on_skipped_time
async def test_the_end_answers_everybody() -> None:
    retriever = EchoRetriever(search_s=60)
    batcher = make(retriever, max_batch=1)
    asked = [ask(batcher, query) for query in "abc"]
    await asyncio.sleep(0.02)
    await batcher.aclose()
    assert [kinds(await answer) for answer in asked] == [[FailureKind.UNAVAILABLE]] * 3
    assert retriever.closed
    assert len(retriever.calls) == 1


async def test_a_batch_is_never_larger_than_both_limits() -> None:
    for max_batch in (5, 100):
        retriever = EchoRetriever(max_batch=7)
        answers = await ask(make(retriever, max_batch=max_batch), *(f"q{number}" for number in range(23)))
        assert answers == [hits_for(f"q{number}", 1) for number in range(23)]
        assert max(map(len, retriever.calls)) == min(7, max_batch)


@on_skipped_time
async def test_as_many_calls_run_at_once_as_the_retriever_allows() -> None:
    retriever = EchoRetriever(search_s=0.05, max_batch=1, num_parallel_calls=3)
    await ask(make(retriever), *"abcdefgh")
    assert (retriever.most, len(retriever.calls)) == (3, 8)


@on_skipped_time
async def test_no_number_of_passages_starves_beside_a_busy_one() -> None:
    retriever = EchoRetriever(search_s=0.005)
    batcher = make(retriever, max_batch=4, cache_size=0, window_s=0.002)

    async def search_again_and_again(number: int) -> None:
        for turn in range(100):
            await batcher.search([f"{number}.{turn}"], topk=3, timeout_s=30)

    busy = [
        asyncio.create_task(search_again_and_again(number)) for number in range(16)
    ]  # always a full batch
    await asyncio.sleep(0.1)
    before = len(retriever.calls)
    assert await ask(batcher, "rare", topk=5) == [hits_for("rare", 5)]
    assert len(retriever.calls) - before <= 4
    await batcher.aclose()
    for task in busy:
        task.cancel()


# ------------------------------------------------------------------------------------- whatever happens when

FAILURES: dict[str, Outcome | Exception] = {
    "fails": SearchFailure(kind=FailureKind.REFUSED, reason="no"),
    "crashes": RuntimeError("boom"),
    "late": SearchFailure(kind=FailureKind.DEADLINE, reason="too slow"),
}
QUERIES = st.sampled_from(["a", "b", "c", "d", "e", "", *FAILURES])


@dataclass(frozen=True, slots=True)
class Caller:
    queries: list[str]
    topk: int
    arrives_s: float
    timeout_s: float
    leaves_s: float | None


CALLERS = st.builds(
    Caller,
    queries=st.lists(QUERIES, max_size=5),
    topk=st.integers(1, 2),
    arrives_s=st.integers(0, 20).map(lambda ms: ms / 1000),
    timeout_s=st.sampled_from([0.003, 30.0]),
    leaves_s=st.none() | st.integers(0, 15).map(lambda ms: ms / 1000),
)


def is_right(outcome: Outcome, *, query: str, caller: Caller) -> bool:
    if isinstance(outcome, SearchFailure) and outcome.kind is FailureKind.DEADLINE:
        return caller.timeout_s < 1 or query == "late"
    if query == "crashes":
        return isinstance(outcome, SearchFailure) and outcome.kind is FailureKind.INTERNAL
    if query in FAILURES:
        return outcome == FAILURES[query]
    return outcome == (hits_for(query, caller.topk) if query else ())


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    callers=st.lists(CALLERS, max_size=12),
    search_s=st.sampled_from([0.0, 0.002, 0.008]),
    max_batch=st.integers(1, 6),
    num_parallel_calls=st.integers(1, 3),
    together=st.booleans(),
    cache_size=st.integers(0, 3),
)
def test_every_caller_gets_its_own_answer(
    callers: list[Caller],
    search_s: float,
    max_batch: int,
    num_parallel_calls: int,
    together: bool,
    cache_size: int,
) -> None:
    retriever = EchoRetriever(search_s, max_batch, num_parallel_calls, act=FAILURES)
    batcher = make(retriever, together=together, cache_size=cache_size, window_s=0.002)

    async def call(caller: Caller) -> None:
        await asyncio.sleep(caller.arrives_s)
        asked = ask(batcher, *caller.queries, topk=caller.topk, timeout_s=caller.timeout_s)
        if caller.leaves_s is not None:
            await asyncio.sleep(caller.leaves_s)
            asked.cancel()
        try:
            outcomes = await asyncio.wait_for(asked, 20)
        except asyncio.CancelledError:
            assert caller.leaves_s is not None
            return
        assert len(outcomes) == len(caller.queries)
        for query, outcome in zip(caller.queries, outcomes, strict=True):
            assert is_right(outcome, query=query, caller=caller), (query, outcome)

    async def play() -> None:
        await asyncio.gather(*map(call, callers))
        deadline = asyncio.get_running_loop().time() + 5
        while batcher._calls:  # those whose callers left
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.001)
        assert batcher.num_waiting == 0
        assert not batcher._unanswered
        assert retriever.most <= num_parallel_calls
        await batcher.aclose()

    run_skipping(play())
