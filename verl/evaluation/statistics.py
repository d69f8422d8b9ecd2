"""Bootstrap intervals over questions, paired tests and their adjustment: pure functions of numbers.

A stratum has one number per question of one data source. The statistic is the mean over the strata of their
means: one stratum gives the plain mean, one per source the macro average. Questions are resampled within
their stratum. Every function starts its own generator from the seed, so that a result does not depend on
what was computed before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
EXACT_QUESTIONS = 12
"""Up to so many differences all sign patterns are counted, above some are drawn."""
_CHUNK_CELLS = 1 << 20
_DRAWS_PER_COUNT = 16
"""Questions that are drawn in the time of one multinomial count (measured)."""
_NORMAL = NormalDist()

Array = npt.NDArray[np.float64]
Interval = tuple[float, float]


def mean_of_means(strata: Sequence[Sequence[float]]) -> float | None:
    """Return the mean over the strata of their means; None if there is none or one is empty."""
    if not strata or not all(map(len, strata)):
        return None
    return math.fsum(math.fsum(values) / len(values) for values in strata) / len(strata)


def bootstrap_interval(
    strata: Sequence[Sequence[float]],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Return the bias-corrected and accelerated bootstrap interval (BCa) of the mean over the strata.

    None where no stratum has two different numbers: every resample would be the same. Source: Efron
    1987, "Better bootstrap confidence intervals"; for several strata Davison and Hinkley 1997, section 5.3.
    """
    estimate = mean_of_means(strata)
    if estimate is None or not _can_vary(strata):
        return None
    means = _resample_means(strata, seed=seed, num_resamples=num_resamples)  # [num_resamples]
    # Sums of the same numbers in another order differ in the last digits: those are ties.
    is_tie = np.isclose(means, estimate, rtol=0.0, atol=1e-12)
    below = (np.count_nonzero((means < estimate) & ~is_tie) + 0.5 * np.count_nonzero(is_tie)) / len(means)
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / len(means)), 1 - 0.5 / len(means)))
    acceleration = _acceleration(strata)
    shares = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        shifted = bias + _NORMAL.inv_cdf(tail)
        shares.append(_NORMAL.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = np.quantile(means, shares)
    return float(low), float(high)


def crossed_bootstrap(
    differences: Sequence[Sequence[float]],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> tuple[Interval, float] | None:
    """Return interval and two-sided p value of the mean of paired differences, over seeds and questions.

    `differences` has a row per seed and a number per question [S, Q]. Seeds and questions are resampled
    independently of each other, so that neither the questions nor the seeds of a comparison decide it alone;
    with one seed, over questions alone. The interval has the quantiles of the resampled means, p is twice the
    share of them on the other side of 0, the observed one counted. None without a number. Sources: Owen 2007,
    "The pigeonhole bootstrap"; Davison and Hinkley 1997, section 4.4.
    """
    table = np.asarray(differences, dtype=np.float64)  # [S, Q]
    if table.size == 0:
        return None
    generator = np.random.default_rng(seed)
    num_seeds, num_questions = table.shape
    counts_s = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_resamples)
    counts_q = generator.multinomial(
        num_questions, np.full(num_questions, 1 / num_questions), size=num_resamples
    )
    means = ((counts_s @ table) * counts_q).sum(axis=1) / table.size  # [num_resamples]
    # Sums of the same numbers in another order differ in the last digits: those are ties.
    below, above = np.count_nonzero(means <= 1e-12), np.count_nonzero(means >= -1e-12)
    p_value = min(1.0, 2 * (1 + min(below, above)) / (1 + num_resamples))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return (float(low), float(high)), p_value


def sign_flip_p_value(
    differences: Sequence[Sequence[float]], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> float | None:
    """Return the two-sided p value of no difference between paired runs, by flipping signs; None if empty.

    `differences` has one number per question that both runs answered. Without a difference each of them is
    as likely to have the other sign. p is the share of sign patterns whose statistic is at least as far from
    0 as the observed one: of all patterns of up to EXACT_QUESTIONS numbers that are not 0, else of drawn
    ones, the observed one counted with them. Sources: Fisher 1935, The Design of Experiments, section 21;
    Phipson and Smyth 2010, "Permutation p-values should never be zero".
    """
    if mean_of_means(differences) is None:
        return None
    # The statistic is the sum of all differences, each divided by the size of its stratum.
    weights = np.concatenate([np.asarray(values, dtype=np.float64) / len(values) for values in differences])
    weights = weights[weights != 0.0]  # [m]
    # Sums of the same numbers in another order differ in the last digits: those are ties.
    limit = abs(math.fsum(weights)) - 1e-10 * float(np.abs(weights).sum())
    if len(weights) <= EXACT_QUESTIONS:
        patterns = np.arange(1 << len(weights))[:, None] >> np.arange(len(weights)) & 1  # [2^m, m]
        return float(np.mean(np.abs((2.0 * patterns - 1.0) @ weights) >= limit))
    largest = np.abs(weights).max()
    # Numbers of the same size get their signs by one binomial draw; rounded, as 0.3 - 0.2 is not 0.1.
    sizes, counts = np.unique(np.round(np.abs(weights) / largest, 12), return_counts=True)  # [d], [d]
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_CELLS // len(sizes))
    num_extreme = 0
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        signs = 2.0 * generator.binomial(counts, 0.5, size=(rows, len(sizes))) - counts  # [rows, d]
        num_extreme += int(np.count_nonzero(np.abs(signs @ sizes) * largest >= limit))
    return (1 + num_extreme) / (1 + num_resamples)


def mcnemar_p_value(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Return the exact two-sided p value of McNemar's test; None without a question.

    Of the questions that only one of both answered right, each is as likely to be one of either (McNemar
    1947; exact by the binomial distribution).
    """
    if not first:
        return None
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    num_discordant = only_first + only_second
    return float(binomtest(only_first, num_discordant).pvalue) if num_discordant else 1.0


def adjust_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p values adjusted for their number by the step-down method of Holm 1979, in order.

    None stands for a test that was not made; it stays None and does not count.
    """
    order = sorted((p, k) for k, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p_value, k) in enumerate(order):
        highest = max(highest, min(1.0, p_value * (len(order) - rank)))
        adjusted[k] = highest
    return adjusted


def _can_vary(strata: Sequence[Sequence[float]]) -> bool:
    return any(min(values) < max(values) for values in strata)


def _acceleration(strata: Sequence[Sequence[float]]) -> float:
    """Return the skewness of the statistic over 6: the influence of each question, cubed and summed."""
    influences = [(np.asarray(values) - np.mean(values)) / len(values) for values in strata]
    influence = np.concatenate(influences)
    return float((influence**3).sum() / (6.0 * (influence**2).sum() ** 1.5))


def _resample_means(strata: Sequence[Sequence[float]], *, seed: int, num_resamples: int) -> Array:
    """Return the statistic of each resample [num_resamples]."""
    generator = np.random.default_rng(seed)
    total = np.zeros(num_resamples)
    for values in strata:
        total += np.concatenate(list(_stratum_means(values, generator, num_resamples)))
    return total / len(strata)


def _stratum_means(
    values: Sequence[float], generator: np.random.Generator, num_resamples: int
) -> Iterator[Array]:
    """Yield the means of resamples of one stratum, in chunks that fit in memory.

    A resample of n questions has each of d distinct values a multinomial number of times. Scores have few
    distinct values; where there are many, drawing questions is cheaper.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)  # [d], [d]
    num_questions = len(values)
    draws_questions = num_questions < _DRAWS_PER_COUNT * len(distinct)
    chunk = max(1, _CHUNK_CELLS // (num_questions if draws_questions else len(distinct)))
    every = np.repeat(distinct, counts)  # [n]
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        if draws_questions:
            yield every[generator.integers(num_questions, size=(size, num_questions))].mean(axis=1)
        else:
            drawn = generator.multinomial(num_questions, counts / num_questions, size=size)  # [size, d]
            yield drawn @ distinct / num_questions
