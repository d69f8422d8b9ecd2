from __future__ import annotations

import math
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from serving.questions import QuestionError, parse_golds, read_rows


@pytest.mark.parametrize(
    ("value", "golds"),
    [
        ("Bolton", ("Bolton",)),
        (["Bolton", "Bolton, England"], ("Bolton", "Bolton, England")),
        (["!!!", "A"], ("!!!", "A")),
        # Numbers: a parquet column of years is often one of floats.
        (1990, ("1990",)),
        ([1990.0, -0.0, 3.5, 1e16], ("1990", "0", "3.5", "10000000000000000")),
        ("1990.0", ("1990.0",)),
        (10**400, ("1" + "0" * 400,)),
        # Missing values beside answers.
        (["Bolton", None, "", " ", math.nan], ("Bolton",)),
        # Nothing to accept.
        (None, ()),
        ("", ()),
        ([], ()),
        ([None, math.nan, " "], ()),
        # Nothing that can be an answer: the whole value is refused.
        (["Bolton", True], ()),
        (["Bolton", math.inf], ()),
        (["Bolton", ["Bolton"]], ()),
        (["Bolton", "Bolt\ud800n"], ()),
        ({"target": "Bolton"}, ()),
    ],
)
def test_golds_of_every_kind(value: object, golds: tuple[str, ...]) -> None:
    assert parse_golds(value) == golds


def test_a_column_that_python_cannot_hold_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    times = pyarrow.array([1], pyarrow.timestamp("ns"))  # Python's times have microseconds
    parquet.write_table(pyarrow.table({"question": ["Where?"], "asked_at": times}), path)
    with pytest.raises(QuestionError, match=r"train\.parquet: column 'asked_at' cannot be read .*drop it"):
        list(read_rows(path))
