"""Facts of one recorded trajectory, for the report and the terminal viewer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from serving.answers import AnswerRule, find_answer
from verl.run.records import PassageRecord, TrajectoryRecord
from verl.utils.reward_score.IG_reward import combine

_TAGGED = re.compile(r"<(\w+)>(?:(.*?)</\1>|((?!.*</\w).*)\Z)", re.DOTALL)
"""A pair of tags of any name, or one that is not closed and has no closing tag behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of sampled text: characters `[start, end)` of a completion."""

    kind: str
    """Name of the tag around it, such as think, or other."""
    text: str
    """Without tags and white space around it."""
    start: int
    end: int
    inner: tuple[int, int]
    """Where the characters between the tags begin and end."""
    is_closed: bool = True


def split_output(text: str) -> list[Segment]:
    """Split sampled text at its tags; a tag that is not closed runs to the end of the text."""
    segments, position = [], 0
    for match in _TAGGED.finditer(text):
        segments += _between(text, position, match.start())
        is_closed = match[2] is not None
        inner = match.span(2 if is_closed else 3)
        segments.append(
            Segment(
                kind=match[1],
                text=text[slice(*inner)].strip(),
                start=match.start(),
                end=match.end(),
                inner=inner,
                is_closed=is_closed,
            )
        )
        position = match.end()
    return [*segments, *_between(text, position, len(text))]


def _between(text: str, start: int, end: int) -> list[Segment]:
    """Return what is between two tags, if it is more than white space."""
    outside = text[start:end].strip()
    if not outside:
        return []
    start = text.index(outside, start)
    end = start + len(outside)
    return [Segment(kind="other", text=outside, start=start, end=end, inner=(start, end))]


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
    """Return whether a passage contains an accepted answer, as the metrics count it."""
    return find_answer([f"{passage['title']} {passage['text']}"], golds, rule=AnswerRule.folded) is not None


def mask_strip(record: TrajectoryRecord) -> list[tuple[str, int]]:
    """Return (kind, tokens) of the stretches of a trajectory: prompt, sampled, read."""
    kinds = ["prompt", *(("sampled", "read")[k % 2] for k in range(len(record["mask_runs"]) - 1))]
    return [(kind, count) for kind, count in zip(kinds, record["mask_runs"], strict=True) if count]
