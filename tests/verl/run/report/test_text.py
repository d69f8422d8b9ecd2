from __future__ import annotations

from typing import cast

import pytest

from verl.run.records import TrajectoryRecord
from verl.run.report.text import Segment, gain_of, names_gold, split_output


def test_output_is_cut_at_its_tags_and_nothing_is_lost() -> None:
    assert split_output("a <think> b </think> <search> c </search><|im_end|>") == [
        Segment(kind="other", text="a "),
        Segment(kind="think", text="b"),
        Segment(kind="search", text="c"),
        Segment(kind="other", text="<|im_end|>"),
    ]


def test_a_tag_that_never_closes_runs_to_the_end() -> None:
    assert split_output("<python> 1 < 2 </python><think> b <search> c") == [
        Segment(kind="python", text="1 < 2"),
        Segment(kind="think", text="b <search> c", is_closed=False),
    ]


@pytest.mark.parametrize(
    ("turns", "whole", "expected"),
    [([0.5, None, -0.1], None, 0.4), ([None, 0.0], 0.3, 0.0), ([None], 0.3, 0.3), ([], None, None)],
)
def test_the_gain_of_an_attempt_is_the_sum_over_its_turns_where_they_were_measured(
    turns: list[float | None], whole: float | None, expected: float | None
) -> None:
    record = cast(TrajectoryRecord, {"turn_gains": turns, "gain": whole})
    assert gain_of(record) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Born in Bolton, England.", True),
        ("born in BOLTON", True),
        ("Boltonia is a plant", False),
        ("", False),
    ],
)
def test_a_gold_is_found_as_a_word(text: str, expected: bool) -> None:
    assert names_gold({"id": "1", "title": "t", "text": text, "score": 0.5}, ["Bolton", ""]) is expected
