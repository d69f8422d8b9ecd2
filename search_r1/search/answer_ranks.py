"""Where the answer of a question stands among the passages that its text finds, and shares of that.

A passage has the answer when the words of a gold occur in it in a row, both normalized as exact match does.
That is necessary for a reader to quote it, not sufficient: a gold like `no` occurs by chance.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from search_r1.search.questions import AskedQuestion
from search_r1.search.retriever import Outcome, Retriever, SearchFailure
from serving.answers import AnswerRule, find_answer

_Z = 1.959963984540054
"""97.5 % point of the normal distribution: intervals of 95 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRank:
    """What became of one question."""

    question: AskedQuestion
    rank: int | None
    """Of the first passage that has the answer, from 1; None when none has it, or the search failed."""
    num_found: int
    """Passages."""
    failure: SearchFailure | None = None
    """Set: nobody knows where the answer stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share of questions and its Wilson interval of 95 %."""

    value: float
    low: float
    high: float


async def measure_ranks(
    questions: Sequence[AskedQuestion],
    retriever: Retriever,
    *,
    topk: int,
    rule: AnswerRule,
    batch_size: int,
    timeout_s: float,
    report: Callable[[int], None],
) -> list[AnswerRank]:
    """One result per question, in order. `report` is told how many more are done; `timeout_s` is of a batch.

    Raises RetrieverError when the retriever fails for every query alike.
    """
    slots = asyncio.Semaphore(retriever.num_parallel_calls)
    size = max(1, min(batch_size, retriever.max_batch))

    async def measure(batch: Sequence[AskedQuestion]) -> list[AnswerRank]:
        async with slots:
            texts = [question.text for question in batch]
            outcomes = await retriever.search(texts, topk=topk, timeout_s=timeout_s)
            parts = zip(batch, outcomes, strict=True)
            ranked = await asyncio.to_thread(lambda: [_rank(*part, rule=rule) for part in parts])
        report(len(batch))
        return ranked

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(measure(questions[start : start + size]))
            for start in range(0, len(questions), size)
        ]
    return [ranked for task in tasks for ranked in task.result()]


def _rank(question: AskedQuestion, outcome: Outcome, *, rule: AnswerRule) -> AnswerRank:
    if isinstance(outcome, SearchFailure):
        return AnswerRank(question=question, rank=None, num_found=0, failure=outcome)
    index = find_answer([hit.document.contents for hit in outcome], question.golds, rule=rule)
    return AnswerRank(question=question, rank=None if index is None else index + 1, num_found=len(outcome))


def share_within(ranks: Sequence[AnswerRank], k: int) -> Share | None:
    """Of the questions whose search did not fail: those with the answer among the first `k` passages.

    None when there are none.
    """
    known = [ranked for ranked in ranks if ranked.failure is None]
    hits = sum(ranked.rank is not None and ranked.rank <= k for ranked in known)
    return wilson_share(hits, len(known)) if known else None


def wilson_share(hits: int, count: int) -> Share:
    """The Wilson score interval: sensible also for few questions and for shares near 0 and 1."""
    share = hits / count
    scale = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / scale
    radius = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / scale
    # At 0 and at 1 the interval ends there: rounding must not leave it just beside.
    low = 0.0 if hits == 0 else centre - radius
    high = 1.0 if hits == count else centre + radius
    return Share(value=share, low=low, high=high)


def by_source(ranks: Sequence[AnswerRank]) -> dict[str, list[AnswerRank]]:
    """Data sources in alphabetical order."""
    sources = sorted({ranked.question.data_source for ranked in ranks})
    return {
        source: [ranked for ranked in ranks if ranked.question.data_source == source] for source in sources
    }
