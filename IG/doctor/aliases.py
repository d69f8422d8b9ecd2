"""What the accepted answers are like, and how sampled answers come to count as right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from IG.doctor.matching import Match, matches_of
from IG.doctor.questions import AskedQuestion
from IG.doctor.readings import GainRule, QuestionReading
from serving.answers import same_text_key


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasReport:
    """Statistics of golds and sampled answers."""

    golds_per_question: float
    golds_max: int
    multi_alias_share: float
    """Share of questions with more than one gold that is not the same text."""
    match_shares: dict[Match, float]
    """How sampled answers are right, as shares of all of them; they sum to 1."""
    distinct_answers: float
    """Mean number of different texts among the samples of one condition."""
    num_samples: int
    mean_gain: float | None
    """Over contexts; None without contexts."""
    mean_gain_first_gold: float | None
    """The same when only the first gold is accepted."""
    changed_share: float | None
    """Share of the gains that the other golds move by more than 0.01."""


def alias_report(readings: Sequence[QuestionReading], rule: GainRule) -> AliasReport | None:
    """Statistics of the questions that have golds; None when none has."""
    known = [reading for reading in readings if reading.question.golds]
    if not known:
        return None
    counts = [_num_golds(reading.question) for reading in known]
    matches: Counter[Match] = Counter()
    distinct: list[int] = []
    for reading in known:
        for samples in reading.conditions.values():
            matches.update(matches_of(samples, reading.question.golds, threshold=rule.threshold))
            distinct.append(len({same_text_key(text) for text in samples.texts}))
    full = [gain for reading in known for gain in _context_gains(reading, rule)]
    first = [gain for reading in known for gain in _context_gains(_first_gold(reading), rule)]
    moved = np.abs(np.asarray(full) - np.asarray(first)) > 0.01
    return AliasReport(
        golds_per_question=float(np.mean(counts)),
        golds_max=max(counts),
        multi_alias_share=float(np.mean([count > 1 for count in counts])),
        match_shares={match: matches[match] / matches.total() for match in Match},
        distinct_answers=float(np.mean(distinct)),
        num_samples=max(len(reading.baseline) for reading in known),
        mean_gain=float(np.mean(full)) if full else None,
        mean_gain_first_gold=float(np.mean(first)) if full else None,
        changed_share=float(moved.mean()) if full else None,
    )


def _num_golds(question: AskedQuestion) -> int:
    return len({same_text_key(gold) for gold in question.golds})


def _context_gains(reading: QuestionReading, rule: GainRule) -> list[float]:
    gains = reading.gains(rule)
    return [gains[name] for name in reading.contexts]


def _first_gold(reading: QuestionReading) -> QuestionReading:
    """The same answers when only the first gold is accepted."""
    return replace(
        reading,
        conditions={
            name: replace(
                samples,
                response_entails_gold=samples.response_entails_gold[:, :1],
                gold_entails_response=samples.gold_entails_response[:, :1],
            )
            for name, samples in reading.conditions.items()
        },
    )
