"""The kinds of vector index: their names, their Faiss factory strings and how they are searched."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, TypeAlias

from search_r1.search.errors import RetrieverError

Device: TypeAlias = Literal["cpu", "faiss_gpu", "torch"]
"""Where vectors are searched."""


class IndexKind(StrEnum):
    """How vectors are stored and searched."""

    FLAT = "flat"
    """Every component as float32; every vector compared."""
    FP16 = "fp16"
    """Every component as float16; every vector compared."""
    SQ8 = "sq8"
    """Every component as one byte; every vector compared."""
    IVF_PQ = "ivf_pq"
    """Product-quantized vectors in lists by their nearest centroid; a few lists are compared, and the whole
    vectors (`Refine(...)`) of the best candidates."""
    HNSW = "hnsw"
    """A graph of near neighbors, walked towards the query."""


SCANNED_KINDS = (IndexKind.FLAT, IndexKind.FP16, IndexKind.SQ8)
"""Kinds that compare the query with every vector: exact, up to how the vectors are stored."""
MIN_PQ_VECTORS = 256
"""A codebook of `ivf_pq` has so many centroids."""

_FACTORIES = {
    IndexKind.FLAT: r"flat",
    IndexKind.FP16: r"sqfp16",
    IndexKind.SQ8: r"sq8",
    IndexKind.IVF_PQ: r"ivf\d+(_hnsw\d+)?,pq\d+(x\d+)?(,rflat|,refine\((flat|sqfp16|sq8|sq6|sq4)\))?",
    IndexKind.HNSW: r"hnsw\d+([,_](flat|sqfp16|sq8))?",
}
_REMOVED = ("ivf", "binary")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexOptions:
    """What to build."""

    kind: IndexKind = IndexKind.FLAT
    factory: str | None = None
    """Faiss factory string; None until `resolve` chooses one by the number of vectors."""

    def resolve(self, num_vectors: int, dim: int) -> IndexOptions:
        """Return the options with a factory string. Raises RetrieverError for what cannot be built."""
        if num_vectors < 1 or dim < 1:
            raise RetrieverError(f"an index needs vectors, got {num_vectors} of dimension {dim}")
        if self.kind is IndexKind.IVF_PQ and num_vectors < MIN_PQ_VECTORS:
            raise RetrieverError(
                f"an index of kind ivf_pq needs at least {MIN_PQ_VECTORS} vectors, got {num_vectors}; "
                "use kind flat"
            )
        return replace(self, factory=self.factory or self._choose_factory(num_vectors, dim))

    def _choose_factory(self, num_vectors: int, dim: int) -> str:
        match self.kind:
            case IndexKind.IVF_PQ:
                return f"IVF{choose_num_lists(num_vectors)},PQ{_choose_pq_bytes(dim)},Refine(SQ8)"
            case IndexKind.HNSW:
                return "HNSW16,SQ8"
            case _:
                return {IndexKind.FLAT: "Flat", IndexKind.FP16: "SQfp16", IndexKind.SQ8: "SQ8"}[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How many candidates an approximate index looks at. None: the default of the kind."""

    nprobe: int | None = None
    """Lists of `ivf_pq` that are compared."""
    ef_search: int | None = None
    """Candidates of `hnsw`."""

    def choose_nprobe(self, num_lists: int) -> int:
        """Return the number of lists to compare: by default 1 in 64 and at least 32, at most all."""
        return min(num_lists, self.nprobe or max(32, num_lists // 64))

    def choose_ef_search(self, topk: int) -> int:
        """Return the number of candidates, at least `topk`: the graph cannot return more than it keeps."""
        return max(topk, self.ef_search or 128)


def parse_options(name: str) -> IndexOptions:
    """Read a kind (`ivf_pq`) or a Faiss factory string (`IVF4096,PQ96`, `HNSW64,SQ8`).

    Raises RetrieverError for any other.
    """
    lower = name.strip().lower()
    if lower in set(IndexKind):
        return IndexOptions(kind=IndexKind(lower))
    for kind, pattern in _FACTORIES.items():
        if re.fullmatch(pattern, lower):
            factory = lower.upper()
            for written in ("Flat", "fp16", "x", "Refine"):
                factory = factory.replace(written.upper(), written)
            return IndexOptions(kind=kind, factory=factory)
    gone = " (it was removed)" if lower in _REMOVED else ""
    raise RetrieverError(
        f"--kind {name!r} is unknown{gone}; expected one of {', '.join(IndexKind)}, or a Faiss factory "
        "string like SQfp16, IVF4096,PQ96 or HNSW32,SQ8"
    )


def choose_num_lists(num_vectors: int) -> int:
    """Return the power of two nearest to the square root: 1024 for a million, 4096 for 21 million."""
    return max(1, min(2 ** round(math.log2(math.sqrt(num_vectors))), num_vectors // 39))


def _choose_pq_bytes(dim: int) -> int:
    """Return the largest divisor of the dimension up to a quarter of it: four components a byte."""
    return max(size for size in range(1, max(1, dim // 4) + 1) if dim % size == 0)
