from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from search_r1.search.agreement import TOLERANCES, Trial, run_trial
from search_r1.search.corpus import Corpus, open_corpus
from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import IndexKind
from search_r1.search.ranking import FloatArray, RowArray, order_hits
from tests.search_r1.search.small_world import write_corpus

COUNT, DIM = 50, 16


class ExactIndex:
    """Inner products of what it is given."""

    def __init__(self, vectors: FloatArray, kind: IndexKind = IndexKind.FLAT) -> None:
        self.kind = kind
        self.dim = vectors.shape[1]
        self._vectors = vectors

    def __len__(self) -> int:
        return len(self._vectors)

    def search(self, vectors: FloatArray, *, topk: int) -> tuple[FloatArray, RowArray]:
        scores = vectors @ self._vectors.T
        rows = np.tile(np.arange(len(self), dtype=np.int64), (len(vectors), 1))
        return order_hits(scores, rows, topk=topk)

    def describe(self) -> Mapping[str, str | int]:
        return {}


@pytest.fixture(scope="module")
def vectors() -> FloatArray:
    drawn = np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    path: Path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return open_corpus(write_corpus(path, {str(row): f"text {row}" for row in range(COUNT)}))


def make_trial(vectors: FloatArray, *, normalized: bool = True) -> Trial:
    rows = list(range(0, COUNT, 5))
    return Trial(rows=rows, passages=vectors[rows], queries=vectors[rows] * 0.5, normalized=normalized)


def lose(vectors: FloatArray, count: int) -> FloatArray:
    """So many of the known passages have another vector."""
    spoilt = vectors.copy()
    spoilt[: 5 * count : 5] *= -1
    return spoilt


@pytest.mark.parametrize("kind", list(IndexKind))
def test_more_than_the_tolerance_must_not_be_lost(
    vectors: FloatArray, corpus: Corpus, kind: IndexKind, caplog: pytest.LogCaptureFixture
) -> None:
    trial, allowed = make_trial(vectors), TOLERANCES[kind][1]
    run_trial(trial, index=ExactIndex(lose(vectors, allowed), kind), corpus=corpus, fix="x")
    assert (allowed > 0) == ("do not find themselves" in caplog.text)
    with pytest.raises(
        RetrieverError, match=rf"{allowed + 1} of 10 known passages .*{kind}.*; build it anew"
    ):
        run_trial(
            trial, index=ExactIndex(lose(vectors, allowed + 1), kind), corpus=corpus, fix="build it anew"
        )


@pytest.mark.parametrize("count", [2, 30])
def test_passages_that_are_the_same_to_the_encoder_do_not_count_as_lost(
    vectors: FloatArray, corpus: Corpus, count: int
) -> None:
    same = vectors.copy()
    same[46 - count : 46] = vectors[45]
    run_trial(make_trial(same), index=ExactIndex(same), corpus=corpus, fix="x")


def test_one_result_list_for_all_queries_is_refused(vectors: FloatArray, corpus: Corpus) -> None:
    trial = make_trial(vectors)
    broken = Trial(
        rows=trial.rows, passages=trial.passages, queries=np.tile(vectors[3], (10, 1)), normalized=True
    )
    with pytest.raises(RetrieverError, match=r"10 different queries all get the same results \(rows \[3, "):
        run_trial(broken, index=ExactIndex(vectors), corpus=corpus, fix="x")


def test_a_dot_product_may_prefer_long_vectors(vectors: FloatArray, corpus: Corpus) -> None:
    long = vectors.copy()
    long[1:4] *= 20
    run_trial(make_trial(long, normalized=False), index=ExactIndex(long), corpus=corpus, fix="x")
    with pytest.raises(RetrieverError, match="known passages"):
        run_trial(make_trial(long), index=ExactIndex(long), corpus=corpus, fix="x")
