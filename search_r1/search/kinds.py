"""The kinds of vector index and their parameters: names, defaults by size, what does not go together."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import TypeVar

from search_r1.search.errors import RetrieverError


class IndexKind(StrEnum):
    """How vectors are stored and searched."""

    FLAT = "flat"
    """Every component as float32; every vector compared."""
    FP16 = "fp16"
    """Every component as float16; every vector compared."""
    SQ8 = "sq8"
    """Every component as one byte; every vector compared."""
    IVF = "ivf"
    """Vectors in lists by their nearest centroid; a few lists compared."""
    IVF_PQ = "ivf_pq"
    """The same with product-quantized vectors; the best are rescored with better vectors on disk."""
    HNSW = "hnsw"
    """A graph of near neighbours, walked towards the query."""
    BINARY = "binary"
    """One bit a component, by Hamming distance; the best are rescored with better vectors on disk."""


class Storage(StrEnum):
    """How whole vectors are written."""

    FLAT = "flat"
    FP16 = "fp16"
    SQ8 = "sq8"
    NONE = "none"
    """Not at all (vectors for rescoring only)."""


SCANNED_KINDS = (IndexKind.FLAT, IndexKind.FP16, IndexKind.SQ8)
"""Kinds that compare the query with every vector: exact, up to how the vectors are stored."""
COMPONENT_BYTES = {Storage.FLAT: 4, Storage.FP16: 2, Storage.SQ8: 1, Storage.NONE: 0}

_Value = TypeVar("_Value", int, Storage)
_KINDS_OF_OPTION = {
    "storage": (IndexKind.IVF, IndexKind.HNSW),
    "num_lists": (IndexKind.IVF, IndexKind.IVF_PQ),
    "pq_bytes": (IndexKind.IVF_PQ,),
    "num_links": (IndexKind.HNSW,),
    "ef_construction": (IndexKind.HNSW,),
    "rescore_storage": (IndexKind.IVF_PQ, IndexKind.BINARY),
}
_ALIASES = {
    "sqfp16": "fp16",
    "float16": "fp16",
    "int8": "sq8",
    "ivfpq": "ivf_pq",
    "ivfflat": "ivf",
    "lsh": "binary",
    "bin": "binary",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexOptions:
    """What to build. None: chosen by `resolve` from the number of vectors and their dimension."""

    kind: IndexKind = IndexKind.FLAT
    storage: Storage | None = None
    """Of the vectors in the lists of `ivf` or the nodes of `hnsw`."""
    num_lists: int | None = None
    """Of `ivf` and `ivf_pq`."""
    pq_bytes: int | None = None
    """Of one vector in `ivf_pq`; must divide the dimension."""
    num_links: int | None = None
    """Of a node of `hnsw` (M); the lowest layer has twice as many."""
    ef_construction: int | None = None
    rescore_storage: Storage | None = None
    """Of the vectors that rescore what `ivf_pq` or `binary` found."""
    seed: int = 0

    def resolve(self, num_vectors: int, dim: int) -> IndexOptions:
        """With every number that matters to the kind; raises RetrieverError for what cannot be built."""
        _check_shape(num_vectors, dim)
        for name, kinds in _KINDS_OF_OPTION.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise RetrieverError(
                    f"index option {name} is of kind {' and '.join(kinds)}, not of {self.kind}; leave it out"
                )
        resolved = replace(
            self,
            storage=self._fill("storage", Storage.SQ8),
            num_lists=self._fill("num_lists", choose_num_lists(num_vectors)),
            pq_bytes=self._fill("pq_bytes", _choose_pq_bytes(dim)),
            num_links=self._fill("num_links", 16),
            ef_construction=self._fill("ef_construction", 80),
            rescore_storage=self._fill("rescore_storage", Storage.SQ8),
        )
        _check_numbers(resolved, num_vectors=num_vectors, dim=dim)
        return resolved

    def as_facts(self) -> dict[str, int | str]:
        """What is set, for manifest and log."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: str(value) if isinstance(value, StrEnum) else value
            for name, value in values.items()
            if value is not None
        }

    def _fill(self, name: str, default: _Value) -> _Value | None:
        """What is set, else the default if the kind has such an option."""
        value: _Value | None = getattr(self, name)
        return default if value is None and self.kind in _KINDS_OF_OPTION[name] else value


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How hard an approximate index looks. None: the default of the kind."""

    nprobe: int | None = None
    """Lists of `ivf` or `ivf_pq` that are compared."""
    ef_search: int | None = None
    """Candidates of `hnsw`."""
    rescore_factor: int | None = None
    """`ivf_pq` and `binary` rescore this many times `topk`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise RetrieverError(f"--{field.name} must be at least 1, got {value}")

    def choose_nprobe(self, num_lists: int) -> int:
        """One list in 64 unless told, and never more than there are."""
        return min(num_lists, self.nprobe or max(16, num_lists // 64))

    def choose_ef_search(self, topk: int) -> int:
        """At least `topk`, or the graph cannot return as many."""
        return max(topk, self.ef_search or 128)

    def choose_rescored(self, kind: IndexKind, topk: int) -> int:
        """Candidates to rescore: sign bits order neighbours worse than product quantization does."""
        factor = self.rescore_factor or (200 if kind is IndexKind.BINARY else 50)
        return factor * topk


def parse_options(name: str) -> IndexOptions:
    """Of our name of a kind or a Faiss factory string: `flat`, `Flat`, `IVF4096,PQ96`, `HNSW64,SQ8`.

    Raises RetrieverError for any other.
    """
    compact = re.sub(r"[\s_-]", "", name).lower()
    plain = _ALIASES.get(compact, name.strip().lower())
    if plain in set(IndexKind):
        return IndexOptions(kind=IndexKind(plain))
    if found := re.fullmatch(r"ivf(\d+),pq(\d+)(?:x8)?", compact):
        return IndexOptions(kind=IndexKind.IVF_PQ, num_lists=int(found[1]), pq_bytes=int(found[2]))
    if found := re.fullmatch(r"(ivf|hnsw)(\d+)(?:,(flat|sqfp16|sq8))?", compact):
        storage = Storage({"sqfp16": "fp16"}.get(found[3] or "flat", found[3] or "flat"))
        if found[1] == "ivf":
            return IndexOptions(kind=IndexKind.IVF, num_lists=int(found[2]), storage=storage)
        return IndexOptions(kind=IndexKind.HNSW, num_links=int(found[2]), storage=storage)
    raise RetrieverError(
        f"kind of index {name!r} is not known; expected one of {', '.join(IndexKind)},"
        " or a Faiss name like Flat, SQ8, SQfp16, IVF4096,SQ8, IVF4096,PQ96, HNSW32,Flat"
    )


def choose_num_lists(num_vectors: int) -> int:
    """The power of two nearest to four square roots: 4096 for a million, 16384 for 21 million."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(num_vectors)))
    return max(1, min(wanted, num_vectors // 32))


def _choose_pq_bytes(dim: int) -> int:
    """Eight components a byte where the dimension allows: the largest divisor up to dim / 8."""
    return max(size for size in range(1, max(1, dim // 8) + 1) if dim % size == 0)


def _check_shape(num_vectors: int, dim: int) -> None:
    if num_vectors < 1 or dim < 1:
        raise RetrieverError(f"an index needs vectors, got {num_vectors} of dimension {dim}")


def _check_numbers(options: IndexOptions, *, num_vectors: int, dim: int) -> None:
    for name in ("num_lists", "pq_bytes", "num_links", "ef_construction"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RetrieverError(f"index option {name} must be at least 1, got {value}")
    if options.num_lists is not None and options.num_lists > num_vectors:
        raise RetrieverError(
            f"index option num_lists is {options.num_lists}, more than the {num_vectors} vectors"
        )
    if options.pq_bytes is not None and dim % options.pq_bytes:
        raise RetrieverError(f"index option pq_bytes is {options.pq_bytes}, which does not divide {dim}")
    if options.num_links is not None and options.num_links < 2:
        raise RetrieverError(f"index option num_links must be at least 2, got {options.num_links}")
    if options.storage is Storage.NONE:
        raise RetrieverError(f"index option storage must be flat, fp16 or sq8 for {options.kind}, got none")
    if options.rescore_storage is Storage.NONE and options.kind is IndexKind.BINARY:
        raise RetrieverError("index option rescore_storage is none: binary cannot rank by bits alone")
