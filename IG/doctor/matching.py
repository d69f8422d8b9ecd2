"""Exact match as question answering counts it, and how each sampled answer came to be right."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import numpy as np

from IG.doctor.readings import Samples
from IG.semantics import FloatArray
from serving.answers import normalize_answer, same_text_key


class Match(StrEnum):
    """How an answer is right; the first that holds."""

    text = "text"
    """Equal to a gold up to case, spacing, quotes and final punctuation: no model is asked."""
    exact_match = "exact_match"
    """Only equal after articles and all punctuation are dropped, as EM does."""
    entailment = "entailment"
    """Only the entailment model holds it equivalent to a gold."""
    none = "none"


def exact_matches(texts: Iterable[str], golds: Iterable[str]) -> FloatArray:
    """Return 1.0 for every text that equals a gold answer after normalization, blank ones never."""
    keys = {normalize_answer(gold) for gold in golds} - {""}
    return np.asarray([float(normalize_answer(text) in keys) for text in texts], dtype=np.float64)


def matches_of(samples: Samples, golds: Iterable[str], *, threshold: float) -> list[Match]:
    """How every sampled answer is right."""
    accepted = tuple(golds)
    same_text = {same_text_key(gold) for gold in accepted}
    by_em = exact_matches(samples.texts, accepted)
    by_model = np.asarray(samples.equivalent_to_gold(threshold=threshold).any(axis=1))
    kinds = []
    for text, is_exact, is_equivalent in zip(samples.texts, by_em, by_model, strict=True):
        if same_text_key(text) in same_text:
            kinds.append(Match.text)
        elif is_exact:
            kinds.append(Match.exact_match)
        else:
            kinds.append(Match.entailment if is_equivalent else Match.none)
    return kinds
