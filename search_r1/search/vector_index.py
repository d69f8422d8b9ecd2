"""Open a vector index of any kind for search, and search exactly by torch.

    index = open_index(Path("e5.index"))
    scores, rows = index.search(queries, topk=3)

Similarity is the inner product. Results are ordered by score, equal scores by row.

On a CPU the vectors stay where they are (memory-mapped) and are decoded one block at a time, once for all
queries of a batch; on GPUs they are held as float16, in one shard per GPU. The candidates are scored again by
`ranking.rescore`, so that scores and order do not depend on the batch, the block or the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from search_r1.search import faiss_index
from search_r1.search.errors import RetrieverError
from search_r1.search.faiss_index import StoredVectors
from search_r1.search.kinds import SCANNED_KINDS, Device, IndexKind, SearchOptions
from search_r1.search.ranking import FloatArray, RowArray, VectorSource, order_hits, read_blocks, rescore
from search_r1.search.scan import Best, scan

_BLOCK_ROWS = 8192
_SPARE_CANDIDATES = 16
"""Found beyond `topk`: matrix products order vectors that are nearly equal by chance."""
_GPU_SPARE_CANDIDATES = 64
_MANY_EQUAL = 1024
"""Found beyond `topk` where the spare ones are all equal, as copies of a passage are."""


class VectorIndex(Protocol):
    """Vectors to search. Calls come from one thread at a time."""

    kind: IndexKind
    dim: int

    def __len__(self) -> int:
        """Return the number of vectors."""
        ...

    def search(self, vectors: FloatArray, *, topk: int) -> tuple[FloatArray, RowArray]:
        """Return scores and rows [n, topk] of queries [n, dim], best first, padded with -inf and row -1."""
        ...

    def describe(self) -> Mapping[str, str | int]:
        """Return kind, size and what the answers depend on."""
        ...


def set_num_threads(count: int) -> None:
    """Set the threads that Faiss and torch search with, in the whole process."""
    faiss_index.set_num_threads(count)
    torch.set_num_threads(count)


def open_index(
    path: Path, *, mmap: bool = True, device: Device = "cpu", search: SearchOptions | None = None
) -> VectorIndex:
    """Open a Faiss file; its kind is read off the file.

    `mmap`: leave the vectors on disk, where the system caches what is used. Raises RetrieverError when the
    file is missing, damaged, or cannot be searched on the device.
    """
    if not path.is_file():
        raise RetrieverError(f"index {path} is not a file; build it first (see `index build --help`)")
    kind = faiss_index.read_kind(path)
    if device == "torch" and kind not in SCANNED_KINDS:
        raise RetrieverError(
            f"index {path} is of kind {kind}; exact search by torch reads {', '.join(SCANNED_KINDS)}: "
            "build one of these or search on the CPU"
        )
    if kind in SCANNED_KINDS and device != "faiss_gpu":
        return open_exact(path, mmap=mmap, on_gpu=device == "torch")
    return faiss_index.open_faiss(
        path, mmap=mmap, on_gpu=device == "faiss_gpu", search=search or SearchOptions()
    )


class _GpuShards:
    """All vectors as float16, split over the GPUs."""

    num_spare = _GPU_SPARE_CANDIDATES

    def __init__(self, stored: StoredVectors, devices: Sequence[torch.device]) -> None:
        """Load them. Raises RetrieverError when they do not fit."""
        bounds = np.linspace(0, len(stored), len(devices) + 1).astype(int)
        self._shards: list[tuple[int, torch.Tensor]] = []
        for device, start, stop in zip(devices, bounds[:-1], bounds[1:], strict=True):
            try:
                shard = torch.empty((int(stop - start), stored.dim), dtype=torch.float16, device=device)
                for first, block in _decode(stored, start=int(start), stop=int(stop)):
                    shard[first - start : first - start + len(block)] = block.to(device).half()
            except torch.OutOfMemoryError as error:
                gigabytes = (stop - start) * stored.dim * 2 / 1e9
                raise RetrieverError(
                    f"{stop - start} vectors of {stored.dim} float16 ({gigabytes:.1f} GB) do not fit on "
                    f"{device}; use more GPUs or the CPU"
                ) from error
            self._shards.append((int(start), shard))

    def find(self, vectors: torch.Tensor, *, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best of every shard, side by side. All GPUs are given work before one is waited for."""
        bests = []
        for first_row, shard in self._shards:
            best = Best(len(vectors), count=count, device=shard.device)
            queries = vectors.to(shard.device).to(shard.dtype)
            scan(shard, queries, best=best, first_row=first_row)
            bests.append(best)
        found = [best.take() for best in bests]
        return torch.cat([scores for scores, _ in found], 1), torch.cat([rows for _, rows in found], 1)


