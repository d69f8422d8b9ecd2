"""Sample answers to every question under every scenario."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from IG.doctor.questions import AskedQuestion, Scenario, contexts_of
from IG.doctor.readings import QuestionReading, Samples
from IG.estimator import GainEstimate, GainQuery
from IG.service.backend import Backend
from IG.sharing import Work

MAX_REQUESTS = 16
"""Questions measured at once; enough to keep both models busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The samples of all questions."""

    readings: tuple[QuestionReading, ...]
    """Questions whose baseline could be measured, in order."""
    failures: tuple[str, ...]
    """Question, scenario and reason of every gain that could not be measured."""
    work: Work


async def measure_questions(
    backend: Backend, questions: Sequence[AskedQuestion], *, seed: int, on_progress: Callable[[], None]
) -> Measured:
    """Measure all questions; `seed` draws their random documents from the other questions."""
    rng = random.Random(seed)
    contexts = [contexts_of(question, others=questions, rng=rng) for question in questions]
    slots = asyncio.Semaphore(MAX_REQUESTS)
    work = Work()

    async def measure(number: int) -> tuple[QuestionReading | None, list[str]]:
        async with slots:
            reading, failures, done = await _measure(backend, questions[number], contexts[number])
        for counter in fields(Work):
            setattr(work, counter.name, getattr(work, counter.name) + getattr(done, counter.name))
        on_progress()
        return reading, failures

    results = await asyncio.gather(*(measure(number) for number in range(len(questions))))
    return Measured(
        readings=tuple(reading for reading, _ in results if reading is not None),
        failures=tuple(failure for _, failures in results for failure in failures),
        work=work,
    )


async def _measure(
    backend: Backend, question: AskedQuestion, contexts: Mapping[Scenario, str]
) -> tuple[QuestionReading | None, list[str], Work]:
    # Every estimate carries the baseline, so it is only asked for alone where there is no context.
    asked = {name: context for name, context in contexts.items() if context} or contexts
    queries = [
        GainQuery(question=question.text, context=context, golds=question.golds) for context in asked.values()
    ]
    estimates = await backend.estimate(queries, details=True, timeout_s=None)
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
