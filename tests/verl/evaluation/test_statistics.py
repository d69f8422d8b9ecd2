from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from verl.evaluation.statistics import (
    Array,
    Contrast,
    adjust_holm,
    area_under_curve,
    bootstrap_interval,
    estimate_contrast,
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


def test_a_contrast_by_hand() -> None:
    first, second = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [1.0, 0.0]]
    # First: both seeds have mean 1/2, so M = 0; the residuals are +-1/2, so R = 1, which M is raised to.
    # Second: seeds of mean 0 and 1/2: M = 2 * 1/8 = 1/4; the residuals are +-1/4: R = 1/4.
    # The differences of questions, 0 and 1/2, have C = 1/8, below (1 + 1/4) / 2: they add nothing.
    found = estimate_contrast([(1.0, first), (-1.0, second)])
    assert found is not None
    assert found.value == 0.25
    assert found.error == pytest.approx(math.sqrt(1 / 4 + 1 / 16))
    assert found.degrees == pytest.approx((1 / 4 + 1 / 16) ** 2 / (1 / 4**2 + 1 / 16**2))
    twice = estimate_contrast([(2.0, first), (-2.0, second)])
    assert twice is not None
    assert (twice.value, twice.error) == (0.5, pytest.approx(2 * found.error))
    assert twice.p_value == pytest.approx(found.p_value)


def test_an_interval_is_without_0_where_p_is_below_its_level() -> None:
    found = Contrast(value=3.0, error=1.0, degrees=4.0)
    assert found.p_value == pytest.approx(0.0399, abs=1e-4)  # t table: 2.776 at 0.05, 3.747 at 0.02
    assert found.interval(0.95) == pytest.approx((3 - 2.776, 3 + 2.776), abs=1e-3)
    assert found.interval(0.98)[0] < 0 < found.interval(1 - found.p_value - 1e-6)[0]


def test_without_two_seeds_and_two_questions_there_is_no_contrast_and_equal_scores_have_p_1() -> None:
    same = [[0.0, 1.0, 1.0]] * 3
    found = estimate_contrast([(1.0, same), (-1.0, same)])
    assert found is not None
    assert (found.interval(), found.p_value) == ((0.0, 0.0), 1.0)
    assert estimate_contrast([(1.0, same), (-1.0, same[:1])]) is None
    assert estimate_contrast([(1.0, [[1.0], [0.0]])]) is None


@pytest.mark.parametrize(("num_seeds", "noise"), [(2, 0.05), (3, 0.0), (3, 0.05), (5, 0.05)])
def test_a_contrast_finds_no_difference_as_rarely_as_it_claims(num_seeds: int, noise: float) -> None:
    rng, rejected, strictly = np.random.default_rng(0), 0, 0
    for _ in range(600):
        ease = rng.beta(0.5, 0.8, size=100)

        def draw(ease: Array = ease) -> Array:
            shares = ease + rng.normal(0, noise, (num_seeds, 1)) + rng.normal(0, 0.1, (num_seeds, 100))
            return (rng.random((num_seeds, 100)) < shares).astype(np.float64)

        found = estimate_contrast([(1.0, draw()), (-1.0, draw())])
        assert found is not None
        rejected += found.p_value < 0.05
        strictly += found.p_value < 0.01
    # Three standard errors of shares of 0.05 and 0.01 in 600 trials; by a bootstrap it is 0.1 with 2 seeds.
    assert rejected <= 0.077 * 600
    assert strictly <= 0.022 * 600


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


def test_area_under_the_curve_counts_pairs_and_equal_values_half() -> None:
    assert area_under_curve([0.9, 0.5], [0.5, 0.1]) == 0.875
    assert area_under_curve([1.0], [0.0]) == 1.0
