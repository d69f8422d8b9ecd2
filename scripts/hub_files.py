"""Remote files onto the disk: resumed where they broke off, joined while they arrive, checked, unpacked."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import httpx
from hub import Digest, DownloadError, Hasher, Hub, PassingError, RemoteFile

_BLOCK = 1 << 20

Show: TypeAlias = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""From a label and a number of bytes to a meter, which is told how many of them are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of a file and what it should be."""

    label: str
    size: int
    digest: Digest | None


class PartDownload:
    """Brings one remote file into `stream`, where it begins at byte `start` and ends the stream."""

    def __init__(
        self,
        hub: Hub,
        remote: RemoteFile,
        *,
        stream: BinaryIO,
        start: int,
        report: Callable[[int], None],
    ) -> None:
        """`report` is told how many bytes are there, whenever that changes."""
        self._hub = hub
        self._remote = remote
        self._stream = stream
        self._start = start
        self._report = report
        self._was_resumed = False
        self._begin()

    def run(self) -> None:
        """Resume, complete, check. What is there is as good as before when DownloadError is raised."""
        self._read_present()
        self._load_rest()
        # What another run left may come from another file: one fresh attempt tells.
        if not self._is_right() and self._was_resumed:
            self._truncate()
            self._load_rest()
        if self._is_right():
            return
        found = self._hasher.hexdigest()
        self._truncate()
        digest = self._remote.digest
        assert digest is not None
        raise DownloadError(
            f"{self._remote.name}: the {digest.kind} of what {self._remote.url} sent is {found}, expected "
            f"{digest.value}; the bytes were thrown away: run again, or name another --endpoint"
        )

    def _begin(self) -> None:
        self._have = 0
        digest = self._remote.digest
        self._hasher: Hasher = digest.new_hasher(self._remote.size) if digest else hashlib.sha256()

    def _is_right(self) -> bool:
        digest = self._remote.digest
        return digest is None or self._hasher.hexdigest() == digest.value

    def _truncate(self) -> None:
        self._stream.truncate(self._start)
        self._stream.seek(self._start)
        self._begin()
        self._report(0)

    def _read_present(self) -> None:
        self._stream.seek(self._start)
        while self._have < self._remote.size:
            block = self._stream.read(min(_BLOCK, self._remote.size - self._have))
            if not block:
                break
            self._count(block)
        self._was_resumed = self._have > 0
        self._stream.truncate(self._start + self._have)
        self._stream.seek(self._start + self._have)

    def _load_rest(self) -> None:
        if self._have < self._remote.size:
            self._hub.insist(self._load_once, progress=lambda: self._have)

    def _load_once(self) -> RemoteFile:
        remote = self._remote
        with self._hub.open(remote, start=self._have) as answer:
            if answer.status_code == 416:
                self._truncate()
            if answer.status_code not in (200, 206):
                self._hub.refuse(remote.name, remote.url, answer)
            self._meet(answer)
            for block in answer.iter_raw():
                room = remote.size - self._have
                self._stream.write(block[:room])
                self._count(block[:room])
                if len(block) > room:
                    raise PassingError(f"{remote.name}: {remote.url} sent more than {remote.size} bytes")
        if self._have < remote.size:
            raise PassingError(f"{remote.name}: {remote.url} ended after {self._have} of {remote.size} bytes")
        return remote

    def _meet(self, answer: httpx.Response) -> None:
        """Be where the server begins: where we are, or at the beginning, whatever was asked for."""
        remote = self._remote
        begins_at = 0
        if answer.status_code == 206:
            told = answer.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", told)
            if not match or match[2] not in ("*", str(remote.size)) or int(match[1]) not in (0, self._have):
                expected = f"'bytes {self._have}-{remote.size - 1}/{remote.size}'"
                self._truncate()  # so that the next attempt asks for the whole
                raise PassingError(
                    f"{remote.name}: {remote.url} sent Content-Range {told!r}, expected {expected}"
                )
            begins_at = int(match[1])
        if begins_at != self._have:
            self._truncate()
        self._was_resumed |= self._have > 0
        length = answer.headers.get("Content-Length")
        if length is not None and length != str(remote.size - self._have):
            expected = f"expected {remote.size - self._have}"
            raise PassingError(f"{remote.name}: {remote.url} announces {length} bytes, {expected}")

    def _count(self, block: bytes) -> None:
        self._hasher.update(block)
        self._have += len(block)
        self._report(self._have)


