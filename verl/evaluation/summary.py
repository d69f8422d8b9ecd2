"""All figures of an evaluation: per data source, over all questions and over sources, with intervals.

    micro   mean over all questions: a large set weighs more
    macro   mean over the sources of their means: each set weighs the same

Failed questions are left out and counted. A mean over only a part of the questions that did not fail is no
figure: where a verdict is missing it is most often that of a wrong answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from verl.evaluation.metrics import COSTS, QuestionScore, score_questions
from verl.evaluation.records import ResultRecord
from verl.evaluation.statistics import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Interval,
    bootstrap_interval,
    mean_of_means,
)
from verl.types import find_rightness
from verl.utils.failures import failure_name

LABELS = {
    "math": "equal expressions",
    "em": "EM",
    "f1": "F1",
    "sub_em": "cover-EM",
    "set_f1": "set F1",
    "judge": "judge",
    "majority": "majority",
    "searches": "searches",
    "turns": "turns",
    "output_tokens": "sampled tokens",
    "context_tokens": "all tokens",
    "seconds": "seconds",
}
"""In the order of a table; other names follow the scores."""
CURVES = {"num_searches": "Executed searches", "output_tokens": "Sampled tokens"}
"""What the share of right answers is shown against, by the key of a record."""
_MAX_BINS = 8
_QUANTILES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over questions, or over the means of sources."""

    value: float
    interval: Interval | None
    """95 %, by bootstrap over questions; None for costs, and where all questions have the same value."""
    num_questions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The figures of some questions: of one source, of all, or the macro average."""

    name: str
    num_questions: int
    num_failed: int
    """Questions of which no sample was scored."""
    estimates: Mapping[str, Estimate]
    """By name, those that were measured of every question that did not fail."""
    missing: Mapping[str, int]
    """Number of questions that lack a measure, by name: it has no estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The share of right answers of those that took between `low` and `high` searches or tokens."""

    low: int
    high: int
    estimate: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All figures of one evaluation."""

    sources: tuple[Group, ...]
    micro: Group
    macro: Group
    num_results: int
    failures: Mapping[str, int]
    """Failed samples by name."""
    stops: Mapping[str, int]
    curves: Mapping[str, tuple[Point, ...]]
    measure: str
    """What says whether an answer is right, see `name_measure`."""

    @property
    def names(self) -> list[str]:
        """Return what was measured, in the order of a table: scores, then costs."""
        found = {name for group in (self.micro, *self.sources) for name in (*group.estimates, *group.missing)}
        scores = [name for name in LABELS if name in found and name not in COSTS]
        others = sorted(found - LABELS.keys(), key=lambda name: (len(name), name))
        return [*scores, *others, *(name for name in COSTS if name in found)]


def summarize(records: Sequence[ResultRecord]) -> Summary:
    """Return all figures of an evaluation."""
    scores = score_questions(records)
    asked = {record["uid"]: record["data_source"] for record in records}
    sources = sorted(set(asked.values()))
    num_asked = Counter(asked.values())
    by_source = {source: [score for score in scores if score.data_source == source] for source in sources}
    groups = [_summarize_group(name, [part], num_asked=num_asked[name]) for name, part in by_source.items()]
    failures = Counter(failure_name(r["failure"]) for r in records if r["failure"] is not None)
    return Summary(
        sources=tuple(groups),
        micro=_summarize_group("micro average", [scores], num_asked=len(asked)),
        macro=_summarize_group("macro average", [*by_source.values()], num_asked=len(asked)),
        num_results=len(records),
        failures=dict(failures.most_common()),
        stops=dict(Counter(record["stop"] for record in records).most_common()),
        curves={key: tuple(curve(records, key, make_bins(records, key))) for key in CURVES},
        measure=name_measure(records),
    )


def name_measure(records: Iterable[ResultRecord]) -> str:
    """Return the label of what says whether answers are right: EM, the grade of mathematics, or both."""
    names = {"math" if "math" in record["metrics"] else "em" for record in records if record["metrics"]}
    return " or ".join(LABELS[name] for name in sorted(names)) or LABELS["em"]


