"""Whether gains mean something: those of supporting passages against those of unrelated ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import fmean

from IG.client import IGClient
from IG.messages import GainRequest, GainResult
from verl.evaluation.statistics import area_under_curve

_TOGETHER = 10
_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """What the service answered."""

    questions: int
    failed: int
    """Questions without both gains; they count in no figure."""
    auc: float | None
    """How often the gain of supporting passages is above that of unrelated ones; ties count half."""
    supporting_mean: float | None
    unrelated_mean: float | None
    belief_without: float | None
    """Mean belief in the golds without a passage."""
    belief_with: float | None
    """With the supporting passages."""


def build_requests(examined: Path, *, seed: int) -> list[tuple[GainRequest, GainRequest]]:
    """Return for each question of a file of the doctor its gain from its own passages and another's.

    The other question's passages are as many, and none of them is one of its own.
    """
    rows = [json.loads(line) for line in examined.read_text(encoding="utf-8").splitlines()]
    rng = Random(f"unrelated {seed}")
    pairs = []
    for row in rows:
        own = [document["text"] for document in row["documents"]]
        others = [
            texts
            for other in rows
            if len(texts := [document["text"] for document in other["documents"]]) == len(own)
            and not set(texts) & set(own)
        ]
        contexts = ("\n".join(own), "\n".join(rng.choice(others)))
        first, second = (
            GainRequest(question=row["question"], context=context, golds=tuple(row["answers"]))
            for context in contexts
        )
        pairs.append((first, second))
    return pairs


async def measure_gains(
    url: str, pairs: Sequence[tuple[GainRequest, GainRequest]], *, records: Path
) -> list[tuple[GainResult, GainResult]]:
    """Ask a running service for all gains, a few questions at a time, and keep them in `records`.

    What is in that file already is not asked again.
    """
    kept = read_gain_records(records)
    async with IGClient(url, timeout_s=_TIMEOUT_S) as client:
        await client.wait_ready(_TIMEOUT_S)
        for start in range(len(kept), len(pairs), _TOGETHER):
            asked = [request for pair in pairs[start : start + _TOGETHER] for request in pair]
            answers = await client.compute(asked)
            found = [(answers[k], answers[k + 1]) for k in range(0, len(answers), 2)]
            with records.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([asdict(one) for one in pair]) + "\n" for pair in found)
            kept += found
            print(f"gains: {len(kept)} of {len(pairs)} questions, {summarize(kept).auc}", file=sys.stderr)
    return kept[: len(pairs)]


def read_gain_records(path: Path) -> list[tuple[GainResult, GainResult]]:
    """Return what is recorded; a line that was cut off by a crash is removed from the file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    lines = whole.splitlines()
    pairs = ([GainResult(**one) for one in json.loads(line)] for line in lines)
    return [(own, other) for own, other in pairs]


def summarize(measured: Sequence[tuple[GainResult, GainResult]]) -> Separation:
    """Return the figures of (supporting, unrelated) gains; a pair counts if both were measured."""
    gains = [
        (own.gain, other.gain) for own, other in measured if own.gain is not None and other.gain is not None
    ]
    supporting, unrelated = [own for own, _ in gains], [other for _, other in gains]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(fmean(known), 4) if known else None

    return Separation(
        questions=len(measured),
        failed=len(measured) - len(gains),
        auc=round(area_under_curve(supporting, unrelated), 4) if gains else None,
        supporting_mean=mean(supporting),
        unrelated_mean=mean(unrelated),
        belief_without=mean([own.belief_no_context for own, _ in measured]),
        belief_with=mean([own.belief_with_context for own, _ in measured]),
    )
