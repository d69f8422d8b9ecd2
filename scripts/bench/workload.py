"""The questions of a GRPO step and the contexts of its rollouts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from bench.service import WORLD
from IG.doctor.questions import AskedQuestion, read_questions

QUESTIONS, ROLLOUTS = 8, 4
"""Of a step."""

# Most rollouts of a group find the same: shares of three different search results per question.
RESULT_SHARES = (0.5, 0.3, 0.2)
HIT_SHARE = 0.7
"""How often a search finds a passage that answers it; a guess, not measured."""
_RANK = re.compile(r"^Doc \d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One gain to ask for."""

    question: str
    context: str
    golds: tuple[str, ...]

    def as_item(self) -> dict[str, object]:
        """Return the item of a request."""
        return {"question": self.question, "context": self.context, "answers": list(self.golds)}


def world_steps(*, num_steps: int | None = None, seed: int) -> list[list[Rollout]]:
    """Return steps over the questions of the embedded world, by default as many as there are."""
    evidence = read_questions(WORLD / "doctor.jsonl")
    return grpo_steps(evidence, num_steps=num_steps or len(evidence) // QUESTIONS, seed=seed)


def grpo_steps(evidence: Sequence[AskedQuestion], *, num_steps: int, seed: int) -> list[list[Rollout]]:
    """Return steps of QUESTIONS x ROLLOUTS; no question comes twice. Raises ValueError if too few."""
    num_needed = num_steps * QUESTIONS
    if num_needed > len(evidence):
        raise ValueError(
            f"{num_steps} steps of {QUESTIONS} questions need {num_needed}, there are {len(evidence)}"
        )
    rng = Random(seed)
    distractors = [document.text for other in evidence for document in other.documents]
    groups = [_group(one, distractors=distractors, rng=rng) for one in rng.sample(list(evidence), num_needed)]
    starts = range(0, len(groups), QUESTIONS)
    return [[rollout for group in groups[at : at + QUESTIONS] for rollout in group] for at in starts]


def _group(evidence: AskedQuestion, *, distractors: Sequence[str], rng: Random) -> list[Rollout]:
    results = [_search_results(evidence, distractors=distractors, rng=rng) for _ in RESULT_SHARES]
    return [
        Rollout(question=evidence.text, context=context, golds=evidence.golds)
        for context in rng.choices(results, weights=RESULT_SHARES, k=ROLLOUTS)
    ]


def _search_results(evidence: AskedQuestion, *, distractors: Sequence[str], rng: Random) -> str:
    """Return one search per needed result: it finds that result or a distractor, in any order."""
    searches = []
    for wanted in evidence.documents:
        found = wanted.text if rng.random() < HIT_SHARE else rng.choice(distractors)
        passages = found.splitlines()
        ranked = enumerate(rng.sample(passages, len(passages)), start=1)
        searches.append("\n".join(f"Doc {rank}{_RANK.sub('', passage)}" for rank, passage in ranked))
    return "\n".join(searches)
