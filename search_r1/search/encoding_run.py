"""Encode a corpus into a file of vectors, in chunks that survive a kill and that several processes share.

The work is in a folder: `run.json` states what is encoded by what, `vectors.f32` holds the rows,
`finished.log` names the chunks whose rows are on disk, `lock` is held while a builder works here. A chunk is
logged only after its rows were synced: what the log names is there, even after a power cut.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from search_r1.search.corpus import Corpus, open_corpus
from search_r1.search.errors import RetrieverError
from search_r1.search.ranking import FloatArray
from search_r1.search.recipes import EncoderSpec
from serving.files import write_json_atomically
from serving.processes import end_with_parent

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from search_r1.search.encoder import TextEncoder

Facts: TypeAlias = dict[str, str | int | bool]
Report: TypeAlias = Callable[[int, int], None]

CHUNK_SIZE = 1024
"""Passages that are encoded between two entries of the log: seconds on a GPU."""
VECTORS_FILE = "vectors.f32"
_STATE_FILE = "run.json"
_FLOAT_BYTES = 4


class VectorFile:
    """Rows of float32 in a raw file: read and written in blocks, so that memory holds one block."""

    def __init__(self, path: Path, *, count: int, dim: int, writable: bool = True) -> None:
        """Open the files; one to write is created, sparse, where there is none."""
        self.shape = (count, dim)
        self._path = path
        self._row_bytes = dim * _FLOAT_BYTES
        if writable:
            path.touch()
            if path.stat().st_size != count * self._row_bytes:
                os.truncate(path, count * self._row_bytes)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> FloatArray:
        """Return [rows, dim], a copy."""
        start, stop, _ = rows.indices(self.shape[0])
        count, offset = max(0, stop - start) * self.shape[1], start * self._row_bytes
        block = np.fromfile(self._path, dtype=np.float32, count=count, offset=offset)
        if block.size != count:
            raise RetrieverError(f"{self._path} ends within row {start + block.size // self.shape[1]}")
        return block.reshape(-1, self.shape[1])

    def write(self, vectors: FloatArray, *, start: int) -> None:
        """Write rows; returns when they are on the disk."""
        with self._path.open("r+b", buffering=0) as file:
            file.seek(start * self._row_bytes)
            content = np.ascontiguousarray(vectors, dtype=np.float32).tobytes()
            while content:
                content = content[file.write(content) :]
            os.fdatasync(file.fileno())


def holds_unfinished(folder: Path) -> bool:
    """Return whether there is encoded work in the folder that a build can continue."""
    return (folder / _STATE_FILE).exists()


class EncodingRun:
    """What of the work in a (locked) folder is done."""

    def __init__(
        self, folder: Path, *, facts: Facts, count: int, dim: int, chunk_size: int, restart: bool
    ) -> None:
        """Continue the work in the folder. `facts`: what the vectors depend on.

        Raises RetrieverError when unfinished work of other facts is there, unless `restart` discards it.
        `chunk_size` is that of the unfinished work where there is any.
        """
        self.folder = folder
        self._log = folder / "finished.log"
        vectors_path = folder / VECTORS_FILE
        described: Facts = {**facts, "count": count, "dim": dim}
        self.chunk_size = self._read_state(described, restart=restart) or chunk_size
        if not vectors_path.exists() or vectors_path.stat().st_size != count * dim * _FLOAT_BYTES:
            self._log.unlink(missing_ok=True)
        self.vectors = VectorFile(vectors_path, count=count, dim=dim)
        self._finished = self._read_log()
        if not holds_unfinished(folder):
            write_json_atomically(folder / _STATE_FILE, {**described, "chunk_size": self.chunk_size})

    @property
    def num_encoded(self) -> int:
        """Return the number of passages whose vectors are on disk."""
        return sum(len(self.rows_of(chunk)) for chunk in self._finished)

    def list_unfinished(self) -> list[int]:
        """Return the numbers of the chunks to encode."""
        total = -(-len(self.vectors) // self.chunk_size)
        return [chunk for chunk in range(total) if chunk not in self._finished]

    def rows_of(self, chunk: int) -> range:
        """Return the rows of the corpus in a chunk."""
        return range(chunk * self.chunk_size, min(len(self.vectors), (chunk + 1) * self.chunk_size))

    def finish(self, chunk: int) -> None:
        """Log a chunk whose rows are on the disk."""
        with self._log.open("a") as file:
            file.write(f"{chunk}\n")
            file.flush()
            os.fsync(file.fileno())
        self._finished.add(chunk)

    def _read_state(self, described: Facts, *, restart: bool) -> int | None:
        """Return the chunk size of the work in the folder; None where there is none that counts."""
        path = self.folder / _STATE_FILE
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            recorded = None
        if isinstance(recorded, dict) and not restart:
            chunk_size = recorded.pop("chunk_size", None)
            names = sorted({*described, *recorded})
            differing = [name for name in names if described.get(name) != recorded.get(name)]
            if not differing:
                return int(chunk_size)
            name = differing[0]
            raise RetrieverError(
                f"{self.folder} holds unfinished work of another build ({name}: {recorded.get(name)!r} "
                f"there, {described.get(name)!r} now); finish that one, or discard it with --restart"
            )
        for name in (path, self._log, self.folder / VECTORS_FILE):
            name.unlink(missing_ok=True)
        return None

    def _read_log(self) -> set[int]:
        """Return the finished chunks; a last line without its end was cut off by a kill and is removed."""
        if not self._log.exists():
            return set()
        text = self._log.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) != len(text):
            os.truncate(self._log, len(whole))
        return {int(line) for line in whole.split()}


def encode_here(
    run: EncodingRun, *, corpus: Corpus, encoder: TextEncoder, batch_size: int, report: Report
) -> None:
    """Encode what is missing, in this process."""
    for chunk in run.list_unfinished():
        rows = run.rows_of(chunk)
        texts = [corpus[row].contents for row in rows]
        run.vectors.write(encoder.encode_passages(texts, batch_size=batch_size), start=rows.start)
        run.finish(chunk)
        report(run.num_encoded, len(run.vectors))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingJob:
    """What every encoding process needs."""

    corpus_path: Path
    spec: EncoderSpec
    batch_size: int
    num_threads: int | None
    """Of each process."""


def encode_in_processes(
    run: EncodingRun, job: EncodingJob, *, devices: Sequence[str | None], report: Report
) -> None:
    """Encode what is missing, with one process per entry of `devices`.

    Raises RetrieverError when one of them fails; what was finished stays finished.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    free_devices: Queue[str | None] = context.Queue()
    for device in devices:
        free_devices.put(device)
    executor = ProcessPoolExecutor(
        len(devices), mp_context=context, initializer=_start_worker, initargs=(job, run.vectors, free_devices)
    )
    try:
        futures = {
            executor.submit(_encode_rows, run.rows_of(chunk)): chunk for chunk in run.list_unfinished()
        }
        for future in as_completed(futures):
            future.result()
            run.finish(futures[future])
            report(run.num_encoded, len(run.vectors))
    except BrokenProcessPool as error:
        raise RetrieverError(
            "an encoding process was killed (out of memory?); start again: what is encoded stays"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)
        free_devices.close()


class _Worker:
    """The state of one encoding process."""

    def __init__(self, job: EncodingJob, vectors: VectorFile, device: str | None) -> None:
        self.job = job
        self.vectors = vectors
        self.corpus = open_corpus(job.corpus_path)  # before the libraries, which take seconds

        import torch

        from search_r1.search.encoder import TextEncoder

        if job.num_threads is not None:
            torch.set_num_threads(job.num_threads)
        self.encoder = TextEncoder(job.spec, device=device)


_make_worker: Callable[[], _Worker] | None = None
_worker: _Worker | None = None


def _start_worker(job: EncodingJob, vectors: VectorFile, free_devices: Queue[str | None]) -> None:
    """Take a device; the models are loaded with the first chunk, whose failure reaches the parent."""
    global _make_worker
    end_with_parent()
    device = free_devices.get()
    _make_worker = lambda: _Worker(job, vectors, device)  # noqa: E731


def _encode_rows(rows: range) -> None:
    global _worker
    if _worker is None:
        assert _make_worker is not None
        _worker = _make_worker()
    texts = [_worker.corpus[row].contents for row in rows]
    vectors = _worker.encoder.encode_passages(texts, batch_size=_worker.job.batch_size)
    _worker.vectors.write(vectors, start=rows.start)
