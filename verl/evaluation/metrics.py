"""Combine the scored samples of an evaluation: per question, per data source and over all: pure functions.

What failed is left out and counted, never 0: a sample with a failure counts neither as right nor as wrong,
and a question whose samples all failed is a failed question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from serving.answers import normalize_answer
from verl.evaluation.records import ResultRecord
from verl.types import find_rightness

COSTS = ("searches", "turns", "output_tokens", "context_tokens", "seconds")
"""Means that say what an answer costs; all other names are scores in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionScore:
    """What was measured of one question: means over its samples that did not fail."""

    uid: str
    data_source: str
    num_samples: int
    values: Mapping[str, float]
    """By name: metrics that all its samples have, pass@k and majority of several samples, and COSTS."""


def score_questions(records: Sequence[ResultRecord]) -> list[QuestionScore]:
    """Return one score per question that has a sample without failure, in the order of the records."""
    sizes = pass_sizes(1 + max((record["sample"] for record in records), default=0))
    by_question: dict[str, list[ResultRecord]] = {}
    for record in records:
        if record["failure"] is None:
            by_question.setdefault(record["uid"], []).append(record)
    return [_score_question(samples, sizes=sizes) for samples in by_question.values()]


def _score_question(samples: Sequence[ResultRecord], *, sizes: Sequence[int]) -> QuestionScore:
    samples = sorted(samples, key=lambda record: record["sample"])
    # Not what only some samples have: a verdict is most often missing where the answer is wrong.
    names = [name for name in samples[0]["metrics"] if all(name in record["metrics"] for record in samples)]
    values = {name: fmean([record["metrics"][name] for record in samples]) for name in names}
    if sizes:
        num_right = sum(map(is_right, samples))
        for k in sizes:
            if k <= len(samples):
                values[f"pass@{k}"] = pass_at_k(len(samples), num_right, k=k)
        is_math = any("math" in record["metrics"] for record in samples)
        voted = vote([record["prediction"] for record in samples], is_math=is_math)
        values["majority"] = 0.0 if voted is None else rightness(samples[voted])
    costs: dict[str, list[float]] = {
        "searches": [record["num_searches"] for record in samples],
        "turns": [record["num_turns"] for record in samples],
        "output_tokens": [record["output_tokens"] for record in samples],
        "context_tokens": [record["context_tokens"] for record in samples],
        "seconds": [record["seconds"] for record in samples],
    }
    return QuestionScore(
        uid=samples[0]["uid"],
        data_source=samples[0]["data_source"],
        num_samples=len(samples),
        values=values | {name: fmean(numbers) for name, numbers in costs.items()},
    )


def pass_sizes(num_samples: int) -> list[int]:
    """Return the k of pass@k that are reported: powers of 2 up to the number of samples, and that number.

    None for one sample. A question has no pass@k if fewer than k of its samples did not fail.
    """
    powers = [1 << k for k in range(1, num_samples.bit_length()) if 1 << k <= num_samples]
    return sorted({*powers, num_samples} - {1})


def pass_at_k(num_samples: int, num_right: int, *, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is right: `1 - C(n-c, k) / C(n, k)`.

    Source: Chen et al. 2021, arXiv 2107.03374, section 2.1. Raises ValueError for k above the number of
    samples, for which there is none.
    """
    if not (1 <= k <= num_samples and 0 <= num_right <= num_samples):
        raise ValueError(f"pass@{k} of {num_right} right among {num_samples} samples is not defined")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def rightness(record: ResultRecord) -> float:
    """Return how right an answer is, by the measure of its question: math where graded so, else EM."""
    return find_rightness(record["metrics"]) or 0.0


def is_right(record: ResultRecord) -> bool:
    """Return whether an answer is right; one that failed is not."""
    return rightness(record) >= 1.0


def vote(predictions: Sequence[str | None], *, is_math: bool = False) -> int | None:
    """Return the index of the first sample with the answer that most samples give; None without an answer.

    Answers are compared after normalization, which deletes signs and points: mathematical ones (`is_math`)
    are compared as they are, without the spaces around them. Among equally frequent answers the first sampled
    one wins. No answer, or one that is blank, is not a vote (Wang et al. 2022, arXiv 2203.11171).
    """
    normalize = str.strip if is_math else normalize_answer
    keys = [None if prediction is None else normalize(prediction) for prediction in predictions]
    votes = Counter(key for key in keys if key)
    # The most frequent key; `most_common` keeps the order of first appearance among equals.
    return keys.index(votes.most_common(1)[0][0]) if votes else None