def join_parts(hub: Hub, remotes: Sequence[RemoteFile], *, partial: Path, show: Show) -> None:
    """Append part after part to `partial`, or go on with it. Notes beside it say which ones are complete.

    The room of the parts is all that is taken. Raises DownloadError; what is there is kept.
    """
    notes = locate_notes(partial)
    source = [_describe(remote) for remote in remotes]
    ends = [sum(remote.size for remote in remotes[: i + 1]) for i in range(len(remotes))]
    num_done = _read_notes(notes, source)
    present = partial.stat().st_size if partial.is_file() and num_done is not None else 0
    if num_done is None or (num_done and present < ends[num_done - 1]):
        num_done, present = 0, 0
    with partial.open("r+b" if present else "w+b") as stream:
        write_json(notes, {"source": source, "num_done": num_done})
        for i in range(num_done, len(remotes)):
            with show(remotes[i].name, remotes[i].size) as report:
                start = ends[i] - remotes[i].size
                PartDownload(hub, remotes[i], stream=stream, start=start, report=report).run()
            stream.flush()
            os.fsync(stream.fileno())
            write_json(notes, {"source": source, "num_done": i + 1})


def locate_notes(partial: Path) -> Path:
    """`<file>.partial.json`"""
    return partial.with_name(partial.name + ".json")


def locate_partial(path: Path) -> Path:
    """`<file>.partial`, which becomes `path` when it is complete."""
    return path.with_name(path.name + ".partial")


def find_fault(path: Path, pieces: Sequence[Piece], *, show: Show) -> str | None:
    """What is wrong with a file that should consist of `pieces`: value and expectation. Reads all of it."""
    size, expected = path.stat().st_size, sum(piece.size for piece in pieces)
    if size != expected:
        return f"{path} has {size:,} bytes, expected {expected:,}"
    with path.open("rb") as stream:
        for piece in pieces:
            found = _hash(stream, piece, show=show)
            if piece.digest is not None and found != piece.digest.value:
                kind = f"the {piece.digest.kind} of {piece.label}"
                return f"{path}: {kind} is {found}, expected {piece.digest.value}"
    return None


def unpack(archive: Path, partial: Path, *, show: Show) -> Piece:
    """Raises DownloadError for what is no whole gzip file."""
    hasher = hashlib.sha256()
    try:
        with (
            show(f"unpack {archive.name}", archive.stat().st_size) as report,
            archive.open("rb") as packed,
            gzip.open(packed) as text,
            partial.open("wb") as out,
        ):
            while block := text.read(_BLOCK):
                out.write(block)
                hasher.update(block)
                report(packed.tell())
            if not packed.tell():
                raise EOFError("it is empty")
            out.flush()
            os.fsync(out.fileno())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        partial.unlink(missing_ok=True)
        raise DownloadError(
            f"{archive} cannot be unpacked ({error}); expected a whole gzip file: delete it and run again"
        ) from error
    digest = Digest(kind="sha256", value=hasher.hexdigest())
    return Piece(label=archive.name.removesuffix(".gz"), size=partial.stat().st_size, digest=digest)


def write_json(path: Path, content: object) -> None:
    """All of it or nothing."""
    partial = locate_partial(path)
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def _hash(stream: BinaryIO, piece: Piece, *, show: Show) -> str:
    hasher = piece.digest.new_hasher(piece.size) if piece.digest else hashlib.sha256()
    done = 0
    with show(f"check {piece.label}", piece.size) as report:
        while done < piece.size and (block := stream.read(min(piece.size - done, _BLOCK))):
            hasher.update(block)
            done += len(block)
            report(done)
    return hasher.hexdigest()


def _describe(remote: RemoteFile) -> dict[str, object]:
    """What bytes of two runs must have in common to be put into one file."""
    return {"name": remote.name, "size": remote.size, "hash": remote.digest and remote.digest.value}


def _read_notes(path: Path, source: list[dict[str, object]]) -> int | None:
    """How many parts are complete; None when they are of something else, or nobody took notes."""
    try:
        notes = json.loads(path.read_text())
        return int(notes["num_done"]) if notes["source"] == source else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
