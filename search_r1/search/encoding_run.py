"""Encode a corpus into a file of vectors, in chunks that survive a kill and that several processes share.

The work lies in a folder: `run.json` says what is encoded by what, `vectors.f32` holds the rows,
`finished.log` names the chunks whose rows are on disk, `lock` is held while a builder works here. A chunk is
logged only after its rows were synced: whatever the log names is there, even after a power cut.
"""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from search_r1.search.corpus import Corpus, open_corpus
from search_r1.search.errors import RetrieverError
from serving.files import write_json_atomically

if TYPE_CHECKING:
    from search_r1.search.encoder import TextEncoder

logger = logging.getLogger(__name__)

FloatArray: TypeAlias = npt.NDArray[np.float32]
Facts: TypeAlias = dict[str, str | int | bool]
ChunkReport: TypeAlias = Callable[[int, int], None]

CHUNK_SIZE = 1024
"""Passages that are encoded between two looks at the log: seconds on a GPU."""
VECTORS_FILE = "vectors.f32"
_STATE_FILE = "run.json"
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """How to load the encoder, in whatever process."""

    path: str
    retriever_name: str | None = None
    use_fp16: bool | None = None
    max_length: int | None = None
    pooling: str | None = None
    query_prefix: str | None = None
    passage_prefix: str | None = None
    normalised: bool | None = None

    def load(self, device: str | None) -> TextEncoder:
        """Raises RetrieverError."""
        from search_r1.search.encoder import TextEncoder  # seconds of imports

        return TextEncoder(**asdict(self), device=device)


