"""Hash and lock files, and write files that are either complete or absent."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO, TypedDict

_READ_BYTES = 1 << 22


class FileRecord(TypedDict):
    """What a file must be to count as unchanged."""

    size: int
    sha256: str


def sha256_of_file(
    path: Path, *, max_bytes: int | None = None, on_progress: Callable[[int, int], None] | None = None
) -> str:
    """Return the SHA-256 of a file, or of its first `max_bytes` bytes, as 64 hex digits.

    `on_progress(done, total)` is called with bytes after every 4 MiB. Raises OSError.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    done = 0
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        total = size if max_bytes is None else min(size, max_bytes)
        while done < total and (count := file.readinto(buffer[: total - done])):
            digest.update(buffer[:count])
            done += count
            if on_progress is not None:
                on_progress(done, total)
    return digest.hexdigest()


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; at the end it replaces `path`.

    After a crash at any moment `path` is the old file or the complete new one. An exception leaves `path` as
    it was and removes the temporary file. An OSError that names no file, such as that of a full disk, names
    `path`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with naming_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by this content. A lone surrogate, which UTF-8 cannot represent, is written escaped."""
    with replacing_file(path) as partial:
        partial.write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", errors="backslashreplace")
        )


def write_json_atomically(path: Path, value: object) -> None:
    """Replace `path` by the value as JSON, in UTF-8 and with a final line break."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def lock_file(path: Path, *, taken: Exception) -> Iterator[None]:
    """Hold the lock of a file, which is created with its folder. Raises `taken` if another process has it.

    The message of `taken` gets the number of that process. The holder may remove the file.
    """
    while (file := _lock(path, taken=taken)) is None:
        pass
    with file:
        with naming_file(path):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def _lock(path: Path, *, taken: Exception) -> TextIO | None:
    """Return the open, locked file; None if it was removed before it was locked, and locks nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        try:
            file = opened.enter_context(path.open("a+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_current = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError as error:
            file.seek(0)
            raise type(taken)(f"{taken} (process {file.read() or 'unknown'})") from error
        except FileNotFoundError:
            return None
        if is_current:
            opened.pop_all()
        return file if is_current else None


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file, such as those of writing and flushing."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
