"""Blocks of vectors, and the order of search results: by score, equal scores by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from search_r1.search.errors import RetrieverError

FloatArray = npt.NDArray[np.float32]
RowArray = npt.NDArray[np.int64]

_SAMPLE_RUN = 16


class VectorSource(Protocol):
    """Vectors that are read in slices of rows, such as `numpy.memmap`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (rows, dim)."""
        ...

    def __getitem__(self, rows: slice, /) -> Any:
        """Return [rows, dim], of any type that converts to float32."""
        ...


class VectorRows(Protocol):
    """Vectors that are read row by row."""

    def gather(self, rows: RowArray) -> FloatArray:
        """Return [len(rows), dim]."""
        ...


def read_blocks(source: VectorSource, *, num_rows: int) -> Iterator[tuple[int, FloatArray]]:
    """Yield the first row and the vectors of blocks of `num_rows`.

    Raises RetrieverError for a vector that is not finite.
    """
    for first in range(0, source.shape[0], num_rows):
        yield first, read_block(source, first, min(first + num_rows, source.shape[0]))


def read_block(source: VectorSource, start: int, stop: int) -> FloatArray:
    """Return rows `start` to `stop` as contiguous float32. Raises RetrieverError if one is not finite."""
    block = np.ascontiguousarray(source[start:stop], dtype=np.float32)
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        raise RetrieverError(
            f"vector {start + int(np.argmin(finite))} is not finite: the encoder made NaN or infinity of it; "
            "encode in float32 or correct the passage with that row"
        )
    return block


def sample_vectors(source: VectorSource, *, max_rows: int) -> FloatArray:
    """Return at most `max_rows` vectors in order, drawn in runs of 16 that spread over the whole source."""
    num_rows = source.shape[0]
    if num_rows <= max_rows:
        return read_block(source, 0, num_rows)
    runs = np.random.default_rng(0).choice(
        num_rows // _SAMPLE_RUN, size=max(1, max_rows // _SAMPLE_RUN), replace=False
    )
    starts = (np.sort(runs) * _SAMPLE_RUN).tolist()
    return np.concatenate([read_block(source, start, start + _SAMPLE_RUN) for start in starts])


def order_hits(scores: FloatArray, rows: RowArray, *, topk: int) -> tuple[FloatArray, RowArray]:
    """Return the best `topk` of candidates [n, k], best first, equal scores by row, padded with row -1.

    Row -1 among the candidates is none.
    """
    missing = max(0, topk - rows.shape[1])
    scores = np.pad(scores, ((0, 0), (0, missing)))
    rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
    scores = np.where(rows >= 0, scores, -np.inf).astype(np.float32, copy=False)
    last = np.iinfo(np.int64).max
    order = np.lexsort((np.where(rows >= 0, rows, last), -scores), axis=1)[:, :topk]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def rescore(vectors: FloatArray, rows: RowArray, *, stored: VectorRows) -> FloatArray:
    """Return the inner products [n, k] of each query with its own candidates, summed in float64.

    Unlike in a matrix product, the score of a pair does not depend on what is searched with it.
    """
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)
    for query, (vector, candidates) in enumerate(zip(vectors, rows, strict=True)):
        present = candidates >= 0
        found = stored.gather(candidates[present]).astype(np.float64)
        scores[query, present] = np.einsum("kd,d->k", found, vector.astype(np.float64))
    return scores


def compare_rows(found: RowArray, expected: RowArray, *, k: int) -> float:
    """Return recall@k of two rankings [n, >= k]; row -1 stands for a missing result."""
    hits = (found[:, :k, None] == expected[:, None, :k]) & (expected[:, None, :k] >= 0)
    return float(hits.any(axis=1).sum() / (expected[:, :k] >= 0).sum())
