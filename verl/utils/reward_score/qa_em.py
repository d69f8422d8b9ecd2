"""How right a short answer is: exact match, cover match and word F1 against several golds (SQuAD rules).

    >>> exact_match("The Bolton.", ["Bolton, England", "bolton"])
    1.0

Strings in, floats in [0, 1] out. Finding the answer in what the policy wrote is not done here: it is a
structured fact of the trajectory, so nothing in a prompt or in an observation can be mistaken for it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case; ASCII punctuation deleted; the words a, an, the dropped; single spaces. May be empty."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Iterable[str]) -> float:
    """1.0 if the prediction equals a gold after normalisation. What normalises to nothing equals nothing."""
    predicted = normalise_answer(prediction)
    return float(bool(predicted) and any(predicted == normalise_answer(gold) for gold in golds))


def sub_exact_match(prediction: str, golds: Iterable[str]) -> float:
    """1.0 if a gold occurs in the prediction after normalisation (cover match).

    Lenient, as published: long predictions cover much, and `art` is found inside `party`.
    """
    predicted = normalise_answer(prediction)
    return float(any(gold in predicted for gold in map(normalise_answer, golds) if gold))


def word_f1(prediction: str, golds: Iterable[str]) -> float:
    """Best F1 over the golds between the bags (not sets) of normalised words: repeated words count."""
    predicted = Counter(normalise_answer(prediction).split())
    return max((_bag_f1(predicted, Counter(normalise_answer(gold).split())) for gold in golds), default=0.0)


def _bag_f1(predicted: Counter[str], gold: Counter[str]) -> float:
    common = (predicted & gold).total()
    return 2.0 * common / (predicted.total() + gold.total()) if common else 0.0