def _summarize_group(name: str, strata: Sequence[Sequence[QuestionScore]], *, num_asked: int) -> Group:
    scores = [score for stratum in strata for score in stratum]
    names = dict.fromkeys(key for score in scores for key in score.values)
    missing = {key: sum(key not in score.values for score in scores) for key in names}
    # Too few samples of a question are left, because others failed: it has no pass@k, and that is no loss
    # of a certain kind of answer.
    missing = {key: count for key, count in missing.items() if count and not key.startswith("pass@")}
    estimates = {}
    for key in names.keys() - missing.keys():
        numbers = [[score.values[key] for score in stratum if key in score.values] for stratum in strata]
        if (found := estimate(numbers, with_interval=key not in COSTS)) is not None:
            estimates[key] = found
    return Group(
        name=name,
        num_questions=num_asked,
        num_failed=num_asked - len(scores),
        estimates=estimates,
        missing=missing,
    )


def estimate(strata: Sequence[Sequence[float]], *, with_interval: bool = True) -> Estimate | None:
    """Return the mean over the means of the strata with its interval; None if one has no question."""
    value = mean_of_means(strata)
    if value is None:
        return None
    interval = bootstrap_interval(strata) if with_interval else None
    return Estimate(value=value, interval=interval, num_questions=sum(map(len, strata)))


def make_bins(records: Sequence[ResultRecord], key: str) -> list[tuple[int, int]]:
    """Return the first and last count of each bin: one for each count, or fifths where there are many."""
    counts = [_count(record, key) for record in records if record["failure"] is None]
    distinct = sorted(set(counts))
    if len(distinct) <= _MAX_BINS:
        return [(count, count) for count in distinct]
    shares = np.arange(1, _QUANTILES + 1) / _QUANTILES
    ends = np.unique(np.quantile(counts, shares, method="inverted_cdf")).astype(int).tolist()
    return list(zip([distinct[0], *(end + 1 for end in ends)], ends, strict=False))


def curve(records: Sequence[ResultRecord], key: str, bins: Sequence[tuple[int, int]]) -> list[Point]:
    """Return how many answers are right in each bin of counts that has any; questions are resampled."""
    points = []
    for low, high in bins:
        inside = [r for r in records if r["failure"] is None and low <= _count(r, key) <= high]
        if found := estimate([[find_rightness(score.values) or 0.0 for score in score_questions(inside)]]):
            points.append(Point(low=low, high=high, estimate=found))
    return points


def _count(record: ResultRecord, key: str) -> int:
    return record["num_searches"] if key == "num_searches" else record["output_tokens"]


def summary_json(summary: Summary) -> dict[str, object]:
    """Return all figures as JSON."""
    return {
        "format": 1,
        "interval": {"confidence": CONFIDENCE, "method": "BCa bootstrap", "resamples": NUM_RESAMPLES},
        "results": summary.num_results,
        "measure": summary.measure,
        "failures": dict(summary.failures),
        "stops": dict(summary.stops),
        "micro": _group_json(summary.micro),
        "macro": _group_json(summary.macro),
        "sources": {group.name: _group_json(group) for group in summary.sources},
        "em_by": {
            key: [{"from": p.low, "to": p.high, **estimate_json(p.estimate)} for p in points]
            for key, points in summary.curves.items()
        },
    }


def _group_json(group: Group) -> dict[str, object]:
    return {
        "questions": group.num_questions,
        "failed": group.num_failed,
        "missing": dict(group.missing),
        "metrics": {name: estimate_json(found) for name, found in sorted(group.estimates.items())},
    }


def estimate_json(found: Estimate) -> dict[str, object]:
    """Return an estimate as JSON."""
    low, high = found.interval or (None, None)
    return {"value": found.value, "low": low, "high": high, "questions": found.num_questions}
