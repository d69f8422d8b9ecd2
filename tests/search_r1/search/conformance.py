"""What every retriever must do, whatever is behind it: one list of cases for all of them.

`CASES` share an open retriever, `LIFE_CASES` open their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.retriever import FailureKind, Found, Hit, Outcome, Retriever, SearchFailure
from tests.search_r1.search.open_things import count_open, list_mapped, settle, start_threads_of_loop

TOPK = 3
LONG_S = 20.0
SCORE_NOISE = 1e-5
_NUM_POOLED = 20
"""Connections and threads by which a pool may have grown: far fewer than the calls."""
_NUM_CALLERS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An open retriever, and what is known of its world."""

    retriever: Retriever
    queries: tuple[str, ...]
    """Each finds something, and not all the same."""
    nothing: str | None
    """Finds nothing; None where every query finds its nearest."""
    max_hits: int
    """Documents that there are for one query at most."""
    folder: Path
    """Of its files."""
    secrets: tuple[str, ...] = ()
    breaks: Callable[[], AbstractContextManager[None]] | None = None
    """Within, what was not asked before cannot be answered."""
    hangs: Callable[[], AbstractContextManager[None]] | None = None
    """Within, what was not asked before is answered too late."""
    is_exact: bool = True
    """No passage is better than those it finds."""
    is_edge: bool = False
    """What it is asked comes from outside."""
    num_calls: int = 200
    """To be made in search of leaks."""
    counter: Iterator[int] = field(default_factory=itertools.count)

    def new_query(self) -> str:
        """Not asked before, and finds something."""
        return f"{self.queries[0]} {next(self.counter)}"


Case: TypeAlias = Callable[[Subject], Awaitable[None]]
Open: TypeAlias = Callable[[], AbstractAsyncContextManager[Subject]]
LifeCase: TypeAlias = Callable[[Open], Awaitable[None]]


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


def failed(outcome: Outcome) -> SearchFailure:
    assert isinstance(outcome, SearchFailure), outcome
    return outcome


def assert_same(left: Outcome, right: Outcome) -> None:
    """The same documents with the same scores; neighbours of equal score may have changed places."""
    left, right = found(left), found(right)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.score == pytest.approx(other.score, rel=SCORE_NOISE, abs=SCORE_NOISE)
        if one.document != other.document:
            near = [hit.document for hit in right if abs(hit.score - one.score) <= 2 * SCORE_NOISE]
            assert one.document in near or one == left[-1]


async def hits_are_whole_and_best_first(subject: Subject) -> None:
    for outcome in await ask(subject, *subject.queries, topk=10):
        hits = found(outcome)
        assert 1 <= len(hits) <= 10
        assert all(isinstance(hit, Hit) and hit.document.contents.strip() for hit in hits)
        scores = [hit.score for hit in hits]
        assert all(math.isfinite(score) for score in scores)
        assert scores == sorted(scores, reverse=True)
        assert len({(hit.document.id, hit.document.contents) for hit in hits}) == len(hits)


async def queries_have_their_own_answers(subject: Subject) -> None:
    outcomes = await ask(subject, *subject.queries)
    answers = {tuple(hit.document.contents for hit in found(outcome)) for outcome in outcomes}
    assert len(answers) > len(subject.queries) / 2


async def a_batch_is_answered_as_each_alone(subject: Subject) -> None:
    together = await ask(subject, *subject.queries)
    backward = await ask(subject, *reversed(subject.queries))
    for query, one, other in zip(subject.queries, together, reversed(backward), strict=True):
        [alone] = await ask(subject, query)
        assert_same(alone, one)
        assert_same(alone, other)


async def a_query_twice_in_a_batch_is_answered_twice(subject: Subject) -> None:
    query, other = subject.queries[:2]
    first, _, second = await ask(subject, query, other, query)
    assert_same(first, second)


async def asking_again_gives_the_same(subject: Subject) -> None:
    [first] = await ask(subject, subject.queries[0])
    for _ in range(5):
        assert (await ask(subject, subject.queries[0])) == [first]


async def fewer_are_the_first_of_more(subject: Subject) -> None:
    for query in subject.queries[:3]:
        [few], [more] = await ask(subject, query, topk=1), await ask(subject, query, topk=5)
        if subject.is_exact:
            assert_same(few, found(more)[:1])
        else:  # who looks for more looks around more
            assert found(few)[0].score <= found(more)[0].score + SCORE_NOISE


async def more_than_there_are_gives_all_there_are(subject: Subject) -> None:
    for outcome in await ask(subject, *subject.queries[:2], topk=1000):
        hits = found(outcome)
        assert 1 <= len(hits) <= subject.max_hits
        assert len({(hit.document.id, hit.document.contents) for hit in hits}) == len(hits)


