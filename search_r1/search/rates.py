"""What one core of this machine does in a second, measured on small indexes, for `index plan --measure`."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from search_r1.search.estimates import BATCH, Rates
from search_r1.search.kinds import IndexKind, IndexOptions, SearchOptions, Storage
from search_r1.search.ranking import FloatArray
from search_r1.search.vector_index import Report, VectorIndex, open_index, set_num_threads, write_index

_NUM_VECTORS = 40_000
_NUM_LISTS = 64
_EF = 128
_NUM_LINKS = 16
_TOPK = 3


def measure_rates(dim: int) -> Rates:
    """Builds and searches indexes of 40,000 vectors with one thread; sets the threads of this process to one.

    A small index stays partly in the caches of the processor: `graph` and `scan_list` are on the kind side.
    """
    set_num_threads(1)
    vectors = _make_vectors(dim)
    with tempfile.TemporaryDirectory(prefix="index-rates-") as folder:
        return _measure(vectors, Path(folder))


def _measure(vectors: FloatArray, folder: Path) -> Rates:
    count, dim = vectors.shape
    components = count * dim
    queries = vectors[:BATCH]
    indexes = {
        kind: _build(vectors, folder, IndexOptions(kind=kind)) for kind in (IndexKind.FLAT, IndexKind.SQ8)
    }
    indexes[IndexKind.FP16] = _build(vectors, folder, IndexOptions(kind=IndexKind.FP16))
    lists = IndexOptions(kind=IndexKind.IVF, num_lists=_NUM_LISTS, storage=Storage.SQ8)
    indexes[IndexKind.IVF] = _build(vectors, folder, lists)
    products = IndexOptions(kind=IndexKind.IVF_PQ, num_lists=_NUM_LISTS, rescore_storage=Storage.NONE)
    ends: dict[str, float] = {}
    indexes[IndexKind.IVF_PQ] = _build(
        vectors, folder, products, report=lambda phase, *_: ends.update({phase: time.process_time()})
    )
    graph = IndexOptions(kind=IndexKind.HNSW, num_links=_NUM_LINKS)
    indexes[IndexKind.HNSW] = _build(vectors[: count // 2], folder, graph)

    def search(kind: IndexKind, num_queries: int) -> float:
        return _time(lambda: indexes[kind].search(queries[:num_queries], topk=_TOPK)) / num_queries

    code_bytes = IndexOptions(kind=IndexKind.IVF_PQ).resolve(count, dim).pq_bytes or 1
    return Rates(
        products=_measure_products(vectors),
        stream_bytes=4 * components / search(IndexKind.FLAT, 1),
        decode_fp16=components / search(IndexKind.FP16, 1),
        decode_sq8=components / search(IndexKind.SQ8, 1),
        scan_list=components / search(IndexKind.IVF, BATCH),
        lookups=count * code_bytes / search(IndexKind.IVF_PQ, BATCH),
        graph=_EF * _NUM_LINKS * dim / search(IndexKind.HNSW, BATCH),
        quantize=2 * components * 256 / (ends["adding"] - ends["assigning"]),
        **_measure_binary(vectors, folder),
        disk_bytes=_measure_disk(folder),
    )


def _measure_binary(vectors: FloatArray, folder: Path) -> dict[str, float]:
    """Rates of comparing bits and of rescoring, from two searches that differ in how much is rescored."""
    path = folder / IndexKind.BINARY
    write_index(vectors, path, options=IndexOptions(kind=IndexKind.BINARY))
    seconds = {}
    for factor in (1, 200):
        index = open_index(path, search=SearchOptions(rescore_factor=factor))
        seconds[factor] = _time(partial(index.search, vectors[:BATCH], topk=_TOPK)) / BATCH
    rescored = 199 * _TOPK * vectors.shape[1]
    return {
        "bits_bytes": vectors.size / 8 / seconds[1],
        "gather": rescored / max(1e-9, seconds[200] - seconds[1]),
    }


def _measure_products(vectors: FloatArray) -> float:
    block, queries = torch.from_numpy(vectors[:8192]), torch.from_numpy(vectors[:BATCH])
    return 2 * block.numel() * BATCH / _time(lambda: queries @ block.T)


def _measure_disk(folder: Path) -> float:
    content = np.random.default_rng(0).bytes(256 << 20)

    started = time.perf_counter()
    with (folder / "disk").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return len(content) / (time.perf_counter() - started)


def _build(
    vectors: FloatArray, folder: Path, options: IndexOptions, *, report: Report | None = None
) -> VectorIndex:
    path = folder / options.kind
    write_index(vectors, path, options=options, report=report)
    return open_index(path, search=SearchOptions(nprobe=_NUM_LISTS, ef_search=_EF))


def _make_vectors(dim: int) -> FloatArray:
    """Unit vectors around some centres, seeded."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((100, dim), dtype=np.float32)
    vectors = centres[generator.integers(0, len(centres), _NUM_VECTORS)]
    vectors += 0.7 * generator.standard_normal(vectors.shape, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _time(work: Callable[[], object], *, repeats: int = 3) -> float:
    """Seconds of processor time of the fastest of a few repetitions, after one that warms up.

    Other programs on the machine make it wait, and do not make it slower.
    """
    work()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)
