"""Bytes of every kind of index by formula, and sizes as people write them.

The formulas count what Faiss writes: codes, ids of 8 bytes, centroids, links of 4 bytes. They are checked
against built indexes to within two percent, beside small headers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import COMPONENT_BYTES, SCANNED_KINDS, IndexKind, IndexOptions, Storage

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SCANNED_STORAGE = {
    IndexKind.FLAT: Storage.FLAT,
    IndexKind.FP16: Storage.FP16,
    IndexKind.SQ8: Storage.SQ8,
}
_PQ_CENTROIDS = 256

PROCESS_BYTES = 500 * 10**6
"""Of a Python process with torch and Faiss loaded, and some blocks of vectors in work."""
SCALAR_SAMPLE_ROWS = 100_000
"""Vectors that the range of a component is learnt from."""
_ROWS_PER_CENTROID = 48
_SAMPLE_BYTES = 400 << 20
"""Of the vectors that lists are trained on; a large index may be trained on more."""


@dataclass(frozen=True, slots=True)
class IndexBytes:
    """Of the files of one index."""

    main: int
    """The index itself."""
    vectors: int
    """The file with vectors for rescoring; read here and there, never whole."""
    made_in_memory: bool
    """The main file is put together in memory when it is built; else it is streamed to disk."""
    trained_on: int
    """Most bytes of vectors that are in memory for training."""

    @property
    def disk(self) -> int:
        return self.main + self.vectors

    @property
    def build_peak(self) -> int:
        """Most memory of the process that builds it. Training is over before the index is put together."""
        return PROCESS_BYTES + max(self.main if self.made_in_memory else 0, self.trained_on)


def count_bytes(options: IndexOptions, num_vectors: int, dim: int) -> IndexBytes:
    """Of an index with resolved options."""
    kind = options.kind
    side = num_vectors * dim * COMPONENT_BYTES[options.rescore_storage or Storage.NONE]
    if kind in SCANNED_KINDS:
        main = num_vectors * dim * COMPONENT_BYTES[_SCANNED_STORAGE[kind]]
    elif kind is IndexKind.BINARY:
        main = num_vectors * ((dim + 7) // 8)
    elif kind is IndexKind.HNSW:
        main = int(num_vectors * _count_node_bytes(options, dim))
    else:
        main = _count_list_bytes(options, num_vectors, dim)
    return IndexBytes(
        main=main,
        vectors=side,
        made_in_memory=kind in (IndexKind.IVF, IndexKind.IVF_PQ, IndexKind.HNSW),
        trained_on=4 * dim * _count_training_rows(options, num_vectors, dim, main_bytes=main),
    )


def _count_training_rows(options: IndexOptions, num_vectors: int, dim: int, *, main_bytes: int) -> int:
    if options.kind is IndexKind.FLAT or (options.storage is Storage.FLAT and options.num_lists is None):
        return 0
    rows = SCALAR_SAMPLE_ROWS
    if options.num_lists is not None:
        rows = max(rows, _ROWS_PER_CENTROID * options.num_lists)
    # Vectors for training may take as much as half of the index, which is not there yet.
    bound = max(_SAMPLE_BYTES, main_bytes // 2) // (4 * dim)
    return min(num_vectors, rows, max(1, bound))


def _count_node_bytes(options: IndexOptions, dim: int) -> float:
    """Vector, 2 M links below, M links in each of 1 / (M - 1) other layers on average, offset and level."""
    links = options.num_links or 2
    vector = dim * COMPONENT_BYTES[options.storage or Storage.SQ8]
    return vector + 4 * (2 * links + links / (links - 1)) + 8 + 4


def _count_list_bytes(options: IndexOptions, num_vectors: int, dim: int) -> int:
    num_lists = options.num_lists or 1
    code = options.pq_bytes or dim * COMPONENT_BYTES[options.storage or Storage.SQ8]
    codebooks = 4 * _PQ_CENTROIDS * dim if options.kind is IndexKind.IVF_PQ else 0
    return num_vectors * (code + 8) + num_lists * (4 * dim + 8) + codebooks


def parse_bytes(text: str) -> int:
    """Bytes of `16GB` (16 * 10^9) or `16GiB` (16 * 2^30).

    Raises RetrieverError for anything else: `16G` and `16` mean different things to different people.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise RetrieverError(
            f"size {text!r} is not clear; write for example 16GB (16 * 10^9 bytes) or 16GiB (16 * 2^30 bytes)"
        )
    return int(float(found[1]) * unit)


def show_bytes(count: float) -> str:
    """In decimal units, as disks are sold: `64.6 GB`."""
    for unit in ("TB", "GB", "MB", "kB"):
        if count >= _UNITS[unit.upper()]:
            return f"{count / _UNITS[unit.upper()]:.1f} {unit}"
    return f"{int(count)} B"
