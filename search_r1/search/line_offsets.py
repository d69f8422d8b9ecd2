"""Where the lines of a file start, found once and kept beside it: `<file>.offsets.npy`, memory-mapped.

The sidecar is a plain array of int64: seven entries that tell which file it is about, then the start of every
line and the end of the last one. It is valid only while size, time of change and fingerprint are the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from serving.files import replacing_file

logger = logging.getLogger(__name__)

Offsets: TypeAlias = npt.NDArray[np.int64]
Report: TypeAlias = Callable[[int, int], None]

SIDECAR_FROM_BYTES = 1 << 26
"""Smaller files are scanned at every opening, in a tenth of a second."""
_VERSION = 1
_HEADER = 7
_CHECKED_AT = 2  # entry of the header: every line was parsed once and is well formed
_CHUNK_BYTES = 1 << 24
_CACHE = Path("~/.cache/inforeasoner/offsets")


def find_line_starts(
    path: Path, *, fingerprint: str, report: Report | None = None
) -> tuple[Offsets, Path | None]:
    """Return line starts and the end of the file [lines + 1], and the sidecar that holds them, if any.

    The first time this reads the file (about a second per GB), later it opens the sidecar. Where neither the
    file's folder nor the user's cache folder can be written, the offsets stay in memory: 8 bytes a line.
    `report(done, total)` in bytes.
    """
    if path.stat().st_size < SIDECAR_FROM_BYTES:
        return np.concatenate(list(_scan(path, report))), None
    header = _make_header(path, fingerprint)
    places = [path.with_name(path.name + ".offsets.npy")]
    with suppress(RuntimeError):  # a user without a home, as in some containers
        places.append(_locate_cached(path))
    for sidecar in places:
        if (starts := _open_sidecar(sidecar, header=header)) is not None:
            return starts, sidecar
        try:
            logger.info("indexing the lines of %s, once", path)
            _write_sidecar(path, sidecar, header=header, report=report)
            return np.load(sidecar, mmap_mode="r")[_HEADER:], sidecar
        except OSError as error:
            logger.info("no line offsets can be kept in %s (%s)", sidecar, error.strerror)
    logger.warning("line offsets of %s stay in memory and are made at every start", path)
    return np.concatenate(list(_scan(path, report))), None


def is_checked(sidecar: Path | None) -> bool:
    """Tell whether `mark_checked` was called for this content."""
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


def _locate_cached(path: Path) -> Path:
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return _CACHE.expanduser() / f"{path.name}.{place}.offsets.npy"


def _make_header(path: Path, fingerprint: str) -> Offsets:
    facts = path.stat()
    digest = np.frombuffer(bytes.fromhex(fingerprint), dtype="<i8")
    return np.array([_VERSION, facts.st_size, 0, facts.st_mtime_ns, *digest[:3]], dtype=np.int64)


def _open_sidecar(sidecar: Path, *, header: Offsets) -> Offsets | None:
    """Return None unless it is there, whole, and about this very file."""
    if not sidecar.is_file():
        return None
    try:
        entries = np.load(sidecar, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s cannot be read (%s): it is made again", sidecar, error)
        return None
    if entries.dtype != np.int64 or entries.ndim != 1 or len(entries) < _HEADER + 2:
        return None
    found = entries[:_HEADER].copy()
    found[_CHECKED_AT] = 0
    starts: Offsets = entries[_HEADER:]
    return starts if np.array_equal(found, header) and int(starts[-1]) == header[1] else None


def _write_sidecar(path: Path, sidecar: Path, *, header: Offsets, report: Report | None) -> None:
    """Write it a chunk at a time: memory does not grow with the file."""
    with replacing_file(sidecar) as partial, partial.open("wb") as file:
        _write_npy_header(file, 0)
        length = file.tell()
        file.write(header.astype("<i8").tobytes())
        count = _HEADER
        for starts in _scan(path, report):
            file.write(starts.astype("<i8").tobytes())
            count += len(starts)
        file.seek(0)
        _write_npy_header(file, count)
        assert file.tell() == length  # numpy leaves room for the number to grow


def _write_npy_header(file: BinaryIO, count: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (count,)})


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
