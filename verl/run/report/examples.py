"""Which trajectories to show: some steps in full groups, the extremes of gain, questions before and after."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from verl.run.records import TrajectoryRecord, iterate_records
from verl.run.report.run_data import RunData
from verl.run.report.text import gain_of

GROUPS_PER_STEP = 8
PAIRS = 15
EXTREMES = 4
SCANNED_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupExample:
    """All attempts at one question in one step."""

    question: str
    golds: list[str]
    data_source: str
    attempts: list[TrajectoryRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepExample:
    label: str
    step: int
    groups: list[GroupExample]
    num_groups: int
    """Of the whole step, shown or not."""
    num_attempts: int
    failures: dict[str, int]
    """By name, over the whole step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One held-out question in the first and in the last evaluation."""

    change: str
    before: TrajectoryRecord
    after: TrajectoryRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Extremes:
    best: list[TrajectoryRecord]
    worst: list[TrajectoryRecord]
    scanned_steps: int


def pick_steps(run: RunData) -> list[StepExample]:
    """First, middle and last recorded step."""
    steps = list(run.steps)
    if not steps:
        return []
    chosen = {steps[len(steps) // 2]: "Middle step", steps[-1]: "Last step", steps[0]: "First step"}
    return [_read_step(run.steps[step], step=step, label=chosen[step]) for step in sorted(chosen)]


def _read_step(path: Path, *, step: int, label: str) -> StepExample:
    groups: dict[str, GroupExample] = {}
    failures: Counter[str] = Counter()
    uids: set[str] = set()
    num_attempts = 0
    for record in iterate_records(path):
        num_attempts += 1
        uids.add(record["uid"])
        if record["failure"] is not None:
            failures[failure_label(record["failure"])] += 1
        if record["uid"] in groups or len(groups) < GROUPS_PER_STEP:
            _group_of(record, groups).attempts.append(record)
    return StepExample(
        label=label,
        step=step,
        groups=list(groups.values()),
        num_groups=len(uids),
        num_attempts=num_attempts,
        failures=dict(failures.most_common()),
    )


def _group_of(record: TrajectoryRecord, groups: dict[str, GroupExample]) -> GroupExample:
    empty = GroupExample(
        question=record["question"], golds=record["golds"], data_source=record["data_source"], attempts=[]
    )
    return groups.setdefault(record["uid"], empty)


def failure_label(failure: str) -> str:
    """`search_failed: no answer within 30 s` -> `search_failed`."""
    return failure.partition(":")[0].strip()


def pick_extremes(run: RunData) -> Extremes:
    """The trajectories with the highest and the lowest gain among evenly spaced steps."""
    steps = evenly_spaced(list(run.steps), SCANNED_STEPS)
    best = heapq.nlargest(EXTREMES, _with_gain(run, steps), key=_gain)
    worst = heapq.nsmallest(EXTREMES, _with_gain(run, steps), key=_gain)
    shown = {id(record) for record in best}
    worst = [record for record in worst if id(record) not in shown]
    return Extremes(best=best, worst=worst, scanned_steps=len(steps))


def _with_gain(run: RunData, steps: Sequence[int]) -> Iterator[TrajectoryRecord]:
    for step in steps:
        yield from (
            r for r in iterate_records(run.steps[step]) if r["failure"] is None and gain_of(r) is not None
        )


def _gain(record: TrajectoryRecord) -> float:
    gain = gain_of(record)
    assert gain is not None
    return gain


def evenly_spaced(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values, first and last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(k * (len(values) - 1) / (count - 1))] for k in range(count)]


def pick_pairs(run: RunData) -> list[Pair]:
    """The same held-out questions before and after: won and lost ones first, then those that stayed."""
    if len(run.evaluations) < 2:
        return []
    steps = list(run.evaluations)
    first, last = run.evaluations[steps[0]], run.evaluations[steps[-1]]
    before, after = _correctness(iterate_records(first)), _correctness(iterate_records(last))
    changes = {uid: _change(right, after[uid]) for uid, right in before.items() if uid in after}
    quota = {"won": 6, "lost": 3, "still wrong": 3, "still right": 3}
    chosen = {
        uid: change
        for change, count in quota.items()
        for uid in islice((uid for uid, found in changes.items() if found == change), count)
    }
    olds = {r["uid"]: r for r in iterate_records(first) if r["uid"] in chosen}
    news = {r["uid"]: r for r in iterate_records(last) if r["uid"] in chosen}
    return [Pair(change=change, before=olds[uid], after=news[uid]) for uid, change in chosen.items()]


def _correctness(records: Iterable[TrajectoryRecord]) -> dict[str, bool]:
    return {record["uid"]: is_right(record) for record in records if record["failure"] is None}


def _change(was_right: bool, is_right_now: bool) -> str:
    if was_right == is_right_now:
        return "still right" if was_right else "still wrong"
    return "won" if is_right_now else "lost"


def is_right(record: TrajectoryRecord) -> bool:
    """Exact match where it was recorded, else a full outcome."""
    return record["metrics"].get("em", record["outcome"] or 0.0) >= 1.0
