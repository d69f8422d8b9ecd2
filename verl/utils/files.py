"""Read JSON of a known shape, with errors that say where and what is wrong."""

from __future__ import annotations

from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from verl.errors import DataError

T = TypeVar("T")


def parse_json(text: bytes, *, shape: TypeAdapter[T], where: str, fix: str) -> T:
    """Return the JSON value if it has this shape.

    Raises DataError that names the place, what is wrong there and the fix: no UTF-8, no JSON, another shape.
    """
    try:
        return shape.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{where}: {f'{key}: ' if key else ''}{first['msg']}; {fix}") from error
