"""A file that is read while it is served: whether it is still what was opened.

A memory-mapped file that was cut short kills the process that looks behind its new end (SIGBUS); one that was
rewritten in place gives other bytes. A file that is replaced by renaming stays what it was for its readers.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from search_r1.search.errors import ChangedFileError


class WatchedFile:
    """Holds a file open and compares its size and time of change with those it was opened with."""

    def __init__(self, path: Path, *, size_only: bool = False) -> None:
        """`size_only`: others may write into the file, but not shorten it."""
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size_only = size_only
        self._opened = os.fstat(self.descriptor)
        self._finalize = weakref.finalize(self, os.close, self.descriptor)

    def check(self) -> None:
        """Raise ChangedFileError if the file was truncated or written; takes about a microsecond."""
        opened, found = self._opened, os.fstat(self.descriptor)
        if found.st_size == opened.st_size and (self._size_only or found.st_mtime_ns == opened.st_mtime_ns):
            return
        is_as_long = found.st_size == opened.st_size
        how = "was rewritten" if is_as_long else f"had {opened.st_size:,} bytes and has {found.st_size:,}"
        raise ChangedFileError(
            f"{self.path} {how} since it was opened, expected no change in place; restore it, or build again "
            "what was made of it, and restart (mv replaces a file in use safely, cp does not)"
        )

    def close(self) -> None:
        """Close the file."""
        self._finalize()
