from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from verl.evaluation.statistics import (
    adjust_holm,
    bootstrap_interval,
    crossed_bootstrap,
    mcnemar_p_value,
    mean_of_means,
    sign_flip_p_value,
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


def test_seeds_and_questions_are_resampled_independently() -> None:
    # Two seeds of which one is always better: both are the lucky one in a quarter of the resamples.
    found = crossed_bootstrap([[1.0] * 30, [0.0] * 30])
    assert found is not None
    assert found[0] == (0.0, 1.0)
    assert found[1] == pytest.approx(0.5, abs=0.03)
    # The same differences with one seed: over questions alone.
    found = crossed_bootstrap([[1.0] * 30 + [0.0] * 30])
    assert found is not None
    assert found[0] == pytest.approx((0.37, 0.63), abs=0.02)
    assert found[1] == pytest.approx(2 / 10_001)


def test_no_difference_has_p_1_and_no_number_has_no_interval() -> None:
    assert crossed_bootstrap([[0.0] * 5] * 3) == ((0.0, 0.0), 1.0)
    assert crossed_bootstrap([]) is None
    assert crossed_bootstrap([[], []]) is None


def test_the_crossed_interval_covers_the_true_difference_at_least_as_often_as_it_claims() -> None:
    rng, covered, rejected = np.random.default_rng(0), 0, 0
    for _ in range(200):
        seeds, questions = rng.normal(size=(6, 1)), rng.normal(size=(1, 40))
        table = 0.1 * seeds + 0.3 * questions + 0.5 * rng.normal(size=(6, 40))  # the true difference is 0
        found = crossed_bootstrap(table.tolist(), num_resamples=500)
        assert found is not None
        covered += found[0][0] <= 0 <= found[0][1]
        rejected += found[1] < 0.05
    assert covered >= 0.93 * 200
    assert rejected <= 0.07 * 200


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([[0.5, 1.0]], 2 / 4),  # both signs alike
        ([[0.1, 0.2, 0.3]], 2 / 8),
        ([[0.5, 0.5, 0.5]], 2 / 8),
        ([[0.3, -0.1, 0.2]], 4 / 8),  # 0.4 and 0.6, and both negated
        ([[0.3, 0.0, 0.0]], 1.0),  # one question decides nothing
        ([[1.0, 0.0], [0.5]], 2 / 4),  # a macro average: 0.5 and 0.5, which cancel or add up
        ([[1.0, 1.0, 1.0, 1.0], [-0.5]], 24 / 32),  # four of 0.25 against one of 0.5: 0 is 8 of 32
        ([[0.0, 0.0]], 1.0),
        ([], None),
        ([[1.0], []], None),
    ],
)
def test_sign_flips_by_hand(differences: list[list[float]], expected: float | None) -> None:
    assert sign_flip_p_value(differences) == expected


@pytest.mark.parametrize("sizes", [(5,), (10,), (30,), (4, 12)])
def test_sign_flips_reject_no_difference_as_rarely_as_they_claim(sizes: tuple[int, ...]) -> None:
    generator = np.random.default_rng(5)
    nulls = [
        sign_flip_p_value([generator.normal(size=size) for size in sizes], num_resamples=400)
        for _ in range(600)
    ]
    rejected = np.mean([p is not None and p <= 0.1 for p in nulls])
    # Four standard errors of a share of 0.1 in 600 trials; of 5 questions p is a multiple of 1/16.
    assert 0.03 <= rejected <= 0.15


def test_drawn_sign_flips_approach_the_binomial_and_are_never_0() -> None:
    exact = mcnemar_p_value([True] * 9 + [False] * 21, [False] * 9 + [True] * 21)
    assert sign_flip_p_value([[1.0] * 9 + [-1.0] * 21]) == pytest.approx(exact, abs=0.01)
    shifted = np.random.default_rng(5).normal(0.8, 1.0, size=60)
    assert sign_flip_p_value([shifted], num_resamples=999) == 1 / 1000  # no pattern is as extreme


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
