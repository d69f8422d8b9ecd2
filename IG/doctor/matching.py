"""Exact match as question answering counts it, and how each sampled answer came to be right."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from enum import StrEnum

import numpy as np

from IG.doctor.readings import Samples
from IG.prompts import normalise_answer
from IG.semantics import FloatArray

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Match(StrEnum):
    """How an answer is right; the first that holds."""

    text = "text"
    """Equal to a gold up to case, spacing, quotes and final punctuation: no model is asked."""
    exact_match = "exact_match"
    """Only equal after articles and all punctuation are dropped, as EM does."""
    entailment = "entailment"
    """Only the entailment model holds it equivalent to a gold."""
    none = "none"


def em_key(text: str) -> str:
    """Lower case; ASCII punctuation deleted; the words a, an, the dropped; single spaces. May be empty."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE_PUNCTUATION)).split())


def exact_matches(texts: Iterable[str], golds: Iterable[str]) -> FloatArray:
    """1.0 for every text that equals a gold after normalisation; what normalises to nothing never does."""
    keys = {key for gold in golds if (key := em_key(gold))}
    return np.asarray([float(em_key(text) in keys) for text in texts], dtype=np.float64)


def matches_of(samples: Samples, golds: Iterable[str], *, threshold: float) -> list[Match]:
    """How every sampled answer is right."""
    accepted = tuple(golds)
    same_text = {normalise_answer(gold) for gold in accepted}
    by_em = exact_matches(samples.texts, accepted)
    by_model = np.asarray(samples.equivalent_to_gold(threshold=threshold).any(axis=1))
    kinds = []
    for text, is_exact, is_equivalent in zip(samples.texts, by_em, by_model, strict=True):
        if normalise_answer(text) in same_text:
            kinds.append(Match.text)
        elif is_exact:
            kinds.append(Match.exact_match)
        else:
            kinds.append(Match.entailment if is_equivalent else Match.none)
    return kinds
