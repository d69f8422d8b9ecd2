"""Facts of one recorded trajectory, for the report and the terminal viewer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from verl.run.records import PassageRecord, TrajectoryRecord
from verl.utils.reward_score.IG_reward import combine

_TAGGED = re.compile(r"<(\w+)>(?:(.*?)</\1>|((?!.*</\w).*)\Z)", re.DOTALL)
"""A pair of tags of any name, or one that is not closed and has no closing tag behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of sampled text."""

    kind: str
    """Name of the tag around it, such as think, or other."""
    text: str
    is_closed: bool = True


def split_output(text: str) -> list[Segment]:
    """Split sampled text at its tags; a tag that is not closed runs to the end of the text."""
    segments, position = [], 0
    for match in _TAGGED.finditer(text):
        segments.append(Segment(kind="other", text=text[position : match.start()]))
        name, closed, rest = match.groups()
        text_inside = rest if closed is None else closed
        segments.append(Segment(kind=name, text=text_inside.strip(), is_closed=closed is not None))
        position = match.end()
    segments.append(Segment(kind="other", text=text[position:]))
    return [s for s in segments if s.kind != "other" or s.text.strip()]


def gain_of(record: TrajectoryRecord) -> float | None:
    """Return the gain of the trajectory, or the sum over its turns; None where none was measured."""
    turns = [gain for gain in record.get("turn_gains", ()) if gain is not None]
    return sum(turns) if turns else record["gain"]


def reward_of(record: TrajectoryRecord, *, gain_weight: float) -> float | None:
    """Return the recorded reward; of a record of format 1, which has none, outcome plus weighted gain."""
    if "components" in record:
        reward = record["components"].get("reward")
        return None if isinstance(reward, list) else reward
    if record["failure"] is not None or record["outcome"] is None or record["kind"] != "train":
        return None
    return combine(record["outcome"], record["gain"], weight=gain_weight)


def names_gold(passage: PassageRecord, golds: list[str]) -> bool:
    """Return whether a passage contains an accepted answer as a word or phrase."""
    text = f"{passage['title']} {passage['text']}"
    return any(gold and re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", text, re.IGNORECASE) for gold in golds)


def mask_strip(record: TrajectoryRecord) -> list[tuple[str, int]]:
    """Return (kind, tokens) of the stretches of a trajectory: prompt, sampled, read."""
    kinds = ["prompt", *(("sampled", "read")[k % 2] for k in range(len(record["mask_runs"]) - 1))]
    return [(kind, count) for kind, count in zip(kinds, record["mask_runs"], strict=True) if count]
