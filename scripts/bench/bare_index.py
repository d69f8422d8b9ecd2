"""The bare Faiss index in a process of its own: the limit of what a server on top of it can reach."""

from __future__ import annotations

import time

import faiss
import numpy as np
import numpy.typing as npt

_INDEX: faiss.Index | None = None


def load(path: str, num_threads: int) -> None:
    """Read the index as Faiss does by itself."""
    global _INDEX
    faiss.omp_set_num_threads(num_threads)
    _INDEX = faiss.read_index(path)


def search(
    vectors: npt.NDArray[np.float32], *, topk: int, batch_size: int, seconds: float
) -> tuple[int, float]:
    """Queries answered and seconds taken, batch after batch, for at least `seconds`."""
    assert _INDEX is not None
    began = time.perf_counter()
    answered = start = 0
    while (taken := time.perf_counter() - began) < seconds:
        batch = vectors[start : start + batch_size]
        if len(batch) < batch_size:
            start = 0
            continue
        _INDEX.search(batch, topk)
        answered += batch_size
        start += batch_size
    return answered, taken