class _CpuBlocks:
    """The vectors where they are stored."""

    num_spare = _SPARE_CANDIDATES

    def __init__(self, stored: StoredVectors) -> None:
        self._stored = stored

    def find(self, vectors: torch.Tensor, *, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        best = Best(len(vectors), count=count)
        for first, block in _decode(self._stored, start=0, stop=len(self._stored)):
            best.offer(vectors @ block.T, first_row=first)
        return best.take()


class ExactIndex:
    """A VectorIndex that compares every query with every vector of a `flat`, `fp16` or `sq8` file."""

    def __init__(
        self, stored: StoredVectors, *, finder: _CpuBlocks | _GpuShards, facts: dict[str, str | int]
    ) -> None:
        self.kind = stored.kind
        self.dim = stored.dim
        self._stored = stored
        self._finder = finder
        self._facts = facts

    def __len__(self) -> int:
        return len(self._stored)

    def search(self, vectors: FloatArray, *, topk: int) -> tuple[FloatArray, RowArray]:
        """Search as VectorIndex does."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        scores, rows = self._rank(vectors, count=topk + self._finder.num_spare)
        # Where the last candidate ties with the last hit, ties with smaller rows may have been cut off.
        tied = np.flatnonzero(scores[:, topk - 1] == scores[:, -1])
        if len(tied) and len(self) > scores.shape[1]:
            scores, rows = scores[:, :topk], rows[:, :topk]
            more, more_rows = self._rank(vectors[tied], count=topk + _MANY_EQUAL)
            scores[tied], rows[tied] = more[:, :topk], more_rows[:, :topk]
        return scores[:, :topk], rows[:, :topk]

    def _rank(self, vectors: FloatArray, *, count: int) -> tuple[FloatArray, RowArray]:
        """Return the best `count` candidates, in order."""
        _, found = self._finder.find(torch.from_numpy(vectors), count=min(len(self), count))
        rows = found.numpy()
        return order_hits(rescore(vectors, rows, stored=self._stored), rows, topk=count)

    def describe(self) -> dict[str, str | int]:
        """Return kind, size and where it is searched."""
        return {"kind": str(self.kind), "count": len(self), "dim": self.dim, **self._facts}


def open_exact(path: Path, *, mmap: bool, on_gpu: bool, devices: Sequence[str] | None = None) -> ExactIndex:
    """Open a file for exact search; `on_gpu` on `devices`, by default all GPUs that torch sees.

    Raises RetrieverError without a GPU.
    """
    _accept_read_only_memory()
    if not on_gpu:
        stored = StoredVectors(path, mmap=mmap)
        return ExactIndex(stored, finder=_CpuBlocks(stored), facts={"device": "cpu", "mmap": int(mmap)})
    names = list(devices or (f"cuda:{number}" for number in range(torch.cuda.device_count())))
    if not names:
        raise RetrieverError("--index_device torch: torch sees no GPU; use --index_device cpu")
    stored = StoredVectors(path)
    shards = _GpuShards(stored, [torch.device(name) for name in names])
    return ExactIndex(stored, finder=shards, facts={"device": ",".join(names), "stored_as": "float16"})


def search_source(
    source: VectorSource,
    queries: FloatArray,
    *,
    topk: int,
    report: Callable[[int, int], None] | None = None,
) -> tuple[FloatArray, RowArray]:
    """Search exactly in one pass over vectors that have no index; `report(rows done, rows)`."""
    num_rows = source.shape[0]
    best = Best(len(queries), count=min(num_rows, topk + _SPARE_CANDIDATES))
    vectors = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
    for first, block in read_blocks(source, num_rows=_BLOCK_ROWS):
        best.offer(vectors @ torch.from_numpy(block).T, first_row=first)
        if report is not None:
            report(first + len(block), num_rows)
    scores, rows = best.take()
    return order_hits(scores.numpy(), rows.numpy(), topk=topk)


def _decode(stored: StoredVectors, *, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield first row and vectors of one block after the other; each overwrites the one before."""
    buffer = np.empty((min(_BLOCK_ROWS, stop - start), stored.dim), dtype=np.float32)
    for first in range(start, stop, _BLOCK_ROWS):
        yield first, torch.from_numpy(stored.read(first, min(first + _BLOCK_ROWS, stop), out=buffer))


def _accept_read_only_memory() -> None:
    """Use up the warning that torch gives once per process about read-only memory; nothing here writes."""
    read_only = np.zeros(1, dtype=np.float32)
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.from_numpy(read_only)
