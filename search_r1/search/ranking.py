"""Order of search results: by score, equal scores by row, whatever the kind of index and the batch."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
RowArray = npt.NDArray[np.int64]


_SPARE_CANDIDATES = 16
"""Beyond `topk`: a matrix product orders vectors that are nearly equal by chance."""


class VectorRows(Protocol):
    """Vectors that can be read by row."""

    def gather(self, rows: RowArray) -> FloatArray:
        """[len(rows), dim]"""
        ...


def order_hits(scores: FloatArray, rows: RowArray, *, topk: int) -> tuple[FloatArray, RowArray]:
    """The best `topk` of candidates [n, k], best first, equal scores by row; filled up with row -1.

    Row -1 among the candidates means none.
    """
    num_queries, num_candidates = rows.shape
    if num_candidates < topk:
        missing = topk - num_candidates
        scores = np.pad(scores, ((0, 0), (0, missing)))
        rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
    scores = np.where(rows >= 0, scores, -np.inf).astype(np.float32, copy=False)
    last = np.iinfo(np.int64).max
    order = np.lexsort((np.where(rows >= 0, rows, last), -scores), axis=1)[:, :topk]
    taken = np.arange(num_queries)[:, None]
    return scores[taken, order], rows[taken, order]


def rescore_best(
    vectors: FloatArray, rows: RowArray, *, stored: VectorRows, topk: int
) -> tuple[FloatArray, RowArray]:
    """The best `topk` [n, topk] of many candidates [n, k], by inner product with the stored vectors."""
    kept = min(topk + _SPARE_CANDIDATES, rows.shape[1])
    best = np.full((len(rows), kept), -1, dtype=np.int64)
    for query, (vector, candidates) in enumerate(zip(vectors, rows, strict=True)):
        present = candidates[candidates >= 0]
        scores = stored.gather(present) @ vector
        chosen = np.argsort(-scores, kind="stable")[:kept]
        best[query, : len(chosen)] = present[chosen]
    return order_hits(rescore(vectors, best, stored=stored), best, topk=topk)


def rescore(vectors: FloatArray, rows: RowArray, *, stored: VectorRows) -> FloatArray:
    """Inner products [n, k] of each query with its own candidates, in float64 and one fixed order.

    The score of a pair does not depend on what else is searched with it, which matrix products do not grant.
    """
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)
    for query, (vector, candidates) in enumerate(zip(vectors, rows, strict=True)):
        present = candidates >= 0
        found = stored.gather(candidates[present]).astype(np.float64)
        scores[query, present] = np.einsum("kd,d->k", found, vector.astype(np.float64))
    return scores
