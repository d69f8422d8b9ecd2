from __future__ import annotations

import math

import pytest

from serving.questions import parse_golds


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
