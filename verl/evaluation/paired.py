"""Compare evaluations of the same questions: scores, paired differences, tests, Holm over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from verl.errors import DataError
from verl.evaluation.metrics import COSTS, score_questions
from verl.evaluation.records import Key, ResultRecord
from verl.evaluation.statistics import adjust_holm, mcnemar_p_value, sign_flip_p_value
from verl.evaluation.summary import CURVES, Estimate, Point, curve, estimate, estimate_json, make_bins

MACRO = "macro average"
SIGNIFICANCE = 0.05
Runs = Mapping[str, Sequence[ResultRecord]]
"""The results of each run by its name."""
Pair = tuple[str, str]
"""A run, and the one that it is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A run against another one on the questions of one set, or by the macro average."""

    run: str
    base: str
    """The other one."""
    set_name: str
    estimate: Estimate
    """Of the run's score minus that of the base."""
    p_value: float | None
    test: str
    adjusted: float | None = None
    """By Holm over all sets and pairs of the metric."""

    @property
    def is_significant(self) -> bool:
        return self.adjusted is not None and self.adjusted < SIGNIFICANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All runs by one metric."""

    metric: str
    scores: Mapping[str, Mapping[str, Estimate]]
    """By set (the macro average last, if there are several) and run."""
    differences: tuple[Difference, ...]
    empty_sources: tuple[str, ...] = ()
    """Sources of which no question is left to compare: without them there is no macro average."""


def pair_runs(runs: Runs, *, intersect: bool) -> tuple[dict[str, list[ResultRecord]], dict[str, int]]:
    """Return the answers to what all runs were asked, in one order, and the number of those left out.

    An answer that failed in one run is left out of all, so that all means are over the same questions. The
    counts are `not in all` and `failed in RUN`. Raises DataError if the runs were not asked the same, unless
    `intersect` is set, or if what they were asked differs under the same uid.
    """
    by_key = {name: {(r["uid"], r["sample"]): r for r in results} for name, results in runs.items()}
    first, *others = by_key
    shared = [key for key in by_key[first] if all(key in by_key[name] for name in others)]
    num_all = len(set().union(*by_key.values()))
    if len(shared) < num_all and not intersect:
        raise DataError(_describe_mismatch(by_key, num_shared=len(shared)))
    if not shared:
        raise DataError(f"{', '.join(by_key)} have no question in common; compare runs of the same data")
    for name in others:
        _check_same_questions(shared, by_key, first=first, other=name)
    counts = Counter({"not in all": num_all - len(shared)})
    kept = []
    for key in shared:
        failed = [name for name, records in by_key.items() if records[key]["failure"] is not None]
        counts.update(f"failed in {name}" for name in failed)
        if not failed:
            kept.append(key)
    if not kept:
        raise DataError(f"every shared question failed in one of {', '.join(by_key)}; evaluate them again")
    return {name: [records[key] for key in kept] for name, records in by_key.items()}, dict(+counts)


def _describe_mismatch(by_key: Mapping[str, Mapping[Key, ResultRecord]], *, num_shared: int) -> str:
    first, *others = by_key
    parts = []
    for name in others:
        lacks = [key for key in by_key[first] if key not in by_key[name]]
        adds = [key for key in by_key[name] if key not in by_key[first]]
        if lacks or adds:
            uid, sample = (lacks or adds)[0]
            parts.append(
                f"{name} lacks {len(lacks)} of the {len(by_key[first])} answers of {first} and has "
                f"{len(adds)} that {first} lacks (for example {uid}, sample {sample})"
            )
    return (
        f"the runs were not asked the same: {'; '.join(parts)}. Complete them, or give --intersect to "
        f"compare the {num_shared} answers that all of them have"
    )


def _check_same_questions(
    keys: Sequence[Key], by_key: Mapping[str, Mapping[Key, ResultRecord]], *, first: str, other: str
) -> None:
    """Raise DataError if a uid stands for another question, or other gold answers, in the other run."""
    for key in keys:
        one, two = by_key[first][key], by_key[other][key]
        if (one["question"], one["golds"]) != (two["question"], two["golds"]):
            raise DataError(
                f"{key[0]} is another question in {other} ({two['question']!r}, {two['golds']}) than in "
                f"{first} ({one['question']!r}, {one['golds']}); compare runs of the same data files"
            )


def list_pairs(names: Sequence[str], *, base: str | None = None, every: bool = False) -> list[Pair]:
    """Return every run with the base, by default the first one, or every pair of runs, the later one first.

    Raises DataError for a base that is none of the runs.
    """
    if every:
        return [(later, earlier) for earlier, later in combinations(names, 2)]
    base = names[0] if base is None else base
    if base not in names:
        raise DataError(f"--base {base} is none of the runs, which are {', '.join(names)}")
    return [(name, base) for name in names if name != base]


def compare_runs(
    runs: Runs, *, metric: str, pairs: Sequence[Pair] = (), asked: Collection[str] = ()
) -> Comparison:
    """Compare paired results by a metric; without `pairs` all runs with the first one.

    `asked` are the sources that all runs were asked, also those whose answers were all left out. Raises
    DataError if answers of a run lack the metric.
    """
    values = {name: _values(name, results, metric) for name, results in runs.items()}
    first, *others = values
    uids = {uid for uid in values[first] if all(uid in values[name] for name in others)}
    sources = sorted({source for source, _ in uids})
    sets: dict[str, list[list[tuple[str, str]]]] = {
        source: [sorted(key for key in uids if key[0] == source)] for source in sources
    }
    empty = {*asked, *(record["data_source"] for record in runs[first])} - {*sources}
    if len(sources) > 1 and not empty:
        sets[MACRO] = [stratum for strata in sets.values() for stratum in strata]
    scores: dict[str, dict[str, Estimate]] = {}
    differences = []
    pairs = pairs or list_pairs([*values])
    for set_name, strata in sets.items():
        scores[set_name] = {name: _estimate(strata, values[name]) for name in values}
        differences += [
            _difference(pair, set_name, strata, values, is_exact=metric == "em") for pair in pairs
        ]
    adjusted = adjust_holm([difference.p_value for difference in differences])
    return Comparison(
        metric=metric,
        scores=scores,
        differences=tuple(replace(d, adjusted=p) for d, p in zip(differences, adjusted, strict=True)),
        empty_sources=tuple(sorted(empty)),
    )


_Values = Mapping[tuple[str, str], float]
"""The score of a question by source and uid."""


def _values(name: str, results: Sequence[ResultRecord], metric: str) -> _Values:
    scores = score_questions(results)
    known = sorted({key for score in scores for key in score.values} - set(COSTS))
    if metric not in known:
        raise DataError(f"{name} has no metric {metric}; compare by {', '.join(known)}")
    lacking = [score.uid for score in scores if metric not in score.values]
    # A question has no pass@k if too few of its samples are left; see `verl.evaluation.summary`.
    if lacking and not metric.startswith("pass@"):
        raise DataError(
            f"{name} cannot be compared by {metric}: {len(lacking)} of its {len(scores)} questions lack it "
            f"(for example {lacking[0]})"
        )
    return {(s.data_source, s.uid): s.values[metric] for s in scores if metric in s.values}


def _estimate(strata: Sequence[Sequence[tuple[str, str]]], values: _Values) -> Estimate:
    found = estimate([[values[key] for key in stratum] for stratum in strata])
    assert found is not None  # each set has a question
    return found


def _difference(
    pair: Pair,
    set_name: str,
    strata: Sequence[Sequence[tuple[str, str]]],
    values: Mapping[str, _Values],
    *,
    is_exact: bool,
) -> Difference:
    run, base = pair
    ours, theirs = values[run], values[base]
    found = [[ours[key] - theirs[key] for key in stratum] for stratum in strata]
    size = estimate(found)
    assert size is not None
    both = [(theirs[key], ours[key]) for key in strata[0]]
    # McNemar's test needs answers that are right or wrong, not means over samples or sets.
    if is_exact and len(strata) == 1 and all({*scores} <= {0.0, 1.0} for scores in both):
        p_value, test = mcnemar_p_value([a == 1.0 for a, _ in both], [b == 1.0 for _, b in both]), "McNemar"
    else:
        p_value, test = sign_flip_p_value(found), "sign flip"
    return Difference(run=run, base=base, set_name=set_name, estimate=size, p_value=p_value, test=test)


def shared_curves(runs: Runs) -> dict[str, dict[str, list[Point]]]:
    """Return right answers by searches and by tokens: of each run, in the bins of all runs together."""
    every = [record for results in runs.values() for record in results]
    return {
        key: {name: curve(results, key, make_bins(every, key)) for name, results in runs.items()}
        for key in CURVES
    }


def comparison_json(comparison: Comparison) -> dict[str, object]:
    """Return a comparison as JSON."""
    return {
        "scores": {
            set_name: {name: estimate_json(found) for name, found in of_runs.items()}
            for set_name, of_runs in comparison.scores.items()
        },
        "empty_sources": list(comparison.empty_sources),
        "differences": [
            {
                "run": d.run,
                "base": d.base,
                "set": d.set_name,
                **estimate_json(d.estimate),
                "p": d.p_value,
                "p_holm": d.adjusted,
                "test": d.test,
            }
            for d in comparison.differences
        ],
    }
