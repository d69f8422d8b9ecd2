"""Files that are either whole or not there, JSON that is read back, and errors that name their file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from verl.errors import DataError

T = TypeVar("T")


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`; a reader, or a crash at any moment, sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with naming_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A lone surrogate, which UTF-8 cannot hold, is written as its escape.
            with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Name `path` in an OSError that names no file, as those of writing and flushing do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


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
