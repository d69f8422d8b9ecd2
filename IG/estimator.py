"""Measure the information gain of contexts: sample answers with and without each, read both beliefs, compare.

All conditions of all questions go to the sampler together, and equal conditions once: the baseline of a
question is sampled once for all its contexts, within a request, between concurrent requests, and in later
ones as long as the cache holds it. A question without context is its own baseline, so its gain is exactly 0.

    estimator = GainEstimator(sampler, judge, config=config, generator_digest=digest)
    estimates = await estimator.estimate([GainQuery(question=..., context=..., golds=(...,))], details=False)
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeVar

import numpy as np

from IG import semantics
from IG.belief import Belief, BeliefReader
from IG.config import IGServiceConfig
from IG.prompts import build_prompt
from IG.sampler import AnswerSampler, PoisonedError, SampledAnswer, SamplingError
from IG.semantics import GainKind, ScoreKind
from IG.sharing import JudgementError, PairJudge, SharedJudgements, SharedSamples, Source, Work

logger = logging.getLogger(__name__)
T = TypeVar("T")

_STARTED_TOGETHER = 32
"""Tasks that are started before other tasks on the event loop have their turn."""
_READ_TOGETHER = 512
"""Conditions of a request whose answers are compared at a time, which bounds the memory of their pairs."""
_WATCHED_ANSWERS = 100
"""Answers sampled before a warning about empty ones."""
_MANY_EMPTY = 0.5
MAX_GOLDS = 1000
MAX_CHARS = 20_000
"""Of a question, a gold answer and a text to judge: more than an entailment model reads, too few to block
the service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GainQuery:
    """One gain to measure."""

    question: str
    context: str
    """Everything that was found; blank for nothing."""
    golds: tuple[str, ...]
    """Accepted answers; may be empty only when the gain is the drop of entropy."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GainEstimate:
    """A measured gain and what it was computed from.

    Standard errors are of what the gain compares: the score, its logarithm, or the semantic entropy. They
    are None for a single sample; 0 means that all samples agree.
    """

    gain: float
    standard_error: float | None
    standard_error_with_context: float | None
    standard_error_no_context: float | None
    with_context: Belief
    no_context: Belief


class FailureKind(StrEnum):
    """Why a gain could not be measured."""

    invalid = "invalid"
    """The query itself is wrong."""
    sampling = "sampling"
    """One of its prompts cannot be sampled from."""
    entailment = "entailment"
    """One of its pairs cannot be judged."""
    poisoned = "poisoned"
    """Its work killed two workers and is quarantined."""
    deadline = "deadline"
    internal = "internal"


@dataclass(frozen=True, slots=True, kw_only=True)
class GainFailure:
    """No gain could be measured, which is not a gain of 0."""

    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """The result of a request."""

    outcomes: list[GainEstimate | GainFailure]
    """One per query, in order."""
    work: Work


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A valid query with its two prompts."""

    question: str
    golds: tuple[str, ...]
    prompt: str
    baseline: str
    """Prompt without the context."""


@dataclass(slots=True, kw_only=True)
class _Request:
    """State that the queries of one request share."""

    full: bool
    work: Work = field(default_factory=Work)
    reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_READ_TOGETHER))
    prompts: set[str] = field(default_factory=set)
    logged: set[str] = field(default_factory=set)
    """Unexpected failures whose traceback is in the log."""


class _InvalidQueryError(ValueError):
    """The query cannot be measured by any models."""


_FAILURE_KINDS: dict[type[Exception], FailureKind] = {
    _InvalidQueryError: FailureKind.invalid,
    PoisonedError: FailureKind.poisoned,
    SamplingError: FailureKind.sampling,
    JudgementError: FailureKind.entailment,
}
"""By exact class: PoisonedError is a SamplingError."""


def failure_of(error: Exception) -> GainFailure:
    """Return what is reported of an error."""
    if (kind := _FAILURE_KINDS.get(type(error))) is not None:
        return GainFailure(kind=kind, reason=str(error))
    return GainFailure(kind=FailureKind.internal, reason=f"{type(error).__name__}: {error}")


def late_failure(timeout_s: float | None) -> GainFailure:
    """Return the failure of work that was not done in time."""
    reason = f"deadline: not done within {round(timeout_s or 0, 2):g} s"
    return GainFailure(kind=FailureKind.deadline, reason=reason)


