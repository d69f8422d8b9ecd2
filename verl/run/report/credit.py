"""The credit of sampled text in a recorded trajectory: pieces of equal advantage, their colors and words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from verl.run.records import TrajectoryRecord, TurnRecord
from verl.run.report.text import Segment

LEVELS = 6
"""Shades of each sign."""
POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)
"""Blue and vermilion of Okabe and Ito, which color-blind readers can tell apart."""
SATURATED_SHARE = 0.05
"""Share of the values that may be beyond the scale of the colors: a few outliers would make the rest pale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens in a row of one completion that have the same advantage and are in the same span."""

    text: str
    start: int
    """First character in the completion."""
    kind: str
    """Of the span around it, or other."""
    advantage: float | None
    """None where it was not finite."""
    num_tokens: int


def credit_pieces(record: TrajectoryRecord) -> list[list[Piece]]:
    """Return the pieces of each turn, in order; none where they were not recorded."""
    advantages = [value for value, count in record["advantage_runs"] or () for _ in range(count)]
    pieces = []
    start = len(record["prompt_ids"])
    for turn in record["turns"]:
        end = start + len(turn["output_ids"])
        pieces.append(_pieces_of_turn(turn, advantages[start:end]))
        start = end + len(turn["observation_ids"])
    return pieces


def _pieces_of_turn(turn: TurnRecord, advantages: Sequence[float | None]) -> list[Piece]:
    spans = turn["action"].get("spans", [])
    return [
        Piece(
            text=turn["output_text"][character:next_character],
            start=character,
            kind=next((span["kind"] for span in spans if span["start"] <= token < span["end"]), "other"),
            advantage=advantages[token],
            num_tokens=next_token - token,
        )
        for (token, character), (next_token, next_character) in pairwise(turn.get("text_cuts", []))
        if token < next_token <= len(advantages)
    ]


def cut_pieces(pieces: Sequence[Piece], start: int, end: int) -> list[Piece]:
    """Return the pieces with the characters `[start, end)` of a completion, cut to them."""
    return [
        replace(
            piece,
            text=piece.text[max(0, start - piece.start) : end - piece.start],
            start=max(start, piece.start),
        )
        for piece in pieces
        if piece.start < end and start < piece.start + len(piece.text)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a segment that is shown alike."""

    text: str
    is_tag: bool
    piece: Piece | None
    """Its credit; None where it was not recorded."""


def segment_parts(segment: Segment, output_text: str, pieces: Sequence[Piece]) -> list[Part]:
    """Return a segment of a completion as its tags and its text, cut where the credit changes."""
    inner_start, inner_end = segment.inner
    parts: list[Part] = []
    for start, end, is_tag in (
        (segment.start, inner_start, True),
        (inner_start, inner_end, False),
        (inner_end, segment.end, True),
    ):
        found = cut_pieces(pieces, start, end)
        parts += [Part(text=piece.text, is_tag=is_tag, piece=piece) for piece in found]
        if not found and start < end:
            parts.append(Part(text=output_text[start:end], is_tag=is_tag, piece=None))
    return parts


def credit_scale(records: Iterable[TrajectoryRecord]) -> float:
    """Return the advantage from which on a color is full; 0 where no piece has any."""
    sizes: Counter[float] = Counter()
    for piece in (piece for record in records for of_turn in credit_pieces(record) for piece in of_turn):
        sizes[abs(piece.advantage or 0.0)] += piece.num_tokens
    return _full_value(sizes)


def gain_scale(records: Iterable[TrajectoryRecord]) -> float:
    """Return the gain of a turn from which on a color is full; 0 where none was recorded."""
    return _full_value(Counter(abs(g or 0.0) for record in records for g in record.get("turn_gains", ())))


def _full_value(sizes: Counter[float]) -> float:
    """Return the smallest size that at most `SATURATED_SHARE` of those above 0 exceed."""
    del sizes[0.0]
    left = sizes.total() * (1 - SATURATED_SHARE)
    for size in sorted(sizes):
        left -= sizes[size]
        if left <= 0:
            return size
    return 0.0


def shade(value: float | None, *, scale: float) -> int:
    """Return the shade of a number, from -LEVELS to LEVELS; 0 only for 0 and what is not known."""
    if not value or not scale:
        return 0
    level = min(LEVELS, max(1, round(LEVELS * abs(value) / scale)))
    return level if value > 0 else -level


def shade_color(level: int) -> str:
    """Return the background of a shade as `#rrggbb`, light enough for dark text; white for 0."""
    full = POSITIVE if level > 0 else NEGATIVE
    weight = 0.55 * abs(level) / LEVELS
    return "#" + "".join(f"{round(255 + (part - 255) * weight):02x}" for part in full)


def describe_credit(record: TrajectoryRecord, turn: int) -> str:
    """Return the components of the credit as text: those of a turn (from 0), then those of the attempt."""
    of_turn, of_attempt = [], []
    for name, value in record.get("components", {}).items():
        if isinstance(value, list):
            of_turn += [f"{name} {value[turn]:+.4f}"] if value[turn] is not None else []
        elif value is not None:
            of_attempt.append(f"{name} {value:+.4f}")
    parts = ((f"turn {turn + 1}", of_turn), ("attempt", of_attempt))
    return "\n".join(f"{label}: {', '.join(found)}" for label, found in parts if found)


def span_credits(pieces: Sequence[Piece]) -> list[tuple[str, float]]:
    """Return kind and mean advantage per token of each span in order, then of all other tokens together."""
    spans = [(kind, list(found)) for kind, found in groupby(pieces, key=lambda piece: piece.kind)]
    outside = [piece for piece in pieces if piece.kind == "other"]
    kept = [*(span for span in spans if span[0] != "other"), ("other", outside)]
    means = ((kind, mean_advantage(found)) for kind, found in kept)
    return [(kind, value) for kind, value in means if value is not None]


def mean_advantage(pieces: Sequence[Piece]) -> float | None:
    """Return the mean advantage per token; None where nothing is known."""
    known = [(piece.advantage, piece.num_tokens) for piece in pieces if piece.advantage is not None]
    total = sum(count for _, count in known)
    return sum(value * count for value, count in known) / total if total else None
