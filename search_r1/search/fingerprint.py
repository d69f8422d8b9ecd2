"""Which file is this: a fingerprint in milliseconds for every start, the whole hash for whoever has the time.

A fingerprint reads at most 3 MiB, whatever the size. It tells a file from another one, or from a truncated or
half-copied one; a flipped bit somewhere in the middle of gigabytes it may miss. `index verify` reads it all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serving.files import sha256_of_file

_END_BYTES = 1 << 20
_NUM_BLOCKS = 256
_BLOCK_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What identifies a file's content."""

    bytes: int
    fingerprint: str
    sha256: str


def fingerprint(path: Path) -> str:
    """SHA-256 over size, first MiB, last MiB and 256 evenly spaced blocks of 4 KiB, as 64 hex digits."""
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
    """Reads the whole file."""
    return FileFacts(
        bytes=path.stat().st_size,
        fingerprint=fingerprint(path),
        sha256=sha256_of_file(path, on_progress=report),
    )
