from __future__ import annotations

from itertools import pairwise
from typing import cast

import pytest

from verl.run.records import TrajectoryRecord
from verl.run.report.text import gain_of, names_gold, split_output


def pieces_of(text: str) -> list[tuple[str, str, bool]]:
    """Return kind, text and whether it is closed of each segment, whose positions must fit."""
    segments = split_output(text)
    for one, following in pairwise(segments):
        assert not text[one.end : following.start].strip()
    for segment in segments:
        assert text[slice(*segment.inner)].strip() == segment.text
        assert segment.start <= segment.inner[0] <= segment.inner[1] <= segment.end
    return [(segment.kind, segment.text, segment.is_closed) for segment in segments]


def test_output_is_cut_at_its_tags_and_nothing_is_lost() -> None:
    assert pieces_of("a <think> b </think> \n <search> c </search><|im_end|>\n") == [
        ("other", "a", True),
        ("think", "b", True),
        ("search", "c", True),
        ("other", "<|im_end|>", True),
    ]


def test_a_tag_that_never_closes_runs_to_the_end() -> None:
    assert pieces_of("<python> 1 < 2 </python><think> b <search> c") == [
        ("python", "1 < 2", True),
        ("think", "b <search> c", False),
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
