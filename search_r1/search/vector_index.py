"""Vector indexes of every kind: write one from a stream of vectors, open one, search it.

    options = write_index(vectors, Path("e5.index"), options=IndexOptions(kind=IndexKind.SQ8))
    index = open_index(Path("e5.index"), kind=None)
    scores, rows = index.search(queries, topk=3)

Similarity is the inner product. Scores and rows are ordered by score, equal scores by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import SCANNED_KINDS, IndexKind, IndexOptions, SearchOptions
from search_r1.search.manifest import VECTORS_SUFFIX
from search_r1.search.ranking import FloatArray, RowArray
from search_r1.search.vector_source import VectorSource

Device: TypeAlias = Literal["cpu", "faiss_gpu", "torch"]
Report: TypeAlias = Callable[[str, int, int], None]
"""Called with a phase, how much of it is done, and the total."""


class VectorIndex(Protocol):
    """Vectors to search. Calls come from one thread at a time."""

    kind: IndexKind
    dim: int

    def __len__(self) -> int:
        """Number of vectors."""
        ...

    def search(self, vectors: FloatArray, *, topk: int) -> tuple[FloatArray, RowArray]:
        """Scores and rows [n, topk] for queries [n, dim], best first; row -1 and score -inf where none is."""
        ...

    def describe(self) -> Mapping[str, str | int]:
        """Kind, size and what its answers depend on."""
        ...


def write_index(
    vectors: VectorSource,
    path: Path,
    *,
    options: IndexOptions,
    num_threads: int | None = None,
    report: Report | None = None,
) -> IndexOptions:
    """Write all files of an index, each complete or not at all; returns the options with every number set.

    Reads `vectors` in blocks. Peak memory is at most that of the finished index plus 1 GiB; `flat`, `fp16`,
    `sq8` and `binary` are streamed to disk and need far less. The same vectors, options and libraries give
    the same files, except `hnsw` with more than one thread. Raises RetrieverError for what cannot be built.
    """
    from search_r1.search.faiss_writing import write_files

    return write_files(vectors, path, options=options, num_threads=num_threads, report=report)


def list_index_files(path: Path, kind: IndexKind) -> list[Path]:
    """All files of an index that is there, `path` first."""
    side = locate_vectors(path)
    has_side = kind in (IndexKind.IVF_PQ, IndexKind.BINARY) and side.exists()
    return [path, side] if has_side else [path]


def locate_vectors(path: Path) -> Path:
    """`<index>.vectors`"""
    return path.with_name(path.name + VECTORS_SUFFIX)


def open_vectors(path: Path) -> VectorSource:
    """The stored vectors of a `flat`, `fp16` or `sq8` index, or of a `.vectors` file, read in blocks.

    Raises RetrieverError for any other.
    """
    from search_r1.search import faiss_index

    _check_file(path)
    return faiss_index.StoredVectors(path)


def engine_version() -> str:
    """Of Faiss."""
    from search_r1.search import faiss_index

    return faiss_index.FAISS_VERSION


def set_num_threads(count: int) -> None:
    """For the searches of this process, in Faiss and in torch."""
    from search_r1.search import faiss_index, torch_index

    faiss_index.set_num_threads(count)
    torch_index.set_num_threads(count)


def open_index(
    path: Path,
    *,
    kind: IndexKind | None = None,
    mmap: bool = True,
    device: Device = "cpu",
    search: SearchOptions | None = None,
) -> VectorIndex:
    """Open what `write_index` or Faiss wrote; `kind` None reads the kind off the file.

    `mmap`: leave the vectors on disk and let the system keep in memory what is used. Raises RetrieverError
    when the file is missing, damaged, of another kind, or cannot be searched on the device.
    """
    from search_r1.search import faiss_index, torch_index
    from search_r1.search.rescored_index import open_rescored

    search = search or SearchOptions()
    _check_file(path)
    found = faiss_index.read_kind(path)
    if kind is not None and found is not kind:
        raise RetrieverError(f"index {path} is of kind {found}, expected {kind}")
    if device == "torch" and found not in SCANNED_KINDS:
        raise RetrieverError(
            f"index {path} is of kind {found}; exact search by torch reads {', '.join(SCANNED_KINDS)}:"
            " build one of these or search on the CPU"
        )
    if found in SCANNED_KINDS and device != "faiss_gpu":
        return torch_index.open_exact(path, mmap=mmap, on_gpu=device == "torch")
    if found in (IndexKind.IVF_PQ, IndexKind.BINARY) and device == "cpu":
        return open_rescored(path, vectors_path=locate_vectors(path), mmap=mmap, search=search)
    return faiss_index.open_faiss(path, mmap=mmap, on_gpu=device == "faiss_gpu", search=search)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise RetrieverError(f"index {path} is not a file; build it first (see build_index.sh)")
