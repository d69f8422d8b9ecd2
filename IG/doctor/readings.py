"""What was sampled for every question and scenario, and the gain of any part of those samples.

Entailment relations and semantic classes are those of all samples; a part of the samples is a row of weights
in which the others weigh 0. So gains of R samples are read off without a model, many at once, by the
functions of `IG.semantics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from IG import semantics
from IG.belief import Belief
from IG.doctor.questions import AskedQuestion
from IG.doctor.scenarios import Scenario
from IG.semantics import BoolArray, FloatArray, GainKind, IntArray, ScoreKind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """The answers sampled under one condition and how they relate."""

    texts: tuple[str, ...]
    mean_log_probs: FloatArray  # [response]
    clusters: IntArray  # [response]
    response_entails_gold: FloatArray  # [response, gold]
    gold_entails_response: FloatArray  # [response, gold]

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(cls, belief: Belief) -> Samples:
        """Everything that a belief with its full reading knows."""
        assert belief.full is not None
        return cls(
            texts=tuple(answer.text for answer in belief.answers),
            mean_log_probs=np.asarray([answer.mean_log_prob for answer in belief.answers]),
            clusters=belief.full.clusters,
            response_entails_gold=belief.full.response_entails_gold,
            gold_entails_response=belief.full.gold_entails_response.T,
        )

    def equivalent_to_gold(self, *, threshold: float) -> BoolArray:
        """`[response, gold]`."""
        return semantics.equivalent(
            self.response_entails_gold, self.gold_entails_response, threshold=threshold
        )

    def weights(self, chosen: IntArray) -> FloatArray:
        """Weights when only the chosen samples `[draw, size]` had been drawn: `[draw, response]`."""
        drawn = np.zeros((len(chosen), len(self)))
        for weights, rows in zip(drawn, chosen, strict=True):
            weights[rows] = semantics.sample_weights(self.mean_log_probs[rows])
        return drawn

    def weights_without_one(self, chosen: IntArray) -> FloatArray:
        """Weights of the chosen samples with each left out: `[left out, response]`; none for a single one."""
        without = semantics.leave_one_out_weights(self.mean_log_probs[chosen])
        weights = np.zeros((len(without), len(self)))
        weights[:, chosen] = without
        return weights


@dataclass(frozen=True, slots=True, kw_only=True)
class GainRule:
    """How the service is set to score and to compare."""

    score: ScoreKind = ScoreKind.hard
    gain: GainKind = GainKind.difference
    threshold: float = 0.5

    def statistic(self, samples: Samples, weights: FloatArray, *, num_samples: int) -> FloatArray:
        """What two conditions are compared by, for weights `[..., response]`: `[...]`.

        It is the score, its log with the floor of `num_samples` samples, or the semantic entropy.
        """
        if self.gain is GainKind.entropy:
            return semantics.semantic_entropy(weights, samples.clusters)
        if self.score is ScoreKind.hard:
            matches = samples.equivalent_to_gold(threshold=self.threshold)
            correct = semantics.correct_responses(samples.clusters, matches)
            score = semantics.hard_score(weights, correct=correct)
        else:
            score = semantics.soft_score(
                weights,
                response_entails_gold=samples.response_entails_gold,
                gold_entails_response=samples.gold_entails_response,
            )
        if self.gain is GainKind.log_ratio:
            return semantics.log_score(score, floor=1 / (10 * num_samples))
        return score

    def compare(self, with_context: float, no_context: float) -> float:
        """The gain between two statistics."""
        if self.gain is GainKind.entropy:
            return semantics.entropy_gain(with_context, no_context)
        if self.gain is GainKind.log_ratio:
            return semantics.log_ratio_gain(with_context, no_context)
        return semantics.difference_gain(with_context, no_context)

    def standard_error(self, samples: Samples, chosen: IntArray) -> float | None:
        """Of one condition's statistic, from the chosen samples `[size]`; None for a single one."""
        left_out = self.statistic(samples, samples.weights_without_one(chosen), num_samples=len(chosen))
        return semantics.jackknife_error(left_out)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuestionReading:
    """One question with the samples of every scenario that it has and that could be measured."""

    question: AskedQuestion
    conditions: dict[Scenario, Samples]
    """`none`, the baseline, is always there and always first."""

    @property
    def baseline(self) -> Samples:
        return self.conditions[Scenario.none]

    @property
    def contexts(self) -> dict[Scenario, Samples]:
        """The conditions that have a context."""
        return {name: samples for name, samples in self.conditions.items() if name is not Scenario.none}

    @property
    def num_samples(self) -> int:
        return min(len(samples) for samples in self.conditions.values())

    def gains(self, rule: GainRule) -> dict[Scenario, float]:
        """Gain of every scenario from all samples."""
        everything = {name: np.arange(len(samples))[None] for name, samples in self.conditions.items()}
        return {name: float(gains[0]) for name, gains in self.gains_of(rule, everything).items()}

    def gains_of(self, rule: GainRule, chosen: Mapping[Scenario, IntArray]) -> dict[Scenario, FloatArray]:
        """Gains from the chosen samples `[draw, size]` of every condition: `[draw]` by scenario.

        The gain without a document is exactly 0; in every draw all scenarios share one baseline.
        """
        read = {
            name: rule.statistic(
                samples, samples.weights(chosen[name]), num_samples=chosen[name].shape[1]
            ).tolist()
            for name, samples in self.conditions.items()
        }
        before = read[Scenario.none]
        gains = {
            name: np.asarray([rule.compare(a, b) for a, b in zip(after, before, strict=True)])
            for name, after in read.items()
        }
        return gains | {Scenario.none: np.zeros(len(before))}

    def draw(self, *, size: int, num_draws: int, rng: np.random.Generator) -> dict[Scenario, IntArray]:
        """Samples of every condition, without replacement: `[draw, size]`; a single draw where it takes all.

        In their order, so that all of them add up to the very same.
        """
        count = num_draws if size < self.num_samples else 1
        return {
            name: np.sort(rng.random((count, len(samples))).argsort(axis=1)[:, :size], axis=1)
            for name, samples in self.conditions.items()
        }

    def standard_errors(self, rule: GainRule, chosen: Mapping[Scenario, IntArray]) -> list[float | None]:
        """What the service would report with every context, from the chosen samples `[size]`."""
        errors = {
            name: rule.standard_error(samples, chosen[name]) for name, samples in self.conditions.items()
        }
        return [semantics.gain_error(errors[name], errors[Scenario.none]) for name in self.contexts]
