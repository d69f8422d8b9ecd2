"""What the results say: levels, costs to a level, collapses, and differences with their verdicts.

Pure functions of results. Two readings: at equal numbers of episodes (the last evaluation of each run), and
at equal numbers of searches (as many as the one of the two that searches less made in all).
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from comparison.pace import STANDARD_S
from comparison.results import FAILED, RIGHT, Curve, Evaluation, Result
from verl.evaluation.paired import SIGNIFICANCE
from verl.evaluation.statistics import Array, Contrast, Interval, adjust_holm, estimate_contrast

LEVELS = (0.5, 0.7)
WINDOW = 5
"""Steps over which the EM of sampled episodes is averaged: a step is reached by the mean of so many."""
COLLAPSE_WINDOW = 10
COLLAPSE_SHARE = 0.5
NO_SEARCHES = 0.1

Runs = Mapping[str, Sequence[Result]]
"""The results of each method, one per seed, in the order of the seeds."""
Scores = list[float | None]
"""One number per question; None where it failed."""


class Reading(StrEnum):
    ROLLOUTS = "equal episodes"
    SEARCHES = "equal searches"


class Verdict(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "no difference shown"
    ONE_SEED = "one seed"
    """No verdict: the noise between seeds is not known."""
    OPEN = "not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What it took until the mean EM of the last steps reached a level."""

    step: int
    processor_s: float | None
    """Of all processes of the run on a core of standard pace, so that machines can be compared; evaluations
    are left out in proportion to their time. None: the pace of the run's machine was not measured."""
    tokens: float
    searches: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A method minus the base, on the same questions with the same seeds."""

    method: str
    base: str
    reading: Reading
    num_seeds: int
    num_questions: int
    value: float | None = None
    contrast: Contrast | None = None
    """None with one seed."""
    interval: Interval | None = None
    """It is without 0 exactly where the verdict says so."""
    adjusted: float | None = None
    """p by Holm over the comparison."""

    @property
    def verdict(self) -> Verdict:
        if self.value is None or self.adjusted is None:
            return Verdict.ONE_SEED if self.value is not None and self.num_seeds == 1 else Verdict.OPEN
        if self.adjusted >= SIGNIFICANCE:
            return Verdict.NOT_SHOWN
        return Verdict.BETTER if self.value > 0 else Verdict.WORSE


def smooth(curve: Curve, window: int = WINDOW) -> Curve:
    """Return the mean of the last `window` values at each step; None before there are as many."""
    means: Curve = [None] * len(curve)
    for k in range(window - 1, len(curve)):
        known = [value for value in curve[k - window + 1 : k + 1] if value is not None]
        means[k] = sum(known) / len(known) if known else None
    return means


def last_mean(curve: Curve, window: int = COLLAPSE_WINDOW) -> float | None:
    """Return the mean over the last steps; None where nothing was measured."""
    known = [value for value in curve[-window:] if value is not None]
    return sum(known) / len(known) if known else None


def cost_to(result: Result, level: float) -> Cost | None:
    """Return the cost of the first step whose EM, as the mean of `WINDOW` steps, is at least `level`."""
    for k, mean in enumerate(smooth(result.em), start=1):
        if mean is not None and mean >= level:
            seconds = result.processor_s * result.before(k, result.seconds) / result.wall_s
            return Cost(
                step=k,
                processor_s=None if result.pace_s is None else seconds * STANDARD_S / result.pace_s,
                tokens=result.before(k, result.tokens),
                searches=result.searches_until(k),
            )
    return None


def has_collapsed(result: Result) -> bool:
    """Return whether EM fell to less than half of its best, both as means of `COLLAPSE_WINDOW` steps."""
    means = [value for value in smooth(result.em, COLLAPSE_WINDOW) if value is not None]
    return bool(means) and means[-1] < COLLAPSE_SHARE * max(means)


def has_stopped_searching(result: Result) -> bool:
    """Return whether the last `COLLAPSE_WINDOW` steps made fewer than `NO_SEARCHES` searches per episode."""
    last = last_mean(result.searches)
    return last is not None and last < NO_SEARCHES


def final_em(result: Result) -> float | None:
    """Return EM of the last evaluation."""
    return result.evaluations[-1].em if result.evaluations else None


def mean_over_seeds(
    results: Sequence[Result], measure: Callable[[Result], float | None]
) -> tuple[float, float | None] | None:
    """Return mean and sample standard deviation over seeds (None of one); None where one was not measured."""
    values = [measure(result) for result in results]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def compare(runs: Runs, *, base: str, readings: Sequence[Reading] = tuple(Reading)) -> list[Difference]:
    """Compare every method with the base; p values are adjusted over all methods, per reading."""
    return compare_pairs(runs, [(name, base) for name in runs if name != base], readings=readings)


def compare_pairs(
    runs: Runs, pairs: Sequence[tuple[str, str]], *, readings: Sequence[Reading] = tuple(Reading)
) -> list[Difference]:
    """Compare each method with the other one of its pair; p values are adjusted over the pairs, per reading.

    Holm's method stops at the level SIGNIFICANCE / (number of pairs that it leaves open). Intervals have
    that level, so that they agree with the verdicts.
    """
    found: list[Difference] = []
    for reading in readings:
        of_reading = [_difference(runs, name, base, reading) for name, base in pairs]
        adjusted = adjust_holm([None if d.contrast is None else d.contrast.p_value for d in of_reading])
        num_open = sum(p is not None and p >= SIGNIFICANCE for p in adjusted)
        confidence = 1 - SIGNIFICANCE / max(1, num_open)
        found += [
            replace(d, adjusted=p, interval=None if d.contrast is None else d.contrast.interval(confidence))
            for d, p in zip(of_reading, adjusted, strict=True)
        ]
    return found


def _difference(runs: Runs, name: str, base: str, reading: Reading) -> Difference:
    """Compare the seeds that both have."""
    pairs = pair_seeds(runs[name], runs.get(base, ()))
    scores = [found for one, other in pairs if (found := read_both(one, other, reading)) is not None]
    empty = Difference(method=name, base=base, reading=reading, num_seeds=len(scores), num_questions=0)
    if not scores or len(scores) < len(pairs):
        return empty
    first, second = drop_failed([[pair[0] for pair in scores], [pair[1] for pair in scores]])
    if not first.size:
        return empty
    value = float(first.mean() - second.mean())
    contrast = estimate_contrast([(1.0, first), (-1.0, second)])
    return replace(empty, num_questions=first.shape[1], value=value, contrast=contrast)


def drop_failed(tables: Sequence[Sequence[Scores]]) -> list[Array]:
    """Return scores [S, Q] of the same questions; one that failed in a run is left out of all."""
    arrays = [np.array(table, dtype=np.float64) for table in tables]  # None is nan
    is_kept = ~np.isnan(np.concatenate(arrays)).any(axis=0)  # [Q]
    return [array[:, is_kept] for array in arrays]


def pair_seeds(some: Sequence[Result], others: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Return the results of the same seeds, in their order."""
    by_seed = {find_seed(result): result for result in others}
    return [(r, by_seed[seed]) for r in some if (seed := find_seed(r)) in by_seed]


