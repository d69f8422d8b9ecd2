"""Groups of rollouts that a training run recorded: what they were rewarded and what they had read.

Read are the JSONL files of a run's `trajectories/` folder, one trajectory per line, of which the fields
`step`, `uid`, `question`, `golds`, `answer`, `turns`, `outcome`, `gain` and `failure` matter here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from IG.doctor.groups import RewardGroup
from serving.golds import EXPECTED_GOLDS, parse_golds
from serving.questions import QuestionError, Row, read_rows, refuse, require_text


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRollout:
    """One attempt at a question that did not fail."""

    group: str
    """Rollouts with the same one are compared with each other."""
    question: str
    golds: tuple[str, ...]
    context: str
    """What it read, as the policy saw it; empty without a search."""
    answer: str | None
    outcome: float
    gain: float | None
    """None when there was nothing to measure, or nobody measured it."""

    @property
    def is_measurable(self) -> bool:
        """Whether the trainer pays a gain for it."""
        return bool(self.context) and self.answer is not None


def read_rollouts(path: Path) -> list[RecordedRollout]:
    """All rollouts of a JSONL file, of a folder of them, or of a run folder. Raises QuestionError."""
    folder = path / "trajectories" if (path / "trajectories").is_dir() else path
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else [path]
    rollouts = [rollout for file in files for rollout in _read_file(file)]
    if not rollouts:
        raise QuestionError(f"{path}: no rollout has an outcome; expected trajectories of a training run")
    return rollouts


def have_gains(rollouts: Sequence[RecordedRollout]) -> bool:
    """Whether the run measured gains."""
    return any(rollout.gain is not None for rollout in rollouts)


def with_gains(
    rollouts: Sequence[RecordedRollout], gains: Mapping[tuple[str, str], float]
) -> list[RecordedRollout]:
    """Fill gains in by question and context; rollouts whose gain could not be measured are left out."""
    filled = []
    for rollout in rollouts:
        if not rollout.is_measurable:
            filled.append(rollout)
        elif (rollout.question, rollout.context) in gains:
            filled.append(replace(rollout, gain=gains[rollout.question, rollout.context]))
    return filled


def observed_groups(rollouts: Sequence[RecordedRollout]) -> list[RewardGroup]:
    """Rewards by group; where the run measured gains, a rollout without one counts 0, as in training."""
    measured = have_gains(rollouts)
    return [
        RewardGroup(
            outcomes=np.asarray([member.outcome for member in members]),
            gains=np.asarray([[member.gain or 0.0 for member in members]]) if measured else None,
            counts=np.ones(len(members)),
            is_observed=True,
        )
        for members in by_group(rollouts).values()
    ]


def by_group(rollouts: Sequence[RecordedRollout]) -> dict[str, list[RecordedRollout]]:
    """Rollouts of each group, in order."""
    groups: dict[str, list[RecordedRollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return groups


def _read_file(path: Path) -> list[RecordedRollout]:
    return [_parse(fields, where=where) for where, fields in read_rows(path) if _is_whole(fields)]


def _is_whole(fields: Row) -> bool:
    """Failed trajectories have no reward and are left out of training, hence of this."""
    return fields.get("failure") is None and fields.get("outcome") is not None


def _parse(fields: Row, *, where: str) -> RecordedRollout:
    return RecordedRollout(
        group=f"{fields.get('step')}/{require_text(fields.get('uid'), where=where, name='uid')}",
        question=require_text(fields.get("question"), where=where, name="question"),
        golds=_golds(fields.get("golds"), where=where),
        context=_context(fields.get("turns"), where=where),
        answer=answer if isinstance(answer := fields.get("answer"), str) else None,
        outcome=_number(fields.get("outcome"), where=where, name="outcome"),
        gain=None if fields.get("gain") is None else _number(fields.get("gain"), where=where, name="gain"),
    )


def _golds(value: object, *, where: str) -> tuple[str, ...]:
    golds = parse_golds(value)
    if not golds and value != []:
        refuse(value, where=where, name="golds", expected=EXPECTED_GOLDS)
    return golds


def _context(turns: object, *, where: str) -> str:
    """Every search's passages as the policy read them: `Doc k(Title: ...) text`, one per line."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        refuse(turns, where=where, name="turns", expected="a list of objects")
    searches = [turn.get("passages") or [] for turn in turns]
    context = "\n".join(_render(passages, where=where) for passages in searches if passages)
    return require_text(context, where=where, name="passages") if context else ""


def _render(passages: object, *, where: str) -> str:
    if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
        refuse(passages, where=where, name="passages", expected="a list of objects with title and text")
    return "\n".join(
        f"Doc {k}(Title: {passage.get('title', '')}) {passage.get('text', '')}"
        for k, passage in enumerate(passages, start=1)
    ).strip()


def _number(value: object, *, where: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(value, where=where, name=name, expected="a number")
    if not abs(value) <= sys.float_info.max:  # NaN, infinity, or a whole number beyond all floats
        refuse(value, where=where, name=name, expected="a finite number")
    return float(value)
