"""Read the gold answers of a question from a value of a data file."""

from __future__ import annotations

import math
import re

EXPECTED_GOLDS = "a text, a number or a list of these with at least one that is not empty"
"""For the error of the caller, who knows file, row and column."""

_INFINITE = (math.inf, -math.inf)
SURROGATE = re.compile("[\ud800-\udfff]")
"""A lone surrogate, which JSON can contain and no tokenizer can read."""


def parse_golds(value: object) -> tuple[str, ...]:
    """Return the gold answers; empty if there are none, or one is neither a text nor a number.

    Missing values (None, NaN, blank text) are dropped from a list. A number that is integral is written
    without ".0": a column of years is often stored as floats. Texts are kept as they are.
    """
    members = value if isinstance(value, list | tuple) else [value]
    present = [member for member in members if not _is_missing(member)]
    golds = tuple(text for text in map(_write, present) if text is not None)
    return golds if len(golds) == len(present) else ()


def _is_missing(member: object) -> bool:
    return (
        member is None
        or (isinstance(member, float) and math.isnan(member))
        or (isinstance(member, str) and not member.strip())
    )


def _write(member: object) -> str | None:
    """Return the text of a gold answer, None if the value cannot be one."""
    if isinstance(member, float) and member.is_integer():
        return str(int(member))
    if isinstance(member, bool) or not isinstance(member, str | int | float) or member in _INFINITE:
        return None
    text = str(member)
    return None if SURROGATE.search(text) else text
