"""Ask the models about every scenario of every question."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

from IG.doctor.questions import AskedQuestion
from IG.doctor.readings import QuestionReading, Samples
from IG.doctor.rollouts import RecordedRollout
from IG.doctor.scenarios import Scenario, contexts_of
from IG.estimator import Estimates, GainEstimate, GainQuery
from IG.sharing import Work

MAX_REQUESTS = 16
"""Questions worked on at once; enough to keep both models busy."""

Advance = Callable[[int], None]


class Measure(Protocol):
    """The part of a backend that is needed here."""

    async def estimate(
        self, queries: Sequence[GainQuery], *, details: bool, timeout_s: float | None
    ) -> Estimates:
        """One outcome per query, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came of it."""

    readings: tuple[QuestionReading, ...]
    """Of the questions whose baseline could be measured, in order."""
    failures: tuple[str, ...]
    """Question, scenario and reason of everything that could not."""
    work: Work


async def measure_questions(
    models: Measure, questions: Sequence[AskedQuestion], *, seed: int, advance: Advance
) -> Measured:
    """Readings of all questions; random documents are drawn from these questions by the seed."""
    rng = random.Random(seed)
    contexts = [contexts_of(question, others=questions, rng=rng) for question in questions]
    slots = asyncio.Semaphore(MAX_REQUESTS)
    work = Work()

    async def read(number: int) -> tuple[QuestionReading | None, list[str]]:
        async with slots:
            reading, failures, done = await _read(models, questions[number], contexts[number])
        add_work(work, done)
        advance(1)
        return reading, failures

    results = await asyncio.gather(*(read(number) for number in range(len(questions))))
    return Measured(
        readings=tuple(reading for reading, _ in results if reading is not None),
        failures=tuple(failure for _, failures in results for failure in failures),
        work=work,
    )


async def _read(
    models: Measure, question: AskedQuestion, contexts: Mapping[Scenario, str]
) -> tuple[QuestionReading | None, list[str], Work]:
    asked = {name: context for name, context in contexts.items() if context} or contexts
    queries = [
        GainQuery(question=question.text, context=context, golds=question.golds) for context in asked.values()
    ]
    estimates = await models.estimate(queries, details=True, timeout_s=None)
    conditions: dict[Scenario, Samples] = {}
    failures: list[str] = []
    for name, outcome in zip(asked, estimates.outcomes, strict=True):
        if isinstance(outcome, GainEstimate):
            conditions.setdefault(Scenario.none, Samples.of(outcome.no_context))
            conditions.setdefault(name, Samples.of(outcome.with_context))
        else:
            failures.append(f"{question.text!r}, {name}: {outcome.reason}")
    reading = QuestionReading(question=question, conditions=conditions) if conditions else None
    return reading, failures, estimates.work


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRollouts:
    """What came of measuring rollouts again."""

    gains: dict[tuple[str, str], float] = field(default_factory=dict)
    """By question and context, of the rollouts that searched and answered; failed ones are missing."""
    failures: list[str] = field(default_factory=list)
    work: Work = field(default_factory=Work)


async def measure_rollouts(
    models: Measure, rollouts: Sequence[RecordedRollout], *, advance: Advance
) -> MeasuredRollouts:
    """Gains of rollouts that a run recorded without; each context of a question is asked for once."""
    asked = {
        (rollout.question, rollout.context): GainQuery(
            question=rollout.question, context=rollout.context, golds=rollout.golds
        )
        for rollout in rollouts
        if rollout.is_measurable
    }
    slots = asyncio.Semaphore(MAX_REQUESTS * 4)
    measured = MeasuredRollouts()

    async def read(key: tuple[str, str]) -> None:
        async with slots:
            estimates = await models.estimate([asked[key]], details=False, timeout_s=None)
        (outcome,) = estimates.outcomes
        if isinstance(outcome, GainEstimate):
            measured.gains[key] = outcome.gain
        else:
            measured.failures.append(f"{key[0]!r}, recorded context: {outcome.reason}")
        add_work(measured.work, estimates.work)
        advance(1)

    await asyncio.gather(*(read(key) for key in asked))
    return measured


def add_work(total: Work, done: Work) -> None:
    """Add the counters of one request to those of all."""
    for counter in fields(Work):
        setattr(total, counter.name, getattr(total, counter.name) + getattr(done, counter.name))
