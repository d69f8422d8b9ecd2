"""Clustered unit vectors, as encoders make them, and queries near some of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


def make_vectors(count: int, dim: int, *, seed: int = 0) -> FloatArray:
    """Around centres that all lie to one side of the origin."""
    generator = np.random.default_rng(seed)
    centres = 1.0 + generator.standard_normal((max(1, count // 50), dim), dtype=np.float32)
    vectors = centres[generator.integers(0, len(centres), count)]
    vectors += 0.7 * generator.standard_normal(vectors.shape, dtype=np.float32)
    return normalise(vectors)


def make_queries(vectors: FloatArray, count: int, *, seed: int = 1) -> FloatArray:
    generator = np.random.default_rng(seed)
    near = vectors[generator.integers(0, len(vectors), count)]
    return normalise(near + 0.5 / np.sqrt(vectors.shape[1]) * generator.standard_normal(near.shape))


def normalise(vectors: npt.NDArray[np.floating]) -> FloatArray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def search_exactly(vectors: FloatArray, queries: FloatArray, *, topk: int) -> npt.NDArray[np.int64]:
    """Rows by inner product in float64, equal ones by row."""
    scores = (queries.astype(np.float64) @ vectors.astype(np.float64).T).round(9)
    return np.argsort(-scores, axis=1, kind="stable")[:, :topk]
