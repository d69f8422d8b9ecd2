from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from verl.evaluation.statistics import (
    adjust_holm,
    bootstrap_interval,
    bootstrap_p_value,
    mcnemar_p_value,
    mean_of_means,
)


def test_mean_over_sources_weighs_each_source_alike() -> None:
    assert mean_of_means([[1.0, 0.0, 0.0, 0.0], [1.0]]) == (0.25 + 1.0) / 2
    assert mean_of_means([]) is None
    assert mean_of_means([[1.0], []]) is None


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 7 + [0.0] * 33,
        np.random.default_rng(1).exponential(size=40).tolist(),  # skewed: percentiles alone would be off
    ],
)
def test_interval_of_a_mean_is_that_of_scipy(values: list[float]) -> None:
    expected = bootstrap(
        (values,),
        np.mean,
        n_resamples=100_000,
        confidence_level=0.9,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = bootstrap_interval([values], num_resamples=100_000, confidence=0.9)
    assert found == pytest.approx((expected.low, expected.high), abs=0.015 * np.std(values))


def test_interval_is_reproducible_and_absent_where_nothing_varies() -> None:
    strata = [np.random.default_rng(k).exponential(size=20).tolist() for k in range(2)]
    assert bootstrap_interval(strata, seed=3) == bootstrap_interval(strata, seed=3)
    assert bootstrap_interval(strata, seed=3) != bootstrap_interval(strata, seed=4)
    assert bootstrap_interval([[1.0] * 10]) is None
    assert bootstrap_interval([]) is None


@pytest.mark.parametrize("sizes", [(80,), (30, 120)])
def test_intervals_cover_the_true_mean_as_often_as_they_claim(sizes: tuple[int, ...]) -> None:
    generator = np.random.default_rng(11)
    rates = [0.3, 0.6][: len(sizes)]
    truth = float(np.mean(rates))
    hits, num_trials = 0, 600
    for trial in range(num_trials):
        strata = [
            generator.binomial(1, rate, size=size).astype(float).tolist()
            for rate, size in zip(rates, sizes, strict=True)
        ]
        interval = bootstrap_interval(strata, seed=trial, num_resamples=800, confidence=0.9)
        assert interval is not None
        hits += interval[0] <= truth <= interval[1]
    # Four standard errors of a share of 0.9 in 600 trials, and the coarse steps of a rate of 80 questions.
    assert 0.85 <= hits / num_trials <= 0.95


def test_paired_p_values_are_uniform_without_a_difference_and_small_with_one() -> None:
    generator = np.random.default_rng(5)
    nulls = [bootstrap_p_value([generator.normal(size=60)], num_resamples=500) for _ in range(400)]
    rejected = np.mean([p is not None and p <= 0.1 for p in nulls])
    assert 0.05 <= rejected <= 0.16
    shifted = bootstrap_p_value([generator.normal(0.8, 1.0, size=60)], num_resamples=999)
    assert shifted == 1 / 1000  # no resample is as extreme
    assert bootstrap_p_value([[0.0, 0.0]]) == 1.0
    assert bootstrap_p_value([[0.5, 0.5, 0.5]]) == 0.25  # two of the eight sign patterns
    assert bootstrap_p_value([]) is None


@pytest.mark.parametrize(
    ("only_first", "only_second", "expected"),
    [
        (0, 5, 2 / 32),
        (1, 9, 2 * (1 + 10) / 1024),
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_is_the_exact_binomial(only_first: int, only_second: int, expected: float) -> None:
    first = [True] * only_first + [False] * only_second + [True, False] * 4
    second = [False] * only_first + [True] * only_second + [True, False] * 4
    assert mcnemar_p_value(first, second) == pytest.approx(expected)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, then never below the one before.
    assert adjust_holm([0.03, None, 0.01, 0.04, 0.02]) == pytest.approx([0.06, None, 0.04, 0.06, 0.06])
    assert adjust_holm([0.9, 0.6]) == [1.0, 1.0]
    assert adjust_holm([]) == []
