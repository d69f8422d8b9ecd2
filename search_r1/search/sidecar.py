"""Tables about a large file, made once and kept beside it as `<file>.<kind>.npy`, memory-mapped.

A sidecar is a plain array of int64: seven entries that tell which file it is about, then the table. It is
valid only while size, time of change and fingerprint of the file are the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from serving.files import replacing_file

logger = logging.getLogger(__name__)

Entries: TypeAlias = npt.NDArray[np.int64]

SIDECAR_FROM_BYTES = 1 << 26
"""What is made of smaller files stays in memory: it takes about a second."""
FLAG = 2
"""The entry of the header that may change later."""
_VERSION = 1
_HEADER = 7
_CACHE = Path("~/.cache/inforeasoner")


def keep_table(
    path: Path,
    *,
    kind: str,
    fingerprint: str,
    make: Callable[[], Iterator[Entries]],
    is_whole: Callable[[Entries], bool],
) -> tuple[Entries, Path | None]:
    """Return the table that the pieces of `make` join to, and its sidecar, if any.

    The first time the pieces are written one by one, so that memory does not grow with the file; later the
    sidecar is opened, unless `is_whole` is false of its table. Where neither the file's folder nor the user's
    cache folder can be written, the table stays in memory.
    """
    if path.stat().st_size < SIDECAR_FROM_BYTES:
        return _join(make()), None
    header = _make_header(path, fingerprint)
    places = [path.with_name(f"{path.name}.{kind}.npy")]
    with suppress(RuntimeError):  # a user without a home, as in some containers
        places.append(_locate_cached(path, kind))
    for sidecar in places:
        table = _open_sidecar(sidecar, header=header)
        if table is not None and is_whole(table):
            return table, sidecar
        try:
            logger.info("making %s, once", sidecar.name)
            _write_sidecar(sidecar, header=header, pieces=make())
            return np.load(sidecar, mmap_mode="r")[_HEADER:], sidecar
        except OSError as error:
            logger.info("no %s can be kept in %s (%s)", kind, sidecar, error.strerror)
    logger.warning("the %s of %s stay in memory and are made at every start", kind, path)
    return _join(make()), None


def _join(pieces: Iterable[Entries]) -> Entries:
    return np.concatenate([np.zeros(0, np.int64), *pieces])


def _locate_cached(path: Path, kind: str) -> Path:
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return _CACHE.expanduser() / kind / f"{path.name}.{place}.{kind}.npy"


def _make_header(path: Path, fingerprint: str) -> Entries:
    facts = path.stat()
    digest = np.frombuffer(bytes.fromhex(fingerprint), dtype="<i8")
    return np.array([_VERSION, facts.st_size, 0, facts.st_mtime_ns, *digest[:3]], dtype=np.int64)


def _open_sidecar(sidecar: Path, *, header: Entries) -> Entries | None:
    """Return the table; None unless it is there, readable, and about this very file."""
    if not sidecar.is_file():
        return None
    try:
        entries = np.load(sidecar, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s cannot be read (%s): it is made again", sidecar, error)
        return None
    if entries.dtype != np.int64 or entries.ndim != 1 or len(entries) < _HEADER:
        return None
    found = entries[:_HEADER].copy()
    found[FLAG] = 0
    table: Entries = entries[_HEADER:]
    return table if np.array_equal(found, header) else None


def _write_sidecar(sidecar: Path, *, header: Entries, pieces: Iterable[Entries]) -> None:
    with replacing_file(sidecar) as partial, partial.open("wb") as file:
        _write_npy_header(file, 0)
        length = file.tell()
        file.write(header.astype("<i8").tobytes())
        count = _HEADER
        for piece in pieces:
            file.write(piece.astype("<i8").tobytes())
            count += len(piece)
        file.seek(0)
        _write_npy_header(file, count)
        assert file.tell() == length  # numpy leaves room for the number to grow


def _write_npy_header(file: BinaryIO, count: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (count,)})
