"""Sample answers to every question under every scenario, and compute the gain of any subset of the samples.

Entailment relations and semantic classes are those of all samples; a subset is a row of weights in which the
other samples weigh 0. So gains of R samples are computed without a model, many at once, by the functions of
`IG.semantics`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from IG import semantics
from IG.belief import Belief
from IG.config import IGServiceConfig
from IG.doctor.questions import AskedQuestion, Scenario, contexts_of
from IG.estimator import GainEstimate, GainQuery
from IG.semantics import BoolArray, FloatArray, GainKind, IntArray, ScoreKind
from IG.service.backend import Backend
from IG.sharing import Work

_QUESTIONS_AT_ONCE = 16
"""Enough to keep both models busy."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """The answers sampled under one condition, their classes and their entailment with the gold answers."""

    texts: tuple[str, ...]
    mean_log_probs: FloatArray  # [response]
    clusters: IntArray  # [response]
    response_entails_gold: FloatArray  # [response, gold]
    gold_entails_response: FloatArray  # [response, gold]

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(cls, belief: Belief) -> Samples:
        """Return the samples of a belief that was computed with its full reading."""
        assert belief.full is not None
        return cls(
            texts=tuple(answer.text for answer in belief.answers),
            mean_log_probs=np.asarray([answer.mean_log_prob for answer in belief.answers]),
            clusters=belief.full.clusters,
            response_entails_gold=belief.full.response_entails_gold,
            gold_entails_response=belief.full.gold_entails_response.T,
        )

    def equivalent_to_gold(self, *, threshold: float) -> BoolArray:
        """Return which responses are judged equivalent to which gold answers: `[response, gold]`."""
        return semantics.equivalent(
            self.response_entails_gold, self.gold_entails_response, threshold=threshold
        )

    def weights(self, chosen: IntArray) -> FloatArray:
        """Return weights as if only the chosen samples `[draw, size]` existed: `[draw, response]`."""
        drawn = np.zeros((len(chosen), len(self)))
        for weights, rows in zip(drawn, chosen, strict=True):
            weights[rows] = semantics.sample_weights(self.mean_log_probs[rows])
        return drawn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuestionReading:
    """One question with the samples of every scenario that could be measured."""

    question: AskedQuestion
    conditions: dict[Scenario, Samples]
    """`none`, the baseline, is always there and always first."""

    @property
    def contexts(self) -> dict[Scenario, Samples]:
        """Return the conditions that have a context."""
        return {name: samples for name, samples in self.conditions.items() if name is not Scenario.none}

    @property
    def num_samples(self) -> int:
        """Return the number of samples of the condition that has the fewest."""
        return min(len(samples) for samples in self.conditions.values())

    def gains(self, config: IGServiceConfig) -> dict[Scenario, float]:
        """Return the gain of every scenario from all samples."""
        everything = {name: np.arange(len(samples))[None] for name, samples in self.conditions.items()}
        return {name: float(gains[0]) for name, gains in self.gains_of(everything, config).items()}

    def gains_of(
        self, chosen: Mapping[Scenario, IntArray], config: IGServiceConfig
    ) -> dict[Scenario, FloatArray]:
        """Return gains `[draw]` by scenario from the chosen samples `[draw, size]` of every condition.

        The gain without a document is exactly 0; within a draw all scenarios share one baseline.
        """
        statistics = {
            name: _statistic(samples, chosen[name], config).tolist()
            for name, samples in self.conditions.items()
        }
        before = statistics[Scenario.none]
        gains = {
            name: np.asarray([semantics.gain(config.gain, a, b) for a, b in zip(after, before, strict=True)])
            for name, after in statistics.items()
        }
        return gains | {Scenario.none: np.zeros(len(before))}

    def draw(self, *, size: int, num_draws: int, rng: np.random.Generator) -> dict[Scenario, IntArray]:
        """Draw samples of every condition without replacement: `[draw, size]`, each row sorted.

        Sorted rows make a draw of all samples sum in the same order as all samples do.
        """
        return {
            name: np.sort(rng.random((num_draws, len(samples))).argsort(axis=1)[:, :size], axis=1)
            for name, samples in self.conditions.items()
        }


def _statistic(samples: Samples, chosen: IntArray, config: IGServiceConfig) -> FloatArray:
    """Return the statistic that a gain compares, from the chosen samples `[draw, size]`: `[draw]`."""
    weights = samples.weights(chosen)
    if config.gain is GainKind.entropy:
        return semantics.semantic_entropy(weights, samples.clusters)
    if config.score is ScoreKind.hard:
        matches = samples.equivalent_to_gold(threshold=config.threshold)
        score = semantics.hard_score(weights, correct=semantics.correct_responses(samples.clusters, matches))
    else:
        score = semantics.soft_score(
            weights,
            response_entails_gold=samples.response_entails_gold,
            gold_entails_response=samples.gold_entails_response,
        )
    if config.gain is GainKind.log_ratio:
        return semantics.log_score(score, floor=1 / (10 * chosen.shape[1]))
    return score


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
    slots = asyncio.Semaphore(_QUESTIONS_AT_ONCE)
    conditions: list[dict[Scenario, Samples]] = [{} for _ in questions]
    failures: list[str] = []
    work = Work()

    async def measure(number: int) -> None:
        question = questions[number]
        # Every estimate has the baseline, so it is only requested alone where there is no context.
        named = {name: context for name, context in contexts[number].items() if context} or contexts[number]
        queries = [
            GainQuery(question=question.text, context=context, golds=question.golds)
            for context in named.values()
        ]
        async with slots:
            estimates = await backend.estimate(queries, details=True, timeout_s=None)
        for name, outcome in zip(named, estimates.outcomes, strict=True):
            if isinstance(outcome, GainEstimate):
                conditions[number].setdefault(Scenario.none, Samples.of(outcome.no_context))
                conditions[number].setdefault(name, Samples.of(outcome.with_context))
            else:
                failures.append(f"{question.text!r}, {name}: {outcome.reason}")
        for counter in fields(Work):
            done = getattr(work, counter.name) + getattr(estimates.work, counter.name)
            setattr(work, counter.name, done)
        on_progress()

    await asyncio.gather(*map(measure, range(len(questions))))
    readings = tuple(
        QuestionReading(question=question, conditions=measured)
        for question, measured in zip(questions, conditions, strict=True)
        if measured
    )
    return Measured(readings=readings, failures=tuple(failures), work=work)
