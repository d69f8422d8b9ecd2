"""Judge the entailment of pairs of texts for callers, from the same cache and workers as the gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from IG.entailment import Pair
from IG.estimator import MAX_CHARS, FailureKind, GainFailure, failure_of, late_failure, run_until
from IG.sharing import SharedJudgements, Work

_TOGETHER = 64
"""Pairs of a request that are done, or late, together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgements:
    """The result of a request."""

    outcomes: list[float | GainFailure]
    """P(premise entails hypothesis), one per pair, in order."""
    work: Work


async def judge_pairs(
    judgements: SharedJudgements, pairs: Sequence[Pair], *, timeout_s: float | None = None
) -> Judgements:
    """Return P(premise entails hypothesis) of every pair; one that fails or is late affects no other.

    Of a premise the last `MAX_CHARS` characters are read: models do not read the beginning of a long one
    either. Cancelling it cancels all work that no other request waits for.
    """
    work = Work(items=len(pairs), pairs_naive=len(pairs))
    faults = [_find_fault(pair) for pair in pairs]
    valid = [
        (premise[-MAX_CHARS:], hypothesis)
        for (premise, hypothesis), fault in zip(pairs, faults, strict=True)
        if fault is None
    ]
    chunks = [valid[start : start + _TOGETHER] for start in range(0, len(valid), _TOGETHER)]
    ended = await run_until((_judge(judgements, chunk, work=work) for chunk in chunks), timeout_s=timeout_s)
    late = late_failure(timeout_s)
    judged = iter(
        [
            outcome
            for chunk, outcomes in zip(chunks, ended, strict=True)
            for outcome in (outcomes or [late] * len(chunk))
        ]
    )
    return Judgements(outcomes=[fault or next(judged) for fault in faults], work=work)


async def _judge(
    judgements: SharedJudgements, pairs: Sequence[Pair], *, work: Work
) -> list[float | GainFailure]:
    try:
        found = await judgements.outcomes(pairs, work)
    except Exception as error:  # no worker is left, or a defect: the request still gets an answer
        return [failure_of(error)] * len(pairs)
    outcomes = [found[pair] for pair in pairs]
    return [failure_of(outcome) if isinstance(outcome, Exception) else outcome for outcome in outcomes]


def _find_fault(pair: Pair) -> GainFailure | None:
    """Return why a pair cannot be judged whatever the model does, else None."""
    for name, text in zip(("premise", "hypothesis"), pair, strict=True):
        if not text.strip():
            return GainFailure(kind=FailureKind.invalid, reason=f"the {name} is empty, expected a text")
    if (length := len(pair[1])) > MAX_CHARS:
        reason = f"the hypothesis has {length} characters, expected at most {MAX_CHARS}"
        return GainFailure(kind=FailureKind.invalid, reason=reason)
    return None