async def a_full_batch_is_answered(subject: Subject) -> None:
    size = subject.retriever.max_batch
    queries = list(itertools.islice(itertools.cycle(subject.queries), size))
    outcomes = await subject.retriever.search(queries, topk=TOPK, timeout_s=LONG_S)
    assert len(outcomes) == size
    assert all(found(outcome) for outcome in outcomes)


# --------------------------------------------------------------------------------------- the text of queries


async def no_queries_have_no_answers(subject: Subject) -> None:
    assert await subject.retriever.search([], topk=TOPK, timeout_s=LONG_S) == []


async def blank_queries_find_nothing(subject: Subject) -> None:
    query = subject.queries[0]
    outcomes = await ask(subject, "", query, " \n\t ", "\u3000\u00a0", query)
    assert [found(outcome) == () for outcome in outcomes] == [True, False, True, True, False]
    assert_same(outcomes[1], outcomes[4])


async def what_is_not_there_is_not_found(subject: Subject) -> None:
    if subject.nothing is None:
        pytest.skip("finds the nearest, whatever is asked")
    nothing, something = await ask(subject, subject.nothing, subject.queries[0])
    assert found(nothing) == ()
    assert found(something)


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


async def any_text_may_be_asked(subject: Subject) -> None:
    """Found or not: an outcome for each, and the neighbours have theirs."""
    query = subject.queries[0]
    outcomes = await ask(subject, query, *STRANGE, query)
    for outcome in outcomes[1:-1]:
        assert all(hit.document.contents for hit in found(outcome))
    [alone] = await ask(subject, query)
    assert_same(outcomes[0], alone)
    assert_same(outcomes[-1], alone)


async def long_queries_are_answered_or_refused(subject: Subject) -> None:
    query = subject.queries[0]
    for length in (1000, 10_000):
        text = " ".join(itertools.islice(itertools.cycle(query.split()), length))
        outcome, neighbour = await ask(subject, text, query)
        assert isinstance(outcome, tuple) or outcome.kind is FailureKind.REFUSED
        assert found(neighbour)


async def half_a_character_spoils_no_neighbour(subject: Subject) -> None:
    """A lone surrogate is no text: it is read as U+FFFD, or its query fails."""
    if not subject.is_edge:
        pytest.skip("is asked by what lets text only in")
    query = subject.queries[0]
    outcomes = await ask(subject, query, f"{query} \ud800", "\udfff", query)
    assert found(outcomes[0])
    assert found(outcomes[3])
    for outcome in outcomes[1:3]:
        assert isinstance(outcome, tuple) or outcome.reason


# ----------------------------------------------------------------------------------------- many, and in vain


async def many_callers_each_have_their_own_answer(subject: Subject) -> None:
    alone = {query: (await ask(subject, query))[0] for query in subject.queries}
    asked = list(itertools.islice(itertools.cycle(subject.queries), _NUM_CALLERS))
    answers = await asyncio.gather(*(ask(subject, query) for query in asked))
    for query, [outcome] in zip(asked, answers, strict=True):
        assert_same(outcome, alone[query])


async def callers_of_different_depths_each_have_theirs(subject: Subject) -> None:
    query = subject.queries[1]
    answers = await asyncio.gather(*(ask(subject, query, topk=1 + n % 4) for n in range(20)))
    for n, [outcome] in enumerate(answers):
        assert len(found(outcome)) <= 1 + n % 4
        assert_same(outcome, (await ask(subject, query, topk=1 + n % 4))[0])


async def no_time_is_no_empty_answer(subject: Subject) -> None:
    """What computes may be in time all the same; nobody finds nothing for want of time."""
    [outcome] = await ask(subject, subject.new_query(), timeout_s=0.001)
    assert found(outcome) if isinstance(outcome, tuple) else outcome.kind is FailureKind.DEADLINE


async def the_deadline_is_kept(subject: Subject) -> None:
    if subject.hangs is None:
        pytest.skip("does not wait for others")
    started = time.monotonic()
    with subject.hangs():
        [outcome] = await ask(subject, subject.new_query(), timeout_s=0.3)
    assert failed(outcome).kind is FailureKind.DEADLINE
    assert time.monotonic() - started > 0.2
    assert found((await ask(subject, subject.new_query()))[0])