def find_seed(result: Result) -> int:
    """Return the seed of a run."""
    return int(result.settings["config"]["trainer.seed"])


def read_both(one: Result, other: Result, reading: Reading) -> tuple[Scores, Scores] | None:
    """Return the scores of two runs to compare; None without an evaluation of one."""
    if not one.evaluations or not other.evaluations:
        return None
    if reading is Reading.ROLLOUTS:
        return read_scores(one.evaluations[-1]), read_scores(other.evaluations[-1])
    limit = min(one.searches_until(one.steps), other.searches_until(other.steps))
    return scores_at(one, limit), scores_at(other, limit)


def read_scores(evaluation: Evaluation) -> Scores:
    """Return 1 for each right answer, 0 for each wrong one, None for what failed."""
    return [None if mark == FAILED else float(mark == RIGHT) for mark in evaluation.outcomes]


def scores_at(result: Result, searches: float) -> Scores:
    """Return the scores when a run had made so many searches: between two evaluations, in proportion.

    Of evaluations between which it did not search, the last one counts.
    """
    counts = [result.searches_until(evaluation.step) for evaluation in result.evaluations]
    after = bisect_right(counts, searches)
    if after in (0, len(counts)) or counts[after - 1] == searches:
        return read_scores(result.evaluations[max(0, after - 1)])
    earlier, later = (read_scores(result.evaluations[k]) for k in (after - 1, after))
    share = (searches - counts[after - 1]) / (counts[after] - counts[after - 1])
    return [
        None if a is None or b is None else (1 - share) * a + share * b
        for a, b in zip(earlier, later, strict=True)
    ]


def rank_correlation(
    some: Mapping[str, float], others: Mapping[str, float]
) -> tuple[float, float, int] | None:
    """Return Kendall's tau-b of two rankings, its p value, and the number of methods that both have.

    p is exact without ties, else by the normal approximation. None for fewer than three methods.
    """
    from scipy.stats import kendalltau

    names = [name for name in some if name in others]
    if len(names) < 3:
        return None
    found = kendalltau([some[name] for name in names], [others[name] for name in names])
    return (float(found.statistic), float(found.pvalue), len(names)) if math.isfinite(found.pvalue) else None


def band(results: Sequence[Result], curve: Callable[[Result], Curve]) -> tuple[list[int], np.ndarray]:
    """Return the steps at which something was measured, and mean, least and largest of the seeds [3, n]."""
    curves = [curve(result) for result in results]
    steps, rows = [], []
    for k in range(min(map(len, curves), default=0)):
        known = [value for each in curves if (value := each[k]) is not None]
        if known:
            steps.append(k + 1)
            rows.append((statistics.fmean(known), min(known), max(known)))
    return steps, np.array(rows, dtype=np.float64).reshape(-1, 3).T
