from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from IG.doctor.statistics import auc, average_ranks, bootstrap, pearson, rank_agreement, spearman


def array(*values: float) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def test_pearson_by_hand() -> None:
    assert pearson(array(1, 2, 3), array(2, 4, 6)) == pytest.approx(1.0)
    assert pearson(array(1, 2, 3, 4), array(1, 3, 2, 4)) == pytest.approx(0.8)
    assert pearson(array(1, 1), array(0, 5)) is None
    assert pearson(array(1), array(5)) is None


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert average_ranks(array(10, 20, 10, 5)).tolist() == [2.5, 4.0, 2.5, 1.0]
    assert spearman(array(1, 2, 3), array(1, 10, 100)) == pytest.approx(1.0)
    assert spearman(array(1, 2, 2, 3), array(1, 2, 2, 3)) == pytest.approx(1.0)


def test_auc_by_hand() -> None:
    # Right answers have 0.9 and 0.4, wrong ones 0.4 and 0.1: wins 1 + 1 + 0.5 + 1 of 4.
    values = array(0.9, 0.4, 0.1)
    assert auc(values, positives=array(1, 1, 0), negatives=array(0, 1, 1)) == pytest.approx(3.5 / 4)
    assert auc(values, positives=array(1, 1, 1), negatives=array(0, 0, 0)) is None


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_auc_is_the_share_of_pairs_that_are_in_order(rows: list[tuple[int, int, int]]) -> None:
    values, up, down = (array(*column) for column in zip(*rows, strict=True))
    wins = sum(u * d * (1.0 if a > b else 0.5 if a == b else 0.0) for a, u, _ in rows for b, _, d in rows)
    expected = wins / (up.sum() * down.sum()) if up.sum() and down.sum() else None
    found = auc(values, positives=up, negatives=down)
    assert found == (None if expected is None else pytest.approx(expected))


def test_rank_agreement_by_hand() -> None:
    truth = array(0.0, 0.5, 1.0)
    assert rank_agreement(truth, truth) == 1.0
    assert rank_agreement(truth, -truth) == -1.0
    assert rank_agreement(truth, array(0.0, 1.0, 0.5)) == pytest.approx(1 / 3)
    assert rank_agreement(truth, array(0.0, 0.0, 1.0)) == pytest.approx(2 / 3), "a tie counts 0"
    assert rank_agreement(array(1, 1), array(0, 1)) is None


def test_one_question_says_nothing_about_others() -> None:
    found = bootstrap(
        lambda rows: float(len(rows)),
        clusters=np.zeros(5, dtype=np.int64),
        num_resamplings=10,
        rng=np.random.default_rng(0),
    )
    assert found is not None
    assert (found.value, found.low, found.high) == (5.0, None, None)


def test_the_bootstrap_covers_the_truth_and_draws_whole_questions() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        x = rng.normal(size=60)
        y = 0.6 * x + 0.8 * rng.normal(size=60)
        interval = bootstrap(
            lambda rows, x=x, y=y: pearson(x[rows], y[rows]),
            clusters=np.arange(60),
            num_resamplings=200,
            rng=rng,
        )
        assert interval is not None
        covered += interval.low <= 0.6 <= interval.high
    assert 86 <= covered <= 100
    # Ten copies of every row are no ten times as much evidence.
    once = bootstrap(
        lambda rows: pearson(x[rows], y[rows]), clusters=np.arange(60), num_resamplings=500, rng=rng
    )
    copies = np.repeat(np.arange(60), 10)
    ten = bootstrap(
        lambda rows: pearson(x[copies][rows], y[copies][rows]), clusters=copies, num_resamplings=500, rng=rng
    )
    assert once is not None
    assert ten is not None
    assert None not in (once.low, once.high, ten.low, ten.high)
    assert ten.high - ten.low == pytest.approx(once.high - once.low, rel=0.25)