async def failure_is_not_emptiness(subject: Subject) -> None:
    if subject.breaks is None:
        pytest.skip("has nothing that can break")
    with subject.breaks():
        # What concerns every query alike may be raised; else each fails by its own name.
        outcomes: list[Outcome] = []
        with contextlib.suppress(RetrieverError):
            outcomes = await ask(subject, subject.new_query(), subject.new_query(), timeout_s=0.5)
        for outcome in outcomes:
            assert failed(outcome).reason
            assert not any(secret in failed(outcome).reason for secret in subject.secrets)
    assert found((await ask(subject, subject.new_query()))[0])


async def a_cancelled_search_leaves_no_trace(subject: Subject) -> None:
    for wait_s in (0.0, 0.001, 0.01):
        task = asyncio.create_task(ask(subject, subject.new_query()))
        await asyncio.sleep(wait_s)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert found((await ask(subject, subject.queries[0]))[0])


async def a_cancelled_search_does_not_disturb_others(subject: Subject) -> None:
    query = subject.new_query()
    tasks = [asyncio.create_task(ask(subject, query)) for _ in range(4)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    for [outcome] in await asyncio.gather(*tasks[1:]):
        assert found(outcome)


async def calls_leave_nothing_open(subject: Subject) -> None:
    await start_threads_of_loop()
    await _call_often(subject, min(_NUM_CALLERS, subject.num_calls))  # pools have their size from now on
    before = count_open()
    await _call_often(subject, subject.num_calls)
    allowed = before.plus(_NUM_POOLED)
    assert await settle(allowed) <= allowed


async def it_says_what_it_is(subject: Subject) -> None:
    facts = subject.retriever.describe()
    text = json.dumps(dict(facts))
    assert facts
    assert all(isinstance(value, str | int | float | None) for value in facts.values())
    assert str(subject.folder) not in text, "a machine's path says nothing elsewhere"
    assert not any(secret in text for secret in subject.secrets)
    assert subject.retriever.num_passages in (None, subject.max_hits)
    assert subject.retriever.max_batch >= 1
    assert subject.retriever.num_parallel_calls >= 1


async def closing_lets_go_of_everything(open_subject: Open) -> None:
    await start_threads_of_loop()
    async with open_subject() as subject:  # libraries start threads once and for all
        await _call_often(subject, 5)
        folder = subject.folder
    await asyncio.sleep(0.2)
    before = count_open()
    for _ in range(2):
        async with open_subject() as subject:
            await _call_often(subject, 5)
    del subject
    assert await settle(before) <= before
    assert list_mapped(folder) == []


async def closing_twice_is_closing(open_subject: Open) -> None:
    async with open_subject() as subject:
        await ask(subject, subject.queries[0])
        await subject.retriever.aclose()
        await subject.retriever.aclose()
    async with open_subject() as subject:  # and what never searched
        await subject.retriever.aclose()


async def nobody_waits_for_what_is_closed(open_subject: Open) -> None:
    async with open_subject() as subject:
        tasks = [asyncio.create_task(ask(subject, subject.new_query())) for _ in range(10)]
        await asyncio.sleep(0)
        await subject.retriever.aclose()
        _, pending = await asyncio.wait(tasks, timeout=200.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not pending


async def _call_often(subject: Subject, num_calls: int) -> None:
    asked = itertools.cycle(subject.queries)
    for start in range(0, num_calls, _NUM_CALLERS):
        size = min(_NUM_CALLERS, num_calls - start)
        answers = await asyncio.gather(*(ask(subject, next(asked)) for _ in range(size)))
        assert all(found(outcome) for [outcome] in answers)


CASES: tuple[Case, ...] = (
    hits_are_whole_and_best_first,
    queries_have_their_own_answers,
    a_batch_is_answered_as_each_alone,
    a_query_twice_in_a_batch_is_answered_twice,
    asking_again_gives_the_same,
    fewer_are_the_first_of_more,
    more_than_there_are_gives_all_there_are,
    a_full_batch_is_answered,
    no_queries_have_no_answers,
    blank_queries_find_nothing,
    what_is_not_there_is_not_found,
    any_text_may_be_asked,
    long_queries_are_answered_or_refused,
    half_a_character_spoils_no_neighbour,
    many_callers_each_have_their_own_answer,
    callers_of_different_depths_each_have_theirs,
    no_time_is_no_empty_answer,
    the_deadline_is_kept,
    failure_is_not_emptiness,
    a_cancelled_search_leaves_no_trace,
    a_cancelled_search_does_not_disturb_others,
    calls_leave_nothing_open,
    it_says_what_it_is,
)

LIFE_CASES: tuple[LifeCase, ...] = (
    closing_lets_go_of_everything,
    closing_twice_is_closing,
    nobody_waits_for_what_is_closed,
)
