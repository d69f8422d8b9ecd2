"""The trajectories that a report shows: some groups, extremes of the gain, questions before and after."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from verl.run.records import TrajectoryRecord, iterate_records
from verl.run.report.run_data import RunData
from verl.run.report.text import gain_of
from verl.types import find_rightness
from verl.utils.failures import failure_name

GROUPS_PER_STEP = 8
STEP_BYTES = 200_000
"""About the most HTML of the groups of one step, so that reports of long trajectories stay below 2 MB."""
PAIRS_PER_CHANGE = {"won": 6, "lost": 3, "still wrong": 3, "still right": 3}
EXTREMES = 4
SCANNED_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StepExample:
    """Some groups of one step, each with all attempts at its question."""

    label: str
    step: int
    groups: list[list[TrajectoryRecord]]
    num_groups: int
    """Of the whole step, shown or not, as `num_attempts` and `failures`."""
    num_attempts: int
    failures: dict[str, int]
    """Count by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One held-out question in the first and in the last evaluation."""

    change: str
    before: TrajectoryRecord
    after: TrajectoryRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Extremes:
    """The trajectories with the highest and the lowest gain."""

    best: list[TrajectoryRecord]
    worst: list[TrajectoryRecord]
    scanned_steps: int


def pick_steps(run: RunData, *, max_bytes: int = STEP_BYTES) -> list[StepExample]:
    """Return the first, middle and last recorded step, with groups of about `max_bytes`, at least one."""
    steps = list(run.steps)
    if not steps:
        return []
    chosen = {steps[len(steps) // 2]: "Middle step", steps[-1]: "Last step", steps[0]: "First step"}
    return [
        _read_step(run.steps[step], step=step, label=chosen[step], max_bytes=max_bytes)
        for step in sorted(chosen)
    ]


def _read_step(path: Path, *, step: int, label: str, max_bytes: int) -> StepExample:
    groups: dict[str, list[TrajectoryRecord]] = {}
    attempts: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    size = 0
    for record in iterate_records(path):
        attempts[record["uid"]] += 1
        if record["failure"] is not None:
            failures[failure_name(record["failure"])] += 1
        has_room = not groups or (len(groups) < GROUPS_PER_STEP and size < max_bytes)
        if record["uid"] in groups or has_room:
            groups.setdefault(record["uid"], []).append(record)
            size += shown_bytes(record)
    return StepExample(
        label=label,
        step=step,
        groups=list(groups.values()),
        num_groups=len(attempts),
        num_attempts=attempts.total(),
        failures=dict(failures.most_common()),
    )


def shown_bytes(record: TrajectoryRecord) -> int:
    """Return about how much HTML a trajectory takes: its texts, and what is said of each piece of credit."""
    size = 1500 + len(record["prompt_text"]) + 2 * len(record["answer"] or "")
    for turn in record["turns"]:
        size += len(turn["output_text"]) + sum(len(passage["text"]) for passage in turn["passages"])
        size += 300 * len(turn.get("text_cuts", ()))
    return size


def pick_extremes(run: RunData) -> Extremes:
    """Return the trajectories with the highest and the lowest gain among evenly spaced steps."""
    steps = evenly_spaced(list(run.steps), SCANNED_STEPS)
    best = heapq.nlargest(EXTREMES, _measured(run, steps), key=_gain)
    worst = heapq.nsmallest(EXTREMES, _measured(run, steps), key=_gain)
    return Extremes(
        best=best, worst=[record for record in worst if record not in best], scanned_steps=len(steps)
    )


def _measured(run: RunData, steps: Sequence[int]) -> Iterator[TrajectoryRecord]:
    for step in steps:
        for record in iterate_records(run.steps[step]):
            if record["failure"] is None and gain_of(record) is not None:
                yield record


def _gain(record: TrajectoryRecord) -> float:
    return gain_of(record) or 0.0


def evenly_spaced(values: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of the values, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(k * (len(values) - 1) / (count - 1))] for k in range(count)]


def pick_pairs(run: RunData) -> list[Pair]:
    """Return held-out questions before and after: first those won and lost, then those that stayed."""
    if len(run.evaluations) < 2:
        return []
    steps = list(run.evaluations)
    first, last = run.evaluations[steps[0]], run.evaluations[steps[-1]]
    before, after = _correctness(first), _correctness(last)
    changes = {uid: _change(right, after[uid]) for uid, right in before.items() if uid in after}
    chosen = {
        uid: change
        for change, count in PAIRS_PER_CHANGE.items()
        for uid in islice((uid for uid, found in changes.items() if found == change), count)
    }
    old = {record["uid"]: record for record in iterate_records(first) if record["uid"] in chosen}
    new = {record["uid"]: record for record in iterate_records(last) if record["uid"] in chosen}
    return [Pair(change=change, before=old[uid], after=new[uid]) for uid, change in chosen.items()]


def _correctness(path: Path) -> dict[str, bool]:
    return {record["uid"]: is_right(record) for record in iterate_records(path) if record["failure"] is None}


def _change(was_right: bool, is_right_now: bool) -> str:
    if was_right == is_right_now:
        return "still right" if was_right else "still wrong"
    return "won" if is_right_now else "lost"


def is_right(record: TrajectoryRecord) -> bool:
    """Return whether the answer is right, or where that was not recorded, has the full outcome."""
    rightness = find_rightness(record["metrics"])
    return (record["outcome"] or 0.0 if rightness is None else rightness) >= 1.0
