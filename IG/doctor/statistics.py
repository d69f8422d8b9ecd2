"""How two series agree, and how sure that is: correlations, AUC, rank agreement, bootstrap intervals.

Pure functions over NumPy arrays. A figure that does not exist (no spread, one class only) is None, never 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from IG.semantics import FloatArray, IntArray

Statistic = Callable[[IntArray], float | None]
"""A figure of the chosen rows."""


EQUAL = 1e-9
"""Figures that differ by less are the same, summed differently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure with the range that holds it in 95 % of the resamplings; None where one cluster is all."""

    value: float
    low: float | None
    high: float | None


def pearson(first: FloatArray, second: FloatArray) -> float | None:
    """Linear correlation; None when one of them has no spread."""
    if len(first) < 2:
        return None
    x, y = first - first.mean(), second - second.mean()
    spread = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float(np.clip((x * y).sum() / spread, -1, 1)) if spread > 1e-12 else None


def average_ranks(values: FloatArray) -> FloatArray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def spearman(first: FloatArray, second: FloatArray) -> float | None:
    """Correlation of the ranks."""
    return pearson(average_ranks(first), average_ranks(second))


def auc(values: FloatArray, *, positives: FloatArray, negatives: FloatArray) -> float | None:
    """Chance that a positive has the larger value than a negative, ties count half.

    `positives` and `negatives` say how many of each every value stands for. None without one of both.
    """
    order = np.argsort(values, kind="stable")
    _, starts = np.unique(values[order], return_index=True)
    if not len(starts) or positives.sum() <= 0 or negatives.sum() <= 0:
        return None
    up = np.add.reduceat(positives[order], starts)
    down = np.add.reduceat(negatives[order], starts)
    below = np.cumsum(down) - down
    return float((up * (below + down / 2)).sum() / (up.sum() * down.sum()))


def rank_agreement(truth: FloatArray, estimate: FloatArray) -> float | None:
    """Somers' D: Kendall's tau over the pairs that truly differ; one that the estimate ties counts 0."""
    rows, columns = np.triu_indices(len(truth), k=1)
    direction = _direction(truth[rows] - truth[columns])
    num_different = np.count_nonzero(direction)
    if not num_different:
        return None
    return float((direction * _direction(estimate[rows] - estimate[columns])).sum() / num_different)


def _direction(difference: FloatArray) -> FloatArray:
    return np.asarray(np.where(np.abs(difference) < EQUAL, 0.0, np.sign(difference)), dtype=np.float64)


def bootstrap(
    statistic: Statistic, *, clusters: IntArray, num_resamplings: int, rng: np.random.Generator
) -> Interval | None:
    """The figure of all rows, with an interval from drawing whole clusters of rows with replacement.

    Rows of one question are not independent of each other, so questions are drawn, not rows. None when the
    figure does not exist; resamplings in which it does not are left out.
    """
    value = statistic(np.arange(len(clusters)))
    if value is None:
        return None
    members = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
    drawn: list[float] = []
    for _ in range(num_resamplings):
        chosen = rng.integers(len(members), size=len(members))
        again = statistic(np.concatenate([members[index] for index in chosen]))
        if again is not None:
            drawn.append(again)
    if len(members) < 2 or not drawn:
        return Interval(value=value, low=None, high=None)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value=value, low=float(low), high=float(high))