async def run_until(
    works: Iterable[Coroutine[object, object, T]], *, timeout_s: float | None
) -> list[T | None]:
    """Return the results in order, None for work that was not done in time and is cancelled."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    tasks: list[asyncio.Task[T]] = []
    try:
        for work in works:
            tasks.append(loop.create_task(work))
            if len(tasks) % _STARTED_TOGETHER == 0:
                await asyncio.sleep(0)
        if tasks:
            left_s = None if timeout_s is None else started + timeout_s - loop.time()
            await asyncio.wait(tasks, timeout=left_s)
    finally:
        late = [task for task in tasks if task.cancel()]
    if late:
        await asyncio.wait(late)
    return [None if task.cancelled() else task.result() for task in tasks]


def explain_empty(num_empty: int, *, of: int) -> str | None:
    """Return a warning when at least half of the sampled answers are empty, else None."""
    if of == 0 or num_empty / of < _MANY_EMPTY:
        return None
    return (
        f"{num_empty} of {of} sampled answers are empty ({num_empty / of:.0%}): gains from them say little. "
        "An instruct model needs --prompt-style chat, a base model --prompt-style plain"
    )


class GainEstimator:
    """Measures gains; work that its requests have in common is done once."""

    def __init__(
        self, sampler: AnswerSampler, judge: PairJudge, *, config: IGServiceConfig, generator_digest: str
    ) -> None:
        self._config = config
        self._generator_digest = generator_digest
        self._samples = SharedSamples(sampler, key_of=self._sample_key, size=config.sample_cache_size)
        self.judgements = SharedJudgements(judge, size=config.pair_cache_size)
        """Of all texts; other requests for entailment share them."""
        self._reader = BeliefReader(self.judgements, score=config.score, threshold=config.threshold)
        self._num_answers = self._num_empty = 0
        self._has_warned = False

    async def estimate(
        self, queries: Sequence[GainQuery], *, details: bool, timeout_s: float | None = None
    ) -> Estimates:
        """Return one outcome per query; a query that fails or is late does not affect the others.

        Cancelling it cancels all work that no other request waits for.
        """
        request = _Request(full=details or self._config.gain is GainKind.entropy)
        ended = await run_until(
            (self._outcome(query, request=request) for query in queries), timeout_s=timeout_s
        )
        late = late_failure(timeout_s)
        outcomes = [late if outcome is None else outcome for outcome in ended]
        request.work.items = len(queries)
        request.work.distinct_prompts = len(request.prompts)
        self._warn_of_empty(request.work)
        return Estimates(outcomes=outcomes, work=request.work)

    def _warn_of_empty(self, work: Work) -> None:
        """Warn once when many of the answers so far are empty."""
        self._num_answers += work.answers_sampled
        self._num_empty += work.answers_empty
        if self._has_warned or self._num_answers < _WATCHED_ANSWERS:
            return
        if warning := explain_empty(self._num_empty, of=self._num_answers):
            self._has_warned = True
            logger.warning("%s", warning)

    async def _outcome(self, query: GainQuery, *, request: _Request) -> GainEstimate | GainFailure:
        try:
            return await self._measure(self._plan(query, request=request), request=request)
        except Exception as error:  # one query's failure must not become another's
            failure = failure_of(error)
            if failure.kind is FailureKind.internal and failure.reason not in request.logged:
                request.logged.add(failure.reason)  # many queries may fail for the same cause
                logger.exception("information gain failed for the question %r", query.question)
            return failure

    def _plan(self, query: GainQuery, *, request: _Request) -> _Plan:
        """Check a query and build its prompts. Raises _InvalidQueryError."""
        golds = tuple(gold.strip() for gold in query.golds if gold.strip())
        if not query.question.strip():
            raise _InvalidQueryError("the question is empty, expected the text of a question")
        if not golds and self._config.gain is not GainKind.entropy:
            raise _InvalidQueryError(
                "answers holds no text, expected at least one accepted answer "
                "(only --gain entropy does without)"
            )
        if len(golds) > MAX_GOLDS:
            raise _InvalidQueryError(f"answers holds {len(golds)} texts, expected at most {MAX_GOLDS}")
        longest = max(map(len, golds), default=0)
        for name, length in (("question", len(query.question)), ("longest text of answers", longest)):
            if length > MAX_CHARS:
                raise _InvalidQueryError(f"the {name} has {length} characters, expected at most {MAX_CHARS}")
        prompt, baseline = (
            build_prompt(
                query.question,
                context=context,
                prompt_type=self._config.prompt_type,
                max_context_words=self._config.max_context_words,
                prompt_style=self._config.prompt_style,
                prompt_file=self._config.prompt_file,
            )
            for context in (query.context, "")
        )
        request.prompts |= {prompt, baseline}
        request.work.conditions += 2
        request.work.baselines += 1
        return _Plan(question=query.question, golds=golds, prompt=prompt, baseline=baseline)

    async def _measure(self, plan: _Plan, *, request: _Request) -> GainEstimate:
        if plan.prompt == plan.baseline:
            no_context = await self._believe(plan, prompt=plan.baseline, request=request)
            again = Source.cached if no_context.source is Source.cached else Source.joined
            self._count(plan, source=again, answers=no_context.answers, work=request.work)
            return self._compare(replace(no_context, source=again), no_context)
        try:
            async with asyncio.TaskGroup() as conditions:  # when one fails the other is not needed
                before, after = (
                    conditions.create_task(self._believe(plan, prompt=prompt, request=request))
                    for prompt in (plan.baseline, plan.prompt)
                )
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return self._compare(after.result(), before.result())

    async def _believe(self, plan: _Plan, *, prompt: str, request: _Request) -> Belief:
        answers, source = await self._samples.of(prompt)
        if prompt == plan.baseline and source is Source.sampled:
            request.work.baselines_sampled += 1
        self._count(plan, source=source, answers=answers, work=request.work)
        async with request.reading:
            return await self._reader.read(
                answers,
                question=plan.question,
                golds=plan.golds,
                full=request.full,
                source=source,
                work=request.work,
            )

    def _compare(self, with_context: Belief, no_context: Belief) -> GainEstimate:
        after, error_after = self._statistic(with_context)
        before, error_before = self._statistic(no_context)
        same = with_context.weights is no_context.weights
        return GainEstimate(
            gain=semantics.gain(self._config.gain, after, before),
            standard_error=0.0 if same else semantics.gain_error(error_after, error_before),
            standard_error_with_context=error_after,
            standard_error_no_context=error_before,
            with_context=with_context,
            no_context=no_context,
        )

    def _statistic(self, belief: Belief) -> tuple[float, float | None]:
        """Return the number that two conditions are compared by, and its standard error."""
        if self._config.gain is GainKind.entropy:
            assert belief.full is not None
            return belief.full.semantic_entropy, semantics.jackknife_error(belief.full.left_out_entropies)
        assert belief.score is not None
        assert belief.left_out_scores is not None
        if self._config.gain is GainKind.difference:
            return belief.score, semantics.jackknife_error(belief.left_out_scores)
        log_score, *left_out = semantics.log_score(
            np.asarray([belief.score, *belief.left_out_scores]), floor=self._config.log_floor
        )
        return float(log_score), semantics.jackknife_error(np.asarray(left_out))

    def _count(self, plan: _Plan, *, source: Source, answers: Sequence[SampledAnswer], work: Work) -> None:
        num_answers = len(answers)
        work.prompts_sampled += source is Source.sampled
        work.prompts_joined += source is Source.joined
        work.prompts_cached += source is Source.cached
        if source is Source.sampled:
            work.answers_sampled += num_answers
            work.answers_empty += sum(not answer.text for answer in answers)
        work.pairs_naive += 2 * num_answers * len(plan.golds)
        if self._config.score is ScoreKind.hard or self._config.gain is GainKind.entropy:
            work.pairs_naive += num_answers * (num_answers - 1)

    def _sample_key(self, prompt: str) -> bytes:
        """Return a key of everything that the samples of a prompt depend on."""
        config = self._config
        options = (
            self._generator_digest,
            config.num_generations,
            config.temperature,
            config.max_new_tokens,
            config.seed,
            config.prompt_style,
            config.prompt_file,
        )
        return hashlib.sha256(f"{options!r}\x00{prompt}".encode(errors="surrogatepass")).digest()
