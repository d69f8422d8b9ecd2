"""Intervals over questions, and over seeds and questions, paired tests, their adjustment: pure functions.

A stratum has one number per question of one data source. The statistic is the mean over the strata of their
means: one stratum gives the plain mean, one per source the macro average. Questions are resampled within
their stratum. Every function starts its own generator from the seed, so that a result does not depend on
what was computed before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest
from scipy.stats import t as student_t

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
EXACT_QUESTIONS = 12
"""Up to so many differences all sign patterns are counted, above some are drawn."""
_CHUNK_CELLS = 1 << 20
_DRAWS_PER_COUNT = 16
"""Questions that are drawn in the time of one multinomial count (measured)."""
_NORMAL = NormalDist()
_TIE = 1e-12
"""Sums of the same numbers in another order differ in the last digits."""

Array = npt.NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A weighted sum of means, and how certain it is."""

    value: float
    error: float
    """Standard error."""
    degrees: float
    """Of freedom, of Student's t."""

    @property
    def p_value(self) -> float:
        """Return the two-sided p value of a true value of 0."""
        if self.error == 0.0:
            return float(abs(self.value) < _TIE)
        return float(2 * student_t.sf(abs(self.value) / self.error, self.degrees))

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """Return the interval by Student's t."""
        reach = float(student_t.isf((1 - confidence) / 2, self.degrees)) * self.error
        return self.value - reach, self.value + reach


def mean_of_means(strata: Sequence[Sequence[float]]) -> float | None:
    """Return the mean over the strata of their means; None if there is none or one is empty."""
    if not strata or not all(map(len, strata)):
        return None
    return fmean(fmean(values) for values in strata)


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
    is_tie = np.isclose(means, estimate, rtol=0.0, atol=_TIE)
    below = (np.count_nonzero((means < estimate) & ~is_tie) + 0.5 * np.count_nonzero(is_tie)) / len(means)
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / len(means)), 1 - 0.5 / len(means)))
    acceleration = _acceleration(strata)
    shares = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        shifted = bias + _NORMAL.inv_cdf(tail)
        shares.append(_NORMAL.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = np.quantile(means, shares)
    return float(low), float(high)


def estimate_contrast(sides: Sequence[tuple[float, npt.ArrayLike]]) -> Contrast | None:
    """Return a weighted sum of mean scores with its error over seeds and questions.

    Each side is a weight and a table of scores [S, Q], a row per seed and a column per question. All sides
    have the same questions; their seeds are independent of each other. Both seeds and questions count as
    drawn at random. With the mean squares of the seeds M and of the residual R of each table, and the
    variance C over the questions of their weighted sums of means:

        error^2 = sum of w^2 max(M, R) / (S Q)  +  max(0, C - sum of w^2 R / S) / Q

    From few seeds M can be below R by chance; its expectation cannot. None with fewer than two seeds of a
    side, or two questions. Sources: Searle, Casella and McCulloch 1992, "Variance Components",
    section 4.7; Satterthwaite 1946, "An approximate distribution of estimates of variance components".
    """
    tables = [(weight, np.asarray(scores, dtype=np.float64)) for weight, scores in sides]
    if not tables or any(table.ndim != 2 or min(table.shape) < 2 for _, table in tables):
        return None
    num_questions = tables[0][1].shape[1]
    variance, residual, spread = 0.0, 0.0, 0.0
    sums = np.zeros(num_questions)  # [Q]
    for weight, table in tables:
        num_seeds, of_seed, of_question = len(table), table.mean(axis=1), table.mean(axis=0)
        rest = table - of_seed[:, None] - of_question + table.mean()  # [S, Q]
        rest_square = float((rest**2).sum()) / ((num_seeds - 1) * (num_questions - 1))
        seed_square = max(num_questions * float(of_seed.var(ddof=1)), rest_square)
        part = weight**2 * seed_square / (num_seeds * num_questions)
        variance += part
        spread += part**2 / (num_seeds - 1)
        residual += weight**2 * rest_square / num_seeds
        sums += weight * of_question
    of_questions = float(sums.var(ddof=1))
    if of_questions > residual:
        variance += (of_questions - residual) / num_questions
        spread += (of_questions / num_questions) ** 2 / (num_questions - 1)
    degrees = variance**2 / spread if spread > 0 else math.inf
    return Contrast(value=float(sums.mean()), error=math.sqrt(variance), degrees=degrees)


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


def area_under_curve(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Return how often a value of `higher` is above one of `lower` (AUC of ROC); equal values count half."""
    wins = sum((a > b) + 0.5 * (a == b) for a in higher for b in lower)
    return wins / (len(higher) * len(lower))


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
