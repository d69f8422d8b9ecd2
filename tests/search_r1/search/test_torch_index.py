from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import IndexKind, IndexOptions
from search_r1.search.torch_index import open_exact, search_source
from search_r1.search.vector_index import open_index, write_index
from tests.search_r1.search.vectors import make_queries, make_vectors, search_exactly


def test_a_hundred_thousand_vectors_give_the_rows_of_faiss_flat(tmp_path: Path) -> None:
    vectors = make_vectors(100_000, 32)
    vectors[90_000:90_010] = vectors[:10]  # equal vectors: the lower row comes first
    queries = np.concatenate([make_queries(vectors, 20), vectors[:10]])
    flat = faiss.IndexFlatIP(32)
    flat.add(vectors)
    scores, expected = flat.search(queries, 10)
    expected = np.take_along_axis(expected, np.lexsort((expected, -scores.round(6)), axis=1), axis=1)
    write_index(vectors, tmp_path / "index", options=IndexOptions())
    _, rows = open_index(tmp_path / "index").search(queries, topk=10)
    assert rows.tolist() == expected.tolist()
    assert rows[20:, :2].tolist() == [[row, 90_000 + row] for row in range(10)]


def test_shards_of_float16_give_the_same_rows_as_one_piece(tmp_path: Path) -> None:
    vectors = make_vectors(2_000, 64)
    queries = make_queries(vectors, 30)
    write_index(vectors, tmp_path / "index", options=IndexOptions(kind=IndexKind.FP16))
    # Devices of torch's kind; the CPU stands in for the GPUs.
    sharded = open_exact(tmp_path / "index", mmap=True, on_gpu=True, devices=["cpu", "cpu", "cpu"])
    scores, rows = sharded.search(queries, topk=10)
    whole_scores, whole_rows = open_index(tmp_path / "index").search(queries, topk=10)
    assert (rows == whole_rows).all()
    assert (scores == whole_scores).all()
    assert sharded.describe()["device"] == "cpu,cpu,cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    write_index(make_vectors(10, 8), tmp_path / "index", options=IndexOptions())
    with pytest.raises(RetrieverError, match="torch sees no GPU"):
        open_index(tmp_path / "index", device="torch")


def test_a_source_is_searched_in_one_pass() -> None:
    vectors = make_vectors(20_000, 16)
    queries = make_queries(vectors, 5)
    reports: list[tuple[int, int]] = []
    _, rows = search_source(vectors, queries, topk=7, report=lambda *report: reports.append(report))
    assert rows.tolist() == search_exactly(vectors, queries, topk=7).tolist()
    assert reports[-1] == (20_000, 20_000)
    assert len(reports) > 1
