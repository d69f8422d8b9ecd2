"""Two steps: a small index finds candidates, better vectors on disk put them in order."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from search_r1.search.errors import RetrieverError
from search_r1.search.faiss_index import CodeRows, FaissIndex, open_faiss, open_rows
from search_r1.search.kinds import IndexKind, SearchOptions
from search_r1.search.ranking import FloatArray, RowArray, rescore_best

logger = logging.getLogger(__name__)


class RescoredIndex:
    """Scores are inner products with the stored vectors, whatever the candidates were found by."""

    def __init__(self, candidates: FaissIndex, *, stored: CodeRows, search: SearchOptions) -> None:
        self.kind = candidates.kind
        self.dim = candidates.dim
        self._candidates = candidates
        self._stored = stored
        self._search = search

    def __len__(self) -> int:
        return len(self._candidates)

    def search(self, vectors: FloatArray, *, topk: int) -> tuple[FloatArray, RowArray]:
        """As VectorIndex."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        _, rows = self._candidates.search(
            vectors, topk=min(len(self), self._search.choose_rescored(self.kind, topk))
        )
        return rescore_best(vectors, rows, stored=self._stored, topk=topk)

    def describe(self) -> dict[str, str | int]:
        return {
            **self._candidates.describe(),
            "rescored_with": str(self._stored.kind),
            "rescore_factor": self._search.choose_rescored(self.kind, 1),
        }


def open_rescored(
    path: Path, *, vectors_path: Path, mmap: bool, search: SearchOptions
) -> RescoredIndex | FaissIndex:
    """The vectors for rescoring stay on disk, whatever `mmap`: a few hundred of them are read per query.

    An `ivf_pq` index without them is searched as it is; a `binary` one cannot be. Raises RetrieverError.
    """
    candidates = open_faiss(path, mmap=mmap, on_gpu=False, search=search)
    if not vectors_path.is_file():
        if candidates.kind is IndexKind.BINARY:
            raise RetrieverError(
                f"index {path} is binary and needs {vectors_path} to rank what its bits find;"
                " copy it there or rebuild the index"
            )
        logger.warning("index %s has no %s: scores are those of its codes", path, vectors_path.name)
        return candidates
    stored = open_rows(vectors_path, mmap=True, scattered=True)
    if len(stored) != len(candidates) or stored.dim != candidates.dim:
        raise RetrieverError(
            f"index {path} holds {len(candidates)} vectors of {candidates.dim}, {vectors_path.name}"
            f" {len(stored)} of {stored.dim}; rebuild the index"
        )
    return RescoredIndex(candidates, stored=stored, search=search)
