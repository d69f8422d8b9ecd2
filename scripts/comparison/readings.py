"""What the results say: levels, costs to a level, collapses, and differences with their verdicts.

Pure functions of results. Two readings: at equal numbers of episodes (the last evaluation of each run), and
at equal numbers of searches (as many as the one of the two that searches less made in all).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from comparison.results import FAILED, RIGHT, Curve, Evaluation, Result
from verl.evaluation.paired import SIGNIFICANCE
from verl.evaluation.statistics import Interval, adjust_holm, crossed_bootstrap

LEVELS = (0.5, 0.7)
WINDOW = 5
"""Steps over which the EM of sampled episodes is averaged: a step is reached by the mean of so many."""
COLLAPSE_WINDOW = 10
COLLAPSE_SHARE = 0.5
NO_SEARCHES = 0.1

Runs = Mapping[str, Sequence[Result]]
"""The results of each method, one per seed, in the order of the seeds."""


class Reading(StrEnum):
    ROLLOUTS = "equal episodes"
    SEARCHES = "equal searches"


class Verdict(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "no difference shown"
    OPEN = "not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What it took until the mean EM of the last steps reached a level."""

    step: int
    processor_s: float | None
    """Of all processes of the run; evaluations left out in proportion to their time."""
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
    interval: Interval | None = None
    p_value: float | None = None
    adjusted: float | None = None
    """By Holm over the comparison."""

    @property
    def verdict(self) -> Verdict:
        if self.value is None or self.adjusted is None:
            return Verdict.OPEN
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
            return Cost(
                step=k,
                processor_s=None
                if result.processor_s is None
                else result.processor_s * result.before(k, result.seconds) / result.wall_s,
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
    found: list[Difference] = []
    for reading in readings:
        of_reading = [_difference(runs, name, base, reading) for name in runs if name != base]
        adjusted = adjust_holm([difference.p_value for difference in of_reading])
        found += [replace(d, adjusted=p) for d, p in zip(of_reading, adjusted, strict=True)]
    return found


def _difference(runs: Runs, name: str, base: str, reading: Reading) -> Difference:
    """Compare the seeds that both have."""
    pairs = pair_seeds(runs[name], runs.get(base, ()))
    rows = [row for one, other in pairs if (row := outcome_differences(one, other, reading)) is not None]
    empty = Difference(method=name, base=base, reading=reading, num_seeds=len(rows), num_questions=0)
    if not rows or len(rows) < len(pairs):
        return empty
    # A question that failed in one of the runs is left out of all.
    kept = [k for k in range(min(map(len, rows))) if all(row[k] is not None for row in rows)]
    table = [[value for k in kept if (value := row[k]) is not None] for row in rows]
    tested = crossed_bootstrap(table)
    if tested is None:
        return empty
    interval, p_value = tested
    value = math.fsum(map(math.fsum, table)) / (len(table) * len(kept))
    return replace(empty, num_questions=len(kept), value=value, interval=interval, p_value=p_value)


def pair_seeds(some: Sequence[Result], others: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Return the results of the same seeds, in their order."""
    by_seed = {find_seed(result): result for result in others}
    return [(r, by_seed[seed]) for r in some if (seed := find_seed(r)) in by_seed]


def find_seed(result: Result) -> int:
    """Return the seed of a run."""
    return int(result.settings["config"]["trainer.seed"])


def outcome_differences(one: Result, other: Result, reading: Reading) -> list[float | None] | None:
    """Return the difference of each question, None where it failed; None without an evaluation to compare."""
    if not one.evaluations or not other.evaluations:
        return None
    if reading is Reading.ROLLOUTS:
        sides = [read_scores(result.evaluations[-1]) for result in (one, other)]
    else:
        limit = min(one.searches_until(one.steps), other.searches_until(other.steps))
        sides = [scores_at(result, limit) for result in (one, other)]
    return [None if a is None or b is None else a - b for a, b in zip(*sides, strict=True)]


def read_scores(evaluation: Evaluation) -> list[float | None]:
    """Return 1 for each right answer, 0 for each wrong one, None for what failed."""
    return [None if mark == FAILED else float(mark == RIGHT) for mark in evaluation.outcomes]


def scores_at(result: Result, searches: float) -> list[float | None]:
    """Return the scores when a run had made so many searches: between two evaluations, in proportion."""
    counts = [result.searches_until(evaluation.step) for evaluation in result.evaluations]
    after = next((k for k, count in enumerate(counts) if count >= searches), len(counts) - 1)
    later = read_scores(result.evaluations[after])
    if after == 0 or counts[after] <= searches:
        return later
    earlier = read_scores(result.evaluations[after - 1])
    share = (searches - counts[after - 1]) / (counts[after] - counts[after - 1])
    return [
        None if a is None or b is None else (1 - share) * a + share * b
        for a, b in zip(earlier, later, strict=True)
    ]


def rank_correlation(some: Mapping[str, float], others: Mapping[str, float]) -> float | None:
    """Return Kendall's tau-b of two rankings of the methods that both have; None for fewer than three."""
    from scipy.stats import kendalltau

    names = [name for name in some if name in others]
    if len(names) < 3:
        return None
    tau = float(kendalltau([some[name] for name in names], [others[name] for name in names]).statistic)
    return tau if math.isfinite(tau) else None


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
