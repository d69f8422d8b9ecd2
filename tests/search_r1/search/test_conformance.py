"""What every retriever must do, whatever is behind it: one list of cases (see subjects.py)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio

from search_r1.search.errors import RetrieverError
from search_r1.search.retriever import FailureKind, Found, Outcome, SearchFailure
from tests.search_r1.search.open_things import count_open, list_mapped, settle, start_threads_of_loop
from tests.search_r1.search.subjects import BACK_ENDS, Files, Open, Subject, open_remote

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOPK = 3
LONG_S = 20.0
SCORE_NOISE = 1e-5
NUM_CALLERS = 50
STRANGE = (
    'title:"x" AND (',
    "a\x00b\x07\x1b[0m",
    "漢字 🎬 größe",
    "שלום عالم",
    "e\u0301\u0302\u0303" * 20,
    "\u200b\u202e\ufeff.",
    "{{query}} %s %n \\ \" ' ` $(x) <x> &amp; ; --",
    "?!",
    "\U0010ffff\ufffe",
)


async def ask(subject: Subject, *queries: str, topk: int = TOPK, timeout_s: float = LONG_S) -> list[Outcome]:
    """In calls of the size that the retriever allows."""
    outcomes: list[Outcome] = []
    size = subject.retriever.max_batch
    for start in range(0, len(queries), size):
        batch = queries[start : start + size]
        outcomes += await subject.retriever.search(batch, topk=topk, timeout_s=timeout_s)
    return outcomes


def found(outcome: Outcome) -> Found:
    assert not isinstance(outcome, SearchFailure), outcome
    return outcome


def assert_same(left: Outcome, right: Outcome) -> None:
    """The same documents with the same scores; neighbors of equal score may have changed places."""
    left, right = found(left), found(right)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.score == pytest.approx(other.score, rel=SCORE_NOISE, abs=SCORE_NOISE)
        if one.document != other.document:
            near = [hit.document for hit in right if abs(hit.score - one.score) <= 2 * SCORE_NOISE]
            assert one.document in near or one == left[-1]


async def call_often(subject: Subject, num_calls: int) -> None:
    asked = itertools.cycle(subject.queries)
    for start in range(0, num_calls, NUM_CALLERS):
        size = min(NUM_CALLERS, num_calls - start)
        answers = await asyncio.gather(*(ask(subject, next(asked)) for _ in range(size)))
        assert all(found(outcome) for [outcome] in answers)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("conformance"))


def open_named(files: Files, name: str) -> Open:
    return partial(open_remote, files) if name == "remote" else partial(BACK_ENDS[name], files)


# First, while no other subject is open.
@pytest.mark.parametrize("name", [*BACK_ENDS, "remote"])
async def test_closing_releases_everything_and_answers_every_caller(files: Files, name: str) -> None:
    open_subject = open_named(files, name)
    await start_threads_of_loop()
    async with open_subject() as subject:  # libraries start threads that stay
        await call_often(subject, 5)
        folder = subject.folder
    await asyncio.sleep(0.2)
    before = count_open()
    async with open_subject() as subject:
        await call_often(subject, 5)
    del subject
    assert await settle(before) <= before
    assert list_mapped(folder) == []
    async with open_subject() as subject:
        tasks = [asyncio.create_task(ask(subject, subject.new_query())) for _ in range(10)]
        await asyncio.sleep(0)
        await subject.retriever.aclose()
        _, pending = await asyncio.wait(tasks, timeout=200.0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not pending
        await subject.retriever.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[*BACK_ENDS, "remote"])
async def subject(request: pytest.FixtureRequest, files: Files) -> AsyncIterator[Subject]:
    async with open_named(files, request.param)() as subject:
        yield subject


async def test_hits_are_whole_best_first_and_different_for_different_queries(subject: Subject) -> None:
    outcomes = await ask(subject, *subject.queries, topk=10)
    for outcome in outcomes:
        hits = found(outcome)
        assert 1 <= len(hits) <= 10
        assert all(hit.document.contents.strip() for hit in hits)
        scores = [hit.score for hit in hits]
        assert all(math.isfinite(score) for score in scores)
        assert scores == sorted(scores, reverse=True)
        assert len({(hit.document.id, hit.document.contents) for hit in hits}) == len(hits)
    answers = {tuple(hit.document.contents for hit in found(outcome)) for outcome in outcomes}
    assert len(answers) > len(subject.queries) / 2


async def test_a_batch_is_answered_as_each_query_alone(subject: Subject) -> None:
    together = await ask(subject, *subject.queries, *reversed(subject.queries))
    for number, query in enumerate(subject.queries):
        [alone] = await ask(subject, query)
        assert_same(alone, together[number])
        assert_same(alone, together[-1 - number])
        [again] = await ask(subject, query)
        assert again == alone


async def test_the_number_of_hits_is_kept(subject: Subject) -> None:
    assert await subject.retriever.search([], topk=TOPK, timeout_s=LONG_S) == []
    for query in subject.queries[:3]:
        [few], [more] = await ask(subject, query, topk=1), await ask(subject, query, topk=5)
        if subject.is_exact:
            assert_same(few, found(more)[:1])
        else:  # more results look at more candidates
            assert found(few)[0].score <= found(more)[0].score + SCORE_NOISE
        [everything] = await ask(subject, query, topk=1000)
        hits = found(everything)
        assert 1 <= len(hits) <= subject.max_hits
        assert len({(hit.document.id, hit.document.contents) for hit in hits}) == len(hits)
    size = subject.retriever.max_batch
    queries = list(itertools.islice(itertools.cycle(subject.queries), size))
    outcomes = await subject.retriever.search(queries, topk=TOPK, timeout_s=LONG_S)
    assert all(map(found, outcomes))
    assert len(outcomes) == size


async def test_blank_and_unknown_queries_find_nothing(subject: Subject) -> None:
    query = subject.queries[0]
    nothing = [subject.nothing] if subject.nothing is not None else []
    outcomes = await ask(subject, "", query, " \n\t ", "\u3000\u00a0", *nothing, query)
    assert [found(outcome) == () for outcome in outcomes] == [
        True,
        False,
        True,
        True,
        *map(bool, nothing),
        False,
    ]
    assert_same(outcomes[1], outcomes[-1])


async def test_any_text_is_answered_and_leaves_its_neighbors_alone(subject: Subject) -> None:
    query = subject.queries[0]
    [alone] = await ask(subject, query)
    surrogates = (f"{query} \ud800", "\udfff") if subject.is_edge else ()
    long = [" ".join(itertools.islice(itertools.cycle(query.split()), size)) for size in (1000, 10_000)]
    first, *strange, last = await ask(subject, query, *STRANGE, *surrogates, *long, query)
    assert_same(first, alone)
    assert_same(last, alone)
    for outcome in strange[: len(STRANGE)]:
        assert all(hit.document.contents for hit in found(outcome))
    for outcome in strange[len(STRANGE) :]:
        assert isinstance(outcome, tuple) or outcome.kind is FailureKind.REFUSED


async def test_many_callers_each_get_their_own_answer(subject: Subject) -> None:
    asked = [(subject.queries[n % len(subject.queries)], 1 + n % 4) for n in range(NUM_CALLERS)]
    alone = {pair: (await ask(subject, pair[0], topk=pair[1]))[0] for pair in set(asked)}
    answers = await asyncio.gather(*(ask(subject, query, topk=topk) for query, topk in asked))
    for pair, [outcome] in zip(asked, answers, strict=True):
        assert_same(outcome, alone[pair])


async def test_a_deadline_or_a_failure_is_never_an_empty_answer(subject: Subject) -> None:
    [outcome] = await ask(subject, subject.new_query(), timeout_s=0.001)
    assert found(outcome) if isinstance(outcome, tuple) else outcome.kind is FailureKind.DEADLINE
    if subject.hangs is not None:
        with subject.hangs():
            [late] = await ask(subject, subject.new_query(), timeout_s=0.3)
        assert isinstance(late, SearchFailure)
        assert late.kind is FailureKind.DEADLINE
    if subject.breaks is not None:
        failures: list[Outcome] = []
        # What concerns every query alike may be raised; otherwise each one fails.
        with subject.breaks(), contextlib.suppress(RetrieverError):
            failures = await ask(subject, subject.new_query(), subject.new_query(), timeout_s=0.5)
        for failure in failures:
            assert isinstance(failure, SearchFailure)
            assert failure.reason
            assert not any(secret in failure.reason for secret in subject.secrets)
    assert found((await ask(subject, subject.new_query()))[0])


async def test_a_cancelled_search_leaves_others_alone_and_nothing_open(subject: Subject) -> None:
    await start_threads_of_loop()
    await call_often(subject, NUM_CALLERS)  # pools have their size from now on
    before = count_open()
    for wait_s in (0.0, 0.001, 0.01):
        query = subject.new_query()
        tasks = [asyncio.create_task(ask(subject, query)) for _ in range(4)]
        await asyncio.sleep(wait_s)
        tasks[0].cancel()
        for [outcome] in await asyncio.gather(*tasks[1:]):
            assert found(outcome)
        await asyncio.gather(tasks[0], return_exceptions=True)
    await call_often(subject, 2 * NUM_CALLERS)
    allowed = before.plus(20)
    assert await settle(allowed) <= allowed


async def test_it_describes_itself_without_paths_and_secrets(subject: Subject) -> None:
    facts = subject.retriever.describe()
    text = json.dumps(dict(facts))
    assert facts
    assert all(isinstance(value, str | int | float | None) for value in facts.values())
    assert not any(secret in text for secret in (str(subject.folder), *subject.secrets))
    assert subject.retriever.num_passages in (None, subject.max_hits)
    assert subject.retriever.max_batch >= 1
    assert subject.retriever.num_parallel_calls >= 1
