"""Open a vector index of any kind for search.

    index = open_index(Path("e5.index"))
    scores, rows = index.search(queries, topk=3)

Similarity is the inner product. Results are ordered by score, equal scores by row. The libraries are imported
when an index is opened: torch and Faiss take seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import SCANNED_KINDS, IndexKind, SearchOptions
from search_r1.search.ranking import FloatArray, RowArray

Device: TypeAlias = Literal["cpu", "faiss_gpu", "torch"]


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
    from search_r1.search import faiss_index, torch_index

    faiss_index.set_num_threads(count)
    torch_index.set_num_threads(count)


def open_index(
    path: Path, *, mmap: bool = True, device: Device = "cpu", search: SearchOptions | None = None
) -> VectorIndex:
    """Open a Faiss file; its kind is read off the file.

    `mmap`: leave the vectors on disk, where the system caches what is used. Raises RetrieverError when the
    file is missing, damaged, or cannot be searched on the device.
    """
    from search_r1.search import faiss_index, torch_index

    if not path.is_file():
        raise RetrieverError(f"index {path} is not a file; build it first (see `index build --help`)")
    kind = faiss_index.read_kind(path)
    if device == "torch" and kind not in SCANNED_KINDS:
        raise RetrieverError(
            f"index {path} is of kind {kind}; exact search by torch reads {', '.join(SCANNED_KINDS)}: "
            "build one of these or search on the CPU"
        )
    if kind in SCANNED_KINDS and device != "faiss_gpu":
        return torch_index.open_exact(path, mmap=mmap, on_gpu=device == "torch")
    return faiss_index.open_faiss(
        path, mmap=mmap, on_gpu=device == "faiss_gpu", search=search or SearchOptions()
    )