class VectorFile:
    """Rows of float32 in a raw file: read and written in blocks, never mapped, so memory holds one block."""

    def __init__(self, path: Path, *, count: int, dim: int, writable: bool = True) -> None:
        """A file to write is made, sparse, where there is none."""
        self.shape = (count, dim)
        self._path = path
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
        if writable and os.fstat(self._descriptor).st_size != self.num_bytes:
            os.truncate(self._descriptor, self.num_bytes)

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return self.shape[1] * _FLOAT_BYTES

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> FloatArray:
        """[rows, dim], a copy."""
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        block = np.empty((max(0, stop - start), self.shape[1]), dtype=np.float32)
        view, done = block.reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], start * self._row_bytes + done)
            if not count:
                raise RetrieverError(f"{self._path} ends within row {start + done // self._row_bytes}")
            done += count
        return block

    def write(self, vectors: FloatArray, *, start: int) -> None:
        """Returns when the rows are on the disk."""
        view, done = np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], start * self._row_bytes + done)
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def lock_folder(folder: Path) -> int:
    """Make the folder and hold it until the returned descriptor is closed or this process ends.

    Raises RetrieverError when another process holds it.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise RetrieverError(
                f"another builder (process {holder or '?'}) is at work in {folder}; let it end or stop it"
            ) from error
        # The one before us may have removed the folder between our opening and our lock.
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        os.close(descriptor)


def holds_unfinished(folder: Path) -> bool:
    """Whether there is encoded work in the folder that a build can go on with."""
    return (folder / _STATE_FILE).exists()


class EncodingRun:
    """What of the work in a (locked) folder is done."""

    def __init__(
        self, folder: Path, *, facts: Facts, count: int, dim: int, chunk_size: int, restart: bool
    ) -> None:
        """Goes on with what lies there. `facts`: what the vectors depend on.

        Raises RetrieverError when unfinished work of other facts lies there, unless `restart` throws it away.
        `chunk_size` is that of the unfinished work where there is any.
        """
        self.folder = folder
        self.vectors_path = folder / VECTORS_FILE
        self._log = folder / "finished.log"
        described: Facts = {**facts, "count": count, "dim": dim}
        self.chunk_size = self._read_state(described, restart=restart) or chunk_size
        if not self.vectors_path.exists() or self.vectors_path.stat().st_size != count * dim * _FLOAT_BYTES:
            self._log.unlink(missing_ok=True)
        self.vectors = VectorFile(self.vectors_path, count=count, dim=dim)
        self._finished = self._read_log()
        if not holds_unfinished(folder):
            write_json_atomically(folder / _STATE_FILE, {**described, "chunk_size": self.chunk_size})

    @property
    def num_encoded(self) -> int:
        """Passages."""
        return sum(len(self.rows_of(chunk)) for chunk in self._finished)

    def list_unfinished(self) -> list[int]:
        """Numbers of the chunks to encode."""
        total = -(-len(self.vectors) // self.chunk_size)
        return [chunk for chunk in range(total) if chunk not in self._finished]

    def rows_of(self, chunk: int) -> range:
        return chunk_rows(chunk, chunk_size=self.chunk_size, count=len(self.vectors))

    def finish(self, chunk: int) -> None:
        """Log a chunk whose rows are on the disk."""
        with self._log.open("a") as file:
            file.write(f"{chunk}\n")
            file.flush()
            os.fsync(file.fileno())
        self._finished.add(chunk)

    def close(self) -> None:
        self.vectors.close()

    def _read_state(self, described: Facts, *, restart: bool) -> int | None:
        """Chunk size of the work that lies here; None where there is none, or none worth keeping."""
        path = self.folder / _STATE_FILE
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            recorded = None
        if isinstance(recorded, dict) and not restart:
            chunk_size = recorded.pop("chunk_size", None)
            differing = sorted(
                name for name in {*described, *recorded} if described.get(name) != recorded.get(name)
            )
            if not differing:
                return int(chunk_size)
            name = differing[0]
            raise RetrieverError(
                f"{self.folder} holds unfinished work of another build ({name}: {recorded.get(name)!r} "
                f"there, {described.get(name)!r} now); finish that one, or throw it away with --restart"
            )
        for name in (path, self._log, self.vectors_path):
            name.unlink(missing_ok=True)
        return None

    def _read_log(self) -> set[int]:
        """A last line without its end was cut off by a kill: it does not count and goes."""
        if not self._log.exists():
            return set()
        text = self._log.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) != len(text):
            os.truncate(self._log, len(whole))
        return {int(line) for line in whole.split()}


def chunk_rows(chunk: int, *, chunk_size: int, count: int) -> range:
    """Rows of the corpus in a chunk."""
    return range(chunk * chunk_size, min(count, (chunk + 1) * chunk_size))


def encode_here(
    run: EncodingRun, *, corpus: Corpus, encoder: TextEncoder, batch_size: int, report: ChunkReport
) -> None:
    """Encode what is missing, in this process."""
    for chunk in run.list_unfinished():
        rows = run.rows_of(chunk)
        run.vectors.write(_encode_rows(rows, corpus, encoder, batch_size=batch_size), start=rows.start)
        run.finish(chunk)
        report(run.num_encoded, len(run.vectors))


def encode_in_processes(
    run: EncodingRun,
    *,
    corpus_path: Path,
    spec: EncoderSpec,
    devices: Sequence[str | None],
    num_threads: int | None,
    batch_size: int,
    report: ChunkReport,
) -> None:
    """One process per entry of `devices` takes a chunk whenever it is free; `num_threads` is of each.

    Raises RetrieverError when one of them fails; what was finished stays finished.
    """
    waiting = run.list_unfinished()[::-1]
    job = _Job(
        corpus_path=corpus_path,
        vectors_path=run.vectors_path,
        shape=run.vectors.shape,
        chunk_size=run.chunk_size,
        spec=spec,
        batch_size=batch_size,
        num_threads=num_threads,
    )
    started = [_start_worker(job, device) for device in devices[: len(waiting)]]
    workers = started.copy()
    try:
        while workers:
            for connection in wait([connection for connection, _ in workers]):
                assert isinstance(connection, Connection)
                _take_report(connection, workers, run=run)
                report(run.num_encoded, len(run.vectors))
                if waiting:
                    connection.send(waiting.pop())
                else:
                    connection.close()
                    workers = [worker for worker in workers if worker[0] is not connection]
    finally:
        for connection, process in workers:  # empty when all went well
            connection.close()
            process.kill()
        for _, process in started:
            process.join()


_Worker: TypeAlias = tuple[Connection, BaseProcess]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    corpus_path: Path
    vectors_path: Path
    shape: tuple[int, int]
    chunk_size: int
    spec: EncoderSpec
    batch_size: int
    num_threads: int | None


def _start_worker(job: _Job, device: str | None) -> _Worker:
    context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, job, device), daemon=True, name=f"encode {device}")
    process.start()
    theirs.close()  # so that an end on either side is seen on the other
    return ours, process


def _take_report(connection: Connection, workers: Sequence[_Worker], *, run: EncodingRun) -> None:
    """A worker says None when it is ready, then the number of each chunk it wrote; text when it cannot."""
    try:
        said = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process = next(process for known, process in workers if known is connection)
        process.join(10.0)
        raise RetrieverError(
            f"the process {process.name!r} ended with status {process.exitcode} (-9: killed, for want of "
            "memory?); start again: what is encoded stays"
        ) from error
    if isinstance(said, str):
        raise RetrieverError(said)
    if said is not None:
        run.finish(said)


def _work(connection: Connection, job: _Job, device: str | None) -> None:
    """Runs in a process of its own, until the other side is gone."""
    import torch

    if job.num_threads is not None:
        torch.set_num_threads(job.num_threads)
    count, dim = job.shape
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            corpus = open_corpus(job.corpus_path)
            encoder = job.spec.load(device)
            vectors = VectorFile(job.vectors_path, count=count, dim=dim)
            connection.send(None)
            while True:
                chunk = connection.recv()
                rows = chunk_rows(chunk, chunk_size=job.chunk_size, count=count)
                vectors.write(
                    _encode_rows(rows, corpus, encoder, batch_size=job.batch_size), start=rows.start
                )
                connection.send(chunk)
        except RetrieverError as error:
            connection.send(str(error))


def _encode_rows(rows: range, corpus: Corpus, encoder: TextEncoder, *, batch_size: int) -> FloatArray:
    return encoder.encode_passages([corpus[row].contents for row in rows], batch_size=batch_size)


def check_disk(folder: Path, *, needed: int) -> None:
    """Raises RetrieverError when fewer than `needed` bytes (and a tenth of a GB) are free."""
    free = shutil.disk_usage(folder).free
    if free < needed + 100_000_000:
        raise RetrieverError(
            f"the build needs {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free; make room, or "
            "name another place with --save_dir or --index_path"
        )
