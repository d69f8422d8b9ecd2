"""Vectors read in blocks, from wherever they lie: for building an index and for exact search."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from search_r1.search.errors import RetrieverError
from search_r1.search.ranking import FloatArray

_SAMPLE_RUN = 16


class VectorSource(Protocol):
    """What `numpy.memmap` is, too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, dim)"""
        ...

    def __getitem__(self, rows: slice, /) -> Any:
        """[rows, dim], of any type that becomes float32."""
        ...


def read_blocks(source: VectorSource, *, num_rows: int, start: int = 0) -> Iterator[tuple[int, FloatArray]]:
    """First row and vectors of blocks of `num_rows`. Raises RetrieverError at a vector that is not finite."""
    for first in range(start, source.shape[0], num_rows):
        yield first, read_block(source, first, min(first + num_rows, source.shape[0]))


def read_block(source: VectorSource, start: int, stop: int) -> FloatArray:
    """Rows `start` to `stop` as contiguous float32; raises RetrieverError at a vector that is not finite."""
    block = np.ascontiguousarray(source[start:stop], dtype=np.float32)
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        raise RetrieverError(
            f"vector {start + int(np.argmin(finite))} is not finite: the encoder made NaN or infinity of it;"
            " encode in float32 or find the passage with that row"
        )
    return block


def sample_rows(source: VectorSource, *, max_rows: int, seed: int) -> FloatArray:
    """At most `max_rows` vectors, drawn in short runs that spread over the whole source, in order."""
    num_rows = source.shape[0]
    if num_rows <= max_rows:
        return read_block(source, 0, num_rows)
    num_runs = num_rows // _SAMPLE_RUN
    wanted = max(1, max_rows // _SAMPLE_RUN)
    runs = np.sort(np.random.default_rng(seed).choice(num_runs, size=min(wanted, num_runs), replace=False))
    sample = np.empty((len(runs) * _SAMPLE_RUN, source.shape[1]), dtype=np.float32)
    for place, run in enumerate(runs):
        start = int(run) * _SAMPLE_RUN
        sample[place * _SAMPLE_RUN : (place + 1) * _SAMPLE_RUN] = read_block(
            source, start, start + _SAMPLE_RUN
        )
    return sample
