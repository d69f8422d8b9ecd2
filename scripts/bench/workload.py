"""The questions of a GRPO step and what its rollouts found: the same for everything that is compared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

# Of a group's rollouts most find the same: shares of three different search results per question.
RESULT_SHARES = (0.5, 0.3, 0.2)
HIT_SHARE = 0.7
"""How often a search finds a passage that answers it; by guess, no measurement stands behind it."""
_RANK = re.compile(r"^Doc \d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A question with the search results that answer it."""

    question: str
    golds: tuple[str, ...]
    results: tuple[str, ...]
    """One passage a line, each beginning with its rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What one gain is asked about."""

    question: str
    context: str
    golds: tuple[str, ...]

    def as_item(self) -> dict[str, object]:
        """The item of a request for it."""
        return {"question": self.question, "context": self.context, "answers": list(self.golds)}


def load_evidence(path: Path) -> list[Evidence]:
    """Read the questions of `IG doctor`: one JSON object per line."""
    with path.open(encoding="utf-8") as lines:
        return [
            Evidence(
                question=row["question"],
                golds=tuple(row["answers"]),
                results=tuple(document["text"] for document in row["documents"]),
            )
            for row in map(json.loads, lines)
        ]


def grpo_steps(
    evidence: Sequence[Evidence], *, num_steps: int, questions: int, rollouts: int, seed: int
) -> list[list[Rollout]]:
    """Steps of `questions` x `rollouts`; no question comes twice. Raises ValueError if too few."""
    if num_steps * questions > len(evidence):
        raise ValueError(
            f"{num_steps} steps of {questions} questions need {num_steps * questions} questions, "
            f"there are {len(evidence)}"
        )
    rng = Random(seed)
    chosen = rng.sample(list(evidence), num_steps * questions)
    distractors = [result for other in evidence for result in other.results]
    return [
        [
            rollout
            for one in chosen[step * questions : (step + 1) * questions]
            for rollout in _group(one, rollouts=rollouts, distractors=distractors, rng=rng)
        ]
        for step in range(num_steps)
    ]


def _group(evidence: Evidence, *, rollouts: int, distractors: Sequence[str], rng: Random) -> list[Rollout]:
    results = [_search_results(evidence, distractors=distractors, rng=rng) for _ in RESULT_SHARES]
    return [
        Rollout(question=evidence.question, context=context, golds=evidence.golds)
        for context in rng.choices(results, weights=RESULT_SHARES, k=rollouts)
    ]


def _search_results(evidence: Evidence, *, distractors: Sequence[str], rng: Random) -> str:
    """What a rollout read: one search per needed result. Other words find it in another order, or another."""
    searches = []
    for wanted in evidence.results:
        found = wanted if rng.random() < HIT_SHARE else rng.choice(distractors)
        passages = found.splitlines()
        ranked = enumerate(rng.sample(passages, len(passages)), start=1)
        searches.append("\n".join(f"Doc {rank}{_RANK.sub('', passage)}" for rank, passage in ranked))
    return "\n".join(searches)
