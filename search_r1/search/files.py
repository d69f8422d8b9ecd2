"""Identify files and detect changes: fingerprints, hashes, and a check of files in use.

A fingerprint reads at most 3 MiB, whatever the size. It differs between files, and for a truncated or
half-copied one; it may miss a flipped bit in the middle of gigabytes. `index verify` reads every byte.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from search_r1.search.errors import ChangedFileError
from serving.files import sha256_of_file

_END_BYTES = 1 << 20
_NUM_BLOCKS = 256
_BLOCK_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """Size and hashes of a file's content."""

    bytes: int
    fingerprint: str
    sha256: str


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of size, first MiB, last MiB and 256 evenly spaced blocks of 4 KiB, in hex."""
    with path.open("rb") as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        digest = hashlib.sha256(f"{size} ".encode())
        digest.update(os.pread(descriptor, _END_BYTES, 0))
        digest.update(os.pread(descriptor, _END_BYTES, max(0, size - _END_BYTES)))
        for block in range(_NUM_BLOCKS):
            digest.update(os.pread(descriptor, _BLOCK_BYTES, size * block // _NUM_BLOCKS))
    return digest.hexdigest()


def describe_file(path: Path, *, report: Callable[[int, int], None] | None = None) -> FileFacts:
    """Return the facts of a file, all of which is read; `report(done, total)` in bytes."""
    return FileFacts(
        bytes=path.stat().st_size,
        fingerprint=fingerprint(path),
        sha256=sha256_of_file(path, on_progress=report),
    )


def list_changed_files(files: Mapping[str, FileFacts], folder: Path, *, full: bool = False) -> list[str]:
    """Return one line for every file that is missing or not the recorded one; `full` reads every byte."""
    problems = []
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"files.{name}: missing in {folder}; copy it there too")
        elif (size := path.stat().st_size) != facts.bytes:
            problems.append(f"files.{name}.bytes: index was built with {facts.bytes}, found {size}")
        elif (found := fingerprint(path)) != facts.fingerprint:
            problems.append(
                f"files.{name}.fingerprint: index was built with {facts.fingerprint}, found {found}"
            )
        elif full and (found := sha256_of_file(path)) != facts.sha256:
            problems.append(f"files.{name}.sha256: index was built with {facts.sha256}, found {found}")
    return problems


def compare_facts(pairs: Sequence[tuple[str, object, object]], *, fix: str = "") -> list[str]:
    """Return one line for every (name, recorded, found) that differs, with the fix."""
    return [
        f"{name}: index was built with {old!r}, found {new!r}" + (f"; {fix}" if fix else "")
        for name, old, new in pairs
        if old != new
    ]


class WatchedFile:
    """Holds a file open and compares its size and time of change with those at its opening.

    A mapped file that was truncated kills the process that reads behind its new end (SIGBUS); one that was
    rewritten in place gives other bytes. A file that is replaced by renaming stays as it was for its readers.
    """

    def __init__(self, path: Path, *, size_only: bool = False) -> None:
        """Open the file. `size_only` allows others to write into it, but not to shorten it."""
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
            f"{self.path} {how} since it was opened, expected no change in place; restore it, or rebuild "
            "what was made of it, and restart (mv replaces a file in use safely, cp does not)"
        )

    def close(self) -> None:
        """Close the file."""
        self._finalize()
