from __future__ import annotations

from typing import Any, cast

import pytest

from verl.run.records import TrajectoryRecord
from verl.run.report.credit import (
    LEVELS,
    credit_pieces,
    credit_scale,
    describe_credit,
    gain_scale,
    mean_advantage,
    segment_parts,
    shade,
    shade_color,
    span_credits,
)
from verl.run.report.text import split_output

TEXT = "<think> hm </think><search> Bolton </search>"


def make_record(**changes: object) -> TrajectoryRecord:
    """Two prompt tokens, a turn of four sampled and two read tokens, one of a single token."""
    spans = [{"kind": "think", "start": 1, "end": 2, "text": "hm"}]
    spans.append({"kind": "query", "start": 3, "end": 4, "text": "Bolton"})
    call: dict[str, Any] = {
        "output_text": TEXT,
        "output_ids": [1, 2, 3, 4],
        "observation_ids": [5, 6],
        "text_cuts": [(0, 0), (1, 7), (2, 10), (3, 27), (4, len(TEXT))],
        "action": {"spans": spans},
    }
    end = {
        "output_text": "!",
        "output_ids": [7],
        "observation_ids": [],
        "text_cuts": [(0, 0), (1, 1)],
        "action": {"spans": []},
    }
    record = {
        "prompt_ids": [0, 0],
        "turns": [call, end],
        "advantage_runs": [(0.0, 2), (0.5, 3), (-1.0, 1), (0.0, 2), (None, 1)],
        "turn_gains": [0.25, None],
        "components": {"reward": 1.0, "outcome": None, "query_gain": [0.125, None]},
    }
    return cast(TrajectoryRecord, {**record, **changes})


def test_a_completion_is_cut_into_pieces_with_their_credit() -> None:
    first, second = credit_pieces(make_record())
    assert [(p.text, p.kind, p.advantage, p.num_tokens) for p in first] == [
        ("<think>", "other", 0.5, 1),
        (" hm", "think", 0.5, 1),
        (" </think><search>", "other", 0.5, 1),
        (" Bolton </search>", "query", -1.0, 1),
    ]
    assert [piece.advantage for piece in second] == [None]
    assert span_credits(first) == [("think", 0.5), ("query", -1.0), ("other", 0.5)]
    assert mean_advantage(first) == pytest.approx(0.125)
    assert span_credits(second) == []
    assert mean_advantage(second) is None


def test_without_a_recorded_credit_there_are_no_pieces() -> None:
    assert credit_pieces(make_record(advantage_runs=None)) == [[], []]


def test_segments_are_shown_by_tag_and_credit_and_lose_nothing() -> None:
    pieces = credit_pieces(make_record())[0]
    think, search = (segment_parts(segment, TEXT, pieces) for segment in split_output(TEXT))
    assert [(part.text, part.is_tag) for part in think] == [
        ("<think>", True),
        (" hm", False),
        (" ", False),
        ("</think>", True),
    ]
    assert [part.text for part in search] == ["<search>", " Bolton ", "</search>"]
    assert [part.piece and part.piece.advantage for part in search] == [0.5, -1.0, -1.0]
    bare = [segment_parts(segment, TEXT, []) for segment in split_output(TEXT)]
    assert "".join(part.text for parts in bare for part in parts) == TEXT
    assert all(part.piece is None for parts in bare for part in parts)


def test_colors_are_full_at_what_few_values_exceed() -> None:
    outlier = make_record(advantage_runs=[(0.0, 2), (0.0, 3), (100.0, 1), (0.0, 2), (0.0, 1)])
    assert credit_scale([make_record()] * 3) == 1.0
    assert credit_scale([make_record()] * 5 + [outlier]) == 1.0
    assert credit_scale([make_record()] * 4 + [outlier]) == 100.0
    assert gain_scale([make_record()]) == 0.25
    assert credit_scale([make_record(advantage_runs=None)]) == gain_scale([]) == 0.0


def test_shades_have_the_sign_of_the_value_and_are_white_only_for_0() -> None:
    assert [shade(value, scale=1.0) for value in (None, 0.0, 1e-6, -1e-6, 0.5, -9.0)] == [
        0,
        0,
        1,
        -1,
        LEVELS // 2,
        -LEVELS,
    ]
    assert shade(1.0, scale=0.0) == 0
    colors = [shade_color(level) for level in range(-LEVELS, LEVELS + 1)]
    assert len(set(colors)) == len(colors)
    assert colors[LEVELS] == "#ffffff"


def test_components_of_a_turn_are_told_from_those_of_the_attempt() -> None:
    assert describe_credit(make_record(), 0) == "turn 1: query_gain +0.1250\nattempt: reward +1.0000"
    assert describe_credit(make_record(), 1) == "attempt: reward +1.0000"
