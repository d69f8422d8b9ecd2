"""Information gain of contexts: sample answers with and without each, read both beliefs, compare.

All conditions of all questions go to the engine together and equal conditions go once: the baseline of a
question is sampled once however many contexts it has, in this request, in one beside it, and in later
ones as long as the cache holds it.
A question without context is its own baseline, so its gain is exactly 0.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from IG import semantics
from IG.belief import Belief, BeliefReader
from IG.prompts import PromptType, build_prompt
from IG.sampler import AnswerSampler, SampledAnswer, SamplingError
from IG.semantics import GainKind

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GainQuery:
    """What one gain is asked about."""

    question: str
    context: str
    """What was found; blank for nothing."""
    golds: tuple[str, ...]
    """Accepted answers; may only be empty when the gain is the drop of entropy."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GainEstimate:
    """A measured gain and what it was measured from."""

    gain: float
    with_context: Belief
    no_context: Belief


@dataclass(frozen=True, slots=True, kw_only=True)
class GainFailure:
    """No gain could be measured, which is not a gain of 0."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GainOptions:
    """How a gain is defined."""

    gain: GainKind = GainKind.difference
    prompt_type: PromptType = PromptType.default
    max_context_words: int = 4096
    log_floor: float = 0.01
    """Smallest score the log-ratio believes in; 1 / (10 * samples) is a good choice."""


class GainEstimator:
    """Measures gains with one sampler and one belief reader."""

    def __init__(
        self, sampler: AnswerSampler, *, reader: BeliefReader, options: GainOptions, cache_size: int = 4096
    ) -> None:
        self._reader = reader
        self._options = options
        self._samples = _SharedSamples(sampler, size=cache_size)

    async def estimate(
        self, queries: Sequence[GainQuery], *, details: bool
    ) -> list[GainEstimate | GainFailure]:
        """One outcome per query, in order; a query that fails does not touch the others."""
        return list(await asyncio.gather(*(self._outcome(query, details=details) for query in queries)))

    async def _outcome(self, query: GainQuery, *, details: bool) -> GainEstimate | GainFailure:
        try:
            return await self._measure(query, details=details)
        except (SamplingError, ValueError) as error:
            return GainFailure(reason=str(error))
        except Exception as error:  # one query must not take its neighbours with it
            logger.exception("information gain failed for the question %r", query.question)
            return GainFailure(reason=f"{type(error).__name__}: {error}")

    async def _measure(self, query: GainQuery, *, details: bool) -> GainEstimate:
        golds = tuple(gold.strip() for gold in query.golds if gold.strip())
        self._require_usable(query, golds)
        full = details or self._options.gain is GainKind.entropy
        with_context, no_context = await asyncio.gather(
            self._believe(query.question, context=query.context, golds=golds, full=full),
            self._believe(query.question, context="", golds=golds, full=full),
        )
        gain = self._compare(with_context, no_context)
        if not math.isfinite(gain):
            raise ValueError(f"the gain came out as {gain}")
        return GainEstimate(gain=gain, with_context=with_context, no_context=no_context)

    def _require_usable(self, query: GainQuery, golds: tuple[str, ...]) -> None:
        if not query.question.strip():
            raise ValueError("the question is empty, expected the text of a question")
        if not golds and self._options.gain is not GainKind.entropy:
            raise ValueError(
                "answers holds no text, expected at least one accepted answer "
                "(only --gain entropy does without)"
            )

    async def _believe(self, question: str, *, context: str, golds: tuple[str, ...], full: bool) -> Belief:
        prompt = build_prompt(
            question,
            context=context,
            prompt_type=self._options.prompt_type,
            max_context_words=self._options.max_context_words,
        )
        answers = await self._samples.of(prompt)
        return await self._reader.read(answers, question=question, golds=golds, full=full)

    def _compare(self, with_context: Belief, no_context: Belief) -> float:
        if self._options.gain is GainKind.entropy:
            assert with_context.full is not None
            assert no_context.full is not None
            return semantics.entropy_gain(
                with_context.full.semantic_entropy, no_context.full.semantic_entropy
            )
        assert with_context.score is not None
        assert no_context.score is not None
        if self._options.gain is GainKind.difference:
            return semantics.difference_gain(with_context.score, no_context.score)
        return semantics.log_ratio_gain(with_context.score, no_context.score, floor=self._options.log_floor)


class _SharedSamples:
    """The samples of each prompt, sampled once: waited for together, then remembered, oldest go first."""

    def __init__(self, sampler: AnswerSampler, *, size: int) -> None:
        self._sampler = sampler
        self._size = size
        self._tasks: OrderedDict[str, asyncio.Task[tuple[SampledAnswer, ...]]] = OrderedDict()

    async def of(self, prompt: str) -> tuple[SampledAnswer, ...]:
        task = self._tasks.get(prompt)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._tasks[prompt] = asyncio.create_task(self._sampler.sample(prompt))
        self._tasks.move_to_end(prompt)
        while len(self._tasks) > self._size:
            self._tasks.popitem(last=False)
        return await asyncio.shield(task)
