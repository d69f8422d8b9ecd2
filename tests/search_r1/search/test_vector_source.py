from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.vector_source import read_blocks, sample_rows


def test_blocks_cover_a_memory_mapped_source_in_order(tmp_path: Path) -> None:
    source = np.memmap(tmp_path / "vectors", dtype=np.float16, mode="w+", shape=(10, 3))
    source[:] = np.arange(30).reshape(10, 3)
    blocks = list(read_blocks(source, num_rows=4))
    assert [(first, block.shape, block.dtype) for first, block in blocks] == [
        (0, (4, 3), np.float32),
        (4, (4, 3), np.float32),
        (8, (2, 3), np.float32),
    ]
    assert np.concatenate([block for _, block in blocks]).tolist() == source.tolist()


def test_a_sample_is_bounded_seeded_and_spread() -> None:
    source = np.arange(100_000, dtype=np.float32)[:, None]
    sample = sample_rows(source, max_rows=1000, seed=0)
    assert 900 <= len(sample) <= 1000
    assert (sample == sample_rows(source, max_rows=1000, seed=0)).all()
    assert (sample != sample_rows(source, max_rows=1000, seed=1)).any()
    assert sample.min() < 10_000
    assert sample.max() > 90_000
    assert len(np.unique(sample)) == len(sample)
    assert len(sample_rows(source[:50], max_rows=1000, seed=0)) == 50


def test_a_vector_that_is_not_finite_is_named_by_its_row() -> None:
    source = np.zeros((10, 2), dtype=np.float32)
    source[7, 1] = np.inf
    with pytest.raises(RetrieverError, match="vector 7 is not finite"):
        list(read_blocks(source, num_rows=4))
