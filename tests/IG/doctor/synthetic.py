"""Samples whose true score is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from IG.config import IGServiceConfig, resolve_config
from IG.doctor.questions import AskedQuestion, Document, Scenario
from IG.doctor.readings import QuestionReading, Samples

GOLD = "Bolton"


def config(*arguments: str) -> IGServiceConfig:
    return resolve_config(arguments, environ={})


def samples(
    texts: Sequence[str], *, golds: Sequence[str] = (GOLD,), mean_log_probs: Sequence[float] | None = None
) -> Samples:
    """Answers that mean the same when they are the same text, and nothing else entails anything."""
    kinds = list(dict.fromkeys(texts))
    entails = np.asarray([[float(text == gold) for gold in golds] for text in texts]).reshape(
        len(texts), len(golds)
    )
    return Samples(
        texts=tuple(texts),
        mean_log_probs=np.full(len(texts), -1.0) if mean_log_probs is None else np.asarray(mean_log_probs),
        clusters=np.asarray([kinds.index(text) for text in texts]),
        response_entails_gold=entails,
        gold_entails_response=entails,
    )


def bernoulli(share: float, *, size: int, rng: np.random.Generator) -> Samples:
    """Equally likely answers, each of them right with probability `share`."""
    return samples([GOLD if right else "York" for right in rng.random(size) < share])


def question(
    *, golds: Sequence[str] = (GOLD,), num_documents: int = 1, name: str = "Where?"
) -> AskedQuestion:
    roles = ("first", "second", "third")[:num_documents]
    return AskedQuestion(
        text=name,
        golds=tuple(golds),
        documents=tuple(Document(text=f"{name} document {role}", role=role) for role in roles),
    )


def reading(
    conditions: dict[Scenario, Samples], *, golds: Sequence[str] = (GOLD,), num_documents: int = 1
) -> QuestionReading:
    return QuestionReading(question=question(golds=golds, num_documents=num_documents), conditions=conditions)
