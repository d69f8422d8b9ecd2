"""Pure readings of one recorded trajectory, shared by the report and the terminal viewer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from verl.run.records import PassageRecord, TrajectoryRecord
from verl.utils.reward_score.IG_reward import combine

_TAGGED = re.compile(r"<(think|search|answer|information)>(.*?)(</\1>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of what the policy wrote."""

    kind: str
    """think, search, answer, information or other."""
    text: str
    is_closed: bool = True


def split_output(text: str) -> list[Segment]:
    """Text the policy sampled, cut at its tags; a tag without its end runs to the end of the text."""
    segments, position = [], 0
    for match in _TAGGED.finditer(text):
        segments.append(Segment(kind="other", text=text[position : match.start()]))
        is_closed = bool(match.group(3))
        segments.append(Segment(kind=match.group(1), text=match.group(2).strip(), is_closed=is_closed))
        position = match.end()
    segments.append(Segment(kind="other", text=text[position:]))
    return [s for s in segments if s.kind != "other" or s.text.strip()]


def reward_of(record: TrajectoryRecord, *, gain_weight: float) -> float | None:
    """What was trained on; None for a failed trajectory and in an evaluation."""
    if record["failure"] is not None or record["outcome"] is None or record["kind"] != "train":
        return None
    return combine(record["outcome"], record["gain"], weight=gain_weight)


def names_gold(passage: PassageRecord, golds: list[str]) -> bool:
    """Whether a passage contains an accepted answer as a word or phrase."""
    text = f"{passage['title']} {passage['text']}"
    return any(gold and re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", text, re.IGNORECASE) for gold in golds)


def mask_strip(record: TrajectoryRecord) -> list[tuple[str, int]]:
    """(kind, tokens) of the stretches of a trajectory, as the loss sees them: prompt, sampled, read."""
    kinds = ["prompt", *(("sampled", "read")[k % 2] for k in range(len(record["mask_runs"]) - 1))]
    return [(kind, count) for kind, count in zip(kinds, record["mask_runs"], strict=True) if count]
