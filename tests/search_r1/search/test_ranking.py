from __future__ import annotations

import numpy as np

from search_r1.search.ranking import FloatArray, RowArray, order_hits, rescore, rescore_best
from tests.search_r1.search.vectors import make_vectors


class Stored:
    def __init__(self, vectors: FloatArray) -> None:
        self._vectors = vectors

    def gather(self, rows: RowArray) -> FloatArray:
        return self._vectors[rows]


def test_hits_are_ordered_by_score_then_row_and_filled_up() -> None:
    scores = np.array([[0.5, 0.9, 0.5, 9.0]], dtype=np.float32)
    rows = np.array([[8, 3, 2, -1]])
    best, ordered = order_hits(scores, rows, topk=5)
    assert ordered.tolist() == [[3, 2, 8, -1, -1]]
    assert best[0, :3].tolist() == [np.float32(0.9), 0.5, 0.5]
    assert np.isneginf(best[0, 3:]).all()


def test_a_pair_scores_the_same_whatever_is_scored_with_it() -> None:
    stored = Stored(make_vectors(500, 96))
    queries = make_vectors(40, 96, seed=3)
    rows = np.tile(np.arange(500), (40, 1))
    together = rescore(queries, rows, stored=stored)
    alone = rescore(queries[7:8], rows[7:8, 100:101], stored=stored)
    assert together[7, 100] == alone[0, 0]


def test_the_best_of_many_candidates_are_kept() -> None:
    vectors = make_vectors(500, 32)
    rows = np.tile(np.arange(500), (3, 1))
    rows[1, 3:] = -1
    scores, best = rescore_best(vectors[:3], rows, stored=Stored(vectors), topk=4)
    exact = vectors[:3].astype(np.float64) @ vectors.astype(np.float64).T
    assert best[0].tolist() == np.argsort(-exact[0])[:4].tolist()
    assert sorted(best[1].tolist()) == [-1, 0, 1, 2]
    assert np.abs(scores[0] - np.sort(exact[0])[::-1][:4]).max() < 1e-6
