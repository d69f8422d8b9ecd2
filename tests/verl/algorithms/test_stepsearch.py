"""Which passages count as supporting ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fakes import make_question
from verl.algorithms.stepsearch import similarities
from verl.types import Passage

HULL = Passage(id="7", title='"Hull"', text="A port in the north.", score=1.0)
YORK = Passage(id="8", title='"York"', text="A town with walls.", score=1.0)


@pytest.mark.parametrize(
    ("ids", "texts", "expected"),
    [
        (("8", "7"), (), [[0.0, 1.0], [1.0, 0.0]]),
        (("York", "Hull"), (), [[0.0, 1.0], [1.0, 0.0]]),  # titles, where the data has no more
        (("Y", "H"), ("York\nA town with walls.", "Hull\nA port in the north."), [[0.0, 1.0], [1.0, 0.0]]),
        # A title stands for a whole article: the text says which passage of it is meant.
        (("York",), ("York\nIts railway museum opened late.",), [[0.0], [0.2]]),
    ],
)
def test_passages_are_told_by_id_by_title_or_by_text(
    ids: tuple[str, ...], texts: tuple[str, ...], expected: list[list[float]]
) -> None:
    question = replace(make_question(), supporting_ids=ids, supporting_texts=texts)
    found = similarities(question, [[HULL], [YORK]])
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=0.1)
