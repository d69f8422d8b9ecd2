"""Does the gain point where the outcome points? Correlation of gains with exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from IG.doctor.matching import exact_matches
from IG.doctor.readings import GainRule, QuestionReading
from IG.doctor.rollouts import RecordedRollout
from IG.doctor.statistics import Interval, Statistic, auc, bootstrap, pearson, spearman
from IG.semantics import FloatArray, IntArray

NUM_RESAMPLINGS = 1000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GainOutcomes:
    """Gains, and how often the answers that came with each were right."""

    gains: FloatArray  # [context]
    right: FloatArray  # [context]: number of right answers
    answers: FloatArray  # [context]: number of answers
    questions: IntArray  # [context]: which question it belongs to


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How gain and exact match go together, with 95 % intervals over questions; None where undefined."""

    num_contexts: int
    num_questions: int
    exact_match: float
    pearson: Interval | None
    """Gain against the share of right answers, over contexts."""
    spearman: Interval | None
    auc: Interval | None
    """Chance that a right answer came with a larger gain than a wrong one."""
    within_question: Interval | None
    """Pearson after the mean of every question is taken off, as a group-normalised reward does."""


def split_half(
    readings: Sequence[QuestionReading], rule: GainRule, *, rng: np.random.Generator
) -> GainOutcomes:
    """Gains from one half of the samples, exact match of the other half.

    From the same samples the two would agree by construction.
    """
    gains: list[float] = []
    right: list[float] = []
    answers: list[int] = []
    questions: list[int] = []
    for number, reading in enumerate(readings):
        half = reading.num_samples // 2
        shuffled = {name: rng.permutation(len(samples)) for name, samples in reading.conditions.items()}
        measured = reading.gains_of(rule, {name: rows[None, :half] for name, rows in shuffled.items()})
        for name, samples in reading.contexts.items():
            rest = [samples.texts[row] for row in shuffled[name][half:]]
            gains.append(float(measured[name][0]))
            right.append(float(exact_matches(rest, reading.question.golds).sum()))
            answers.append(len(rest))
            questions.append(number)
    return GainOutcomes(
        gains=np.asarray(gains),
        right=np.asarray(right),
        answers=np.asarray(answers, dtype=np.float64),
        questions=np.asarray(questions, dtype=np.int64),
    )


def recorded_outcomes(rollouts: Sequence[RecordedRollout]) -> GainOutcomes:
    """Gains of the rollouts that have one, with exact match of the answers that they gave."""
    measured = [rollout for rollout in rollouts if rollout.gain is not None]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(r.question for r in measured))}
    return GainOutcomes(
        gains=np.asarray([rollout.gain for rollout in measured], dtype=np.float64),
        right=np.asarray([float(exact_matches([r.answer or ""], r.golds)[0]) for r in measured]),
        answers=np.ones(len(measured)),
        questions=np.asarray([numbers[rollout.question] for rollout in measured], dtype=np.int64),
    )


def measure_agreement(pairs: GainOutcomes, *, rng: np.random.Generator) -> Agreement | None:
    """All figures; None when there is no context with a gain."""
    if not len(pairs.gains):
        return None
    shares = pairs.right / pairs.answers
    gains, centred = pairs.gains, [_centre(values, pairs.questions) for values in (pairs.gains, shares)]

    def interval(statistic: Statistic) -> Interval | None:
        return bootstrap(
            statistic,
            clusters=pairs.questions,
            num_resamplings=NUM_RESAMPLINGS,
            rng=rng,
        )

    return Agreement(
        num_contexts=len(gains),
        num_questions=len(np.unique(pairs.questions)),
        exact_match=float(pairs.right.sum() / pairs.answers.sum()),
        pearson=interval(lambda rows: pearson(gains[rows], shares[rows])),
        spearman=interval(lambda rows: spearman(gains[rows], shares[rows])),
        auc=interval(
            lambda rows: auc(
                gains[rows],
                positives=pairs.right[rows],
                negatives=(pairs.answers - pairs.right)[rows],
            )
        ),
        within_question=interval(lambda rows: pearson(centred[0][rows], centred[1][rows])),
    )


def _centre(values: FloatArray, groups: IntArray) -> FloatArray:
    totals = np.bincount(groups, weights=values)
    return np.asarray(values - (totals / np.bincount(groups))[groups], dtype=np.float64)
