"""Where the lines of a file start, found once: of a large file kept beside it (sidecar.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from search_r1.search.sidecar import FLAG, Entries, keep_table

logger = logging.getLogger(__name__)

Offsets: TypeAlias = Entries
Report: TypeAlias = Callable[[int, int], None]

_CHECKED_AT = FLAG  # every line was parsed once and is well formed
_CHUNK_BYTES = 1 << 24


def find_line_starts(
    path: Path, *, fingerprint: str, report: Report | None = None
) -> tuple[Offsets, Path | None]:
    """Return line starts and the end of the file [lines + 1], and the sidecar that holds them, if any.

    The first time this reads the file (about a second per GB), later it opens the sidecar. `report(done,
    total)` in bytes.
    """
    size = path.stat().st_size
    return keep_table(
        path,
        kind="offsets",
        fingerprint=fingerprint,
        make=lambda: _scan(path, report),
        is_whole=lambda starts: len(starts) > 1 and int(starts[-1]) == size,
    )


def is_checked(sidecar: Path | None) -> bool:
    """Return whether `mark_checked` was called for this content."""
    return sidecar is not None and bool(np.load(sidecar, mmap_mode="r")[_CHECKED_AT])


def mark_checked(sidecar: Path | None) -> None:
    """Remember that every line is well formed, where the sidecar can be written."""
    if sidecar is None:
        return
    try:
        entries = np.load(sidecar, mmap_mode="r+")
    except OSError as error:
        logger.info("%s cannot be written (%s): the lines will be checked again", sidecar, error.strerror)
        return
    entries[_CHECKED_AT] = 1
    entries.flush()


def _scan(path: Path, report: Report | None) -> Iterator[Offsets]:
    """Yield the start of every line, then the end of the file, in pieces."""
    size = path.stat().st_size
    done, last = 0, 0
    yield np.zeros(1, dtype=np.int64)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + done + 1
            done += len(chunk)
            last = int(ends[-1]) if len(ends) else last
            yield ends.astype(np.int64)
            if report is not None:
                report(done, size)
    if last != done:  # no newline after the last line
        yield np.array([done], dtype=np.int64)
