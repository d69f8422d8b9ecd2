"""Compare the entailment judge, and the gain, with exact match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from IG.config import IGServiceConfig
from IG.doctor.readings import QuestionReading
from IG.semantics import BoolArray, FloatArray
from serving.answers import normalize_answer

_MAX_EXAMPLES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeAgreement:
    """How the entailment judge and exact match rate the same sampled answers, as shares of all of them."""

    num_answers: int
    both: float
    """Right by both."""
    only_judge: float
    """Equivalent to a gold answer by the judge alone: a paraphrase, or an error of the judge."""
    only_exact: float
    """An exact match that the judge rejects: always an error of the judge."""
    examples: tuple[str, ...]
    """Distinct answers that the two rate differently."""


def compare_judge(readings: Sequence[QuestionReading], config: IGServiceConfig) -> JudgeAgreement | None:
    """Compare judge and exact match over all sampled answers; None when no question has gold answers."""
    judged: list[BoolArray] = []
    exact: list[BoolArray] = []
    examples: dict[str, None] = {}
    for reading in readings:
        golds = reading.question.golds
        for samples in reading.conditions.values() if golds else ():
            judged.append(np.asarray(samples.equivalent_to_gold(threshold=config.threshold).any(axis=1)))
            exact.append(exact_matches(samples.texts, golds))
            for at in np.flatnonzero(judged[-1] != exact[-1]):
                verdict = "judged equivalent" if judged[-1][at] else "judged different"
                examples[f"{reading.question.text} {samples.texts[at]!r}, {verdict} to {golds[0]!r}"] = None
    if not judged:
        return None
    by_judge, by_text = np.concatenate(judged), np.concatenate(exact)
    return JudgeAgreement(
        num_answers=len(by_judge),
        both=float((by_judge & by_text).mean()),
        only_judge=float((by_judge & ~by_text).mean()),
        only_exact=float((~by_judge & by_text).mean()),
        examples=tuple(examples)[:_MAX_EXAMPLES],
    )


def exact_matches(texts: Iterable[str], golds: Iterable[str]) -> BoolArray:
    """Return which texts equal a gold answer after normalization; blank texts never do."""
    keys = {normalize_answer(gold) for gold in golds} - {""}
    return np.asarray([normalize_answer(text) in keys for text in texts], dtype=np.bool_)


def gain_auc(
    readings: Sequence[QuestionReading], config: IGServiceConfig, *, rng: np.random.Generator
) -> float | None:
    """Return the chance that a right answer came with a larger gain than a wrong one.

    Gains are computed from one half of the samples and compared with exact match of the other half: from the
    same samples the two would agree by construction. None without both right and wrong answers.
    """
    gains: list[float] = []
    right: list[int] = []
    wrong: list[int] = []
    for reading in readings:
        if not reading.question.golds:
            continue
        half = reading.num_samples // 2
        order = {name: rng.permutation(len(samples)) for name, samples in reading.conditions.items()}
        measured = reading.gains_of({name: rows[None, :half] for name, rows in order.items()}, config)
        for name, samples in reading.contexts.items():
            rest = [samples.texts[row] for row in order[name][half:]]
            num_right = int(exact_matches(rest, reading.question.golds).sum())
            gains.append(float(measured[name][0]))
            right.append(num_right)
            wrong.append(len(rest) - num_right)
    return auc(np.asarray(gains), positives=np.asarray(right, float), negatives=np.asarray(wrong, float))


def auc(values: FloatArray, *, positives: FloatArray, negatives: FloatArray) -> float | None:
    """Return the chance that a positive has a larger value than a negative; ties count half.

    `positives` and `negatives` count how many of each share a value. None without one of both.
    """
    if not positives.sum() or not negatives.sum():
        return None
    larger = (values[:, None] > values) + 0.5 * (values[:, None] == values)  # [positive, negative]
    return float(positives @ larger @ negatives / (positives.sum() * negatives.sum()))
