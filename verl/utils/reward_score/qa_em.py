"""Score a short answer against several gold answers: exact match, cover match and word F1.

    >>> exact_match("The Bolton.", ["Bolton, England", "bolton"])
    1.0

Strings in, floats in [0, 1] out. Finding the answer in what the policy wrote is not done here: it is a
structured fact of the trajectory, so nothing in a prompt or in an observation can be mistaken for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from serving.answers import AnswerRule, fold, normalize_answer, split_words


def exact_match(prediction: str, golds: Iterable[str], *, rule: AnswerRule = AnswerRule.folded) -> float:
    """Return 1.0 if the prediction equals a gold answer after normalization; an empty one equals none."""
    predicted = normalize_answer(prediction, rule=rule)
    return float(bool(predicted) and any(predicted == normalize_answer(gold, rule=rule) for gold in golds))


def sub_exact_match(prediction: str, golds: Iterable[str], *, rule: AnswerRule = AnswerRule.folded) -> float:
    """Return 1.0 if a gold answer occurs in the prediction after normalization (cover match).

    Lenient, as published: long predictions cover much, and `art` is found inside `party`. A gold answer of
    articles and punctuation alone must be equal: `a` is inside almost every text.
    """
    accepted = tuple(golds)
    if exact_match(prediction, accepted, rule=rule):
        return 1.0
    folded = [fold(text) if rule is AnswerRule.folded else text for text in (prediction, *accepted)]
    predicted, *inside = (normalize_answer(text, rule=AnswerRule.published) for text in folded)
    return float(any(gold in predicted for gold in inside if gold))


def word_f1(prediction: str, golds: Iterable[str], *, rule: AnswerRule = AnswerRule.folded) -> float:
    """Return the best F1 over the gold answers between bags (not sets) of normalized words.

    In scripts without spaces each character is a word; by the published rule only white space separates.
    """
    predicted = _count_words(prediction, rule=rule)
    return max((_bag_f1(predicted, _count_words(gold, rule=rule)) for gold in golds), default=0.0)


def _count_words(text: str, *, rule: AnswerRule) -> Counter[str]:
    normalized = normalize_answer(text, rule=rule)
    return Counter(split_words(normalized) if rule is AnswerRule.folded else normalized.split())


def _bag_f1(predicted: Counter[str], gold: Counter[str]) -> float:
    common = (predicted & gold).total()
    return 2.0 * common / (predicted.total() + gold.total()) if common else 0.0
